"""Sites: the places in a model where a method can act, as records that can be printed, compared and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

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
    `axis` and `input_axis` are the axes of features, -1, or 1 where convolutions keep channels there.
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
