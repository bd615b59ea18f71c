"""Preflights: a healthy run passes without a warning, each seeded fault gives its line, and nothing is disturbed."""

from __future__ import annotations

import random
import shutil
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from laws import assert_same, snapshot
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import adapters
from adapters._attach import adapters_of, base_parameters, state_of, tensors_of
from adapters._attach.entries import entry_of
from adapters.train.preflight import Check, Preflight, preflight

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
METHODS = {"lora": {"rank": 4}, "bottleneck": {}, "prefix": {"length": 3}}
RATES = {"lora": 1e-3, "bottleneck": 1e-3, "prefix": 1e-2}
END = 2
Batch = dict[str, torch.Tensor]


def tokenizer(template: str = TEMPLATE, pad: str = "<pad>", size: int = tiny.VOCAB, end: str = "<|im_end|>") -> Any:
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, size))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="w4"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, bos_token="<s>", eos_token=end)
    made.chat_template = template
    return made


def batch(seed: int = 1, rows: int = 3, tokens: int = 9) -> Batch:
    """Unequal rows, padded on the right; the first half is not learned, the end of the turn is."""
    made = tiny.inputs("llama", rows, tokens, seed, padded=True)
    ids, mask = made["input_ids"], made["attention_mask"]
    ids[torch.arange(rows), mask.sum(1) - 1] = END
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    labels[mask == 0] = -100
    return {**made, "labels": labels}


def attached(name: str = "llama", method: str = "lora", seed: int = 0, **options: Any) -> nn.Module:
    model = tiny.build(name, seed=seed)
    torch.manual_seed(3)
    adapters.attach(model, method, name="fr", **{**METHODS.get(method, {}), **options})
    return model


def run(model: nn.Module, batches: Any = None, method: str = "lora", **changed: Any) -> Preflight:
    given: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "learning_rate": RATES.get(method, 1e-3),
        "warmup_steps": 5,
        "total_steps": 60,
        "schedule": "cosine",
        "output": Path("."),
        "checkpoints": 2,
    }
    return preflight(model, [batch(), batch(2)] if batches is None else batches, **{**given, **changed})


def lines(found: Preflight, status: str) -> list[str]:
    return [check.what for check in found.checks if check.status == status]


def assert_only(found: Preflight, status: str, *starts: str) -> None:
    """Exactly these lines have that status, and nothing else is wrong but what could then not be tried."""
    assert [what for what in lines(found, status) if "not tried" not in what] == [
        what for start in starts for what in lines(found, status) if start in what
    ], str(found)
    assert len([what for what in lines(found, status) if "not tried" not in what]) == len(starts), str(found)
    other = "warning" if status == "failed" else "failed"
    assert [what for what in lines(found, other) if "not tried" not in what] == [], str(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_healthy_run_passes_without_a_warning(method: str, checkpointing: bool) -> None:
    model = attached(method=method)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = run(model, method=method)
    assert found.passed, str(found)
    assert not found.warnings, str(found)
    found.require()
    total = len(tensors_of(model, "fr"))
    assert any(f"all {total} tensors" in what for what in lines(found, "ok")), str(found)
    assert len(str(found).splitlines()) < 24


@pytest.mark.parametrize(("name", "method"), [("qwen3_moe", "lora"), ("bert_classifier", "lora"), ("gpt2", "ia3")])
def test_other_models_are_healthy_too(name: str, method: str) -> None:
    batches = [batch(), batch(2)]
    if name == "bert_classifier":
        batches = [{**each, "labels": torch.tensor([0, 2, 1])} for each in batches]
    found = run(attached(name, method), batches)
    assert (found.failures, found.warnings) == ((), ()), str(found)


def test_a_base_in_4_bits_and_reentrant_checkpointing() -> None:
    model = tiny.build("llama")
    adapters.quantize(model, "nf4")
    adapters.attach(model, "lora", name="fr", rank=4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    packed = {path: p.detach().clone() for path, p in base_parameters(model).items()}
    found = run(model)
    assert (found.failures, found.warnings) == ((), ()), str(found)
    assert all(torch.equal(p, packed[path]) for path, p in base_parameters(model).items())


def test_experts_that_no_token_chose_are_reported() -> None:
    """One token reaches two of four experts; which, the base itself says."""
    model = attached("qwen3_moe", targets=["mlp.gate_up", "mlp.down"])
    one = {key: value[:1, :2] for key, value in batch().items()}
    one["labels"] = one["input_ids"].clone()
    idle = _idle_experts(model, one)
    assert idle
    found = run(model, [one], tokenizer=None)
    assert (found.failures, found.warnings) == ((), ()), str(found)
    (line,) = [what for what in lines(found, "ok") if "not routed in these batches" in what]
    path, numbers = next(iter(idle.items()))
    assert f"{path} {numbers}" in line
    everything = run(model, [*(batch(i, 8, 20) for i in range(3)), one], tokenizer=None)
    assert not any("not routed" in what for what in lines(everything, "ok")), str(everything)


def _idle_experts(model: nn.Module, inputs: Batch) -> dict[str, list[int]]:
    """Which experts a forward of the base does not choose, read off its router."""
    idle: dict[str, list[int]] = {}
    with torch.no_grad(), adapters.using(model, None):
        logits = model(**inputs, output_router_logits=True).router_logits
    for layer, scores in enumerate(logits):
        chosen = set(scores.topk(2, -1).indices.flatten().tolist())
        left = [expert for expert in range(4) if expert not in chosen]
        if left:
            idle[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = left
    return idle


# one fault each: what is done to the model, the batches and the arguments, and the line that must come


def _unreached(model: Any) -> None:
    """The second layer's attention is left out, as by a model that skips layers."""
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)


def _detached(model: Any) -> None:
    """The last feed-forward leaves the graph with what it adds, and so do the three sites in it."""
    entry = entry_of(model, adapters_of(model)["fr"], _site(model, "model.layers.1.mlp.down_proj.weight"))
    entry.register_forward_hook(lambda module, args, y: y.detach())


def _site(model: nn.Module, path: str) -> Any:
    return next(site for site in adapters_of(model)["fr"].sites if site.path == path)


def _zeroed(model: Any) -> None:
    entry = entry_of(model, adapters_of(model)["fr"], _site(model, "model.layers.0.self_attn.q_proj.weight"))
    for tensor in entry.parameters():
        tensor.register_hook(torch.zeros_like)


def _all_cut(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


def _nan(model: Any) -> None:
    with torch.no_grad():
        tensors_of(model, "fr")["model.layers.1.mlp.up_proj.weight:a"][1, 2] = float("nan")


def _nan_base(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")


def _unfrozen(model: Any) -> None:
    model.model.norm.weight.requires_grad_(True)


MODEL_FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (
        _unreached,
        "8 of 28 tensors get no gradient, the forward never reaches the site: model.layers.1.self_attn.q_proj",
    ),
    (
        _zeroed,
        "2 of 28 tensors get no gradient, the gradient is zero in every element: model.layers.0.self_attn.q_proj",
    ),
    (_all_cut, "the loss does not depend on the adapter"),
    (_nan, "1 of 28 tensors of the adapter hold values that are not finite: model.layers.1.mlp.up_proj.weight:a"),
    (_nan_base, "the loss of the first batch is nan; values of the base are not finite: model.norm.weight"),
    (_unfrozen, "1 parameter of the base require a gradient, which no adapter file holds: model.norm.weight"),
    (lambda model: adapters.activate(model, None), "what can train, 'fr', does not act; acting: none"),
    (lambda model: adapters.detach(model), "no adapter is attached"),
    (lambda model: [t.requires_grad_(False) for t in tensors_of(model, "fr").values()], "no tensor of 'fr' requires"),
    (
        _detached,
        "6 of 28 tensors get no gradient, the forward reaches the site, and its output does not reach the loss",
    ),
]


@pytest.mark.parametrize(("fault", "line"), MODEL_FAULTS)
def test_a_fault_of_the_model_gives_its_line(fault: Callable[[Any], None], line: str) -> None:
    model = attached()
    fault(model)
    found = run(model)
    assert_only(found, "failed", line)
    with pytest.raises(adapters.AdapterError, match="1 failed"):
        found.require()


def test_tensors_that_are_frozen() -> None:
    """Half of an adapter may be frozen on purpose; B may not, as long as it is zero and A then learns nothing."""
    model, path = attached(), "model.layers.1.mlp.up_proj.weight"
    tensors_of(model, "fr")[f"{path}:a"].requires_grad_(False)
    assert_only(run(model), "warning", f"1 of 28 tensors are frozen while others of the adapter train: {path}:a")
    tensors_of(model, "fr")[f"{path}:a"].requires_grad_(True)
    tensors_of(model, "fr")[f"{path}:b"].requires_grad_(False)
    found = run(model)
    assert [f"the gradient is zero in every element: {path}:a" in what for what in lines(found, "failed")] == [True]
    assert [f"{path}:b" in what for what in lines(found, "warning")] == [True]


def test_weights_of_another_size_than_the_adapter_was_made_for() -> None:
    model = attached(targets=["attention.*"])
    model.model.layers[1].self_attn.o_proj.weight = nn.Parameter(torch.zeros(64, 96), requires_grad=False)
    failures = run(model).failures
    assert "1 weight of the base have not the shape that the adapter was made for" in failures[0].what


def _masked(made: Batch) -> Batch:
    return {**made, "labels": torch.full_like(made["labels"], -100)}


def _without_end(made: Batch) -> Batch:
    return {**made, "labels": made["labels"].masked_fill(made["labels"] == END, -100)}


def _endless(made: Batch) -> Batch:
    return {key: value.masked_fill(value == END, 9) for key, value in made.items()}


def _one_row_masked(made: Batch) -> Batch:
    labels = made["labels"].clone()
    labels[1] = -100
    return {**made, "labels": labels}


def _beyond(key: str, value: int) -> Callable[[Batch], Batch]:
    def change(made: Batch) -> Batch:
        changed = made[key].clone()
        changed[0, -2] = value
        return {**made, key: changed}

    return change


DATA_FAULTS: list[tuple[Callable[[Batch], Batch], str, str]] = [
    (_masked, "failed", "batch 2 of 2 has no label other than -100"),
    (lambda made: {k: v for k, v in made.items() if k != "labels"}, "failed", "batch 2 of 2 has no labels"),
    (_one_row_masked, "warning", "1 of 6 rows have no label"),
    (_beyond("labels", tiny.VOCAB), "failed", "batch 2 of 2 has labels outside the 160 tokens of the vocabulary"),
    (_beyond("labels", -1), "failed", "batch 2 of 2 has labels outside the 160 tokens of the vocabulary, such as -1"),
    (_beyond("input_ids", 200), "failed", "batch 2 of 2 has token ids outside the embedding's 160 rows, such as 200"),
]


@pytest.mark.parametrize(("fault", "status", "line"), DATA_FAULTS)
def test_a_fault_of_the_data_gives_its_line(fault: Callable[[Batch], Batch], status: str, line: str) -> None:
    assert_only(run(attached(), [batch(), fault(batch(2))]), status, line)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (_masked, "batches 1, 2 of 2 has no label other than -100"),
        (_without_end, "'<|im_end|>', is never learned: it is there 6 times, always masked"),
        (_endless, "'<|im_end|>', is never learned: no row has it"),
    ],
)
def test_a_fault_of_all_the_data_gives_its_line(fault: Callable[[Batch], Batch], line: str) -> None:
    assert_only(run(attached(), [fault(batch()), fault(batch(2))]), "failed", line)


def test_packed_documents_are_counted_apart() -> None:
    """Two documents in one row, the second without a label but its first, which no position predicts."""
    ids = torch.tensor([[5, 6, 7, END, 8, 9, 10, 0, 0]])
    labels = torch.tensor([[-100, 6, 7, END, 8, -100, -100, -100, -100]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    found = run(attached(), [{"input_ids": ids, "labels": labels, "position_ids": positions}])
    assert_only(found, "warning", "1 of 2 rows have no label")


NARROW = TEMPLATE.replace("<|im_start|>", "<|start|>")
UNENDED = TEMPLATE.replace("<|im_end|>", "<|eot|>")


@pytest.mark.parametrize(
    ("changed", "status", "line"),
    [
        ({"template": NARROW}, "warning", "the tokenizer splits '<|start|>' of the chat template into pieces"),
        ({"template": UNENDED}, "failed", "the template ends a turn with '<|eot|>', which the tokenizer splits"),
        ({"template": "{{ 1 / 0 }}"}, "warning", "the chat template cannot be rendered: ZeroDivisionError"),
        ({"pad": None}, "warning", "the tokenizer has no padding token"),
        ({"size": 170}, "warning", "the tokenizer has 170 tokens, the embeddings 160 rows: tokens from id 160 on"),
        ({"size": 170, "pad": "w165"}, "failed", "the embeddings 160 rows: none for 'w165'"),
    ],
)
def test_a_fault_of_the_tokenizer_gives_its_line(changed: Mapping[str, Any], status: str, line: str) -> None:
    assert_only(run(attached(), tokenizer=tokenizer(**changed)), status, line)


def test_padding_with_the_end_of_the_turn() -> None:
    same = tokenizer(pad="<|im_end|>")
    found = run(attached(), tokenizer=same)
    assert (found.failures, found.warnings) == ((), ()), str(found)
    by_id = run(attached(), [_without_end(batch())], tokenizer=same)
    assert ["always masked" in check.what for check in by_id.failures] == [True]
    assert ["masked by id" in check.what for check in by_id.warnings] == [True]


def test_generation_that_does_not_stop_where_turns_end() -> None:
    model = attached()
    model.generation_config.eos_token_id = 1
    found = run(model, tokenizer=tokenizer(end="<s>"))
    assert_only(found, "warning", "'<|im_end|>' ends the turns that are learned, and generation stops only at '<s>'")
    model.generation_config.eos_token_id = [1, END]
    assert not run(model, tokenizer=tokenizer(end="<s>")).warnings


@pytest.mark.parametrize(
    ("changed", "status", "line"),
    [
        ({"learning_rate": 1.0}, "warning", "the learning rate 1 is high for a change of weights: 1e-05 to 0.005"),
        ({"learning_rate": 1e-6}, "warning", "the learning rate 1e-06 is low for a change of weights"),
        ({"learning_rate": 0.0}, "failed", "the learning rate is 0"),
        ({"learning_rate": float("nan")}, "failed", "the learning rate is nan"),
        ({"warmup_steps": 60}, "failed", "the warm-up takes 60 steps of 60: the learning rate never arrives"),
        ({"warmup_steps": 61}, "failed", "the warm-up takes 61 steps of 60"),
        ({"warmup_steps": 0.7}, "warning", "the warm-up takes 42 of 60 steps"),
        ({"total_steps": 0}, "failed", "the run has 0 steps"),
        ({"schedule": lambda step: max(0.0, 1 - step / 20)}, "warning", "the schedule is 0 from step 20 on: 40 of 60"),
        ({"schedule": [0.0] * 60}, "failed", "the schedule is 0 at every step"),
        ({"schedule": [1.0] * 59}, "failed", "the schedule has 59 values for 60 steps"),
    ],
)
def test_a_fault_of_the_schedule_gives_its_line(changed: Mapping[str, Any], status: str, line: str) -> None:
    assert_only(run(attached(), **changed), status, line)


def test_a_good_schedule_by_hand() -> None:
    found = run(attached(), schedule=lambda step: 1 - step / 60)
    assert not found.warnings
    assert "the schedule is above 0 for 60 of 60 steps" in lines(found, "ok")


@pytest.mark.parametrize(
    ("method", "rate", "kind"),
    [("prefix", 1e-4, "a prefix"), ("bottleneck", 5e-2, "a bottleneck"), ("ia3", 1e-5, "a scaling of activations")],
)
def test_the_range_of_learning_rates_is_the_methods_own(method: str, rate: float, kind: str) -> None:
    assert_only(run(attached(method=method), learning_rate=rate), "warning", f"for {kind}")
    assert not run(attached(rank=1), learning_rate=2e-5).warnings  # vectors too, and yet no scaling


def test_steps_that_16_bits_round_away() -> None:
    """Half a spacing of bf16 at 0.1 is 2.4e-4: a step of 2e-5 is lost, one of 5e-3 is not."""
    model = attached(dtype=torch.bfloat16)
    found = run(model, learning_rate=2e-5)
    assert_only(found, "warning", "steps of 2e-05 are rounded away in most of 14 bfloat16 tensors")
    assert not run(model, learning_rate=5e-3).warnings
    both = run(model, learning_rate=1e-8)
    assert [("is low" in c.what, "rounded away" in c.what) for c in both.warnings] == [(True, False), (False, True)]


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = attached()
    values = sum(tensor.numel() for tensor in tensors_of(model, "fr").values())
    needed = 4 * values + 2 * (4 + 8) * values
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed - 1))
    found = run(model, output=tmp_path / "not" / "there")
    assert_only(found, "failed", "and 2 checkpoints of")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, needed))
    assert run(model, output=tmp_path).passed


def test_a_wrong_base_by_its_record(tmp_path: Path) -> None:
    adapters.save(attached(seed=0), "fr", tmp_path)
    right, wrong = tiny.build("llama", seed=0), tiny.build("llama", seed=1)
    adapters.load(right, tmp_path, name="fr", trainable=True)
    adapters.load(wrong, tmp_path, name="fr", trainable=True, force="wrong-base")
    found = run(right, folder=tmp_path)
    assert (found.failures, found.warnings) == ((), ()), str(found)
    assert any("the base is the one recorded" in what for what in lines(found, "ok"))
    assert_only(run(wrong, folder=tmp_path), "failed", "base: the weights are not those of the adapter's base")


def test_a_base_that_knows_nothing_of_these_tokens() -> None:
    model = attached()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    assert_only(run(model), "warning", "worse than knowing nothing")


def test_an_adapter_that_could_train_and_does_not_act() -> None:
    model = attached()
    adapters.attach(model, "lora", name="de", rank=2)
    assert_only(run(model), "warning", "'fr' can train but does not act")
    named = run(model, name="fr")
    assert_only(named, "failed", "what can train, 'fr', does not act; acting: 'de'")


def test_batches_that_fail_are_a_line() -> None:
    found = run(attached(), [{**batch(), "labels": batch()["labels"][:, :7]}])
    assert [check.what.startswith("the batches do not go through the model") for check in found.failures] == [True]


def test_refusals() -> None:
    with pytest.raises(adapters.AdapterError, match="at least one batch"):
        preflight(attached(), [])
    with pytest.raises(adapters.AdapterError, match="no adapter 'rf' on this model; did you mean 'fr'"):
        preflight(attached(), [batch()], name="rf")


def test_a_loss_of_ones_own() -> None:
    """DPO and its like: other columns, and a loss that the model does not know."""
    calls = []

    def loss(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        calls.append(sorted(given))
        return model(input_ids=given["chosen"]).logits[..., 7].sum() * 100

    found = run(attached(), [{"chosen": batch()["input_ids"]}], loss=loss)
    assert (found.failures, found.warnings) == ((), ()), str(found)
    assert calls == [["chosen"]] * 2


class Moody(nn.Module):
    """A layer with all that a forward in training mode may change: running statistics, dropout, three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(tiny.HIDDEN), nn.Dropout(0.5)
        self.norm.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1 + 1e-3 * (random.random() + numpy.random.rand())
        return x + 0.1 * self.dropout(self.norm(x.flatten(0, -2)).view(x.shape)) * scale


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_it_was(method: str) -> None:
    model = tiny.build("llama")
    moody = Moody().eval()
    model.model.layers[0].mlp.register_module("moody", moody)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, y: moody(y))
    adapters.attach(model, method, name="fr", **METHODS[method])
    model.model.layers[1].train()
    steps = []
    grads = {}
    for i, (key, tensor) in enumerate(tensors_of(model, "fr").items()):
        tensor.register_post_accumulate_grad_hook(steps.append)
        tensor.grad = torch.full_like(tensor, i + 0.25) if i % 2 else None
        grads[key] = (tensor.grad, None if tensor.grad is None else tensor.grad.clone())
    before = snapshot(model)
    storage = {key: tensor.data_ptr() for key, tensor in tensors_of(model, "fr").items()}
    torch.manual_seed(9)
    random.seed(9)
    numpy.random.seed(9)
    expected = (torch.rand(2).tolist(), random.random(), numpy.random.rand())
    torch.manual_seed(9)
    random.seed(9)
    numpy.random.seed(9)
    assert run(model, method=method).passed
    assert (torch.rand(2).tolist(), random.random(), numpy.random.rand()) == expected
    assert_same(snapshot(model), before)
    assert {key: tensor.data_ptr() for key, tensor in tensors_of(model, "fr").items()} == storage
    assert not steps, "an optimizer that steps inside the backward must not have stepped"
    for key, tensor in tensors_of(model, "fr").items():
        held, values = grads[key]
        assert tensor.grad is held
        assert held is None or torch.equal(held, values)
        assert tensor._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    assert all(parameter.grad is None for parameter in base_parameters(model).values())


def test_what_the_engine_found_out_is_found_again() -> None:
    """Else a run after a preflight would draw other random numbers than one without."""
    model = attached()
    state = state_of(model)
    assert state is not None

    def loss(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        state.inputs_require_grad = True
        return model(**given).loss

    assert run(model, loss=loss).passed
    assert state.inputs_require_grad is False


def test_the_model_is_as_it_was_after_a_failure() -> None:
    model = attached()
    before = snapshot(model)
    model.lm_head.register_forward_hook(_raise_in_backward)
    assert "RuntimeError: not today" in run(model).failures[0].what
    assert_same(snapshot(model), before)


def _raise_in_backward(module: nn.Module, args: Any, y: torch.Tensor) -> None:
    def refuse(grad: torch.Tensor) -> None:
        raise RuntimeError("not today")

    if y.requires_grad:
        y.register_hook(refuse)


def test_the_report_fits_a_screen_and_says_what_to_do() -> None:
    checks = (Check("ok", "fine"), Check("failed", "broken", "mend it"), Check("warning", "odd", "look"))
    found = Preflight(checks)
    assert str(found).splitlines() == [
        "preflight: 1 failed, 1 warned of 3 checks",
        "  ok       fine",
        "  FAILED   broken",
        "           -> mend it",
        "  WARNING  odd",
        "           -> look",
    ]
    assert not found.passed
    assert replace(found, checks=checks[::2]).passed
    with pytest.raises(adapters.AdapterError, match=r"(?s)broken.*mend it"):
        found.require()
