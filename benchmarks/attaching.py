"""Putting adapters on and taking them off, in memory: fresh LoRA on every linear layer, detach, switch.

`attach` runs without its tracing forward, which has a row of its own: PEFT matches names and looks for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import adapters
from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import LORA, NAME, Setting, equal, peft_lora, saved


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _attach(setting: Setting) -> Pair:
    """The public `attach`, given the sites: method checks, fresh tensors, class swaps, report."""
    import peft

    ours, base = setting.base(torch.float32), setting.base(torch.float32)
    found = adapters.sites(ours)

    def run_ours() -> nn.Module:
        adapters.attach(ours, "lora", name=NAME, sites=found, **LORA)
        return ours

    def after_ours(model: nn.Module) -> int:
        size = _trained(model)
        adapters.detach(model)
        return size

    def after_theirs(model: Any) -> int:
        size = _trained(model)
        model.unload()
        return size

    return Pair(
        Side(run_ours, after=after_ours),
        Side(lambda: peft.get_peft_model(base, peft_lora()), after=after_theirs),
        equal,
    )


def _trace(setting: Setting) -> Pair:
    """What `attach` does besides, in order to know no architecture by name."""
    model = setting.base(torch.float32)
    return Pair(Side(lambda: adapters.sites(model), after=lambda found: len(found.weights)))


def _unseen(setting: Setting) -> Pair:
    """The whole `attach` on a model that nothing is known of: the trace, and what follows."""
    import peft

    held: dict[str, Any] = {}

    def fresh(side: str) -> None:
        held[side] = setting.base(torch.float32)

    return Pair(
        Side(
            lambda: adapters.attach(held["ours"], "lora", name=NAME, **LORA),
            lambda: fresh("ours"),
            lambda report: report.parameters,
        ),
        Side(
            lambda: peft.get_peft_model(held["theirs"], peft_lora()),
            lambda: fresh("theirs"),
            lambda model: model.get_nb_trainable_parameters()[0],
        ),
        equal,
    )


def _detach(setting: Setting) -> Pair:
    """Back to the bare model; both sides must give its keys back."""
    import peft

    ours, base = setting.base(torch.float32), setting.base(torch.float32)
    keys = list(base.state_dict())
    folder = saved(setting, ours, "detach", "lora", **LORA)
    held: dict[str, Any] = {}

    def attach_theirs() -> None:
        held["theirs"] = peft.get_peft_model(base, peft_lora())

    def same_keys(model: nn.Module) -> bool:
        assert list(model.state_dict()) == keys, "a side did not give the base's keys back"
        return not any("lora" in name or "adapters" in name for name, _ in model.named_modules())

    def run_ours() -> nn.Module:
        adapters.detach(ours, NAME)
        return ours

    return Pair(
        Side(run_ours, lambda: adapters.load(ours, folder, name=NAME), same_keys),
        Side(lambda: held["theirs"].unload(), attach_theirs, same_keys),
        equal,
    )


def _switch(setting: Setting) -> Pair:
    """From one of two adapters to the other, frozen on both sides."""
    import peft

    ours, base = setting.base(torch.float32), setting.base(torch.float32)
    folders = {name: saved(setting, ours, f"switch-{name}", "lora", seed, **LORA) for seed, name in enumerate("ab")}
    for name, folder in folders.items():
        adapters.load(ours, folder, name=name)
    theirs = peft.PeftModel.from_pretrained(base, str(folders["a"]), adapter_name="a")
    theirs.load_adapter(str(folders["b"]), adapter_name="b")
    batch = setting.batch(ours)

    def output(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**batch).logits
        return found

    def run_ours() -> None:
        adapters.activate(ours, "a")
        adapters.activate(ours, "b")

    def run_theirs() -> None:
        theirs.set_adapter("a", inference_mode=True)
        theirs.set_adapter("b", inference_mode=True)

    def agree(a: torch.Tensor, b: torch.Tensor) -> None:
        assert float((a - b).norm() / b.norm()) < 1e-4, "the two sides have different adapters on"

    return Pair(Side(run_ours, after=lambda _: output(ours)), Side(run_theirs, after=lambda _: output(theirs)), agree)


ROWS = [
    Row("attach fresh LoRA r16, sites known", _attach),
    Row("find the sites by tracing", _trace, peer="", gated=False, most_pairs=3),
    Row("attach fresh LoRA r16, sites found first", _unseen, gated=False, most_pairs=3),
    Row("detach", _detach),
    Row("switch adapters, twice", _switch),
]
