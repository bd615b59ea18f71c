"""What a task provides so that a run can teach it, score it and show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Answer:
    """One model's answer to one held-out row, and what it scores; the last mark is the one that is compared.

    Marks are 0 or 1, or, where `tokens` says over how many learned tokens of the row, means over those.
    """

    text: str
    marks: Mapping[str, float]
    tokens: int | None = None


@dataclass(frozen=True)
class Trained:
    """What training went through, in tokens without padding; `learned` of them carried a loss."""

    tokens: int
    learned: int


class Lesson(Protocol):
    """One task with its rows. Models pass through as arguments, so that none is kept alive."""

    @property
    def baseline(self) -> str:
        """What the first column of scores is."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the data, for the adapter's record."""
        ...

    def load(self, device: Any) -> tuple[Any, Any]:
        """A fresh base on a device, and its tokenizer."""
        ...

    def rows(self) -> int:
        """Number of held-out rows; to be asked once a base was loaded, as all that follows."""
        ...

    def prompt(self, row: int) -> str:
        """A held-out row as it is shown."""
        ...

    def reference(self, row: int) -> str:
        """Its right answer, as it is shown."""
        ...

    def example(self, tokenizer: Any) -> str:
        """One worked example from the training rows, as text."""
        ...

    def trainer(self, model: Any, tokenizer: Any, folder: str) -> Any:
        """A transformers trainer over the training rows, with a bar over its steps; `folder` is only demanded."""
        ...

    def trained(self, trainer: Any, learned: int) -> Trained:
        """What training went through; `learned` tokens had a label, where the trainer counts them."""
        ...

    def base_answers(self, model: Any, tokenizer: Any, advance: Advance) -> list[Answer]:
        """Answers without the adapter, which is inactive during the call."""
        ...

    def answers(self, model: Any, tokenizer: Any, rows: Sequence[int], advance: Advance) -> list[Answer]:
        """Answers of the model as it is."""
        ...

    def logits(self, model: Any, tokenizer: Any, rows: Sequence[int]) -> Tensor:
        """The model's raw outputs on some held-out rows, for comparing two models exactly."""
        ...
