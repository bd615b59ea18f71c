"""Beside AdapterHub, in an environment of its own: it needs an older transformers, and shares our import name.

`python -m benchmarks --adapterhub` makes that environment once, from `adapterhub-requirements.txt` and the torch of
`.ci/constraints.txt`, and keeps it in the cache folder. Both sides hold the same bottleneck layers on the same base and
must compute the same; each is measured beside the bare base of its own transformers, and the ratios are compared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapters
from adapters._hub.fetch import cache_folder, fetch
from adapters._store.bundle import WEIGHTS
from benchmarks.fleet import fleet, folders
from benchmarks.measure import Pair, Row, Side, cpu_ms
from benchmarks.twins import Setting, bare, close

HERE = Path(__file__).parent
REQUIREMENTS, WORKER = HERE / "adapterhub-requirements.txt", HERE / "adapterhub_worker.py"
CONSTRAINTS = HERE.parent / ".ci" / "constraints.txt"
BASE = "smollm2-135m-instruct"
KINDS = {"down": "weight", "up": "weight", "down_bias": "bias", "up_bias": "bias"}


def environment() -> Path:
    """The Python of the environment, which is made when it is not there, or not whole.

    Raises:
        RuntimeError: pip cannot install it; the sentence ends with what pip said.
    """
    torch_pin = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    key = hashlib.sha256((REQUIREMENTS.read_text() + torch_pin + sys.version).encode()).hexdigest()[:12]
    place = cache_folder() / f"adapterhub-{key}"
    python, whole = place / "bin" / "python", place / "whole"
    if not whole.exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS), torch_pin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"AdapterHub's library cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        whole.touch()
    return python


class Worker:
    """AdapterHub's side, a process that measures a row whenever it is asked."""

    def __init__(self, setting: Setting) -> None:
        file = setting.folder("adapterhub.safetensors")
        save_file(_tensors(setting), file)
        sizes = map(str, (setting.mixed, setting.mixed, setting.prompt))
        command = [str(environment()), "-I", str(WORKER), str(fetch(BASE)), str(file), *sizes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.read()

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError("AdapterHub's process ended")


_workers: dict[Path, Worker] = {}


def worker(setting: Setting) -> Worker:
    if setting.scratch not in _workers:
        _workers[setting.scratch] = Worker(setting)
    return _workers[setting.scratch]


def _tensors(setting: Setting) -> dict[str, Tensor]:
    """Our bottlenecks' tensors in the words of the worker: `<adapter>.<layer>.<down|up>.<weight|bias>`."""
    found = {}
    for i, place in enumerate(folders(setting, "bottleneck", setting.mixed)[: setting.mixed]):
        for key, tensor in load_file(place / WEIGHTS).items():
            path, _, name = key.partition(":")
            layer = next(part for part in path.split(".") if part.isdecimal())
            found[f"{i}.{layer}.{'down' if name in ('down', 'down_bias') else 'up'}.{KINDS[name]}"] = tensor
    return found


def _selections(rows: int) -> dict[str, Any]:
    return {
        "one": "0",
        "stack": adapters.Stack("0", "1"),
        "average": adapters.Average("0", "1"),
        "rows": [str(i) for i in range(rows)],
    }


class Ours:
    """Our side of the same work."""

    def __init__(self, setting: Setting) -> None:
        self.model, self.bare = fleet(setting, "bottleneck", setting.mixed).ours, bare(setting)
        self.chosen = _selections(setting.mixed)
        generator = torch.Generator().manual_seed(1)
        shape = (setting.mixed, setting.prompt)
        ids = torch.randint(5, int(self.bare.config.vocab_size), shape, generator=generator)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "logits_to_keep": 1}

    @torch.no_grad()
    def measure(self, name: str) -> dict[str, Any]:
        below, _ = cpu_ms(lambda: self.bare(**self.batch))
        with adapters.using(self.model, self.chosen[name]):
            above, output = cpu_ms(lambda: self.model(**self.batch))
        return {"base": below, "ms": above, "probe": output.logits[:, -1, :8].flatten().tolist()}

    def activate(self, name: str) -> float:
        adapters.activate(self.model, None)
        return cpu_ms(lambda: adapters.activate(self.model, self.chosen[name]))[0]


def _forward(setting: Setting, name: str) -> Pair:
    held: dict[str, Any] = {}

    def run(side: str, measure: Callable[[str], dict[str, Any]]) -> float:
        held[side] = measure(name)
        return float(held[side]["ms"] / held[side]["base"])

    def agree(*_: Any) -> None:
        close(1e-3)(*(torch.tensor(held[side]["probe"]) for side in ("ours", "theirs")))

    ours, theirs = Ours(setting), worker(setting)
    return Pair(Side(partial(run, "ours", ours.measure)), Side(partial(run, "theirs", theirs.ask)), agree)


def _activate(setting: Setting, name: str) -> Pair:
    ours, theirs = Ours(setting), worker(setting)
    return Pair(Side(lambda: ours.activate(name)), Side(lambda: float(theirs.ask(f"activate {name}")["ms"])))


def _row(label: str, name: str) -> Row:
    build = partial(_forward, name=name)
    return Row(
        f"forward beside the bare base, {label}", build, "AdapterHub", gated=False, units=("ratio",), most_pairs=3
    )


ROWS = [
    _row("one bottleneck", "one"),
    _row("Stack of two", "stack"),
    _row("Average of two", "average"),
    _row("32 rows, 32 bottlenecks (BatchSplit)", "rows"),
    Row("activate one of 32", partial(_activate, name="one"), "AdapterHub", units=("own ms",)),
    Row("activate a list of 32 rows (BatchSplit)", partial(_activate, name="rows"), "AdapterHub", units=("own ms",)),
]
