"""What a prefix starts as: what the base itself computes for some text, or for a neutral input.

A prefix that starts from text behaves at step 0 as that text would in front of every input; random keys and values
start far worse than the base. Positions: the text is run at -length, ..., -1, so that the real tokens keep theirs.
Where positions cannot be negative (learned position embeddings, logarithms of positions) it runs at 0, ..., length - 1
and the real tokens move, if the model is causal and takes position ids. Virtual tokens, which a model without
attentions is given, take the first positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach.recorded import NegativePosition, Recorded, of_length, record
from adapters._attach.signature import forward_parameters
from adapters._attach.swap import base_class
from adapters._contract import KeyValueMethod, KeyValueSite, LayerSite, Method, Site
from adapters._errors import AdapterError
from adapters._heads import base_model
from adapters._sites import example_inputs, setting


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
    closed = next((site for site in sites if isinstance(site, KeyValueSite) and not site.heads), None)
    if closed is not None:
        raise AdapterError(f"{closed.path} can take no prefix: {closed.reason}.")
    runs = _below_the_head(model, sites)
    names = forward_parameters(base_class(runs))
    if not _takes_tokens(model, names, example):
        return _from_a_neutral_input(model, method, sites, example)
    ids, note = _tokens(model, method, tokenizer)
    length, positions = ids.shape[1], method.positions
    layered = any(isinstance(site, LayerSite) for site in sites)
    causal = all(site.causal for site in sites if isinstance(site, KeyValueSite))
    if layered:
        positions = "shifted"
        _require_room(model, runs, sites, length)
        recorded, how = _of_text(model, runs, sites, ids, None)
    elif positions == "before" and "position_ids" in names and causal:
        try:
            recorded, how = _of_text(model, runs, sites, ids, -length)
        except NegativePosition as error:
            positions = "shifted"
            note += f"; {error}, so the real tokens move behind the prefix (positions='shifted')"
            recorded, how = _of_text(model, runs, sites, ids, 0)
    else:
        recorded, how = _of_text(model, runs, sites, ids, None)
    recorded, cycled = of_length(recorded, length)
    note += how
    note += "; an attention that sees fewer positions repeats them" if cycled else ""
    return Start(replace(method, length=length, positions=positions), recorded, note)


def _takes_tokens(model: nn.Module, names: Iterable[str], example: Mapping[str, Any] | None) -> bool:
    if "input_ids" in names or "inputs" not in names:
        return "input_ids" in names
    given = (example_inputs(model) if example is None else example).get("inputs")  # of tokens, or of pixels
    return isinstance(given, Tensor) and not given.is_floating_point()


def _below_the_head(model: nn.Module, sites: tuple[Site, ...]) -> nn.Module:
    """The base model where all sites lie in it: heads may want more than one text, such as choices."""
    base = base_model(model)
    path = next((path for path, module in model.named_modules() if module is base), "")
    return base if base is not None and all(site.path.startswith(f"{path}.") for site in sites) else model


def _of_text(
    model: nn.Module, runs: nn.Module, sites: tuple[Site, ...], ids: Tensor, first: int | None
) -> tuple[Recorded, str]:
    """What the sites see of the tokens `ids` (1, length), in the first form that the model runs on; and that form."""
    failed: Exception | None = None
    for form, note in _forms(model, ids):
        try:
            return _finite(record(model, runs, sites, _inputs(runs, form, first)), first), note
        except AdapterError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            failed = failed or error
    raise AdapterError(
        f"the model does not run on the {ids.shape[1]} tokens that the prefix starts as: {str(failed)[:200]}."
    ) from failed


def _finite(recorded: Recorded, first: int | None) -> Recorded:
    path = next((path for path, parts in recorded.items() if not all(x.isfinite().all() for x in parts)), None)
    if path is not None and first is not None and first < 0:
        raise NegativePosition("this model computes nothing finite at negative positions")
    if path is not None:
        raise AdapterError(f"what {path} computes for the text that the prefix starts as is not finite.")
    return recorded


def _forms(model: nn.Module, ids: Tensor) -> Iterator[tuple[Tensor, str]]:
    yield ids, ""
    books = setting(model, "num_codebooks")  # audio decoders take a row of tokens for each codebook
    if isinstance(books, int) and books > 1:
        yield ids.expand(books, -1), f"; each of the {books} codebooks is given them"
    usual = example_inputs(model).get("input_ids", ids).shape[-1]
    if usual > ids.shape[1]:  # pooling and chunked attentions run on no fewer than some number of tokens
        repeats = -(-usual // ids.shape[1])
        yield ids.repeat(1, repeats)[:, :usual], f"; they are repeated to {usual}, as this model runs on no fewer"


def _require_room(model: nn.Module, runs: nn.Module, sites: tuple[Site, ...], length: int) -> None:
    """Virtual tokens are tokens to the model: one that takes an input must take `length` more."""
    given = example_inputs(model).get("input_ids")
    if given is None:
        return
    longer = given[:1, torch.arange(given.shape[1] + length) % given.shape[1]]
    try:
        record(model, runs, sites, _inputs(runs, given[:1], None))
    except (RuntimeError, ValueError, IndexError):
        return  # it is not the length that this model objects to
    try:
        record(model, runs, sites, _inputs(runs, longer, None))
    except (RuntimeError, ValueError, IndexError) as error:
        raise AdapterError(
            f"the model runs on {given.shape[1]} tokens and not on the {longer.shape[1]} that they are with {length} "
            f"virtual ones before them ({str(error)[:200]}): use lora or bottleneck, which add no tokens."
        ) from error


def _from_a_neutral_input(
    model: nn.Module, method: KeyValueMethod, sites: tuple[Site, ...], example: Mapping[str, Any] | None
) -> Start:
    """For models that are given no tokens, such as pictures: the first positions of an input of zeros."""
    length = method.start()
    if not isinstance(length, int):
        raise AdapterError("this model is given no tokens, so a prefix cannot start from text: give a length.")
    given = example if example is not None else example_inputs(model)
    inputs = {key: torch.zeros_like(x) if _floating(x) else x for key, x in given.items()}
    recorded, _ = of_length(record(model, model, sites, inputs), length)
    note = f"starts as the first {length} positions of an input of zeros"
    return Start(replace(method, length=length), recorded, note)


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
