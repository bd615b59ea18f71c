"""The results as Markdown."""

from __future__ import annotations

from collections import defaultdict

from tests.trainers.cases import FACTORS, JOINS, METHODS, NAMES, every, why_not
from tests.trainers.checks import CLOSE, FALL, ONCE, RISE
from tests.trainers.results import CHECKS, Row, versions

_MEANING = {
    "learns": f"the mean loss of the last quarter of the steps is at least {FALL:.0%} below that of the first; for "
    f"GRPO the mean reward is at least {RISE:.0%} above it",
    "moved": "every tensor of the adapter has moved, and the base is bit for bit a freshly made one",
    "checkpoint": "the trainer's checkpoint holds the adapter's tensors and no others, optimizer included, and gives a "
    "fresh base the very same outputs",
    "one_base": f"all models that the trainer holds have together at most {ONCE} times the parameters of one base and "
    "the attached adapters",
    "like_peft": f"with LoRA, the losses (and rewards) of every step are within {CLOSE:.0e} of the same run's through "
    "stock PEFT, started from the same tensors; `adapters.train.SFTTrainer` is compared with TRL's",
    "recomputed": "with gradient checkpointing every layer is computed again in every backward pass, without it none",
    "apart": f"packed, the first step's loss is within {CLOSE:.0e} of the mean over its documents, each run alone",
}


def table(rows: list[Row]) -> str:
    """One line a loop and method, what is refused or fails and why, and what there is no case of."""
    parts = [
        "# Training loops",
        "",
        f"Made by `python -m tests.trainers --table tests/trainers/RESULTS.md` with {versions()}: "
        f"{len(rows)} cases, each in a process of its own, of which {_count(rows, 'pass')} pass. The bases are tiny "
        "random models: a Llama (with a classifier's head for rewards), a BERT for sentence-transformers.",
        "",
        *(f"- **{check}**: {meaning}." for check, meaning in _MEANING.items()),
        "",
        "On a 4-bit base TRL rounds what it trains to bf16, and PEFT then rounds the activations as well, which "
        "adapters here do not: for **like_peft** both are given fp32 tensors back before they train.",
        "",
        *_lines(rows),
        *_checks(rows),
        *_references(rows),
        *_reasons("Refused", "refused", rows),
        *_reasons("Fails", "fail", rows),
        *_not_applicable(),
    ]
    return "\n".join(parts) + "\n"


def _count(rows: list[Row], result: str) -> int:
    return sum(row.result == result for row in rows)


def _lines(rows: list[Row]) -> list[str]:
    lines = [f"| loop | {' | '.join(METHODS)} | slowest case |", f"|---|{'---|' * len(METHODS)}---|"]
    for loop, name in NAMES.items():
        those = [row for row in rows if row.loop == loop]
        if not those:
            continue
        cells = []
        for method in METHODS:
            here = [row for row in those if row.method == method]
            refused = f", {_count(here, 'refused')} refused" if _count(here, "refused") else ""
            cells.append(f"{_count(here, 'pass')} of {len(here)}{refused}" if here else "-")
        slowest = max(those, key=lambda row: row.seconds)
        lines.append(f"| {name} | {' | '.join(cells)} | {slowest.seconds:.1f} s |")
    return [*lines, ""]


def _checks(rows: list[Row]) -> list[str]:
    """How often each check was asked and held, and the worst number."""
    lines = ["| check | holds | asked of | worst |", "|---|---|---|---|"]
    for check in CHECKS:
        found = [getattr(row, check) for row in rows if getattr(row, check) != "-"]
        numbers = [float(value) for value in found if value not in ("pass", "fail") and " " not in value]
        worst = f"{max(numbers):.2g}" if numbers and check != "one_base" else ""
        lines.append(f"| {check} | {sum(value != 'fail' for value in found)} | {len(found)} | {worst} |")
    return [*lines, ""]


def _references(rows: list[Row]) -> list[str]:
    """What the trainers that need a reference hold, as a multiple of the base and one adapter."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.one_base not in ("-", "fail"):
            found[row.join, row.method].append(float(row.one_base))
    if not found:
        return []
    lines = [
        "## What DPO, KTO and GRPO hold",
        "",
        "Parameters of all models that the trainer holds, divided by those of the base and one adapter. By "
        "`peft_config` the reference is the base alone; of an adapter that was attached or loaded TRL takes a frozen "
        "copy as the reference, the second adapter here. These bases are so small that a copy shows.",
        "",
        f"| | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    for join, meaning in JOINS.items():
        cells = [f"{max(found[join, method]):.4f}" if (join, method) in found else "" for method in METHODS]
        if any(cells):
            lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return [*lines, ""]


def _reasons(title: str, result: str, rows: list[Row]) -> list[str]:
    where: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.result == result:
            where[row.reason.replace("|", "\\|")].append(str(row.case))
    if not where:
        return []
    lines = [f"| {reason} | {', '.join(cases)} |" for reason, cases in sorted(where.items())]
    return [f"## {title}", "", "| reason | where |", "|---|---|", *lines, ""]


def _not_applicable() -> list[str]:
    where: dict[str, set[str]] = defaultdict(set)
    for case in every():
        if why := why_not(case):
            where[why].add(case.loop)
    lines = [f"| {why} | {', '.join(loop for loop in NAMES if loop in loops)} |" for why, loops in where.items()]
    values = "; ".join(f"{factor}: {', '.join(known)}" for factor, known in FACTORS.items() if factor != "loop")
    ways = [f"- `{join}`: {meaning}" for join, meaning in JOINS.items()]
    return [
        "## What there is no case of",
        "",
        f"All combinations of {values} are run, but for these. The ways in which an adapter joins (`join`):",
        "",
        *ways,
        "",
        "| reason | loops |",
        "|---|---|",
        *lines,
    ]
