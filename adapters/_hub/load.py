"""`load_base`: a base model and its tokenizer, by embedded name, Hub id or folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from adapters._errors import AdapterError, nearest
from adapters._hub.fetch import fetch
from adapters._hub.pins import MODELS

Kind = Literal["causal", "masked", "classifier", "encoder"]
_CLASSES: dict[str, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "encoder": "AutoModel",
}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt", "spiece*", "*.tiktoken")
_SHARED = ("revision", "token", "trust_remote_code", "local_files_only", "cache_dir", "subfolder", "force_download")


def load_base(
    name: str,
    quantize: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    kind: Kind | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Loads a base model, in evaluation mode, and its tokenizer.

    Args:
        name: an embedded name ("smollm2-135m-instruct", "minilm-l6-v2"), a Hub id, or a folder. An embedded name
            always means the pinned package and a Hub id always the Hub; write "./name" for a folder of that name.
        quantize: "nf4" stores the linear weights in 4 bits, module by module on the CPU, before the model moves.
        dtype: of the weights; by default the checkpoint's, and bf16 where `quantize` is given.
        device: where the model goes; by default it stays on the CPU.
        kind: "causal", "masked", "classifier" or "encoder"; by default a causal language model or a classifier where
            the checkpoint says that it is one, else the encoder without a head.
        kwargs: passed to transformers as they are, such as `revision`, `num_labels`, `id2label`, `label2id`.

    Returns:
        The model, and its tokenizer or None where the folder holds none.

    Raises:
        AdapterError: there is no such model, or it cannot be read or downloaded.
    """
    _check_kind(kind)
    if name in MODELS:
        source, kwargs = str(fetch(name)), {**kwargs, "local_files_only": True}
    else:
        source = _elsewhere(name)
    import transformers
    from safetensors import SafetensorError

    shared = {key: kwargs[key] for key in _SHARED if key in kwargs}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **shared)
        # a folder without tokenizer files would get an empty tokenizer made up from the configuration
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared) if _has_tokenizer(source) else None
        dtype = dtype or (torch.bfloat16 if quantize else "auto")
        auto = getattr(transformers, _CLASSES[kind or _kind(config)])
        model = auto.from_pretrained(source, dtype=dtype, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{name!r} cannot be loaded: {_first_sentence(error)}") from error
    model.name_or_path = model.config._name_or_path = name  # a cache path would say nothing to another reader
    if quantize is not None:
        from adapters._quantize import quantize as quantize_in_place

        quantize_in_place(model, quantize)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def read_config(name: str) -> Any:
    """The configuration of what `load_base` would load, whose weights are left alone.

    Raises:
        AdapterError: there is no such model, or its configuration cannot be read.
    """
    import transformers

    source = str(fetch(name)) if name in MODELS else _elsewhere(name)
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=name in MODELS)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{name!r} cannot be read: {_first_sentence(error)}") from error


def class_of(config: Any, kind: Kind | None) -> Any:
    """The model class that `load_base` takes for a configuration.

    Raises:
        AdapterError: the kind is unknown, or transformers has no such class for this configuration.
    """
    import transformers

    _check_kind(kind)
    from transformers.models.auto.auto_factory import _get_model_class

    auto = getattr(transformers, _CLASSES[kind or _kind(config)])
    try:
        return _get_model_class(config, auto._model_mapping)
    except KeyError as error:
        raise AdapterError(
            f"transformers has no {kind or _kind(config)} model for a {type(config).__name__}."
        ) from error


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in get_args(Kind):
        raise AdapterError(f"kind is {kind!r}{nearest(kind, get_args(Kind))} Kinds: {', '.join(get_args(Kind))}.")


def _elsewhere(name: str) -> str:
    """`name` as a folder or a Hub id, after refusing what is probably a misspelt embedded name."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise AdapterError(f"the folder {name!r} holds no model: it has no config.json.")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise AdapterError(f"there is no folder {name!r}.")
    close = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.6)
    if close and "/" not in name:
        raise AdapterError(
            f"no embedded model {name!r}; did you mean {close[0]!r}? Embedded: {', '.join(MODELS)}. "
            "A Hub id, 'owner/name', always means the Hub."
        )
    return name


def _kind(config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    declared = set(config.architectures or ())
    if declared & set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return "causal"
    classifiers = set(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    return "classifier" if declared & classifiers else "encoder"


def _has_tokenizer(source: str) -> bool:
    folder = Path(source)
    return not folder.is_dir() or any(next(folder.glob(pattern), None) is not None for pattern in _TOKENIZER_FILES)


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    head = text.split(". ")[0].rstrip(".")
    return f"{head[:300]}."
