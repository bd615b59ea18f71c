"""Tasks with real rows and exact scores: function calls for language models, sarcastic headlines for classifiers."""

from adapters.data.calls import Call, read_calls
from adapters.data.headlines import Headline, read_headlines
from adapters.data.interval import paired_interval
from adapters.data.rendering import answer, instruction, messages
from adapters.data.scoring import Score, score
from adapters.data.tokens import Encoded, encode, encode_call, encode_prompt

__all__ = [
    "Call",
    "Encoded",
    "Headline",
    "Score",
    "answer",
    "encode",
    "encode_call",
    "encode_prompt",
    "instruction",
    "messages",
    "paired_interval",
    "read_calls",
    "read_headlines",
    "score",
]
