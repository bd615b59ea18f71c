"""Where mlx-lm keeps the layers of a model, and how its adapter_config.json names what is adapted in them.

mlx-lm chooses in two passes (mlx_lm/tuner/utils.py, linear_to_lora_layers): modules of the last `num_layers` layers
whose path within the layer is among `keys`, then modules of the whole model whose path from its root is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters._errors import AdapterError
from adapters._site import WeightSite

# transformers' model type -> where its layers are, and where mlx-lm has them (mlx_lm/models); below that the names and
# the orders of rows are the same: tests/test_mlx.py compares each with mlx-lm, output by output
LAYERS = {
    **dict.fromkeys(
        [
            "cohere",
            "cohere2",
            "ernie4_5",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm4",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "mistral",
            "mixtral",
            "nemotron",
            "olmo2",
            "olmo3",
            "olmoe",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
        ],
        ("model.layers", "model.layers"),
    ),
    "gpt2": ("transformer.h", "model.h"),
    "gpt_neox": ("gpt_neox.layers", "model.h"),
}


@dataclass(frozen=True)
class Chosen:
    """What is adapted, in the words of adapter_config.json.

    Args:
        last: layers, counted from the last.
        keys: paths within a layer or, where `rooted`, from the model's root: its layers differ in what is adapted.
        paths: of each site's module in mlx-lm, in the order of the sites.
    """

    last: int
    keys: tuple[str, ...]
    rooted: bool
    paths: tuple[str, ...]


def chosen(model: nn.Module, sites: Iterable[WeightSite]) -> Chosen:
    """How mlx-lm is told of `sites`, all of them linear layers.

    Raises:
        AdapterError: mlx-lm's layout of this type of model is not known, or a site is in none of its layers.
    """
    ours, theirs = _layers(model)
    inside: dict[int, set[str]] = defaultdict(set)
    places = []
    for site in sites:
        if not site.owner.startswith(f"{ours}."):
            raise AdapterError(
                f"{site.path} is in none of the layers, {ours}.*, which are all that is exported for mlx-lm: merge the "
                "adapter, or train it on fewer targets."
            )
        number, _, key = site.owner.removeprefix(f"{ours}.").partition(".")
        inside[int(number)].add(key)
        places.append((int(number), key))
    keys = tuple(dict.fromkeys(key for _, key in places))
    layers = list(model.get_submodule(ours).children())
    first = min(inside)
    alike = all(inside[i] == _held(layers[i], keys) for i in range(first, len(layers)))
    paths = tuple(f"{theirs}.{number}.{key}" for number, key in places)
    return Chosen(len(layers) - first, keys if alike else paths, not alike, paths)


def _layers(model: Any) -> tuple[str, str]:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in LAYERS:
        known = ", ".join(sorted(LAYERS))
        raise AdapterError(
            f"where mlx-lm has the layers of a {kind!r} model is not known here, only for {known}: merge the adapter, "
            "and save the model."
        )
    return LAYERS[kind]


def _held(layer: nn.Module, keys: tuple[str, ...]) -> set[str]:
    return {path for path, _ in layer.named_modules(remove_duplicate=False)} & set(keys)
