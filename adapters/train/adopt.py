"""The model, the tokenizer and the adapter of a trainer, from whatever the caller has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from adapters import _registry
from adapters._attach import AttachReport, adapters_of, attach, detach
from adapters._attach.verbs import make_method
from adapters._contract import Method
from adapters._errors import AdapterError, nearest
from adapters._hub import MODELS, fetch, load_base
from adapters._interop.peft_write import REGISTRY_TYPE
from adapters._store import LoadReport, load

Adapter: TypeAlias = str | os.PathLike[str] | Method | Mapping[str, Any]
_ATTACHING = ("targets", "head")  # of a mapping: arguments of `attach` beside the method's fields


@dataclass(frozen=True)
class Wanted:
    """A fresh adapter of a method, or a saved one to go on with."""

    method: Method | None = None
    attaching: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None


def wanted(adapter: Adapter | None) -> Wanted | None:
    """What a caller means by an adapter, checked before a model is loaded or changed.

    Raises:
        AdapterError: it is neither a method nor a folder, or a hyperparameter is wrong.
    """
    if adapter is None:
        return None
    if isinstance(adapter, Method):
        return Wanted(adapter)
    if isinstance(adapter, Mapping):
        if not isinstance(adapter.get("name"), str):
            raise AdapterError("an adapter given as a mapping needs a name, such as {'name': 'lora', 'rank': 16}.")
        fields = {key: value for key, value in adapter.items() if key not in ("name", *_ATTACHING)}
        attaching = {key: adapter[key] for key in _ATTACHING if key in adapter}
        return Wanted(make_method(adapter["name"], fields), attaching)
    place, known = os.fspath(adapter), _registry.names()
    if isinstance(adapter, str) and place in known:
        return Wanted(make_method(place, {}))
    if Path(place).is_dir() or (place.count("/") == 1 and not place.startswith((".", "/", "~"))):
        return Wanted(folder=place)
    raise AdapterError(
        f"adapter is {place!r}, which is neither a method{nearest(place, known)} nor a folder of a saved adapter. "
        f"Methods: {', '.join(known)}."
    )


def of_config(want: Wanted | None, trl_arguments: dict[str, Any]) -> Wanted | None:
    """What to train, also from a `peft_config` of ours, which TRL need not see: it would round what it attaches."""
    config = trl_arguments.get("peft_config")
    if want is not None or getattr(config, "peft_type", None) != REGISTRY_TYPE:
        return want
    del trl_arguments["peft_config"]
    given = {key: getattr(config, key) for key in ("targets", "head", "example", "sites", "dtype")}
    return Wanted(config.method, {key: value for key, value in given.items() if value is not None})  # type: ignore[union-attr]


def opened(model: Any, tokenizer: Any, want: Wanted | None, args: Any, config: Any) -> tuple[Any, Any]:
    """The model, loaded if it is given by its name, and the tokenizer that belongs to it.

    Args:
        model: a name for `load_base`, or a model.
        tokenizer: None finds it from the model's name.
        want: a method that wants its base quantised says so here.
        args: whose `model_init_kwargs` and `trust_remote_code` hold for loading.
        config: a `quantization_config` of transformers, for loading.
    """
    if isinstance(model, str | os.PathLike):
        keywords = dict(args.model_init_kwargs or {})
        if config is not None:
            keywords["quantization_config"] = config
        if args.trust_remote_code:
            keywords.setdefault("trust_remote_code", True)
        method = want.method if want is not None else None
        quantize = method.quantize if method is not None and "quantization_config" not in keywords else None
        model, found = load_base(os.fspath(model), quantize=quantize, kind="causal", **keywords)
        tokenizer = tokenizer if tokenizer is not None else found
    elif args.model_init_kwargs or config is not None:
        given = "args.model_init_kwargs" if args.model_init_kwargs else "quantization_config"
        raise AdapterError(f"{given} says how to load a model, but the model given is loaded already: leave it out.")
    return model, tokenizer if tokenizer is not None else _tokenizer_of(model)


def check_adapter(model: Any, want: Wanted | None, peft_config: Any) -> None:
    """Refuses what would train nothing, or two things at once."""
    if want is not None and peft_config is not None:
        raise AdapterError("adapter= and peft_config= both say what to train: give one of them.")
    if want is not None and is_peft(model):
        raise AdapterError(
            "the model is a PeftModel, which has an adapter of PEFT's already: leave out adapter= to train that one."
        )
    if want is not None or peft_config is not None or is_peft(model):
        return
    attached = adapters_of(model)
    if not attached:
        raise AdapterError(
            "the model has no adapter, and without one there is nothing to train: pass adapter='lora' (methods: "
            f"{', '.join(_registry.names())}), the folder of a saved adapter, or attach one with adapters.attach."
        )
    if not any(each.trainable for each in attached.values()):
        raise AdapterError(
            f"the adapters on this model ({', '.join(attached)}) are frozen: load with adapters.load(..., "
            "trainable=True) the one to go on with."
        )


@contextmanager
def adapted(model: Any, want: Wanted | None, tokenizer: Any) -> Iterator[AttachReport | LoadReport | None]:
    """Attaches what is wanted; if the block fails, takes it off again."""
    before = set(adapters_of(model))
    report: AttachReport | LoadReport | None = None
    if want is not None and want.method is not None:
        report = attach(model, want.method, tokenizer=tokenizer, **want.attaching)
    elif want is not None and want.folder is not None:
        report = load(model, want.folder, trainable=True)
    try:
        yield report
    except BaseException:
        for name in set(adapters_of(model)) - before:
            detach(model, name)
        raise


@dataclass(frozen=True)
class Before:
    """What TRL's constructor changes in a model: its forward, and the dtype of what trains in 4-bit bases."""

    forward: Any
    trained: tuple[tuple[Any, Any], ...]  # parameters and their data


def before_trl(model: Any) -> Before:
    return Before(vars(model).get("forward"), tuple((p, p.data) for p in model.parameters() if p.requires_grad))


def put_back(model: Any, before: Before, forward: bool) -> None:
    """Trained tensors keep the dtype that `attach` gave them; the forward is undone where TRL's loss is not used."""
    for parameter, data in before.trained:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    if forward and before.forward is None:
        vars(model).pop("forward", None)
    elif forward:
        model.forward = before.forward


def is_peft(model: Any) -> bool:
    """Whether the model is wrapped by PEFT itself; a model with an adapter of ours may look like one to PEFT."""
    peft = sys.modules.get("peft")  # where it was never imported, nothing is a model of it
    return peft is not None and isinstance(model, peft.PeftModel) and not adapters_of(model)


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "")
    if name:
        source = str(fetch(name)) if name in MODELS else name
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):
            pass  # said below, with what to do about it
    where = f"at {name!r}, where the model came from," if name else "from the model, which has no name,"
    raise AdapterError(f"no tokenizer was found {where} so processing_class= is needed.")
