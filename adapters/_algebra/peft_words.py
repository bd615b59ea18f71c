"""A combination in PEFT's words, from those of the folders that went in: no model is there to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from adapters._contract import WeightSite
from adapters._interop.files import PeftFiles
from adapters._interop.peft_lora import lora_config
from adapters._interop.targets import shortest
from adapters._store import commit
from adapters._store.bundle import CONFIG, RECORD, Bundle
from adapters.methods.lora import LoRA
from adapters.methods.qlora import QLoRA

CARRIED = ("modules_to_save", "trainable_token_indices", "task_type", "base_model_name_or_path")


@dataclass(frozen=True)
class Words:
    """A folder's PEFT configuration, and its names of our tensors."""

    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Bundle) -> Words:
        """Read from where the bundle, which was checked, was read."""
        with commit.reading(bundle.folder) as view:
            config = json.loads(view[CONFIG]) if CONFIG in view else {}
            keys = {key: str(entry["file_key"]) for key, entry in json.loads(view[RECORD])["tensors"].items()}
        return cls(config, keys)


def in_pefts_words(made: Bundle, words: Sequence[Words]) -> PeftFiles | str:
    """The configuration and the names of the tensors, or why there are none."""
    configs = [each.config for each in words]
    method = made.method.lora() if isinstance(made.method, QLoRA) else made.method
    if not isinstance(method, LoRA) or any(config.get("peft_type") != "LORA" for config in configs):
        return "only combinations of LoRA folders that PEFT can read are put in its words without the base"
    sites = cast(tuple[WeightSite, ...], made.sites)
    if any(site.folded or site.role == "embedding" for site in sites):
        return "convolutions and tables are put in PEFT's words only with the base at hand: load it and save it"
    keys = {key: file_key for each in words for key, file_key in each.keys.items()}
    keys |= {
        key: keys[_sibling(key)].replace("lora_B.weight", "lora_B.bias") for key in made.tensors if key not in keys
    }
    own, targets = lora_config(method, {site.owner: site for site in sites}), _targets(made, sites, configs)
    if isinstance(own, str) or targets is None:
        return own if isinstance(own, str) else "no list of module names selects exactly the adapted modules"
    carried = {key: next((c[key] for c in configs if c.get(key) is not None), None) for key in CARRIED}
    config = {**configs[0], **{key: value for key, value in carried.items() if key in configs[0] or value is not None}}
    text = json.dumps({**config, **own, "target_modules": targets}, indent=2, sort_keys=True) + "\n"
    return PeftFiles(text.encode(), {key: keys[key] for key in made.tensors}, {})


def _sibling(key: str) -> str:
    return f"{key.rpartition(':')[0]}:b"


def _targets(made: Bundle, sites: Sequence[WeightSite], configs: Sequence[Mapping[str, Any]]) -> Any:
    """Those of the folders where they agree, else the shortest names, told apart from all that the base's map names."""
    given = [config.get("target_modules") for config in configs]
    if all(each == given[0] for each in given):
        return given[0]
    wanted = {site.owner for site in sites}
    if made.map is None:
        return sorted(wanted)
    left = (*made.map.unreached, *made.map.others)
    paths = [*(known.path for known in made.map.weights), *(each.path for each in left)]
    parts = [path.split(".") for path in paths]
    return shortest(wanted, {".".join(part[:length]) for part in parts for length in range(1, len(part))} | wanted)
