"""Writes one adapter of each kind on a base that a formula fills, for `tests/test_releases.py`.

`python -m tests.releases.make ARCHIVE` with the release to be kept installed; ARCHIVE is tests/releases/<version>.zip,
and is never written again. `golden.json` in it holds what that release computed. format-1.zip and format-2.zip were
written by the commits before the map of sites and before new tokens came into adapter.json, format-3.zip after both.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDE = 64  # a multiple of what nf4 holds in a block


def filled(shape: torch.Size, seed: int, scale: float) -> Tensor:
    """Numbers between -scale and scale that no random generator and no rounding of another machine changes."""
    numbers = (torch.arange(shape.numel(), dtype=torch.int64) * 7919 + seed * 104729) % 1021
    return (scale * (numbers.double() - 510) / 512).to(torch.float32).view(shape)


def base(kind: str = "causal") -> Any:
    """A Llama of one layer, or a BERT that tells three classes apart."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": WIDE,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    if kind == "causal":
        config = hf.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
        model: nn.Module = hf.LlamaForCausalLM(config)
    else:
        model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=3))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(filled(parameter.shape, seed, 0.25) + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def fill(model: nn.Module, names: list[str]) -> None:
    """Gives each adapter's tensors numbers of their own."""
    from adapters._attach import tensors_of

    with torch.no_grad():
        for name in names:
            for seed, (key, tensor) in enumerate(sorted(tensors_of(model, name).items())):
                scale = 0.1 + 0.01 * len(name)
                tensor.copy_(filled(tensor.shape, 100 + seed + len(key), scale) + (tensor.dim() == 1) * 0.5)


def ids() -> Tensor:
    return (torch.arange(2 * 9).view(2, 9) * 11 + 5) % 47 + 1


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids()).logits.float()
    return found


def _plain(method: str, **options: Any) -> Callable[[Any], str]:
    def make(model: Any) -> str:
        import adapters

        adapters.attach(model, method, name="fr", **options)
        fill(model, ["fr"])
        return "fr"

    return make


def _composed(model: Any) -> str:
    import adapters

    adapters.attach(model, "lora", name="one", rank=2)
    adapters.attach(model, "bottleneck", name="three")
    fill(model, ["one", "three"])
    adapters.compose(model, "both", adapters.Stack("one", "three"))
    adapters.activate(model, "both")
    return "both"


def _fused(model: Any) -> str:
    import adapters

    for name in ("one", "three"):
        adapters.attach(model, "bottleneck", name=name, reduction_factor=8.0)
    adapters.attach(model, "fuse", name="fusion", parts=("one", "three"))
    fill(model, ["one", "three", "fusion"])
    return "fusion"


def _rows(model: Any) -> str:
    import adapters

    adapters.attach(model, "lora", name="fr", rank=2, tokens=[7, 40])
    fill(model, ["fr"])
    return "fr"


def _four_bits(model: Any) -> str:
    import adapters

    adapters.quantize(model, "nf4", compute_dtype=torch.float32)
    return _plain("qlora", rank=2)(model)


# what is saved: the kind of its base, and how it is made
CASES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "lora": ("causal", _plain("lora", rank=3, alpha=5.0, rank_pattern={"mlp.*": 2}, alpha_pattern={"*q_proj": 7.0})),
    "lora-bias": ("classifier", _plain("lora", rank=2, bias=True, rslora=True)),
    "lora-tables": ("causal", _plain("lora", rank=2, targets=["embedding", "mlp.down"])),
    "dora": ("causal", _plain("dora", rank=2)),
    "ia3": ("causal", _plain("ia3")),
    "qlora": ("causal", _four_bits),
    "houlsby": ("causal", _plain("bottleneck", placement="houlsby", activation="gelu")),
    "parallel": ("classifier", _plain("bottleneck", placement="parallel", scale=4.0)),
    "normed": ("causal", _plain("bottleneck", reads="normed")),
    "prefix": ("causal", _plain("prefix", length=3)),
    "prefix-shifted": ("causal", _plain("prefix", length=3, positions="shifted")),
    "tokens": ("causal", _rows),
    "composed": ("causal", _composed),
    "fused": ("causal", _fused),
}


def main(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder)


def write(folder: Path) -> None:
    import adapters

    golden: dict[str, list[float]] = {}
    for name, (kind, make) in CASES.items():
        model = base(kind)
        made = make(model)
        adapters.save(model, made, folder / name)
        (folder / name / "README.md").unlink()  # the card: no part of the format
        golden[name] = [round(x, 6) for x in output(model).flatten()[::7].tolist()]
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
