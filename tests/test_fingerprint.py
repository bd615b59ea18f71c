"""One base is recognised in fp32, bf16, fp16 and nf4, and told from everything that is almost it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import nn

import adapters
from adapters._errors import DamagedAdapter, WrongBase
from adapters._store import check, fingerprint
from adapters._store.sample import blocks

FORMATS = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "fp16": (torch.float16,),
    "bf16 by way of fp16": (torch.float16, torch.bfloat16),
    "nf4": ("nf4",),
    "nf4 from bf16": (torch.bfloat16, "nf4"),
    "nf4 from fp16": (torch.float16, "nf4"),
}
MODELS = ["llama", "gpt2", "qwen3_moe", "bert"]


def stored(model: nn.Module, form: str) -> nn.Module:
    for step in FORMATS[form]:
        if step == "nf4":
            pytest.importorskip("bitsandbytes")
            adapters.quantize(model, "nf4")
        else:
            model.to(step)
    return model


def record(model: nn.Module) -> dict[str, object]:
    """A fingerprint as it comes back from a file."""
    found: dict[str, object] = json.loads(json.dumps(fingerprint(model)))
    return found


def every_weight_by_noise(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter))


def every_weight_by_its_own_percent(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))


def all_by_one_factor(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.01)


def one_weight(model: nn.Module) -> None:
    largest = max((p for p in model.parameters() if p.dim() == 2 and p.shape[1] >= 64), key=lambda p: p.std())
    largest.add_(0.01 * largest.std() * torch.randn_like(largest))


CHANGES = [every_weight_by_noise, every_weight_by_its_own_percent, all_by_one_factor, one_weight]


@pytest.mark.parametrize("name", MODELS)
def test_the_base_is_recognised_in_every_format(name: str) -> None:
    records = {form: record(stored(tiny.build(name), form)) for form in FORMATS}
    for live in FORMATS:
        model = stored(tiny.build(name), live)
        for form in FORMATS:
            assert "the base is the one recorded" in check(records[form], model), (form, live)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_percent_is_seen_in_every_format(name: str, change: Callable[[nn.Module], None]) -> None:
    records = {form: record(stored(tiny.build(name), form)) for form in FORMATS}
    for live, seed in zip(FORMATS, itertools.count()):
        model = tiny.build(name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            change(model)
        stored(model, live)
        for form in FORMATS:
            with pytest.raises(WrongBase, match="differ"):
                check(records[form], model)


@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_other_bases_are_named_by_what_differs(form: str) -> None:
    recorded = record(stored(tiny.build("llama"), form))
    with pytest.raises(WrongBase, match=r"the weights are not those .* differ, .* of its sampled values"):
        check(recorded, tiny.build("llama", seed=1))
    fewer = tiny.build("llama")
    fewer.model.layers = fewer.model.layers[:1]
    with pytest.raises(WrongBase, match=r"lacks \d+ of the \d+ weights of the adapter's base.*layers\.1"):
        check(recorded, fewer)
    more = tiny.build("llama")
    more.model.layers.append(tiny.build("llama").model.layers[0])
    with pytest.raises(WrongBase, match=r"has \d+ weights that the adapter's base had not.*layers\.2"):
        check(recorded, more)
    with pytest.raises(WrongBase, match="class 'LlamaForCausalLM', this model 'Qwen3ForCausalLM'"):
        check(recorded, tiny.build("qwen3"))
    wider = tiny.build("llama")
    wider.resize_token_embeddings(192)
    with pytest.raises(WrongBase, match=r"shape \[160, 64\] in the adapter's base and \[192, 64\] here"):
        check(recorded, wider)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_it_depends_on_the_weights_alone(method: str) -> None:
    model = tiny.build("llama")
    before = fingerprint(model)
    adapters.attach(model, method, name="fr")
    assert fingerprint(model) == before
    adapters.detach(model, "fr")
    assert fingerprint(model.requires_grad_(False).train()) == before


def test_tied_and_untied_names_agree() -> None:
    tied, loose = tiny.build("gpt2"), tiny.build("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight
    loose.lm_head.weight = nn.Parameter(loose.lm_head.weight.detach().clone())
    check(record(tied), loose)
    check(record(loose), tied)
    with torch.no_grad():
        loose.lm_head.weight.mul_(1.01)
    with pytest.raises(WrongBase, match=r"lm_head\.weight"):
        check(record(loose), tied)


def test_heads_that_belong_to_the_adapter_are_left_out() -> None:
    model, other = tiny.build("bert_classifier"), tiny.build("bert_classifier")
    nn.init.normal_(other.classifier.weight)
    with pytest.raises(WrongBase, match="classifier"):
        check(record(model), other)
    check(json.loads(json.dumps(fingerprint(model, exclude=["classifier"]))), other, exclude=["classifier"])


def test_weights_beyond_those_sampled_and_empty_ones_are_told_by_their_shapes() -> None:
    def many() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(8, 16, bias=False) for _ in range(1500)))
        model.empty = nn.Parameter(torch.empty(0, 8))
        return model

    recorded = record(many())
    assert "751 weights agree in 96,000 sampled values, 750 more in their shapes." in check(recorded, many())
    other = many()
    other[-2] = nn.Linear(16, 8, bias=False)
    with pytest.raises(WrongBase, match="shape"):
        check(recorded, other)
    other = many()
    nn.init.normal_(other[0].weight)
    with pytest.raises(WrongBase, match="values"):
        check(recorded, other)


def test_a_repacked_weight_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    model = stored(tiny.build("llama"), "nf4")
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(adapters.AdapterError, match="repacked"):
        fingerprint(model)


def test_records_that_are_none_are_refused() -> None:
    model = tiny.build("llama")
    whole = record(model)
    path = next(iter(whole["parameters"]))  # type: ignore[call-overload]
    entry = whole["parameters"][path]  # type: ignore[index]
    broken = [{}, {**whole, "format": 2}, {**whole, "parameters": []}, {**whole, "parameters": {path: 3}}]
    for data in ("!", "AAA=", None):
        broken.append({**whole, "parameters": {**whole["parameters"], path: {**entry, "data": data}}})  # type: ignore[dict-item]
    for record_ in broken:
        with pytest.raises(DamagedAdapter, match="record"):
            check(record_, model)


@pytest.mark.parametrize(("numel", "count"), [(0, 4), (63, 4), (64, 4), (640, 16), (576 * 1536, 16)])
def test_blocks_lie_inside_and_apart(numel: int, count: int) -> None:
    chosen = blocks(numel, count)
    assert len(chosen) == min(count, numel // 64)
    assert all(0 <= block < numel // 64 for block in chosen)
    assert len({block % 9 for block in chosen}) > 3 or len(chosen) < 16
