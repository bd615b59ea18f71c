"""Rows for training: any usual shape of instruction data, and two tasks with real rows and exact scores."""

from adapters.data.calls import Call, read_calls
from adapters.data.headlines import Headline, read_headlines
from adapters.data.interval import paired_interval
from adapters.data.prepared import Prepared, prepare
from adapters.data.rendering import answer, instruction, messages
from adapters.data.report import DataReport
from adapters.data.scoring import Score, score
from adapters.data.tokens import Encoded, encode, encode_call, encode_prompt

__all__ = [
    "Call",
    "DataReport",
    "Encoded",
    "Headline",
    "Prepared",
    "Score",
    "answer",
    "encode",
    "encode_call",
    "encode_prompt",
    "instruction",
    "messages",
    "paired_interval",
    "prepare",
    "read_calls",
    "read_headlines",
    "score",
]
