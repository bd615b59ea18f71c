"""A prefix inside an attention that is written out in a model's own forward, where no interface can be asked.

    softmax(f(q k^T)) v   becomes   softmax([s q P_k^T; f(q k^T)]) [P_v; v],   f a scale s, a bias, a mask

While the attention's module runs, a function mode waits for the product of queries and keys, computes the scores of the
prefix, and carries these columns beside the model's own through whatever f does: scales and changes of layout are done
to both, masks and position biases are the model's own columns' alone. At the softmax both are joined and parted again,
and the product with the values gets the prefix's share added. What cannot be followed is an error, never a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from adapters._sites.operands import operation, words

_PAIRS = words("matmul __matmul__ bmm baddbmm einsum scaled_dot_product_attention")
_SCALES = words(
    "mul __mul__ __rmul__ mul_ __imul__ div __truediv__ true_divide div_ __itruediv__ neg tanh pow __pow__ to float "
    "half bfloat16 type type_as contiguous clone dropout dropout_ clamp maximum minimum max"
)
_SHIFTS = words("add __add__ __radd__ add_ __iadd__ sub __sub__ sub_ __isub__")
_MASKS = words("masked_fill masked_fill_ where")
_VIEWS = words("view reshape unsqueeze squeeze flatten unflatten expand view_as")
_TURNS = words("transpose permute movedim swapaxes")
_LOOKS = words("__get__ size dim stride is_contiguous numel amax amin")
_LIKE = words("expand_as view_as reshape_as type_as")  # what their second operand is looked at for


class Unfollowed(Exception):
    """The scores went a way on which the prefix's columns cannot be carried along."""


class Prefix(Protocol):
    """What is prepended, in the layout of what it is prepended to; `lead` are axes of rows and heads."""

    def keys(self, k: Tensor) -> Tensor:
        """(*lead, length, k_dim), given the model's own keys (*lead, tokens, k_dim)."""
        ...

    def values(self, v: Tensor) -> Tensor:
        """(*lead, length, v_dim), given the model's own values (*lead, tokens, v_dim)."""
        ...


def pair(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The operands of a product of two batches of matrices, neither of them a parameter; None for all else."""
    if op not in _PAIRS:
        return None
    found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
    found = found[1:] if op == "baddbmm" else found
    if len(found) < 2 or any(x.dim() < 3 or isinstance(x, nn.Parameter) for x in found[:2]):
        return None
    return found[0], found[1]


class Written(TorchFunctionMode):
    """Active while the module of one attention runs; `product` is the number, among its pairs, of queries and keys."""

    def __init__(self, product: int, prefix: Prefix) -> None:
        super().__init__()
        self.product, self.prefix = product, prefix
        self.seen, self.done = 0, False
        self._beside: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a tensor of scores, and the prefix's columns

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = operation(func)
        operands = pair(op, args, kwargs)
        if operands is not None:
            self.seen += 1
            if self.seen - 1 == self.product:
                return self._scores(op, func, operands, args, kwargs)
            if id(operands[0]) in self._beside:
                return self._weighted(op, func, operands, args, kwargs)
        scores = next((x for x in tree_leaves((args, kwargs)) if id(x) in self._beside), None)
        if scores is None:
            return func(*args, **kwargs)
        if op == "softmax":
            return self._softmax(func, scores, args, kwargs)
        if op in _LIKE and args[0] is not scores:
            return func(*args, **kwargs)
        return self._follow(op, func, scores, args, kwargs)

    def weights(self, w: Tensor) -> None:
        """Called with the model's own columns of the softmax, (*lead, queries, tokens), or with what is visible."""

    def _scores(self, op: str, func: Any, operands: tuple[Tensor, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        q, k = operands
        if op == "scaled_dot_product_attention":
            return self._whole(func, args, kwargs)
        if op == "einsum":
            equation = _equation(args)
            columns = torch.einsum(equation, q, _laid(equation, k, self.prefix.keys, summed=True))
        else:
            columns = torch.matmul(q, self.prefix.keys(k.mT).to(q.dtype).mT)
            columns = columns * kwargs.get("alpha", 1) if op == "baddbmm" else columns
        return self._put(func(*args, **kwargs), columns)

    def _weighted(self, op: str, func: Any, operands: tuple[Tensor, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        _, columns = self._beside.pop(id(operands[0]))
        v = operands[1]
        if op == "einsum":
            equation = _equation(args)
            share = torch.einsum(equation, columns, _laid(equation, v, self.prefix.values, summed=False))
        elif op == "baddbmm":
            raise Unfollowed(op)
        else:
            share = torch.matmul(columns, self.prefix.values(v).to(columns.dtype))
        self.done = True
        return func(*args, **kwargs) + share

    def _whole(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A fused attention called by the model itself: keys, values and mask are extended."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
        pk, pv = self.prefix.keys(k).to(k.dtype), self.prefix.values(v).to(v.dtype)
        if given.get("is_causal"):
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        seen = q.new_ones(q.shape[-2], k.shape[-2]) if mask is None else mask
        self.weights(seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else seen)
        if mask is not None:
            free = (torch.ones if mask.dtype == torch.bool else torch.zeros)(
                *mask.shape[:-1], pk.shape[-2], dtype=mask.dtype, device=mask.device
            )
            mask = torch.cat([free, mask.expand(*mask.shape[:-1], k.shape[-2])], -1)
        given |= {"key": torch.cat([pk, k], -2), "value": torch.cat([pv, v], -2), "attn_mask": mask, "is_causal": False}
        self.done = True
        return func(**given)

    def _softmax(self, func: Any, scores: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        _, columns = self._beside.pop(id(scores))
        axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if axis not in (-1, scores.dim() - 1):
            raise Unfollowed(f"a softmax along axis {axis}")
        length = columns.shape[-1]
        joined = torch.cat([columns.to(scores.dtype), scores], -1)
        both = func(*tree_map(lambda x: joined if x is scores else x, args), **kwargs)
        own = both[..., length:]
        self.weights(own)
        return self._put(own, both[..., :length])

    def _follow(self, op: str, func: Any, scores: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the model does to its scores, done to the prefix's columns where it concerns them."""
        columns, width = self._beside[id(scores)][1], scores.shape[-1]
        others = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x is not scores]
        per_key = any(x.dim() and x.shape[-1] == width and width > 1 for x in others) and op != "type_as"

        def beside() -> Any:
            return func(*tree_map(lambda x: columns if x is scores else x, args), **kwargs)

        new: Any = None
        if op in _TURNS or (op in _SCALES | _SHIFTS and not per_key):
            new = beside()
        elif op in _MASKS | _SCALES | _SHIFTS:
            new = columns
        elif op not in _VIEWS | _LOOKS:
            raise Unfollowed(op)
        result = func(*args, **kwargs)
        if op in _LOOKS or (op == "max" and not isinstance(result, Tensor)):
            return result
        if not isinstance(result, Tensor) or result.shape[-1] != width:
            raise Unfollowed(op)
        if op in _VIEWS:
            new = columns if op == "expand" else columns.reshape(*result.shape[:-1], columns.shape[-1])
        return self._put(result, new)

    def _put(self, scores: Tensor, columns: Tensor) -> Tensor:
        self._beside[id(scores)] = scores, columns
        return scores


def _equation(args: tuple[Any, ...]) -> str:
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    if "->" not in equation or "." in equation or equation.count(",") != 1:
        raise Unfollowed("an einsum whose axes are not named")
    return str(equation)


def _laid(equation: str, operand: Tensor, prefix: Callable[[Tensor], Tensor], summed: bool) -> Tensor:
    """The prefix in the layout of an einsum's second operand; `summed` says that its features are summed over.

    Axes that all three terms share are rows and heads, in the order of the result.
    """
    terms, result = equation.split("->")
    first, second = terms.split(",")
    lead = [letter for letter in result if letter in first and letter in second]
    inner = [letter for letter in second if letter in first and letter not in result]
    outer = [letter for letter in second if letter in result and letter not in first]
    if len(inner) != 1 or len(outer) != 1 or len(lead) + 2 != len(second) or (summed and result[-1] != outer[0]):
        raise Unfollowed(f"einsum {equation}")
    order = [*lead, *(outer + inner if summed else inner + outer)]  # (*lead, tokens, features)
    made = prefix(operand.permute([second.index(letter) for letter in order]))
    return made.to(operand.dtype).permute([order.index(letter) for letter in second])
