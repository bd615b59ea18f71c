"""Newspaper headlines, sarcastic or not: 28,614 rows of the `sarcasm` evaluation in OpenAI's evals (MIT)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from adapters._errors import AdapterError
from adapters._hub import fetch
from adapters.data.scoring import plain

LABELS = ("sincere", "sarcastic")


@dataclass(frozen=True)
class Headline:
    """A headline, and 1 where it is sarcastic, else 0."""

    text: str
    label: int


def read_headlines(held_out: int = 2000, seed: int = 0) -> tuple[list[Headline], list[Headline]]:
    """Training rows and held-out rows, shuffled by `seed`; a headline that occurs twice is kept once.

    Headlines are the same when they differ in case, spaces or punctuation only; those found with both labels are left
    out.

    Raises:
        AdapterError: more rows are asked for than there are.
    """
    rows: dict[str, Headline] = {}
    contradicted = set()
    with (fetch("sarcasm") / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            headline = Headline(row["input"][-1]["content"], int(row["ideal"]))
            first = rows.setdefault(plain(headline.text), headline)
            if first.label != headline.label:
                contradicted.add(plain(headline.text))
    unique = [headline for key, headline in rows.items() if key not in contradicted]
    if not 1 <= held_out < len(unique):
        raise AdapterError(f"{held_out} held-out rows were asked for; there are between 1 and {len(unique) - 1}.")
    random.Random(seed).shuffle(unique)
    return unique[held_out:], unique[:held_out]
