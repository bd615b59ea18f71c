"""Requests with the function that answers them, from the Berkeley Function Calling Leaderboard (Apache-2.0)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters._hub import fetch

SOURCES = ("simple_python", "multiple", "live_simple", "live_multiple")


@dataclass(frozen=True)
class Call:
    """One request, the one function it calls, and the accepted values of each argument.

    Args:
        id: the benchmark's name of the row.
        request: what the user asks; an instruction of the application, where there is one, comes before it.
        function: `name`, `description` and `parameters`, a JSON schema in the benchmark's dialect.
        accepted: argument -> accepted values; an empty string among them means that it may be left out.
    """

    id: str
    request: str
    function: Mapping[str, Any]
    accepted: Mapping[str, list[Any]]

    @property
    def name(self) -> str:
        return str(self.function["name"])

    @property
    def properties(self) -> Mapping[str, Any]:
        """Parameter -> its schema."""
        properties: Mapping[str, Any] = self.function["parameters"]["properties"]
        return properties

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(self.function["parameters"].get("required") or ())


def read_calls(held_out: int = 80, seed: int = 0) -> tuple[list[Call], list[Call]]:
    """Training rows and held-out rows; no held-out function or request occurs in training.

    Args:
        held_out: how many of the 251 `simple_python` rows whose function occurs nowhere else are held out.
        seed: chooses which of them, and nothing else; the rest is for training, in the benchmark's order.

    Raises:
        AdapterError: more rows are asked for than there are.
    """
    folder = fetch("bfcl")
    rows = [row for source in SOURCES for row in _read(folder, source)]
    functions = Counter(row.name for row in rows)
    requests = Counter(row.request for row in rows)
    alone = [row for row in rows if functions[row.name] == 1 and requests[row.request] == 1]
    candidates = [row for row in alone if row.id.startswith("simple_python")]
    if not 1 <= held_out <= len(candidates):
        raise AdapterError(f"{held_out} held-out rows were asked for; there are between 1 and {len(candidates)}.")
    test = random.Random(seed).sample(candidates, held_out)
    names = {row.name for row in test}
    return [row for row in rows if row.name not in names], test


def _read(folder: Path, source: str) -> Iterator[Call]:
    answers = {
        row["id"]: row["ground_truth"][0] for row in _lines(folder / "possible_answer" / f"BFCL_v4_{source}.json")
    }
    for row in _lines(folder / f"BFCL_v4_{source}.json"):
        ((name, accepted),) = answers[row["id"]].items()
        function = next(function for function in row["function"] if function["name"] == name)
        request = "\n".join(message["content"] for message in row["question"][0])
        yield Call(row["id"], request, function, accepted)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
