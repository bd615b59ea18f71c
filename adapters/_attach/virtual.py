"""A prefix as virtual tokens, for models without an attention that keys could be prepended to.

`length` positions are inserted at the model's input and overwritten with trained states before every layer, so that the
real tokens meet them in whatever mixes tokens: a recurrence, a convolution, a Fourier transform. They are dropped after
the last layer. (Deep prompts: Qin and Eisner, 2021, arXiv 2104.06599, section 3.2; P-tuning v2, arXiv 2110.07602.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach.container import CHILD, Container, LayerStates
from adapters._attach.signature import parameters_of
from adapters._attach.state import STATE, State, notes, selection
from adapters._contract import LayerSite
from adapters._errors import AdapterError

INPUTS = ("input_ids", "inputs_embeds", "inputs")  # what a model's input may be called
_PAST = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_PLAN = "virtual tokens"


@dataclass(frozen=True)
class Plan:
    """Where virtual tokens are in one forward: `order` (rows, tokens + length) is the real token at each position, or
    -1 - i for the i-th virtual one; `last` is the layer after which they are dropped."""

    order: Tensor
    length: int
    last: str

    def widened(self, x: Tensor, fill: Any) -> Tensor:
        """(rows, tokens, ...) with `fill` at the virtual positions."""
        order = self.order.to(x.device)
        rows = x.expand(order.shape[0], *x.shape[1:])
        at = order.clamp(min=0).view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
        virtual = (order < 0).view(*order.shape, *[1] * (x.dim() - 2))
        return torch.where(virtual, torch.as_tensor(fill, dtype=x.dtype, device=x.device), rows.gather(1, at))

    def overwritten(self, x: Tensor, states: Tensor) -> Tensor:
        """(rows, tokens + length, width) with `states (length, width)` at the virtual positions."""
        order = self.order.to(x.device)
        made = states.to(x.dtype)[(-1 - order).clamp(min=0)]
        return torch.where((order < 0)[..., None], made, x)

    def dropped(self, x: Tensor) -> Tensor:
        """(rows, tokens, ...) without the virtual positions."""
        order = self.order.to(x.device)
        keep = (order >= 0).nonzero()[:, 1].view(order.shape[0], -1)
        at = keep.view(*keep.shape, *[1] * (x.dim() - 2)).expand(*keep.shape, *x.shape[2:])
        return x.gather(1, at)


def entry_of_layers(model: nn.Module, sites: tuple[LayerSite, ...]) -> str:
    """The innermost module around the layers that is given token ids: where virtual tokens are inserted."""
    path = sites[0].path
    while path:
        path = path.rpartition(".")[0]
        if set(INPUTS) & set(parameters_of(model.get_submodule(path))):
            return path
    raise AdapterError(f"no module around {sites[0].path} is given tokens, where virtual ones could be inserted.")


def entry_call(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The call of the module that is given the tokens: virtual ones are inserted, masks and positions follow."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: State | None = self.__dict__.get(STATE)
        acting = [a for a in selection(state) if isinstance(a.sites[0], LayerSite)] if state is not None else []
        if not acting or state is None or _PLAN in notes(state):
            return inner(self, *args, **kwargs)
        if len(acting) > 1:
            names = ", ".join(adapter.name for adapter in acting)
            raise AdapterError(f"{names} all insert virtual tokens, of which one adapter at a time can act.")
        named = dict(zip(parameters_of(self), args, strict=False)) | kwargs
        length = int(getattr(acting[0].method, "length", 0))
        plan = _plan(named, length, acting[0].sites[-1].path)
        if _continues(named):
            return inner(self, **_continued(named, plan, length))
        notes(state)[_PLAN] = plan
        try:
            return _without(inner(self, **_inserted(named, plan, _token(self))), plan)
        finally:
            del notes(state)[_PLAN]

    return __call__


def layer_call(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a layer: its virtual positions are overwritten before it, and dropped after the last."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state, held = self.__dict__.get(STATE), self._modules.get(CHILD)
        plan: Plan | None = notes(state).get(_PLAN) if state is not None else None
        if plan is None or not isinstance(held, Container):
            return inner(self, *args, **kwargs)
        entries = [(a, held._modules.get(a.slot)) for a in selection(cast(State, state))]
        adapter, entry = next(((a, each) for a, each in entries if isinstance(each, LayerStates)), (None, None))
        if adapter is None or entry is None:
            return inner(self, *args, **kwargs)
        site, states = cast(LayerSite, entry.site), entry(adapter.at(entry))
        args, kwargs = _exchanged(args, kwargs, site, lambda x: plan.overwritten(x, states))
        result = inner(self, *args, **kwargs)
        return with_output(result, site, plan.dropped) if site.path == plan.last else result

    return __call__


def _plan(named: Mapping[str, Any], length: int, last: str) -> Plan:
    """Virtual tokens stand before the first token of each row that the mask does not hide."""
    x = next(named[name] for name in INPUTS if named.get(name) is not None)
    rows, tokens = x.shape[:2]
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise AdapterError("virtual tokens cannot be inserted into a mask that is not (rows, tokens): pass such a one.")
    count = mask.shape[1] if isinstance(mask, Tensor) else tokens  # a continued row's mask covers its past
    start = torch.zeros(rows, dtype=torch.long, device=x.device)
    if isinstance(mask, Tensor):
        start = mask.to(torch.bool).long().argmax(1).to(x.device)
    at = torch.arange(count + length, device=x.device)[None] - start[:, None]
    behind = at + start[:, None] - length
    return Plan(torch.where(at < 0, at + start[:, None], torch.where(at < length, -1 - at, behind)), length, last)


def _inserted(named: Mapping[str, Any], plan: Plan, token: int) -> dict[str, Any]:
    x = next(named[name] for name in INPUTS if named.get(name) is not None)
    made = dict(named)
    for name, value in named.items():
        if not isinstance(value, Tensor) or "label" in name:
            continue  # labels meet the logits, behind the last layer, where the virtual positions are gone
        if name == "position_ids":
            positions = (plan.order < 0).long() * (-1 - plan.order)
            moved = plan.widened(value + plan.length, 0) if value.dim() == 2 else None
            if moved is None:
                raise AdapterError("virtual tokens need position_ids of (rows, tokens).")
            made[name] = torch.where(plan.order < 0, positions, moved)
        elif name == "cache_position":
            made[name] = torch.arange(plan.order.shape[1], device=value.device)
        elif value.dim() >= 2 and value.shape[1] == x.shape[1] and value.shape[0] in (1, x.shape[0]):
            ids = name in INPUTS and not value.is_floating_point()
            made[name] = plan.widened(value, token if ids else 1 if name == "attention_mask" else 0)
    return made


def _continued(named: Mapping[str, Any], plan: Plan, length: int) -> dict[str, Any]:
    """A step of generation: the virtual tokens are in the cache or the state, and only masks and positions know."""
    made = dict(named)
    if isinstance(named.get("attention_mask"), Tensor):
        made["attention_mask"] = plan.widened(named["attention_mask"], 1)
    for name in ("position_ids", "cache_position"):
        if isinstance(named.get(name), Tensor):
            made[name] = named[name] + length
    return made


def _continues(named: Mapping[str, Any]) -> bool:
    """Whether the forward goes on from an earlier one."""
    for name in _PAST:
        past = named.get(name)
        if past is None:
            continue
        if hasattr(past, "has_previous_state"):
            known = past.has_previous_state
            return bool(known() if callable(known) else known)
        if hasattr(past, "get_seq_length"):
            return int(past.get_seq_length()) > 0
        return True
    return False


def _without(result: Any, plan: Plan) -> Any:
    """What the model returns of its layers one by one, without the virtual positions."""
    every = result.get("hidden_states") if hasattr(result, "get") else None
    if isinstance(every, tuple):
        wide = plan.order.shape[1]
        result["hidden_states"] = tuple(plan.dropped(x) if x.shape[1] == wide else x for x in every)
    return result


def _exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], site: LayerSite, change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the layer's hidden states changed, as (rows, tokens, width)."""
    at = site.input
    if isinstance(at, int) and at < len(args):
        return (*args[:at], _turned(args[at], site, change), *args[at + 1 :]), kwargs
    if isinstance(at, str) and at in kwargs:
        return args, {**kwargs, at: _turned(kwargs[at], site, change)}
    raise AdapterError(f"the hidden states did not reach the layer {site.path} as its argument {at!r}.")


def with_output(result: Any, site: LayerSite, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer returned with its hidden states changed, as (rows, tokens, width)."""
    if site.output is None:
        return _turned(result, site, change)
    if isinstance(result, tuple):
        return tuple(_turned(x, site, change) if i == site.output else x for i, x in enumerate(result))
    result[site.output] = _turned(result[site.output], site, change)
    return result


def _turned(x: Tensor, site: LayerSite, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(x) if site.axis == 1 else change(x.transpose(0, 1)).transpose(0, 1)


def _token(module: nn.Module) -> int:
    """Any token but that of padding: what stands at a virtual position is overwritten before the first layer."""
    padding = getattr(getattr(module, "config", None), "pad_token_id", None)
    return 1 if padding == 0 else 0
