"""Whether the keys of a recipe agree with its task and with each other; each refusal names the line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from adapters._errors import AdapterError, nearest
from adapters.train.recipe import UNUSED, Recipe, Training
from adapters.train.source import Source


def settle_length(source: Source) -> None:
    """Makes `steps` and `epochs` one: what `--set` says stands in place of the other one in the file."""
    training = source.values.get("training")
    if not isinstance(training, dict):
        return
    given = [key for key in ("steps", "epochs") if training.get(key) is not None]
    if len(given) == 2:
        by_hand = [key for key in given if source.place(f"training.{key}").startswith("--set")]
        if len(by_hand) != 1:
            raise AdapterError(
                f"{source.place('training.epochs')}: training.epochs and training.steps (in "
                f"{source.place('training.steps')}) both say how long training is; remove one, or set it to null."
            )
        given = by_hand
    if given == ["epochs"]:
        training["steps"] = None
    elif given == ["steps"]:
        training["epochs"] = None
    elif "steps" in training:
        raise AdapterError(f"{source.place('training.steps')}: training.steps is null, so training.epochs is needed.")


def check_together(recipe: Recipe, source: Source) -> None:
    for key in UNUSED[recipe.task]:
        if any(place == key or place.startswith(f"{key}.") for place in source.places):
            raise AdapterError(f"{source.place(key)}: {key!r} means nothing for the task {recipe.task!r}; remove it.")
    if recipe.task == "instruction" and recipe.data is None:
        raise AdapterError(f"{source.place('task')}: the task 'instruction' needs data, such as {{path: rows.jsonl}}.")
    batch, micro = recipe.training.batch, recipe.training.micro_batch
    if batch % micro:
        raise AdapterError(
            f"{source.place('training.micro_batch')}: training.batch ({batch} rows) must be a multiple of "
            f"training.micro_batch ({micro} rows)."
        )
    if recipe.start is not None and "text" not in {field.name for field in fields(recipe.method)}:
        raise AdapterError(f"{source.place('start')}: the method {recipe.method.name!r} has no text to start from.")
    for key in ("method.text", "method.length"):
        if recipe.start is not None and key in source.places:
            raise AdapterError(f"{source.place(key)}: `start: example` settles {key}; remove one of the two.")
    _check_stopping(recipe.training, source)
    if recipe.training.arguments:
        _check_arguments(recipe, source)


def _check_stopping(training: Training, source: Source) -> None:
    if training.patience is None:
        return
    place = source.place("training.patience")
    if training.eval_steps is None:
        raise AdapterError(f"{place}: training.patience counts evaluations, so training.eval_steps is needed.")
    if "training.save_steps" in source.places and training.save_steps != training.eval_steps:
        raise AdapterError(
            f"{source.place('training.save_steps')}: with training.patience every evaluation is a checkpoint, so "
            f"training.save_steps must be training.eval_steps ({training.eval_steps}); remove it."
        )


def _check_arguments(recipe: Recipe, source: Source) -> None:
    """Further arguments by name: known to the trainer, and none that the recipe has a key for."""
    from transformers import TrainingArguments

    from adapters.train.steps import KEYS

    config: Any = TrainingArguments
    if recipe.task != "sarcasm":
        from trl import SFTConfig

        config = SFTConfig
    known = [field.name for field in fields(config) if field.init]
    for name in recipe.training.arguments:
        place = source.place(f"training.arguments.{name}")
        if name not in known:
            close = nearest(name, known) or "."
            raise AdapterError(f"{place}: {config.__name__} has no argument {name!r}{close}")
        if name in KEYS:
            raise AdapterError(f"{place}: training.arguments.{name} is for the recipe's own {KEYS[name]} to say.")
