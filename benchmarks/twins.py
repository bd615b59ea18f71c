"""The same base with the same adapter twice: once ours, once PEFT's, from one saved folder."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adapters
from adapters._attach import tensors_of

LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0}
NAME = "default"  # what PEFT calls the adapter that it loads


@lru_cache(maxsize=2)
def _smollm2(dtype: torch.dtype) -> nn.Module:
    model, _ = adapters.load_base("smollm2-135m-instruct", dtype=dtype)
    return model


def smollm2(dtype: torch.dtype) -> nn.Module:
    """A copy of SmolLM2-135M-Instruct of one's own; loading it is measured nowhere."""
    return copy.deepcopy(_smollm2(dtype))


@dataclass(frozen=True)
class Setting:
    """What the rows run on. Batches are (rows, tokens), token ids of a fixed seed."""

    base: Callable[[torch.dtype], Any] = smollm2
    rows: int = 2
    tokens: int = 64
    adapters: int = 50  # on one model
    mixed: int = 32  # rows of a batch with as many adapters
    prompt: int = 64  # tokens of such a row
    pool: int = 500  # adapters of a pool
    program: str = 'model, _ = adapters.load_base("smollm2-135m-instruct")'  # the base in a process of its own
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="benchmarks-")))

    def batch(self, model: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, int(model.config.vocab_size), (self.rows, self.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def folder(self, name: str) -> Path:
        return self.scratch / name


def bare(setting: Setting) -> Any:
    """The base alone, in fp32, frozen as it is beside an adapter.

    Without gradients for the head's weight torch multiplies the last hidden states with it row by row, which takes
    longer: 140 ms for 8 rows on SmolLM2. It would otherwise be counted as the adapters'.
    """
    return setting.base(torch.float32).eval().requires_grad_(False)


def shake(model: nn.Module, name: str = NAME, seed: int = 0) -> None:
    """Gives every tensor of an adapter noise of its own, so that none is zero and the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors_of(model, name).values():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))


def saved(setting: Setting, model: Any, label: str, method: str, seed: int = 0, **options: Any) -> Path:
    """A folder with a shaken adapter for `model`, which comes back as it was."""
    adapters.attach(model, method, name=NAME, **options)
    shake(model, seed=seed)
    adapters.save(model, NAME, setting.folder(label))
    adapters.detach(model)
    return setting.folder(label)


def twins(
    setting: Setting, dtype: torch.dtype, method: str = "lora", *, train: bool = True, nf4: bool = False, **options: Any
) -> tuple[Any, Any]:
    """(ours, PEFT's): two copies of the base with equal adapter tensors, both in the same mode."""
    import peft

    ours, base = setting.base(dtype), setting.base(dtype)
    if nf4:
        for each in (ours, base):
            adapters.quantize(each)
    folder = saved(setting, ours, f"{method}-{str(dtype).removeprefix('torch.')}{'-nf4' * nf4}", method, **options)
    adapters.load(ours, folder, name=NAME, trainable=train)
    theirs = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=train)
    return ours.train(train), theirs.train(train)


def prefix_twins(setting: Setting, dtype: torch.dtype, length: int) -> tuple[Any, Any]:
    """As `twins`, for prefix tuning: PEFT makes and saves its random start, and ours reads that folder."""
    import peft

    ours, folder = setting.base(dtype), setting.folder("prefix")
    config = peft.PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(setting.base(dtype), config)
    theirs.save_pretrained(str(folder))
    adapters.load(ours, folder, name=NAME, trainable=True)
    return ours.train(), theirs.train()


def peft_lora() -> Any:
    """PEFT's configuration of the LoRA that these rows use, on every linear layer but the head."""
    import peft

    return peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")


def close(tolerance: float) -> Callable[[Any, Any], None]:
    """A check that two tensors or numbers differ by at most `tolerance`, relative to their norm."""

    def check(ours: Any, theirs: Any) -> None:
        a, b = torch.as_tensor(ours).float(), torch.as_tensor(theirs).float()
        error = float((a - b).norm() / b.norm())
        assert error <= tolerance, f"the two sides differ by {error:.1e}, more than {tolerance:.0e}: not the same work"

    return check


def equal(ours: Any, theirs: Any) -> None:
    """A check that both sides gave the same."""
    assert ours == theirs, f"the two sides differ: {ours!r} against {theirs!r}"
