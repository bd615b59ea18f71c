"""The models that are adapted: the same each time, with weights large enough to be taught in few steps."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from torch import nn

from tests.trainers.cases import Case
from tests.trainers.material import tokenizer


def build(case: Case) -> Any:
    """A fresh base for a loop, equal each time."""
    if case.loop == "sentence":
        return _sentences()
    if case.loop == "reward":
        return _seeded(lambda: hf.LlamaForSequenceClassification(_like("llama", num_labels=1)))
    if case.base == "nf4":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = hf.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
        return hf.AutoModelForCausalLM.from_pretrained(_folder("llama"), quantization_config=config, dtype="float32")
    return tiny.build("llama")


def attached_part(case: Case, model: Any) -> Any:
    """The module that an adapter is attached to: in a SentenceTransformer the transformer, as its own `add_adapter`."""
    return model.transformers_model if case.loop == "sentence" and case.join != "whole" else model


def output(case: Case, model: Any) -> torch.Tensor:
    """What the model is used for, in eval mode."""
    model.eval()
    with torch.no_grad():
        if case.loop == "sentence":
            return model.encode(["w21 w31 w41", "w7", "w100 w9"], convert_to_tensor=True).clone()
        inputs = tiny.inputs("llama", padded=True)
        return model(**inputs, use_cache=False).logits.clone()


def _like(name: str, **changed: Any) -> Any:
    config = tiny.build(name).config
    return type(config)(**{**config.to_dict(), **changed})


def _seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
    return model.eval()


def prepare() -> None:
    """Writes the bases that are read from folders, once for all processes that are forked afterwards."""
    hf.utils.logging.disable_progress_bar()
    for name in ("llama", "bert"):
        _folder(name)


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="trainers-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def _folder(name: str) -> Path:
    folder = _scratch() / name
    if not folder.exists():
        model = tiny.build(name) if name == "llama" else _seeded(lambda: hf.BertModel(_like(name)))
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def _sentences() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(str(_folder("bert"))), Pooling(tiny.HIDDEN)], device="cpu")
