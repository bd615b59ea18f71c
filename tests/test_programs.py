"""Other programs compute what this library computes: stock PEFT, llama.cpp and mistral.rs, from the files written here.

Teacher-forced on 20 prompts of 32 tokens with a LoRA that is trained here on SmolLM2. Another program's most likely
token must be ours wherever our two most likely ones are further apart than `MARGIN`, which leaves out rounding alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

    def beginnings(self, count: int = PROMPTS) -> list[str]:
        """Each prompt up to each of its tokens, as text."""
        return [self.text(ids[: end + 1]) for ids in self.prompts[:count] for end in range(TOKENS)]

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


def test_llama_cpp_agrees_on_tokens_that_are_new(made: Made, tmp_path: Path) -> None:
    """Merged with an adapter that trains the row of a new token, which is asked for by its number."""
    pytest.importorskip("xllamacpp")
    model, tokenizer = adapters.load_base("smollm2-135m-instruct", dtype=torch.float32)
    new = adapters.add_tokens(model, tokenizer, ["<|lookup|>"]).ids["<|lookup|>"]
    prompts = [[*ids[:5], new, *ids[5:12]] for ids in made.prompts[:5]]
    plain = _logits(model, prompts)[:, 5:].argmax(-1)
    torch.manual_seed(0)
    adapters.attach(model, "lora", name="fr", rank=4, tokens=["<|lookup|>"], tokenizer=tokenizer)
    shake(model, "fr", noise=0.03)
    adapters.merge(model, "fr")
    report = adapters.export_model(model, tmp_path / "new.gguf", _published(), "float32", tokenizer)
    assert report.tokens == ("<|lookup|>",)
    top = _logits(model, prompts)[:, 5:].topk(2, -1)
    sure = top.values[..., 0] - top.values[..., 1] > MARGIN
    assert sure.float().mean() >= 0.8  # 40 places after noise, not training
    assert (plain != top.indices[..., 0])[sure].float().mean() > 0.2
    asked = [ids[: end + 1] for ids in prompts for end in range(5, len(ids))]
    found = torch.tensor(other_program("llama", asked, tmp_path / "new.gguf")).view(len(prompts), -1)
    assert torch.equal(found[sure], top.indices[..., 0][sure])


@pytest.mark.parametrize("files", [("base.gguf", "lora.gguf"), ("merged.gguf",)], ids=["adapter", "merged"])
def test_llama_cpp_agrees(made: Made, files: tuple[str, ...]) -> None:
    pytest.importorskip("xllamacpp")
    beginnings = [ids[: end + 1] for ids in made.prompts for end in range(TOKENS)]
    found = other_program("llama", beginnings, *(made.folder / file for file in files))
    made.agrees(torch.tensor(found).view(len(made.prompts), TOKENS))


def test_mistral_rs_agrees(made: Made) -> None:
    """It is given text, and gives text: its token is ours where the two read alike."""
    pytest.importorskip("mistralrs")
    ours = {made.text([token]): token for token in sorted(set(made.adapted.argmax(-1).flatten().tolist()))}
    (found,) = other_program("mistral", made.beginnings(), made.folder / "base", made.folder / "lora")
    made.agrees(torch.tensor([ours.get(text, -1) for text in found]).view(len(made.prompts), TOKENS))


def other_program(name: str, prompts: Any, *places: Path, python: str = sys.executable) -> Any:
    command = [python, str(Path(__file__).with_name("other_programs.py")), name, *map(str, places)]
    # another interpreter has its own packages, and must not be led to these
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or python == sys.executable}
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=False, env=known)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "alpha": 8.0, "rslora": True},
    "patterns": {"rank": 4, "alpha": 8.0, "rank_pattern": {"*q_proj*": 2}, "alpha_pattern": {"*up_proj*": 60.0}},
    "dora": {"method": "dora", "rank": 4},
    "bias": {"rank": 4, "bias": True},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck"},
    "embeddings": {"rank": 4, "targets": ["*embed_tokens*", "*q_proj*"]},
}


@pytest.fixture(scope="module")
def variants(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor, Any]]:
    """The folder of each, our logits on the first two prompts, and what mistral.rs says."""
    pytest.importorskip("mistralrs")
    found = {}
    for variant, given in VARIANTS.items():
        options = dict(given)
        model, _ = adapters.load_base("smollm2-135m-instruct", dtype=torch.float32)
        adapters.attach(model, options.pop("method", "lora"), name="default", **options)
        shake(model, "default", noise=0.02)
        folder = tmp_path_factory.mktemp(variant)
        adapters.save(model, "default", folder)
        found[variant] = (folder, _logits(model, made.prompts[:2]))
    folders = [folder for folder, _ in found.values()]
    said = other_program("mistral", made.beginnings(2), made.folder / "base", *folders)
    return {variant: (*each, answer) for (variant, each), answer in zip(found.items(), said, strict=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_check_says_what_peft_and_mistral_rs_do(
    variant: str, made: Made, variants: dict[str, tuple[Path, Tensor, Any]]
) -> None:
    """Where it says that a folder works, the program computes what was trained; where not, it refuses the folder."""
    import peft
    from transformers import AutoModelForCausalLM

    folder, ours, said = variants[variant]
    assert (ours - made.base[:2]).norm() > 0.01 * ours.norm()
    if adapters.check_for(folder, "peft").works:
        base = AutoModelForCausalLM.from_pretrained(made.folder / "base", dtype=torch.float32)
        theirs = _logits(peft.PeftModel.from_pretrained(base, str(folder)), made.prompts[:2])
        assert (theirs - ours).norm() <= 1e-4 * ours.norm()
    else:
        # in a process of its own: here, PEFT has learned from this library what it does not know
        program = f"import peft; peft.PeftConfig.from_pretrained({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "KeyError: 'ADAPTERS'" in done.stderr
    if not adapters.check_for(folder, "mistralrs").works:
        assert isinstance(said, str), said  # its refusal
        return
    top = ours.topk(2, -1)
    sure = (top.values[..., 0] - top.values[..., 1] > MARGIN).flatten().tolist()
    # a program that answers with text leaves special tokens out
    wanted = [made.text([token], skip_special_tokens=True) for token in top.indices[..., 0].flatten().tolist()]
    pairs = [(text, want) for text, want, certain in zip(said, wanted, sure, strict=True) if certain and text != want]
    assert pairs == []


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no interpreter that has vLLM")
def test_vllm_agrees_and_does_what_check_says(made: Made, variants: dict[str, tuple[Path, Tensor, Any]]) -> None:
    """vLLM wants other versions of a hundred packages, and so an environment of its own."""
    folders = [made.folder / "lora", *(folder for folder, *_ in variants.values())]
    said = other_program("vllm", made.prompts, made.folder / "base", *folders, python=os.environ["VLLM_PYTHON"])
    made.agrees(torch.tensor(said[0]))
    for (variant, (folder, ours, _)), found in zip(variants.items(), said[1:], strict=True):
        if not adapters.check_for(folder, "vllm").works:
            assert isinstance(found, str), variant
            continue
        top = ours.topk(2, -1)
        sure = top.values[..., 0] - top.values[..., 1] > MARGIN
        assert torch.equal(torch.tensor(found[:2])[sure], top.indices[..., 0][sure]), variant
