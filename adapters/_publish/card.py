"""The card of a published adapter, made of what its record says and of nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapters._store.bundle import Bundle, method_record
from adapters._store.card import MARK, cell, table


def snippet(base: str, place: str, bundle: Bundle) -> str:
    """The program that the card shows: it loads the adapter onto its base."""
    more = f', kind="classifier", num_labels={len(bundle.labels)}' if bundle.labels else ""
    brought = ", tokenizer=tokenizer" if bundle.tokens is not None else ""
    return (
        "import adapters\n\n"
        f"model, tokenizer = adapters.load_base({json.dumps(base)}{more})\n"
        f"print(adapters.load(model, {json.dumps(place)}{brought}))\n"
    )


@dataclass(frozen=True)
class Licenses:
    """Of the adapter, its base, and the data that it was trained on ("" where nobody said)."""

    adapter: str
    base: str
    data: str


def published_card(
    bundle: Bundle, repo: str, base: str, licenses: Licenses, peft: str, ran: str, pictures: bool
) -> bytes:
    """The text.

    Args:
        peft: what the folder is to stock PEFT.
        ran: what the snippet printed, or "".
        pictures: whether training.png is beside it.
    """
    training = {**bundle.training, "data_license": licenses.data or "not stated"}
    scores, losses = training.pop("scores", None), training.pop("losses", None)
    front = ["---", f"license: {json.dumps(licenses.adapter)}", "library_name: adapters", "tags:", "- adapter"]
    front.append(f"- {json.dumps(bundle.method.name)}")
    if "/" in base:
        front.append(f"base_model: {json.dumps(base)}")
    roles = Counter(site.role for site in bundle.sites)
    known = bundle.base or {}
    lines = [
        *front,
        "---",
        MARK,
        f"# {cell(repo.rpartition('/')[2])}",
        "",
        f"An adapter ({bundle.method.name}, {bundle.parameters:,} parameters) for {base}. The base is loaded beside it "
        "and stays as it is.",
        "",
        "```python",
        snippet(base, f"hub:{repo}", bundle).rstrip(),
        "```",
        "",
        *([f"This program was run before publishing; it printed:\n\n```text\n{ran.strip()}\n```", ""] if ran else []),
        f"Stock PEFT: {peft}.",
        "",
        *_scores(scores),
        *_curve(losses),
        *(["![losses, learning rate and changes by layer](training.png)", ""] if pictures else []),
        *table("Trained", dict(_flat(training))),
        *table("Method", method_record(bundle.method)["fields"]),
        *table(
            "Sites", {"weights and layers": len(bundle.sites), **{f"of them {role}": n for role, n in roles.items()}}
        ),
        *table(
            "Base",
            {
                "name": base,
                "licence": licenses.base,
                "class": known.get("class", ""),
                "type": known.get("model_type", ""),
                "fingerprint": bundle.base_digest or "in adapter.json",
            },
        ),
        *table("Written with", {**bundle.versions, "created": bundle.created}),
    ]
    return ("\n".join(lines).rstrip() + "\n").encode()


def _scores(scores: Any) -> list[str]:
    """Base and adapted side by side, as the recipe's evaluation found them."""
    if not isinstance(scores, Mapping) or not isinstance(scores.get("base"), Mapping):
        return []
    base, adapted = scores["base"], scores.get("adapted") or {}
    rows = [f"| {cell(str(key))} | {_number(base[key])} | {_number(adapted.get(key))} |" for key in base]
    compared, interval = scores.get("compared"), scores.get("interval")
    found = [
        f"On {scores.get('rows', '?')} held-out rows:",
        "",
        "| | base | with the adapter |",
        "|---|---|---|",
        *rows,
        "",
    ]
    if compared in base and isinstance(interval, list | tuple) and len(interval) == 2:
        low, high = map(_number, interval)
        found += [f"The change of `{cell(str(compared))}` lies between {low} and {high} (95 %, paired bootstrap).", ""]
    return ["## Scores", "", *found]


def _curve(losses: Any) -> list[str]:
    """The loss of every step, thinned to at most 20."""
    if not isinstance(losses, list | tuple) or not losses or not all(isinstance(x, int | float) for x in losses):
        return []
    every = max(1, -(-len(losses) // 20))
    shown = ", ".join(f"{x:.3g}" for x in losses[::every])
    return ["## Loss", "", f"Of {len(losses)} steps, one in {every}: {shown}.", ""]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{above}{key}", value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
