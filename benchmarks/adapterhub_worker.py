"""AdapterHub's side of the rows beside it. Runs in an environment of its own: it imports none of this repository.

    python adapterhub_worker.py <folder of the base> <file with adapters' tensors> <count> <rows> <tokens>

The base is loaded twice, bare and with `count` bottleneck adapters whose tensors are those of ours. For every line on
standard input, the name of a row, it measures both once, in CPU milliseconds, and answers with a line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import torch
from adapters.composition import Average, BatchSplit, Stack
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import adapters
from adapters import SeqBnConfig


def base(folder: str) -> Any:
    config = AutoConfig.from_pretrained(folder)
    newer = getattr(config, "rope_parameters", None) or {}  # where transformers 5 keeps what 4 reads from the top level
    config.rope_theta = newer.get("rope_theta", config.rope_theta)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval().requires_grad_(False)


def adapted(folder: str, tensors: dict[str, torch.Tensor], count: int) -> Any:
    """The base with adapters "0", "1", ...; `tensors` holds `<adapter>.<layer>.<down|up>.<weight|bias>`."""
    model = base(folder)
    adapters.init(model)
    for i in range(count):
        # its default reads the residual sum where ours reads the branch's output; without it both compute the same
        model.add_adapter(str(i), config=SeqBnConfig(reduction_factor=16, original_ln_before=False))
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, layer, part, kind = key.split(".")
            held = model.model.layers[int(layer)].output_adapters.adapters[name]
            linear = held.adapter_down[0] if part == "down" else held.adapter_up
            getattr(linear, kind).copy_(tensor)
    return model.eval()


def selections(count: int) -> dict[str, Any]:
    """What each row activates."""
    return {
        "one": "0",
        "stack": Stack("0", "1"),
        # release 1.3.0 takes the mean of what it has weighted already: by halves, a quarter of each
        "average": Average("0", "1", weights=[1.0, 1.0], normalize_weights=False),
        "rows": BatchSplit(*map(str, range(count)), batch_sizes=[1] * count),
    }


def once(work: Any) -> tuple[float, Any]:
    gc.collect()
    gc.disable()
    start = time.process_time()
    found = work()
    milliseconds = (time.process_time() - start) * 1e3
    gc.enable()
    return milliseconds, found


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    folder, file, count, rows, tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    bare, model, chosen = base(folder), adapted(folder, load_file(file), count), selections(count)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, int(model.config.vocab_size), (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "logits_to_keep": 1}
    print(json.dumps({"adapters": adapters.__version__}), flush=True)
    for line in sys.stdin:
        kind, _, name = line.strip().rpartition(" ")
        if kind == "activate":
            model.set_active_adapters(None)
            print(json.dumps({"ms": once(lambda: model.set_active_adapters(chosen[name]))[0]}), flush=True)  # noqa: B023
            continue
        model.set_active_adapters(chosen[name])
        below, _ = once(lambda: bare(**batch))
        above, output = once(lambda: model(**batch))
        probe = output.logits[:, -1, :8].flatten().tolist()
        print(json.dumps({"base": below, "ms": above, "probe": probe}), flush=True)


if __name__ == "__main__":
    main()
