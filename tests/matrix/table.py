"""The results as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.matrix.methods import METHODS
from tests.matrix.pairs import HEADS, Pair
from tests.matrix.results import DONE, Row, versions
from tests.matrix.reviewed import reviewed

_CELLS = {"pass": "yes", "refused": "refused", "fail": "**no**", "not run": "-", "": "-"}


def table(rows: list[Row]) -> str:
    """What passes, what is refused and why, what fails, and what could not be built."""
    verdicts = _verdicts(rows)
    built = {row.pair for row in rows if row.method == "build" and row.result == "pass"}
    parts = [
        "# Laws on every model type",
        "",
        f"Made by `python -m tests.matrix --table tests/matrix/RESULTS.md` with {versions()}: a tiny random model of "
        f"each of {len(built)} (type, head) pairs, {len({pair.type for pair in built})} types. A method passes where "
        "all of laws 1 to 11 hold; it is refused where `attach` says why it cannot act and leaves the model as it was.",
        "",
        "Left out are models of sound (audio encoders, speech recognition) and the joint vision-text encoders that "
        "have no text head, such as CLIP: their inputs are not tried. Batch norms are given statistics and tensors are "
        "shaken until the adapter shows, so that no pair passes by doing nothing.",
        "",
        *_gates(verdicts, rows),
        *_totals(verdicts, built),
        *_refused(rows),
        *_reasons("Not run", "not run", rows),
        *_reasons("Fails", "fail", [row for row in rows if row.pair in built]),
        *_reasons("Not built", "fail", [row for row in rows if row.method == "build"]),
        *_each(verdicts, built),
    ]
    return "\n".join(parts) + "\n"


def _verdicts(rows: list[Row]) -> dict[tuple[Pair, str], str]:
    found: dict[tuple[Pair, str], set[str]] = defaultdict(set)
    for row in rows:
        if row.method in METHODS:
            found[row.pair, row.method].add(row.result)
    order = ("fail", "refused", "not run")
    return {key: next((each for each in order if each in results), "pass") for key, results in found.items()}


def _totals(verdicts: dict[tuple[Pair, str], str], built: set[Pair]) -> list[str]:
    lines = [f"| head | pairs | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    for head in (*HEADS, ""):
        those = [pair for pair in built if not head or pair.head == head]
        if not those:
            continue
        cells = []
        for method in METHODS:
            counts = Counter(verdicts.get((pair, method), "") for pair in those)
            ran = len(those) - counts["not run"] - counts[""]
            cells.append(f"{counts['pass']} of {ran}" + (f", {counts['refused']} refused" if counts["refused"] else ""))
        lines.append(f"| {head or 'all'} | {len(those)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _gates(verdicts: dict[tuple[Pair, str], str], rows: list[Row]) -> list[str]:
    """How many pass of the pairs that each method is held to."""
    built = {row.pair for row in rows if row.method == "build" and row.result == "pass"}
    single = {pair for pair in built if pair.head not in ("seq2seq", "choice")}
    text = {pair for pair in single if pair.head not in ("image", "encoder")}
    no_matrix = {row.pair for row in rows if row.method == "qlora" and row.reason.startswith("nothing in this model")}
    ran = {pair for pair in single if verdicts.get((pair, "qlora"), "not run") != "not run"}
    held = {
        **dict.fromkeys(METHODS, ("pairs of one model and one head, bare encoders among them", single)),
        "prefix": ("language models and text heads", text),
        "qlora": ("pairs that run in bf16 and have a weight that 4 bits can store", ran - no_matrix),
    }
    lines = ["| method | passes | of | which are |", "|---|---|---|---|"]
    for method, (what, pairs) in held.items():
        those = {pair for pair in pairs if (pair, method) in verdicts}
        passed = sum(verdicts.get((pair, method)) == "pass" for pair in those)
        lines.append(f"| {method} | {passed} | {len(those)} | {what} |")
    return [*lines, ""]


def _refused(rows: list[Row]) -> list[str]:
    """Every refusal: where, its words, and why it is right, as reviewed by hand."""
    where: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.result == "refused":
            where[reviewed(row.reason) or "**not reviewed**"][row.method].append(row)
    if not where:
        return []
    lines = ["## Refused", "", "| why | method | where | in its words, for the first |", "|---|---|---|---|"]
    for why, methods in sorted(where.items()):
        for method, those in methods.items():
            names = ", ".join(sorted({f"{row.type}/{row.head}" for row in those}))
            words = those[0].reason.replace(those[0].cls, "this model").replace("|", "\\|")
            lines.append(f"| {why} | {method} | {names} | {words} |")
    return [*lines, ""]


def _reasons(title: str, result: str, rows: list[Row]) -> list[str]:
    where: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.result == result and row.method != DONE:
            law = f" (law {row.law})" if row.law else ""
            reason = row.reason.replace(row.cls, "this model").replace("|", "\\|")
            where[reason].append(f"{row.type}/{row.head} {row.method}{law}")
    if not where:
        return []
    lines = [f"| {reason} | {', '.join(sorted(set(pairs)))} |" for reason, pairs in sorted(where.items())]
    return [f"## {title}", "", "| reason | where |", "|---|---|", *lines, ""]


def _each(verdicts: dict[tuple[Pair, str], str], built: set[Pair]) -> list[str]:
    lines = ["## Each pair", "", f"| type | head | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    order = list(HEADS)
    for pair in sorted(built, key=lambda pair: (pair.type, order.index(pair.head), pair.cls)):
        cells = [_CELLS[verdicts.get((pair, method), "")] for method in METHODS]
        lines.append(f"| {pair.type} | {pair.head} | {' | '.join(cells)} |")
    return lines
