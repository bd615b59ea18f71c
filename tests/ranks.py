"""Runs as every process of a launcher runs them: alone, under DDP or under FSDP2; each leaves what it ended with.

`python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py ddp FOLDER`, or without the launcher, `one`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import deaths
import tiny
import torch
import torch.distributed as dist
import trl
from transformers import Trainer, TrainingArguments

import adapters
import adapters.train
from adapters._attach import tensors_of
from adapters._sharded import whole

OPTIONS: dict[str, dict[str, Any]] = {"lora": {"rank": 4}, "bottleneck": {"reduction_factor": 8}, "prefix": {}}
RUNS = [
    ("trainer", "lora"),
    ("trainer", "bottleneck"),
    ("trainer", "prefix"),
    ("trl", "lora"),
    ("ours", "lora"),
    ("unpadded", "lora"),
]
FSDP = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def make(loop: str, method: str, folder: Path) -> Any:
    model = tiny.build("llama")
    torch.manual_seed(5)
    adapters.attach(model, method, name="fr", **OPTIONS[method])
    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 6,
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")),
        "save_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    if loop == "unpadded":
        assert adapters.train.unpad(model).spared
    if loop in ("trainer", "unpadded"):
        arguments = TrainingArguments(**common)
        return Trainer(model, arguments, data_collator=deaths.pad, train_dataset=deaths.rows())
    finished = {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False, "max_length": None}
    trainer: Any = trl.SFTTrainer if loop == "trl" else adapters.train.SFTTrainer
    arguments = trl.SFTConfig(**common, **finished)
    return trainer(model, arguments, train_dataset=deaths.rows(), processing_class=deaths.tokenizer())


def shard(trainer: Any) -> None:
    """Makes accelerate shard on CPUs, which it does on accelerators only: everything behind that check is its own."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True


def run(kind: str, loop: str, method: str, folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors at the end, whole."""
    trainer = make(loop, method, folder)
    if kind == "fsdp":
        shard(trainer)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
    held = trainer.accelerator.unwrap_model(trainer.model)
    if kind == "fsdp" or trainer.is_world_process_zero():
        adapters.save(held, "fr", folder / "adapter")
    if trainer.is_world_process_zero():
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        sharded = sum(type(parameter).__name__ == "DTensor" for parameter in held.parameters())
        wrapped = type(trainer.model_wrapped).__name__
        (folder / "facts.json").write_text(json.dumps({"losses": losses, "sharded": sharded, "wrapped": wrapped}))
    return {key: whole(tensor.detach()).clone() for key, tensor in tensors_of(held, "fr").items()}


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(FSDP)
    rank = int(os.environ.get("RANK", "0"))
    for loop, method in RUNS:
        here = folder / kind / f"{loop}-{method}"
        here.mkdir(parents=True, exist_ok=True)
        torch.save(run(kind, loop, method, here), here / f"rank{rank}.pt")
        again = run(kind, loop, method, here, str(here / "run" / "checkpoint-3"))
        torch.save(again, here / f"again{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
