"""Adapter folders: what was saved comes back exactly, and everything that is damaged or foreign is refused."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from laws import shake
from torch import Tensor, nn

import adapters
from adapters._attach import tensors_of
from adapters._sites import site_of, site_record
from adapters._store import hub, lines
from adapters._store.bundle import CARD, CONFIG, PARTS, RECORD, WEIGHTS

METHODS = ["lora", "qlora", "dora", "ia3", "bottleneck", "prefix"]


def adapted(name: str = "llama", method: str = "lora", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model: nn.Module = tiny.build(name, dtype)
    if method == "qlora":
        adapters.quantize(model, "nf4")
    adapters.attach(model, method, name="fr.v2", **options)
    shake(model, "fr.v2")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapters.save(adapted(), "fr.v2", tmp_path / "fr", facts={"steps": 60, "loss": 0.5})
    return tmp_path / "fr"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(model)).logits
    return found


def refused(folder: Path, match: str, kind: type[Exception] = adapters.DamagedAdapter, name: str = "llama") -> None:
    """Loading and swapping are refused in one sentence, and leave the model as it was."""
    model = tiny.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(kind, match=match) as caught:
        adapters.load(model, folder, name="x")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert adapters.adapters_of(model) == {}
    assert type(model).__call__ is nn.Module.__call__
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_classifier", "qwen3_moe"])
def test_a_saved_adapter_comes_back_exactly(name: str, method: str, tmp_path: Path) -> None:
    model = adapted(name, method)
    report = adapters.save(model, "fr.v2", tmp_path)
    assert report.files == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    fresh = tiny.build(name)
    if method == "qlora":
        adapters.quantize(fresh, "nf4")
    loaded = adapters.load(fresh, tmp_path, trainable=True)
    assert loaded.name == "fr.v2"
    assert loaded.parameters == report.parameters
    assert torch.equal(logits(fresh), logits(model))
    before, after = tensors_of(model, "fr.v2"), tensors_of(fresh, "fr.v2")
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) and after[key].requires_grad for key in before)
    old, new = adapters.adapters_of(model)["fr.v2"], adapters.adapters_of(fresh)["fr.v2"]
    assert (old.method, old.sites, old.head) == (new.method, new.sites, new.head)
    assert adapters.inspect(tmp_path).parameters == report.parameters


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16, "nf4"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_the_right_base_is_accepted_in_every_format(saved: torch.dtype, live: Any, tmp_path: Path) -> None:
    adapters.save(adapted(dtype=saved), "fr.v2", tmp_path)
    model = tiny.build("llama") if live == "nf4" else tiny.build("llama", live)
    if live == "nf4":
        adapters.quantize(model, "nf4")
    assert "the base is the one recorded" in adapters.load(model, tmp_path).base


def test_the_wrong_base_is_refused_and_loads_only_by_name(folder: Path) -> None:
    def build(change: Callable[[Any], object]) -> Any:
        model = tiny.build("llama")
        with torch.no_grad():
            change(model)
        return model

    def tune(model: Any) -> None:
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter))

    wrong = [
        tiny.build("llama", seed=1),
        build(tune),
        build(lambda model: setattr(model.model, "layers", model.model.layers[:1])),
        tiny.build("qwen3"),
        tiny.build("bert"),
    ]
    for model in wrong:
        before = logits(model)
        with pytest.raises(adapters.WrongBase, match=r"force='wrong-base'") as caught:
            adapters.load(model, folder)
        assert "\n" not in str(caught.value)
        assert adapters.adapters_of(model) == {}
        assert torch.equal(logits(model), before)
    assert "by force" in adapters.load(wrong[0], folder, force="wrong-base").base
    with pytest.raises(adapters.AdapterError, match="wrong-base"):
        adapters.load(tiny.build("llama"), folder, force="yes")  # type: ignore[arg-type]
    with pytest.raises(adapters.AdapterError):
        adapters.load(wrong[4], folder, force="wrong-base")
    assert adapters.adapters_of(wrong[4]) == {}


@pytest.mark.parametrize("method", METHODS)
def test_force_stops_at_sites_of_another_size(method: str, tmp_path: Path) -> None:
    adapters.save(adapted(method=method), "fr.v2", tmp_path)
    config = tiny.build("llama").config.to_dict()
    wider = type(tiny.build("llama"))(
        type(tiny.build("llama").config)(**{**config, "hidden_size": 128, "head_dim": 32})
    )
    with pytest.raises(adapters.AdapterError, match="of the size"):
        adapters.load(wider, tmp_path, force="wrong-base")
    assert adapters.adapters_of(wider) == {}


@pytest.mark.parametrize("name", [RECORD, CONFIG, WEIGHTS])
def test_one_flipped_bit_anywhere_is_refused(name: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    positions = random.Random(7).sample(range(len(whole)), 120)
    header = range(0, min(len(whole), 400), 7)  # lengths, names and padding sit at the front
    for position in [*positions, *header, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(adapters.DamagedAdapter, match=name):
            adapters.inspect(folder)
    refused(folder, name)


@pytest.mark.parametrize("name", [RECORD, CONFIG, WEIGHTS])
def test_truncated_and_missing_files_are_refused(name: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    for length in (0, 1, 7, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, name)
    path.write_bytes(whole + b"\0")
    refused(folder, name)
    path.unlink()
    if name != RECORD:  # without our record it is a PEFT folder
        refused(folder, f"{name} is missing")


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes a folder and gives it digests that fit again: what is refused then is refused for its content."""
    found = json.loads((folder / RECORD).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(found, tensors)
    weights = safetensors.torch.save(tensors)
    (folder / WEIGHTS).write_bytes(weights)
    found["files"][WEIGHTS] = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    found["digest"] = hashlib.sha256(lines.text({**found, "digest": ""})).hexdigest()
    (folder / RECORD).write_bytes(lines.text(found))


def first(tensors: dict[str, Tensor]) -> str:
    return sorted(tensors)[0]


def rename_site_field(found: dict[str, Any], _: object) -> None:
    found["sites"][0]["path_"] = found["sites"][0].pop("path")


FORGERIES: list[tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = [
    ("missing tensor", lambda f, t: t.pop(first(t)), "lacks the tensor"),
    ("extra tensor", lambda f, t: t.update(more=torch.ones(1)), "unknown tensor more"),
    ("nan", lambda f, t: t[first(t)].view(-1)[:1].fill_(float("nan")), "not finite"),
    ("infinity", lambda f, t: t[first(t)].view(-1)[-1:].fill_(float("inf")), "not finite"),
    ("shape", lambda f, t: t.update({first(t): torch.ones(3, 3)}), "another shape or type"),
    ("dtype", lambda f, t: t.update({first(t): t[first(t)].half()}), "another shape or type"),
    ("format", lambda f, t: f.update(format=4), "format '4'; this version reads formats up to 3"),
    ("map", lambda f, t: f["map"]["weights"][0].pop("role"), "does not know"),
    ("no format", lambda f, t: f.pop("format"), "format"),
    ("extra field", lambda f, t: f.update(run="x"), "canonical"),
    ("traversal", lambda f, t: f["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "other files"),
    ("method", lambda f, t: f["method"].update(name="lorra"), "no method 'lorra'"),
    ("hyperparameter", lambda f, t: f["method"]["fields"].update(tau=1), "does not know .* tau"),
    ("rank", lambda f, t: f["method"]["fields"].update(rank=0), "rank is 0"),
    ("site", rename_site_field, "site"),
    ("site type", lambda f, t: f["sites"][0].update(n_in="64"), "n_in"),
    ("site kind", lambda f, t: f["sites"][0].update(kind="door"), "site"),
    ("other site", lambda f, t: f["sites"].pop(), "none of its sites"),
    ("head", lambda f, t: f.update(head=["model.norm"]), "model.norm"),
    ("base", lambda f, t: f["base"].update(parameters=3), "base"),
]


@pytest.mark.parametrize(("change", "match"), [entry[1:] for entry in FORGERIES], ids=[entry[0] for entry in FORGERIES])
def test_a_folder_whose_digests_fit_is_still_read_strictly(folder: Path, change: Any, match: str) -> None:
    forge(folder, lambda f, t: None)
    adapters.inspect(folder)
    forge(folder, change)
    refused(folder, match, adapters.AdapterError)


def test_keys_that_occur_twice_and_odd_numbers_are_refused(folder: Path) -> None:
    text = (folder / RECORD).read_text()
    for old, new in [('{\n"base"', '{\n"digest": "",\n"base"'), ('"loss": 0.5', '"loss": NaN'), ("0.5", "1e999")]:
        assert old in text
        (folder / RECORD).write_text(text.replace(old, new, 1))
        refused(folder, RECORD)
    (folder / RECORD).write_text("[" * 100000)
    refused(folder, RECORD)


def test_only_our_own_files_are_replaced(folder: Path) -> None:
    mine = "# my notes"
    (folder / CARD).write_text(mine)
    (folder / "optimizer.pt").write_bytes(b"state")
    report = adapters.save(adapted(method="prefix"), "fr.v2", folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD, CONFIG, RECORD, WEIGHTS, "optimizer.pt"])
    assert (folder / CARD).read_text() == mine
    assert any(CARD in note for note in report.notes)
    assert adapters.inspect(folder).method == "prefix"


def test_saving_in_16_bits_is_said(tmp_path: Path) -> None:
    model = adapted()
    report = adapters.save(model, "fr.v2", tmp_path, dtype="bf16")
    assert "rounded from float32 to bfloat16." in report.notes
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path, name="fr")
    for key, tensor in tensors_of(fresh, "fr").items():
        assert torch.equal(tensor.float(), tensors_of(model, "fr.v2")[key].bfloat16().float())
    with pytest.raises(adapters.AdapterError, match="did you mean 'float16'"):
        adapters.save(model, "fr.v2", tmp_path, dtype="flaot16")


def test_what_cannot_be_saved_is_refused_and_the_old_stays(folder: Path) -> None:
    model = adapted()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(adapters.AdapterError, match=r"no adapter 'fr' .* Attached: fr\.v2"):
        adapters.save(model, "fr", folder)
    with torch.no_grad():
        next(iter(tensors_of(model, "fr.v2").values())).view(-1)[0] = float("nan")
    with pytest.raises(adapters.AdapterError, match="not finite"):
        adapters.save(model, "fr.v2", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_swap_is_all_or_nothing(folder: Path, tmp_path: Path) -> None:
    model = adapted()
    shake(model, "fr.v2", seed=3)
    adapters.save(model, "fr.v2", tmp_path / "new")
    expected = logits(model)
    fresh = tiny.build("llama")
    adapters.load(fresh, folder)
    old = logits(fresh)
    damaged = tmp_path / "new" / WEIGHTS
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(adapters.DamagedAdapter, match=WEIGHTS):
        adapters.swap(fresh, "fr.v2", tmp_path / "new")
    assert torch.equal(logits(fresh), old)
    damaged.write_bytes(whole)
    adapters.swap(fresh, "fr.v2", tmp_path / "new")
    assert torch.equal(logits(fresh), expected)
    with pytest.raises(adapters.AdapterError, match="no adapter 'de'"):
        adapters.swap(fresh, "de", folder)


def test_places_that_hold_no_adapter(tmp_path: Path, folder: Path) -> None:
    model = tiny.build("llama")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere", folder / WEIGHTS):
        with pytest.raises(adapters.AdapterError, match="no adapter"):
            adapters.load(model, place)
    adapters.load(model, folder)
    with pytest.raises(adapters.AdapterError, match="attached already"):
        adapters.load(model, folder)


def test_a_hub_id_fetches_only_our_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert adapters.inspect("org/name").name == "fr.v2"
    ours = [WEIGHTS, CONFIG, RECORD, CARD, PARTS, "adapter_model.bin", *hub.NAMES, "part-*/*"]
    assert asked == {"repository": "org/name", "revision": None, "patterns": ours}
    adapters.inspect("hub:org/name@v2")
    assert asked == {"repository": "org/name", "revision": "v2", "patterns": ours}


def test_the_record_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    model = adapted()
    model.config._name_or_path = str(tmp_path / "base")  # type: ignore[union-attr]
    adapters.save(model, "fr.v2", tmp_path / "a")
    model.config._name_or_path = "org/base"  # type: ignore[union-attr]
    adapters.save(model, "fr.v2", tmp_path / "b")
    for name in (RECORD, CONFIG, CARD):
        assert str(tmp_path) not in (tmp_path / "a" / name).read_text()
        assert "org/base" in (tmp_path / "b" / name).read_text()
    info = adapters.inspect(tmp_path / "b")
    assert info.base["name"] == "org/base"
    assert "LlamaForCausalLM" in str(info)


def test_save_pretrained_writes_the_adapters_only(tmp_path: Path) -> None:
    model = adapted()
    adapters.attach(model, "prefix", name="default", length=2)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert adapters.inspect(tmp_path).name == "default"
    assert adapters.inspect(tmp_path / "fr.v2").method == "lora"
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_sites_survive_their_record(name: str) -> None:
    found = adapters.sites(tiny.build(name))
    for site in [*found.weights, *found.streams, *found.keyvalues]:
        assert site_of(json.loads(json.dumps(site_record(site)))) == site


def test_folders_of_the_earlier_formats_are_read(folder: Path) -> None:
    whole = json.loads((folder / RECORD).read_text())
    assert whole["format"] == 3
    models = []
    oldest, older = ("map", "tokens"), ("tokens",)  # what the first and the second format had not
    for number, without in ((3, ()), (2, older), (1, oldest)):

        def change(f: dict[str, Any], t: dict[str, Tensor], number: int = number, without: Any = without) -> None:
            f.update(format=number)
            for field in without:
                f.pop(field, None)

        forge(folder, change)
        models.append(tiny.build("llama"))
        adapters.load(models[-1], folder, name="fr")
        adapters.activate(models[-1], "fr")
    assert torch.equal(logits(models[1]), logits(models[0]))
    assert torch.equal(logits(models[2]), logits(models[0]))
    assert not torch.equal(logits(models[1]), logits(tiny.build("llama")))
    forge(folder, lambda f, t: f.update(map=whole["map"]))  # which that format did not have
    refused(folder, "canonical")
