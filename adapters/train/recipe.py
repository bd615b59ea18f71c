"""What a recipe says: one frozen record, every key with its meaning, its default and the values it can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters._contract import Method
from adapters._errors import AdapterError

FILES = (".jsonl", ".json", ".csv", ".parquet")
TASKS = ("function_calls", "sarcasm", "instruction")
_OWN_ROWS = ("data", "training.eval_steps", "training.patience", "training.layout")
# keys that mean nothing for a task are refused rather than ignored
UNUSED: Mapping[str, tuple[str, ...]] = {
    "function_calls": _OWN_ROWS,
    "sarcasm": (*_OWN_ROWS, "start", "evaluation.max_new_tokens"),
    "instruction": (),
}


def _number(default: float | None, least: float) -> Any:
    return field(default=default, metadata={"least": least})


def _choice(default: str | None, *choices: str | None) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class Training:
    """How the adapter is trained. The budget is `steps` times `batch` rows, or `epochs`, of at most `max_tokens` each.

    Args:
        steps: optimizer steps; null where `epochs` is given.
        epochs: times that every row is seen, instead of `steps`.
        batch: rows in one step, of all processes together.
        micro_batch: rows in one forward of one process; `batch` is a multiple of it.
        learning_rate: AdamW's, at its highest.
        warmup: steps in which the learning rate rises from 0; below 1: a share of the run.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        seed: of the fresh tensors and of the order of the rows.
        max_tokens: of a row; longer ones are left out (own data: dropped or cut, as `data.too_long` says).
        schedule: of the learning rate after the warm-up.
        gradient_checkpointing: computes activations twice and keeps few of them.
        layout: how rows share a forward, as `adapters.train.SFTTrainer` takes it.
        save_steps: steps between two checkpoints, from which `--resume` goes on; a run no longer than that makes none,
            and 0 makes none at all.
        keep_checkpoints: leaves them when the run has succeeded.
        eval_steps: steps between two losses on the held-out rows; by default they are scored at the end only.
        patience: evaluations without a lower held-out loss after which training ends; the best is kept. Every
            evaluation is then a checkpoint as well.
        report_to: where transformers logs to, such as tensorboard, wandb or trackio; the package must be installed.
        arguments: further arguments of TRL's SFTConfig, or of TrainingArguments for classifiers, by name; such as
            `{optim: paged_adamw_8bit}`, bitsandbytes' AdamW with moments in 8 bits.
    """

    steps: int | None = _number(60, 1)
    epochs: float | None = _number(None, 0)
    batch: int = _number(6, 1)
    micro_batch: int = _number(3, 1)
    learning_rate: float = _number(1e-3, 0)
    warmup: float = _number(5, 0)
    weight_decay: float = _number(0.0, 0)
    clip: float = _number(1.0, 0)
    seed: int = _number(0, 0)
    max_tokens: int = _number(1024, 8)
    schedule: str = _choice("cosine", "cosine", "linear", "constant")
    gradient_checkpointing: bool = False
    layout: str = _choice("auto", "auto", "packed", "padded")
    save_steps: int = _number(100, 0)
    keep_checkpoints: bool = False
    eval_steps: int | None = _number(None, 1)
    patience: int | None = _number(None, 1)
    report_to: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """Your own rows, of any shape that `adapters.data.prepare` takes.

    Args:
        path: a .jsonl, .json, .csv or .parquet file, or the id of a data set on the Hub.
        split: of the Hub's data set, to train on.
        evaluation: what is held out: a share of the rows (at most `evaluation.rows` of them), a file, or a split.
        learn: "all" answers of the assistant, or only the "last" of each row.
        columns: field of a shape -> column, such as `{question: my_column}`.
        roles: role name in the rows -> system, user, assistant or tool.
        system: a system turn for conversations that have none.
        too_long: "drop" rows of more than `training.max_tokens`, or "cut" them.
    """

    path: str
    split: str | None = None
    evaluation: float | str = 0.1
    learn: str = _choice("all", "all", "last")
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    too_long: str = _choice("drop", "drop", "cut")

    def __post_init__(self) -> None:
        if isinstance(self.evaluation, float) and not 0 < self.evaluation < 1:
            raise AdapterError(
                f"data.evaluation is {self.evaluation:g}; it must be a share of the rows between 0 and 1, a file or a "
                "split."
            )
        if self.is_file:
            hub = "split" if self.split else "evaluation" if self._names_a_split else None
            if hub is not None:
                raise AdapterError(f"data.{hub} names a split, but data.path is the file {self.path}, which has none.")

    @property
    def is_file(self) -> bool:
        return Path(self.path).suffix in FILES

    @property
    def _names_a_split(self) -> bool:
        return isinstance(self.evaluation, str) and Path(self.evaluation).suffix not in FILES


@dataclass(frozen=True)
class Evaluation:
    """How base and adapted model are compared on rows that training never saw.

    Args:
        rows: held-out rows; of own data, at most so many.
        batch: rows answered at a time.
        max_new_tokens: longest answer, in tokens.
        examples: rows whose answers are printed, and compared after loading into a fresh base.
    """

    rows: int = _number(80, 1)
    batch: int = _number(10, 1)
    max_new_tokens: int = _number(96, 1)
    examples: int = _number(3, 1)


@dataclass(frozen=True)
class Recipe:
    """A complete run.

    Args:
        task: what is learned and how it is scored.
        base: an embedded name, a Hub id or a folder.
        method: the adapter, checked when the recipe is read.
        quantize: "nf4" trains on a base in 4 bits.
        dtype: of the base; by default the checkpoint's.
        start: "example" starts a method that has a `text` from one worked example of the task.
        targets: where the adapter acts, instead of the method's own choice.
        data: the rows, where the task is `instruction`.
        output: folder of the adapter; `{method}` in it is replaced by the method's name.
    """

    task: str = _choice("function_calls", *TASKS)
    base: str = "smollm2-135m-instruct"
    method: Method = field(default_factory=Method)
    quantize: str | None = _choice(None, None, "nf4")
    dtype: str | None = _choice(None, None, "bfloat16", "float16", "float32")
    start: str | None = _choice(None, None, "example")
    targets: tuple[str, ...] | None = None
    data: Data | None = None
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: str = "out/{method}"
