"""TRL's own example scripts with the two lines that the README changes, and nothing else."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chat
import pytest
import tiny
import transformers as hf
from safetensors.torch import load_file

import adapters

trl = pytest.importorskip("trl")
pytest.importorskip("peft")
ROOT = Path(__file__).parent.parent
ROWS = {
    "sft": {"prompt": "what is w{}", "completion": "it is w{}"},
    "dpo": {"prompt": "what is w{}", "chosen": "it is w{}", "rejected": "no"},
    "kto": {"prompt": "what is w{}", "completion": "it is w{}", "label": True},
}


def changed(script: str) -> str:
    """The installed script with the change that the README shows as a diff."""
    found = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None, "the README shows no diff"
    source = (Path(trl.__file__).parent / "scripts" / f"{script}.py").read_text()
    lines = found[1].splitlines()
    kept = [line[1:] for line in lines if line[:1] in "- "]
    put = [line[1:] for line in lines if line[:1] in "+ "]
    assert "\n".join(kept[:1]) in source
    for old, new in ((kept[:1], put[:2]), (kept[1:], put[2:])):
        assert source.count("\n".join(old) + "\n") == 1, old
        source = source.replace("\n".join(old) + "\n", "\n".join(new) + "\n")
    return source


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chat.letters(chat.CHATML, bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>")
    sizes = {**tiny._GROUPED, "vocab_size": len(tokenizer)}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", ROWS)
def test_a_script_of_trls_runs_with_two_lines_changed(script: str, base: Path, tmp_path: Path) -> None:
    original = (Path(trl.__file__).parent / "scripts" / f"{script}.py").read_text()
    text = changed(script)
    delta = [line for line in difflib.ndiff(original.splitlines(), text.splitlines()) if line[:2] in ("+ ", "- ")]
    assert [line[0] for line in delta] == ["+", "-", "+"], delta  # one line more, and one exchanged
    (tmp_path / "script.py").write_text(text)
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {k: v.format(i % 9) if isinstance(v, str) else bool(i % 2) for k, v in ROWS[script].items()} for i in range(8)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model_name_or_path": base,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
    }
    command = [sys.executable, str(tmp_path / "script.py")]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in stored.values()), "nothing was trained"
    model = hf.LlamaForCausalLM.from_pretrained(base)
    report = adapters.load(model, tmp_path / "out", name="fr")
    assert (report.method, report.tensors) == ("bottleneck", len(stored))
