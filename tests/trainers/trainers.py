"""The trainers, as their documentation makes them; what they are given is the same for ours and for stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
import trl
from datasets import Dataset

import adapters.train
from tests.trainers.cases import NAMES, Case
from tests.trainers.material import collator, documents, liked, preferences, tokenizer, translations

STEPS = {**dict.fromkeys(NAMES, 24), "grpo": 32}
RATES = {"lora": 1e-2, "bottleneck": 1e-2, "prefix": 1e-1}  # AdamW, constant, no decay
FASTER = {("grpo", "prefix"): 2.0}  # a reward for what is sampled teaches less a step than labels do

Make = Callable[[Case, Any, Path, dict[str, Any]], Any]


def settings(case: Case, place: Path, **more: Any) -> dict[str, Any]:
    """What all trainers are told alike."""
    return {
        "output_dir": str(place),
        "max_steps": STEPS[case.loop],
        "save_steps": STEPS[case.loop],
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": RATES[case.method] * FASTER.get((case.loop, case.method), 1.0),
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": case.checkpointing == "after",
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
        **more,
    }


def _trainer(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    arguments = hf.TrainingArguments(**settings(case, place))
    rows = Dataset.from_list(documents())
    return hf.Trainer(model, arguments, data_collator=collator(case.rows), train_dataset=rows, **given)


def _sft(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    kind = adapters.train.SFTTrainer if case.loop == "ours" else trl.SFTTrainer
    packed = {"packing": True, "max_length": 24, "per_device_train_batch_size": 2} if case.rows == "packed" else {}
    arguments = trl.SFTConfig(**settings(case, place, **packed))
    rows = Dataset.from_list(documents())
    return kind(model, arguments, train_dataset=rows, processing_class=tokenizer(), **given)


def _dpo(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    arguments = trl.DPOConfig(**settings(case, place))
    rows = preferences("dpo")
    return trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **given)


def _kto(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    arguments = trl.KTOConfig(**settings(case, place))
    rows = preferences("kto")
    return trl.KTOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **given)


def _grpo(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    sampling = {"num_generations": 8, "max_completion_length": 6, "beta": 0.02, "per_device_train_batch_size": 32}
    arguments = trl.GRPOConfig(**settings(case, place, **sampling))
    rows = preferences("grpo")
    return trl.GRPOTrainer(model, liked, args=arguments, train_dataset=rows, processing_class=tokenizer(), **given)


def _reward(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    arguments = trl.RewardConfig(**settings(case, place))
    rows = preferences("reward")
    return trl.RewardTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **given)


def _sentence(case: Case, model: Any, place: Path, given: dict[str, Any]) -> Any:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    arguments = SentenceTransformerTrainingArguments(**settings(case, place, per_device_train_batch_size=8))
    loss = MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(model, arguments, train_dataset=translations(), loss=loss, **given)


MAKE: dict[str, Make] = {
    "trainer": _trainer,
    "sft": _sft,
    "ours": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "grpo": _grpo,
    "reward": _reward,
    "sentence": _sentence,
}
