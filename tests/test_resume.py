"""Recipes that die and are resumed: the adapter is, bit for bit, that of the run that nobody disturbed."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from deaths import die, watch_files
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import adapters
from adapters._errors import AdapterError
from adapters.cli import app
from adapters.train import newest_checkpoint, read_recipe
from adapters.train.remembered import Learned
from adapters.train.run import train
from adapters.train.unfinished import RECORD


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, rows, and a recipe over both."""
    folder = tmp_path_factory.mktemp("resume")
    small.recipe(folder, small.base(folder / "base"), small.lines(folder / "rows.jsonl", small.rows()))
    return folder


def run(place: Path, output: Path, *settings: str, **how: bool) -> str:
    """Trains the recipe, and returns what it printed."""
    console = Console(file=io.StringIO(), width=200)
    train(read_recipe(place / "recipe.yaml", settings=settings), output, console, **how)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def forked(before: Callable[[], Any], after: Callable[[], Any], *args: Any, **kwargs: Any) -> int:
    """`run` in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            before()
            run(*args, **kwargs)
            after()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def learned(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors, and what its record says of training but for where it was resumed."""
    facts = dict(adapters.inspect(output).training)
    facts.pop("resumed_from")
    return load_file(output / "adapter_model.safetensors"), facts


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], int]:
    """The undisturbed run, and how many times it wrote to its folder of checkpoints."""
    output, counted = place / "whole", place / "events"
    count = [0]

    def before() -> None:
        watch_files(output / "checkpoints", count, None)

    assert forked(before, lambda: counted.write_text(str(count[0])), place, output) == 0
    assert not (output / "checkpoints").exists()
    return *learned(output), int(counted.read_text())


@pytest.mark.parametrize("share", [0.45, 0.7, 0.85])
def test_a_killed_recipe_resumes_bit_for_bit(share: float, place: Path, whole: Any, tmp_path: Path) -> None:
    tensors, facts, events = whole
    output = tmp_path / "adapter"
    status = forked(lambda: watch_files(output / "checkpoints", [0], int(share * events)), die, place, output)
    assert status == -9
    assert not (output / "adapter_model.safetensors").exists()
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    printed = run(place, output, resume=True)
    assert f"resuming from step {newest.rpartition('-')[2]}: {newest}" in printed
    again, said = learned(output)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert said == facts
    assert len(facts["losses"]) == 6
    assert facts["learned_tokens"] == len_learned(place)
    assert adapters.inspect(output).training["resumed_from"] == int(newest.rpartition("-")[2])
    assert not (output / "checkpoints").exists()


def len_learned(place: Path) -> int:
    """One epoch of 24 rows, counted by hand: every letter of an answer and its end of turn."""
    report = adapters.inspect(place / "whole").training["rows"]
    assert report["kept"] == 24
    made = small.rows()
    every = sum(len(row["output"]) + 1 for row in made)
    return every - adapters.inspect(place / "whole").training["held_out_rows"]["learned_tokens"]


@pytest.fixture(scope="module")
def died(place: Path) -> Path:
    """A run that died after its checkpoint of step 4."""
    output = place / "died"
    run(place, output, "training.keep_checkpoints=true")
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    return output


@pytest.fixture
def unfinished(died: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(died, tmp_path / "died"))


def test_without_resume_an_unfinished_run_is_refused(place: Path, unfinished: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        run(place, unfinished)
    sentence = str(caught.value)
    assert "checkpoints of a run up to step 4" in sentence
    assert all(word in sentence for word in ("--resume", "--restart", "--output"))
    with pytest.raises(AdapterError, match="one of the two"):
        run(place, unfinished, resume=True, restart=True)
    assert newest_checkpoint(unfinished / "checkpoints") is not None


def test_restart_starts_over(place: Path, unfinished: Path, whole: Any) -> None:
    (unfinished / "checkpoints" / "checkpoint-4" / "marker").write_text("")
    printed = run(place, unfinished, "training.keep_checkpoints=true", restart=True)
    assert "starting over" in printed
    assert newest_checkpoint(unfinished / "checkpoints") == str(unfinished / "checkpoints" / "checkpoint-6")
    assert not (unfinished / "checkpoints" / "checkpoint-4" / "marker").exists()
    tensors, _ = learned(unfinished)
    assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)


def test_resuming_nothing_says_so_and_begins(place: Path, tmp_path: Path) -> None:
    printed = run(place, tmp_path / "new", "training.steps=2", resume=True)
    assert (
        f"no complete checkpoint in {tmp_path / 'new' / 'checkpoints'}: training starts from the beginning" in printed
    )
    assert (tmp_path / "new" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.learning_rate=4.0e-3", "training.learning_rate 0.005, and now it is 0.004"),
        ("method.rank=2", "method.rank 4, and now it is 2"),
        ("training.steps=8", "training.steps 6, and now it is 8"),
        ("data.learn=last", "data.learn 'all', and now it is 'last'"),
        ("training.arguments={adam_beta1: 0.8}", "training.arguments.adam_beta1 not set, and now it is 0.8"),
        ("dtype=bfloat16", "dtype not set, and now it is 'bfloat16'"),
    ],
)
def test_a_recipe_that_changed_is_refused_by_the_key(setting: str, said: str, place: Path, unfinished: Path) -> None:
    before = sorted(unfinished.rglob("*"))
    with pytest.raises(AdapterError) as caught:
        run(place, unfinished, setting, resume=True)
    assert said in str(caught.value)
    assert sorted(unfinished.rglob("*")) == before


def test_rows_that_changed_are_refused(place: Path, died: Path, tmp_path: Path) -> None:
    other = tmp_path / "place"
    shutil.copytree(place, other)
    small.lines(place / "rows.jsonl", [{**row, "output": row["output"] + "!"} for row in small.rows()])
    try:
        with pytest.raises(AdapterError, match=r"were made with rows [0-9a-f]{12}, and now it is [0-9a-f]{12}"):
            run(place, other / "died", resume=True)
    finally:
        shutil.copy(other / "rows.jsonl", place / "rows.jsonl")
    (other / "died" / "checkpoints" / RECORD).write_text(json.dumps({}))
    with pytest.raises(AdapterError, match="task not set, and now it is 'instruction'"):
        run(place, other / "died", resume=True)


def test_what_is_only_written_on_the_way_may_change(place: Path, unfinished: Path, whole: Any) -> None:
    run(place, unfinished, "training.save_steps=3", "evaluation.examples=1", resume=True)
    tensors, _ = learned(unfinished)
    assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)


def test_patience_ends_a_run_and_outlives_its_death(place: Path, tmp_path: Path) -> None:
    """At a rate so large that the loss on held-out rows soon rises, however sums are rounded."""
    settings = ["training.eval_steps=1", "training.patience=2", "training.learning_rate=8", "training.steps=20"]
    settings = [*settings, "training.schedule=constant", "training.save_steps=1"]
    output = tmp_path / "adapter"
    run(place, output, *settings, "training.keep_checkpoints=true")
    tensors, facts = learned(output)
    held_out = {int(step): loss for step, loss in facts["held_out_losses"].items()}
    best = min(held_out, key=held_out.__getitem__)
    assert max(held_out) == best + 2 < 20
    kept = output / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert all(torch.equal(load_file(kept)[key], tensors[key]) for key in tensors)
    last = newest_checkpoint(output / "checkpoints")
    assert last is not None
    assert last.endswith(f"-{max(held_out)}")
    run(place, output, *settings, resume=True)  # died after the checkpoint in which it stopped
    again, said = learned(output)
    assert said["held_out_losses"] == facts["held_out_losses"]
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_an_interrupt_says_from_where_to_go_on(
    place: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Learned.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        inner(self, args, state, control, **more)

    monkeypatch.setattr(Learned, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"no adapter was written.* Go on from step 4 with --resume\."):
        run(place, tmp_path / "out")
    monkeypatch.undo()
    recipe = ["train", str(place / "recipe.yaml"), "--output", str(tmp_path / "out"), "--json"]
    refused = CliRunner().invoke(app, recipe)
    assert refused.exit_code == 1
    assert "--restart" in refused.stderr
    done = CliRunner().invoke(app, [*recipe, "--resume"])
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["resumed_from"] == 4
    assert outcome["trained"]["learned"] == whole[1]["learned_tokens"]
    tensors, _ = learned(tmp_path / "out")
    assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)
