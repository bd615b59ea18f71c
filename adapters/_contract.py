"""The contract between methods, sites and the engine: what a method must define, and what it may.

Shapes, stated once: `x (..., n_in)` enters a site, `y (..., n_out)` leaves it, `w (n_out, n_in)` is its weight
(`(experts, n_out, n_in)` where experts are fused), `p` maps the names of one adapter's tensors at one site to the
tensors. Inside a method `x` is `(rows, tokens, n_in)`; every formula written with `@` and `.mT` also holds when the
tensors of `p` carry a leading dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, TypeAlias

from torch import Tensor

from adapters._change import Factors, Scaled, Weight
from adapters._errors import AdapterError
from adapters._site import NOWHERE, Key, KeyValueSite, LayerSite, Rows, Site, StreamSite, WeightSite

__all__ = [
    "NOWHERE",
    "Factors",
    "FusionMethod",
    "Key",
    "KeyValueMethod",
    "KeyValueSite",
    "LayerSite",
    "Method",
    "Rows",
    "Scaled",
    "Site",
    "StreamMethod",
    "StreamSite",
    "Tensors",
    "Weight",
    "WeightMethod",
    "WeightSite",
    "require",
]

Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """What every method shares: a frozen dataclass whose fields are its hyperparameters, checked when it is made."""

    name: ClassVar[str] = ""  # set by registration
    kind: ClassVar[str] = ""
    mergeable: ClassVar[bool] = False
    quantize: ClassVar[str | None] = None  # a preset that quantises its base names the format here

    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites it can act on, the first that a model has being taken."""
        return (self.kind,)

    def wants(self, site: Site) -> bool:
        """Whether this method, with these hyperparameters, acts at `site` when the caller names no targets."""
        return site.default

    def at(self, site: Site) -> Self:
        """This method with the hyperparameters that hold at `site`; the engine asks once a site, for all it does."""
        return self

    def review(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """What the report must say of acting at `sites`, all that were chosen; the model has not changed yet.

        Raises:
            AdapterError: a hyperparameter means none of them.
        """
        return ()


@dataclass(frozen=True)
class WeightMethod(Method):
    """Changes a weight: `weight`, and `offset` for its bias, define the method; the other functions are shortcuts.

    A shortcut must agree with the definition; a method without any runs by its definition. `dropout`, if there is such
    a field, is the probability with which the engine zeroes elements of the `x` that the change sees, in training.
    Where a weight is read instead of called, the bias is out of reach and stays as it is.
    """

    kind: ClassVar[str] = "weight"
    mergeable: ClassVar[bool] = True
    precise: ClassVar[frozenset[str]] = frozenset()  # tensors that start in fp32 whatever dtype is asked for

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        """Fresh tensors, fp32 on the default device; with a leading `experts` dimension where the site has one."""
        raise NotImplementedError

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        """The definition: the adapted weight, shaped like `w`."""
        raise NotImplementedError

    def offset(self, b: Tensor | None, p: Tensors) -> Tensor | None:
        """The definition for the bias `b (n_out,)`, None where there is none: `b` itself where it does not change."""
        return b

    def factors(self, p: Tensors) -> Factors | None:
        """The whole change as a low-rank product, where it is one; the engine then never forms the dense change."""
        return None

    def scaled(self, w: Weight, p: Tensors) -> Scaled | None:
        """The whole change of the weight as a scaling of its outputs, where it is one."""
        return None

    def inputs(self, p: Tensors) -> Tensor | None:
        """What scales the inputs, `(..., n_in)`, where that is the whole change: `weight(w, p) = w diag(inputs)`.

        The base's own product then runs on the scaled `x`, and nothing is added.
        """
        return None

    def delta(self, x: Tensor, y: Tensor | None, w: Weight, p: Tensors) -> Tensor:
        """What to add to `y = x @ w.T + b`: `x @ (weight(w, p) - w).T + offset(b, p) - b`.

        `y` is None where `x` went through dropout: the base's output was made from another `x`.
        """
        low = self.factors(p)
        if low is not None:
            return low.delta(x)
        b = w.bias()
        offset = self.offset(b, p)
        change = self._product_delta(x, y if y is None or b is None else y - b, w, p)
        if offset is None or offset is b:
            return change
        return change + (offset if b is None else offset - b).unsqueeze(-2)

    def _product_delta(self, x: Tensor, product: Tensor | None, w: Weight, p: Tensors) -> Tensor:
        """`x @ (weight(w, p) - w).T`, from `product = x @ w.T` where it is known."""
        scaled, inputs = self.scaled(w, p), self.inputs(p)
        if scaled is not None:
            return scaled.delta(x, x @ w.dense().to(x.dtype).mT if product is None else product)
        if inputs is not None:
            return (x * (inputs - 1).unsqueeze(-2)) @ w.dense().to(x.dtype).mT
        dense = w.dense()
        return x @ (self.changed(dense, p) - dense).to(x.dtype).mT

    def changed(self, w: Tensor, p: Tensors) -> Tensor:
        """`weight(w, p)`, refused where its shape is not that of `w`: broadcasting would hide the mistake."""
        new = self.weight(w, p)
        sentence = f"method {self.name!r} makes a weight of shape {tuple(new.shape)} from one of {tuple(w.shape)}."
        require(new.shape == w.shape, sentence)
        return new


@dataclass(frozen=True)
class StreamMethod(Method):
    """Changes what a branch adds to the residual stream, from the branch's input `x` and output `y`, `(..., width)`."""

    kind: ClassVar[str] = "stream"

    def reads_input(self) -> bool:
        """Whether `stream` uses `x`; where it does not, `x` is passed as None."""
        return False

    def init(self, site: StreamSite) -> dict[str, Tensor]:
        """Fresh tensors, fp32 on the default device."""
        raise NotImplementedError

    def stream(self, x: Tensor | None, y: Tensor, p: Tensors) -> Tensor:
        """The new branch output, shaped like `y`."""
        raise NotImplementedError


@dataclass(frozen=True)
class FusionMethod(StreamMethod):
    """Puts together what other adapters, its `parts` by name, make of a branch's output: `stream` is not called."""

    parts: tuple[str, ...] = ()

    def fuse(self, y: Tensor, made: Tensor, p: Tensors) -> Tensor:
        """The new branch output, shaped like `y (..., width)`, from `made (parts, ..., width)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeyValueMethod(Method):
    """Prepends `length` trained keys and values to an attention's own.

    `positions` "before" leaves the real tokens where they are, "shifted" moves them by `length`.
    """

    kind: ClassVar[str] = "keyvalue"
    length: int = 0
    positions: Literal["before", "shifted"] = "before"

    def kinds(self) -> tuple[str, ...]:
        """Attentions, or, in a model that has none, layers."""
        return ("keyvalue", "layer")

    def start(self) -> str | int:
        """What the prefix starts as: the keys and values of this text, or of this many beginning-of-text tokens."""
        raise NotImplementedError

    def init(self, site: KeyValueSite, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Fresh tensors from the keys `(heads, length, k_dim)` and values `(heads, length, v_dim)` of the start."""
        raise NotImplementedError

    def prefix(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """Keys `(heads, length, k_dim)` and values `(heads, length, v_dim)` to prepend."""
        raise NotImplementedError

    def init_states(self, site: LayerSite, states: Tensor) -> dict[str, Tensor]:
        """Fresh tensors from the hidden states `(length, width)` with which the start enters a layer."""
        raise AdapterError(f"method {self.name!r} prepends keys and values, and this model has no attention for them.")

    def states(self, p: Tensors) -> Tensor:
        """Hidden states `(length, width)` with which the virtual tokens enter a layer."""
        raise NotImplementedError


def require(condition: bool, sentence: str) -> None:
    """Raises AdapterError with `sentence` unless `condition` holds: one clear sentence for every bad hyperparameter."""
    if not condition:
        raise AdapterError(sentence)
