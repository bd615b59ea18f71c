"""Own rows in recipes: how they are parted, learned, scored and shown; the preflight before; the recipes that ship."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import adapters
from adapters._errors import AdapterError
from adapters.cli import app
from adapters.train import course, preparing, read_recipe
from adapters.train.own_rows import read_own
from adapters.train.preflight import Preflight
from adapters.train.recipe import Data
from adapters.train.run import evaluate, examine, train

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruct")
    small.recipe(folder, small.base(folder / "base"), small.lines(folder / "rows.jsonl", small.rows()))
    return folder


def run(place: Path, output: Path, *settings: str) -> tuple[Any, str]:
    console = Console(file=io.StringIO(), width=200)
    outcome = train(read_recipe(place / "recipe.yaml", settings=settings), output, console)
    return outcome, str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Any, str, Path]:
    return *run(place, place / "adapter"), place / "adapter"


def truth(place: Path, rows: list[dict[str, Any]], adapter: Path | None) -> tuple[float, int]:
    """Cross-entropy over the answers and their ends of turn, summed by hand; and how many tokens those are."""
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    if adapter is not None:
        adapters.load(model, adapter)
    total, tokens = 0.0, 0
    for row in rows:
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, row["output"]))
        said.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([asked + said])).logits[0].log_softmax(-1)
        total -= sum(float(chances[len(asked) - 1 + i, token]) for i, token in enumerate(said))
        tokens += len(said)
    return total, tokens


def test_base_and_adapter_are_compared_by_the_loss_on_rows_held_out(place: Path, trained: Any) -> None:
    outcome, printed, folder = trained
    held_out = read_own(Data(str(place / "rows.jsonl"), evaluation=0.2), 6).held_out
    assert outcome.scores.rows == len(held_out) == 6
    for scores, adapter in ((outcome.scores.base, None), (outcome.scores.adapted, folder)):
        total, tokens = truth(place, list(held_out), adapter)
        assert outcome.scores.tokens == tokens
        assert scores["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert scores["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    low, high = outcome.scores.interval
    assert low < outcome.scores.adapted["loss"] - outcome.scores.base["loss"] < high < 0
    assert outcome.equal_answers
    assert outcome.largest_logit_difference == 0
    for row in held_out.select(range(2)):
        assert row["instruction"] in printed
        assert f"right    {row['output']}" in printed
    assert f"{outcome.scores.tokens} learned tokens" in printed
    again = evaluate(read_recipe(place / "recipe.yaml"), folder, Console(quiet=True))
    assert again == outcome.scores


def test_the_record_says_what_was_learned(place: Path, trained: Any) -> None:
    outcome, printed, folder = trained
    facts = adapters.inspect(folder).training
    assert facts["rows"]["kept"] == 24
    assert facts["learned_tokens"] == facts["rows"]["learned_tokens"] == outcome.trained.learned
    assert facts["tokens"] == facts["rows"]["tokens"]
    assert len(facts["losses"]) == 6
    assert facts["losses"][-1] < facts["losses"][0]
    assert facts["preflight"] == {"warnings": []}
    assert facts["watchdog"] == []
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "shape: alpaca" in printed
    assert "preflight: passed of" in printed
    assert "all 28 tensors at 14 sites get a gradient" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.png",
    ]


def test_rows_are_parted_once_and_for_all(tmp_path: Path) -> None:
    path = str(small.lines(tmp_path / "rows.jsonl", small.rows(50)))
    parted = read_own(Data(path, evaluation=0.3), 80)
    training, held_out = ({row["instruction"] for row in part} for part in (parted.training, parted.held_out))
    assert (len(training), len(held_out)) == (35, 15)
    assert not training & held_out
    assert {row["instruction"] for row in read_own(Data(path, evaluation=0.3), 80).held_out} == held_out
    assert len(read_own(Data(path, evaluation=0.3), 4).training) == 46  # what is not held out is trained on
    other = str(small.lines(tmp_path / "other.jsonl", small.rows(9, seed=8)))
    parted = read_own(Data(path, evaluation=other), 5)
    assert (len(parted.training), len(parted.held_out)) == (50, 5)
    assert parted.parted.startswith("the first 5 of 9 rows of ")
    with pytest.raises(AdapterError, match="1 row, of which none can be held out"):
        read_own(Data(str(small.lines(tmp_path / "one.jsonl", small.rows(1)))), 5)
    with pytest.raises(AdapterError, match="there is no file"):
        read_own(Data(str(tmp_path / "none.jsonl")), 5)


def test_plain_text_is_learned_whole(place: Path, tmp_path: Path) -> None:
    texts = small.lines(
        tmp_path / "texts.jsonl", [{"text": f"{row['instruction']} {i}"} for i, row in enumerate(small.rows())]
    )
    outcome, printed = run(place, tmp_path / "out", f"data.path={texts}", "training.steps=2")
    assert "shape: text" in printed
    rows = adapters.inspect(tmp_path / "out").training["rows"]
    assert rows["learned_tokens"] == rows["tokens"]
    assert outcome.scores.adapted["loss"] < outcome.scores.base["loss"]


def test_rows_of_names_of_your_own_and_a_system_turn(place: Path, tmp_path: Path) -> None:
    made = [{"ask": row["instruction"], "reply": row["output"], "id": i} for i, row in enumerate(small.rows())]
    path = small.lines(tmp_path / "rows.jsonl", [*made, *made[:3]])
    settings = [f"data.path={path}", "data.columns={question: ask, answer: reply}", "data.system=Be short."]
    settings += ["training.steps=2", "data.evaluation=0.5", "evaluation.rows=16"]
    outcome, printed = run(place, tmp_path / "out", *settings)
    facts = adapters.inspect(tmp_path / "out").training
    assert facts["rows"]["columns"] == {"question": "ask", "answer": "reply"}
    assert facts["rows"]["unused"] == ["id"]
    assert "system Be short. user" in printed
    assert facts["held_out_in_training"] == 2
    assert "note: 2 held-out rows occur in training too" in printed
    assert outcome.scores.rows == 16


def test_an_optimizer_of_bitsandbytes_keeps_its_moments_in_8_bits(place: Path, tmp_path: Path) -> None:
    settings = ["training.steps=4", "method.rank=64", "training.arguments={optim: adamw_8bit}"]
    outcome, _ = run(place, tmp_path / "out", *settings)
    assert outcome.scores.adapted["loss"] < outcome.scores.base["loss"]
    recipe = read_recipe(place / "recipe.yaml", settings=settings)
    lesson = preparing.LESSONS[recipe.task](recipe, Console(quiet=True))
    model, tokenizer = lesson.load("cpu")
    adapters.attach(model, recipe.method)
    trainer = preparing.make_trainer(recipe, lesson, model, tokenizer, str(tmp_path))
    trainer.train()
    moments = [(p.numel(), state["state1"].dtype) for p, state in trainer.optimizer.state.items()]
    assert {dtype for size, dtype in moments if size >= 4096} == {torch.uint8}  # smaller ones stay as they are
    assert len(moments) == sum(p.requires_grad for p in model.parameters())


def test_epochs_and_arguments_reach_the_trainer(place: Path, tmp_path: Path) -> None:
    settings = ["training.epochs=1.5", "training.arguments={adam_beta1: 0.7, logging_steps: 2}"]
    recipe = read_recipe(place / "recipe.yaml", settings=[*settings, "training.layout=padded"])
    assert recipe.training.steps is None
    lesson = preparing.LESSONS[recipe.task](recipe, Console(quiet=True))
    model, tokenizer = lesson.load("cpu")
    adapters.attach(model, recipe.method)
    trainer = preparing.make_trainer(recipe, lesson, model, tokenizer, str(tmp_path))
    assert type(trainer).__name__ == "InstructionTrainer"
    assert (trainer.args.adam_beta1, trainer.args.logging_steps, trainer.packing.kind) == (0.7, 2, "padded")
    state = torch.random.get_rng_state()
    ahead = course.ahead_of(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ahead.steps == 9  # 24 rows, 4 in a step, one and a half times
    seen: list[dict[str, torch.Tensor]] = []
    inner = trainer.training_step

    def step(model: Any, inputs: Any, *args: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items()})
        return inner(model, inputs, *args)

    trainer.training_step = step
    trainer.train()
    assert trainer.state.global_step == 9
    assert len(ahead.batches) == 2  # what the preflight tries is what training sees first
    for first, later in zip(ahead.batches, seen[:2], strict=True):
        assert all(torch.equal(first[key], later[key]) for key in first)


def test_a_preflight_changes_nothing(
    place: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "try_out", lambda *args: Preflight(()))
    run(place, tmp_path / "out")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (trained[2], tmp_path / "out"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    facts = [dict(adapters.inspect(folder).training) for folder in (trained[2], tmp_path / "out")]
    assert facts[0]["losses"] == facts[1]["losses"]
    assert facts[0]["learned_tokens"] == facts[1]["learned_tokens"]


def test_a_failed_preflight_stops_before_the_first_step(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="preflight failed and nothing was trained: the warm-up takes 9 steps of 6"):
        run(place, tmp_path / "out", "training.warmup=9")
    assert not (tmp_path / "out").exists()


def test_doctor_tries_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    command = ["doctor", str(place / "recipe.yaml"), "--output", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert "preflight: passed of" in done.stderr
    failed = CliRunner().invoke(app, [*command, "--method", "ia3", "--set", "training.learning_rate=0"])
    assert failed.exit_code == 1
    checks = json.loads(failed.stdout)["checks"]
    assert [check["what"] for check in checks if check["status"] == "failed"] == ["the learning rate is 0"]
    assert any("(ia3) trains" in check["what"] for check in checks)
    assert not (tmp_path / "out").exists()


def test_the_preflight_sees_what_the_rows_lack(place: Path) -> None:
    warned = examine(
        read_recipe(place / "recipe.yaml", settings=["training.learning_rate=0.1"]), None, Console(quiet=True)
    )
    assert warned.passed
    assert [check.what[:28] for check in warned.warnings] == ["the learning rate 0.1 is hig"]


def test_a_run_that_breaks_is_stopped_by_the_watchdog(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"^step \d: .*not finite"):
        run(place, tmp_path / "out", "training.learning_rate=1e38", "training.clip=1e30")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_logger_that_is_not_installed_is_named(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    with pytest.raises(AdapterError, match=r"refuses training.report_to: .*(comet|nowhere)"):
        run(place, tmp_path / "out", "training.report_to=nowhere")


HEAD = """\
task: instruction
base: x
method: {name: lora}
data:
  path: rows.jsonl
  evaluation: 0.2
training:
  steps: 5
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("path:", "pth:", "line 5: no key 'pth' in data; did you mean 'path'? Keys: path, split"),
        ("  path: rows.jsonl\n", "", "line 4: data needs the key 'path'."),
        ("data:\n  path: rows.jsonl\n  evaluation: 0.2\n", "", "line 1: the task 'instruction' needs data"),
        ("evaluation: 0.2", "evaluation: 1.5", "line 4: data.evaluation is 1.5; it must be a share of the rows"),
        ("evaluation: 0.2", "evaluation: test", "line 4: data.evaluation names a split, but data.path is the file"),
        ("evaluation: 0.2", "split: train", "line 4: data.split names a split, but data.path is the file"),
        ("evaluation: 0.2", "columns: [a]", "line 6: data.columns is ['a']; it must be a mapping from names to a text"),
        ("evaluation: 0.2", "learn: lst", "line 6: data.learn is 'lst'; did you mean 'last'? Choices: all, last."),
        ("steps: 5", "steps: 5\n  epochs: 2", "line 9: training.epochs and training.steps (in "),
        ("steps: 5", "steps: null", "line 8: training.steps is null, so training.epochs is needed."),
        ("steps: 5", "patience: 2", "line 8: training.patience counts evaluations, so training.eval_steps is needed."),
        (
            "steps: 5",
            "patience: 2\n  eval_steps: 2\n  save_steps: 3",
            "line 10: with training.patience every evaluation is a checkpoint, so training.save_steps must be "
            "training.eval_steps (2)",
        ),
        ("steps: 5", "layout: pack", "line 8: training.layout is 'pack'; did you mean 'packed'?"),
        ("steps: 5", "arguments: {adam_beta: 1}", "line 8: SFTConfig has no argument 'adam_beta'; did you mean 'adam_"),
        (
            "steps: 5",
            "arguments:\n    max_length: 9",
            "line 9: training.arguments.max_length is for the recipe's own training.max_tokens to say.",
        ),
        ("task: instruction", "task: sarcasm", "line 4: 'data' means nothing for the task 'sarcasm'; remove it."),
    ],
)
def test_errors_name_the_line(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert old in HEAD
    path.write_text(HEAD.replace(old, new, 1))
    with pytest.raises(AdapterError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}, {sentence}")


def test_steps_set_by_hand_stand_in_place_of_epochs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD)
    assert read_recipe(path, settings=["training.epochs=2"]).training.steps is None
    path.write_text(HEAD.replace("steps: 5", "epochs: 2"))
    training = read_recipe(path, settings=["training.steps=3"]).training
    assert (training.steps, training.epochs) == (3, None)
    with pytest.raises(AdapterError, match="both say how long"):
        read_recipe(path, settings=["training.steps=3", "training.epochs=1"])


SHORT = ["training.steps=2", "training.max_tokens=128", "evaluation.examples=1", "evaluation.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("instruct", None, []),
        ("instruct", "prefix", []),
        ("instruct", "bottleneck", ["method.reduction_factor=4"]),
        ("qlora-8b-24gb", None, ["training.batch=4"]),
        ("fsdp2-several-gpus", None, ["training.batch=4", "training.micro_batch=2"]),
    ],
)
def test_a_recipe_that_ships_runs_in_short(
    name: str, method: str | None, more: list[str], place: Path, tmp_path: Path
) -> None:
    settings = [*SHORT, f"base={place / 'base'}", f"data.path={place / 'rows.jsonl'}", *more]
    recipe = read_recipe(RECIPES / f"{name}.yaml", method, settings)
    outcome = train(recipe, tmp_path / "out", Console(quiet=True))
    assert outcome is not None
    assert outcome.equal_answers
    assert outcome.largest_logit_difference == 0
    assert outcome.findings == ("step 2: the run was too short to tell what moves: 1 step",)
    info = adapters.inspect(tmp_path / "out")
    assert info.method == recipe.method.name
    assert info.training["scores"]["tokens"] == outcome.scores.tokens > 0
    assert len(info.training["losses"]) == 2


def test_the_launch_file_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    read = ClusterConfig.from_yaml_file(RECIPES / "fsdp2.accelerate.yaml")  # refuses keys that it does not know
    assert (str(read.distributed_type.value), read.mixed_precision, read.num_processes) == ("FSDP", "bf16", 4)
    assert read.fsdp_config["fsdp_version"] == 2
    recipe = read_recipe(RECIPES / "fsdp2-several-gpus.yaml").training
    assert recipe.batch % (recipe.micro_batch * read.num_processes) == 0


@pytest.mark.slow
def test_of_two_processes_one_prints_and_writes(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "adapters",
    ]
    settings = ["--set", "method.dropout=0.0", "--set", "training.layout=padded", "--json"]
    command = [*launcher, "train", str(place / "recipe.yaml"), *settings]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    assert done.stderr.count("preflight: passed of") == 1
    outcome, _ = run(place, tmp_path / "alone", "method.dropout=0.0", "training.layout=padded")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (output, tmp_path / "alone"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5)
    assert shared["trained"] == {"tokens": outcome.trained.tokens, "learned": outcome.trained.learned}
    assert shared["equal_answers"]
    assert not (output / "checkpoints").exists()
