"""Many adapters on one model: what one costs in memory, what its removal gives back, and a pool that keeps a budget."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import frozen, output, relative, shake
from torch import Tensor

import adapters
from adapters import AdapterError
from adapters._attach import adapters_of, bank, tensors_of

BATCH = tiny.inputs("llama")
COUNT = 8
ROOM = r"memory|budget|bytes"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "lora with biases": {"rank": 4, "bias": True},
    "dora": {"rank": 4},
    "ia3": {},
    "bottleneck": {"reduction_factor": 8.0},
    "prefix": {"length": 3},
}


def fresh() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Eight adapters a method, of one shape."""
    made: dict[str, list[Path]] = {}
    for method, options in METHODS.items():
        model = fresh()
        for index in range(COUNT):
            torch.manual_seed(index)
            adapters.attach(model, method.partition(" ")[0], name="made", **options)
            shake(model, "made", 100 + index, 0.5 if method == "ia3" else 0.08)
            folder = tmp_path_factory.mktemp(method) / f"n{index}"
            adapters.save(model, "made", folder)
            adapters.detach(model, "made")
            made.setdefault(method, []).append(folder)
    return made


@pytest.fixture(scope="module")
def wanted(folders: dict[str, list[Path]]) -> dict[Path, Tensor]:
    """What a model returns with each of them alone."""
    found = {}
    for folder in itertools.chain(*folders.values()):
        model = fresh()
        adapters.load(model, folder, name="alone")
        found[folder] = output(model, BATCH)
    return found


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """What was there before a test is not looked at again, which would take seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held() -> int:
    """Bytes of all tensors that a test has made, each memory once."""
    gc.collect()
    sizes = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def own(model: Any, name: str) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model, name).values())


def using(model: Any, name: Any) -> Tensor:
    return under(model, name, BATCH)


# -- banks: adapters of one kind in one memory


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_costs_its_own_bytes(
    method: str, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model = fresh()
    adapters.load(model, folders[method][0], name="first")
    each = own(model, "first")  # which stays, so that what a base's first adapter costs is not counted
    before, modules = held(), sum(1 for _ in model.modules())
    names = [f"n{i}" for i in range(64)]
    for name, folder in zip(names, itertools.cycle(folders[method]), strict=False):
        adapters.load(model, folder, name=name, activate=False)
    assert list(adapters_of(model)) == ["first", *names]
    assert held() - before <= 1.1 * 64 * each
    assert sum(1 for _ in model.modules()) - modules <= 3 * len(tensors_of(model, "n0")) + 3  # not 64 times as many
    assert not [path for path, _ in model.named_parameters() if ".adapters." in path]
    for index in (0, 7, 8, 63):
        assert torch.equal(using(model, f"n{index}"), wanted[folders[method][index % COUNT]])
    # half of them leave, in no order; what is left is what it was, and the memory of the others is given back
    for name in names[::2]:
        adapters.detach(model, name)
    assert held() - before <= 1.1 * 64 * each
    for index in (1, 7, 63):
        assert torch.equal(using(model, f"n{index}"), wanted[folders[method][index % COUNT]])
    for name in names[1:60:2]:
        adapters.detach(model, name)
    left = list(adapters_of(model))[1:]
    assert held() - before <= 4 * len(left) * each
    for name in left:
        assert torch.equal(using(model, name), wanted[folders[method][int(name[1:]) % COUNT]])
    for name in left:
        adapters.detach(model, name)
    assert held() <= before
    adapters.detach(model, "first")
    assert torch.equal(output(model, BATCH), output(frozen(fresh()), BATCH))
    assert not any("adapters" in path.split(".") for path, _ in model.named_modules())


def test_only_the_adapters_used_last_keep_views(
    folders: dict[str, list[Path]], wanted: dict[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "VIEWED", 3)
    model, places = fresh(), folders["lora"]
    for index, folder in enumerate(places):
        adapters.load(model, folder, name=str(index), activate=False)
    rows = {name: adapter.row for name, adapter in adapters_of(model).items()}

    def viewed() -> set[str]:
        return {name for name, row in rows.items() if row is not None and row._views}

    assert viewed() == set()
    for index, folder in enumerate(places):
        with adapters.using(model, str(index)):
            assert torch.equal(output(model, BATCH), wanted[folder])
        assert viewed() == {str(i) for i in range(max(0, index - 2), index + 1)}
    for _ in range(2):  # more act at once than keep views
        adapters.activate(model, ["0", "1", "2", "3", "4", "5"])
        batch = {key: value[:1].expand(6, -1) for key, value in BATCH.items()}
        for row, folder in zip(output(model, batch), places, strict=False):
            torch.testing.assert_close(row, wanted[folder][0], rtol=1e-5, atol=1e-5)
    assert len(viewed()) <= 3


def test_banks_grow_and_shrink_beside_each_other(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    """Loads, swaps, removals and trained neighbours in an order that nobody planned."""
    model, generator = fresh(), torch.Generator().manual_seed(3)
    there: dict[str, Path] = {}
    every = list(itertools.chain(*folders.values()))
    adapters.attach(model, "lora", name="trains", rank=4)
    shake(model, "trains", 5)
    trained = using(model, "trains")
    for step in range(150):
        draw = torch.randint(0, 10_000, (3,), generator=generator).tolist()
        folder, kind = every[draw[0] % len(every)], draw[1] % 4
        if kind < 2 or not there:
            there[f"s{step}"] = folder
            adapters.load(model, folder, name=f"s{step}", activate=False)
        elif kind == 2:
            name = list(there)[draw[2] % len(there)]
            adapters.swap(model, name, folder)
            there[name] = folder
        else:
            name = list(there)[draw[2] % len(there)]
            del there[name]
            adapters.detach(model, name)
        if step % 10 == 0:
            assert list(adapters_of(model)) == ["trains", *there] or set(adapters_of(model)) == {"trains", *there}
            for name, folder in there.items():
                assert torch.equal(using(model, name), wanted[folder]), (step, name)
            assert torch.equal(using(model, "trains"), trained)


def test_the_file_of_a_loaded_adapter_is_written_back_as_it_was(
    folders: dict[str, list[Path]], wanted: dict[Path, Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = fresh()
    for method, made in folders.items():
        for index, folder in enumerate(made[:3]):
            adapters.load(model, folder, name=f"{method}{index}")
    for method, made in folders.items():
        for index, folder in enumerate(made[:3]):
            adapters.save(model, f"{method}{index}", tmp_path / f"{method}{index}")
            first = load_file(folder / "adapter_model.safetensors")
            second = load_file(tmp_path / f"{method}{index}" / "adapter_model.safetensors")
            assert list(first) == list(second)
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", METHODS)
def test_copies_pickles_and_moves_keep_their_rows(
    method: str, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model = fresh()
    for index in range(5):
        adapters.load(model, folders[method][index], name=f"n{index}", activate=False)
    adapters.detach(model, "n1")
    adapters.attach(model, "lora", name="trains", rank=2)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for twin in twins:
        for index in (0, 2, 3, 4):
            assert torch.equal(using(twin, f"n{index}"), wanted[folders[method][index]])
        adapters.swap(twin, "n2", folders[method][5])
        adapters.detach(twin, "n3")
        adapters.load(twin, folders[method][6], name="n6", activate=False)
        assert torch.equal(using(twin, "n2"), wanted[folders[method][5]])
        assert torch.equal(using(twin, "n6"), wanted[folders[method][6]])
        assert torch.equal(using(model, "n2"), wanted[folders[method][2]])
        assert torch.equal(using(model, "n3"), wanted[folders[method][3]])
        mixed = using(twin, ["n0", "n2", None])
        assert relative(mixed[1], wanted[folders[method][5]][1]) < 1e-5
        adapters.detach(twin)
    wide = copy.deepcopy(model).double()
    for index in (0, 2, 4):
        assert relative(using(wide, f"n{index}"), wanted[folders[method][index]]) < 1e-5
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert relative(using(narrow, "n0"), wanted[folders[method][0]]) < 6e-2
    back = copy.deepcopy(model).double().float()
    for index in (0, 2, 4):
        assert torch.equal(using(back, f"n{index}"), wanted[folders[method][index]])
    adapters.load(back, folders[method][7], name="n7", activate=False)
    assert torch.equal(using(back, "n7"), wanted[folders[method][7]])
    assert torch.equal(using(back, "n0"), wanted[folders[method][0]])
    moved = model.to("cpu")
    assert torch.equal(using(moved, "n4"), wanted[folders[method][4]])
    model.to("meta")
    assert {tensor.device.type for tensor in tensors_of(model, "n4").values()} == {"meta"}


def test_a_loaded_adapter_is_no_parameter_of_the_model_and_a_trainable_one_is(folders: dict[str, list[Path]]) -> None:
    model = fresh()
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    adapters.load(model, folders["lora"][0], name="frozen")
    assert [name for name, _ in model.named_parameters()] == parameters
    assert list(model.state_dict()) == keys
    adapters.load(model, folders["lora"][1], name="trains", trainable=True)
    assert all(tensor.requires_grad for tensor in tensors_of(model, "trains").values())
    assert not any(tensor.requires_grad for tensor in tensors_of(model, "frozen").values())
    assert len([name for name, _ in model.named_parameters()]) > len(parameters)
    plain = fresh()
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_bank_that_grows_or_moves_leaves_what_runs_alone(
    folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    """A forward under way reads the row that it began with, however often the memory below is made anew."""
    model = fresh()
    adapters.load(model, folders["lora"][0], name="n0")
    state = {"busy": False}

    def meanwhile(*_: Any) -> None:
        if state["busy"]:
            return
        state["busy"] = True
        for index in range(20):
            adapters.load(model, folders["lora"][1 + index % 7], name=f"m{index}", activate=False)
        for index in range(19):
            adapters.detach(model, f"m{index}")
        adapters.swap(model, "n0", folders["lora"][2])

    handle = model.model.layers[0].self_attn.register_forward_hook(meanwhile)
    adapters.activate(model, "n0")
    assert torch.equal(output(model, BATCH), wanted[folders["lora"][0]])
    handle.remove()
    assert torch.equal(output(model, BATCH), wanted[folders["lora"][2]])


def test_loads_and_removals_on_one_thread_forwards_on_others(
    folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model = fresh()
    for index in range(3):
        adapters.load(model, folders["lora"][index], name=f"n{index}", activate=False)
    wrong: list[Any] = []
    done = threading.Event()

    def run(index: int) -> None:
        try:
            while not done.is_set():
                if not torch.equal(using(model, f"n{index}"), wanted[folders["lora"][index]]):
                    wrong.append(index)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(12):
            for index in range(12):
                adapters.load(model, folders["lora"][index % COUNT], name=f"{round_}.{index}", activate=False)
            for index in range(12):
                adapters.detach(model, f"{round_}.{index}")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:2]


@pytest.mark.parametrize("method", METHODS)
def test_what_a_mixed_batch_has_gathered_follows_its_adapters(
    method: str, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    """Tensors of many adapters are stacked once for a selection; not for longer than they are what they were."""
    model, twin = fresh(), fresh()
    names = [f"n{index}" for index in range(4)]
    for each in (model, twin):
        for name, folder in zip(names, folders[method], strict=False):
            adapters.load(each, folder, name=name, activate=False)
    chosen: list[Any] = [*names[:3], None, "n3", "n1"]
    batch = tiny.inputs("llama", rows=6)

    def check() -> None:
        mixed = under(model, chosen, batch)
        for row, name in enumerate(chosen):
            assert relative(mixed[row], under(twin, name, batch)[row]) < 1e-5, (row, name)

    check()
    for changed in (model, twin):
        with torch.no_grad():
            for tensor in tensors_of(changed, "n1").values():
                tensor.mul_(0.5)
    check()
    for changed in (model, twin):
        adapters.swap(changed, "n2", folders[method][5])
    check()
    model.double()
    twin.double()
    check()
    model.float()
    twin.float()
    check()
    for changed in (model, twin):
        adapters.detach(changed, "n0")
        adapters.load(changed, folders[method][6], name="n0", activate=False)
    check()


def under(model: Any, selection: Any, batch: dict[str, Tensor]) -> Tensor:
    with adapters.using(model, selection):
        return output(model, batch)


# -- the pool


def pooled(
    folders: dict[str, list[Path]],
    memory: float | None,
    ram: float | None = None,
    method: str = "lora",
    slots: int | None = None,
    count: int = COUNT,
) -> tuple[Any, Any, int]:
    """A model and a pool of the first adapters of a method; budgets are in adapters."""
    model = fresh()
    adapters.load(model, folders[method][0], name="probe")
    each = own(model, "probe")
    adapters.detach(model, "probe")
    budget = {"memory": memory, "ram": ram}
    pool = adapters.Pool(model, **{key: None if x is None else int(x * each) for key, x in budget.items()}, slots=slots)
    for index, folder in enumerate(folders[method][:count]):
        pool.add(folder, name=f"n{index}")
    return model, pool, each


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
@pytest.mark.parametrize(("memory", "ram"), [(None, None), (3, None), (3, 2), (1, 0), (2, 100)])
def test_every_adapter_of_a_pool_can_be_used_whatever_the_budget(
    method: str, memory: float | None, ram: float | None, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model, pool, _ = pooled(folders, memory, ram, method)
    for index in (0, 1, 0, 5, 7, 2, 0, 3, 3, 6, 4, 1):
        assert torch.equal(using(model, f"n{index}"), wanted[folders[method][index]]), index
        if memory is not None:
            inside = [name for name in adapters_of(model) if name.startswith("n") and resident(model, name)]
            assert len(inside) <= memory, inside
    assert str(pool.status())


def resident(model: Any, name: str) -> bool:
    """Whether an adapter's tensors are in the model now."""
    try:
        return bool(tensors_of(model, name))
    except AdapterError:
        return False


def test_the_least_recently_used_makes_room(folders: dict[str, list[Path]]) -> None:
    model, pool, _ = pooled(folders, memory=3)
    for index in (0, 1, 2):
        using(model, f"n{index}")
    using(model, "n0")
    using(model, "n3")  # n1 is the one that was used the longest ago
    inside = {name for name in (f"n{i}" for i in range(COUNT)) if resident(model, name)}
    assert inside == {"n0", "n2", "n3"}
    using(model, "n2")
    using(model, "n4")
    inside = {name for name in (f"n{i}" for i in range(COUNT)) if resident(model, name)}
    assert inside == {"n2", "n3", "n4"}
    assert pool.status()


def test_what_is_pinned_stays(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, pool, _ = pooled(folders, memory=2)
    pool.pin("n6")
    for index in (0, 1, 2, 3, 4):
        assert torch.equal(using(model, f"n{index}"), wanted[folders["lora"][index]])
        assert resident(model, "n6")
    pool.pin("n4")
    with pytest.raises(AdapterError):  # no room is left, and nothing may go
        using(model, "n0")
    with pytest.raises(AdapterError):
        pool.pin("n0")
    assert torch.equal(using(model, "n6"), wanted[folders["lora"][6]])
    pool.unpin("n6")
    assert torch.equal(using(model, "n0"), wanted[folders["lora"][0]])
    assert resident(model, "n4")
    assert not resident(model, "n6")
    with pytest.raises(AdapterError, match="'nobody'"):
        pool.pin("nobody")


def test_what_acts_is_not_pushed_out(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, pool, _ = pooled(folders, memory=2)
    adapters.activate(model, "n0")
    for index in (1, 2, 3):
        assert torch.equal(using(model, f"n{index}"), wanted[folders["lora"][index]])
        assert torch.equal(output(model, BATCH), wanted[folders["lora"][0]])
    with adapters.using(model, "n5"):
        for index in (1, 2):
            try:
                inner = using(model, f"n{index}")
            except AdapterError:
                continue  # two act and a third has no room: said, not done
            assert torch.equal(inner, wanted[folders["lora"][index]])
        assert {entry.name: entry.where for entry in pool.status().entries}["n5"] == "memory"
        assert torch.equal(output(model, BATCH), wanted[folders["lora"][5]])


def test_a_selection_that_needs_more_than_the_budget_is_refused(folders: dict[str, list[Path]]) -> None:
    model, _, _ = pooled(folders, memory=2)
    mixed = using(model, ["n0", "n1", "n0"])
    assert mixed.shape[0] == 3
    with pytest.raises(AdapterError, match=ROOM):
        using(model, ["n0", "n1", "n2"])
    assert torch.equal(using(model, ["n0", "n1", "n0"]), mixed)
    with pytest.raises(AdapterError, match=ROOM):
        pooled(folders, memory=0.5)


def test_rows_of_a_batch_come_from_a_pool(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, _, _ = pooled(folders, memory=3)
    for chosen in (["n0", "n1", "n2"], ["n5", None, "n6"], ["n7", "n0", "n5"], ["n1", "n1", "n3"]):
        mixed = using(model, chosen)
        for row, name in enumerate(chosen):
            if name is not None:
                assert relative(mixed[row], wanted[folders["lora"][int(name[1:])]][row]) < 1e-5
    stacked = using(model, adapters.Stack("n0", "n4"))
    plain = fresh()
    for name in (0, 4):
        adapters.load(plain, folders["lora"][name], name=f"n{name}", activate=False)
    assert relative(stacked, using(plain, adapters.Stack("n0", "n4"))) < 1e-6


def test_memory_stays_within_the_budgets(folders: dict[str, list[Path]]) -> None:
    before = held()
    model, pool, each = pooled(folders, memory=3, ram=2)
    base = held() - sum(p.numel() * p.element_size() for p in model.parameters())
    for index in itertools.islice(itertools.cycle(range(COUNT)), 40):
        using(model, f"n{index}")
    grown = held() - sum(p.numel() * p.element_size() for p in model.parameters())
    assert grown - before <= 1.1 * 5 * each + 4096
    assert grown <= base + 1.1 * 5 * each + 4096
    for index in range(COUNT):
        pool.remove(f"n{index}")
    assert held() - sum(p.numel() * p.element_size() for p in model.parameters()) <= before + 4096
    assert adapters_of(model) == {}


def test_removal_forgets_an_adapter(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, pool, _ = pooled(folders, memory=2)
    using(model, "n0")
    pool.remove("n0")
    pool.remove("n7")  # which is not in memory
    for name in ("n0", "n7"):
        with pytest.raises(AdapterError, match=f"'{name}'"):
            using(model, name)
        with pytest.raises(AdapterError, match=f"'{name}'"):
            pool.remove(name)
    pool.add(folders["lora"][3], name="n0")
    assert torch.equal(using(model, "n0"), wanted[folders["lora"][3]])
    with pytest.raises(AdapterError, match="'n0'"):
        pool.add(folders["lora"][1], name="n0")


def test_what_cannot_be_added_is_refused_at_once(folders: dict[str, list[Path]], tmp_path: Path) -> None:
    model, pool, _ = pooled(folders, memory=3)
    shutil.copytree(folders["lora"][0], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    other = tiny.build("llama", seed=5)
    adapters.attach(other, "lora", name="x")
    adapters.save(other, "x", tmp_path / "other base")
    for place in (tmp_path / "damaged", tmp_path / "other base", tmp_path / "nowhere"):
        with pytest.raises(AdapterError):
            pool.add(place, name="bad")
    with pytest.raises(AdapterError, match="'bad'"):
        using(model, "bad")


def test_a_folder_that_goes_or_changes_is_noticed(folders: dict[str, list[Path]], tmp_path: Path) -> None:
    """What was pushed out to disk is read again, and checked again."""
    model = fresh()
    for index in range(3):
        shutil.copytree(folders["lora"][index], tmp_path / f"n{index}")
    adapters.load(model, tmp_path / "n0", name="probe")
    each = own(model, "probe")
    adapters.detach(model, "probe")
    pool = adapters.Pool(model, memory=each, ram=0)
    for index in range(3):
        pool.add(tmp_path / f"n{index}", name=f"n{index}")
    first = using(model, "n0")
    using(model, "n1")
    shutil.rmtree(tmp_path / "n0")
    with pytest.raises(AdapterError):
        using(model, "n0")
    shutil.copytree(folders["lora"][0], tmp_path / "n0")
    assert torch.equal(using(model, "n0"), first)


def test_a_pool_beside_trained_adapters(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, _, _ = pooled(folders, memory=2)
    adapters.attach(model, "lora", name="trains", rank=4)
    shake(model, "trains")
    adapters.activate(model, "trains")
    before = output(model, BATCH)
    for index in range(COUNT):
        assert torch.equal(using(model, f"n{index}"), wanted[folders["lora"][index]])
    assert torch.equal(output(model, BATCH), before)
    assert {p.requires_grad for p in tensors_of(model, "trains").values()} == {True}


def test_copies_of_a_model_with_a_pool_keep_what_is_in_memory(
    folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model, _, _ = pooled(folders, memory=3)
    for index in (0, 1, 2):
        using(model, f"n{index}")
    twin = copy.deepcopy(model)
    for index in (0, 1, 2):
        assert torch.equal(using(twin, f"n{index}"), wanted[folders["lora"][index]])
    using(model, "n5")
    assert torch.equal(using(twin, "n0"), wanted[folders["lora"][0]])
    back = model.double().float()
    for index in (0, 5, 7):
        assert torch.equal(using(back, f"n{index}"), wanted[folders["lora"][index]])


def test_many_threads_share_a_pool(folders: dict[str, list[Path]], wanted: dict[Path, Tensor]) -> None:
    model, _, _ = pooled(folders, memory=5, ram=2)
    wrong: list[Any] = []

    def run(thread: int) -> None:
        try:
            for step in range(12):
                index = (3 * thread + step * (1 + thread)) % COUNT
                if not torch.equal(using(model, f"n{index}"), wanted[folders["lora"][index]]):
                    wrong.append((thread, index))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:2]


@pytest.mark.parametrize("slots", [None, 3])
def test_threads_that_activate_share_a_pool(
    slots: int | None, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    """What acts when a forward starts may be pushed out before it ends: it is the whole of one adapter all the same."""
    model, _, _ = pooled(folders, memory=3, slots=slots, count=6)
    possible = [wanted[folders["lora"][index]] for index in range(6)]
    wrong: list[Any] = []

    def run(thread: int) -> None:
        drawn = random.Random(thread)
        try:
            for _ in range(100):
                adapters.activate(model, f"n{drawn.randrange(6)}")
                result = output(model, BATCH)
                if not any(torch.equal(result, each) for each in possible):
                    wrong.append(thread)
        except BaseException as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong, wrong[:2]


@pytest.mark.parametrize("slots", [None, 2])
def test_a_forward_under_way_keeps_what_is_pushed_out(
    slots: int | None, folders: dict[str, list[Path]], wanted: dict[Path, Tensor]
) -> None:
    model, _, _ = pooled(folders, memory=2, slots=slots)
    adapters.activate(model, "n0")
    busy: list[int] = []

    def others() -> None:
        for index in (1, 2, 3, 4, 5, 6, 7, 1, 2):
            adapters.activate(model, f"n{index}")
            busy.append(torch.equal(output(model, BATCH), wanted[folders["lora"][index]]))

    def meanwhile(*_: Any) -> None:
        if not busy:
            busy.append(True)
            thread = threading.Thread(target=others)
            thread.start()
            thread.join()

    for place in (model.model.layers[0], model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp):
        adapters.activate(model, "n0")
        busy.clear()
        handle = place.register_forward_hook(meanwhile)
        assert torch.equal(output(model, BATCH), wanted[folders["lora"][0]])
        handle.remove()
        assert len(busy) == 10
        assert all(busy)


@pytest.mark.parametrize("slots", [None, 4])
def test_a_table_that_is_written_to_leaves_a_backward_alone(slots: int | None, folders: dict[str, list[Path]]) -> None:
    """A gradient that flows through frozen adapters needs what they were, whatever became of others meanwhile."""
    model = fresh()
    pool = adapters.Pool(model, slots=slots)
    for index in range(3):
        pool.add(folders["lora"][index], name=f"n{index}")
    adapters.attach(model, "lora", name="trains", rank=2)
    shake(model, "trains")
    for selection in (adapters.Stack("trains", "n0"), ["n0", "trains", "n1"], adapters.Stack("n0", "trains")):
        expected: list[Tensor] = []
        for meanwhile in (False, True):
            model.zero_grad()
            with adapters.using(model, selection):
                loss = model(**BATCH).logits.square().mean()
            if meanwhile:
                adapters.swap(model, "n2", folders["lora"][3])
                adapters.swap(model, "n0", folders["lora"][4])
                adapters.swap(model, "n0", folders["lora"][0])
            loss.backward()
            grads = [tensor.grad.clone() for tensor in tensors_of(model, "trains").values() if tensor.grad is not None]
            assert grads
            expected = expected or grads
            assert all(torch.equal(grad, other) for grad, other in zip(grads, expected, strict=True))
