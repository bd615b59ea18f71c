"""The watchdog in plain loops and in the trainer: what stands still is named, what is not finite stops the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from torch import nn
from transformers import Trainer, TrainingArguments

import adapters
from adapters._attach import tensors_of
from adapters.train.watchdog import Finding, Watchdog

PATH = "model.layers.1.mlp.up_proj.weight"


def attached(name: str = "llama", **options: Any) -> nn.Module:
    model = tiny.build(name)
    torch.manual_seed(3)
    adapters.attach(model, "lora", name="fr", **{"rank": 2, **options})
    return model.train()


def losses(model: Any, steps: int, optimizer: torch.optim.Optimizer, tokens: int = 7) -> Iterator[torch.Tensor]:
    """A plain loop, one loss a step."""
    for step in range(steps):
        inputs = tiny.inputs(model, rows=2, tokens=tokens, seed=step)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def adam(model: nn.Module, lr: float = 1e-3, without: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    tensors = {key: tensor for key, tensor in tensors_of(model, "fr").items() if not key.startswith(without or ("-",))}
    return torch.optim.AdamW(tensors.values(), lr=lr, weight_decay=0.0)


def run(model: nn.Module, watch: Watchdog, optimizer: torch.optim.Optimizer, steps: int = 12) -> tuple[Finding, ...]:
    for loss in losses(model, steps, optimizer):
        watch.step(loss)
    watch.finish()
    return watch.findings


def test_a_healthy_run_has_no_findings() -> None:
    model = attached()
    start = {key: tensor.detach().clone() for key, tensor in tensors_of(model, "fr").items()}
    assert run(model, Watchdog(model), adam(model)) == ()
    assert all(not torch.equal(tensor, start[key]) for key, tensor in tensors_of(model, "fr").items())


def test_a_site_that_stands_still_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = attached()
    with caplog.at_level(logging.WARNING, "adapters.train"):
        findings = run(
            model, Watchdog(model, after=4), adam(model, without=(PATH, "model.layers.0.mlp.down_proj.weight:a"))
        )
    expected = f"2 have not moved since the start, bit for bit: model.layers.0.mlp.down_proj.weight:a, {PATH}"
    assert findings == (Finding(4, expected),)
    assert caplog.messages == [f"step 4: {expected}"]


def test_one_element_is_enough_to_have_moved() -> None:
    model = attached()
    watched = Watchdog(model, after=2)
    with torch.no_grad():
        for key, tensor in tensors_of(model, "fr").items():
            element = tensor.view(-1)[-1]
            element.copy_(torch.nextafter(element, torch.tensor(9.0))) if key != f"{PATH}:a" else None
    watched.step()
    watched.step()
    assert [finding.what.rpartition(": ")[2] for finding in watched.findings] == [f"{PATH}:a"]


def test_values_that_change_places_have_moved() -> None:
    model = attached()
    watch = Watchdog(model, after=2)
    with torch.no_grad():
        moved = tensors_of(model, "fr")[f"{PATH}:a"]
        moved.copy_(moved.flip(-1))
    watch.step()
    watch.step()
    (finding,) = watch.findings
    assert finding.what.startswith("14 have not moved since the start, bit for bit: ")  # 13 sites and this one's B


@pytest.mark.parametrize("fault", ["optimizer", "rate", "rounding"])
def test_a_run_in_which_nothing_moves_is_stopped(fault: str) -> None:
    model = attached(dtype=torch.bfloat16 if fault == "rounding" else torch.float32)
    if fault == "rounding":  # from values far from zero, where a step is lost
        with torch.no_grad():
            for tensor in tensors_of(model, "fr").values():
                tensor.add_(1.0)
    optimizer = {
        "optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(2))]),
        "rate": adam(model, lr=0.0),
        "rounding": adam(model, lr=1e-8),
    }[fault]
    with pytest.raises(
        adapters.AdapterError, match="step 10: not one of the adapter's 28 tensors has changed in 10 st"
    ):
        run(model, Watchdog(model), optimizer)


def test_steps_without_a_learning_rate_and_in_the_warm_up_do_not_count() -> None:
    model = attached()
    watch = Watchdog(model, after=3, warmup_steps=4)
    for rate in (0.0, 0.0, 1e-3, 1e-3, 0.0, 1e-3, 1e-3):
        watch.step(learning_rate=rate)  # nothing moves, and it is too early to say
    with pytest.raises(adapters.AdapterError, match=r"step 8: not one of .* in 5 steps with a learning rate above 0"):
        watch.step(learning_rate=1e-3)
    short = Watchdog(model, warmup_steps=4)
    short.step(learning_rate=1e-3)
    short.finish()
    assert short.findings == (Finding(1, "the run was too short to tell what moves: 1 step"),)
    short = Watchdog(model, warmup_steps=4)
    short.step(learning_rate=1e-3)
    short.step(learning_rate=1e-3)
    with pytest.raises(adapters.AdapterError, match="step 2: not one"):
        short.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_run(value: float) -> None:
    model = attached()
    watch = Watchdog(model, every=5)
    watch.step(torch.tensor(2.5), grad_norm=torch.tensor(0.5))
    with pytest.raises(
        adapters.AdapterError, match=f"step 2: the loss is {value}; the adapter's tensors are still fini"
    ):
        watch.step(torch.tensor(value))
    with pytest.raises(adapters.AdapterError, match=f"step 3: the gradient norm is {value}; the adapter's"):
        watch.step(2.5, grad_norm=value)
    with torch.no_grad():
        tensors_of(model, "fr")[f"{PATH}:b"][3, 1] = value
    watch.step(2.5)  # another tensor's turn
    with pytest.raises(adapters.AdapterError, match=f"step 5: 1 tensor of the adapter not finite: {PATH}:b"):
        watch.step(2.5)
    with pytest.raises(adapters.AdapterError, match=f"step 6: the loss is {value}; not finite are {PATH}:b"):
        watch.step(value)


def test_large_values_whose_norm_overflows_are_finite() -> None:
    model = attached()
    with torch.no_grad():
        tensors_of(model, "fr")[f"{PATH}:b"].fill_(1e30)
    Watchdog(model, every=1).step(2.5)


def test_experts_that_no_token_chose_are_no_fault() -> None:
    """One token a step: some of the four experts are not chosen, and the optimizer leaves them where they are."""
    model = attached("qwen3_moe", targets=["mlp.gate_up", "mlp.down"])
    start = {key: tensor.detach().clone() for key, tensor in tensors_of(model, "fr").items()}
    watch, optimizer = Watchdog(model, after=2), adam(model)
    inputs = {key: value[:1, :2] for key, value in tiny.inputs(model).items()}
    for _ in range(2):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    (finding,) = watch.findings
    assert finding.what.startswith("experts that have not moved, as no token was routed to them: ")
    path = "model.layers.0.mlp.experts.gate_up_proj"
    moved = [(tensors_of(model, "fr")[f"{path}:{key}"] != start[f"{path}:{key}"]).flatten(1).any(1) for key in "ab"]
    idle = (~(moved[0] | moved[1])).nonzero().flatten().tolist()
    assert idle
    assert f"{path} {idle}" in finding.what


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = tiny.inputs("llama", rows=1, tokens=7, seed=index)
        return {key: value[0] for key, value in {**made, "labels": made["input_ids"]}.items()}


def trainer(model: nn.Module, folder: Path, watch: Watchdog, **arguments: Any) -> Trainer:
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "warmup_steps": 2, **arguments}
    fixed: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    made = TrainingArguments(str(folder), **settings, **fixed)
    return Trainer(model, made, train_dataset=Rows(), callbacks=[watch])


def test_in_a_trainer(tmp_path: Path) -> None:
    model, watch = attached(), Watchdog(after=4)
    trainer(model, tmp_path, watch).train()
    assert watch.findings == ()
    with pytest.raises(
        adapters.AdapterError, match="step 6: not one of the adapter's 28 tensors has changed in 5 steps"
    ):
        trainer(attached(), tmp_path, Watchdog(after=4), learning_rate=1e-45).train()  # above 0, and moves nothing


def test_a_loss_that_the_trainer_hides_is_found(tmp_path: Path) -> None:
    """transformers replaces a loss that is not finite by the average before it (`logging_nan_inf_filter`)."""
    model = attached()

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        output.loss = output.loss * (float("nan") if spoil.calls == 4 else 1.0)  # type: ignore[attr-defined]
        spoil.calls += 1  # type: ignore[attr-defined]
        return output

    spoil.calls = 0  # type: ignore[attr-defined]
    model.register_forward_hook(spoil)
    with pytest.raises(adapters.AdapterError, match="step 5: 1 tensor of the adapter not finite"):
        trainer(model, tmp_path, Watchdog(), logging_steps=50).train()


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    model = attached()
    watch = Watchdog(after=2)
    state = hf.TrainerState(global_step=40, max_steps=60)
    watch.on_train_begin(TrainingArguments(str(tmp_path), warmup_steps=10), state, None, model=model)
    watch.on_optimizer_step(None, state, None, optimizer=adam(model))
    state.global_step = 41
    with pytest.raises(adapters.AdapterError, match="step 42: not one"):
        watch.on_optimizer_step(None, state, None, optimizer=adam(model))


def test_overflow_in_float16_is_the_scalers_work() -> None:
    model = attached()
    watch = Watchdog(model)
    arguments = type("Arguments", (), {"fp16": True})()
    for _ in range(2):
        watch.on_log(arguments, None, None, logs={"loss": 2.0, "grad_norm": float("inf")})
    assert [finding.what for finding in watch.findings] == [
        "the gradient overflowed in float16; its scaler skips the step"
    ]
    arguments.fp16 = False
    with pytest.raises(adapters.AdapterError, match="the gradient norm is inf"):
        watch.on_log(arguments, None, None, logs={"loss": 2.0, "grad_norm": float("inf")})


def test_refusals() -> None:
    with pytest.raises(adapters.AdapterError, match="no adapter of this model trains"):
        Watchdog(tiny.build("llama"))
    with pytest.raises(adapters.AdapterError, match="after is 1 and every 25"):
        Watchdog(after=1)
    with pytest.raises(adapters.AdapterError, match="no adapter 'rf' on this model; did you mean 'fr'"):
        Watchdog(attached(), name="rf")


def test_what_it_costs() -> None:
    """Medians of single steps, the watchdog's beside the model's in one run; the docstring quotes them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 160}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=30, num_key_value_heads=2))
    adapters.attach(model, "lora", name="fr", rank=8)
    watch = Watchdog(model.train(), after=1000)
    trained, watched = [], []
    loop = losses(model, 26, adam(model), tokens=16)
    for _ in range(26):
        started = time.perf_counter()
        loss = next(loop)
        between = time.perf_counter()
        watch.step(loss)
        watched.append(time.perf_counter() - between)
        trained.append(between - started)
    started = time.perf_counter()
    watch.finish()
    print(f"step {1e3 * sorted(trained)[13]:.1f} ms, watched {1e3 * sum(watched) / 26:.3f} ms a step, ")
    print(f"comparing once {1e3 * (time.perf_counter() - started):.1f} ms")
    assert sum(watched) < 0.1 * sum(trained)
