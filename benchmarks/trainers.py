"""A step of instruction tuning as the trainers take it: collate, forward, loss, backward, AdamW; and a checkpoint.

Eight rows of unequal length, of which about a fifth of the tokens is learned. Beside ours stands TRL's SFTTrainer with
PEFT's model, on the same rows with the same labels. Not measured: reading and preparing the rows.
"""

from __future__ import annotations

import contextlib
import io
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.data.tokens import IGNORED
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, Setting, close, twins

ROWS_A_STEP = 8


def _rows(vocabulary: int, tokens: int) -> list[dict[str, list[int]]]:
    numbers, made = random.Random(0), []
    for _ in range(ROWS_A_STEP):
        length = numbers.randrange(tokens // 2, 2 * tokens)
        ids = [numbers.randrange(5, vocabulary) for _ in range(length)]
        learned = max(1, length // 5)
        made.append({"input_ids": ids, "labels": [IGNORED] * (length - learned) + ids[-learned:]})
    return made


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2")


def made(trainer: Any, model: Any, rows: list[dict[str, list[int]]], folder: Path, **chosen: Any) -> Any:
    """A trainer over rows that are tokens already, in one micro-batch; `chosen` are arguments of its SFTConfig."""
    from datasets import Dataset
    from trl import SFTConfig

    settings: dict[str, Any] = {
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-5,
        "max_steps": 1000,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **chosen,
    }
    vocabulary = int(model.config.get_text_config().vocab_size)
    with contextlib.redirect_stderr(io.StringIO()):
        return trainer(
            model,
            SFTConfig(str(folder), **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(vocabulary),
        )


def classifier_trainer(model: Any, rows: list[dict[str, Any]], folder: Path) -> Any:
    """transformers' Trainer over rows of `input_ids` and a `label`."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    vocabulary = int(model.config.vocab_size)
    return Trainer(
        model,
        TrainingArguments(
            str(folder), per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, disable_tqdm=True
        ),
        data_collator=DataCollatorWithPadding(_tokenizer(vocabulary)),
        train_dataset=Dataset.from_list(rows),
    )


PLAIN: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}  # no autocast, nothing computed twice


def _side(trainer: Any) -> Side:
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
    trainer.model.train()

    def step() -> float:
        batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
        count = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Side(step, own=(*trainer.model.parameters(), *trainer.model.buffers()))


def _step(setting: Setting, dtype: torch.dtype, tolerance: float) -> Pair:
    import trl

    import adapters.train

    ours, theirs = twins(setting, dtype, "lora", **LORA)
    rows = _rows(int(ours.config.vocab_size), setting.tokens)
    mine = made(adapters.train.SFTTrainer, ours, rows, setting.folder("ours"), **PLAIN)
    peers = made(trl.SFTTrainer, theirs, rows, setting.folder("theirs"), **PLAIN)
    return Pair(_side(mine), _side(peers), close(tolerance))


def _checkpoint(setting: Setting) -> Pair:
    """Saves as a Trainer does: the adapter alone on both sides; ours also records and fingerprints the base."""
    ours, theirs = twins(setting, torch.float32, "lora", **LORA)
    here, there = (str(setting.folder(name)) for name in ("checkpoint-ours", "checkpoint-theirs"))
    return Pair(Side(lambda: ours.save_pretrained(here)), Side(lambda: theirs.save_pretrained(there)))


NEEDS = ("trl", "datasets")
ROWS = [
    Row("SFT step, LoRA r16, fp32", partial(_step, dtype=torch.float32, tolerance=1e-4), "TRL + PEFT", needs=NEEDS),
    Row("SFT step, LoRA r16, bf16", partial(_step, dtype=torch.bfloat16, tolerance=2e-2), "TRL + PEFT", needs=NEEDS),
    Row("checkpoint of a trainer, fp32", _checkpoint, gated=False),
]
