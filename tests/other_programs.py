"""llama.cpp, mistral.rs and mlx-lm as programs of their own, whose memory ends with them.

`python tests/other_programs.py llama MODEL [ADAPTER]`, `... mistral BASE FOLDER...` and `... mlx FOLDER...`; beginnings
of texts come as JSON on standard input, and what the program goes on with leaves as JSON on the last line of standard
output.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any


def llama(prompts: list[list[int]], model: str, *adapters: str) -> list[int]:
    """The likeliest next token of each prompt of tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in adapters]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"n_predict": 1, "n_probs": 1, "temperature": 0.0, "cache_prompt": True}
    found = []
    for ids in prompts:
        answer: Any = server.handle_completions({**asked, "prompt": ids})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found.append(int(answer["choices"][0]["logprobs"]["content"][0]["id"]))
    return found


def mistral(prompts: list[str], base: str, *folders: str) -> list[Any]:
    """For each adapter, the text that follows each prompt, or the sentence with which it is refused."""
    import mistralrs as rs

    which = rs.Which.Lora(model_id=base, adapters=[], arch=rs.Architecture.Llama, dtype=rs.ModelDType.F32)
    runner = rs.Runner(which=which, no_paged_attn=True, max_seqs=1, prefix_cache_n=0)
    found: list[Any] = []
    for i, folder in enumerate(folders):
        try:
            runner.load_lora_adapter(f"a{i}", folder)
        except ValueError as error:
            found.append(str(error))
            continue
        given = {"model": "default", "max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "adapter": f"a{i}"}
        answers = [runner.send_completion_request(rs.CompletionRequest(prompt=text, **given)) for text in prompts]
        found.append([answer.choices[0].text for answer in answers])
    return found


def mlx(prompts: list[list[int]], *folders: str) -> dict[str, dict[str, Any]]:
    """For each folder, the logits (prompts, tokens, vocabulary) of the base in it and with each adapter beside it."""
    import mlx.core
    from mlx_lm.utils import load_adapters, load_model

    found: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        found[folder.name] = {}
        for place in sorted(folder.iterdir()):
            model, _ = load_model(folder / "base")
            if place.name != "base":
                model = load_adapters(model, str(place))
                model.eval()
            found[folder.name][place.name] = model(mlx.core.array(prompts)).tolist()
    return found


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    said = {"llama": llama, "mistral": mistral, "mlx": mlx}[program](json.load(sys.stdin), *arguments)  # type: ignore[operator]
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB", file=sys.stderr)
    print(json.dumps(said))
