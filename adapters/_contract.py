"""The contract between methods, sites and the engine: what a site is, and what a method must define.

Shapes, stated once: `x (..., n_in)` enters a site, `y (..., n_out)` leaves it, `w (n_out, n_in)` is its weight
(`(experts, n_out, n_in)` where experts are fused), `p` maps the names of one adapter's tensors at one site to the
tensors. Inside a method `x` is `(rows, tokens, n_in)`; every formula written with `@` and `.mT` also holds when the
tensors of `p` carry a leading dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

from torch import Tensor

from adapters._errors import AdapterError

Tensors: TypeAlias = Mapping[str, Tensor]
Key: TypeAlias = int | str | None  # an element of a call's inputs or outputs; None: the output is the tensor itself


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch are in what reaches a site, as the probe saw it.

    "axis": axis `axis` counts the rows. "flattened" and "windowed": axis `axis` counts rows and, within a row, tokens
    or windows of tokens. "interleaved": it counts tokens and, within a token, rows. "routed": tokens were picked, as
    for an expert, and follow the index that picked them. "none": nothing there depends on the row, or no layout fits.
    """

    layout: Literal["axis", "flattened", "windowed", "interleaved", "routed", "none"] = "none"
    axis: int = 0

    def __str__(self) -> str:
        return self.layout if self.layout in ("none", "routed") else f"{self.layout} {self.axis}"


NOWHERE = Rows("none")


@dataclass(frozen=True)
class WeightSite:
    """A parameter of two or more dimensions that multiplies activations, or a table in which they are looked up.

    `path` names the parameter, `owner` the module that holds it. `access` is "call" where calling the owner computes
    `x @ w.T + bias` and nothing else, "read" where other code reads the parameter: fused experts, convolutions, tables.
    `transposed` marks storage as `(n_in, n_out)`; a table of `n_in` rows is one, read with one-hot activations.
    `folded` are the stored axes that are seen as one, where there are more than two: a convolution's kernel is stored
    as `(n_out, channels, *kernel)` and seen as `(n_out, n_in)`, n_in = channels * positions. `aliases` are further
    paths of the same parameter. Sites with `default=False` are adapted only when named in `targets`; `reason` says why.
    """

    path: str
    owner: str
    parameter: str
    role: str
    n_in: int
    n_out: int
    experts: int | None = None
    transposed: bool = False
    access: Literal["call", "read"] = "call"
    block: str = ""
    default: bool = True
    reason: str = ""
    aliases: tuple[str, ...] = ()
    folded: tuple[int, ...] = ()
    rows: Rows = NOWHERE
    kind: ClassVar[str] = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `w` as methods see it: `(n_out, n_in)`, or `(experts, n_out, n_in)`."""
        return (self.n_out, self.n_in) if self.experts is None else (self.experts, self.n_out, self.n_in)


@dataclass(frozen=True)
class StreamSite:
    """The value a branch adds to the residual stream: output `output` of the module at `path`, `width` wide.

    `branch` is "attention", "mlp" or "ssm". The branch's input is argument `input` of that module's call, or, where
    the module does not receive it (`input` None), the first argument of the module at `tap`, or unknown (both None).
    `axis` and `input_axis` are the axes of features, -1, or 1 in pictures.
    """

    path: str
    branch: Literal["attention", "mlp", "ssm"]
    width: int
    output: Key = None
    input: Key = None
    tap: str | None = None
    axis: int = -1
    input_axis: int = -1
    block: str = ""
    default: bool = True
    reason: str = ""
    rows: Rows = NOWHERE
    kind: ClassVar[str] = "stream"

    @property
    def role(self) -> str:
        return f"stream.{self.branch}"


@dataclass(frozen=True)
class KeyValueSite:
    """The keys `(rows, heads, tokens, k_dim)` and values `(rows, heads, tokens, v_dim)` of the attention at `path`.

    `product` is None where the attention goes through transformers' interface; where it is written out in the module,
    it is the number, from 0, of the product of queries and keys among the module's products of batches of matrices.
    """

    path: str
    heads: int
    k_dim: int
    v_dim: int
    causal: bool = True
    block: str = ""
    default: bool = True
    reason: str = ""
    rows: Rows = NOWHERE
    product: int | None = None
    kind: ClassVar[str] = "keyvalue"

    @property
    def role(self) -> str:
        return "keyvalue"


@dataclass(frozen=True)
class LayerSite:
    """Where hidden states of `width` features enter the block at `path`: argument `input` of its call.

    `output` is the element of what it returns that goes on to the next, `axis` the axis of tokens.
    """

    path: str
    width: int
    input: Key = 0
    output: Key = None
    axis: int = 1
    block: str = ""
    default: bool = True
    reason: str = ""
    rows: Rows = NOWHERE
    kind: ClassVar[str] = "layer"

    @property
    def role(self) -> str:
        return "layer"


Site: TypeAlias = WeightSite | StreamSite | KeyValueSite | LayerSite


class Weight(Protocol):
    """A base weight that is read on demand, so that a 4-bit weight is dequantised only by who needs it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dense(self) -> Tensor:
        """The weight in the contract's orientation, `(n_out, n_in)`, in the base's floating-point dtype."""
        ...


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a weight: `scale * left @ right`, left `(..., n_out, rank)`, right `(..., rank, n_in)`."""

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        return self.scale * (self.left @ self.right)


@dataclass(frozen=True)
class Method:
    """What every method shares: a frozen dataclass whose fields are its hyperparameters, checked when it is made."""

    name: ClassVar[str] = ""  # set by registration
    kind: ClassVar[str] = ""
    mergeable: ClassVar[bool] = False
    quantize: ClassVar[str | None] = None  # a preset that quantises its base names the format here

    def wants(self, site: Site) -> bool:
        """Whether this method, with these hyperparameters, acts at `site` when the caller names no targets."""
        return site.default


@dataclass(frozen=True)
class WeightMethod(Method):
    """Changes a weight: `weight` defines the method, `factors` or `delta` are shortcuts that must agree with it.

    A method that has neither shortcut runs by its definition. `dropout`, if it has such a field, is the probability
    with which the engine zeroes elements of the `x` that the change sees, in training.
    """

    kind: ClassVar[str] = "weight"
    mergeable: ClassVar[bool] = True

    def init(self, site: WeightSite, w: Weight) -> dict[str, Tensor]:
        """Fresh tensors, fp32 on the default device; with a leading `experts` dimension where the site has one."""
        raise NotImplementedError

    def weight(self, w: Tensor, p: Tensors) -> Tensor:
        """The definition: the adapted weight, shaped like `w`."""
        raise NotImplementedError

    def factors(self, p: Tensors) -> Factors | None:
        """The change as a low-rank product, where it is one; the engine then never forms the dense change."""
        return None

    def delta(self, x: Tensor, y: Tensor, w: Weight, p: Tensors) -> Tensor:
        """What to add to `y = base(x)`: `x @ (weight(w, p) - w).T`."""
        low = self.factors(p)
        if low is not None:
            return low.scale * (x @ low.right.mT @ low.left.mT)
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
class KeyValueMethod(Method):
    """Prepends `length` trained keys and values to an attention's own.

    `positions` "before" leaves the real tokens where they are, "shifted" moves them by `length`.
    """

    kind: ClassVar[str] = "keyvalue"
    length: int = 0
    positions: Literal["before", "shifted"] = "before"

    def start(self) -> str | int:
        """What the prefix starts as: the keys and values of this text, or of this many beginning-of-text tokens."""
        raise NotImplementedError

    def init(self, site: KeyValueSite, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Fresh tensors from the keys `(heads, length, k_dim)` and values `(heads, length, v_dim)` of the start."""
        raise NotImplementedError

    def prefix(self, p: Tensors) -> tuple[Tensor, Tensor]:
        """Keys `(heads, length, k_dim)` and values `(heads, length, v_dim)` to prepend."""
        raise NotImplementedError


def require(condition: bool, sentence: str) -> None:
    """Raises AdapterError with `sentence` unless `condition` holds: one clear sentence for every bad hyperparameter."""
    if not condition:
        raise AdapterError(sentence)
