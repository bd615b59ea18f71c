"""Whether several documents can share one row: tried on the model at hand, with what acts in it now."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from adapters._attach.state import unwrapped
from adapters._evaluating import evaluating
from adapters.train.documents import lengths_of, splitting

Kind = Literal["packed", "masked", "padded"]
LENGTHS = (7, 12, 9)  # tokens of the three documents
_LONGEST = 128  # tokens that a document of the probe may have, to outgrow a window


@dataclass(frozen=True)
class Packing:
    """How documents share a forward.

    Args:
        kind: "packed" (one row, positions that restart), "masked" (the same with a block-diagonal mask beside it) or
            "padded" (a row for each document, padded on the right).
        reason: what was seen, or why a kind that saves padding is out of question.
        difference: between a document in the shared row and the same document alone: the norm of the difference of a
            token's logits over the norm of the logits, at the worst token.
        effect: in the same measure, what exchanging the first document does to the others where they do see it.
        by_document: attention takes the lengths of the documents, and spares the pairs of tokens between them.
    """

    kind: Kind
    reason: str
    difference: float | None = None
    effect: float | None = None
    by_document: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def probe_packing(model: Any) -> Packing:
    """Runs three short documents alone and in one row, and says which way of sharing a row keeps them apart.

    In the shared row every document must have the logits it has alone, and exchanging the first document must leave
    the logits of the others as they are; both are held against what the exchange does in a row that is one document,
    so that a model whose outputs hardly depend on anything is not accepted by accident. The documents are random and
    the logits those of every token, so that equality means that the same function is computed, and with it the same
    gradients.

    The model runs as it is, its acting adapter included, in evaluation mode and without gradients; its modes and the
    state of the random generators are those of before afterwards.
    """
    forward = inspect.signature(unwrapped(model).forward).parameters
    if "position_ids" not in forward:
        return Packing("padded", "the model takes no position_ids, which would have to restart with each document")
    with evaluating(model), same_randomness(model):
        try:
            probe = _Probe(model)
        except Exception as error:  # a model may fail in any way on rows that it was not made for
            return Packing("padded", f"the probe could not run: {error_line(error)}")
        packed = probe.tried("packed")
        if packed.kind != "padded":
            return replace(packed, by_document=probe.by_document("packed"))
        masked = probe.tried("masked")
        if masked.kind != "padded":
            return replace(masked, by_document=probe.by_document("masked"))
    return Packing("padded", f"{packed.reason}; with a mask, {masked.reason}", packed.difference, packed.effect)


def restarting(lengths: tuple[int, ...] | list[int]) -> Tensor:
    """The positions of documents that follow each other in one row, `(1, tokens)`."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def block_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask `(1, 1, tokens, tokens)`: a token sees what its document has before it; documents start at 0."""
    document = (position_ids == 0).cumsum(-1)
    apart = document[:, :, None] != document[:, None, :]
    later = torch.ones(apart.shape[-2:], dtype=torch.bool, device=apart.device).triu(1)
    mask = torch.zeros(apart.shape, dtype=dtype, device=apart.device)
    return mask.masked_fill(apart | later, torch.finfo(dtype).min)[:, None]


def mask_dtype(model: Any) -> torch.dtype:
    """The dtype in which attention adds a mask: that of the embeddings, also where the weights are in 4 bits."""
    found: torch.dtype = unwrapped(model).get_input_embeddings().weight.dtype  # type: ignore[operator]
    return found


class _Probe:
    """The truth about three documents, and what a row that shares them is held against.

    In 16 bits, rounding moves single tokens far where a model's activations have outliers (by 15 % of their logits on
    SmolLM2): there, the median of three draws counts, token by token.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        embeddings = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
        self.device, self.window = embeddings.weight.device, _window(model)
        self.lengths = list(LENGTHS)
        if self.window is not None and self.window <= _LONGEST - 5:
            self.lengths[2] = max(self.lengths[2], self.window + 5)
        self.ends = [0, *accumulate(self.lengths)]
        self.positions = restarting(self.lengths).to(self.device)
        draws = 3 if mask_dtype(model).itemsize == 2 else 1
        self.rows = [self._random(embeddings.num_embeddings, 2 * draw) for draw in range(draws)]
        self.exchanged = [row.clone() for row in self.rows]
        for draw, row in enumerate(self.exchanged):
            first = self._random(embeddings.num_embeddings, 2 * draw + 1)[:, : self.lengths[0]]
            row[:, : self.lengths[0]] = first
        self.alone = self._alone()
        one = [self._logits(row) for row in self.rows]
        self.effect = self._change(one, [self._logits(row) for row in self.exchanged])
        # the first document sees nothing else in any row, so that this is what shapes and kernels do to the rounding
        self.rounding = float(relative(one, self.alone)[: self.lengths[0]].max())

    def by_document(self, kind: Literal["packed", "masked"]) -> bool:
        """Whether attention can be computed for each document, with the same result.

        A document alone goes through the same products, so that only documents that see each other make a difference;
        what their rounding differs in from the model's own must be small beside what seeing others would change.
        """
        seen: list[None] = []
        before = self.alone
        try:
            with splitting(lambda: seen.append(None)):
                self.alone = self._alone(told=True)
                found = self.tried(kind, **lengths_of(self.positions))
                return bool(seen) and found.kind == kind and self._change(before, self.alone) <= self.effect / 2
        except Exception:  # a model may take no such arguments
            return False
        finally:
            self.alone = before

    def tried(self, kind: Literal["packed", "masked"], **lengths: Any) -> Packing:
        if kind == "masked" and self.window is not None and self.window > _LONGEST - 5:
            return Packing("padded", f"the attention's window of {self.window} tokens would be lost")
        inputs = {"position_ids": self.positions, **lengths}
        if kind == "masked":
            inputs["attention_mask"] = block_mask(self.positions, mask_dtype(self.model))
        try:
            shared, other = ([self._logits(ids, **inputs) for ids in rows] for rows in (self.rows, self.exchanged))
        except Exception as error:  # see probe_packing
            return Packing("padded", f"the model fails: {error_line(error)}")
        precision = max(torch.finfo(shared[0].dtype).eps, torch.finfo(mask_dtype(self.model)).eps)
        difference, leaked = float(relative(shared, self.alone).max()), self._change(shared, other)
        numbers = f"documents in one row differ from themselves alone by {difference:.1e}"
        if not self.effect > 8 * precision:
            return Packing("padded", "its outputs depend too little on earlier tokens to tell documents apart by them")
        same = difference <= min(max(100 * precision, 30 * self.rounding), precision**0.5, self.effect / 4)
        # the exchange changes no shape, so that only experts, who are given other tokens, can round otherwise
        if same and leaked <= min(16 * precision, self.effect / 10):
            return Packing(kind, f"{numbers}; seeing each other would by {self.effect:.1e}", difference, self.effect)
        seen = f" and by {leaked:.1e} when another one is exchanged" if leaked > 0 else ""
        return Packing("padded", f"{numbers}{seen}", difference, self.effect)

    def _random(self, vocabulary: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        text = getattr(self.model.config.get_text_config(), "vocab_size", None) or vocabulary
        return torch.randint(0, min(text, vocabulary), (1, self.ends[-1]), generator=generator).to(self.device)

    def _alone(self, told: bool = False) -> list[Tensor]:
        """The logits of each document in a forward of its own; `told`: attention knows its length."""
        found = []
        for row in self.rows:
            pieces = [row[:, start:end] for start, end in pairwise(self.ends)]
            inputs = [lengths_of(restarting([ids.shape[1]]).to(self.device)) if told else {} for ids in pieces]
            found.append(torch.cat([self._logits(ids, **kw) for ids, kw in zip(pieces, inputs, strict=True)]))
        return found

    def _logits(self, ids: Tensor, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **inputs).logits[0]
        if not torch.isfinite(logits).all():
            raise ValueError("the logits are not finite")
        return logits

    def _change(self, one: list[Tensor], other: list[Tensor]) -> float:
        """Of the second and third document."""
        return float(relative(other, one)[self.ends[1] :].max())


def relative(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    """`(tokens,)`: the size of the difference at each token, over that of the truth; the median of all draws."""
    sizes = []
    for one, true in zip(found, truth, strict=True):
        off, size = (torch.linalg.vector_norm(x, dim=-1) for x in (one.float() - true.float(), true.float()))
        sizes.append(off / size.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(sizes).median(0).values


def _window(model: Any) -> int | None:
    """The smallest span, in tokens, to which the configuration says that some attention is confined."""
    values = vars(model.config.get_text_config())
    spans = [values[key] for key in values if key.endswith(("window", "window_size", "attention_chunk_size"))]
    found = [span for span in spans if isinstance(span, int) and not isinstance(span, bool) and span > 0]
    return min(found, default=None)


@contextmanager
def same_randomness(model: Any) -> Iterator[None]:
    """The random generators' states come back."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield


def error_line(error: Exception) -> str:
    """What a model failed with, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
