"""Reads an adapter that stock PEFT wrote: LoRA, DoRA, IA3 and prefix tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from adapters._errors import AdapterError, DamagedAdapter
from adapters._interop.folder import CONFIG, FromPeft
from adapters._interop.peft_ia3 import read_ia3
from adapters._interop.peft_lora import read_lora
from adapters._interop.peft_prefix import read_prefix
from adapters._sites import SiteMap

# fields that do not change what a finished adapter computes
NEUTRAL = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights
NEUTRAL_PREFIX = NEUTRAL | {
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "num_virtual_tokens", "prefix_projection", "token_dim",
}  # fmt: skip
NEUTRAL_IA3 = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "feedforward_modules",
    "inference_mode", "init_ia3_weights", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules",
    "task_type",
}  # fmt: skip
Reader = Callable[[Mapping[str, Any], dict[str, Tensor], nn.Module, SiteMap], FromPeft]
READERS: dict[str, tuple[Reader, set[str]]] = {
    "LORA": (read_lora, NEUTRAL),
    "PREFIX_TUNING": (read_prefix, NEUTRAL_PREFIX),
    "IA3": (read_ia3, NEUTRAL_IA3),
}


def parse_config(raw: bytes) -> dict[str, Any]:
    """`adapter_config.json` as a dictionary, or DamagedAdapter."""
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise DamagedAdapter(f"{CONFIG} is truncated or damaged: it is not JSON.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise DamagedAdapter(f"{CONFIG} does not name a PEFT type.")
    for field, (fits, wanted) in TYPES.items() if config["peft_type"] in READERS else ():
        if config.get(field) is not None and not fits(config[field]):
            raise DamagedAdapter(f"{CONFIG} sets {field} to {str(config[field])[:60]!r}; it must be {wanted}.")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # NaN is not


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


# what PEFT's own dataclasses annotate and never check
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (_is_number, "a number")),
    **dict.fromkeys(("r", "num_virtual_tokens", "num_layers"), (_is_count, "a whole number above 0")),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), (_is_flag, "true or false")),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_are_names, "a list of names")),
    "rank_pattern": (_by_name(_is_count), "whole numbers above 0 by name"),
    "alpha_pattern": (_by_name(_is_number), "numbers by name"),
    "peft_version": (lambda value: isinstance(value, str), "a text"),
}


def understand(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, sites: SiteMap) -> FromPeft:
    """A PEFT adapter in our words, every tensor accounted for.

    Raises:
        AdapterError: PEFT options that we do not compute, by name, or modules that this model has not.
        DamagedAdapter: tensors are missing or superfluous.
    """
    kind = config["peft_type"]
    if kind not in READERS:
        raise AdapterError(f"the folder holds PEFT's {kind}; of PEFT's methods, {', '.join(READERS)} can be read.")
    read, neutral = READERS[kind]
    _refuse_options(config, neutral)
    try:
        return read(config, dict(tensors), model, sites)
    except AdapterError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, re.error) as error:
        raise DamagedAdapter(f"{CONFIG} lacks a field or holds one of another type: {error}.") from error


def _refuse_options(config: Mapping[str, Any], neutral: set[str]) -> None:
    for key, value in config.items():
        if key not in neutral and value not in (None, False, 0, "", [], {}):
            raise AdapterError(
                f"{CONFIG} sets {key} to {str(value)[:60]!r}, an option of PEFT's that is not supported."
            )
    start = config.get("init_lora_weights", True)
    if start not in NEUTRAL_STARTS:
        raise AdapterError(f"{CONFIG} sets init_lora_weights to {start!r}, which changes the weights of the base.")
