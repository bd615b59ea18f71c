"""Selections: each against its written definition, computed apart from the engine; named, saved, trained, refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import by_hand
import pytest
import tiny
import torch
from laws import frozen, output, relative, shake
from torch import Tensor, nn

import adapters
from adapters import AdapterError
from adapters._attach import adapters_of, base_parameters, tensors_of

CLOSE = 1e-5

# three adapters a kind: of unlike sizes and options where the selection's definition allows it
KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": {
        "a": ("lora", {"rank": 4, "alpha": 6.0}),
        "b": ("lora", {"rank": 2, "alpha": 3.0, "rslora": True, "bias": True}),
        "c": ("lora", {"rank": 3, "targets": ["attention.*", "mlp.down"]}),
    },
    "dora": {
        "a": ("dora", {"rank": 4, "alpha": 6.0}),
        "b": ("dora", {"rank": 2, "alpha": 3.0}),
        "c": ("lora", {"rank": 3}),
    },
    "ia3": {"a": ("ia3", {}), "b": ("ia3", {}), "c": ("lora", {"rank": 3})},
    "loha": {"a": ("loha", {"rank": 2, "alpha": 60.0}), "b": ("lora", {"rank": 2}), "c": ("loha", {"rank": 3})},
    "bottleneck": {
        "a": ("bottleneck", {"reduction_factor": 8.0, "activation": "gelu"}),
        "b": ("bottleneck", {"reduction_factor": 5.0, "placement": "houlsby", "activation": "tanh"}),
        "c": ("bottleneck", {"reduction_factor": 16.0, "placement": "parallel", "activation": "silu", "scale": 2.0}),
    },
    "parallel": {
        "a": ("bottleneck", {"reduction_factor": 8.0, "placement": "parallel", "activation": "gelu", "scale": 4.0}),
        "b": ("bottleneck", {"reduction_factor": 5.0, "placement": "parallel", "activation": "tanh"}),
        "c": ("dora", {"rank": 2}),
    },
    "weights and streams": {
        "a": ("lora", {"rank": 4, "alpha": 6.0}),
        "b": ("bottleneck", {"reduction_factor": 8.0, "placement": "houlsby", "activation": "gelu"}),
        "c": ("ia3", {}),
    },
    "prefix": {"a": ("prefix", {"length": 3}), "b": ("prefix", {"length": 3}), "c": ("prefix", {"length": 5})},
    "all": {
        "a": ("lora", {"rank": 4, "alpha": 6.0}),
        "b": ("bottleneck", {"reduction_factor": 8.0, "activation": "gelu"}),
        "c": ("prefix", {"length": 4}),
    },
}
# methods that change a changed weight otherwise than by adding to it
MAY_REFUSE = ("dora", "ia3", "loha", "parallel", "weights and streams")
NOISE = {"ia3": 0.3}


def attached(base: str, kind: str, names: str = "abc") -> Any:
    """A tiny model with the adapters of a kind, each shaken by its own noise; none acts."""
    model = tiny.build(base)
    for seed, name in enumerate(names, 31):
        method, options = KINDS[kind][name]
        torch.manual_seed(seed)
        adapters.attach(model, method, name=name, head=False, **options)
        shake(model, name, seed, NOISE.get(method, 0.08))
    adapters.activate(model, None)
    return model


@functools.cache
def shared(base: str, kind: str) -> tuple[Any, nn.Module]:
    """The same with a plain base beside it: for tests that change neither."""
    return attached(base, kind), frozen(tiny.build(base))


def found(model: nn.Module, selection: Any, batch: dict[str, Tensor]) -> Tensor:
    with adapters.using(model, selection):
        return output(model, batch)


def expected(model: nn.Module, plain: nn.Module, selection: Any, batch: dict[str, Tensor]) -> Tensor:
    return by_hand.output(plain, selection, by_hand.parts_of(model), lambda: output(plain, batch))


def agree(base: str, kind: str, selection: Any, rows: int = 3, padded: bool = False) -> bool:
    """The engine's output is the definition's, and not that of the base; or it is refused where that is allowed."""
    model, plain = shared(base, kind)
    batch = tiny.inputs(base, rows=rows, padded=padded)
    if not accepted(model, selection):
        assert kind in MAY_REFUSE, selection
        return False
    result, definition = found(model, selection, batch), expected(model, plain, selection, batch)
    assert result.shape == definition.shape
    assert relative(result, definition) < CLOSE
    unchanged = output(plain, batch)
    assert result.shape != unchanged.shape or relative(result, unchanged) > 1e-3
    return True


def accepted(model: nn.Module, selection: Any) -> bool:
    refusal = None
    try:
        adapters.using(model, selection)
    except AdapterError as error:
        refusal = str(error)
    assert refusal is None or sentence(refusal)
    return refusal is None


def sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and len(text) < 400


def stacks() -> list[Any]:
    stack = adapters.Stack
    return [
        stack("a", "b"),
        stack("b", "a"),
        stack("c", "a", "b"),
        stack("a", None, "b"),
        stack("a", "a"),
        stack(stack("a", "b"), "c"),
        stack("a", stack("b", "c")),
        stack("a"),
    ]


def averages() -> list[Any]:
    average = adapters.Average
    return [
        average("a", "b"),
        average("a", "b", weights=(0.3, 0.7)),
        average("a", "b", weights=(1.5, -0.5)),
        average("b", "a", weights=(1.0, 0.0)),
        average("a", "b", "a", weights=(0.25, 0.5, 0.25)),
        average(average("a", "b"), "b", weights=(0.6, 0.4)),
    ]


def loose_averages() -> list[Any]:
    """Weights that do not sum to 1, and parts that are the base: for weights and streams only."""
    average = adapters.Average
    return [
        average("a", "b", weights=(0.5, 0.2)),
        average("a", weights=(2.0,)),
        average("a", None, weights=(0.25, 0.75)),
        average("a", "b", "c"),
    ]


def nests() -> list[Any]:
    stack, average = adapters.Stack, adapters.Average
    return [
        stack(average("a", "b", weights=(0.3, 0.7)), "c"),
        stack("c", average("a", "b")),
        average(stack("a", "b"), stack("b", "a"), weights=(0.3, 0.7)),
        average(stack("a", "b"), average("a", "c"), weights=(0.9, 0.4)),
    ]


def splits() -> list[Any]:
    stack, average, split = adapters.Stack, adapters.Average, adapters.Split
    return [
        split("a", "b", at=(3,)),
        split("a", None, "b", at=(2, 5)),
        split(None, "a", at=(1,)),
        split("a", "b", "c", "a", at=(1, 2, 6)),
        split("a", "b", at=(100,)),
        split(stack("a", "b"), average("a", "c"), at=(4,)),
        stack(split("a", "b", at=(3,)), "c"),
        stack(split("a", None, at=(3,)), split(None, "b", at=(5,))),
        average(split("a", "b", at=(3,)), "c", weights=(0.4, 0.6)),
        split(split("a", "b", at=(2,)), "c", at=(4,)),
        split("c", split("a", "b", at=(5,)), at=(2,)),  # whose tokens are counted from the first of all
    ]


def lists() -> list[Any]:
    stack, average, split = adapters.Stack, adapters.Average, adapters.Split
    return [
        ["a", "b", "c"],
        ["a", None, "b"],
        [None, None, "c"],
        ["b", "b", "b"],
        [stack("a", "b"), "a", stack("c", "a")],
        [average("a", "b", weights=(0.3, 0.7)), None, stack(average("b", "a"), "c")],
        [split("a", "b", at=(3,)), "c", stack("b", split(None, "a", at=(2,)))],
    ]


def has_prefix(kind: str, selection: Any) -> bool:
    each = selection if isinstance(selection, list) else [selection]
    return any(KINDS[kind][name][0] == "prefix" for part in each for name in by_hand.names(part))


def kind_of(selection: Any) -> set[str]:
    """The names of the selections inside a selection."""
    if selection is None or isinstance(selection, str):
        return set()
    if isinstance(selection, list):
        return set().union(*map(kind_of, selection))
    return {type(selection).__name__}.union(*map(kind_of, selection.parts))


WITHOUT_PREFIX = [kind for kind in KINDS if kind not in ("prefix", "all")]


# -- the definitions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_a_stack_is_one_after_the_other(base: str, kind: str) -> None:
    assert True in [agree(base, kind, selection) for selection in stacks()]


@pytest.mark.parametrize("kind", [*WITHOUT_PREFIX, "prefix"])
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_an_average_adds_the_weighted_changes(base: str, kind: str) -> None:
    assert True in [agree(base, kind, selection) for selection in averages()]


@pytest.mark.parametrize("kind", WITHOUT_PREFIX)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_an_average_need_not_be_one_of_weights_that_sum_to_one(base: str, kind: str) -> None:
    assert True in [agree(base, kind, selection) for selection in (*loose_averages(), *nests())]


@pytest.mark.parametrize("kind", WITHOUT_PREFIX)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_a_split_gives_each_range_of_tokens_its_own(base: str, kind: str) -> None:
    agreed = [agree(base, kind, selection) for selection in splits()]
    assert True in agreed or kind == "ia3"  # which scales inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_a_list_gives_each_row_its_own(base: str, kind: str) -> None:
    for selection in lists():
        if has_prefix(kind, selection) and kind_of(selection) & {"Split", "Average"}:
            continue
        agree(base, kind, selection, padded=True)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_answers_once_for_each_part(kind: str) -> None:
    parallel, stack = adapters.Parallel, adapters.Stack
    for selection in (parallel("a", "b"), parallel("c", None, "a"), parallel(stack("a", "b"), "c"), parallel("b")):
        agree("llama", kind, selection, padded=True)
        agree("bert", kind, selection, rows=1)
    model, _ = shared("llama", kind)
    batch = tiny.inputs("llama")
    both = found(model, parallel("a", "b"), batch)
    for i, name in enumerate("ab"):
        assert relative(both[3 * i : 3 * i + 3], found(model, name, batch)) < CLOSE


@pytest.mark.parametrize("base", ["gpt2", "qwen3_moe", "gpt_neox", "odd"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "bottleneck", "all"])
def test_other_weights_compose_alike(base: str, kind: str) -> None:
    """Transposed, fused, shared by branches, expert by expert, and in attentions written by hand."""
    stack, average = adapters.Stack, adapters.Average
    agree(base, kind, stack("a", "b"))
    agree(base, kind, stack("c", "a"))
    agree(base, kind, average("a", "b", weights=(0.3, 0.9)))
    agree(base, kind, stack("b", average("a", "b")))
    agree(base, kind, [stack("a", "b"), None, average("a", "b", weights=(0.5, 0.2))])


def test_by_hand_on_a_single_layer() -> None:
    """W = 1, x = 1: two LoRAs add 2 and 3, and the rest is arithmetic."""
    stack, average, split, parallel = adapters.Stack, adapters.Average, adapters.Split, adapters.Parallel

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = One()
    x = torch.ones(2, 4, 1)
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
        for name, change in (("a", 2.0), ("b", 3.0)):
            example = {"x": torch.randn(3, 4, 1)}  # in which rows differ
            adapters.attach(model, "lora", name=name, targets="all", rank=1, alpha=1.0, example=example)
            tensors = tensors_of(model, name)
            tensors["layer.weight:a"].fill_(1.0)
            tensors["layer.weight:b"].fill_(change)

        def result(selection: Any) -> list[list[float]]:
            with adapters.using(model, selection):
                return model(x).squeeze(-1).tolist()

        assert result("a") == [[3.0] * 4] * 2
        assert result(stack("a", "b")) == [[6.0] * 4] * 2
        assert result(stack("a", "a", None)) == [[5.0] * 4] * 2
        assert result(average("a", "b")) == [[3.5] * 4] * 2
        assert result(average("a", "b", weights=(2.0, -1.0))) == [[2.0] * 4] * 2
        assert result(split("a", None, "b", at=(1, 2))) == [[3.0, 1.0, 4.0, 4.0]] * 2
        assert result(["b", None]) == [[4.0] * 4, [1.0] * 4]
        assert result([stack("a", "b"), split("b", "a", at=(3,))]) == [[6.0] * 4, [4.0, 4.0, 4.0, 3.0]]
        assert result(parallel("a", None)) == [[3.0] * 4] * 2 + [[1.0] * 4] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_a_selection_of_one_is_that_one_bit_for_bit(base: str, kind: str) -> None:
    stack, average, parallel = adapters.Stack, adapters.Average, adapters.Parallel
    model, plain = shared(base, kind)
    batch = tiny.inputs(base)
    for name in "abc":
        alone = found(model, name, batch)
        for selection in (stack(name), average(name), average(name, weights=(1.0,)), parallel(name), stack(name, None)):
            assert torch.equal(found(model, selection, batch), alone), selection
        for selection in (stack(stack(name)), average(stack(name), weights=(1.0,))):
            assert torch.equal(found(model, selection, batch), alone), selection
    unchanged = output(plain, batch)
    for selection in (None, stack(None), stack(None, None), average(None), parallel(None), [None, None, None]):
        assert torch.equal(found(model, selection, batch), unchanged), selection


@pytest.mark.parametrize("kind", WITHOUT_PREFIX)
def test_a_weight_of_zero_is_the_base(kind: str) -> None:
    model, plain = shared("llama", kind)
    batch = tiny.inputs("llama")
    zero = found(model, adapters.Average("a", "b", weights=(0.0, 0.0)), batch)
    assert relative(zero, output(plain, batch)) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "all"])
def test_loaded_and_trainable_parts_compose(kind: str, tmp_path: Path) -> None:
    """What `load` puts into shared memory composes with what `attach` made, in either order."""
    stack, average = adapters.Stack, adapters.Average
    model, plain = shared("llama", kind)
    mixed, batch = attached("llama", kind, "a"), tiny.inputs("llama")
    for name in "bc":
        adapters.save(model, name, tmp_path / name)
        adapters.load(mixed, tmp_path / name, activate=False)
    selections: list[Any] = [stack("a", "b"), stack("c", "b", "a"), ["a", "b", "c"], [stack("b", "a"), None, "b"]]
    if kind != "all":
        selections += [average("a", "b", weights=(0.3, 0.9)), average("b", "c", "a")]
    for selection in selections:
        result = found(mixed, selection, batch)
        assert relative(result, expected(model, plain, selection, batch)) < CLOSE, selection


# -- gradients


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "bottleneck", "parallel", "weights and streams"])
def test_gradients_are_those_of_the_definition(kind: str) -> None:
    stack, average, split = adapters.Stack, adapters.Average, adapters.Split
    model, plain = attached("llama", kind), frozen(tiny.build("llama"))
    batch = tiny.inputs("llama")
    for selection in (stack("a", "b"), average("a", "b", weights=(0.3, 0.9)), split("a", "b", at=(3,))):
        if kind == "ia3" and not accepted(model, selection):
            continue
        parts = by_hand.parts_of(model)
        for part in parts.values():
            for held in part.tensors.values():
                for tensor in held.values():
                    tensor.requires_grad_(True)
        with by_hand.applied(plain, selection, parts):
            _loss(plain, batch).backward()
        model.zero_grad()
        with adapters.using(model, selection):
            _loss(model, batch).backward()
        for name in "ab":
            for key, tensor in tensors_of(model, name).items():
                path, _, own = key.rpartition(":")
                wanted = parts[name].tensors[path][own].grad
                assert wanted is not None, key
                assert tensor.grad is not None, key
                assert relative(tensor.grad, wanted) < CLOSE, (selection, name, key)
        assert all(tensor.grad is None for tensor in tensors_of(model, "c").values())
        assert all(parameter.grad is None for parameter in base_parameters(model).values())


def test_gradients_of_stacked_prefixes_are_those_of_one_long_prefix() -> None:
    model, batch = attached("llama", "prefix"), tiny.inputs("llama")
    with adapters.using(model, adapters.Stack("a", "c")):
        _loss(model, batch).backward()
    one = tiny.build("llama")
    adapters.attach(one, "prefix", name="one", length=8)
    with torch.no_grad():
        for key, tensor in tensors_of(one, "one").items():
            tensor.copy_(torch.cat([tensors_of(model, "a")[key], tensors_of(model, "c")[key]], -2))
    _loss(one, batch).backward()
    for key, tensor in tensors_of(one, "one").items():
        joined = torch.cat([tensors_of(model, name)[key].grad for name in "ac"], -2)  # type: ignore[misc]
        assert tensor.grad is not None
        assert relative(joined, tensor.grad) < CLOSE


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    return (logits * direction).sum()


# -- values


def test_selections_are_values() -> None:
    stack, average, split, parallel = adapters.Stack, adapters.Average, adapters.Split, adapters.Parallel
    made: list[Callable[[], Any]] = [
        lambda: stack("a", "b"),
        lambda: stack("b", "a"),
        lambda: stack("a", stack("b", None)),
        lambda: average("a", "b"),
        lambda: average("a", "b", weights=(0.3, 0.7)),
        lambda: parallel("a", "b"),
        lambda: split("a", None, at=(3,)),
        lambda: split("a", None, at=(4,)),
    ]
    known = {cls.__name__: cls for cls in (stack, average, parallel, split)}
    for make in made:
        assert make() == make()
        assert hash(make()) == hash(make())
        assert repr(make()) == repr(make())
        assert eval(repr(make()), known) == make()
        with pytest.raises((FrozenInstanceError, AttributeError)):
            make().parts = ("c",)
    assert len({make() for make in made}) == len(made)
    assert stack("a", "b") != ["a", "b"]
    assert average("a", "b") == average("a", "b", weights=(0.5, 0.5))
    assert average("a", "b", weights=[0.5, 0.5]) == average("a", "b")
    assert split("a", "b", at=[3]) == split("a", "b", at=(3,))


def test_what_is_printed_tells_what_acts() -> None:
    model, _ = shared("llama", "all")
    selection = adapters.Stack(adapters.Average("a", "b", weights=(0.25, 0.75)), None, "c")
    text = str(selection)
    assert all(word in text for word in ("Stack", "Average", "a", "b", "0.25", "0.75", "None", "c"))
    with adapters.using(model, ["a", selection.parts[2], None]) as report:
        assert set(report.adapters) >= {"a", "c"} or {each.name for each in report.adapters} >= {"a", "c"}
        assert report.runs == 1
        assert "one forward" in str(report)


def test_activate_and_using_take_the_same_and_report() -> None:
    model = attached("llama", "lora")
    batch = tiny.inputs("llama")
    selection: Any
    for selection in ("a", adapters.Stack("a", "b"), ["a", None, "c"], adapters.Parallel("a", "b")):
        with adapters.using(model, selection) as inner:
            within = output(model, batch)
        report = adapters.activate(model, selection)
        assert report.selection == inner.selection
        assert report.runs == inner.runs == 1
        assert torch.equal(output(model, batch), within)
        with adapters.using(model, None):
            assert torch.equal(output(model, batch), found(model, None, batch))
        assert torch.equal(output(model, batch), within)
    adapters.activate(model, None)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    adapters.activate(model, adapters.Stack("a", "b"))
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}


def test_a_tuple_of_rows_is_a_list_or_refused() -> None:
    """A tuple is no selection that anyone could take for a stack."""
    model, _ = shared("llama", "lora")
    batch = tiny.inputs("llama")
    try:
        result = found(model, ("a", None, "b"), batch)
    except AdapterError:
        return
    assert torch.equal(result, found(model, ["a", None, "b"], batch))


# -- refusals


def test_what_cannot_be_built_is_refused() -> None:
    stack, average, split, parallel = adapters.Stack, adapters.Average, adapters.Split, adapters.Parallel
    nan = float("nan")
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: stack(), "Stack"),
        (lambda: average(), "Average"),
        (lambda: parallel(), "Parallel"),
        (lambda: split(at=()), "Split"),
        (lambda: stack(3), "3"),
        (lambda: stack(["a", "b"]), "'a', 'b'"),
        (lambda: average("a", "b", weights=(1.0,)), "weights?"),
        (lambda: average("a", "b", weights=(1.0, 0.5, 0.2)), "weights?"),
        (lambda: average("a", "b", weights=(1.0, nan)), "nan"),
        (lambda: average("a", "b", weights=(1.0, float("inf"))), "inf"),
        (lambda: average("a", "b", weights=("x", "y")), "x"),
        (lambda: split("a", "b", at=()), "at"),
        (lambda: split("a", "b", at=(1, 2)), "at"),
        (lambda: split("a", "b", "c", at=(5, 2)), "at"),
        (lambda: split("a", "b", "c", at=(2, 2)), "at"),
        (lambda: split("a", "b", at=(-1,)), "-1"),
        (lambda: split("a", "b", at=(0.5,)), "0.5"),
        (lambda: stack(parallel("a", "b"), "c"), "Parallel"),
        (lambda: average(parallel("a", "b"), "c"), "Parallel"),
        (lambda: split("a", parallel("a", "b"), at=(1,)), "Parallel"),
        (lambda: parallel(parallel("a", "b"), "c"), "Parallel"),
    ]
    for make, word in bad:
        with pytest.raises(AdapterError, match=word) as error:
            make()
        assert sentence(str(error.value))


def test_a_selection_that_cannot_act_is_refused_and_changes_nothing() -> None:
    stack, average, split, parallel = adapters.Stack, adapters.Average, adapters.Split, adapters.Parallel
    model = attached("llama", "all")
    torch.manual_seed(3)
    adapters.attach(model, "prefix", name="d", length=6)
    adapters.attach(model, "prefix", name="e", length=4)
    batch = tiny.inputs("llama")
    adapters.activate(model, "a")
    before = output(model, batch)
    bad: list[tuple[Any, str]] = [
        ("ab", "'ab'"),
        (stack("a", "nobody"), "'nobody'"),
        (average("a", stack("b", "nobody")), "'nobody'"),
        (["a", "nobody", None], "'nobody'"),
        ([], "empty|no row"),
        (["a", parallel("a", "b"), None], "Parallel"),
        (["a", ["b"], None], "list"),
        (3, "3"),
        (average("c", "d"), "4, 6 tokens"),
        (average("c", "e", weights=(0.5, 0.2)), "sum"),
        (average("c", None), "prefix"),
        (average("a", "c"), "prefix"),
        (stack("a", average("c", "d")), "4, 6 tokens"),
        (split("c", "a", at=(2,)), "prefix"),
        (stack("b", split("a", "c", at=(2,))), "prefix"),
        (["a", split("c", None, at=(2,)), "b"], "prefix"),
    ]
    for selection, word in bad:
        for verb in (adapters.activate, adapters.using):
            with pytest.raises(AdapterError, match=word) as error:
                verb(model, selection)
            assert sentence(str(error.value))
        assert torch.equal(output(model, batch), before)


def test_another_number_of_rows_is_refused() -> None:
    model = attached("llama", "lora")
    batch = tiny.inputs("llama")  # three rows
    for rows in (["a"], ["a", "b"], ["a", None, "b", "c"], ["a"] * 6):
        with adapters.using(model, rows), pytest.raises(AdapterError, match=rf"{len(rows)}.* 3|3.* {len(rows)}"):
            model(**batch)
        for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}):
            with adapters.using(model, rows), pytest.raises(AdapterError):
                model.generate(**batch, max_new_tokens=2, **options)
    adapters.activate(model, ["a", "b"])
    with pytest.raises(AdapterError):
        model(**batch)
    assert output(model, tiny.inputs("llama", rows=2)).shape[0] == 2
    adapters.activate(model, None)
    assert torch.equal(output(model, batch), found(model, None, batch))


def test_a_split_is_refused_where_tokens_cannot_be_told_apart() -> None:
    experts = attached("qwen3_moe", "lora", "ab")
    with pytest.raises(AdapterError, match="tokens"):
        adapters.using(experts, adapters.Split("a", "b", at=(2,)))
    pooled = tiny.build("bert_classifier")
    adapters.attach(pooled, "lora", name="a", targets=["*pooler.dense"], head=False)
    with pytest.raises(AdapterError, match="Split"), adapters.using(pooled, adapters.Split("a", None, at=(2,))):
        output(pooled, tiny.inputs("bert_classifier"))


def test_a_split_holds_in_generation() -> None:
    """Token by token with a cache, the ranges are those of the whole text."""
    model, _ = shared("llama", "lora")
    batch = tiny.inputs("llama")
    with adapters.using(model, adapters.Split("a", None, "b", at=(5, 9))):
        cached = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=True)
        anew = model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, anew)
    with adapters.using(model, "a"):
        assert not torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), anew)


def test_parallel_generates_once_for_each_part() -> None:
    model, _ = shared("llama", "all")
    batch = tiny.inputs("llama")
    both: Any = adapters.Parallel("a", "c", None)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        same = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
        with adapters.using(model, both):
            result = model.generate(**batch, **same)
        alone = []
        for name in both.parts:
            with adapters.using(model, name):
                alone.append(model.generate(**batch, **same))
        assert torch.equal(result, torch.cat(alone))


# -- named selections


def composed(kind: str = "all") -> tuple[Any, Any]:
    model = attached("llama", kind)
    selection = adapters.Stack("b", "a", "c")
    adapters.compose(model, "both", selection)
    return model, selection


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "all"])
def test_a_named_selection_is_the_selection(kind: str) -> None:
    model, selection = composed(kind)
    batch = tiny.inputs("llama")
    result = found(model, selection, batch)
    assert torch.equal(found(model, "both", batch), result)
    adapters.activate(model, "both")
    assert torch.equal(output(model, batch), result)
    rows = found(model, ["both", None, "a"], batch)
    assert relative(rows, found(model, [selection, None, "a"], batch)) < 1e-6
    adapters.detach(model, "both")
    assert {"a", "b", "c"} == set(adapters_of(model))
    with pytest.raises(AdapterError, match="both"):
        adapters.activate(model, "both")
    assert torch.equal(found(model, selection, batch), result)


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "all"])
def test_a_named_selection_is_saved_and_loaded_whole(kind: str, tmp_path: Path) -> None:
    model, selection = composed(kind)
    batch = tiny.inputs("llama")
    adapters.save(model, "both", tmp_path / "both")
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path / "both")
    result = found(model, selection, batch)
    assert torch.equal(output(fresh, batch), result)
    adapters.activate(fresh, None)
    assert torch.equal(output(fresh, batch), found(model, None, batch))
    assert torch.equal(found(fresh, "both", batch), result)
    again = tiny.build("llama")
    adapters.load(again, tmp_path / "both", name="other", activate=False)
    assert torch.equal(found(again, "other", batch), result)
    adapters.save(again, "other", tmp_path / "again")
    third = tiny.build("llama")
    adapters.load(third, tmp_path / "again")
    assert torch.equal(output(third, batch), result)


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_trained_parts_are_loaded_exactly(kind: str, tmp_path: Path) -> None:
    model, _ = composed(kind)
    batch = tiny.inputs("llama")
    adapters.activate(model, "both")
    before = output(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()
    after = output(model, batch)
    assert relative(after, before) > 1e-4
    adapters.save(model, "both", tmp_path / "both")
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path / "both")
    assert torch.equal(output(fresh, batch), after)
    trainable = tiny.build("llama")
    adapters.load(trainable, tmp_path / "both", trainable=True)
    assert torch.equal(output(trainable, batch), after)
    assert sum(p.numel() for p in trainable.parameters() if p.requires_grad) == sum(p.numel() for p in trained)


def test_a_name_is_given_once_and_to_what_exists(tmp_path: Path) -> None:
    model, selection = composed()
    for name, other, word in (
        ("a", adapters.Stack("a", "b"), "'a'"),
        ("both", adapters.Stack("a", "b"), "'both'"),
        ("new", adapters.Stack("a", "nobody"), "'nobody'"),
        ("new", adapters.Average("c", None), "prefix"),
    ):
        with pytest.raises(AdapterError, match=word):
            adapters.compose(model, name, other)
    with pytest.raises(AdapterError, match="'both'"):
        adapters.attach(model, "lora", name="both")
    adapters.save(model, "a", tmp_path)
    with pytest.raises(AdapterError, match="'both'"):
        adapters.load(model, tmp_path, name="both")
    assert torch.equal(found(model, "both", tiny.inputs("llama")), found(model, selection, tiny.inputs("llama")))


def test_a_part_of_a_named_selection_is_not_pulled_away_unseen() -> None:
    """Either its removal is refused, or the name goes with it; never a name that means something else."""
    model, selection = composed("lora")
    batch = tiny.inputs("llama")
    result, refused = found(model, selection, batch), False
    try:
        adapters.detach(model, "b")
    except AdapterError:
        refused = True
    if refused:
        assert torch.equal(found(model, "both", batch), result)
    else:
        with pytest.raises(AdapterError):
            adapters.activate(model, "both")


def test_detaching_an_acting_part_leaves_a_model_that_runs() -> None:
    model = attached("llama", "lora")
    batch = tiny.inputs("llama")
    for selection in (adapters.Stack("a", "b"), ["a", "b", None], adapters.Parallel("a", "b")):
        adapters.activate(model, selection)
        try:
            adapters.detach(model, "a")
        except AdapterError:
            adapters.activate(model, None)
            adapters.detach(model, "a")
        assert torch.isfinite(output(model, batch)).all()
        method, options = KINDS["lora"]["a"]
        adapters.attach(model, method, name="a", **options)
    adapters.detach(model)
    assert torch.equal(output(model, batch), output(frozen(tiny.build("llama")), batch))


def test_all_names_go_with_the_last_adapter() -> None:
    model, _ = composed("lora")
    adapters.detach(model)
    assert adapters_of(model) == {}
    assert not any("adapter" in key for key in vars(model))
    with pytest.raises(AdapterError, match="both"):
        adapters.activate(model, "both")


# -- AdapterFusion


def fused() -> Any:
    model = attached("llama", "bottleneck", "ab")
    torch.manual_seed(9)
    adapters.attach(model, "fuse", name="ab", parts=("a", "b"))
    return model


def test_a_fusion_is_attention_over_what_its_parts_make() -> None:
    model, plain = fused(), frozen(tiny.build("llama"))
    batch = tiny.inputs("llama", padded=True)
    fresh = found(model, "ab", batch)
    even = expected(model, plain, adapters.Average("a", "b"), batch)
    assert relative(fresh, even) < 0.2 * relative(even, output(plain, batch))  # it begins near the mean of its parts
    shake(model, "ab", 7, 0.2)
    for selection in (
        "ab",
        ["ab", "a", None],
        adapters.Stack("ab", "b"),
        adapters.Average("ab", "a", weights=(0.4, 0.7)),
    ):
        assert relative(found(model, selection, batch), expected(model, plain, selection, batch)) < CLOSE
    assert relative(found(model, "ab", batch), fresh) > 1e-2
    parts = by_hand.parts_of(model)
    for held in parts["ab"].tensors.values():
        for tensor in held.values():
            tensor.requires_grad_(True)
    with by_hand.applied(plain, "ab", parts):
        _loss(plain, batch).backward()
    with adapters.using(model, "ab"):
        _loss(model, batch).backward()
    for key, tensor in tensors_of(model, "ab").items():
        path, _, own = key.rpartition(":")
        wanted = parts["ab"].tensors[path][own].grad
        assert tensor.grad is not None
        assert wanted is not None
        assert relative(tensor.grad, wanted) < CLOSE, key


def test_only_the_fusion_trains() -> None:
    model = fused()
    own = {id(tensor) for tensor in tensors_of(model, "ab").values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    shake(model, "ab")
    before = {name: [t.clone() for t in tensors_of(model, name).values()] for name in "ab"}
    _loss(model, tiny.inputs("llama")).backward()
    assert all(t.grad is not None and t.grad.norm() > 0 for t in tensors_of(model, "ab").values())
    assert all(t.grad is None for name in "ab" for t in tensors_of(model, name).values())
    assert all(torch.equal(a, b) for n in "ab" for a, b in zip(before[n], tensors_of(model, n).values(), strict=True))


def test_a_fusion_is_saved_and_loaded_with_its_parts(tmp_path: Path) -> None:
    model = fused()
    shake(model, "ab")
    batch = tiny.inputs("llama")
    result = output(model, batch)
    adapters.save(model, "ab", tmp_path / "ab")
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path / "ab")
    assert torch.equal(output(fresh, batch), result)
    adapters.activate(fresh, None)
    assert torch.equal(output(fresh, batch), found(model, None, batch))


def test_a_fusion_refuses_parts_that_it_cannot_have() -> None:
    model = attached("llama", "weights and streams", "ab")
    for parts, word in ((("b", "nobody"), "nobody"), ((), "part"), (("a", "b"), "a")):
        with pytest.raises(AdapterError, match=word):
            adapters.attach(model, "fuse", name="ab", parts=parts)
    assert set(adapters_of(model)) == {"a", "b"}
