"""`transformers.Trainer` and all that descend from it, TRL's trainers among them, with a model that has adapters.

`train` runs with three of the trainer's own steps exchanged on the instance: saving a checkpoint seals it, resuming and
loading the best restore the tensors of the attached adapters in place. A model without adapters sees none of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapters._attach.state import unwrapped
from adapters._errors import AdapterError
from adapters._trainers.complete import newest_checkpoint, require_whole, seal, unseal
from adapters._trainers.parts import attached_parts, require_frozen, restore_parts, save_parts, save_rest


def extend() -> None:
    """Called once, when transformers' Trainer has been imported."""
    from transformers.trainer import Trainer

    Trainer.train = _training(Trainer.train)


def attached_within(model: Any) -> nn.Module | None:
    """The attached model that `model` is or holds: trainers are given wrappers, and models with one inside."""
    return next(iter(attached_parts(model).values()), None)


def _training(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def with_adapters(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        attached = attached_within(self.model) is not None
        if not attached and self.model_init is None:
            return train(self, resume_from_checkpoint, *args, **kwargs)
        require_frozen(self.model)
        with _own_steps(self):  # what `model_init` makes may have adapters
            resumed = _checkpoint(self, resume_from_checkpoint) if attached else resume_from_checkpoint
            return train(self, resumed, *args, **kwargs)

    return with_adapters


def _checkpoint(trainer: Any, asked: Any) -> Any:
    """The checkpoint to resume from: for True, the newest complete one."""
    if asked is None or asked is False:
        return None
    if asked is True:
        asked = newest_checkpoint(trainer.args.output_dir)
        if asked is None:
            raise AdapterError(
                f"{trainer.args.output_dir} holds no complete checkpoint to resume from: train without "
                "resume_from_checkpoint, or ask adapters.train.newest_checkpoint first, which then returns None."
            )
    require_whole(asked)
    return asked


@contextmanager
def _own_steps(trainer: Any) -> Iterator[None]:
    own = {
        "_save_checkpoint": _saving(trainer, trainer._save_checkpoint),
        "_load_from_checkpoint": _loading(trainer, trainer._load_from_checkpoint),
        "_load_best_model": _loading_best(trainer, trainer._load_best_model),
        "save_model": _gathering(trainer, trainer.save_model),
        "_run_epoch": _running(trainer, trainer._run_epoch),
    }
    before = {name: trainer.__dict__[name] for name in own if name in trainer.__dict__}
    trainer.__dict__.update(own)
    try:
        yield
    finally:
        for name in own:
            trainer.__dict__.pop(name, None)
        trainer.__dict__.update(before)


def _saving(trainer: Any, inner: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint(model: Any, trial: Any = None, *args: Any, **kwargs: Any) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        if attached_within(trainer.model) is None:
            inner(model, trial, *args, **kwargs)
            return
        run = trainer._get_output_dir(trial=trial)
        folder, writes = os.path.join(run, f"checkpoint-{trainer.state.global_step}"), trainer.args.should_save
        if writes:
            unseal(folder)
        # an older checkpoint goes when the new one is sealed, and not before
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        try:
            inner(model, trial, *args, **kwargs)
        finally:
            trainer.args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()  # the other processes write their random numbers' states
        if writes:
            seal(folder)
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    return save_checkpoint


def _loading(trainer: Any, inner: Callable[..., None]) -> Callable[..., None]:
    def load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        found = attached_within(model if model is not None else trainer.model)
        if found is None:
            inner(resume_from_checkpoint, model)
        else:
            restore_parts(model if model is not None else trainer.model, resume_from_checkpoint)

    return load_from_checkpoint


def _loading_best(trainer: Any, inner: Callable[[], None]) -> Callable[[], None]:
    def load_best_model() -> None:
        found = attached_within(trainer.model)
        if found is None:
            inner()
        else:
            restore_parts(trainer.model, trainer.state.best_model_checkpoint)

    return load_best_model


def _running(trainer: Any, inner: Callable[..., None]) -> Callable[..., None]:
    """Resumed from the checkpoint of its last step, a Trainer would take one more before it asks whether to stop."""

    def run_epoch(*args: Any, **kwargs: Any) -> None:
        if attached_within(trainer.model) is not None and trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            inner(*args, **kwargs)

    return run_epoch


def _gathering(trainer: Any, inner: Callable[..., None]) -> Callable[..., None]:
    """Saves the adapters where the trainer's own way would write the whole model, or gather it under FSDP."""
    from transformers.trainer import Trainer

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        found, folder = attached_within(trainer.model), output_dir or trainer.args.output_dir
        model = unwrapped(trainer.model)
        own_way = type(trainer)._save is not Trainer._save or (found is model and hasattr(model, "save_pretrained"))
        if found is None or (own_way and not trainer.is_fsdp_enabled):
            inner(output_dir, _internal_call)
            if found is not None and trainer.args.should_save:
                save_rest(trainer.model, folder)
            return
        save_parts(trainer.model, folder, trainer.args.should_save)
        if trainer.args.should_save and trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)

    return save_model
