"""The lesson `function_calls`: a small instruct model learns to answer with a call of the function it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adapters._errors import AdapterError
from adapters._hub import load_base
from adapters._hub.pins import DATA, described
from adapters.data import answer, encode_call, encode_prompt, messages, read_calls, score
from adapters.data.tokens import IGNORED
from adapters.train.generation import generate
from adapters.train.lesson import Advance, Answer, Trained
from adapters.train.recipe import Recipe


class FunctionCalls:
    """The rows of `read_calls`, learned through TRL's SFTTrainer and scored on greedy answers."""

    baseline = "base"

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.training, self.held_out = read_calls(recipe.evaluation.rows)
        self.facts: dict[str, Any] = {**described(DATA["bfcl"]), "held_out": len(self.held_out)}

    def load(self, device: Any) -> tuple[Any, Any]:
        recipe = self.recipe
        return load_base(recipe.base, recipe.quantize or recipe.method.quantize, recipe.dtype, device, kind="causal")

    def rows(self) -> int:
        return len(self.held_out)

    def prompt(self, row: int) -> str:
        return self.held_out[row].request

    def reference(self, row: int) -> str:
        return answer(self.held_out[row])

    def example(self, tokenizer: Any) -> str:
        call = self.training[0]
        turns = [*messages(call), {"role": "assistant", "content": answer(call)}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    def trainer(self, model: Any, tokenizer: Any, folder: str) -> Any:
        from datasets import Dataset

        from adapters.train.sft import make_trainer

        encoded = [encode_call(tokenizer, call)._asdict() for call in self.training]
        short = [row for row in encoded if len(row["input_ids"]) <= self.recipe.training.max_tokens]
        self.facts["training_rows"] = len(short)
        if not short:
            raise AdapterError(f"no row has at most {self.recipe.training.max_tokens} tokens; raise max_tokens.")
        return make_trainer(model, tokenizer, Dataset.from_list(short), self.recipe.training, folder, self.console)

    def trained(self, trainer: Any, learned: int) -> Trained:
        return Trained(int(trainer.state.num_input_tokens_seen), learned)

    def base_answers(self, model: Any, tokenizer: Any, advance: Advance) -> list[Answer]:
        return self.answers(model, tokenizer, range(self.rows()), advance)

    def answers(self, model: Any, tokenizer: Any, rows: Sequence[int], advance: Advance) -> list[Answer]:
        prompts = [encode_prompt(tokenizer, messages(self.held_out[row])) for row in rows]
        settings = self.recipe.evaluation
        answered = generate(model, tokenizer, prompts, settings.max_new_tokens, settings.batch, _hopeless, advance)
        texts = tokenizer.batch_decode(answered, skip_special_tokens=True)
        scores = [score(text, self.held_out[row]) for row, text in zip(rows, texts, strict=True)]
        marks = [{"valid calls": s.valid, "complete": s.complete, "exact": s.exact} for s in scores]
        return [Answer(text, mark) for text, mark in zip(texts, marks, strict=True)]

    @torch.no_grad()
    def logits(self, model: Any, tokenizer: Any, rows: Sequence[int]) -> Tensor:
        """Over the right answers, one row after the other."""
        found = []
        for row in rows:
            encoded = encode_call(tokenizer, self.held_out[row])
            ids = torch.tensor([encoded.input_ids], device=model.device)
            learned = [i for i, label in enumerate(encoded.labels) if label != IGNORED]
            found.append(model(input_ids=ids, use_cache=False).logits[0, learned].float().cpu())
        return torch.cat(found)


def _hopeless(text: str) -> bool:
    """An answer is a JSON object or worth nothing, so that one which starts otherwise need not be finished."""
    return len(text) >= 60 and not text.lstrip().startswith("{")
