"""Runs a model on the same inputs before and after, and reads what its sites saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adapters._attach import using
from adapters._eightbit import eightbit_modules, unrounded
from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._merge.allowed import Merging
from adapters._merge.certificate import Certificate, PromptError, SiteError, relative, require_near
from adapters._merge.prompts import Answer, answers, compared
from adapters._sites import example_inputs

ROWS, TOKENS = 2, 32  # of a site's input that are kept for comparison


@dataclass(frozen=True)
class Adapted:
    """The adapted model before it is merged: its outputs on `inputs`, and each called site's inputs and outputs."""

    inputs: Mapping[str, Any]
    output: Mapping[str, Tensor]
    at_sites: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    effect: float  # how far the adapters move the outputs, relative to them
    said: tuple[Answer, ...] = ()  # to prompts
    unrounded: Mapping[str, Tensor] | None = None  # `output` without an 8-bit base's rounding of activations


def adapted(
    model: nn.Module,
    merging: Merging,
    example: Mapping[str, Any] | None,
    prompts: Sequence[str],
    tokenizer: Any,
) -> Adapted:
    """Runs the model with the adapters and without.

    Args:
        example: None for the probe's inputs.
    """
    inputs = dict(example) if example is not None else probe_inputs(model, merging)
    with using(model, merging.selection):
        at_sites = inputs_at(model, merging, inputs)
        output, outputs = model_outputs(model, inputs), outputs_at(model, at_sites)
        said = answers(model, tokenizer, prompts)
        exact = _unrounded(model, inputs)
    with using(model, None):
        base = model_outputs(model, inputs)
    # a head with another number of outputs than the base's leaves nothing to compare, and is all effect
    comparable = all(base[key].shape == output[key].shape for key in output)
    effect = apart(base, output) if comparable else 1.0
    return Adapted(inputs, output, at_sites, outputs, effect, said, exact)


def _unrounded(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    if not any(True for _ in eightbit_modules(model)):
        return None
    with unrounded(model):
        return model_outputs(model, inputs)


@dataclass(frozen=True)
class Found:
    """How far a merged model is from the adapted one: of its outputs, of each called site's, and on prompts.

    Args:
        exact: as `error`, but for an 8-bit base's rounding of activations.
    """

    error: float
    exact: float
    seen: Mapping[str, float]
    prompts: tuple[PromptError, ...]

    def require_within(self, merging: Merging, strict: float, limit: float) -> None:
        """Refuses more than the limits, with AdapterError: `strict` is for what no rounding of activations explains."""
        require_near(merging.name, self.exact, (), strict)
        require_near(merging.name, self.error, self.prompts, limit)

    def certificate(
        self,
        merging: Merging,
        before: Adapted,
        predicted: Mapping[str, float],
        how: str,
        limit: float,
        notes: Sequence[str],
    ) -> Certificate:
        sites = tuple(SiteError(path, rounding, self.seen.get(path)) for path, rounding in predicted.items())
        wrote = [f"wrote {merging.tokens}"] if merging.tokens is not None else []
        said = (*wrote, *notes)
        return Certificate(merging.name, how, self.error, before.effect, limit, sites, said, self.prompts)


def beside(model: nn.Module, before: Adapted, tokenizer: Any) -> Found:
    """Runs the merged model on what the adapted one was run on."""
    output = model_outputs(model, before.inputs)
    error = apart(output, before.output)
    exact = error if before.unrounded is None else apart(output, before.unrounded)
    after = outputs_at(model, before.at_sites)
    seen = {path: relative(y, before.outputs[path]) for path, y in after.items()}
    return Found(error, exact, seen, compared(model, tokenizer, before.said))


def probe_inputs(model: nn.Module, merging: Merging) -> dict[str, Any]:
    """A tiny batch for any Hugging Face model, the one that finds sites, ending on the tokens whose rows train."""
    found = dict(example_inputs(model))
    ids = found.get("input_ids")
    if merging.tokens is not None and isinstance(ids, Tensor):
        shown = torch.tensor(merging.tokens.ids[: ids.numel() // 2], dtype=ids.dtype, device=ids.device)
        kept = ids.flatten()[: ids.numel() - shown.numel()]
        found["input_ids"] = torch.cat([kept, shown]).view(ids.shape)
    return found


def model_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point outputs of one forward in eval mode, each flattened; the cache is not an output."""
    with evaluating(model):
        output = model(**inputs)
    items = (
        output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else (output,))
    )
    found: dict[str, Tensor] = {}
    for key, value in items:
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if key != "past_key_values" and leaves:
            found[str(key)] = torch.cat([leaf.float().flatten() for leaf in leaves])
    if not found:
        raise AdapterError("the model's forward returned no floating-point tensor to compare: pass example=.")
    return found


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """How far the output that differs most is from what is expected, relative to it: large ones hide no small one."""
    errors = [relative(found[key], expected[key]) for key in expected]
    return float("nan") if any(error != error for error in errors) else max(errors)


def inputs_at(model: nn.Module, merging: Merging, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What reached each called site in one forward: (rows, tokens, n_in), cut to a few rows and tokens."""
    found: dict[str, Tensor] = {}
    handles = []
    for site in merging.sites:
        if site.access == "call":

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = site.path) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                found.setdefault(path, x.detach()[:ROWS, :TOKENS] if x.dim() > 2 else x.detach()[: ROWS * TOKENS])

            handles.append(model.get_submodule(site.owner).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model_outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def outputs_at(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each called site makes of its recorded input."""
    found = {}
    for path, x in inputs.items():
        module = model.get_submodule(path.rpartition(".")[0])
        with evaluating(module):
            found[path] = module(x)
    return found
