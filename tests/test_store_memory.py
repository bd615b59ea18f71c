"""What is remembered between reads: a base's verdict while the base stays as it is, lines that adapters have in common,
whole folders kept in memory; and that nothing wrong is ever remembered.
"""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import shake
from torch import Tensor, nn

import adapters
from adapters._attach import tensors_of
from adapters._store import commit, fingerprints, lines, verdicts, weights
from adapters._store.bundle import CONFIG, RECORD, WEIGHTS
from adapters._store.frozen import Frozen, Memo, freeze


def saved(folder: Path, seed: int = 0, method: str = "lora", model: str = "llama", **options: Any) -> Path:
    made = tiny.build(model)
    adapters.attach(made, method, name="fr", **options)
    shake(made, "fr", seed=seed)
    adapters.save(made, "fr", folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "fr")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models whose bases were compared in full."""
    found: list[nn.Module] = []

    def check(recorded: Any, model: nn.Module, exclude: Any = ()) -> str:
        found.append(model)
        return fingerprints.check(recorded, model, exclude)

    monkeypatch.setattr(verdicts, "check", check)
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(model)).logits
    return found


def same(a: dict[str, nn.Parameter], b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the base's verdict


def test_a_base_that_stays_is_compared_once(folder: Path, compared: list[nn.Module]) -> None:
    model = tiny.build("llama")
    first = adapters.load(model, folder, name="a")
    for name in "bc":
        assert adapters.load(model, folder, name=name).base == first.base
    adapters.swap(model, "b", folder)
    adapters.attach(model, "bottleneck", name="new")
    logits(model)
    with torch.no_grad():
        next(iter(tensors_of(model, "new").values())).add_(1)  # an adapter's tensors are not the base's
    adapters.detach(model, "a")
    adapters.swap(model, "b", folder)
    assert compared == [model]
    adapters.load(tiny.build("llama"), folder)
    assert len(compared) == 2


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)


def through_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)  # no version counter moves


def other_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 1.01


def new_parameter(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 1.01)


def new_module(model: Any) -> None:
    model.model.layers[1] = layer = tiny.build("llama").model.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(1.01)


def loaded(model: Any) -> None:
    other = {key: value.clone() for key, value in tiny.build("llama", seed=1).state_dict().items()}
    state = model.state_dict()
    model.load_state_dict({key: other.get(key, value) for key, value in state.items()})


def exchanged(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def another_class(model: Any) -> None:
    model.config.model_type = "mistral"


WRONG = [in_place, through_data, other_data, new_parameter, new_module, loaded, exchanged, another_class]


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "attached"])
def test_a_changed_base_is_seen(folder: Path, change: Callable[[Any], None], attached: bool) -> None:
    model = tiny.build("llama")
    adapters.load(model, folder, name="a")
    if not attached:
        adapters.detach(model)
    change(model)
    for _ in range(2):  # a base that is wrong is so every time
        with pytest.raises(adapters.WrongBase):
            adapters.load(model, folder, name="b")
    assert "by force" in adapters.load(model, folder, name="c", force="wrong-base").base
    with pytest.raises(adapters.WrongBase):
        adapters.load(model, folder, name="b")


def rounded(model: Any) -> None:
    model.to(torch.bfloat16)


def quantized(model: Any) -> None:
    pytest.importorskip("bitsandbytes")
    adapters.quantize(model)


@pytest.mark.parametrize("change", [rounded, quantized])
def test_a_base_in_another_format_is_compared_again(
    folder: Path, change: Callable[[Any], None], compared: list[nn.Module]
) -> None:
    model = tiny.build("llama")
    adapters.load(model, folder, name="a")
    adapters.detach(model)
    change(model)
    adapters.load(model, folder, name="b")
    assert compared == [model, model]


def test_a_base_made_right_again_is_accepted(folder: Path) -> None:
    model: Any = tiny.build("llama")
    adapters.load(model, folder, name="a")
    kept = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    in_place(model)
    with pytest.raises(adapters.WrongBase):
        adapters.load(model, folder, name="b")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(kept)
    adapters.load(model, folder, name="b")


def test_each_record_has_its_own_verdict(tmp_path: Path) -> None:
    model = tiny.build("llama")
    adapters.load(model, saved(tmp_path / "right"), name="a")
    other = tiny.build("llama", seed=1)
    adapters.attach(other, "lora", name="fr")
    adapters.save(other, "fr", tmp_path / "wrong")
    for _ in range(2):
        with pytest.raises(adapters.WrongBase):
            adapters.load(model, tmp_path / "wrong", name="b")
    adapters.load(model, tmp_path / "right", name="c")


def test_heads_are_left_out_of_a_verdict_only_where_the_adapter_has_them(tmp_path: Path) -> None:
    saved(tmp_path / "head", model="bert_classifier", head=True)
    saved(tmp_path / "bare", model="bert_classifier", head=False)
    model: Any = tiny.build("bert_classifier")
    with torch.no_grad():
        model.classifier.weight.add_(1)
    adapters.load(model, tmp_path / "head", name="a")
    with pytest.raises(adapters.WrongBase, match="classifier"):
        adapters.load(model, tmp_path / "bare", name="b")


def test_what_cannot_be_watched_is_compared_every_time(folder: Path, compared: list[nn.Module]) -> None:
    with torch.inference_mode():
        model = tiny.build("llama")
        for name in "ab":
            adapters.load(model, folder, name=name)
    assert compared == [model, model]


def test_a_compiled_model_has_the_base_inside(folder: Path, compared: list[nn.Module]) -> None:
    model = tiny.build("llama")
    adapters.load(torch.compile(model), folder, name="a")  # type: ignore[arg-type]
    adapters.load(model, folder, name="b")
    assert compared == [model]


def with_gaps(model: Any) -> None:
    """The same weights, stored so that their rows do not follow each other."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 2:
                wide = torch.cat([parameter.detach(), torch.zeros_like(parameter)], 1)
                module._parameters[name] = nn.Parameter(wide[:, : parameter.shape[1]], requires_grad=False)
    model.tie_weights()


def test_weights_with_gaps_are_watched_too(folder: Path, compared: list[nn.Module]) -> None:
    model = tiny.build("llama")
    with_gaps(model)
    for name in "ab":
        adapters.load(model, folder, name=name)
    assert compared == [model]
    through_data(model)
    with pytest.raises(adapters.WrongBase):
        adapters.load(model, folder, name="c")


def test_a_weight_whose_memory_is_gone_is_not_read(folder: Path, compared: list[nn.Module]) -> None:
    model: Any = tiny.build("llama")
    adapters.load(model, folder, name="a")
    model.model.layers[0].mlp.up_proj.weight.untyped_storage().resize_(0)
    assert verdicts._look(model) is None


def test_models_are_not_kept_alive(folder: Path) -> None:
    model = tiny.build("llama")
    adapters.load(model, folder, name="a")
    adapters.detach(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ---- lines that siblings share


def test_siblings_are_told_apart(tmp_path: Path) -> None:
    model = tiny.build("llama")
    for seed in range(3):
        adapters.load(model, saved(tmp_path / str(seed), seed), name=str(seed))
    adapters.load(model, saved(tmp_path / "wide", 0, rank=4), name="wide")
    adapters.load(model, saved(tmp_path / "few", 0, targets="attention.*"), name="few")
    for name in ("0", "1", "2", "wide", "few"):
        alone = tiny.build("llama")
        adapters.load(alone, tmp_path / name, name="x")
        assert same(tensors_of(alone, "x"), tensors_of(model, name))
        assert adapters.adapters_of(alone)["x"].sites == adapters.adapters_of(model)[name].sites


@pytest.mark.parametrize("name", [RECORD, CONFIG, WEIGHTS])
def test_one_flipped_bit_is_refused_after_the_folder_was_read(name: str, folder: Path) -> None:
    model = tiny.build("llama")
    adapters.load(model, folder, name="a")
    path = folder / name
    whole = path.read_bytes()
    places = [*random.Random(3).sample(range(len(whole)), 60), *range(0, min(len(whole), 300), 11), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(adapters.DamagedAdapter, match=name):
            adapters.swap(model, "a", folder)
    path.write_bytes(whole)
    adapters.swap(model, "a", folder)


def test_a_memo_makes_once_keeps_the_last_used_and_forgets_what_failed() -> None:
    memo, calls = Memo(limit=10, most=3), []

    def make(text: bytes) -> bytes:
        calls.append(text)
        if text == b"bad":
            raise ValueError
        return text.upper()

    for text in (b"aa", b"aa", b"bb", b"cc", b"aa", b"dd"):  # dd takes the place of bb
        assert memo.get("k", text, make) == text.upper()
    memo.get("k", b"bb", make)
    memo.get("other", b"bb", make)
    assert calls == [b"aa", b"bb", b"cc", b"dd", b"bb", b"bb"]
    for _ in range(2):
        with pytest.raises(ValueError):  # noqa: PT011 - made above
            memo.get("k", b"bad", make)
    memo.get("k", b"x" * 11, make)  # larger than the limit: made, and not kept
    assert calls[-3:] == [b"bad", b"bad", b"x" * 11]
    assert sum(len(text) for text, _ in memo.kinds["k"]) <= 10


def test_frozen_json_can_be_copied_written_and_not_changed() -> None:
    value = freeze({"a": [1, {"b": []}], "c": None})
    assert isinstance(value, Frozen)
    assert value["a"] == (1, freeze({"b": []}))
    assert copy.deepcopy(value) is value
    assert pickle.loads(pickle.dumps(value)) == value
    assert lines.text({"x": value}) == lines.text({"x": {"a": [1, {"b": []}], "c": None}})
    with pytest.raises(TypeError):
        value["a"] = 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{\n}\n",
        b'{\n"a": 1,\n"a": 2\n}\n',
        b'{\n"b": 1,\n"a": 2\n}\n',
        b'{\n"a": 1,\n\n"b": 2\n}\n',
        b'{\n"a": 1\n"b": 2\n}\n',
        b'{\n"a":1\n}\n',
        b'{\n"a": 1}\n',
        b'{\n"\xc3\xa4": 1\n}\n',
    ],
)
def test_texts_of_another_form_are_none_of_ours(raw: bytes) -> None:
    assert lines.split(raw) is None


def test_a_text_is_read_back() -> None:
    record = {"b": {"x": [1, 2.5, "a\nb,\n\u20ac"]}, "a": None, "digest": ""}
    found = lines.split(lines.text(record))
    assert found is not None
    assert {key: lines.value_of(line) for key, line in found.items()} == record


@pytest.mark.parametrize(
    "line", [b"[1, 2 ]", b"1,", b"1e999", b"NaN", b"[" * 100000, b'{"b": 1, "a": 2}', b"\xff", b"1.0e0"]
)
def test_values_have_one_text(line: bytes) -> None:
    with pytest.raises(adapters.DamagedAdapter, match="canonical"):
        lines.value_of(line)


# ---- safetensors files as views of one buffer


def stored(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    raw: bytes = save(tensors, metadata)
    return raw


def file_of(raw: bytes | bytearray) -> weights.File:
    start = 8 + int.from_bytes(raw[:8], "little")
    return weights.File(bytes(raw[:start]), torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8))


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it() -> None:
    from safetensors.torch import load

    torch.manual_seed(0)
    kinds = [*weights.DTYPES.values(), torch.bool, torch.float8_e4m3fn]
    tensors = {f"{i}.{j}": torch.randn(3, 5)[:j].to(kind) for i, kind in enumerate(kinds) for j in range(3)}
    tensors["scalar"] = torch.tensor(3.0)
    for few in (tensors, {key: t for key, t in tensors.items() if t.dtype in weights.DTYPES.values()}, {}):
        for metadata in (None, {"format": "pt"}):
            raw = stored(few, metadata)
            for _ in range(2):  # by safetensors' own reader, then by the header's layout
                found = weights.parse(raw)
                expected = load(raw)
                assert found.keys() == expected.keys()
                for key, tensor in expected.items():
                    assert found[key].dtype == tensor.dtype
                    assert found[key].shape == tensor.shape
                    assert torch.equal(found[key].float(), tensor.float())


def test_a_known_header_does_not_excuse_a_file_of_another_length() -> None:
    raw = stored({"a": torch.ones(4), "b": torch.ones(2).bfloat16()})
    weights.parse(raw)
    for wrong in (raw[:-1], raw + b"\0", raw[:40], raw[:8], raw[:5], b"", b"\xff" * 8 + raw[8:]):
        with pytest.raises(adapters.DamagedAdapter, match="truncated or damaged"):
            weights.parse(wrong)


def test_values_that_are_not_finite_are_named() -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float8_e5m2):
        tensors = {"a": torch.ones(4), "b": torch.ones(3).to(kind), "c": torch.ones(2, dtype=torch.int64)}
        for value in (float("nan"), float("inf"), -float("inf")):
            raw = bytearray(stored({**tensors, "b": torch.tensor([1.0, value, 1.0]).to(kind)}))
            with pytest.raises(adapters.DamagedAdapter, match="tensor b holds"):
                weights.unpack(file_of(raw)).require_finite()
        weights.unpack(file_of(stored(tensors))).require_finite()


# ---- folders kept in memory


@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck", "prefix"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_bundle_stands_for_its_folder(tmp_path: Path, method: str, trainable: bool) -> None:
    folder = saved(tmp_path / "fr", 0, method)
    bundle = adapters.read(folder)
    kept = {key: tensor.clone() for key, tensor in bundle.tensors.items()}
    model, other, direct = tiny.build("llama"), tiny.build("llama"), tiny.build("llama")
    report = adapters.load(model, bundle, trainable=trainable)
    adapters.load(other, bundle, name="x", trainable=True)
    assert report == adapters.load(direct, folder, trainable=trainable)
    assert torch.equal(logits(model), logits(direct))
    assert same(tensors_of(model, "fr"), kept)
    with torch.no_grad():  # training one changes neither the bundle nor the others
        for tensor in tensors_of(other, "x").values():
            tensor.add_(1)
    assert same(tensors_of(model, "fr"), kept)
    assert all(torch.equal(bundle.tensors[key], kept[key]) for key in kept)
    adapters.swap(other, "x", bundle)
    assert same(tensors_of(other, "x"), kept)
    assert repr(bundle).startswith("Bundle('fr', ")
    assert len(repr(bundle)) < 300


def test_a_bundle_of_a_folder_that_is_gone_still_loads(folder: Path) -> None:
    bundle = adapters.read(folder)
    for path in folder.iterdir():
        path.write_bytes(b"gone")
    model = tiny.build("llama")
    assert adapters.load(model, bundle).folder == str(folder)
    again = pickle.loads(pickle.dumps(bundle))
    adapters.load(model, again, name="b")
    assert same(tensors_of(model, "b"), tensors_of(model, "fr"))


def test_a_bundle_is_checked_against_each_base(folder: Path) -> None:
    bundle = adapters.read(folder)
    adapters.load(tiny.build("llama"), bundle)
    wrong = tiny.build("llama", seed=1)
    with pytest.raises(adapters.WrongBase):
        adapters.load(wrong, bundle)
    assert "by force" in adapters.load(wrong, bundle, force="wrong-base").base


def test_a_bundle_that_was_spoilt_in_memory_is_refused(folder: Path) -> None:
    bundle = adapters.read(folder)
    model = tiny.build("llama")
    adapters.load(model, bundle)
    old = logits(model)
    key = list(bundle.tensors)[-1]
    bundle.tensors[key].view(-1)[0] = float("nan")
    with pytest.raises(adapters.DamagedAdapter, match=f"{key}.* not finite"):
        adapters.swap(model, "fr", bundle)
    assert torch.equal(logits(model), old)
    bundle.tensors[key].view(-1)[0] = 0.5
    adapters.swap(model, "fr", bundle)
    assert tensors_of(model, "fr")[key].reshape(-1)[0] == 0.5


def test_reading_refuses_what_loading_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(adapters.AdapterError, match="no adapter"):
        adapters.read(tmp_path / "nowhere")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(adapters.DamagedAdapter, match=WEIGHTS):
        adapters.read(folder)
    (folder / RECORD).unlink()
    with pytest.raises(adapters.AdapterError, match=r"written by PEFT .*adapters\.load"):
        adapters.read(folder)


def test_a_peft_folder_is_read_with_its_model(folder: Path) -> None:
    (folder / RECORD).unlink()
    model = tiny.build("llama")
    bundle = adapters.read(folder, model)
    report = adapters.load(model, bundle, name="x")
    assert "could not be checked" in report.base
    assert any("PEFT" in note for note in report.notes)
    assert same(tensors_of(model, "x"), bundle.tensors)


def test_only_an_adapters_files_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "optimizer.pt").write_bytes(b"a large file of someone else's")
    asked: list[str] = []
    get, into = commit.View.__getitem__, commit.View.into
    monkeypatch.setattr(commit.View, "__getitem__", lambda view, name: (asked.append(name), get(view, name))[1])
    monkeypatch.setattr(commit.View, "into", lambda view, name, *b: (asked.append(name), into(view, name, *b))[1])
    adapters.read(folder)
    assert set(asked) == {RECORD, CONFIG, WEIGHTS}
    (folder / RECORD).unlink()
    asked.clear()
    adapters.read(folder, tiny.build("llama"))
    assert set(asked) == {CONFIG, WEIGHTS}


# ---- swapping without checks


def test_without_checks_only_the_structure_is_looked_at(tmp_path: Path) -> None:
    model = tiny.build("llama")
    adapters.load(model, saved(tmp_path / "old"), name="a")
    new = saved(tmp_path / "new", seed=5)
    raw = bytearray((new / WEIGHTS).read_bytes())
    raw[-4:] = b"\0\0\xc0\x7f"  # NaN, and a digest that does not fit
    (new / WEIGHTS).write_bytes(raw)
    with pytest.raises(adapters.DamagedAdapter, match="digest"):
        adapters.swap(model, "a", new)
    in_place(model)
    report = adapters.swap(model, "a", new, check=False)
    assert report.base.startswith("not checked")
    assert "base: not checked, as asked" in str(report)
    assert sum(int(tensor.isnan().sum()) for tensor in tensors_of(model, "a").values()) == 1


def test_without_checks_damage_to_the_structure_is_still_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    adapters.load(model, saved(tmp_path / "old"), name="a")
    old = logits(model)
    new = saved(tmp_path / "new", seed=5)
    whole = {name: (new / name).read_bytes() for name in (RECORD, WEIGHTS)}
    for name, damaged in [
        (WEIGHTS, whole[WEIGHTS][:-1]),
        (WEIGHTS, whole[WEIGHTS].replace(b"[", b"{", 1)),
        (RECORD, whole[RECORD][:-1]),
        (RECORD, whole[RECORD].replace(b'"n_in": 64', b'"n_in": "x"', 1)),
        (RECORD, whole[RECORD].replace(b'"shape": [8', b'"shape": [9', 1)),
        (RECORD, whole[RECORD].replace(b'"rank": 8', b'"rank": 0', 1)),
    ]:
        assert damaged != whole[name]
        (new / name).write_bytes(damaged)
        with pytest.raises(adapters.AdapterError):
            adapters.swap(model, "a", new, check=False)
        (new / name).write_bytes(whole[name])
    (new / WEIGHTS).unlink()
    with pytest.raises(adapters.DamagedAdapter, match="missing"):
        adapters.swap(model, "a", new, check=False)
    other = tiny.build("qwen3_moe")
    adapters.attach(other, "lora", name="moe")
    adapters.save(other, "moe", tmp_path / "moe")
    with pytest.raises(adapters.AdapterError):
        adapters.swap(model, "a", tmp_path / "moe", check=False)
    assert torch.equal(logits(model), old)


@pytest.mark.parametrize("check", [True, False])
def test_swaps_beside_writers_see_one_whole_adapter(tmp_path: Path, check: bool) -> None:
    made = tiny.build("llama")
    versions: list[dict[str, Tensor]] = []
    for seed in range(3):
        adapters.attach(made, "lora", name=str(seed))
        shake(made, str(seed), seed=seed)
        versions.append({key: tensor.detach().clone() for key, tensor in tensors_of(made, str(seed)).items()})
    adapters.save(made, "0", tmp_path)
    model = tiny.build("llama")
    adapters.load(model, tmp_path, name="a")
    stop = threading.Event()

    def write() -> None:
        for seed in itertools.cycle(range(3)):
            if stop.is_set():
                return
            adapters.save(made, str(seed), tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: set[int] = set()
        swaps = itertools.count()
        while next(swaps) < 40 or (len(seen) < 2 and writer.is_alive()):  # the writer waits for disks, readers do not
            adapters.swap(model, "a", tmp_path, check=check)
            now = tensors_of(model, "a")
            whole = [seed for seed, version in enumerate(versions) if same(now, version)]
            assert len(whole) == 1
            seen.add(whole[0])
    finally:
        stop.set()
        writer.join()
    assert len(seen) > 1
