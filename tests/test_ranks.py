"""Two processes equal one: DDP and FSDP2 over gloo, with trainers that know nothing of it; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import adapters

pytest.importorskip("trl")
SCRIPT = Path(__file__).with_name("ranks.py")
RUNS = ["trainer-lora", "trainer-bottleneck", "trainer-prefix", "trl-lora", "ours-lora", "unpadded-lora"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind, command in (("one", [sys.executable]), ("ddp", launcher), ("fsdp", launcher)):
        done = subprocess.run(
            [*command, str(SCRIPT), kind, str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.slow
def test_real_tokens_alone_train_what_padded_rows_do(ran: Path) -> None:
    padded, unpadded = (torch.load(ran / "one" / run / "rank0.pt") for run in ("trainer-lora", "unpadded-lora"))
    assert apart(padded, unpadded) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(kind: str, run: str, ran: Path) -> None:
    alone, here = ran / "one" / run, ran / kind / run
    expected = torch.load(alone / "rank0.pt")
    first, second = torch.load(here / "rank0.pt"), torch.load(here / "rank1.pt")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert apart(first, expected) < 1e-6
    facts, before = json.loads((here / "facts.json").read_text()), json.loads((alone / "facts.json").read_text())
    assert max(abs(a - b) for a, b in zip(facts["losses"], before["losses"], strict=True)) < 1e-5
    assert (facts["wrapped"], facts["sharded"] > 0) == {
        "ddp": ("DistributedDataParallel", False),
        "fsdp": ("FSDPLlamaForCausalLM", True),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_saved_adapters_are_equal_and_hold_nothing_else(kind: str, run: str, ran: Path) -> None:
    here = ran / kind / run
    model, again = tiny.build("llama"), tiny.build("llama")
    adapters.load(model, here / "adapter", name="fr")
    adapters.load(again, ran / "one" / run / "adapter", name="fr")
    one, other = (dict(each.named_parameters()) for each in (model, again))
    assert max(float((one[key] - other[key]).detach().abs().max()) for key in one) < 1e-6
    last = here / "run" / "checkpoint-6"
    size = sum(tensor.numel() for tensor in load_file(last / "adapter_model.safetensors").values())
    for weights in last.glob("pytorch_model*"):
        assert sum(tensor.numel() for tensor in torch.load(weights).values()) == size
    assert not list(last.glob("model*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_runs_on_several_devices_resume_bit_for_bit(kind: str, run: str, ran: Path) -> None:
    for rank in (0,) if kind == "one" else (0, 1):
        ended, again = torch.load(ran / kind / run / f"rank{rank}.pt"), torch.load(ran / kind / run / f"again{rank}.pt")
        assert all(torch.equal(ended[key], again[key]) for key in ended)


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_attaching_to_a_sharded_model_is_refused(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny.build("llama")
    map_ = adapters.sites(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(adapters.AdapterError, match="sharded already: attach first, then shard"):
        adapters.attach(model, "lora", sites=map_)


def test_an_idle_adapter_that_trains_is_refused_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    model = tiny.build("llama")
    adapters.attach(model, "lora", name="fr", rank=2)
    adapters.attach(model, "lora", name="de", rank=2)
    with pytest.raises(adapters.AdapterError, match="'fr' trains and does not act"):
        accelerator.prepare(model)


def test_flattened_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, use_orig_params=False)
    monkeypatch.setitem(accelerator.state.__dict__, "fsdp_plugin", plugin)
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.FSDP)
    model = tiny.build("llama")
    adapters.attach(model, "lora", rank=2)
    with pytest.raises(adapters.AdapterError, match="use_orig_params"):
        accelerator.prepare(model)
