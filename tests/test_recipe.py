"""Recipes: errors that name the line, variants and overrides, the loss, and a run in short form."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapters._errors import AdapterError
from adapters.methods import names
from adapters.train import Recipe, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
GOOD = """\
task: function_calls
base: smollm2-135m-instruct
method:
  name: lora
  rank: 4
training:
  steps: 7
  learning_rate: 1e-3
variants:
  prefix:
    start: example
    training: {learning_rate: 0.5}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, GOOD))
    assert (recipe.method.name, recipe.method.rank) == ("lora", 4)  # type: ignore[attr-defined]
    assert recipe.training.steps == 7
    assert recipe.training.learning_rate == 1e-3  # YAML 1.1 reads it as text
    assert recipe.training.batch == Recipe().training.batch


def test_method_and_settings_override(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    prefix = read_recipe(path, "prefix", ["training.steps=3"])
    assert (prefix.method.name, prefix.start) == ("prefix", "example")
    assert (prefix.training.learning_rate, prefix.training.steps) == (0.5, 3)
    bottleneck = read_recipe(path, "bottleneck", ["method.placement=houlsby"])  # no variant: the method's defaults
    assert bottleneck.method.placement == "houlsby"  # type: ignore[attr-defined]
    assert bottleneck.training.learning_rate == 1e-3
    assert read_recipe(path, "lora").method.rank == 4  # type: ignore[attr-defined]
    pattern = read_recipe(path, settings=["method.alpha_pattern={mlp.*: 2, attention.*: 3.5}"]).method
    assert pattern.alpha_pattern == {"mlp.*": 2.0, "attention.*": 3.5}  # type: ignore[attr-defined]
    assert read_recipe(path, "ia3", ["method.feedforward=[]"]).method.feedforward == ()  # type: ignore[attr-defined]
    assert read_recipe(path, settings=["targets=[attention.*]"]).targets == ("attention.*",)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("steps: 7", "stepz: 7", "line 7: no key 'stepz' in training; did you mean 'steps'? Keys: steps, epochs"),
        ("training:", "trainin:", "line 6: no key 'trainin' in a recipe; did you mean 'training'? Keys: task"),
        ("rank: 4", "rnak: 4", "line 5: no key 'rnak' in method; did you mean 'rank'? Keys: rank, alpha"),
        ("rank: 4", "rank: 4.5", "line 5: method.rank is 4.5; it must be a whole number."),
        ("rank: 4", "rank: 0", "line 3: rank is 0; it must be at least 1."),
        ("rank: 4", "rslora: 1", "line 5: method.rslora is 1; it must be true or false."),
        ("rank: 4", "rank_pattern: {a: 2.5}", "line 5: method.rank_pattern is {'a': 2.5}; it must be a mapping from"),
        ("name: lora", "name: lroa", "line 4: no method 'lroa'; did you mean 'lora'?"),
        ("name: lora", "alpha: 3", "line 3: method needs a name"),
        ("task: function_calls", "task: function_call", "line 1: task is 'function_call'; did you mean"),
        ("steps: 7", "steps: many", "line 7: training.steps is 'many'; it must be a whole number or null."),
        ("steps: 7", "steps: true", "line 7: training.steps is True; it must be a whole number or null."),
        ("steps: 7", "steps: 0", "line 7: training.steps is 0; it must be at least 1."),
        ("steps: 7", "steps: 7\n  steps: 8", "line 8: 'training.steps' is given twice; the first is in"),
        ("steps: 7", "batch: 7", "line 6: training.batch (7 rows) must be a multiple of training.micro_batch (3 rows)"),
        ("steps: 7", "schedule: cosin", "line 7: training.schedule is 'cosin'; did you mean 'cosine'?"),
        ("start: example", "strat: example", "line 11: no key 'strat' in a recipe; did you mean 'start'?"),
        ("prefix:", "prefixx:", "line 10: the variant 'prefixx' is no method; did you mean 'prefix'?"),
        ("{learning_rate: 0.5}", "{learning_rat: 0.5}", "line 12: no key 'learning_rat' in training; did you mean"),
        ("base: smol", "start: example\nbase: smol", "line 2: the method 'lora' has no text to start from."),
        ("base: smollm2-135m-instruct", "base: [", "this is not YAML"),
        ("task: function_calls", "task: sarcasm\nstart: example", "line 12: 'start' means nothing for the task"),
    ],
)
def test_errors_name_file_line_and_nearest_key(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(AdapterError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}, line ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("training.stepz=3", "--set training.stepz=3: no key 'stepz' in training; did you mean 'steps'?"),
        ("trainin.steps=3", "--set trainin.steps=3: no key 'trainin' in a recipe; did you mean 'training'?"),
        ("training.steps", "write it as key=value"),
        ("base.x=1", "'base' is not a section"),
        ("method.rank=-1", "rank is -1"),
    ],
)
def test_settings_that_are_wrong(setting: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_recipe(written(tmp_path, GOOD), settings=[setting])
    assert sentence in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(AdapterError, match="a recipe is a mapping"):
        read_recipe(written(tmp_path, "- a\n- b\n"))
    with pytest.raises(AdapterError, match="did you mean 'prefix'"):
        read_recipe(written(tmp_path, GOOD), "prefxi")


FILES = sorted(path for path in RECIPES.glob("*.yaml") if not path.name.endswith(".accelerate.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_reads_with_every_method_it_is_for(path: Path) -> None:
    recipe = read_recipe(path)
    for method in [name for name in names() if name in ("lora", "qlora", "dora", "ia3", "bottleneck", "prefix")]:
        changed = read_recipe(path, method)
        assert changed.method.name == method
        assert changed.task == recipe.task


class Tiny(torch.nn.Module):
    """A two-matrix language model that counts the positions its head runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)
        self.positions = 0

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep=slice(None)):  # type: ignore[no-untyped-def]
        hidden = self.embedding(input_ids).cumsum(1)[:, logits_to_keep]
        self.positions = hidden.shape[0] * hidden.shape[1]
        return type("Output", (), {"logits": self.head(hidden)})


def test_the_loss_equals_the_full_computation_on_fewer_positions() -> None:
    from adapters.train.batches import PaddedRows
    from adapters.train.loss import score

    torch.manual_seed(0)
    model = Tiny()
    rows = [
        {"input_ids": [1, 2, 3, 4, 0], "labels": [-100, -100, -100, 4, 0]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [3, 0], "labels": [-100, 0]},  # the padding token is learned, the padding is not
    ]
    batch = PaddedRows(0)(rows)
    assert batch["attention_mask"].sum() == 10
    found = score(model, batch, columns_only=True).total
    assert model.positions == 3 * 4
    full = model(batch["input_ids"], batch["attention_mask"], False).logits[:, :-1]
    expected = F.cross_entropy(full.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_generation_in_batches_equals_one_by_one() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapters.train.generation import generate

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=5, pad_token_id=5, **small)).eval()

    class Tokens:
        eos_token_id = pad_token_id = 5

        def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row.tolist())) for row in rows]

    prompts = [[7, 8, 9, 10, 11], [12], [13, 14], [15, 16, 17]]
    seen: list[int] = []
    batched = generate(model, Tokens(), prompts, 12, batch=3, advance=seen.append)
    assert seen == [3, 1]
    for prompt, found in zip(prompts, batched, strict=True):
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        alone = out.tolist()
        assert found == (alone[: alone.index(5)] if 5 in alone else alone)
    short = generate(model, Tokens(), prompts, 12, batch=4, hopeless=lambda text: len(text.split()) >= 2)
    assert all(answer[:2] == full[:2] for answer, full in zip(short, batched, strict=True))


def test_the_trainer_averages_over_the_tokens_of_a_whole_step(tmp_path: Path) -> None:
    from datasets import Dataset
    from rich.console import Console
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import adapters
    from adapters.train.batches import PaddedRows
    from adapters.train.loss import score
    from adapters.train.recipe import Training
    from adapters.train.sft import make_trainer

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **small))
    adapters.attach(model, "lora", rank=2)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="2")
    rows = [{"input_ids": [3, 4, 5, *([6] * n)], "labels": [-100, -100, -100, *([6] * n)]} for n in (1, 2, 3, 6)]
    with torch.no_grad():  # before training: the first step's loss is the one of fresh tensors
        expected = score(model, PaddedRows(2)(rows), columns_only=True).total.item() / 12
    training = Training(steps=1, batch=4, micro_batch=2, warmup=0)
    trainer = make_trainer(model, tokenizer, Dataset.from_list(rows), training, str(tmp_path), Console(quiet=True))
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(expected, rel=1e-4)
    assert trainer.learned == 12
    assert trainer.state.num_input_tokens_seen == 3 * 4 + 12


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "bottleneck", "prefix"])
def test_the_quickstart_in_short(method: str, tmp_path: Path) -> None:
    import adapters

    short = [
        "training.steps=2",
        "training.warmup=1",
        "evaluation.rows=2",
        "evaluation.examples=2",
        "evaluation.max_new_tokens=8",
    ]
    command = [
        sys.executable,
        "-m",
        "adapters",
        "train",
        str(RECIPES / "quickstart.yaml"),
        "--method",
        method,
        "--json",
    ]
    for setting in [*short, "training.max_tokens=150"]:
        command += ["--set", setting]
    # in a process of its own, whose peak memory is that of the run; Linux counts what this one held before as well
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    done = subprocess.run([*command, "--output", str(tmp_path / "adapter")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["equal_answers"]
    assert outcome["largest_logit_difference"] == 0
    assert outcome["scores"]["rows"] == 2
    assert outcome["trained"]["learned"] > 0
    assert outcome["peak_bytes"] < 4 * 2**30
    info = adapters.inspect(tmp_path / "adapter")
    assert info.method == method
    assert info.training["scores"]["rows"] == 2
    assert "peak memory" in done.stderr
    assert "preflight: passed of" in done.stderr
    assert (tmp_path / "adapter" / "training.png").exists()


@pytest.mark.real
@pytest.mark.slow
def test_the_sarcasm_recipe_in_short(tmp_path: Path) -> None:
    from rich.console import Console

    from adapters.train.run import evaluate, train

    recipe = read_recipe(
        RECIPES / "sarcasm.yaml", None, ["training.steps=12", "training.warmup=2", "evaluation.rows=100"]
    )
    outcome = train(recipe, tmp_path / "adapter", Console(quiet=True))
    assert outcome is not None
    assert outcome.equal_answers
    assert outcome.largest_logit_difference == 0
    assert set(outcome.scores.adapted) == {"correct"}
    again = evaluate(recipe, tmp_path / "adapter", Console(quiet=True))
    assert again == outcome.scores
