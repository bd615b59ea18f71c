"""llama.cpp, mistral.rs, mlx-lm and vLLM as programs of their own, whose memory ends with them.

`python tests/other_programs.py llama MODEL [ADAPTER]`, `... mistral BASE FOLDER...`, `... mlx FOLDER...` and
`... vllm BASE FOLDER...`; beginnings of texts come as JSON on standard input, and what the program goes on with leaves
as JSON on the last line of standard output.
"""

from __future__ import annotations

import json
import os
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


def vllm(prompts: list[list[int]], base: str, *folders: str) -> list[Any]:
    """For each adapter, the likeliest token after each position of each prompt, or what it is refused with."""
    # in one process, where an error is raised as it is; a CPU has no statistics to send
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # with more sequences, logits of prompts fail beside a LoRA of the output embeddings (0.32)
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 1}
    program = LLM(model=base, enable_lora=True, dtype="float32", enforce_eager=True, **sizes)
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, logprobs=1)
    found: list[Any] = []
    for number, folder in enumerate(folders, 1):
        request = LoRARequest(f"a{number}", number, folder)
        try:
            program.llm_engine.add_lora(request)
        except Exception as error:  # whatever it raises is the answer
            found.append(f"{type(error).__name__}: {error}")
            continue
        texts = [{"prompt_token_ids": ids} for ids in prompts]
        rows = [
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            for output in program.generate(texts, wanted, lora_request=request, use_tqdm=False)
        ]
        found.append([[min(row, key=lambda token: row[token].rank) for row in each] for each in rows])
    return found


if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    said = {"llama": llama, "mistral": mistral, "mlx": mlx, "vllm": vllm}[program](json.load(sys.stdin), *arguments)  # type: ignore[operator]
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB", file=sys.stderr)
    print(json.dumps(said))
