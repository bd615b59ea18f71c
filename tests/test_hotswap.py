"""Hot swap: all or nothing, visible at once, never in the middle of a forward or a whole generation; and PEFT's four
errors, each beside what happens here.
"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import output, relative, shake
from torch import Tensor, nn

import adapters
from adapters import AdapterError
from adapters._attach import adapters_of, tensors_of

BATCH = tiny.inputs("llama")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
# versions of one adapter that differ in all that a swap may have to change
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank 4": ("lora", {"rank": 4, "alpha": 6.0}),
    "rank 4 again": ("lora", {"rank": 4, "alpha": 6.0}),
    "another alpha": ("lora", {"rank": 4, "alpha": 20.0}),
    "rank 9": ("lora", {"rank": 9, "alpha": 6.0}),
    "rslora": ("lora", {"rank": 4, "alpha": 3.0, "rslora": True}),
    "few targets": ("lora", {"rank": 4, "alpha": 6.0, "targets": "attention.*"}),
    "other targets": ("lora", {"rank": 2, "targets": "mlp.*"}),
    "patterns": ("lora", {"rank": 4, "rank_pattern": {"mlp.*": 2}, "alpha_pattern": {"attention.*": 30.0}}),
    "with biases": ("lora", {"rank": 4, "bias": True}),
    "dora": ("dora", {"rank": 3}),
    "ia3": ("ia3", {}),
    "bottleneck": ("bottleneck", {"reduction_factor": 8.0}),
    "prefix": ("prefix", {"length": 3}),
    "longer prefix": ("prefix", {"length": 5}),
}


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """What was there before a test is not looked at again, which would take seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def fresh() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    return saved_versions(fresh, tmp_path_factory.mktemp("saved"), list(VERSIONS))


def saved_versions(build: Callable[[], Any], place: Path, versions: list[str]) -> dict[str, tuple[Path, Tensor]]:
    """Each version's folder and what a model gives with it."""
    made = {}
    for seed, version in enumerate(versions, 50):
        method, options = VERSIONS[version]
        model, folder = build(), place / version
        torch.manual_seed(seed)
        adapters.attach(model, method, name="fr", **options)
        shake(model, "fr", seed, 0.5 if method == "ia3" else 0.08)
        adapters.save(model, "fr", folder)
        made[version] = (folder, output(model, BATCH))
    outputs = [result for _, result in made.values()]
    assert all(relative(a, b) > 1e-4 for a, b in itertools.combinations(outputs, 2))
    return made


def holding(saved: dict[str, tuple[Path, Tensor]], version: str = "rank 4", trainable: bool = False) -> Any:
    """A model with this version, with neighbours of like names, and their outputs."""
    model = fresh()
    for name, other in (("ad10", "rank 9"), ("ad", "few targets"), ("d1", "bottleneck")):
        adapters.load(model, saved[other][0], name=name)
    adapters.load(model, saved[version][0], name="ad1", trainable=trainable)
    return model


def outputs(model: Any) -> dict[str, Tensor]:
    found = {}
    for name in (None, *adapters_of(model)):
        with adapters.using(model, name):
            found[str(name)] = output(model, BATCH)
    return found


# -- what a swap exchanges


@pytest.mark.parametrize("trainable", [False, True])
def test_any_version_takes_the_place_of_any_other(saved: dict[str, tuple[Path, Tensor]], trainable: bool) -> None:
    model = holding(saved, trainable=trainable)
    neighbours = outputs(model)
    for version in [*VERSIONS, *reversed(VERSIONS), "ia3", "rank 9", "prefix", "dora", "bottleneck", "few targets"]:
        folder, expected = saved[version]
        report = adapters.swap(model, "ad1", folder)
        assert report.name == "ad1"
        assert torch.equal(output(model, BATCH), expected), version
        adapter = adapters_of(model)["ad1"]
        assert adapter.method.name == VERSIONS[version][0]
        assert adapter.trainable is trainable
        assert {p.requires_grad for p in tensors_of(model, "ad1").values()} == {trainable}
    for name, before in neighbours.items():
        if name != "ad1":
            with adapters.using(model, None if name == "None" else name):
                assert torch.equal(output(model, BATCH), before), name
    adapters.detach(model)
    assert torch.equal(output(model, BATCH), neighbours["None"])


def test_what_was_swapped_in_is_saved_as_it_came(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    model = holding(saved)
    for version in ("patterns", "rslora", "dora", "few targets"):
        adapters.swap(model, "ad1", saved[version][0])
        adapters.save(model, "ad1", tmp_path / version)
        again = fresh()
        adapters.load(again, tmp_path / version)
        assert torch.equal(output(again, BATCH), saved[version][1])
        before, after = (adapters.inspect(place) for place in (saved[version][0], tmp_path / version))
        assert (before.method, before.hyperparameters, before.roles) == (
            after.method,
            after.hyperparameters,
            after.roles,
        )


def test_a_swap_takes_effect_in_selections_too(saved: dict[str, tuple[Path, Tensor]]) -> None:
    model = holding(saved)
    selections: list[Any] = [adapters.Stack("ad1", "d1"), ["ad1", None, "ad10"], adapters.Parallel("ad1", "ad")]
    for selection in selections:
        for version in ("rank 9", "few targets", "rank 4"):
            adapters.activate(model, selection)
            output(model, BATCH)
            adapters.swap(model, "ad1", saved[version][0])
            twin = holding(saved, version)
            with adapters.using(twin, selection):
                assert relative(output(model, BATCH), output(twin, BATCH)) < 1e-6, (selection, version)
    adapters.compose(model, "both", adapters.Stack("ad1", "d1"))
    adapters.activate(model, "both")
    adapters.swap(model, "ad1", saved["rank 9"][0])
    twin = holding(saved, "rank 9")
    with adapters.using(twin, adapters.Stack("ad1", "d1")):
        assert relative(output(model, BATCH), output(twin, BATCH)) < 1e-6


def test_a_swap_that_breaks_an_acting_selection_is_refused(saved: dict[str, tuple[Path, Tensor]]) -> None:
    """Two prefixes are averaged over equal lengths: another length cannot take the place of one of them."""
    model = fresh()
    for name in ("a", "b"):
        adapters.load(model, saved["prefix"][0], name=name)
    adapters.activate(model, adapters.Average("a", "b", weights=(0.3, 0.7)))
    before = output(model, BATCH)
    try:
        adapters.swap(model, "a", saved["longer prefix"][0])
    except AdapterError:
        assert torch.equal(output(model, BATCH), before)
    else:  # then the forward says so
        with pytest.raises(AdapterError, match="length"):
            model(**BATCH)


def test_from_memory(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    model = holding(saved)
    shutil.copytree(saved["rank 9"][0], tmp_path / "gone")
    kept = adapters.read(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for _ in range(2):
        adapters.swap(model, "ad1", kept)
        assert torch.equal(output(model, BATCH), saved["rank 9"][1])
        adapters.swap(model, "ad1", saved["rank 4"][0], check=False)
        assert torch.equal(output(model, BATCH), saved["rank 4"][1])
    adapters.swap(model, "ad1", kept, check=False)
    assert torch.equal(output(model, BATCH), saved["rank 9"][1])
    # what a model changes of its own does not reach the copy in memory
    adapters.detach(model, "ad1")
    adapters.load(model, saved["rank 9"][0], name="ad1", trainable=True)
    adapters.swap(model, "ad1", kept)
    with torch.no_grad():
        for tensor in tensors_of(model, "ad1").values():
            tensor.add_(1.0)
    other = fresh()
    adapters.load(other, saved["rank 4"][0], name="fr")
    adapters.swap(other, "fr", kept)
    assert torch.equal(output(other, BATCH), saved["rank 9"][1])


# -- all or nothing


def damage(kind: str, folder: Path, tmp_path: Path) -> Path:
    """A copy of a folder with one thing wrong."""
    from safetensors.torch import load_file, save_file

    copied = tmp_path / kind.replace(" ", "-")
    shutil.copytree(folder, copied)
    weights, record = copied / "adapter_model.safetensors", copied / "adapter.json"
    if kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif kind == "a flipped bit":
        held = bytearray(weights.read_bytes())
        held[-5] ^= 4
        weights.write_bytes(bytes(held))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no record":
        for name in ("adapter.json", "adapter_config.json"):
            (copied / name).unlink(missing_ok=True)
    elif kind == "broken record":
        record.write_text(record.read_text()[:-20])
    elif kind in ("a tensor too few", "a tensor too many", "not finite", "another shape"):
        tensors = load_file(weights)
        key = sorted(tensors)[-1]
        if kind == "a tensor too few":
            del tensors[key]
        elif kind == "a tensor too many":
            tensors[key + ".more"] = torch.zeros(3)
        elif kind == "not finite":
            tensors[key].view(-1)[0] = float("nan")
        else:
            tensors[key] = tensors[key][:-1].contiguous()
        save_file(tensors, weights)
    return copied


KINDS = [
    "cut short",
    "a flipped bit",
    "no weights",
    "no record",
    "broken record",
    "a tensor too few",
    "a tensor too many",
    "not finite",
    "another shape",
]


def other_bases(tmp_path: Path) -> list[Path]:
    """Adapters of a base with other weights, of a narrower one, of one with fewer layers, of another architecture."""
    import transformers as hf

    sizes = {"vocab_size": tiny.VOCAB, "intermediate_size": tiny.WIDE, "num_attention_heads": 4}
    few = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2))
    narrow = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2))
    made = []
    for index, model in enumerate((tiny.build("llama", seed=9), narrow, few, tiny.build("gpt2"))):
        adapters.attach(model, "lora", name="fr", rank=4)
        shake(model, "fr")
        adapters.save(model, "fr", tmp_path / f"base{index}")
        made.append(tmp_path / f"base{index}")
    return made


def test_a_refused_swap_changes_nothing(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    model = holding(saved)
    bad: list[Any] = [damage(kind, saved["rank 9"][0], tmp_path) for kind in KINDS]
    bad += [*other_bases(tmp_path), tmp_path / "nowhere", tmp_path]
    for action in (lambda: None, lambda: adapters.activate(model, "ad10")):
        action()
        before, attached, active = outputs(model), adapters_of(model), output(model, BATCH)
        held = {name: {key: t.clone() for key, t in tensors_of(model, name).items()} for name in attached}
        for place in bad:
            with pytest.raises(AdapterError) as error:
                adapters.swap(model, "ad1", place)
            assert str(error.value)
            assert adapters_of(model) == attached  # the very same records
        with pytest.raises(AdapterError, match="'ad2'"):
            adapters.swap(model, "ad2", saved["rank 9"][0])
        assert torch.equal(output(model, BATCH), active)
        after = outputs(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
        for name, tensors in held.items():
            assert all(torch.equal(t, tensors[key]) for key, t in tensors_of(model, name).items())
    adapters.swap(model, "ad1", saved["rank 9"][0])
    with adapters.using(model, "ad1"):
        assert torch.equal(output(model, BATCH), saved["rank 9"][1])


@pytest.mark.parametrize("kind", ["a tensor too few", "a tensor too many", "another shape", "cut short", "no weights"])
def test_unchecked_is_not_unread(kind: str, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    """`check=False` skips digests, values and the base; what holds no whole adapter is refused all the same."""
    model = holding(saved)
    before = outputs(model)
    with pytest.raises(AdapterError):
        adapters.swap(model, "ad1", damage(kind, saved["rank 9"][0], tmp_path), check=False)
    after = outputs(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("version", ["rank 9", "dora"])
def test_a_failure_in_the_middle_leaves_the_old_version(
    version: str, trainable: bool, saved: dict[str, tuple[Path, Tensor]]
) -> None:
    """Memory that runs out, an interrupt: at every call of a torch function that a swap makes."""
    model = holding(saved, trainable=trainable)
    for each in (version, "rank 4"):
        adapters.swap(model, "ad1", saved[each][0])
    slots = {name: adapter.slot for name, adapter in adapters_of(model).items()}  # an Adapter would hold its version
    before, count, failed = outputs(model), tensor_count(), 0
    for nth in range(400):
        with failing(nth) as seen:
            try:
                adapters.swap(model, "ad1", saved[version][0])
            except Failed:
                failed += 1
        if not seen.reached:
            break
        assert {name: adapter.slot for name, adapter in adapters_of(model).items()} == slots, nth
    assert failed > 0
    assert seen.reached is False, "a swap that nothing interrupts went through"
    with adapters.using(model, "ad1"):
        assert torch.equal(output(model, BATCH), saved[version][1])
    adapters.swap(model, "ad1", saved["rank 4"][0])
    assert tensor_count() <= count
    after = outputs(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


class Failed(BaseException):
    """Caught by nobody who catches errors."""


class failing(torch.utils._python_dispatch.TorchDispatchMode):
    """The `nth` operation of torch inside raises."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.nth, self.count = nth, 0

    @property
    def reached(self) -> bool:
        return self.count > self.nth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.nth + 1:
            raise Failed(str(func))
        return func(*args, **(kwargs or {}))


def tensor_count() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


def test_swaps_leave_nothing_behind(saved: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    model = holding(saved)
    bad = damage("not finite", saved["rank 9"][0], tmp_path)
    order = [saved[version][0] for version in ("rank 4", "rank 9", "few targets", "dora", "prefix", "rank 4")]

    def rounds(count: int) -> None:
        for _ in range(count):
            for folder in order:
                adapters.swap(model, "ad1", folder)
            with pytest.raises(AdapterError):
                adapters.swap(model, "ad1", bad)

    rounds(2)
    count, modules = tensor_count(), sum(1 for _ in model.modules())
    rounds(10)
    assert tensor_count() <= count
    assert sum(1 for _ in model.modules()) == modules


def test_the_old_version_is_freed_when_nobody_runs_it(saved: dict[str, tuple[Path, Tensor]]) -> None:
    for trainable in (True, False):
        model = holding(saved, trainable=trainable)
        adapter = weakref.ref(adapters_of(model)["ad1"])
        storages = [weakref.ref(t) for t in tensors_of(model, "ad1").values()] if trainable else []
        adapters.swap(model, "ad1", saved["rank 9"][0])
        gc.collect()
        assert adapter() is None
        assert all(each() is None for each in storages)


# -- under way


def paused(module: nn.Module) -> tuple[threading.Event, threading.Event, Callable[[], None]]:
    """Lets the next call of a module wait, on whatever thread: (reached, go on, undo)."""
    reached, go = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if not reached.is_set():
            reached.set()
            assert go.wait(20)

    handle = module.register_forward_hook(wait)
    return reached, go, handle.remove


@pytest.mark.parametrize("to", ["rank 4 again", "rank 9", "few targets", "dora", "bottleneck", "prefix"])
@pytest.mark.parametrize("start", ["rank 4", "prefix"])
def test_a_forward_under_way_keeps_its_version(start: str, to: str, saved: dict[str, tuple[Path, Tensor]]) -> None:
    model = holding(saved, start)
    reached, go, undo = paused(model.model.layers[0])
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(output(model, BATCH)))
    worker.start()
    assert reached.wait(20)
    adapters.swap(model, "ad1", saved[to][0])
    assert torch.equal(output(model, BATCH), saved[to][1])  # visible at once to whoever comes after
    go.set()
    worker.join()
    undo()
    assert torch.equal(found[0], saved[start][1])
    assert torch.equal(output(model, BATCH), saved[to][1])


def generated(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(**BATCH, **{**GREEDY, **options})
    return tokens


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("selection", ["ad1", "rows", "stack"])
def test_a_generation_under_way_keeps_its_version(
    selection: Any, options: dict[str, Any], saved: dict[str, tuple[Path, Tensor]]
) -> None:
    chosen: Any = {"rows": ["ad1", "ad10", "ad1"], "ad1": "ad1"}.get(selection) or adapters.Stack("ad1", "d1")
    model = holding(saved)
    adapters.activate(model, chosen)
    old = generated(model, **options)
    twin = holding(saved, "rank 9")
    adapters.activate(twin, chosen)
    new = generated(twin, **options)
    assert not torch.equal(old, new)
    steps: list[int] = []
    reached, go = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:  # in the middle of the text
            reached.set()
            assert go.wait(20)

    handle = model.model.layers[1].register_forward_hook(wait)
    found: list[Tensor] = []
    worker = threading.Thread(target=lambda: found.append(generated(model, **options)))
    worker.start()
    assert reached.wait(20)
    for version in ("dora", "few targets", "rank 9"):
        adapters.swap(model, "ad1", saved[version][0])
    handle.remove()
    during = generated(model, **options)
    go.set()
    worker.join()
    assert torch.equal(during, new)
    assert torch.equal(found[0], old)
    assert torch.equal(generated(model, **options), new)


def test_a_backward_under_way_keeps_its_version(saved: dict[str, tuple[Path, Tensor]]) -> None:
    """Checkpointed layers are computed again after the swap, and with the old version."""
    for checkpointing in (False, True):
        model = holding(saved, trainable=True)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**BATCH, use_cache=False).logits.square().sum()
        held = tensors_of(model, "ad1")
        loss.backward()
        expected = {key: tensor.grad.clone() for key, tensor in held.items()}  # type: ignore[union-attr]
        model.zero_grad()
        loss = model(**BATCH, use_cache=False).logits.square().sum()
        adapters.swap(model, "ad1", saved["rank 9"][0])
        loss.backward()
        assert all(relative(held[key].grad, grad) < 1e-6 for key, grad in expected.items())  # type: ignore[arg-type]
        assert all(tensor.grad is None for tensor in tensors_of(model, "ad1").values())


@pytest.mark.slow
def test_eight_threads_generate_while_a_thousand_swaps_happen(
    saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """Every generation is that of exactly one version; nothing leaks, nothing crashes."""
    versions = ["rank 4", "rank 9", "few targets", "other targets", "dora"]
    short = {"max_new_tokens": 3, "min_new_tokens": 3}
    prompts = [{key: x[row : row + 1] for key, x in BATCH.items()} for row in range(3)]
    one = {"input_ids": torch.arange(5, 9)[None], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    prompts.append(one)
    known: list[set[tuple[int, ...]]] = [set() for _ in prompts]
    for version in versions:
        twin = holding(saved, version)
        for answers, prompt in zip(known, prompts, strict=True):
            answers.add(tuple(twin.generate(**prompt, **{**GREEDY, **short})[0].tolist()))
    assert any(len(answers) > 2 for answers in known)
    model = holding(saved)
    bundles = [adapters.read(saved[version][0]) for version in versions]
    bad: list[Any] = [damage(kind, saved["rank 9"][0], tmp_path) for kind in ("not finite", "another shape")]
    sources = itertools.cycle([*bundles, *(saved[version][0] for version in versions)])
    wrong: list[Any] = []
    done, counts = threading.Event(), [0] * 8

    def generate(thread: int) -> None:
        try:
            while not done.is_set():
                which = (thread + counts[thread]) % len(prompts)
                answer = tuple(model.generate(**prompts[which], **{**GREEDY, **short})[0].tolist())
                if answer not in known[which]:
                    wrong.append((thread, which, answer))
                counts[thread] += 1
        except BaseException as error:
            wrong.append(error)

    def swap_all(good: int, failing: int) -> None:
        every = good // failing
        for swap in range(good):
            adapters.swap(model, "ad1", next(sources))
            if swap % every == 0:
                with pytest.raises(AdapterError):
                    adapters.swap(model, "ad1", bad[swap // every % len(bad)])

    swap_all(20, 4)
    before, modules = tensor_count(), sum(1 for _ in model.modules())
    threads = [threading.Thread(target=generate, args=(thread,)) for thread in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        swap_all(1000, 200)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert all(counts), counts
    assert time.monotonic() - started < 120
    adapters.swap(model, "ad1", saved["rank 4"][0])
    assert tensor_count() <= before + 20
    assert sum(1 for _ in model.modules()) <= modules + 20
    assert torch.equal(output(model, BATCH), saved["rank 4"][1])


def test_swaps_from_several_threads_end_in_one_of_the_versions(saved: dict[str, tuple[Path, Tensor]]) -> None:
    model = holding(saved)
    wrong: list[BaseException] = []

    def swap_all(versions: list[str]) -> None:
        try:
            for version in versions * 10:
                adapters.swap(model, "ad1", saved[version][0])
        except BaseException as error:
            wrong.append(error)

    orders = [["rank 4", "dora"], ["rank 9", "few targets"], ["other targets", "rslora"]]
    threads = [threading.Thread(target=swap_all, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:1]
    last = output(model, BATCH)
    assert any(torch.equal(last, saved[order[-1]][1]) for order in orders)
    gc.collect()
    adapters.detach(model)
    assert not any("adapters" in path for path, _ in model.named_modules())


# -- compiled


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """The versions of a model of one layer, which compiles in half the time."""
    return saved_versions(shallow, tmp_path_factory.mktemp("short"), [v for v in VERSIONS if v not in ("ia3", "dora")])


def shallow() -> Any:
    model = fresh()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


@pytest.fixture
def counted() -> Iterator[Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def test_a_swap_compiles_nothing_anew(short: dict[str, tuple[Path, Tensor]], counted: Any) -> None:
    """Versions of one rank and set of sites, in the tables of a pool: what changes is a number in memory."""
    model = shallow()
    pool = adapters.Pool(model, slots=4)
    pool.add(short["rank 4"][0], name="ad1")
    adapters.activate(model, "ad1")
    compiled = torch.compile(model, backend=counted)
    assert relative(output(compiled, BATCH), short["rank 4"][1]) < 1e-5
    once = counted.frame_count
    assert once == 1
    for _ in range(12):
        for version in ("rank 4 again", "rank 4"):
            adapters.swap(model, "ad1", short[version][0])
            assert relative(output(compiled, BATCH), short[version][1]) < 1e-5, version
    assert counted.frame_count == once


def test_versions_of_other_kinds_are_compiled_once_each(short: dict[str, tuple[Path, Tensor]], counted: Any) -> None:
    """Another alpha, rank or set of sites is other code, and not compiled again when it returns."""
    model = shallow()
    pool = adapters.Pool(model, slots=4)
    pool.add(short["rank 4"][0], name="ad1")
    adapters.activate(model, "ad1")
    compiled = torch.compile(model, backend=counted)
    versions = ("rank 4", "another alpha", "rank 9", "few targets")
    for version in versions:
        adapters.swap(model, "ad1", short[version][0])
        assert relative(output(compiled, BATCH), short[version][1]) < 1e-5, version
    once = counted.frame_count
    for version in versions * 3:
        adapters.swap(model, "ad1", short[version][0])
        assert relative(output(compiled, BATCH), short[version][1]) < 1e-5, version
    assert counted.frame_count <= once + 1


def test_compiled_code_follows_swaps_without_a_pool(short: dict[str, tuple[Path, Tensor]], counted: Any) -> None:
    """Compiled anew when need be, and never wrong."""
    model = shallow()
    adapters.load(model, short["rank 4"][0], name="ad1")
    compiled = torch.compile(model, backend=counted)
    for version in ("rank 4", "rank 9", "few targets", "rank 4 again", "bottleneck", "rank 4"):
        adapters.swap(model, "ad1", short[version][0])
        assert relative(output(compiled, BATCH), short[version][1]) < 1e-5, version


# -- PEFT's four errors


def peft_pair(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], seed: int = 1
) -> tuple[Any, dict[str, Path], dict[str, Tensor]]:
    """A PeftModel with `first` as "ad1", folders of both versions, and the outputs that they ought to give."""
    peft = pytest.importorskip("peft")
    folders, wanted = {}, {}
    for name, options in (("one", first), ("two", second)):
        model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))
        generator = torch.Generator().manual_seed(seed := seed + 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        folders[name], wanted[name] = tmp_path / name, output(model.eval(), BATCH)
    model = peft.PeftModel.from_pretrained(fresh(), folders["one"], adapter_name="ad1")
    return model.eval(), folders, wanted


def ours(folders: dict[str, Path], wanted: dict[str, Tensor]) -> Any:
    """The same swap here, from PEFT's own folders."""
    model = fresh()
    adapters.load(model, folders["one"], name="ad1")
    assert relative(output(model, BATCH), wanted["one"]) < 1e-5
    return model


def test_peft_1_a_name_that_is_part_of_another(tmp_path: Path) -> None:
    """PEFT finds an adapter's tensors by `name in key`, and zeroes those of `ad10` when `ad1` is swapped."""
    from peft.utils.hotswap import hotswap_adapter

    model, folders, wanted = peft_pair(tmp_path, {"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8})
    model.load_adapter(folders["one"], adapter_name="ad10")
    hotswap_adapter(model, folders["two"], adapter_name="ad1", torch_device="cpu")
    model.set_adapter("ad10")
    assert relative(output(model, BATCH), wanted["one"]) > 1e-2, "PEFT has mended this: say so in FACTS"

    here = ours(folders, wanted)
    adapters.load(here, folders["one"], name="ad10")
    adapters.swap(here, "ad1", folders["two"])
    for name, version in (("ad10", "one"), ("ad1", "two")):
        with adapters.using(here, name):
            assert relative(output(here, BATCH), wanted[version]) < 1e-5


def test_peft_2_patterns_of_ranks_and_alphas(tmp_path: Path) -> None:
    """PEFT looks patterns up by a key that no pattern matches, and scales by the common alpha and rank."""
    from peft.utils.hotswap import hotswap_adapter

    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 40}}
    options = {"r": 4, "lora_alpha": 8, **patterns}
    model, folders, wanted = peft_pair(tmp_path, options, options)
    hotswap_adapter(model, folders["two"], adapter_name="ad1", torch_device="cpu")
    assert relative(output(model, BATCH), wanted["two"]) > 1e-2, "PEFT has mended this: say so in FACTS"

    here = ours(folders, wanted)
    adapters.swap(here, "ad1", folders["two"])
    assert relative(output(here, BATCH), wanted["two"]) < 1e-5


def test_peft_3_a_configuration_that_stays_the_old_one(tmp_path: Path) -> None:
    """PEFT leaves the old rank and alpha in the configuration, and saves the new tensors beside them."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    model, folders, wanted = peft_pair(tmp_path, {"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 30})
    hotswap_adapter(model, folders["two"], adapter_name="ad1", torch_device="cpu")
    assert relative(output(model, BATCH), wanted["two"]) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    stale = json.loads((tmp_path / "saved" / "ad1" / "adapter_config.json").read_text())
    assert stale["lora_alpha"] == 8, "PEFT has mended this: say so in FACTS"
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "saved" / "ad1").eval()
    assert relative(output(again, BATCH), wanted["two"]) > 1e-2

    here = ours(folders, wanted)
    adapters.swap(here, "ad1", folders["two"])
    method: Any = adapters_of(here)["ad1"].method
    assert (method.rank, method.alpha) == (2, 30)
    adapters.save(here, "ad1", tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 30)
    third = fresh()
    adapters.load(third, tmp_path / "ours")
    assert relative(output(third, BATCH), wanted["two"]) < 1e-5


def test_peft_4_an_adapter_of_a_narrower_base(tmp_path: Path) -> None:
    """PEFT pads what is smaller with zeros, also where the base is another one."""
    import peft
    import transformers as hf
    from peft.utils.hotswap import hotswap_adapter

    options = {"r": 4, "lora_alpha": 8}
    model, folders, wanted = peft_pair(tmp_path, options, options)
    sizes = {"vocab_size": tiny.VOCAB, "intermediate_size": tiny.WIDE, "num_attention_heads": 4}
    config = hf.LlamaConfig(**sizes, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2)
    narrow = peft.get_peft_model(
        hf.LlamaForCausalLM(config),
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options),
    )
    narrow.save_pretrained(tmp_path / "narrow")
    hotswap_adapter(model, tmp_path / "narrow", adapter_name="ad1", torch_device="cpu")
    assert relative(output(model, BATCH), wanted["one"]) > 1e-3, "PEFT has mended this: say so in FACTS"

    here = ours(folders, wanted)
    before = output(here, BATCH)
    own = hf.LlamaForCausalLM(config)
    adapters.attach(own, "lora", name="fr", rank=4, targets=["*q_proj", "*v_proj"])
    adapters.save(own, "fr", tmp_path / "narrow of ours")
    for place in ("narrow", "narrow of ours"):
        for options in ({}, {"check": False}, {"force": "wrong-base"}):
            with pytest.raises(AdapterError):
                adapters.swap(here, "ad1", tmp_path / place, **options)
            assert torch.equal(output(here, BATCH), before)
