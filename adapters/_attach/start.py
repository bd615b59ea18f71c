"""What a prefix starts as: what the base itself computes for some text, or for a neutral input.

A prefix that starts from text behaves at step 0 as that text would in front of every input; random keys and values
start far worse than the base. Positions: the text is run at -length, ..., -1, so that the real tokens keep theirs.
Where positions cannot be negative (learned position embeddings) it runs at 0, ..., length - 1 and the real tokens
move, if the model is causal and takes position ids. Virtual tokens, which a model without attentions is given, take
the first positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from adapters._attach.injection import recording
from adapters._attach.inside import of_first_row, recording_written
from adapters._attach.positions import forward_parameters
from adapters._attach.state import State, holding, state_of
from adapters._attach.swap import base_class
from adapters._contract import KeyValueMethod, KeyValueSite, LayerSite, Method, Site
from adapters._errors import AdapterError
from adapters._evaluating import evaluating
from adapters._heads import base_model
from adapters._sites import example_inputs

Recorded = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Start:
    """The method with its length and positions settled, the tensors it starts from, and what was done in words.

    The tensors are keys (heads, length, k_dim) and values (heads, length, v_dim) for an attention, and hidden states
    (length, width) for a layer.
    """

    method: Method
    recorded: Recorded
    note: str


def prefix_start(
    model: nn.Module, method: KeyValueMethod, sites: Iterable[Site], tokenizer: Any, example: Mapping[str, Any] | None
) -> Start:
    """What each site's part of the prefix starts from."""
    sites = tuple(sites)
    runs = _below_the_head(model, sites)
    names = forward_parameters(base_class(runs))
    if not {"input_ids", "inputs"} & set(names):
        return _from_a_neutral_input(model, method, sites, example)
    ids, note = _tokens(model, method, tokenizer)
    length, positions = ids.shape[1], method.positions
    layered = any(isinstance(site, LayerSite) for site in sites)
    causal = all(site.causal for site in sites if isinstance(site, KeyValueSite))
    if layered:
        positions = "shifted"
        recorded = _record(model, runs, sites, _inputs(runs, ids, None))
    elif positions == "before" and "position_ids" in names and causal:
        try:
            recorded = _record(model, runs, sites, _inputs(runs, ids, -length))
        except _Negative:
            positions = "shifted"
            note += "; this model embeds positions, so the real tokens move behind the prefix (positions='shifted')"
            recorded = _record(model, runs, sites, _inputs(runs, ids, 0))
    else:
        recorded = _record(model, runs, sites, _inputs(runs, ids, None))
    recorded, cycled = _of_length(recorded, length)
    note += "; an attention that sees fewer positions repeats them" if cycled else ""
    return Start(replace(method, length=length, positions=positions), recorded, note)


def _below_the_head(model: nn.Module, sites: tuple[Site, ...]) -> nn.Module:
    """The base model where all sites lie in it: heads may want more than one text, such as choices."""
    base = base_model(model)
    path = next((path for path, module in model.named_modules() if module is base), "")
    return base if base is not None and all(site.path.startswith(f"{path}.") for site in sites) else model


def _from_a_neutral_input(
    model: nn.Module, method: KeyValueMethod, sites: tuple[Site, ...], example: Mapping[str, Any] | None
) -> Start:
    """For models that are given no tokens, such as pictures: the first positions of an input of zeros."""
    length = method.start()
    if not isinstance(length, int):
        raise AdapterError("this model is given no tokens, so a prefix cannot start from text: give a length.")
    given = example if example is not None else example_inputs(model)
    inputs = {key: torch.zeros_like(x) if _floating(x) else x for key, x in given.items()}
    recorded, _ = _of_length(_record(model, model, sites, inputs), length)
    note = f"starts as the first {length} positions of an input of zeros"
    return Start(replace(method, length=length), recorded, note)


def _of_length(recorded: Recorded, length: int) -> tuple[Recorded, bool]:
    """The first `length` positions; those of an attention that has fewer, as one over windows, are repeated."""
    cycled = any(x.shape[-2] < length for parts in recorded.values() for x in parts)
    index = torch.arange(length)
    return {
        path: tuple(x[..., index.to(x.device) % x.shape[-2], :] for x in parts) for path, parts in recorded.items()
    }, cycled


def _tokens(model: nn.Module, method: KeyValueMethod, tokenizer: Any) -> tuple[Tensor, str]:
    start, device = method.start(), next(model.parameters()).device
    if isinstance(start, int):
        token = neutral_token(model)
        return torch.full((1, start), token, device=device), f"starts as {start} times the neutral token {token}"
    if tokenizer is None:
        raise AdapterError(
            "a prefix that starts from text needs the model's tokenizer: attach(..., tokenizer=tokenizer)."
        )
    ids = tokenizer(start, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise AdapterError("the text a prefix starts from is empty: give some text, or a length.")
    wanted = method.length
    if wanted > ids.shape[1]:
        raise AdapterError(f"the text has {ids.shape[1]} tokens and length is {wanted}: leave length out, or lower it.")
    kept = ids[:, : wanted or None]
    cut = f", the first {kept.shape[1]} kept" if kept.shape[1] < ids.shape[1] else ""
    return kept, f"starts from a text of {ids.shape[1]} tokens{cut}"


def neutral_token(model: nn.Module) -> int:
    """The beginning-of-text token, which attention rests on; else the classifier, end, padding token, or 0."""
    config = getattr(model, "config", None)
    for name in ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and 0 <= token < int(getattr(config, "vocab_size", token + 1)):
            return token
    return 0


class _Negative(Exception):
    """A negative position was looked up in a table."""


class _NoNegativeLookup(TorchFunctionMode):
    """Raises before a table is indexed with a negative number: on a GPU the lookup itself would end the process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKUPS:
            # what is looked up may be negative itself; only indices may not. F.embedding takes the index first
            for index in _integers((args[:1] if func is F.embedding else args[1:], tuple(kwargs.values()))):
                if index.numel() and bool((index < 0).any()):
                    raise _Negative
        return func(*args, **kwargs)


_LOOKUPS = (F.embedding, torch.embedding, torch.Tensor.__getitem__, torch.index_select, torch.gather)


def _integers(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)]


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _inputs(model: nn.Module, ids: Tensor, first: int | None) -> dict[str, Any]:
    """Arguments of a forward on `ids` (1, length), from position `first` on where that is given."""
    names = forward_parameters(base_class(model))
    inputs: dict[str, Any] = {"input_ids" if "input_ids" in names else "inputs": ids}
    if "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(ids)
    if first is not None:
        inputs["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids  # an encoder-decoder model: the text on both sides
    if "bbox" in names:
        inputs["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.long, device=ids.device)
    if "use_cache" in names or hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _record(model: nn.Module, runs: nn.Module, sites: tuple[Site, ...], inputs: Mapping[str, Any]) -> Recorded:
    paths = {id(model.get_submodule(site.path)): site.path for site in sites}
    heads = {site.path: site.heads for site in sites if isinstance(site, KeyValueSite)}
    own = {site.path: site for site in sites if isinstance(site, KeyValueSite) and site.product is not None}
    found: dict[str, tuple[Tensor, ...]] = {}

    def see(module: nn.Module, keys: Tensor, values: Tensor) -> None:
        path = paths.get(id(module))
        if path is not None:
            found.setdefault(path, tuple(of_first_row(x, heads[path]).float() for x in (keys, values)))

    layers = {site.path: site for site in sites if isinstance(site, LayerSite)}
    with (
        evaluating(model),
        holding(state_of(model) or State(), ()),
        recording(see),
        recording_written(model, own, see),
        _entering(model, layers, found),
        _NoNegativeLookup(),
    ):
        runs(**inputs)
    missing = [site.path for site in sites if site.path not in found]
    if missing:
        raise AdapterError(f"nothing reached {missing[0]} when the model was run to see what a prefix starts as.")
    return found


@contextmanager
def _entering(
    model: nn.Module, layers: Mapping[str, LayerSite], found: dict[str, tuple[Tensor, ...]]
) -> Iterator[None]:
    """Notes the hidden states of the first row that enter each layer: (tokens, width)."""

    def see(site: LayerSite) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[site.input] if isinstance(site.input, int) else kwargs[str(site.input)]
            found.setdefault(site.path, (x.detach().select(1 - site.axis, 0).float(),))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(see(site), with_kwargs=True)
        for path, site in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
