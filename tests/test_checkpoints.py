"""Checkpoints of trainers that know nothing of adapters: adapter-only, sealed, resumed bit for bit or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import output, shake
from safetensors.torch import load_file

import adapters
from adapters._attach import tensors_of
from adapters._trainers import newest_checkpoint
from adapters._trainers.complete import missing

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")


def rows() -> Any:
    numbers = torch.randint(5, 150, (24, 9), generator=torch.Generator().manual_seed(2)).tolist()
    return datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in numbers])


def trainer(
    folder: Path, method: str = "lora", model: Any = None, names: tuple[str, ...] = ("fr",), **more: Any
) -> Any:
    torch.manual_seed(5)
    model = model if model is not None else tiny.build("llama")
    for name in names:
        adapters.attach(model, method, name=name, **({"rank": 4, "dropout": 0.1} if method == "lora" else {}))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows().select(range(4)))


def values(model: Any, name: str = "fr") -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors_of(model, name).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder)
    run.train()
    return folder, values(run.model)


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_adapter_tensors_only(finished: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, trained = finished
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    last = folder / "checkpoint-6"
    assert not list(last.glob("model*")) + list(last.glob("pytorch_model*"))
    stored = load_file(last / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in trained.values())
    state = torch.load(last / "optimizer.pt")
    moments = sum(s["exp_avg"].numel() for s in state["state"].values())
    assert moments == sum(tensor.numel() for tensor in trained.values())
    fresh = tiny.build("llama")
    adapters.load(fresh, last, name="fr")
    assert same(values(fresh), trained)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(method: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", method)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    again = trainer(tmp_path / "cut", method)
    started = values(again.model)
    again.train(resume_from_checkpoint=True)
    assert same(values(again.model), values(whole.model))
    assert not same(values(again.model), started)
    done = trainer(tmp_path / "cut", method)  # the last step's checkpoint: nothing is left to do
    done.train(resume_from_checkpoint=True)
    assert done.state.global_step == 6
    assert same(values(done.model), values(whole.model))


def test_several_adapters_and_a_reference_are_restored(tmp_path: Path) -> None:
    whole = trainer(tmp_path, names=("fr", "de"))
    shake(whole.model, "fr", 3, 0.1)  # inactive, and not in the optimizer's way
    frozen = values(whole.model, "fr")
    whole.train()
    assert same(values(whole.model, "fr"), frozen)
    again = trainer(tmp_path, names=("fr", "de"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(values(again.model, "fr"), frozen)
    assert same(values(again.model, "de"), values(whole.model, "de"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        learning_rate=5.0,  # so that the first checkpoint is the best
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    parameters = {id(parameter) for parameter in tensors_of(run.model, "fr").values()}
    run.train()
    best = Path(run.state.best_model_checkpoint)
    losses = {int(log["step"]): log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    assert best.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    assert best.name != "checkpoint-6"
    fresh = tiny.build("llama")
    adapters.load(fresh, best, name="fr")
    assert same(values(run.model), values(fresh))
    assert {id(parameter) for parameter in tensors_of(run.model, "fr").values()} == parameters


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("optimizer.pt", "the optimizer's state"),
        ("scheduler.pt", "the schedule's state"),
        ("rng_state.pth", "the random numbers' state"),
        ("trainer_state.json", "the trainer's state"),
        ("adapter_model.safetensors", "adapter_model.safetensors"),
    ],
)
def test_a_checkpoint_that_lacks_a_file_is_passed_over_and_refused_by_name(lost: str, named: str, run: Path) -> None:
    (run / "checkpoint-6" / lost).unlink()
    assert newest_checkpoint(run) == str(run / "checkpoint-4")
    again = trainer(run)
    started = values(again.model)
    with pytest.raises(adapters.AdapterError, match=f"checkpoint-6 lacks {named}"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert same(values(again.model), started)


def test_a_truncated_file_and_an_unsealed_folder_are_passed_over(run: Path, tmp_path: Path) -> None:
    optimizer = run / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert missing(run / "checkpoint-6") == "optimizer.pt"
    (run / "checkpoint-4" / "checkpoint.json").unlink()
    assert newest_checkpoint(run) == str(run / "checkpoint-2")
    assert missing(run / "checkpoint-4") is None  # asked for by name, it may be another program's
    (run / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4,')
    assert missing(run / "checkpoint-4") == "the end of trainer_state.json"
    assert newest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(adapters.AdapterError, match="holds no complete checkpoint"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_another_adapter_or_another_base_is_refused_before_training(run: Path) -> None:
    with pytest.raises(adapters.AdapterError, match="nothing was restored"):
        trainer(run, "bottleneck").train(resume_from_checkpoint=True)
    with pytest.raises(adapters.WrongBase):
        trainer(run, model=tiny.build("llama", seed=1)).train(resume_from_checkpoint=True)


def test_old_checkpoints_go_when_the_new_one_is_sealed(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_total_limit=1)
    run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert run.args.save_total_limit == 1
    assert not {"_save_checkpoint", "_load_from_checkpoint", "save_model", "_run_epoch"} & vars(run).keys()


def test_models_without_adapters_are_trained_as_ever(tmp_path: Path) -> None:
    run = trainer(tmp_path, names=(), max_steps=2)
    run.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "checkpoint.json").exists()


def test_a_card_may_be_edited_and_a_partitioned_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-6" / "README.md").write_text("# mine")
    assert newest_checkpoint(run) == str(run / "checkpoint-6")
    model = trainer(tmp_path).model
    first = next(iter(tensors_of(model, "fr").values()))
    first.ds_id, first.ds_numel = 0, 2 * first.numel()  # as DeepSpeed marks what it has partitioned
    with pytest.raises(adapters.AdapterError, match="ZeRO-3 has partitioned"):
        adapters.save(model, "fr", tmp_path / "out")


def test_a_model_that_is_made_anew_is_saved_and_resumed_too(tmp_path: Path) -> None:
    def init() -> Any:
        torch.manual_seed(5)
        model = tiny.build("llama")
        adapters.attach(model, "lora", name="fr", rank=4)
        return model

    def made(**more: Any) -> Any:
        arguments = trainer(tmp_path, names=()).args
        return transformers.Trainer(args=arguments, model_init=init, train_dataset=rows(), **more)

    whole = made()
    whole.train()
    assert not list(tmp_path.glob("*/model.safetensors"))
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = made()
    again.train(resume_from_checkpoint=True)
    assert same(values(again.model), values(whole.model))


class Within(torch.nn.Module):
    """A model of the user's own around an attached one: a head that no adapter holds, and statistics."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.norm, self.head = inner, torch.nn.BatchNorm1d(9), torch.nn.Linear(160, 3)

    def forward(self, input_ids: Any, labels: Any = None, **ignored: Any) -> dict[str, torch.Tensor]:
        scores = self.head(self.norm(self.inner(input_ids=input_ids).logits)).mean(1)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels[:, 0] % 3), "logits": scores}


def within() -> Any:
    torch.manual_seed(5)
    inner = tiny.build("llama")
    adapters.attach(inner, "lora", name="fr", rank=4)
    return Within(inner)


def test_a_model_around_the_attached_one_is_saved_and_resumed_whole(tmp_path: Path) -> None:
    def made(**more: Any) -> Any:
        made = trainer(tmp_path, model=within(), names=(), **more)
        made.label_names = ["labels"]
        return made

    whole = made()
    whole.train()
    assert not list(tmp_path.glob("*/model.safetensors"))
    held = load_file(tmp_path / "checkpoint-6" / "rest.safetensors")
    assert {key.split(".")[0] for key in held} == {"norm", "head"}
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = made()
    again.train(resume_from_checkpoint=True)
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    best = made(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, learning_rate=5.0)
    best.train()
    chosen = load_file(Path(best.state.best_model_checkpoint) / "rest.safetensors")
    assert all(torch.equal(best.model.state_dict()[key], tensor) for key, tensor in chosen.items())


def test_accelerate_keeps_what_lies_around_the_attached_model(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(within())
    shake(model.inner, "fr", 3, 0.1)
    model.head.weight.data.add_(1)
    accelerator.save_state(str(tmp_path))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in (*tensors_of(model.inner, "fr").values(), *model.head.parameters()):
            parameter.add_(1)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_adapters_are_restored_by_their_names_or_not_at_all(tmp_path: Path) -> None:
    whole = trainer(tmp_path, names=("fr", "de"))
    shake(whole.model, "fr", 3, 0.1)
    whole.train()
    alone = trainer(tmp_path, names=("de",))
    started = values(alone.model, "de")
    with pytest.raises(adapters.AdapterError, match="holds the adapters 'de', 'fr', and attached are 'de'"):
        alone.train(resume_from_checkpoint=True)
    assert same(values(alone.model, "de"), started)


def test_base_tensors_that_train_beside_the_adapter_are_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator

    run = trainer(tmp_path)
    run.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(adapters.AdapterError, match=r"model\.norm\.weight among them"):
        run.train()
    with pytest.raises(adapters.AdapterError, match=r"model\.norm\.weight among them"):
        Accelerator(cpu=True).prepare(run.model)


def test_running_statistics_of_a_frozen_base_stay_as_they_are(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "num_channels": 3, "num_labels": 3}
    torch.manual_seed(1)
    base = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    adapters.attach(base, "lora", name="fr", rank=2, example={"pixel_values": torch.randn(2, 3, 32, 32)})
    base.train()
    assert any(module.training for module in base.modules())
    base(pixel_values=torch.randn(4, 3, 32, 32) + 3, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    adapters.detach(base)
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())
    assert all(module.training for module in base.modules())


def test_accelerates_states_hold_the_adapter_only(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def loop(accelerator: Any, model: Any, optimizer: Any, start: int, stop: int) -> None:
        for step in range(start, stop):
            batch = torch.randint(5, 150, (2, 9), generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    def prepared() -> tuple[Any, Any, Any, Any]:
        torch.manual_seed(5)
        model, plain = tiny.build("llama"), torch.nn.Linear(2, 2)
        adapters.attach(model, "lora", name="fr", rank=4, dropout=0.1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, plain)

    accelerator, model, optimizer, plain = prepared()
    loop(accelerator, model, optimizer, 0, 2)
    accelerator.save_state(str(tmp_path))
    beside = plain.weight.detach().clone()
    loop(accelerator, model, optimizer, 2, 4)
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}  # the plain model's
    assert sorted(os.listdir(tmp_path / "adapters")) == [
        "README.md",
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    accelerator, again, optimizer, plain = prepared()
    plain.weight.data.add_(1)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(plain.weight, beside)
    loop(accelerator, again, optimizer, 2, 4)
    assert same(values(again), values(model))


def test_a_plain_loop_resumes(tmp_path: Path) -> None:
    def loop(model: Any, optimizer: Any, start: int, stop: int) -> None:
        for step in range(start, stop):
            batch = torch.randint(5, 150, (2, 9), generator=torch.Generator().manual_seed(step))
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin() -> tuple[Any, Any]:
        torch.manual_seed(5)
        model = tiny.build("llama")
        adapters.attach(model, "bottleneck", name="fr", reduction_factor=8)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = begin()
    loop(model, optimizer, 0, 2)
    adapters.save(model, "fr", tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loop(model, optimizer, 2, 4)
    again, optimizer = begin()
    report = adapters.restore(again, "fr", tmp_path)
    assert "the base is the one recorded" in report.base
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    loop(again, optimizer, 2, 4)
    assert same(values(again), values(model))
    assert not torch.equal(output(again, tiny.inputs(again)), output(tiny.build("llama"), tiny.inputs(again)))


def test_without_peft_it_is_the_same(finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch, transformers
from transformers.utils import is_peft_available
assert not is_peft_available()
from test_checkpoints import trainer, values
torch.set_num_threads({torch.get_num_threads()})
settings = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss")
run = trainer(Path({str(tmp_path)!r}))
run.train()
assert not list(Path({str(tmp_path)!r}).glob("*/model*"))
torch.save(values(run.model), {str(tmp_path / "whole.pt")!r})
import shutil; shutil.rmtree({str(tmp_path / "checkpoint-6")!r})
again = trainer(Path({str(tmp_path)!r}), **settings)
again.train(resume_from_checkpoint=True)
best = again.state.best_model_checkpoint
torch.save(values(again.model), {str(tmp_path / "again.pt")!r})
assert best.endswith("checkpoint-6"), best
assert "peft" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert same(torch.load(tmp_path / "whole.pt"), finished[1])
    assert same(torch.load(tmp_path / "again.pt"), finished[1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "deaths"), [("trainer", 20), ("trl", 20), ("ours", 8)])
def test_runs_that_die_at_any_moment_resume_bit_for_bit(kind: str, deaths: int, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    script = Path(__file__).with_name("deaths.py")
    run = subprocess.run(
        [sys.executable, str(script), kind, str(tmp_path), str(deaths)], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == deaths, run.stderr[-3000:]
    assert all(line["status"] == -9 for line in lines)
    assert all(line["again"] == 0 and line["equal"] for line in lines), lines
    assert len({line["from"] for line in lines}) >= 3  # from nothing, and from several checkpoints
    inside = [line for line in lines if line["from"] not in (None, *line["left"][-1:])]
    assert inside or deaths < 20, "no death fell into a save"
