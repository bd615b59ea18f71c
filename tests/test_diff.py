"""Comparing adapters, and combining their folders without a model, from Python and from the command line."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from laws import output, relative, shake
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import adapters
from adapters import AdapterError
from adapters._attach import base_weight, tensors_of
from adapters._attach.weights import by_site
from adapters.cli import app

runner = CliRunner()
A, B = {"rank": 4, "alpha": 6.0}, {"rank": 6, "alpha": 5.0, "rank_pattern": {"mlp.*": 3}}


def model(name: str = "llama", seed: int = 0, **named: dict[str, Any]) -> Any:
    """A tiny model with shaken adapters."""
    made = tiny.build(name, seed=seed)
    torch.manual_seed(3)
    for number, (label, options) in enumerate(named.items()):
        adapters.attach(made, name=label, **{"method": "lora", **options})
        shake(made, label, seed=17 + number, noise=0.3)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of adapters on one base, and of one on another."""
    folder = tmp_path_factory.mktemp("saved")
    made = model(
        a=A,
        b=B,
        p={"method": "prefix"},
        n={"method": "bottleneck"},
        q={**A, "targets": ["mlp.*"]},
        e={**A, "targets": ["*.0.mlp.*", "attention.query"], "bias": True},
    )
    for name in adapters.adapters_of(made):
        adapters.save(made, name, folder / name)
    deeper = LlamaForCausalLM(LlamaConfig(**{**made.config.to_dict(), "num_hidden_layers": 3})).eval()
    adapters.attach(deeper, name="deep", rank=2)
    adapters.save(deeper, "deep", folder / "deep")
    other = model(seed=1, x=A)
    adapters.save(other, "x", folder / "x")
    return folder


def run(*words: Any) -> Any:
    return runner.invoke(app, [str(word) for word in words])


def changes(made: Any, name: str) -> dict[str, torch.Tensor]:
    adapter, held = adapters.adapters_of(made)[name], by_site(tensors_of(made, name))
    found = {}
    for site in adapter.sites:
        dense = base_weight(made, site).dense().detach().double()
        p = {key: tensor.detach().double() for key, tensor in held[site.path].items()}
        found[site.path] = adapter.method.at(site).weight(dense, p) - dense
    return found


# diff


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_number_is_that_of_the_dense_changes(name: str) -> None:
    made = model(name, a=A, b=B)
    report = adapters.diff((made, "a"), (made, "b"))
    a, b = changes(made, "a"), changes(made, "b")
    assert {site.path for site in report.sites} == set(a)
    for site in report.sites:
        x, y = a[site.path], b[site.path]
        assert site.size_a == pytest.approx(float(x.norm()), rel=1e-5)
        assert site.size_b == pytest.approx(float(y.norm()), rel=1e-5)
        assert site.difference == pytest.approx(float((x - y).norm()), rel=1e-5)
        assert site.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
        for found, chance, turned in (
            (site.outputs, site.chance_outputs, lambda w: w),
            (site.inputs, site.chance_inputs, lambda w: w.mT),
        ):
            overlaps, n = [], turned(x).shape[-2]
            for p, q in zip(*(turned(w).reshape(-1, *turned(w).shape[-2:]) for w in (x, y)), strict=True):
                u = torch.linalg.svd(p)[0][:, : site.rank_a]
                v = torch.linalg.svd(q)[0][:, : site.rank_b]
                overlaps.append(float((u.mT @ v).square().sum()) / min(site.rank_a, site.rank_b))
            assert found == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-6)
            assert chance == pytest.approx(max(site.rank_a, site.rank_b) / n)
    flat = [torch.cat([held[path].flatten() for path in a]) for held in (a, b)]
    assert report.size_a == pytest.approx(float(flat[0].norm()), rel=1e-5)
    assert report.difference == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5)
    assert report.cosine == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()), abs=1e-6)


def test_an_adapter_differs_from_itself_in_nothing(saved: Path) -> None:
    report = adapters.diff(saved / "a", adapters.read(saved / "a"))
    assert report.cosine == pytest.approx(1.0)
    assert report.difference < 1e-9 * report.size_a
    assert report.outputs == pytest.approx(1.0)
    assert report.inputs == pytest.approx(1.0)
    turned = adapters.diff(saved / "b", saved / "a")
    forth = adapters.diff(saved / "a", saved / "b")
    assert (turned.cosine, turned.size_a, turned.outputs) == pytest.approx((forth.cosine, forth.size_b, forth.outputs))


def test_folders_and_attached_adapters_compare_alike(saved: Path) -> None:
    made = model(a=A, b=B)
    from_folders, live = adapters.diff(saved / "a", saved / "b"), adapters.diff((made, "a"), saved / "b")
    assert from_folders.sites == live.sites
    assert "mlp.down" in str(live)
    assert "all 14 shared sites" in str(live)


def test_sites_of_one_alone_are_listed_and_not_counted(saved: Path) -> None:
    report = adapters.diff(saved / "a", saved / "q")
    alone = [site for site in report.sites if not site.shared]
    assert len(alone) == 8
    assert all(math.isnan(site.size_b) and site.size_a > 0 for site in alone)
    assert report.size_a < adapters.diff(saved / "a", saved / "a").size_a
    assert "8 sites are in one of them only" in str(report)


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "ia3", "dora"])
def test_other_methods_are_compared_by_their_tensors(method: str) -> None:
    made = model(a={"method": method}, b={"method": method})
    report = adapters.diff((made, "a"), (made, "b"))
    a, b = (by_site(tensors_of(made, name)) for name in ("a", "b"))
    for site in report.sites:
        less = 1.0 if method == "ia3" else 0.0
        keys = sorted(a[site.path])
        x, y = (torch.cat([held[site.path][key].detach().double().flatten() - less for key in keys]) for held in (a, b))
        assert site.size_a == pytest.approx(float(x.norm()), rel=1e-6)
        assert site.difference == pytest.approx(float((x - y).norm()), rel=1e-6)
        assert site.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-9)
        assert math.isnan(site.outputs) == (method != "bottleneck")
        if method == "bottleneck":
            u, v = (torch.linalg.qr(held[site.path]["up"].detach().double())[0] for held in (a, b))
            assert site.outputs == pytest.approx(float((u.mT @ v).square().sum()) / 4)
    assert adapters.diff((made, "a"), (made, "a")).cosine == pytest.approx(1.0)


def test_what_does_nothing_yet_has_no_angle() -> None:
    made = tiny.build("llama")
    adapters.attach(made, name="a", rank=2)
    report = adapters.diff((made, "a"), (made, "a"))
    assert (report.size_a, report.difference) == (0, 0)
    assert math.isnan(report.cosine)
    assert math.isnan(report.outputs)
    assert "nan" not in str(report)


def test_heads_and_rows_of_tokens_are_compared_too() -> None:
    made = model("bert_classifier", a=A, b=A)
    heads = [site for site in adapters.diff((made, "a"), (made, "b")).sites if site.role == "head"]
    assert [site.path for site in heads] == ["classifier:head.weight", "classifier:head.bias"]
    assert all(site.shared for site in heads)


def test_what_cannot_be_compared_is_refused_or_said(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"nothing in common.*'a' is a lora and 'p' a prefix"):
        adapters.diff(saved / "a", saved / "p")
    made = model(a=A, d={"method": "dora"})
    with pytest.raises(AdapterError, match=r"no adapter 'aa'.*did you mean 'a'"):
        adapters.diff((made, "aa"), (made, "a"))
    with pytest.raises(AdapterError, match="is no adapter folder"):
        adapters.diff(saved / "nowhere", saved / "a")
    with pytest.raises(AdapterError, match="nothing in common"):
        adapters.diff((made, "a"), (made, "d"))
    assert "the weights are not those" in str(adapters.diff(saved / "a", saved / "x")), "a note: both can be compared"
    larger = LlamaForCausalLM(LlamaConfig(**{**made.config.to_dict(), "intermediate_size": 96})).eval()
    adapters.attach(larger, name="a", rank=4)
    with pytest.raises(AdapterError, match=r"mlp.gate_proj.weight is .* for 'a' and .* different models"):
        adapters.diff((made, "a"), (larger, "a"))
    other = model("bert", a=A)
    adapters.save(other, "a", saved / "bert")
    with pytest.raises(AdapterError, match=r"nothing in common|different models"):
        adapters.diff(saved / "a", saved / "bert")


def test_the_picture_is_whole_and_the_same_each_time(saved: Path, tmp_path: Path) -> None:
    report = adapters.diff(saved / "a", saved / "q")
    first = report.save_picture(tmp_path / "some" / "diff.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert report.save_picture(tmp_path / "again.png").read_bytes() == first
    adapters.diff(saved / "p", saved / "p").save_picture(tmp_path / "p.png")
    assert not list(tmp_path.glob(".*"))


def test_the_picture_shows_every_number() -> None:
    from adapters._algebra.picture import figure, layers

    made = model(a=A, b=B)
    report = adapters.diff((made, "a"), (made, "b"))
    drawn = figure("a and b", report.sites)
    angle, sizes, outputs, _ = drawn.axes[:4]
    shown = [float(text.get_text()) for text in angle.texts]
    assert shown == [pytest.approx(site.cosine, abs=5e-3) for site in sorted(report.sites, key=_as_drawn(report))]
    assert "(by chance" in outputs.get_title(loc="left")
    assert [len(line.get_ydata()) for line in sizes.lines] == [2, 2, 2]
    assert sum(float(y) ** 2 for y in sizes.lines[0].get_ydata()) == pytest.approx(report.size_a**2)
    assert layers(["m.layers.0", "m.layers.1", ""]) == ["0", "1", "-"]
    assert layers(["encoder.0", "decoder.0"]) == ["encoder.0", "decoder.0"]


def _as_drawn(report: adapters.DiffReport) -> Any:
    roles = list(dict.fromkeys(site.role for site in report.sites))
    return lambda site: (roles.index(site.role), site.block)


def test_a_picture_without_matplotlib_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "adapters._algebra.picture", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AdapterError, match="pip install matplotlib"):
        adapters.diff(saved / "a", saved / "b").save_picture("nowhere.png")


def test_diff_from_the_command_line(saved: Path, tmp_path: Path) -> None:
    done = run("diff", saved / "a", saved / "b", "--picture", tmp_path / "d.png")
    assert done.exit_code == 0, done.stderr
    assert "all 14 shared sites" in done.stdout
    assert (tmp_path / "d.png").exists()
    found = json.loads(run("diff", saved / "a", saved / "q", "--json").stdout)
    report = adapters.diff(saved / "a", saved / "q")
    assert found["total"]["cosine"] == pytest.approx(report.cosine)
    assert found["sites"][0]["size_b"] is None, "JSON has no NaN"
    refused = run("diff", saved / "a", saved / "p")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1


# folders


@pytest.mark.parametrize(("how", "more"), [("cat", []), ("svd", ["--rank", 5]), ("ties", ["--density", 0.5])])
def test_folders_combine_as_attached_adapters_do(saved: Path, tmp_path: Path, how: str, more: list[Any]) -> None:
    done = run("compose", tmp_path / "ab", f"{saved}/a=0.3", f"{saved}/b=-0.7", "--how", how, *more)
    assert done.exit_code == 0, done.stderr
    assert "written to" in done.stdout
    made = model(a=A, b=B)
    options = {str(key).removeprefix("--"): value for key, value in zip(more[::2], more[1::2], strict=True)}
    adapters.combine(made, "ab", {"a": 0.3, "b": -0.7}, how, **options)
    fresh = tiny.build("llama")
    report = adapters.load(fresh, tmp_path / "ab")
    assert report.name == "ab"
    assert "the base is the one recorded" in report.base
    for key, tensor in tensors_of(made, "ab").items():
        assert torch.equal(tensors_of(fresh, "ab")[key], tensor), key
    inputs = tiny.inputs(made)
    assert torch.equal(output(fresh, inputs), output(made, inputs))
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "ab").eval()
    assert relative(output(theirs, inputs), output(made, inputs)) < 1e-5
    record = json.loads((tmp_path / "ab" / "adapter.json").read_text())
    assert record["facts"]["combined"]["weights"] == {"a": 0.3, "b": -0.7}, "without a machine's paths"
    assert record["map"] == json.loads((saved / "a" / "adapter.json").read_text())["map"]
    assert "written by adapters" in (tmp_path / "ab" / "README.md").read_text()


def test_folders_of_other_targets_and_other_methods(saved: Path, tmp_path: Path) -> None:
    inputs = tiny.inputs(tiny.build("llama"))
    for first, second in (("b", "q"), ("q", "b"), ("q", "e"), ("e", "q"), ("e", "b")):
        words = [tmp_path / f"{first}{second}", f"{saved}/{first}=1", f"{saved}/{second}=2", "--json", "--name", "both"]
        found = json.loads(run("compose", *words).stdout)
        assert found["weights"] == {first: 1.0, second: 2.0}
        assert found["error"] < 1e-6
        made, theirs = tiny.build("llama"), peft.PeftModel.from_pretrained(tiny.build("llama"), words[0]).eval()
        adapters.load(made, words[0])
        assert list(adapters.adapters_of(made)) == ["both"]
        assert relative(output(theirs, inputs), output(made, inputs)) < 1e-5
    assert run("compose", tmp_path / "nn", f"{saved}/n=1", f"{saved}/n/../n=2").exit_code == 1
    done = run("compose", tmp_path / "n2", f"{saved}/n=2")
    assert done.exit_code == 0, done.stderr
    fresh = tiny.build("llama")
    adapters.load(fresh, tmp_path / "n2")
    made = model(n={"method": "bottleneck"})
    y = output(made, inputs)
    adapters.combine(made, "n2", {"n": 2.0})
    assert tensors_of(made, "n2").keys() == tensors_of(fresh, "n2").keys()
    assert not torch.equal(output(made, inputs), y)


def test_a_head_goes_into_the_folder_and_out_of_the_record_of_the_base(tmp_path: Path) -> None:
    made = model("bert_classifier", a=A, c={**A, "head": False})
    for name in ("a", "c"):
        adapters.save(made, name, tmp_path / name)
    for order in (("a", "c"), ("c", "a")):
        parts = [f"{tmp_path}/{name}=0.5" for name in order]
        done = run("compose", tmp_path / "both", *parts)
        assert done.exit_code == 0, done.stderr
        fresh = tiny.build("bert_classifier")
        assert "the base is the one recorded" in adapters.load(fresh, tmp_path / "both").base
        adapters.combine(made, f"both {order}", dict.fromkeys(order, 0.5))
        inputs = tiny.inputs(made)
        assert relative(output(fresh, inputs), output(made, inputs)) < 1e-6
        theirs = peft.PeftModel.from_pretrained(tiny.build("bert_classifier"), tmp_path / "both").eval()
        assert relative(output(theirs, inputs), output(made, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a=0.5", "x=0.5"], "made for different bases: the weights are not those"),
        (["a=0.5", "deep=0.5"], "only one of the recorded bases has model.layers.2."),
        (["a=0.5", "p=0.5"], "different methods"),
        (["a"], "is not FOLDER=WEIGHT"),
        (["a=much"], "is not FOLDER=WEIGHT"),
        (["a=nan"], "finite"),
        (["a=1", "a=2"], "given twice"),
        (["nowhere=1"], "no adapter folder"),
        (["a=1", "b=1", "--how", "sdv"], "did you mean 'svd'"),
        (["out=1", "b=1"], "is one of the adapters to combine"),
    ],
)
def test_refusals_write_nothing(saved: Path, tmp_path: Path, words: list[str], sentence: str) -> None:
    parts = [str(saved / word) if word[0] != "-" and "sdv" not in word else word for word in words]
    parts = [str(tmp_path / "out=1") if word == "out=1" else part for word, part in zip(words, parts, strict=True)]
    done = run("compose", tmp_path / "out", *parts)
    assert done.exit_code == 1, done.output
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bases_are_recognised_across_formats(saved: Path, tmp_path: Path) -> None:
    for label, change in (
        ("bf16", lambda base: base.to(torch.bfloat16)),
        ("nf4", lambda base: adapters.quantize(base, "nf4", compute_dtype=torch.float32)),
    ):
        base = tiny.build("llama")
        change(base)
        adapters.attach(base, "lora", name=label)
        shake(base, label)
        adapters.save(base, label, tmp_path / label)
        done = run("compose", tmp_path / f"with {label}", f"{saved}/a=0.5", f"{tmp_path}/{label}=0.5")
        assert done.exit_code == 0, done.stderr


def test_a_pending_save_and_a_foreign_card_are_respected(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "README.md").write_text("mine")
    (tmp_path / "ab" / "optimizer.pt").write_bytes(b"kept")
    assert run("compose", tmp_path / "ab", f"{saved}/a=0.5", f"{saved}/b=0.5").exit_code == 0
    assert (tmp_path / "ab" / "README.md").read_text() == "mine"
    assert (tmp_path / "ab" / "optimizer.pt").read_bytes() == b"kept"
    assert adapters.inspect(tmp_path / "ab").parameters > 0
