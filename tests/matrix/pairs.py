"""The (model type, head) pairs of the installed transformers, read from its auto classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers.models.auto import modeling_auto

HEADS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "encoder": "MODEL_MAPPING_NAMES",
}
TEXT_ENCODERS = ("masked", "sequence", "token", "question", "choice")  # heads that only encoders, or both, have


@dataclass(frozen=True, order=True)
class Pair:
    """One class of transformers: the head it carries, its model type, and its name."""

    head: str
    type: str
    cls: str

    def __str__(self) -> str:
        return f"{self.type}/{self.head}/{self.cls}"


def pairs() -> list[Pair]:
    """All pairs in the order of `HEADS`. Bare models count where the type is an encoder and not a decoder."""
    return [Pair(head, *entry) for head in HEADS for entry in _entries(head) if head != "encoder" or _encodes(entry[0])]


def _entries(head: str) -> Iterator[tuple[str, str]]:
    for model_type, classes in getattr(modeling_auto, HEADS[head]).items():
        for cls in classes if isinstance(classes, tuple | list) else (classes,):
            yield model_type, cls


def _types(*heads: str) -> set[str]:
    return {model_type for head in heads for model_type, _ in _entries(head)}


def _encodes(model_type: str) -> bool:
    """Text encoders, and vision models that classify images; decoders are run with their heads."""
    backbones = {name for name, _ in modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.items()}
    text = _types(*TEXT_ENCODERS, "seq2seq") - _types("causal")
    masked = _types("masked")  # BERT and its kin have a causal head too
    return model_type in text | masked | _types("image") | backbones
