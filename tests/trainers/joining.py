"""How an adapter comes to the model: ours, or stock PEFT's with the same tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
from laws import shake
from torch import Tensor

import adapters
from adapters._attach import adapters_of, tensors_of
from tests.trainers.bases import attached_part, build
from tests.trainers.cases import METHODS, Case

NAME = "default"


@dataclass
class Ours:
    """An adapter of ours. `fresh` are its tensors just before training, `sites` the modules at which it acts."""

    case: Case
    folder: Path  # of the saved adapter, where one goes on training
    precise: bool = False  # TRL rounds what trains on a 4-bit base to bf16: give it fp32 back
    fresh: dict[str, Tensor] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def join(self, model: Any) -> dict[str, Any]:
        """Attaches what is to be attached before a trainer is made, and returns what the trainer is given."""
        method, options, part = self.case.method, METHODS[self.case.method], attached_part(self.case, model)
        torch.manual_seed(3)
        if self.case.join == "config":
            return {"peft_config": adapters.peft_config(method, **options)}
        if self.case.join == "folder":
            if not self.folder.exists():
                _save_one(self.case, self.folder)
            if self.case.loop == "ours":
                return {"adapter": self.folder}
            adapters.load(part, self.folder, name=NAME, trainable=True)
        elif self.case.loop == "ours":
            return {"adapter": {"name": method, **options}}
        else:
            example = {"input": tiny.inputs("llama")} if self.case.join == "whole" else None
            adapters.attach(part, method, name=NAME, example=example, **options)
        return {}

    def ready(self, model: Any) -> None:
        """Called when the trainer is made and has not begun."""
        part = attached_part(self.case, model)
        _precise(part, self.precise)
        self.fresh = {key: tensor.detach().clone() for key, tensor in tensors_of(part, NAME).items()}
        adapter = adapters_of(part)[NAME]
        self.sites = tuple(getattr(site, "owner", "") for site in adapter.sites)
        self.heads = tuple(adapter.head)


@dataclass
class Stock:
    """PEFT's LoRA of the same rank, alpha and modules, whose tensors are made those of `ours`."""

    ours: Ours

    def join(self, model: Any) -> dict[str, Any]:
        case, lora = self.ours.case, METHODS["lora"]
        task = {"sentence": None, "reward": "SEQ_CLS"}.get(case.loop, "CAUSAL_LM")
        config = peft.LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            target_modules=[site.removeprefix("0.model.") for site in self.ours.sites],
            modules_to_save=list(self.ours.heads) or None,
            task_type=task,
        )
        if case.loop == "sentence" and case.join != "folder":
            model.add_adapter(config)
        elif case.loop == "sentence":
            model.load_adapter(str(self.ours.folder), is_trainable=True)
        elif case.join == "config":
            return {"peft_config": config}
        elif case.join == "folder":
            return {"model": peft.PeftModel.from_pretrained(model, str(self.ours.folder), is_trainable=True)}
        else:
            return {"model": peft.get_peft_model(model, config)}
        return {}

    def ready(self, model: Any) -> None:
        _precise(model, self.ours.precise)
        theirs = {name: p for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad}
        copied = 0
        with torch.no_grad():
            for key, tensor in self.ours.fresh.items():
                path, _, letter = key.removeprefix("0.model.").removesuffix(":a").removesuffix(":b").partition(":")
                if letter:
                    continue  # a head starts as the base's in both
                suffix = f".{path.removesuffix('.weight')}.lora_{key[-1].upper()}.{NAME}.weight"
                (found,) = [p for name, p in theirs.items() if f".{name}".endswith(suffix)]
                read = self.ours.case.join == "folder" and self.ours.case.base == "fp32"
                assert not read or torch.equal(found, tensor), "PEFT has read another tensor from the folder"
                found.copy_(tensor)
                copied += 1
        assert copied == len(theirs) > 0, f"{copied} tensors for {len(theirs)} of PEFT's"


def copy_of(ours: Ours) -> Any:
    """A fresh base with an adapter of the same tensors, attached without any trainer."""
    model = build(ours.case)
    part = attached_part(ours.case, model)
    torch.manual_seed(4)
    adapters.attach(part, ours.case.method, name=NAME, **METHODS[ours.case.method])
    with torch.no_grad():
        for key, tensor in tensors_of(part, NAME).items():
            tensor.copy_(ours.fresh[key])
    return model


def _save_one(case: Case, folder: Path) -> None:
    """A folder of an adapter that is not fresh: each of its tensors has noise of its own."""
    model = build(case)
    part = attached_part(case, model)
    adapters.attach(part, case.method, name=NAME, **METHODS[case.method])
    shake(part, NAME, noise=0.02)
    adapters.save(part, NAME, folder)


def _precise(model: Any, wanted: bool) -> None:
    for parameter in model.parameters() if wanted else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
