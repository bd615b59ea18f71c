"""The arguments of a run: our own copy of them, and those that our labels, or our loss, take the place of."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from adapters._attach.container import CHILD
from adapters._errors import AdapterError, nearest
from adapters._heads import output_embeddings
from adapters.train.adopt import is_peft

LAYOUTS = ("auto", "packed", "padded")
# preparation and packing are done before TRL sees the rows
_DONE_HERE: dict[str, Any] = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "packing": False,
    "eval_packing": False,
    "padding_free": False,
    "max_length": None,
    "assistant_only_loss": False,
    "completion_only_loss": None,
    "chat_template_path": None,
}


def own_copy(args: Any, model: Any) -> Any:
    """An SFTConfig that nobody else holds, from an SFTConfig, from TrainingArguments, or from nothing."""
    from transformers.trainer_pt_utils import AcceleratorConfig
    from trl import SFTConfig

    if args is None:
        name = (
            os.fspath(model) if isinstance(model, str | os.PathLike) else getattr(model, "name_or_path", "") or "model"
        )
        # SFTConfig's own default, bf16, is an error on a machine without an accelerator unless that is asked for
        return SFTConfig(f"{Path(name).name}-SFT", use_cpu=not torch.accelerator.is_available())
    if not isinstance(args, SFTConfig):
        return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})  # to_dict hides the token
    made = copy.copy(args)
    for key, value in vars(args).items():
        if isinstance(value, dict | list | AcceleratorConfig):
            setattr(made, key, copy.deepcopy(value))
    return made


def for_trl(args: Any) -> Any:
    """A copy with everything switched off that was done before TRL sees the rows."""
    made = copy.copy(args)
    for key, value in _DONE_HERE.items():
        setattr(made, key, value)
    return made


def restore(args: Any, asked: Any) -> None:
    """Lets the trainer's arguments say what was asked for again, in logs and in later runs."""
    for key in _DONE_HERE:
        if key != "dataset_kwargs":
            setattr(args, key, getattr(asked, key))


def check(args: Any, learn: Any, layout: str) -> None:
    """Refuses what contradicts itself and what would otherwise be ignored.

    `assistant_only_loss=True` and `completion_only_loss=True` ask for what is done anyway, `completion_only_loss=False`
    for learning prompts as well; `padding_free=True` is `layout="packed"`.
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout is {layout!r}{nearest(layout, LAYOUTS)} Layouts: {', '.join(LAYOUTS)}.")
    if args.assistant_only_loss and learn != "all":
        raise AdapterError(
            f"assistant_only_loss=True and learn={learn!r} both say what is learned: leave out the first."
        )
    if args.truncation_mode != "keep_start":
        raise AdapterError(f"truncation_mode={args.truncation_mode!r} has no effect here: too_long= says what is done.")
    if args.packing and args.packing_strategy == "wrapped":
        raise AdapterError(
            "packing_strategy='wrapped' cuts documents at the end of a row and keeps no boundaries: use 'bfd', which "
            "keeps each document whole and apart."
        )
    if args.packing and args.max_length is None:
        raise AdapterError("packing=True fills rows of max_length tokens, but max_length is None: give a number.")
    if layout == "padded" and (args.packing or args.padding_free):
        asked = "packing=True" if args.packing else "padding_free=True"
        raise AdapterError(f"layout='padded' and args.{asked} contradict each other: leave one out.")


def apply_to_tokenizer(args: Any, tokenizer: Any) -> None:
    """The template and the end-of-turn token that the arguments name, which TRL would set after the rows are made."""
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.is_file():
            raise AdapterError(
                f"chat_template_path is {str(path)!r}, which is no Jinja file. Copying another tokenizer's template "
                "may add tokens and rows of embeddings: set tokenizer.chat_template, or use a Jinja file."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if args.eos_token is not None and args.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = args.eos_token  # TRL refuses a token that is not in the vocabulary


def left_to_trl(model: Any, args: Any, compute_loss_func: Any, parallel: Any) -> str | None:
    """Why the loss is TRL's `compute_loss`, or None where it is ours.

    Args:
        compute_loss_func: the caller's own.
        parallel: accelerate's parallelism config, or None.

    Raises:
        AdapterError: that loss would not train an adapter of this model.
    """
    if is_peft(model):
        return "the model is PEFT's own"
    if compute_loss_func is not None:
        return "compute_loss_func is given"
    if args.label_smoothing_factor > 0 and args.loss_type == "nll":
        return f"label_smoothing_factor={args.label_smoothing_factor}"
    fused = f"loss_type={args.loss_type!r}" if args.loss_type != "nll" else None
    fused = "sequences are split over processes" if split_sequences(parallel) else fused
    head = output_embeddings(model)
    if fused is not None and head is not None and CHILD in head._modules:
        raise AdapterError(
            f"{fused} leaves the loss to TRL, which multiplies by the output layer's weight without its adapter: "
            "attach without the output layer among the targets."
        )
    return fused


def split_sequences(parallel: Any) -> bool:
    return parallel is not None and bool(parallel.cp_enabled or parallel.sp_enabled)
