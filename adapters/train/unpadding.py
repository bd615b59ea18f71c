"""Whether a model's padded batches can be computed on their real tokens alone: tried on it, and then done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adapters._attach.state import unwrapped
from adapters._contract import LayerSite
from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._sites.discover import example_inputs, sites
from adapters._sites.probe import padded
from adapters.train.packing import error_line, mask_dtype, relative, same_randomness
from adapters.train.real_tokens import Entry, install

LENGTHS = (9, 4, 12)  # tokens of the three rows that are tried
_HIDDEN = 1e4  # what a head adds to scores to hide them is larger, and beside it nothing else would count
_PLACE = "_unpadded"  # where a model keeps what is installed on it


@dataclass(frozen=True, eq=False)
class Unpadded:
    """Whether a model computes padded batches on their real tokens alone, and why.

    Args:
        spared: it does.
        reason: what was seen, or what stands against it.
        difference: between its outputs computed both ways: the norm of the difference of a vector of them over the
            norm of the vector, at the worst of them.
        effect: in the same measure, what exchanging the first token of a row does to the others.
    """

    spared: bool
    reason: str
    difference: float | None = None
    effect: float | None = None
    _handles: list[Any] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return f"{'real tokens alone' if self.spared else 'padded'}: {self.reason}"

    def undo(self) -> None:
        """Padding is computed again; a second call changes nothing."""
        while self._handles:
            self._handles.pop().remove()


def unpad(model: nn.Module) -> Unpadded:
    """Lets `model` compute padded batches on their real tokens alone, where it gives the same outputs that way.

    For any script: transformers' Trainer, TRL, a loop of one's own; before or after adapters are attached, and for
    classifiers, encoders and language models alike. Outputs at real tokens stay what they were up to rounding, those
    at padding are of no meaning (as before).

    The model goes on as it was, padding included, where rows are not padded on the right (a language model's loss may
    read what stands before a first token), in a forward that makes or continues a cache, returns hidden states or
    attentions by layer, runs in compiled code, or has adapters by row or token or virtual tokens in its layers. In
    training mode no cache is made unless it is asked for.

    The model is run a few times on a few random tokens, in evaluation mode, with what acts in it now.

    Raises:
        AdapterError: the model cannot be run on token ids.
    """
    root = unwrapped(model)
    before = root.__dict__.pop(_PLACE, None)
    if isinstance(before, Unpadded):
        before.undo()
    layers = tuple(site for site in sites(root) if isinstance(site, LayerSite))
    if not layers:
        return Unpadded(False, "no stack of layers was found whose hidden states have a place per token")
    if any(site.axis != 1 for site in layers):
        return Unpadded(False, "its layers take the tokens before the rows")
    with evaluating(root), same_randomness(root), padded(root):
        found = _tried(root, layers)
    if found.spared:
        root.__dict__[_PLACE] = found
    return found


def _tried(root: nn.Module, layers: tuple[LayerSite, ...]) -> Unpadded:
    batch = _batch(root)
    try:
        caches = getattr(root(**batch), "past_key_values", None) is not None
        if caches:
            batch["use_cache"] = False
        truth, exchanged = _outputs(root, batch), _outputs(root, batch, exchanged=True)
        effect = _difference(exchanged, truth)
        entry, handles = install(root, layers, caches)
    except Exception as error:  # a stranger's model may fail in any way on a batch with a mask
        return Unpadded(False, f"the model fails on a padded batch: {error_line(error)}")
    difference = None
    try:
        difference = _difference(_outputs(root, batch), truth)
        reason = _against(entry, difference, effect, mask_dtype(root))
    except Exception as error:  # its layers may need what only a padded batch has
        reason = f"its layers fail on real tokens alone: {error_line(error)}"
    found = Unpadded(not reason, reason, difference, effect, handles)
    if reason:
        found.undo()
        return found
    numbers = f"outputs differ by {difference:.1e}; another token in their row changes them by {effect:.1e}"
    return replace(found, reason=numbers)


def _against(entry: Entry, difference: float, effect: float, dtype: torch.dtype) -> str:
    """What stands against real tokens alone, if anything does."""
    precision = max(torch.finfo(each).eps for each in (torch.float32, dtype))
    if not entry.used:
        return "the arguments of its forward do not reach its layers"
    if not effect > 8 * precision:
        return "its outputs depend too little on other tokens to tell whether they still meet"
    if not difference <= min(100 * precision, precision**0.5, effect / 4):
        return f"outputs differ by {difference:.1e} then; another token in their row changes them by {effect:.1e}"
    return ""


def _batch(root: nn.Module) -> dict[str, Any]:
    """Rows of `LENGTHS` tokens, padded on the right, and what else the model asks for.

    Raises:
        AdapterError: it takes no rows of token ids.
    """
    given = example_inputs(root)
    ids, rows = given.get("input_ids"), len(LENGTHS)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] < rows:
        raise AdapterError(f"{type(root).__name__} takes no rows of token ids, of which some could be padding.")
    real = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(LENGTHS, device=ids.device)[:, None]
    of_rows = {
        key: x[:rows] if isinstance(x, Tensor) and x.dim() and x.shape[0] == ids.shape[0] else x
        for key, x in given.items()
        if key != "use_cache"
    }
    return {**of_rows, "attention_mask": real.long()}


def _outputs(root: Any, batch: Mapping[str, Any], exchanged: bool = False) -> list[list[Tensor]]:
    """Vectors of each output, `(count, features)`, three times in 16 bits, where rounding moves single ones far.

    Args:
        exchanged: the first token of each row is another one; its own outputs are left out in any case.
    """
    real = batch["attention_mask"].bool()
    pad = getattr(root.config, "pad_token_id", None) or 0
    found = []
    for draw in range(3 if mask_dtype(root).itemsize == 2 else 1):
        ids = batch["input_ids"].roll(draw, 1)
        if exchanged:
            ids = torch.cat([ids[:, 5:6], ids[:, 1:]], 1)
        result = root(**{**batch, "input_ids": torch.where(real, ids, pad)})
        found.append([_vectors(x, real) for x in tree_leaves(list(result.values())) if isinstance(x, Tensor)])
    return found


def _vectors(x: Tensor, real: Tensor) -> Tensor:
    x = x.float().masked_fill(x.abs() > _HIDDEN, 0)
    per_token = x.dim() > 2 and x.shape[:2] == real.shape
    return x[:, 1:][real[:, 1:]] if per_token else x.reshape(x.shape[0], -1)


def _difference(found: list[list[Tensor]], truth: list[list[Tensor]]) -> float:
    """At the worst vector of the worst output."""
    pairs = zip(zip(*found, strict=True), zip(*truth, strict=True), strict=True)
    return max(float(relative(list(one), list(other)).max()) for one, other in pairs)
