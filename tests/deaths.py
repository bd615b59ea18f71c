"""A run that dies and is resumed, over and over, against the run that nobody disturbed.

`python tests/deaths.py KIND FOLDER DEATHS` prints one JSON line a death. The libraries are imported once, in a process
that computes nothing; every run and every resumption is a process of its own, forked from it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import trl
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainingArguments

import adapters
import adapters.train
from adapters._attach import tensors_of

STEPS, SAVE = 11, 3
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def rows() -> Any:
    numbers = random.Random(1)
    made = [[*(numbers.randrange(5, 150) for _ in range(numbers.randrange(6, 12))), 2] for _ in range(12)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in made])


def pad(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def make(kind: str, folder: Path) -> Any:
    """A trainer over random rows: shuffled, with dropout, accumulation, a schedule and a limit on checkpoints."""
    torch.manual_seed(5)
    model = tiny.build("llama")
    adapters.attach(model, "lora", name="fr", rank=4, dropout=0.2)
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": SAVE,
        "save_total_limit": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    if kind == "trainer":
        arguments = TrainingArguments(**common)
        return Trainer(model, arguments, data_collator=pad, train_dataset=rows())
    arguments = trl.SFTConfig(**common, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = trl.SFTTrainer if kind == "trl" else adapters.train.SFTTrainer
    return trainer(model, arguments, train_dataset=rows(), processing_class=tokenizer())


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(tiny.VOCAB - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class AtStep(TrainerCallback):
    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_files(folder: Path, count: list[int], fatal: int | None) -> None:
    """Counts what happens to files below `folder`, and dies at the `fatal`-th."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event in WRITES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        writes = writes or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) != 0)
        if writes and str(args[0]).startswith(str(folder)):
            count[0] += 1
            if count[0] == fatal:
                die()

    sys.addaudithook(hook)


def run(kind: str, folder: Path, result: Path, step: int | None = None, event: int | None = None) -> None:
    """Trains to the end, from the newest complete checkpoint if there is one, and leaves the tensors in `result`."""
    torch.set_num_threads(1)
    disable_progress_bars()
    count = [0]
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make(kind, folder)
    watch_files(folder, count, event)
    if step is not None:
        trainer.add_callback(AtStep(step, die))
    resumed = adapters.train.newest_checkpoint(folder)
    with contextlib.redirect_stdout(io.StringIO()):  # every log is printed
        trainer.train(resume_from_checkpoint=resumed)
    tensors = {key: tensor.detach() for key, tensor in tensors_of(trainer.model, "fr").items()}
    torch.save({"tensors": tensors, "events": count[0], "from": resumed}, result)


def forked(*args: Any, **kwargs: Any) -> int:
    """`run` in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            run(*args, **kwargs)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(kind: str, folder: Path, deaths: int) -> None:
    chosen = random.Random(7)
    assert forked(kind, folder / "whole", folder / "whole.pt") == 0
    whole = torch.load(folder / "whole.pt")
    for death in range(deaths):
        here = folder / f"death{death}"
        if death % 5 < 2:
            step, event = chosen.randrange(1, STEPS + 1), None
        else:
            step, event = None, chosen.randrange(1, whole["events"] + 1)
        status = forked(kind, here, folder / "dead.pt", step=step, event=event)
        left = sorted(path.name for path in here.iterdir()) if here.is_dir() else []
        again = forked(kind, here, folder / "again.pt")
        found = torch.load(folder / "again.pt")
        equal = all(torch.equal(whole["tensors"][key], found["tensors"][key]) for key in whole["tensors"])
        line = {"step": step, "event": event, "status": status, "again": again, "left": left, "equal": equal}
        print(json.dumps({**line, "from": found["from"] and Path(found["from"]).name}), flush=True)
        shutil.rmtree(here)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
