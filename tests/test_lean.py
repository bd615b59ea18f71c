"""What a training step keeps for its backward: the base's own, and the input of every site once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from laws import shake
from torch import Tensor, nn

import adapters
from adapters._attach import adapters_of, tensors_of

BATCH = tiny.inputs("llama")


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """The memory that autograd keeps, by address: bytes of storage, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # an address is used again when its memory is free

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def run(model: Any, tokens: int = 96) -> Tensor:
    """A forward through which gradients reach the first layer, as they would for an adapter below it."""
    ids = BATCH["input_ids"].repeat(1, tokens)[:, :tokens]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    result: Tensor = model.model(inputs_embeds=embedded).last_hidden_state
    return result


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck"])
def test_nothing_is_kept_or_computed_below_the_lowest_adapter(method: str) -> None:
    """With an adapter in the last layer alone, backward ends there: what lies below saves nothing and gets nothing."""
    model = tiny.build("llama").train()
    last = len(model.model.layers) - 1
    assert last > 0
    adapters.attach(model, method, name="fr", targets=[f"*layers.{last}.*"])
    assert tensors_of(model, "fr")
    assert all(f"layers.{last}." in name for name in tensors_of(model, "fr"))
    shake(model, "fr")
    entered: list[bool] = []
    model.model.layers[last].register_forward_pre_hook(lambda module, args: entered.append(args[0].requires_grad))
    counts = []
    for stop in (True, False):
        with saved(model) as found:
            if stop:
                hidden = model.model.embed_tokens(BATCH["input_ids"])
                turned = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
                for layer in model.model.layers[:last]:
                    hidden = layer(hidden, position_embeddings=turned)
            else:
                model(**BATCH)
        counts.append(len(found))
    assert counts[0] == 0 < counts[1]
    assert entered == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_site_keeps_its_input_and_nothing_else(method: str, dtype: torch.dtype) -> None:
    model = tiny.build("llama").to(dtype).train()
    model.requires_grad_(False)
    with saved(model) as base:
        run(model)
    adapters.attach(model, method, name="fr")
    shake(model, "fr")
    inputs: dict[int, int] = {}
    held: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        held.append(args[0])
        inputs[args[0].untyped_storage().data_ptr()] = args[0].untyped_storage().nbytes()

    sites = adapters_of(model)["fr"].sites if method == "lora" else ()
    modules = [model.get_submodule(site.path.removesuffix(".weight")) for site in sites]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    with saved(model) as looked_at:
        run(model)
    for handle in handles:
        handle.remove()
    with saved(model) as adapted:
        out = run(model)
    if method == "lora":
        allowed = sum(inputs.values())
    else:  # a bottleneck's input, and what it is inside
        widths = [model.config.hidden_size + p.shape[0] for key, p in tensors_of(model, "fr").items() if "down" in key]
        allowed = sum(out.shape[0] * out.shape[1] * out.itemsize * width for width in widths)
    before = sum(base.values())
    for after in (sum(looked_at.values()), sum(adapted.values())):  # called layer by layer, and together with the base
        assert 0 < after - before <= 1.05 * allowed, f"{after:,} bytes, the base's {before:,}, more: {allowed:,}"
