"""Numbers that the real AdapterHub computed, and how: run in an environment with AdapterHub's `adapters` 1.3.0 instead.

    python tests/adapterhub_golden.py     # prints GOLDEN, which is compared in tests/test_adapterhub.py

AdapterHub and this package have one import name and other versions of transformers, so that no test can use both. The
bases and the adapters are filled by a formula instead of drawn, so that both sides make the same ones.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

IDS = [[3, 7, 11, 2, 9], [5, 1, 4, 8, 6]]
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
# AdapterHub's options that differ from its defaults of bottlenecks, by the name of the case
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "reduction_factor": 2, "non_linearity": "swish"},
    "parallel": {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu",
        "is_parallel": True, "scaling": 4.0,
    },
    "learned": {
        "mh_adapter": True, "output_adapter": False, "reduction_factor": {"0": 4, "default": 2},
        "non_linearity": "gelu", "scaling": "channel",
    },
    "pfeiffer": {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu",
        "original_ln_before": True,
    },
}  # fmt: skip
LORAS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "alpha": 6, "attn_matrices": ["q", "v"], "intermediate_lora": True},
    "ia3": {
        "r": 1, "alpha": 1, "attn_matrices": ["k", "v"], "intermediate_lora": True, "composition_mode": "scale",
        "init_weights": "ia3",
    },
}  # fmt: skip
# the first three logits of the last token of each row, as this script printed them (AdapterHub 1.3.0, fp32)
GOLDEN: dict[tuple[str, str], list[list[float]]] = {
    ("bert", "houlsby"): [[-0.195859, 0.925122, -0.835464], [-0.195686, 0.922992, -0.831403]],
    ("bert", "parallel"): [[0.786642, -0.139878, 0.29868], [0.275655, 0.474507, -0.411398]],
    ("bert", "learned"): [[0.055045, 0.601016, -0.442222], [-0.103439, 0.784056, -0.647521]],
    ("bert", "pfeiffer"): [[0.098028, 0.574116, -0.431742], [0.066916, 0.614515, -0.480921]],
    ("bert", "lora"): [[0.085396, 0.570575, -0.412071], [0.209525, 0.452471, -0.301474]],
    ("bert", "ia3"): [[0.234711, 0.48266, -0.386659], [-0.046325, 0.757546, -0.651949]],
    ("llama", "houlsby"): [[-2.279253, 2.152877, -1.996733], [-2.339373, 2.272229, -2.173666]],
    ("llama", "parallel"): [[0.488188, -0.747099, 0.995679], [-2.161708, 1.936435, -1.684386]],
    ("llama", "learned"): [[-1.037025, 0.648081, -0.250176], [-2.876713, 2.64764, -2.381957]],
    ("llama", "pfeiffer"): [[-1.832214, 1.573022, -1.292078], [-2.810467, 2.764769, -2.680842]],
    ("llama", "lora"): [[-0.537759, 0.412921, -0.282373], [-1.131496, 1.004412, -0.86344]],
    ("llama", "ia3"): [[-0.53971, 0.531516, -0.515973], [0.727959, -0.63173, 0.526766]],
    ("gpt2", "houlsby"): [[-1.477636, 0.641803, 0.89677], [-1.482544, 0.641318, 0.902118]],
    ("gpt2", "parallel"): [[-2.077881, 0.769735, 1.38123], [-2.079408, 0.786413, 1.367663]],
    ("gpt2", "learned"): [[-2.111952, 1.138557, 1.081498], [-2.146663, 1.234861, 1.02905]],
    ("gpt2", "pfeiffer"): [[-1.71061, 0.514939, 1.244563], [-1.609982, 0.467941, 1.186471]],
    ("gpt2", "lora"): [[-1.365069, 0.930014, 0.523358], [-1.357646, 0.927256, 0.518431]],
    ("gpt2", "ia3"): [[-1.448845, 0.806484, 0.718934], [-1.416665, 0.786672, 0.704686]],
}


def build(name: str) -> Any:
    """The base by this name, filled by the formula."""
    if name == "gpt2":
        sizes = {"vocab_size": 16, "n_embd": 8, "n_head": 2, "n_inner": 12, "n_layer": 2, "n_positions": 16}
        model: Any = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))
    elif name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1))
    else:
        model = hf.BertForMaskedLM(hf.BertConfig(**SIZES))
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    """Gives each parameter values of its own that depend on its name and shape alone; norms stay near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wave = formula(name, parameter)
            parameter.copy_(1 + 0.3 * wave if "norm" in name.lower() and name.endswith("weight") else wave)


def formula(name: str, like: Tensor) -> Tensor:
    number = sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 997
    steps = torch.arange(like.numel(), dtype=torch.float64)
    return (0.6 * torch.sin(0.7 * steps * (1 + number / 997) + number)).to(torch.float32).view(like.shape)


def logits(model: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        rows = model(input_ids=torch.tensor(IDS)).logits[:, -1, :3]
    return [[round(float(value), 6) for value in row] for row in rows]


def main() -> None:
    import adapters  # AdapterHub's

    print("GOLDEN: dict[tuple[str, str], list[list[float]]] = {")
    for name in ("bert", "llama", "gpt2"):
        for case in (*BOTTLENECKS, *LORAS):
            model = build(name)
            adapters.init(model)
            options = BOTTLENECKS.get(case) or LORAS[case]
            config = adapters.BnConfig(**options) if case in BOTTLENECKS else adapters.LoRAConfig(**options)
            model.add_adapter("task", config=config)
            model.set_active_adapters("task")
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".task." in key:
                        parameter.copy_(formula(key, parameter))
            print(f'    ("{name}", "{case}"): {logits(model.eval())},')
    print("}")


if __name__ == "__main__":
    main()
