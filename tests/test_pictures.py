"""The picture of a run, read off the axes of its figure and compared with what was logged and counted."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy
import pytest
import tiny
import torch
from laws import shake
from torch import nn

import adapters
from adapters._attach import tensors_of
from adapters.train import pictures
from adapters.train.pictures import BLUE, draw, figure, token_counts
from adapters.train.weight_change import Change, by_layer, start_of, weight_changes


def history(steps: int = 6) -> list[dict[str, Any]]:
    """As a trainer logs: an evaluation between the steps, a summary at the end."""
    logged: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        logged.append({"loss": 3.0 / step, "learning_rate": 1e-3 * (steps - step), "grad_norm": 1.0, "step": step})
        if step % 3 == 0:
            logged.append({"eval_loss": 4.0 / step, "eval_runtime": 0.1, "step": step})
    return [*logged, {"train_loss": 1.5, "train_runtime": 2.0, "step": steps}]


def shaken(method: str, name: str = "llama", **options: Any) -> nn.Module:
    model = tiny.build(name)
    adapters.attach(model, method, name="fr", **options)
    return model


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_are_what_was_logged() -> None:
    loss, rate, *_ = figure(history()).axes
    expected = [1, 2, 3, 4, 5, 6], [3.0, 1.5, 1.0, 0.75, 0.6, 0.5]
    assert lines(loss) == {"training": expected, "evaluation": ([3, 6], [4 / 3, 4 / 6])}
    assert loss.get_legend() is not None
    (drawn,) = lines(rate).values()
    assert drawn == ([1, 2, 3, 4, 5, 6], [1e-3 * left for left in (5, 4, 3, 2, 1, 0)])
    for axes in (loss, rate):
        assert (axes.get_xlabel(), bool(axes.get_ylabel()), bool(axes.get_title("left"))) == (
            "optimizer step",
            True,
            True,
        )
    assert loss.get_ylabel() == "loss (nats)"


def test_several_evaluations_and_a_loss_that_is_not_finite() -> None:
    logged = [
        {"loss": 1.0, "step": 1},
        {"loss": math.inf, "step": 2},
        {"loss": 0.5, "step": 3},
        {"eval_de_loss": 2.0, "step": 3},
        {"eval_fr_loss": 3.0, "step": 3},
    ]
    found = lines(figure(logged).axes[0])
    assert set(found) == {"training", "evaluation de", "evaluation fr"}
    steps, values = found["training"]
    assert steps == [1, 2, 3]
    assert values[::2] == [1.0, 0.5]
    assert math.isnan(values[1])
    colours = {line.get_color() for line in figure(logged).axes[0].lines}
    assert len(colours) == 3
    assert BLUE in colours


def test_a_long_run_has_a_running_mean_beside_what_was_logged() -> None:
    logged = [{"loss": float(step % 2), "step": step} for step in range(1, 301)]
    found = lines(figure(logged).axes[0])
    assert found["training"] == ([entry["step"] for entry in logged], [entry["loss"] for entry in logged])
    assert found["mean of 10 logs"][1][9:] == [0.5] * 291


def test_changes_are_those_of_the_weights() -> None:
    """Against the dense definition, for low-rank factors, for a method without any, and for stacks of experts."""
    for method, name in (
        ("lora", "llama"),
        ("dora", "llama"),
        ("ia3", "llama"),
        ("lora", "qwen3_moe"),
        ("lora", "gpt2"),
    ):
        model = shaken(method, name)
        base = {path: p.detach().double() for path, p in tiny.build(name).named_parameters()}
        fresh = weight_changes(model)
        assert max(change.moved / change.size for change in fresh) < 1e-6
        shake(model, "fr")
        found = {change.path: change for change in weight_changes(model)}
        sites = adapters.adapters_of(model)["fr"].sites
        assert list(found) == [site.path for site in sites]
        adapters.merge(model, "fr")
        for path, parameter in model.named_parameters():
            if path not in found:
                continue
            moved, size = (parameter.detach().double() - base[path]).norm(), base[path].norm()
            assert found[path].moved == pytest.approx(float(moved), rel=1e-4), (method, name, path)
            assert found[path].size == pytest.approx(float(size), rel=1e-5)


def test_changes_of_tensors_since_the_start() -> None:
    model = shaken("bottleneck", placement="houlsby")
    assert all(math.isnan(change.relative) for change in weight_changes(model))
    before = start_of(model)
    kept = {key: tensor.detach().clone() for key, tensor in tensors_of(model, "fr").items()}
    assert all(torch.equal(before[key], kept[key]) for key in kept)
    shake(model, "fr")
    found = weight_changes(model, before)
    assert len(found) == 4
    for change in found:
        mine = [key for key in kept if key.startswith(f"{change.path}:")]
        moved = sum(float((tensors_of(model, "fr")[key].detach() - kept[key]).square().sum()) for key in mine) ** 0.5
        size = sum(float(kept[key].square().sum()) for key in mine) ** 0.5
        assert change.relative == pytest.approx(moved / size, rel=1e-5)
    assert start_of(shaken("lora")) == {}


def test_the_map_of_layers() -> None:
    """Two sites of one role in one layer are one cell: 5 of 13 for (3, 4) of (5, 12); absent cells are NaN."""
    changes = [
        Change("a", "m.layers.0", "mlp.up", 3.0, 5.0),
        Change("b", "m.layers.0", "mlp.up", 4.0, 12.0),
        Change("c", "m.layers.1", "mlp.down", 1.0, 4.0),
        Change("d", "", "head", 1.0, 2.0),
    ]
    roles, layers, table = by_layer(changes)
    assert (roles, layers) == (["mlp.up", "mlp.down", "head"], ["0", "1", "-"])
    layer_axes = figure([], changes).axes[2]
    drawn = layer_axes.images[0].get_array()
    for i, row in enumerate([[500 / 13, None, None], [None, 25.0, None], [None, None, 50.0]]):
        for j, value in enumerate(row):
            assert math.isnan(table[i][j]) == (value is None)
            assert drawn[i, j] is numpy.ma.masked if value is None else drawn[i, j] == pytest.approx(value)
    assert [label.get_text() for label in layer_axes.get_yticklabels()] == roles
    assert [label.get_text() for label in layer_axes.get_xticklabels()] == layers
    assert {text.get_text() for text in layer_axes.texts} == {"38", "25", "50"}
    assert layer_axes.images[0].get_cmap().name == "cividis"
    assert "%" in figure([], changes).axes[-1].get_ylabel()


def test_layers_of_several_stacks_are_told_apart() -> None:
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    changes = [Change(block, block, "attention.query", 1.0, 2.0) for block in blocks]
    _, layers, table = by_layer(changes)
    assert len(set(layers)) == 3
    assert layers == ["encoder 0", "encoder 1", "decoder 0"]
    assert table == [[0.5, 0.5, 0.5]]


LENGTHS, LEARNED = [9, 4, 4, 7], [2, 1, 4, 0]


@pytest.mark.parametrize("data", [(LENGTHS, LEARNED), SimpleNamespace(lengths=LENGTHS, learned=LEARNED)])
def test_rows_are_counted(data: Any) -> None:
    axes = figure([], data=data).axes[3]
    bars = {int(bar.get_x()): int(bar.get_height()) for bar in axes.patches if hasattr(bar, "get_height")}
    assert {length: rows for length, rows in bars.items() if rows} == {4: 2, 7: 1, 9: 1}
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["all tokens: 24", "learned: 7 (29.2 %)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens in a row", "rows (of 4)")


def test_tokens_of_rows() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    assert token_counts(rows) == ([3, 1], [2, 0])


def test_what_was_not_given_is_said() -> None:
    texts = [text.get_text() for axes in figure([]).axes for text in axes.texts]
    assert len(texts) == 4
    assert all(text.startswith(("no ", "not ")) for text in texts)
    half = [Change("a", "m.0", "up", 1.0, 2.0), Change("h", "", "head", math.nan, math.nan)]
    assert "grey: no site there, or not measured" in figure([], half).axes[2].get_xlabel()


def test_the_file_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    model = shaken("lora")
    shake(model, "fr")
    first = draw(tmp_path / "a", history(), model, data=(LENGTHS, LEARNED)).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "red", "text.usetex": True, "figure.dpi": 30}):
        second = draw(tmp_path / "b", history(), model, data=(LENGTHS, LEARNED)).read_bytes()
    assert first == second
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"Software" not in first
    assert draw(tmp_path / "c", history(), model, data=(LENGTHS, LENGTHS)).read_bytes() != first
    assert os.listdir(tmp_path / "a") == ["training.png"]


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = draw(tmp_path, history()).read_bytes()

    def full(self: Any, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pictures.FigureCanvasAgg, "print_png", full)
    with pytest.raises(OSError, match="no space left"):
        draw(tmp_path, history(9))
    assert (tmp_path / "training.png").read_bytes() == old
    assert os.listdir(tmp_path) == ["training.png"]


def test_nothing_of_pyplot_is_touched(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from adapters.train.pictures import draw; draw(sys.argv[1], []); "
    code += "print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
