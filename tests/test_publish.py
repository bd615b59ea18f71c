"""Publishing and loading through a Hub on this machine, with whatever may go wrong between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub as loopback
import pytest
import tiny
import torch
from laws import shake
from typer.testing import CliRunner

import adapters
from adapters._attach import tensors_of
from adapters._publish.leaks import leaks
from adapters.cli import app

FACTS = {
    "data": "capitals",
    "learned_tokens": 321,
    "scores": {
        "rows": 7,
        "base": {"exact": 0.25},
        "adapted": {"exact": 0.5},
        "interval": [0.1, 0.4],
        "compared": "exact",
    },
    "losses": [3.0, 2.0, 1.5],
    "hardware": "an abacus",
}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[loopback.Hub]:
    with loopback.running(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "fr")


def saved(path: Path, seed: int = 0, **facts: Any) -> Path:
    model = tiny.build("llama")
    adapters.attach(model, "lora", name="fr", rank=3)
    shake(model, "fr", seed=seed)
    adapters.save(model, "fr", path, facts={**FACTS, **facts})
    return path


def publish(folder: Path, **more: Any) -> adapters.PublishReport:
    return adapters.publish(folder, "me/fr", **{"base": "them/tiny", "base_license": "mit", "try_it": False, **more})


def loaded(source: str) -> tuple[Any, adapters.LoadReport]:
    model = tiny.build("llama")
    return model, adapters.load(model, source, name="fr")


def same(model: Any, folder: Path) -> None:
    ours, theirs = tensors_of(model, "fr"), adapters.read(folder).tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_published_is_loaded_again(place: loopback.Hub, folder: Path) -> None:
    report = publish(folder, license="apache-2.0")
    (made,) = place.commits["me/fr"]
    assert report.commit == made
    files = place.commits["me/fr"][made]
    for name in ("adapter.json", "adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (folder / name).read_bytes()
    assert report.files == {name: len(content) for name, content in files.items()}
    for source in ("hub:me/fr", "me/fr", "hub:me/fr@main", f"hub:me/fr@{made}"):
        model, found = loaded(source)
        same(model, folder)
        assert f"fetched from {source}, commit {made}" in str(found)


def test_the_card_says_what_the_record_says(place: loopback.Hub, folder: Path) -> None:
    report = publish(folder, license="apache-2.0")
    card = next(iter(place.commits["me/fr"].values()))["README.md"].decode()
    assert card == report.card
    front = card.split("---")[1]
    for line in ('license: "apache-2.0"', 'base_model: "them/tiny"', "library_name: adapters", '- "lora"'):
        assert line in front
    bundle = adapters.read(folder)
    for line in (
        'print(adapters.load(model, "hub:me/fr"))',
        "| exact | 0.25 | 0.5 |",
        "The change of `exact` lies between 0.1 and 0.4",
        "Of 3 steps, one in 1: 3, 2, 1.5.",
        "| learned_tokens | 321 |",
        "| data_license | not stated |",
        "| hardware | an abacus |",
        "| licence | mit |",
        f"| fingerprint | {bundle.base_digest} |",
        "| weights and layers | 14 |",
        "| rank | 3 |",
        "Stock PEFT: reads this folder, too.",
    ):
        assert line in card, line
    assert (folder / "README.md").read_text() != card  # the folder stays as it was
    assert "training.png" not in card
    (folder / "training.png").write_bytes(b"\x89PNG")
    again = publish(folder, data_license="cc-by-4.0").card
    assert "| data_license | cc-by-4.0 |" in again
    assert "](training.png)" in again
    kept = saved(folder.parent / "kept", data_license="odc-by")
    assert "| data_license | odc-by |" in publish(kept).card


def test_a_dry_run_sends_nothing(place: loopback.Hub, folder: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            "publish",
            str(folder),
            "--to",
            "me/fr",
            "--dry-run",
            "--base",
            "them/tiny",
            "--base-license",
            "mit",
            "--no-try",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "would publish me/fr; nothing was sent" in done.output
    assert "| learned_tokens | 321 |" in done.output
    assert (place.commits, place.sent) == ({}, [])


def test_an_upload_that_is_cut_off_changes_nothing_and_is_gone_on_with(place: loopback.Hub, tmp_path: Path) -> None:
    first = publish(saved(tmp_path / "one"))
    place.breaks = 1000
    with pytest.raises(adapters.AdapterError, match=r"me/fr was not published .*nothing is half there: publish again"):
        publish(saved(tmp_path / "two", seed=1))
    assert list(place.commits["me/fr"]) == [first.commit]
    place.breaks = None
    same(loaded("hub:me/fr")[0], tmp_path / "one")
    second = publish(tmp_path / "two")
    assert list(place.commits["me/fr"]) == [first.commit, second.commit]
    sent = len(place.sent)
    publish(tmp_path / "two")
    assert len(place.sent) == sent  # what is there already is not sent again
    same(loaded("hub:me/fr")[0], tmp_path / "two")


def test_a_download_that_is_cut_off_loads_nothing(place: loopback.Hub, folder: Path) -> None:
    publish(folder)
    place.breaks = 1000
    model = tiny.build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(adapters.AdapterError, match=r"the Hub gave no me/fr: .*; nothing was loaded"):
        adapters.load(model, "hub:me/fr", name="fr")
    assert {name for name, _ in model.named_parameters()} == before.keys()
    assert not adapters.adapters_of(model)
    place.breaks = None
    adapters.load(model, "hub:me/fr", name="fr")
    same(model, folder)


def test_a_file_that_was_changed_is_refused(place: loopback.Hub, folder: Path) -> None:
    publish(folder)
    place.forges = True
    with pytest.raises(adapters.DamagedAdapter, match=r"It was fetched from hub:me/fr: remove .* to fetch it again"):
        loaded("hub:me/fr")


def test_a_digest_that_is_wrong_is_refused(place: loopback.Hub, folder: Path, tmp_path: Path) -> None:
    """The weights of another adapter under this one's record."""
    report = publish(folder)
    files = place.commits["me/fr"][report.commit]
    files["adapter_model.safetensors"] = (saved(tmp_path / "other", seed=5) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(adapters.DamagedAdapter):
        loaded("hub:me/fr")


def test_a_tag_that_moved_is_told_by_its_commit_and_a_commit_stays(place: loopback.Hub, tmp_path: Path) -> None:
    first = publish(saved(tmp_path / "one"))
    second = publish(saved(tmp_path / "two", seed=1))
    place.tags["v1"] = first.commit
    model, found = loaded("hub:me/fr@v1")
    same(model, tmp_path / "one")
    assert f"commit {first.commit}" in str(found)
    place.tags["v1"] = second.commit
    model, found = loaded("hub:me/fr@v1")
    same(model, tmp_path / "two")
    assert f"commit {second.commit}" in str(found)
    same(loaded(f"hub:me/fr@{first.commit}")[0], tmp_path / "one")
    with pytest.raises(adapters.AdapterError, match=r"the Hub gave no me/fr at v2: .*; nothing was loaded"):
        loaded("hub:me/fr@v2")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"rows": "/home/ann/rows.jsonl"}, r"a local path in .* \(/home/ann/rows\.jsonl\)"),
        ({"rows": r"C:\Users\ann\rows.jsonl"}, r"a local path in .*C:"),
        ({"rows": "~/rows.jsonl"}, "a local path"),
        ({"key": "hf_" + "aB3" * 12}, r"a token of the Hub in .* \(hf_aB3…\)"),
        ({"key": "sk-" + "x1" * 20}, "an API key"),
        ({"key": "AKIA" + "A1" * 8}, "a key of AWS"),
        ({"url": "https://ann:secret@host.org/x"}, "a password in an address"),
        ({"key": "-----BEGIN RSA PRIVATE KEY-----"}, "a private key"),
    ],
)
def test_paths_and_secrets_are_not_published(
    facts: dict[str, Any], sentence: str, place: loopback.Hub, tmp_path: Path
) -> None:
    with pytest.raises(adapters.AdapterError, match=f"nothing was published: {sentence}"):
        publish(saved(tmp_path / "fr", **facts))
    assert (place.commits, place.sent) == ({}, [])


def test_harmless_text_is_no_leak() -> None:
    harmless = {
        "adapter.json": json.dumps(
            {"path": "model.layers.0.mlp", "url": "https://host.org/home/page", "a": "1/2", "b": "~5"}
        )
    }
    assert not list(leaks({name: text.encode() for name, text in harmless.items()}))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"base": "them/unlicensed", "base_license": None}, "states no licence on the Hub"),
        ({"base": "them/nowhere", "base_license": None}, "the licence of the base them/nowhere could not be asked for"),
        ({"base": None}, "the record does not name the base"),
    ],
)
def test_a_base_without_a_licence_or_a_name_is_refused(
    more: dict[str, Any], sentence: str, place: loopback.Hub, folder: Path
) -> None:
    place.cards["them/unlicensed"] = {}
    with pytest.raises(adapters.AdapterError, match=sentence):
        publish(folder, **more)
    assert place.commits == {}


def test_the_licence_of_a_base_is_read_from_its_card(place: loopback.Hub, folder: Path) -> None:
    place.cards["them/tiny"] = {"license": "cc-by-4.0"}
    report = publish(folder, base_license=None)
    assert report.license == "cc-by-4.0"
    assert "| licence | cc-by-4.0 |" in report.card


def test_what_is_no_adapter_of_ours_is_refused(place: loopback.Hub, folder: Path) -> None:
    with pytest.raises(adapters.AdapterError, match="'fr' is no repository: give ORG/NAME"):
        adapters.publish(folder, "fr")
    (folder / "adapter.json").unlink()
    with pytest.raises(adapters.AdapterError, match="was not saved by this library"):
        publish(folder)
    assert place.commits == {}


@pytest.mark.real
def test_the_program_of_the_card_is_run(place: loopback.Hub, folder: Path, tmp_path: Path) -> None:
    """On the base that it names: SmolLM2 is not the one of the tiny adapter."""
    with pytest.raises(
        adapters.AdapterError, match="nothing was published: the program of its card fails with WrongBase"
    ):
        adapters.publish(folder, "me/fr", base="smollm2-135m-instruct")
    model, _ = adapters.load_base("smollm2-135m-instruct")
    adapters.attach(model, "lora", name="fr", rank=2)
    adapters.save(model, "fr", tmp_path / "real")
    report = adapters.publish(tmp_path / "real", "me/fr")
    assert "loaded 'fr' (lora) from the folder" in report.ran
    assert report.ran.strip() in report.card
    assert report.license == "apache-2.0"
