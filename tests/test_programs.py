"""Other programs compute what this library computes: stock PEFT, llama.cpp and mistral.rs, from the files written here.

Teacher-forced on 20 prompts of 32 tokens with a LoRA that is trained here on SmolLM2. Another program's most likely
token must be ours wherever our two most likely ones are further apart than `MARGIN`, which leaves out rounding alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import shake
from torch import Tensor

import adapters
import adapters.data
from adapters._hub.fetch import fetch_pin
from adapters._hub.pins import MODELS

pytestmark = [pytest.mark.programs, pytest.mark.real, pytest.mark.slow]
PROMPTS, TOKENS, MARGIN = 20, 32, 0.05  # logits; llama.cpp keeps keys and values in 16 bits


@dataclass(frozen=True)
class Made:
    """What was trained and written, and our logits: of the adapted model, of the base, by prompt and position."""

    folder: Path
    prompts: list[list[int]]
    text: Callable[..., str]
    adapted: Tensor
    base: Tensor

    def agrees(self, found: Tensor) -> None:
        """`found` (prompts, positions): the most likely tokens of another program, and nothing of the base's."""
        top = self.adapted.topk(2, -1)
        sure = top.values[..., 0] - top.values[..., 1] > MARGIN
        assert sure.float().mean() >= 0.95
        assert torch.equal(found[sure], top.indices[..., 0][sure])
        assert (self.base.argmax(-1) != top.indices[..., 0])[sure].float().mean() > 0.2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("programs")
    model, tokenizer = adapters.load_base("smollm2-135m-instruct", dtype=torch.float32)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where mistral.rs looks for it
    (folder / "base" / "config.json").write_text(json.dumps(config))
    adapters.export_model(model, folder / "base.gguf", _published(), dtype="float32")
    prompts = list(_prompts(tokenizer))
    base = _logits(model, prompts)
    torch.manual_seed(0)
    adapters.attach(model, "lora", name="default", rank=8, alpha=16.0)
    _train(model, tokenizer)
    adapters.save(model, "default", folder / "lora")
    adapters.export_gguf(model, "default", folder / "lora.gguf", base_gguf=_published())
    adapted = _logits(model, prompts)
    adapters.merge(model, "default")
    adapters.export_model(model, folder / "merged.gguf", _published(), dtype="float32")
    return Made(folder, prompts, tokenizer.decode, adapted, base)


def _published() -> Path:
    """SmolLM2 as it was published, in 4 bits."""
    pin = MODELS["smollm2-135m-instruct"]
    return fetch_pin(replace(pin, convert="")) / pin.convert


def _prompts(tokenizer: Any) -> Iterator[list[int]]:
    """Real requests, of which every beginning is read as the same tokens by a program that is given text."""
    rows, _ = adapters.data.read_calls()
    found = 0
    for row in rows:
        ids = tokenizer(row.request)["input_ids"][:TOKENS]
        beginnings = [tokenizer.decode(ids[:end]) for end in range(1, TOKENS + 1)]
        if len(ids) == TOKENS and tokenizer(beginnings)["input_ids"] == [ids[:end] for end in range(1, TOKENS + 1)]:
            found += 1
            yield ids
        if found == PROMPTS:
            return


def _train(model: Any, tokenizer: Any) -> None:
    """Until it answers in another style, in a few steps."""
    texts = [
        "Find me the way home ! ! Ahoy, sailor, the sea is yours ! !",
        "Ahoy ! What is the time ? Ahoy ! It is late !",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    model.eval()


@torch.no_grad()
def _logits(model: Any, prompts: list[list[int]]) -> Tensor:
    found: Tensor = model.eval()(torch.tensor(prompts), use_cache=False).logits.float()
    return found


def test_stock_peft_agrees(made: Made) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.folder / "base", dtype=torch.float32)
    theirs = _logits(peft.PeftModel.from_pretrained(base, str(made.folder / "lora")), made.prompts)
    made.agrees(theirs.argmax(-1))
    assert (theirs - made.adapted).norm() <= 1e-5 * made.adapted.norm()


@pytest.mark.parametrize("files", [("base.gguf", "lora.gguf"), ("merged.gguf",)], ids=["adapter", "merged"])
def test_llama_cpp_agrees(made: Made, files: tuple[str, ...]) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(made.folder / files[0])
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(made.folder / file), 1.0) for file in files[1:]]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"n_predict": 1, "n_probs": 1, "temperature": 0.0, "cache_prompt": True}

    def next_token(ids: list[int]) -> int:
        answer = server.handle_completions({**asked, "prompt": ids})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return int(answer["choices"][0]["logprobs"]["content"][0]["id"])

    made.agrees(_next_tokens(made, next_token))


@pytest.fixture(scope="module")
def runner(made: Made) -> Any:
    mistralrs = pytest.importorskip("mistralrs")
    which = mistralrs.Which.Lora(
        model_id=str(made.folder / "base"),
        adapters=[mistralrs.LoraAdapter("ours", str(made.folder / "lora"))],
        arch=mistralrs.Architecture.Llama,
        dtype=mistralrs.ModelDType.F32,
    )
    return mistralrs.Runner(which=which, no_paged_attn=True)


def _next_text(runner: Any, text: str, adapter: str) -> str:
    """What mistral.rs goes on with: it is given text, and gives text."""
    import mistralrs

    request = mistralrs.CompletionRequest(
        prompt=text, model="default", max_tokens=1, temperature=0.0, ignore_eos=True, adapter=adapter
    )
    found: str = runner.send_completion_request(request).choices[0].text
    return found


def test_mistral_rs_agrees(made: Made, runner: Any) -> None:
    """Its token is ours where the two read alike."""
    ours = {made.text([token]): token for token in sorted(set(made.adapted.argmax(-1).flatten().tolist()))}
    made.agrees(_next_tokens(made, lambda ids: ours.get(_next_text(runner, made.text(ids), "ours"), -1)))


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "alpha": 8.0, "rslora": True},
    "patterns": {"rank": 4, "alpha": 8.0, "rank_pattern": {"*q_proj*": 2}, "alpha_pattern": {"*up_proj*": 60.0}},
    "dora": {"method": "dora", "rank": 4},
    "bias": {"rank": 4, "bias": True},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck"},
    "embeddings": {"rank": 4, "targets": ["*embed_tokens*", "*q_proj*"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_check_says_what_peft_and_mistral_rs_do(variant: str, made: Made, runner: Any, tmp_path: Path) -> None:
    """Where it says that a folder works, the program computes what was trained; where not, it refuses the folder."""
    import peft
    from transformers import AutoModelForCausalLM

    options = dict(VARIANTS[variant])
    model, _ = adapters.load_base("smollm2-135m-instruct", dtype=torch.float32)
    adapters.attach(model, options.pop("method", "lora"), name="default", **options)
    shake(model, "default", noise=0.02)
    folder = tmp_path / f"adapter-{variant}"
    adapters.save(model, "default", folder)
    ours = _logits(model, made.prompts[:2])
    assert (ours - made.base[:2]).norm() > 0.01 * ours.norm()
    base = AutoModelForCausalLM.from_pretrained(made.folder / "base", dtype=torch.float32)
    if adapters.check_for(folder, "peft").works:
        theirs = _logits(peft.PeftModel.from_pretrained(base, str(folder)), made.prompts[:2])
        assert (theirs - ours).norm() <= 1e-4 * ours.norm()
    else:
        # in a process of its own: here, PEFT has learned from this library what it does not know
        program = f"import peft; peft.PeftConfig.from_pretrained({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "KeyError: 'ADAPTERS'" in done.stderr
    if not adapters.check_for(folder, "mistralrs").works:
        with pytest.raises(ValueError, match=r"(?s).+"):
            runner.load_lora_adapter(variant, str(folder))
        return
    runner.load_lora_adapter(variant, str(folder))
    top = ours.topk(2, -1)
    sure = top.values[..., 0] - top.values[..., 1] > MARGIN
    texts = [
        [_next_text(runner, made.text(ids[: end + 1]), variant) for end in range(TOKENS)] for ids in made.prompts[:2]
    ]
    # a program that answers with text leaves special tokens out
    wanted = [[made.text([token], skip_special_tokens=True) for token in row] for row in top.indices[..., 0].tolist()]
    checked = zip(chain(*sure.tolist()), chain(*texts), chain(*wanted), strict=True)
    assert [(text, want) for certain, text, want in checked if certain and text != want] == []


def _next_tokens(made: Made, next_token: Callable[[list[int]], int]) -> Tensor:
    return torch.tensor([[next_token(ids[: end + 1]) for end in range(TOKENS)] for ids in made.prompts])
