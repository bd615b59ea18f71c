"""A frozen linear layer computed together with its change, against the two one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import shake
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
from adapters._attach import joined

IN, OUT, RANK, SCALE = 5, 7, 3, 0.7


class Two(nn.Module):
    """A layer of each kind, the second of which is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), Conv1D(12, 16)
        nn.init.normal_(self.second.bias)
        self.third = nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        y += x
        out: Tensor = self.third(y)
        return out


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Two().to(dtype)
    adapters.attach(model, "lora", example={"x": torch.randn(2, 3, 12, dtype=dtype)}, rank=3, targets=["*"], **options)
    shake(model, "default")
    return model, torch.randn(2, 4, 12, generator=generator).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each layer that was called was computed together with its change."""
    seen: list[bool] = []
    inner = joined.together

    def noting(*args: Any) -> Tensor | None:
        found = inner(*args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr("adapters._attach.swap.together", noting)
    return seen


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    (out * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**found, "x": x.grad, "out": out.detach()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_both_in_turn(dtype: torch.dtype, bias: bool, calls: list[bool]) -> None:
    model, x = adapted(dtype, bias=bias)
    together = gradients(model, x)
    assert calls == [True] * 3
    handles = [each.register_forward_hook(lambda module, args, out: None) for each in (model.first, model.second)]
    handles.append(model.third.register_forward_pre_hook(lambda module, args: None))
    apart = gradients(model, x)
    assert calls[3:] == [False] * 3
    assert together.keys() == apart.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, expected in apart.items():
        assert expected.norm() > 0, name
        assert (together[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_change", [False, True])
def test_gradients_are_numerical_derivatives(with_bias: bool, with_change: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int, learns: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(learns)

    b = drawn(OUT, learns=False) if with_bias else None
    bias = drawn(OUT) if with_change else None
    x, w, left, right = drawn(2, 3, IN), drawn(IN, OUT, learns=False), drawn(OUT, RANK), drawn(RANK, IN)
    learned = [each for each in (x, left, right, bias) if each is not None]

    def run(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Any:
        return joined._Joined.apply(x, w, b, left, right, bias, SCALE, 0.0)  # type: ignore[no-untyped-call]

    expected = x @ w + SCALE * (x @ right.T) @ left.T
    expected = expected + sum(each for each in (b, None if bias is None else SCALE * bias) if each is not None)
    torch.testing.assert_close(run(*learned), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, tuple(learned))
    for some in range(1, len(learned)):  # a layer whose input needs no gradient, a tensor that is not trained
        assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_(i >= some) for i, p in enumerate(learned)))


def observed(model: Any) -> None:
    model.first.register_full_backward_hook(lambda module, ins, outs: None)


def replaced(model: Any) -> None:
    inner = model.first.forward
    model.first.forward = lambda x: 2 * inner(x)


def trained(model: Any) -> None:
    model.first.bias.requires_grad_()


def watched(model: Any) -> None:
    entry = next(iter(model.first.adapters.values()))
    entry.register_forward_hook(lambda module, args, out: out + 1)


def looked_at(model: Any) -> None:
    next(iter(model.first.adapters.values())).register_forward_pre_hook(lambda module, args: None)


@pytest.mark.parametrize("change", [observed, replaced, trained, watched, looked_at])
def test_a_layer_that_somebody_sees_or_trains_is_called(change: Callable[[Any], None], calls: list[bool]) -> None:
    model, x = adapted()
    before = gradients(model, x)
    change(model)
    after = gradients(model, x)
    assert calls == [True] * 3 + [False, True, True]
    if change in (replaced, watched):
        assert not torch.allclose(before["out"], after["out"])
    else:
        torch.testing.assert_close(before["out"], after["out"])
    if change is trained:
        assert after["first.bias"].norm() > 0


def test_without_gradients_and_with_autocast_the_layer_is_called(calls: list[bool]) -> None:
    model, x = adapted()
    gradients(model.eval(), x)
    with torch.no_grad():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls == [True] * 3 + [False] * 6


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dropout_is_that_of_torch(dtype: torch.dtype, apart: bool) -> None:
    """Against the formula, whose dropout draws the same numbers; x itself is kept, and a mask of a byte an element."""
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(12, 16), nn.Identity()).to(dtype)
    x = torch.randn(2, 300, 12, dtype=dtype).requires_grad_()
    adapters.attach(layer, "lora", example=(x.detach()[:, :5],), rank=3, dropout=0.4, alpha=6, targets=["*"])
    shake(layer, "default")
    layer.train()
    if apart:
        layer[0].register_forward_hook(lambda module, args, out: None)
    outer = torch.randn(2, 300, 16).to(dtype)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(9)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    a, b = (adapters._attach.tensors_of(layer, "default")[f"0.weight:{name}"] for name in "ab")
    ours = torch.autograd.grad((out * outer).sum(), (x, a, b))
    torch.manual_seed(9)
    expected = nn.functional.linear(x, layer[0].weight, layer[0].bias)
    expected = expected + 2 * (nn.functional.dropout(x, 0.4) @ a.to(dtype).mT) @ b.to(dtype).mT
    theirs = torch.autograd.grad((expected * outer).sum(), (x, a, b))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for one, other in zip((out, *ours), (expected, *theirs), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    weights = sum(p.nbytes for p in layer.parameters())
    assert sum(kept.values()) <= x.nbytes + x.numel() + weights


def test_two_adapters_and_none_call_the_layer(calls: list[bool]) -> None:
    model, x = adapted()
    adapters.attach(model, "lora", name="other", example={"x": x}, rank=2, targets=["*"])
    shake(model, "other")
    for selection in ("default", adapters.Stack("default", "other"), None):
        adapters.activate(model, selection)
        model(x)
    assert calls == [True] * 3 + [False] * 6


def test_a_second_derivative_is_refused() -> None:
    model, x = adapted()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
