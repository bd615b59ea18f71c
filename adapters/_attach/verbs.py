"""The public verbs: attach, detach, activate, using."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters import _registry
from adapters._attach.choose import SelectionReport, report_of, resolve
from adapters._attach.compiled import point
from adapters._attach.entries import check_free
from adapters._attach.fusing import freeze_parts, where_its_parts_act
from adapters._attach.heads import bare_copy, chosen_heads
from adapters._attach.install import base_parameters, check_attachable, install, remove
from adapters._attach.labels import labels_of, show_labels
from adapters._attach.names import give_name
from adapters._attach.report import AttachReport, describe, in_short
from adapters._attach.start import prefix_start
from adapters._attach.state import State, adapters_of, choosing, state_of, unwrapped
from adapters._attach.swap import base_class
from adapters._attach.tables import Wanted, check_heads, chosen_tokens, first_rows, owners, plain_tokens
from adapters._attach.tokens import Tokens
from adapters._attach.weights import base_weight, bias_notes
from adapters._contract import (
    FusionMethod,
    KeyValueMethod,
    KeyValueSite,
    LayerSite,
    Method,
    Site,
    StreamMethod,
    StreamSite,
    WeightMethod,
    WeightSite,
)
from adapters._eightbit import eightbit_modules
from adapters._errors import AdapterError, nearest
from adapters._fourbit import elements, guard_against_repacking, quantized_parameters
from adapters._quantize import quantize
from adapters._selection import Average, Part, Selection, Split, Stack
from adapters._sites import SiteMap, select
from adapters._sites import sites as trace

Targets = str | Iterable[str] | Callable[[Site], bool]


def attach(
    model: nn.Module,
    method: str | Method = "lora",
    *,
    name: str = "default",
    targets: Targets | None = None,
    head: bool | Iterable[str] | None = None,
    tokens: Wanted | None = None,
    tokenizer: Any = None,
    example: Mapping[str, Any] | None = None,
    sites: SiteMap | None = None,
    dtype: torch.dtype = torch.float32,
    **hyperparameters: Any,
) -> AttachReport:
    """Adds a fresh adapter to `model` in place, freezes the base, trains the adapter and makes it the active one.

    Args:
        model: any Hugging Face model, or any module if `example` is given.
        method: a name from `adapters.methods.names()` with its hyperparameters, or a method.
        name: free text; two adapters on one model have different names.
        targets: where to act, instead of the method's own choice: roles ("attention.*"), paths or globs over paths
            ("*.q_proj"), "all", or a predicate over sites. An entry that matches nothing is an error.
        head: modules to train whole and save with the adapter; True or None finds the task head, False trains none.
            The output embeddings of language models are not task heads.
        tokens: tokens whose rows in the input and output embeddings are trained and saved with the adapter, such as the
            markers of a chat: texts that the tokenizer has (`adapters.add_tokens` adds them), or numbers.
        tokenizer: needed by tokens given as texts, and by a prefix that starts from text.
        example: keyword arguments of one forward, where the probe cannot make them.
        sites: the model's map, from `adapters.sites(model)` or `SiteMap.load`; without it the model is traced once, and
            not again while anything is attached or if an adapter that was loaded brought the map along.
        dtype: of the trained tensors: float32, or bfloat16 to halve their memory.
        hyperparameters: fields of the method.

    Raises:
        AdapterError: with the model unchanged.

    Example:
        >>> import adapters, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, vocab_size=160))
        >>> report = adapters.attach(model, "lora", name="fr", rank=4)
        >>> report.sites["attention.query"], report.parameters
        (2, 7424)
        >>> adapters.detach(model, "fr")
    """
    chosen_method = make_method(method, hyperparameters)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AdapterError(f"dtype is {dtype}; trained tensors are float32, bfloat16 or float16.")
    model = unwrapped(model)
    check_attachable(model, name)
    found = _map(model, sites, example)
    chosen = select(found, chosen_method, where_its_parts_act(model, chosen_method, targets))
    heads, rows = chosen_heads(model, head), chosen_tokens(model, tokens, tokenizer)
    check_free(model, [*(_owner(site) for site in chosen), *heads, *_tables(model, rows, heads)])
    notes = list(chosen_method.review(chosen))
    notes += _quantized(model, chosen_method)  # after everything that may be refused
    guard_against_repacking(model)  # before the forward that a prefix starts from
    chosen_method, tensors, facts = _fresh(model, chosen_method, chosen, tokenizer, example)
    notes += [str(note) for note in facts.values()]
    tensors = {key: tensor.to(_start_dtype(chosen_method, key, dtype)) for key, tensor in tensors.items()}
    notes += bias_notes(model, chosen_method, chosen, tensors)
    for path in heads:
        parameters = bare_copy(model.get_submodule(path)).named_parameters()
        tensors.update({f"{path}:head.{key}": p.detach().to(dtype).clone() for key, p in parameters})
    tensors.update(first_rows(model, rows) if rows is not None else {})
    facts |= plain_tokens(rows, tokenizer) if rows is not None else {}
    kept: dict[str, Any] = {"facts": facts, "labels": labels_of(model), "map": found, "tokens": rows}
    install(model, name, chosen_method, chosen, tensors, head=heads, trainable=True, **kept)
    notes += freeze_parts(model, chosen_method)
    roles, share, left = describe(found, chosen, chosen_method)
    size, base = sum(t.numel() for t in tensors.values()), sum(map(elements, base_parameters(model).values()))
    return AttachReport(name, in_short(chosen_method), roles, size, base, share, heads, left, tuple(notes), rows)


def _map(model: nn.Module, given: SiteMap | None, example: Mapping[str, Any] | None) -> SiteMap:
    """The map given, the one that is known, or a fresh one; an example may reach more than was reached before."""
    state, name = state_of(model), base_class(model).__name__
    if given is not None and given.model != name:
        raise AdapterError(f"the map given is that of a {given.model}, and this model is a {name}: trace it anew.")
    known = state.map if state is not None and example is None else None
    if given is None and known is None:
        with using(model, None):
            return trace(model, example)
    return given if given is not None else cast(SiteMap, known)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Removes one adapter, or all; without adapters the model is bit for bit the one that came in.

    Raises:
        AdapterError: no adapter of that name is attached.
    """
    if name is not None:
        remove(model, name)
        return
    state = state_of(model)
    fusions = [each.name for each in adapters_of(model).values() if isinstance(each.method, FusionMethod)]
    named = list(state.named) if state is not None else []
    for each in dict.fromkeys([*reversed(named), *fusions, *adapters_of(model)]):
        remove(model, each)


def activate(model: nn.Module, selection: Selection) -> SelectionReport:
    """Makes a selection act: one assignment, which changes neither tensors nor `requires_grad`.

    Where adapters have heads of their own, the configuration's labels are those of the one that acts.

    Args:
        selection: the name of an adapter or of a composition, None for the base alone, a Stack, Average, Split or
            Parallel, or a list of these with one entry for each row of the batch.

    Raises:
        AdapterError: no adapter of that name is attached, or the parts cannot act in this way.
    """
    state = state_of(model) or State()
    chosen = resolve(state, selection)
    if state.pool is not None:
        state.pool.admit(chosen)
    state.active = chosen
    point(state, chosen)
    show_labels(unwrapped(model), state, chosen)
    return report_of(chosen)


def using(model: nn.Module, selection: Selection) -> choosing:
    """`with using(model, selection) as report:` the selection acts in this context's forwards, as in `activate`.

    Threads and coroutines do not see each other's choice, except in compiled code, which sees the latest.

    Raises:
        AdapterError: as `activate`.
    """
    state = state_of(model) or State()
    chosen = resolve(state, selection)
    if state.pool is not None:
        state.pool.admit(chosen)
    return choosing(state, chosen, point, report_of(chosen))


def compose(model: nn.Module, name: str, composition: Part) -> SelectionReport:
    """Gives a Stack, Average or Split a name, under which it is activated, saved and loaded like an adapter.

    Raises:
        AdapterError: the name is taken, or the composition cannot act.
    """
    state = state_of(model) or State()
    if not isinstance(composition, Stack | Average | Split):
        raise AdapterError(f"{composition!r} is no composition of adapters: a Stack, an Average or a Split.")
    give_name(state, name, composition)
    return report_of(resolve(state, name))


def make_method(method: str | Method, hyperparameters: Mapping[str, Any]) -> Method:
    """A method from its name and hyperparameters, with a clear sentence for a field that it does not have."""
    if isinstance(method, Method):
        if hyperparameters:
            raise AdapterError(
                f"hyperparameters {sorted(hyperparameters)} were given beside a method that has its own."
            )
        return method
    cls = _registry.get(method)
    known = [field.name for field in fields(cls)]
    for key in hyperparameters:
        if key not in known:
            raise AdapterError(f"{method} has no field {key!r}{nearest(key, known)} Fields: {', '.join(known)}.")
    return cls(**hyperparameters)


def _quantized(model: nn.Module, method: Method) -> list[str]:
    if method.quantize is None:
        return []
    eight = next((path for path, _ in eightbit_modules(model)), None)
    if eight is not None:
        raise AdapterError(
            f"{method.name} is the preset for a base in {method.quantize}, and {eight} is held in int8: attach 'lora' "
            f"here, or load the base in 16 bits or with quantize={method.quantize!r}."
        )
    if any(True for _ in quantized_parameters(model)):
        return ["the base was in 4 bits already"]
    return [f"the base was quantised, which detach does not undo. {quantize(model, method.quantize)}"]


def _fresh(
    model: nn.Module,
    method: Method,
    chosen: tuple[Site, ...],
    tokenizer: Any,
    example: Mapping[str, Any] | None,
) -> tuple[Method, dict[str, Tensor], dict[str, object]]:
    """The method with everything settled, its fresh tensors by key, and what is worth recording."""
    facts: dict[str, object] = {}
    by_site: dict[str, Mapping[str, Tensor]] = {}
    if isinstance(method, KeyValueMethod):
        start = prefix_start(model, method, chosen, tokenizer, example)
        method, facts = cast(KeyValueMethod, start.method), {"start": start.note}
        for site in chosen:
            here, recorded = method.at(site), start.recorded[site.path]
            if isinstance(site, LayerSite):
                by_site[site.path] = here.init_states(site, *recorded)
            else:
                by_site[site.path] = here.init(cast(KeyValueSite, site), *recorded)
    for site in chosen:
        if isinstance(method, WeightMethod) and isinstance(site, WeightSite):
            by_site[site.path] = method.at(site).init(site, base_weight(model, site))
        elif isinstance(method, StreamMethod) and isinstance(site, StreamSite):
            by_site[site.path] = method.at(site).init(site)
    tensors = {f"{site.path}:{key}": tensor for site in chosen for key, tensor in by_site[site.path].items()}
    return method, tensors, facts


def _start_dtype(method: Method, key: str, asked: torch.dtype) -> torch.dtype:
    precise = method.precise if isinstance(method, WeightMethod) else ()
    return torch.float32 if key.rpartition(":")[2] in precise else asked


def _owner(site: Site) -> str:
    return site.owner if isinstance(site, WeightSite) else site.path


def _tables(model: nn.Module, tokens: Tokens | None, heads: tuple[str, ...]) -> list[str]:
    """The modules that hold the rows of tokens."""
    if tokens is None:
        return []
    check_heads(model, tokens, heads)
    return [owner for table in tokens.tables for owner, _ in owners(model, table)]
