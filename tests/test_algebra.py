"""Arithmetic of adapters: the laws of sums, the dense truth, PEFT's own functions, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import output, relative, shake
from torch import Tensor, nn

import adapters
from adapters import AdapterError, Factors
from adapters._algebra import thin
from adapters._algebra.patterns import patterns
from adapters._algebra.tensorwise import reduction_factor
from adapters._attach import base_weight, tensors_of
from adapters._attach.weights import by_site

CLOSE = 1e-6  # relative, fp32
ONE_THREAD = settings(max_examples=25, deadline=None, database=None)


def model(name: str = "llama", **named: dict[str, Any]) -> Any:
    """A tiny model with shaken adapters: name={"method": ..., hyperparameters}."""
    made = tiny.build(name)
    torch.manual_seed(3)
    for seed, (label, options) in enumerate(named.items()):
        options = {"method": "lora", "noise": 0.08, **options}
        noise = options.pop("noise")
        adapters.attach(made, name=label, **options)
        shake(made, label, seed=17 + seed, noise=noise)
    return made


def changes(made: Any, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight, dense and in fp64, by the method's definition."""
    adapter, held = adapters.adapters_of(made)[name], by_site(tensors_of(made, name))
    found = {}
    for site in adapter.sites:
        dense = base_weight(made, site).dense().detach().double()
        p = {key: tensor.detach().double() for key, tensor in held[site.path].items()}
        found[site.path] = adapter.method.at(site).weight(dense, p) - dense
    return found


def weighted(made: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, change in changes(made, name).items():
            total[path] = total.get(path, 0) + weight * change
    return total


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[path].double(), expected[path]) for path in expected)


def flat(held: dict[str, Tensor]) -> Tensor:
    return torch.cat([held[path].double().flatten() for path in sorted(held)])


A, B = {"rank": 4, "alpha": 6.0}, {"rank": 6, "alpha": 5.0, "rslora": True, "rank_pattern": {"mlp.*": 3}}


# the arithmetic itself, on random operands


@st.composite
def products(draw: Any) -> list[Factors]:
    """Two or three low-rank changes of one shape, of unequal ranks and scales, with experts or without."""
    experts, n_out, n_in = draw(st.sampled_from([None, 3])), draw(st.integers(2, 9)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    lead = () if experts is None else (experts,)
    found = []
    for _ in range(draw(st.integers(2, 3))):
        k, scale = draw(st.integers(1, 5)), draw(st.sampled_from([1.0, -0.5, 3.0]))
        left, right = (torch.randn(*lead, *s, generator=generator) for s in ((n_out, k), (k, n_in)))
        found.append(Factors(left, right, scale))
    return found


WEIGHT = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)


@ONE_THREAD
@given(products(), WEIGHT, WEIGHT)
def test_sums_are_linear_and_commute(lows: list[Factors], v: float, w: float) -> None:
    a, b = lows[:2]
    dense = [thin.widened(low).dense() for low in lows]
    found = thin.summed([(v, a), (w, b)])
    assert relative(found.dense(), v * dense[0] + w * dense[1]) < 1e-12
    assert relative(thin.summed([(w, b), (v, a)]).dense(), found.dense()) < 1e-12
    assert relative(thin.summed([(2.0, found)]).dense(), thin.summed([(2 * v, a), (2 * w, b)]).dense()) < 1e-12
    assert found.left.shape[-1] == a.left.shape[-1] + b.left.shape[-1]
    assert thin.norm(found) == pytest.approx(float(found.dense().norm()), rel=1e-10)
    assert thin.inner(a, b) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-9, abs=1e-9)


@ONE_THREAD
@given(products(), st.integers(1, 8))
def test_an_approximation_is_the_best_and_its_error_the_true_one(lows: list[Factors], rank: int) -> None:
    exact = thin.summed([(1.0, low) for low in lows])
    dense = exact.dense()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    for change in (exact, dense):
        found = thin.leading(change, rank)
        assert found.left.shape[-1] <= rank
        left_over = float((dense - found.dense()).norm())
        assert left_over == pytest.approx(float((dense - best).norm()), rel=1e-6, abs=1e-7 * float(dense.norm()))
        assert thin.error(change, found) == pytest.approx(left_over / float(dense.norm()), rel=1e-6, abs=1e-12)


@ONE_THREAD
@given(products())
def test_spaces_and_overlap_are_the_definition(lows: list[Factors]) -> None:
    a, b = lows[:2]
    dense = thin.widened(a).dense()
    for (p, q), matrix in zip(thin.spaces(a), dense.reshape(-1, *dense.shape[-2:]), strict=True):
        assert p.shape[1] == q.shape[1] == torch.linalg.matrix_rank(matrix)
        assert relative(p @ p.mT @ matrix, matrix) < 1e-10
        assert relative(matrix @ q @ q.mT, matrix) < 1e-10
    for (p, _), (q, _) in zip(thin.spaces(a), thin.spaces(b), strict=True):
        cosines = torch.linalg.svdvals(p.mT @ q)
        assert thin.overlap(p, q) == pytest.approx(float(cosines.square().mean()), abs=1e-10)
        assert thin.overlap(p, p) == pytest.approx(1.0)


def test_nothing_has_no_space_and_no_error() -> None:
    zero = Factors(torch.zeros(5, 2), torch.randn(2, 4))
    ((p, _),) = thin.spaces(zero)
    assert p.shape == (5, 0)
    assert thin.overlap(p, p) != thin.overlap(p, p), "NaN"
    assert thin.error(zero, zero) == 0.0
    assert thin.error(zero, Factors(torch.ones(5, 1), torch.ones(1, 4))) == float("inf")
    assert torch.equal(thin.leading(zero, 1).dense(), torch.zeros(5, 4, dtype=torch.float64))


# sums of adapters on a model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3_moe", "odd"])
def test_a_concatenation_is_the_sum_of_what_the_weights_become(name: str) -> None:
    made = model(name, a=A, b=B)
    report = adapters.combine(made, "ab", {"a": 0.3, "b": -1.7})
    assert apart(changes(made, "ab"), weighted(made, {"a": 0.3, "b": -1.7})) < CLOSE
    assert report.error < 1e-7
    assert {site.rank for site in report.sites} == {10, 7}
    assert adapters.adapters_of(made)["ab"].trainable is False
    assert not any(tensor.requires_grad for tensor in tensors_of(made, "ab").values())


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck", "prefix"])
def test_one_adapter_at_weight_one_is_that_adapter_bit_for_bit(method: str) -> None:
    made = model(a={"method": method, "noise": 0.3})
    inputs = tiny.inputs(made)
    before = output(made, inputs)
    adapters.combine(made, "same", {"a": 1.0})
    assert list(adapters.adapters_of(made)) == ["a", "same"]
    assert torch.equal(output(made, inputs), before)
    with adapters.using(made, None):
        assert not torch.equal(output(made, inputs), before)
    for key, tensor in tensors_of(made, "same").items():
        assert tensor.data_ptr() != tensors_of(made, "a")[key].data_ptr()


def test_weights_that_are_powers_of_two_lose_nothing() -> None:
    made = model(a={"rank": 4, "alpha": 8.0})
    adapters.combine(made, "half", {"a": 0.5})
    found = adapters.adapters_of(made)["half"].method
    assert (found.scale, found.rank_pattern) == (1.0, {})
    for key, tensor in tensors_of(made, "half").items():
        assert torch.equal(tensor, tensors_of(made, "a")[key]), "0.5 * 8 / 4 = 1"


def test_the_sum_does_not_depend_on_the_order() -> None:
    made = model(a=A, b=B)
    inputs = tiny.inputs(made)
    for how, rank in (("cat", None), ("svd", 5)):
        adapters.combine(made, f"ab {how}", {"a": 0.3, "b": 0.7}, how, rank)
        first = output(made, inputs)
        adapters.combine(made, f"ba {how}", {"b": 0.7, "a": 0.3}, how, rank)
        assert relative(output(made, inputs), first) < 1e-5


def test_target_sets_and_ranks_may_differ() -> None:
    made = model(a={**A, "targets": ["attention.*", "*.1.mlp.down_proj"]}, b={**B, "targets": ["mlp.*"]})
    report = adapters.combine(made, "ab", {"a": 2.0, "b": 0.5})
    assert apart(changes(made, "ab"), weighted(made, {"a": 2.0, "b": 0.5})) < CLOSE
    ranks = {site.path: site.rank for site in report.sites}
    assert ranks["model.layers.0.mlp.down_proj.weight"] == 3
    assert ranks["model.layers.1.mlp.down_proj.weight"] == 7
    method = adapters.adapters_of(made)["ab"].method
    assert method.rank == 4
    assert method.rank_pattern["mlp.up"] == 3
    assert method.rank_pattern["model.layers.1.mlp.down_proj.weight"] == 7


def test_what_was_combined_is_saved_and_loaded(tmp_path: Path) -> None:
    made = model(a=A, b={**B, "targets": ["mlp.*"]})
    adapters.combine(made, "ab", {"a": 0.3, "b": 0.7})
    inputs = tiny.inputs(made)
    expected = output(made, inputs)
    saved = adapters.save(made, "ab", tmp_path)
    assert saved.peft == "written"
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path)
    assert torch.equal(output(fresh, inputs), expected)
    facts = json.loads((tmp_path / "adapter.json").read_text())["facts"]
    assert facts["combined"] == {"how": "cat", "weights": {"a": 0.3, "b": 0.7}}
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path).eval()
    assert relative(output(theirs, inputs), expected) < 1e-5


def test_an_approximation_on_a_model_states_the_true_error() -> None:
    made = model("qwen3_moe", a=A, b=B)
    weights = {"a": 0.6, "b": 0.9}
    report = adapters.combine(made, "ab", weights, "svd", rank=4)
    truth, found = weighted(made, weights), changes(made, "ab")
    for site in report.sites:
        exact = truth[site.path]
        assert site.rank <= 4
        assert site.error == pytest.approx(relative(found[site.path].double(), exact), rel=1e-4, abs=1e-7)
        s = torch.linalg.svdvals(exact)
        best = float(s[..., 4:].norm() / s.norm())
        assert site.error == pytest.approx(best, rel=1e-4, abs=1e-6), "optimal"
        assert site.size == pytest.approx(float(exact.norm()), rel=1e-5)
    whole = torch.cat([(found[p] - truth[p]).flatten() for p in truth]).norm()
    assert report.error == pytest.approx(
        float(whole / torch.cat([t.flatten() for t in truth.values()]).norm()), rel=1e-4
    )
    exactly = adapters.combine(made, "all", weights, "svd", rank=64)
    assert exactly.error < 1e-6
    assert max(site.rank for site in exactly.sites) == 10, "no more than the sum has"


def test_subtracting_an_adapter_from_a_sum_leaves_the_other() -> None:
    made = model(a=A, b=B)
    adapters.combine(made, "ab", {"a": 1.0, "b": 1.0})
    report = adapters.subtract(made, "a again", "ab", "b")
    assert report.weights == {"ab": 1.0, "b": -1.0}
    assert apart(changes(made, "a again"), changes(made, "a")) < 1e-5
    assert adapters.subtract(made, "small", "ab", "b", "svd", rank=4).error < 1e-6
    assert apart(changes(made, "small"), changes(made, "a")) < 1e-5


def test_trained_biases_are_summed_with_their_scales() -> None:
    made = model("gpt2", a={**A, "bias": True}, b={**A, "targets": ["attention.*"]})
    report = adapters.combine(made, "ab", {"a": 0.5, "b": 2.0})
    held = tensors_of(made, "ab")
    for key, tensor in tensors_of(made, "a").items():
        if key.endswith(":bias"):
            assert torch.allclose(held[key], 0.5 * 1.5 * tensor)
    assert report.notes == ()
    some = adapters.combine(made, "svd", {"a": 0.5, "b": 2.0}, "svd", rank=4)
    assert some.notes == ()
    beside = adapters.combine(made, "late", {"b": 1.0, "a": 0.5}, "ties", density=0.5)
    assert "bias of zeros" not in str(beside)
    alone = model("gpt2", a={**A, "bias": True, "targets": ["mlp.*"]}, b={**A, "targets": ["attention.*"]})
    assert "bias of zeros" in str(adapters.combine(alone, "ab", {"a": 1.0, "b": 1.0}))


def test_biases_go_through_the_same_function() -> None:
    made = model("bert", a={**A, "bias": True}, b={**A, "alpha": 2.0, "bias": True})
    adapters.combine(made, "t", {"a": 0.5, "b": -2.0}, "magnitude_prune", rank=64, density=1.0)
    a, b = tensors_of(made, "a"), tensors_of(made, "b")
    for key, tensor in tensors_of(made, "t").items():
        if key.endswith(":bias"):
            assert torch.allclose(tensor, 0.5 * 1.5 * a[key] - 2.0 * 0.5 * b[key], atol=1e-6)


# PEFT's own sums


def in_peft(made: Any, names: list[str]) -> Any:
    """PEFT around the same base, with adapters of the same tensors."""
    base = copy.deepcopy(made)
    adapters.detach(base)
    theirs: Any = None
    for name in names:
        adapter = adapters.adapters_of(made)[name]
        targets = [site.owner for site in adapter.sites]
        config = peft.LoraConfig(r=adapter.method.rank, lora_alpha=adapter.method.alpha, target_modules=targets)
        if theirs is None:
            theirs = peft.get_peft_model(base, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        with torch.no_grad():
            for site in adapter.sites:
                for key, part in (("a", "lora_A"), ("b", "lora_B")):
                    path = f"base_model.model.{site.owner}.{part}.{name}.weight"
                    theirs.get_parameter(path).copy_(tensors_of(made, name)[f"{site.path}:{key}"])
    return theirs.eval()


@pytest.mark.parametrize(
    ("how", "theirs", "options"),
    [
        ("cat", "cat", {}),
        ("svd", "svd", {"rank": 3}),
        ("linear", "linear", {}),
        ("ties", "ties_svd", {"rank": 3, "density": 0.4}),
        ("magnitude_prune", "magnitude_prune_svd", {"rank": 3, "density": 0.4}),
    ],
)
def test_as_pefts_own_weighted_adapter(how: str, theirs: str, options: dict[str, Any]) -> None:
    made = model(a=A, b={**A, "alpha": 9.0})
    adapters.combine(made, "ab", {"a": 0.7, "b": -0.4}, how, **options)
    other = in_peft(made, ["a", "b"])
    given = {key: value for key, value in options.items() if key != "rank"}
    rank = {"svd_rank": options["rank"]} if "rank" in options else {}
    other.add_weighted_adapter(["a", "b"], [0.7, -0.4], "ab", combination_type=theirs, **given, **rank)
    other.set_adapter("ab")
    inputs = tiny.inputs(made)
    assert relative(output(made, inputs), output(other, inputs)) < 2e-5


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_is_its_definition(majority: str) -> None:
    made = model(a=A, b=B, c=A)
    weights = {"a": 0.5, "b": 1.5, "c": -0.25}
    report = adapters.combine(made, "t", weights, "ties", rank=48, density=0.3, majority=majority)
    parts = {name: changes(made, name) for name in weights}
    for site in report.sites:
        dense = []
        for name in weights:  # trim
            d = parts[name][site.path].flatten()
            d = torch.where(torch.zeros(len(d)).index_fill(0, d.abs().topk(int(0.3 * len(d))).indices, 1) > 0, d, 0)
            dense.append(d)
        stacked = torch.stack(dense)
        vote = (stacked if majority == "total" else stacked.sign()).sum(0)
        elected = torch.where(vote >= 0, 1.0, -1.0)
        agree = (stacked.sign() == elected) & (stacked != 0)
        merged = (stacked * torch.tensor(list(weights.values()))[:, None] * agree).sum(0) / agree.sum(0).clamp(min=1)
        merged = merged.view(parts["a"][site.path].shape)
        s = torch.linalg.svdvals(merged)
        assert site.size == pytest.approx(float(merged.norm()), rel=1e-5)
        assert site.error == pytest.approx(float(s[48:].norm() / s.norm()), rel=1e-3, abs=1e-6)
    whole = adapters.combine(made, "whole", weights, "ties", rank=64, density=0.3, majority=majority)
    assert whole.error < 1e-6


def test_dare_is_reproducible_and_leaves_the_global_random_state_alone() -> None:
    made = model(a=A, b=B)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for how in ("dare_linear", "dare_ties"):
        for label, seed in (("x", 1), ("y", 1), ("z", 2)):
            adapters.combine(made, f"{how} {label}", {"a": 0.5, "b": 0.5}, how, rank=64, density=0.6, seed=seed)
        x, y, z = (changes(made, f"{how} {label}") for label in "xyz")
        assert all(torch.equal(x[path], y[path]) for path in x)
        assert not any(torch.equal(x[path], z[path]) for path in x)
    assert torch.equal(torch.get_rng_state(), before)


def test_dare_drops_and_rescales_each_element() -> None:
    made = model(a=A)
    report = adapters.combine(made, "d", {"a": 2.0}, "dare_linear", rank=128, density=0.5)
    assert report.error < 1e-6
    kept = 0
    exact, found = changes(made, "a"), changes(made, "d")
    for path, change in exact.items():
        dropped = found[path].abs() < 1e-5
        assert torch.allclose(found[path][~dropped], 2.0 * change[~dropped] / 0.5, atol=1e-4)
        kept += int((~dropped).sum())
    first, second = (found[f"model.layers.{layer}.mlp.up_proj.weight"].abs() < 1e-5 for layer in (0, 1))
    assert float((first == second).float().mean()) < 0.6, "each site has its own draw"
    assert kept / sum(change.numel() for change in exact.values()) == pytest.approx(0.5, abs=0.02)


def test_adding_factors_says_how_far_from_the_sum_it_is() -> None:
    made = model(a=A, b={**A, "alpha": 9.0})
    report = adapters.combine(made, "l", {"a": 0.5, "b": -0.5}, "linear")
    truth = weighted(made, {"a": 0.5, "b": -0.5})
    found = changes(made, "l")
    whole = torch.cat([(found[p] - truth[p]).flatten() for p in truth]).norm()
    assert report.error == pytest.approx(
        float(whole / torch.cat([t.flatten() for t in truth.values()]).norm()), rel=1e-5
    )
    assert report.error > 0.5
    with pytest.raises(AdapterError, match=r"ranks \[4, 6\].*use 'svd'"):
        adapters.combine(model(a=A, b={**A, "rank": 6}), "l", {"a": 0.5, "b": 0.5}, "linear")


# methods that are no low-rank sums


def test_changes_of_any_method_are_approximated() -> None:
    made = model(a=A, d={"method": "dora", "rank": 4}, i={"method": "ia3", "noise": 0.3})
    weights = {"a": 1.0, "d": 0.5, "i": -0.7}
    report = adapters.combine(made, "mixed", weights, "svd", rank=64)
    assert apart(changes(made, "mixed"), weighted(made, weights)) < 1e-5
    assert report.error < 1e-5
    assert report.method == "lora"
    low = adapters.combine(made, "low", weights, "svd")
    assert {site.rank for site in low.sites} == {4}, "the largest that went in"
    biased = model("gpt2", a=A, i={"method": "ia3", "noise": 0.3})
    with pytest.raises(AdapterError, match="changes the bias"):
        adapters.combine(biased, "mixed", {"a": 1.0, "i": 0.5}, "svd")
    with pytest.raises(AdapterError, match="needs rank="):
        adapters.combine(made, "only", {"i": 0.5}, "svd")


def test_ia3_is_summed_exactly() -> None:
    made = model(a={"method": "ia3", "noise": 0.3}, b={"method": "ia3", "noise": 0.3, "targets": ["mlp.*"]})
    weights = {"a": 0.4, "b": -1.3}
    assert "exact" in str(adapters.combine(made, "ab", weights, "linear"))
    assert apart(changes(made, "ab"), weighted(made, weights)) < 1e-5
    with pytest.raises(AdapterError, match="how='linear' is the exact sum"):
        adapters.combine(made, "no", weights)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_bottlenecks_side_by_side_are_the_exact_sum(scale: float) -> None:
    options = {"method": "bottleneck", "placement": "houlsby", "reduction_factor": 8, "scale": 2.0}
    made = model(a=options, b={**options, "reduction_factor": 16, "scale": scale, "targets": ["stream.mlp"]})
    adapters.combine(made, "ab", {"a": 0.3, "b": -2.0})
    adapter = adapters.adapters_of(made)["ab"]
    parts = {name: by_site(tensors_of(made, name)) for name in ("a", "b", "ab")}
    generator = torch.Generator().manual_seed(3)
    for site in adapter.sites:
        y = torch.randn(2, 5, site.width, generator=generator)
        expected = y.clone()
        for name, weight in (("a", 0.3), ("b", -2.0)):
            if site.path in parts[name]:
                method = adapters.adapters_of(made)[name].method
                expected += weight * (method.stream(None, y, parts[name][site.path]) - y)
        assert relative(adapter.method.stream(None, y, parts["ab"][site.path]), expected) < CLOSE
    widths = {held["down"].shape[0] for held in parts["ab"].values()}
    assert widths == {8, 12}
    other = model(a=options, b={**options, "placement": "parallel"})
    with pytest.raises(AdapterError, match="one placement"):
        adapters.combine(other, "no", {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_tensors_are_averaged(method: str) -> None:
    made = model(a={"method": method}, b={"method": method})
    report = adapters.combine(made, "ab", {"a": 0.25, "b": 0.75}, "linear")
    a, b = tensors_of(made, "a"), tensors_of(made, "b")
    for key, tensor in tensors_of(made, "ab").items():
        assert torch.allclose(tensor, 0.25 * a[key] + 0.75 * b[key], atol=1e-6)
    assert "average" in str(report)
    with pytest.raises(AdapterError, match=r"sum to 0\.8"):
        adapters.combine(made, "no", {"a": 0.4, "b": 0.4}, "linear")


def test_prefixes_of_other_lengths_and_concatenations_are_refused() -> None:
    made = model(a={"method": "prefix", "length": 4}, b={"method": "prefix", "length": 5})
    with pytest.raises(AdapterError, match="one length, which is 4 for 'a', 5 for 'b'"):
        adapters.combine(made, "no", {"a": 0.5, "b": 0.5}, "linear")
    with pytest.raises(AdapterError, match="a Stack of them does"):
        adapters.combine(made, "no", {"a": 0.5, "b": 0.5})


def test_heads_and_tokens_are_carried_or_averaged() -> None:
    made = model("bert_classifier", a=A, b=A, c={**A, "head": False})
    one = adapters.combine(made, "ac", {"a": 0.3, "c": 0.7})
    assert "those of 'a'" in str(one)
    key = "classifier:head.weight"
    assert torch.equal(tensors_of(made, "ac")[key], tensors_of(made, "a")[key])
    adapters.combine(made, "ab", {"a": 0.3, "b": 0.7})
    expected = 0.3 * tensors_of(made, "a")[key] + 0.7 * tensors_of(made, "b")[key]
    assert torch.allclose(tensors_of(made, "ab")[key], expected)
    assert adapters.adapters_of(made)["ab"].labels == adapters.adapters_of(made)["a"].labels
    adapters.combine(made, "abc", {"a": 0.3, "b": 0.7, "c": -2.0})
    assert torch.equal(tensors_of(made, "abc")[key], tensors_of(made, "ab")[key])
    for weights in ({"a": 1.0, "b": -1.0}, {"a": 0.3, "b": 0.4, "c": 0.3}):
        with pytest.raises(AdapterError, match="sum to 1"):
            adapters.combine(made, "no", weights)


def test_heads_with_other_labels_are_not_averaged() -> None:
    made = tiny.build("bert_classifier")
    for name, label in (("a", "cat"), ("b", "dog")):
        made.config.id2label = {0: label, 1: "bird", 2: "fish"}
        adapters.attach(made, name=name, rank=2)
    with pytest.raises(AdapterError, match="labels or tokens of 'a' and 'b' differ"):
        adapters.combine(made, "ab", {"a": 0.5, "b": 0.5})


def test_a_reduction_factor_gives_the_width_back() -> None:
    for width, inner in itertools.product((64, 100, 576, 768, 1000), range(1, 101)):
        if inner <= width:
            assert int(width / reduction_factor(width, inner)) == inner


# other ranks


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_resizing_up_is_exact_and_can_be_trained(name: str) -> None:
    made = model(name, a=B)
    inputs = tiny.inputs(made)
    before, truth = output(made, inputs), changes(made, "a")
    report = adapters.resize(made, "a", 9, "wide", trainable=True)
    assert report.before == (3, 6)
    assert report.error < 1e-12
    assert apart(changes(made, "wide"), truth) < 1e-12
    assert relative(output(made, inputs), before) < CLOSE
    made.train()
    output_ = made(**inputs).logits.float().square().mean()
    output_.backward()
    for key, tensor in tensors_of(made, "wide").items():
        if key.endswith(":b") and tensor.dim() == 2:
            assert (tensor.grad[:, 6:] != 0).any(), "new columns are reached"


def test_resizing_down_is_the_best_approximation_in_place() -> None:
    made = model(a={"rank": 8, "alpha": 4.0, "dropout": 0.1})
    inputs, truth = tiny.inputs(made), changes(made, "a")
    report = adapters.resize(made, "a", 3)
    assert list(adapters.adapters_of(made)) == ["a"]
    method = adapters.adapters_of(made)["a"].method
    assert (method.rank, method.scale, method.dropout, method.rank_pattern) == (3, 1.0, 0.1, {})
    assert all(tensor.requires_grad for tensor in tensors_of(made, "a").values()), "as it was"
    found = changes(made, "a")
    for site in report.sites:
        s = torch.linalg.svdvals(truth[site.path])
        assert site.error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-5)
        assert site.error == pytest.approx(relative(found[site.path].double(), truth[site.path]), rel=1e-4)
    assert torch.isfinite(output(made, inputs)).all()
    assert "rank 3 instead of 8" in str(report)


def test_a_round_trip_through_a_higher_rank_changes_nothing() -> None:
    made = model(a=A)
    truth = changes(made, "a")
    adapters.resize(made, "a", 11)
    assert adapters.resize(made, "a", 4).error < 1e-6
    assert apart(changes(made, "a"), truth) < CLOSE


def test_a_rank_that_stays_keeps_the_tensors_and_heads_stay_too() -> None:
    made = model("bert_classifier", a=A)
    before = {key: tensor.clone() for key, tensor in tensors_of(made, "a").items()}
    adapters.resize(made, "a", 4)
    assert {k: t.tolist() for k, t in tensors_of(made, "a").items()} == {k: t.tolist() for k, t in before.items()}
    adapters.resize(made, "a", 2)
    assert torch.equal(tensors_of(made, "a")["classifier:head.weight"], before["classifier:head.weight"])
    assert adapters.adapters_of(made)["a"].head == ("classifier",)


# extraction


def tuned_copy(made: Any, seed: int = 9, rank: int = 3, biases: float = 0.0, norms: float = 0.0) -> Any:
    """A copy whose default sites moved by a product of a rank, and, if asked, its biases and norms."""
    tuned, generator = copy.deepcopy(made), torch.Generator().manual_seed(seed)
    paths = [site for site in adapters.sites(made).weights if site.default]
    with torch.no_grad():
        for site in paths:
            weight = tuned.get_submodule(site.owner)._parameters[site.parameter]
            lead = () if site.experts is None else (site.experts,)
            left, right = (torch.randn(*lead, *s, generator=generator) for s in ((site.n_out, rank), (rank, site.n_in)))
            change = 0.1 * left @ right
            weight.add_((change.mT if site.transposed else change).reshape(weight.shape))
        for path, parameter in tuned.named_parameters():
            if parameter.dim() == 1:
                scale = biases if path.endswith("bias") else norms
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("given", ["model", "state dict"])
def test_a_low_rank_change_is_recovered(name: str, given: str) -> None:
    made = tiny.build(name)
    tuned = tuned_copy(made)
    inputs = tiny.inputs(made)
    expected = output(tuned, inputs)
    report = adapters.extract(made, tuned if given == "model" else tuned.state_dict(), rank=3)
    assert report.explained > 1 - 1e-9
    assert report.left == ()
    assert relative(output(made, inputs), expected) < 1e-4
    adapters.detach(made)
    before = output(made, inputs)
    assert relative(before, expected) > 1e-2


def test_an_extraction_states_what_is_lost_and_what_is_left_out() -> None:
    made = tiny.build("llama")
    tuned = tuned_copy(made, rank=6, norms=0.2)
    with torch.no_grad():
        tuned.model.embed_tokens.weight.mul_(1.01)
    report = adapters.extract(made, tuned, "found", rank=4)
    lost = whole = 0.0
    for site in report.sites:
        old, new = (each.get_parameter(site.path).detach().double() for each in (adapters_free(made), tuned))
        s = torch.linalg.svdvals(new - old)
        assert site.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-4)
        lost, whole = lost + float(s[4:].square().sum()), whole + float(s.square().sum())
    moved = {left.path: left.moved for left in report.left}
    norms = {path for path, p in tuned.named_parameters() if p.dim() == 1}
    assert set(moved) == norms | {"model.embed_tokens.weight"}
    embedded = made.model.embed_tokens.weight
    assert moved["model.embed_tokens.weight"] == pytest.approx(0.01 * float(embedded.norm()), rel=1e-3)
    outside = sum(value**2 for value in moved.values())
    assert report.explained == pytest.approx(1 - (lost + outside) / (whole + outside), rel=1e-6)
    assert "left out" in str(report)
    assert max(moved, key=lambda path: moved[path]) in str(report)


def adapters_free(made: Any) -> Any:
    base = copy.deepcopy(made)
    adapters.detach(base)
    return base


def test_biases_come_along_where_every_layer_has_one() -> None:
    made = tiny.build("gpt2")
    tuned = tuned_copy(made, biases=0.3)
    inputs = tiny.inputs(made)
    report = adapters.extract(made, tuned, rank=3)
    assert adapters.adapters_of(made)["extracted"].method.bias
    assert not any(".c_attn." in left.path for left in report.left)
    sites = {site.owner for site in adapters.adapters_of(made)["extracted"].sites}
    norms = [left.path for left in report.left]
    assert norms
    assert not any(path.rpartition(".")[0] in sites for path in norms)
    with torch.no_grad():
        for path in norms:
            tuned.get_parameter(path).copy_(made.get_parameter(path))
    assert relative(output(made, inputs), output(tuned, inputs)) < 1e-4


def test_a_bias_is_left_out_where_some_layers_have_none() -> None:
    made = tiny.build("odd")
    tuned = tuned_copy(made, biases=0.3)
    report = adapters.extract(made, tuned, rank=3)
    assert not adapters.adapters_of(made)["extracted"].method.bias
    assert any(left.path.endswith("bias") for left in report.left)


def test_only_what_moved_is_adapted() -> None:
    made = tiny.build("llama")
    tuned = copy.deepcopy(made)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.1)
    report = adapters.extract(made, tuned, rank=4)
    assert [(site.path, site.rank) for site in report.sites] == [("model.layers.1.mlp.up_proj.weight", 4)]
    assert report.error < 1e-4


def test_convolutions_are_extracted_too() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_labels": 5}
    made = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes)).eval()
    tuned, known = copy.deepcopy(made), adapters.sites(made)
    with torch.no_grad():
        for site in known.weights:
            tuned.get_parameter(site.path).mul_(1.1)
    for source in (tuned, tuned.state_dict()):
        report = adapters.extract(made, source, rank=64, targets=lambda site: bool(site.folded), sites=known)
        assert len(report.sites) > 3
        assert report.error < 1e-5
        for site in adapters.adapters_of(made)["extracted"].sites:
            change = changes(made, "extracted")[site.path]
            assert relative(change, 0.1 * base_weight(made, site).dense().double()) < 1e-5
        adapters.detach(made)


def test_extraction_onto_a_base_in_4_bits() -> None:
    made, tuned = tiny.build("llama"), tuned_copy(tiny.build("llama"))
    adapters.quantize(made, "nf4", compute_dtype=torch.float32)
    report = adapters.extract(made, tuned, rank=16)
    assert "in 4 bits" in str(report)
    assert len(report.sites) == 14
    base, inputs = tiny.build("llama"), tiny.inputs(made)
    assert relative(output(made, inputs), output(tuned, inputs)) < relative(output(base, inputs), output(tuned, inputs))


def test_extraction_of_a_merged_adapter_gives_it_back() -> None:
    made = model(a=A)
    truth = changes(made, "a")
    merged = copy.deepcopy(made)
    adapters.merge(merged, "a")
    adapters.extract(made, merged, "back", rank=4)
    assert apart(changes(made, "back"), truth) < 1e-4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: adapters.extract(m, tiny.build("llama")), "nothing to extract"),
        (lambda m: adapters.extract(m, tiny.build("gpt2")), "GPT2LMHeadModel, and the base a LlamaForCausalLM"),
        (lambda m: adapters.extract(m, {}), "has no model.layers.0.self_attn.q_proj.weight"),
        (lambda m: adapters.extract(m, 3), "give the fine-tuned model or its state dict"),
        (lambda m: adapters.extract(m, model(x=A)), "merge them first"),
        (lambda m: adapters.extract(m, tiny.build("llama", seed=1), rank=0), "rank is 0"),
        (lambda m: adapters.extract(m, tiny.build("llama", seed=1), targets="atention.*"), "did you mean"),
        (lambda m: adapters.extract(m, tiny.build("llama", seed=1), "a"), "'a' is attached already"),
        (
            lambda m: adapters.extract(m, {p: t[:4] for p, t in m.state_dict().items()}),
            r"is \(4, 64\) in the fine-tuned model",
        ),
        (lambda m: adapters.combine(m, "c", {"aa": 1.0}), "no adapter 'aa' on this model; did you mean 'a'"),
        (lambda m: adapters.combine(m, "c", {}), "give one for each"),
        (lambda m: adapters.combine(m, "c", {"a": float("nan")}), "the weight of 'a' is nan"),
        (lambda m: adapters.combine(m, "c", {"a": 0.0}), "every weight is 0"),
        (lambda m: adapters.combine(m, "a", {"b": 1.0}), "'a' is attached already"),
        (lambda m: adapters.combine(m, "c", {"a": 0.5, "p": 0.5}), "different methods.*'a' is a lora, 'p' is a prefix"),
        (lambda m: adapters.combine(m, "c", {"a": 0.5, "p": 0.5}, "svd"), "different methods"),
        (lambda m: adapters.combine(m, "c", {"a": 0.5, "d": 0.5}), "different methods"),
        (lambda m: adapters.combine(m, "c", {"d": 0.5}), "dora has no combination 'cat'"),
        (lambda m: adapters.combine(m, "c", {"p": 1.0}, "svd"), "prefixes follow one another"),
        (lambda m: adapters.combine(m, "c", {"a": 1.0}, "ties_svd"), "did you mean 'ties'"),
        (lambda m: adapters.combine(m, "c", {"a": 1.0, "b": 1.0}, "ties"), "needs density="),
        (lambda m: adapters.combine(m, "c", {"a": 1.0, "b": 1.0}, "ties", density=1.5), "at most 1"),
        (lambda m: adapters.combine(m, "c", {"a": 1.0, "b": 1.0}, density=0.5), "means nothing to it"),
        (lambda m: adapters.combine(m, "c", {"a": 1.0, "b": 1.0}, rank=4), "how='svd' takes rank="),
        (lambda m: adapters.combine(m, "c", {"a": 1.0, "b": 1.0}, "svd", rank=0), "at least 1"),
        (lambda m: adapters.subtract(m, "c", "a", "a"), "nothing"),
        (lambda m: adapters.resize(m, "p", 4), "'p' is a prefix, which has no rank"),
        (lambda m: adapters.resize(m, "a", 0), "rank is 0"),
        (lambda m: adapters.resize(m, "a", 4, "b"), "'b' is attached already"),
        (lambda m: adapters.resize(m, "x", 4), "no adapter 'x'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(change: Any, sentence: str) -> None:
    made = model(a=A, b=B, p={"method": "prefix"}, d={"method": "dora"})
    before = {name: dict(tensors_of(made, name)) for name in adapters.adapters_of(made)}
    with pytest.raises(AdapterError, match=sentence):
        change(made)
    after = {name: dict(tensors_of(made, name)) for name in adapters.adapters_of(made)}
    assert list(after) == list(before)
    assert all(after[name][key] is tensor for name, held in before.items() for key, tensor in held.items())


def test_a_composition_is_no_operand() -> None:
    made = model(a=A, b=B)
    adapters.compose(made, "both", adapters.Stack("a", "b"))
    with pytest.raises(AdapterError, match=r"'both' is a composition, Stack\('a', 'b'\)"):
        adapters.combine(made, "c", {"both": 1.0})


def test_a_sum_is_the_average_of_selections_with_the_same_weights() -> None:
    made = model(a=A, b=B)
    inputs = tiny.inputs(made)
    adapters.combine(made, "ab", {"a": 0.3, "b": 1.7})
    with adapters.using(made, adapters.Average("a", "b", weights=(0.3, 1.7))):
        assert relative(output(made, inputs), output_of(made, "ab", inputs)) < 1e-5
    adapters.combine(made, "sum", {"a": 1.0, "b": 1.0})
    with adapters.using(made, adapters.Stack("a", "b")):
        assert relative(output(made, inputs), output_of(made, "sum", inputs)) < 1e-5


def output_of(made: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    with adapters.using(made, name):
        return output(made, inputs)


def test_patterns_tell_every_site_its_own_value() -> None:
    sites = [site for site in adapters.sites(tiny.build("llama")).weights if site.default]
    generator = torch.Generator().manual_seed(0)
    twins = [
        replace(site, path=f"{stack}layers.0.w.weight") for site, stack in zip(sites, ("", "decoder."), strict=False)
    ]
    for values in ({twins[0].path: 1, twins[1].path: 2}, {twins[0].path: 2, twins[1].path: 1}):
        alike = [replace(site, role="mlp.up") for site in (*twins, *sites[2:6])]
        values |= {site.path: 5 for site in sites[2:6]}
        usual, found = patterns(alike, values)
        method = adapters.methods.get("lora")(rank=usual, rank_pattern=found)
        assert {site.path: method.at(site).rank for site in alike} == values
    for most in itertools.chain([1], range(2, 6)):
        values = {site.path: int(torch.randint(1, most + 1, (), generator=generator)) for site in sites}
        usual, found = patterns(sites, values)
        method = adapters.methods.get("lora")(rank=usual, rank_pattern=found)
        assert {site.path: method.at(site).rank for site in sites} == values
        if most == 1:
            assert found == {}


def test_what_was_loaded_frozen_takes_part(tmp_path: Path) -> None:
    made = model(a=A, b=B)
    for name in ("a", "b"):
        adapters.save(made, name, tmp_path / name)
    other: nn.Module = tiny.build("llama")
    for name in ("a", "b"):
        adapters.load(other, tmp_path / name, name=name)
    adapters.combine(other, "ab", {"a": 0.5, "b": 0.5})
    adapters.combine(made, "ab", {"a": 0.5, "b": 0.5})
    inputs = tiny.inputs(made)
    assert torch.equal(output(other, inputs), output(made, inputs))
