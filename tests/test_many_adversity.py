"""Faults that an attack on selections, mixed batches and the pool found, each mended and kept here."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import output, relative, shake
from torch import nn
from torch._dynamo.testing import CompileCounter

import adapters
from adapters import AdapterError, Average, Parallel, Split, Stack
from adapters._attach import adapters_of, set_trainable
from adapters._attach.container import Container
from adapters._store.bundle import PARTS

BATCH = tiny.inputs("llama", rows=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four adapters of one kind, and one of another rank."""
    made = {}
    for seed, name in enumerate(("a", "b", "c", "d", "wide")):
        model = tiny.build("llama")
        adapters.attach(model, "lora", name=name, rank=8 if name == "wide" else 4)
        shake(model, name, seed, 0.2)
        made[name] = tmp_path_factory.mktemp("many") / name
        adapters.save(model, name, made[name])
    return made


def loaded(folders: dict[str, Path], names: str = "abcd") -> nn.Module:
    model = tiny.build("llama").eval()
    for name in names:
        adapters.load(model, folders[name], name=name, activate=False)
    return model


def using(model: nn.Module, selection: Any, batch: dict[str, torch.Tensor] = BATCH) -> torch.Tensor:
    with adapters.using(model, selection):
        return output(model, batch)


def test_a_pool_reads_again_what_it_was_given_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.build("llama").eval()
    adapters.load(model, folders["a"], name="z")
    adapters.save(model, "z", tmp_path)
    adapters.detach(model)
    pool = adapters.Pool(model, memory=40_000)
    pool.add(folders["b"], name="z")
    first = adapters.read(tmp_path)
    adapters.load(model, folders["c"], name="other", activate=False)
    adapters.save(model, "other", tmp_path)  # the folder is another adapter now
    adapters.swap(model, "z", first)
    assert relative(using(model, "z"), using(loaded(folders), "a")) < 1e-6
    pool.add(folders["d"], name="w", pin=False)  # "z" has to leave
    with pytest.raises(AdapterError, match="has changed since"):
        using(model, "z")


def test_a_pool_forgets_who_has_left_it(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, memory=70_000)
    pool.add(folders["a"])
    pool.add(folders["b"])
    adapters.detach(model, "a")
    adapters.attach(model, "lora", name="a", rank=2)
    set_trainable(model, "b", True)
    gc.collect()
    pool.add(folders["c"])
    pool.add(folders["d"])
    assert [entry.name for entry in pool.status().entries] == ["d", "c"]


def test_who_was_exchanged_inside_using_can_leave_again(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, memory=40_000)
    pool.add(folders["a"])
    with adapters.using(model, "a"):
        adapters.swap(model, "a", folders["b"])
    pool.add(folders["c"])
    assert [(entry.name, entry.where) for entry in pool.status().entries] == [("c", "memory"), ("a", "disk")]


def test_an_exchange_keeps_to_the_budget(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, memory=70_000)
    pool.add(folders["a"])
    pool.add(folders["b"])
    adapters.swap(model, "a", folders["wide"])
    assert pool.status().used("memory") <= 70_000
    assert relative(using(model, "b"), using(loaded(folders), "b")) < 1e-6


def test_a_refused_addition_moves_nothing_and_a_second_pool_is_refused(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, memory=70_000)
    pool.add(folders["a"])
    pool.add(folders["b"])
    before = str(pool.status())
    with pytest.raises(AdapterError, match="attached already"):
        pool.add(folders["c"], name="b")
    assert str(pool.status()) == before
    with pytest.raises(AdapterError, match="has a pool already"):
        adapters.Pool(model)


def test_slots_make_the_least_recently_used_leave(folders: dict[str, Path]) -> None:
    model, plain = tiny.build("llama").eval(), loaded(folders)
    pool = adapters.Pool(model, slots=2)
    for name in "abcd":
        pool.add(folders[name], name=name)
    for name in "abcd":
        assert relative(using(model, name), using(plain, name)) < 1e-6
        assert sum(entry.where == "memory" for entry in pool.status().entries) <= 2


def test_what_a_pool_holds_follows_the_model_to_another_dtype(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, memory=40_000)
    for name in "ab":
        pool.add(folders[name], name=name)
    full = pool.status().entries[0].nbytes
    model.double()
    pool.memory = 80_000
    assert {entry.nbytes for entry in pool.status().entries} == {2 * full}
    assert using(model, "a").dtype == torch.float64  # which came back from its folder


@pytest.mark.parametrize("slots", [None, 4])
def test_copies_of_a_pooled_model_are_whole(slots: int | None, folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, slots=slots)
    for name in "ab":
        pool.add(folders[name], name=name)
    expected = using(model, ["a", "b", None, "a"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(using(twin, ["a", "b", None, "a"]), expected)
        entries = []
        for name in ("wide", "a", "wide", "a"):
            adapters.swap(twin, "a", folders[name])
            gc.collect()
            entries.append(max(len(m._modules) for m in twin.modules() if isinstance(m, Container)))
        assert entries[0] == entries[2]
        assert entries[1] == entries[3]  # the modules of a layout go with its last adapter
        assert torch.equal(using(twin, ["b", None, None, "b"]), using(model, ["b", None, None, "b"]))


def test_a_slot_that_is_written_leaves_a_graph_alone(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, slots=3)
    pool.add(folders["a"])
    adapters.attach(model, "lora", name="trains", rank=2)
    with adapters.using(model, Stack("a", "trains")):
        loss = model(**BATCH).logits.square().mean()
    pool.add(folders["b"])
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and bool(grad.norm() > 0) for grad in grads)


def test_a_list_of_one_is_not_all_rows_in_compiled_code(folders: dict[str, Path]) -> None:
    model = tiny.build("llama").eval()
    pool = adapters.Pool(model, slots=2)
    pool.add(folders["a"])
    compiled = torch.compile(model, backend=CompileCounter())
    adapters.activate(model, ["a"])
    with pytest.raises(AdapterError, match="4 rows"):
        output(compiled, BATCH)


def test_what_was_stacked_without_gradients_serves_with_them(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    adapters.attach(model, "lora", name="trains", rank=2)
    with torch.inference_mode(), adapters.using(model, ["a", "b", "c", "trains"]):
        model(**BATCH)
    with adapters.using(model, ["a", "b", "c", "trains"]):
        model(**BATCH).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_arguments_that_are_no_rows_are_not_repeated(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    keep = torch.tensor([0, 2, 3, 4])  # as many as there are rows
    with torch.no_grad(), adapters.using(model, Parallel("a", None)):
        found = model(**BATCH, logits_to_keep=keep).logits
    assert found.shape[:2] == (8, 4)
    assert relative(found[:4], using(model, "a")[:, keep]) < 1e-6


def test_generate_takes_no_configuration_for_an_answer(folders: dict[str, Path]) -> None:
    model = loaded(folders)
    with adapters.using(model, Average("a", "b")):
        made = model.generate(**BATCH, max_new_tokens=2, generation_config=None)
        assert torch.equal(made, model.generate(**BATCH, max_new_tokens=2, do_sample=False))


@pytest.mark.parametrize("selection", [Parallel("p", "q"), ["p", "q"]])
def test_a_part_called_by_itself_is_not_the_base_in_silence(selection: Any) -> None:
    model = tiny.build("llama").eval()
    for seed, name in enumerate("pq"):
        adapters.attach(model, "prefix", name=name, length=3)
        shake(model, name, seed, 0.3)
    hidden = torch.randn(4, 5, 64)
    positions = model.model.rotary_emb(hidden, torch.arange(5)[None])
    adapters.activate(model, selection)
    with pytest.raises(AdapterError, match="by itself"):
        model.model.layers[0].self_attn(hidden, position_embeddings=positions, attention_mask=None)


def test_heads_of_other_sizes_are_refused_with_a_sentence() -> None:
    model = tiny.build("bert_classifier").eval()
    for name in "uv":
        adapters.attach(model, "lora", name=name)
    base = tiny.build("bert_classifier")
    base.classifier = nn.Linear(base.classifier.in_features, 7)
    base.config.num_labels = 7
    adapters.attach(base, "lora", name="w")
    bundle = {key: tensor.detach() for key, tensor in _tensors(base, "w").items()}
    from adapters._attach import install

    other = adapters_of(base)["w"]
    labels = {str(i): f"label {i}" for i in range(7)}
    install(model, "w", other.method, other.sites, bundle, head=other.head, labels=labels, activate=False)
    for selection in (["w", None], Parallel("w", None), Average("w", "u"), ["u", "w"]):
        with pytest.raises(AdapterError, match="numbers of labels"):
            adapters.activate(model, selection)


def _tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    from adapters._attach import tensors_of

    return dict(tensors_of(model, name))


def test_a_part_is_not_exchanged_for_what_cannot_be_one(folders: dict[str, Path]) -> None:
    model = loaded(folders, "a")
    for name in "xy":
        adapters.attach(model, "bottleneck", name=name)
    adapters.attach(model, "fuse", name="fused", parts=("x", "y"))
    with pytest.raises(AdapterError, match="part of the fusion"):
        adapters.swap(model, "x", folders["a"])
    adapters.attach(model, "prefix", name="p", length=2)
    adapters.compose(model, "split", Split("a", None, at=(2,)))
    before = using(model, "split")
    adapters.detach(model, "fused")
    with pytest.raises(AdapterError, match="part of the tokens"):
        adapters.swap(model, "a", _saved_prefix(model, folders))
    assert torch.equal(using(model, "split"), before)


def _saved_prefix(model: nn.Module, folders: dict[str, Path]) -> Path:
    place = folders["a"].parent / "prefix"
    adapters.save(model, "p", place)
    return place


def test_prefixes_of_other_attentions_are_not_averaged() -> None:
    model = tiny.build("llama").eval()
    adapters.attach(model, "prefix", name="p", length=3)
    adapters.attach(model, "prefix", name="q", length=3, targets="model.layers.0.*")
    with pytest.raises(AdapterError, match="different attentions"):
        adapters.activate(model, Average("p", "q"))


def test_an_interrupted_load_leaves_what_was_active(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folders, "ab")
    adapters.activate(model, ["a", "b", "a", "b"])
    before = output(model, BATCH)

    def interrupted(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(__import__("sys").modules["adapters._attach.install"], "place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.load(model, folders["c"], name="c")
    assert torch.equal(output(model, BATCH), before)


def test_a_plain_adapter_saved_over_a_composition_leaves_nothing_of_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = loaded(folders, "ab")
    adapters.compose(model, "both", Stack("a", "b"))
    adapters.save(model, "both", tmp_path)
    assert (tmp_path / PARTS).exists()
    adapters.save(model, "a", tmp_path)
    assert not list(tmp_path.glob("part-*"))
    assert not (tmp_path / PARTS).exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"parts": {"a": 3}}', "{}"])
def test_a_strange_list_of_parts_is_refused(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders, "ab")
    adapters.compose(model, "both", Stack("a", "b"))
    adapters.save(model, "both", tmp_path)
    (tmp_path / PARTS).write_text(text)
    with pytest.raises(adapters.DamagedAdapter, match="altered"):
        adapters.load(tiny.build("llama"), tmp_path)
