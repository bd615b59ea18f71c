"""A site map as text, with equal blocks collapsed into one row."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

from adapters._contract import KeyValueSite, StreamSite, WeightSite
from adapters._sites.aside import Unreached

Row: TypeAlias = tuple[str, ...]  # a path, then what is said of it


def collapse(rows: Iterable[Row]) -> list[Row]:
    """Joins rows that differ only in numbers of their path: `layers.{0..29}.q_proj`, with `x30` at the end."""
    groups: dict[tuple[str, Row], list[list[int]]] = defaultdict(list)
    for path, *said in rows:
        numbers = [int(n) for n in re.findall(r"(?<![^.])\d+(?![^.])", path)]
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "{}", path), tuple(said)].append(numbers)
    joined: list[Row] = []
    for (pattern, rest), found in groups.items():
        spans = [_span(sorted({numbers[i] for numbers in found})) for i in range(len(found[0]))]
        joined.append((pattern.format(*spans), *rest, f"x{len(found)}" if len(found) > 1 else ""))
    return joined


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def aligned(rows: list[Row], indent: str = "  ") -> list[str]:
    """Rows as lines whose columns line up."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [(indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip() for row in rows]


def sections(
    model: str,
    sites: tuple[WeightSite, ...],
    streams: tuple[StreamSite, ...],
    keyvalues: tuple[KeyValueSite, ...],
    left: tuple[Unreached, ...],
    coverage: str,
) -> str:
    """The whole table; a section without rows is left out."""
    weights = [site for site in sites if site.role != "embedding"]
    parts: dict[str, list[Row]] = {
        f"{model}: weights": [_weight_row(site) for site in weights if site.default],
        "weights adapted only when named": [(*_weight_row(site), site.reason) for site in weights if not site.default],
        "tables adapted only when named": [_weight_row(site) for site in sites if site.role == "embedding"],
        "streams": [_stream_row(site) for site in streams],
        "keys and values": [_keyvalue_row(site) for site in keyvalues],
        "no sites": [(each.path, f"{each.size:,}", each.reason) for each in left],
    }
    lines: list[str] = []
    for title, rows in parts.items():
        if rows:
            lines += [title, *aligned(collapse(rows))]
    return "\n".join([*lines, coverage])


def _weight_row(site: WeightSite) -> Row:
    experts = f"{site.experts} experts" if site.experts else ""
    stored = "transposed" if site.transposed else ""
    read = "read" if site.access == "read" else ""
    folded = (
        f"stored as {' x '.join(map(str, (site.n_in if site.transposed else site.n_out, *site.folded)))}"
        if site.folded
        else ""
    )
    notes = ", ".join(note for note in (experts, stored, folded, read) if note)
    path = site.path.removesuffix(".weight")
    return path, site.role, f"{site.n_in} -> {site.n_out}", notes


def _stream_row(site: StreamSite) -> Row:
    output = "" if site.output is None else f"[{site.output}]"
    known = f"input {site.input}" if site.input is not None else f"input of {site.tap}"
    if site.input is None and site.tap is None:
        known = "input unknown"
    elif site.tap is not None:
        known = f"input of ...{site.tap.removeprefix(site.block)}"
    known += f"; {site.reason}" if site.reason else ""
    return site.path + output, site.role, str(site.width), known


def _keyvalue_row(site: KeyValueSite) -> Row:
    if not site.heads:
        return site.path, "takes no prefix", site.reason
    width = str(site.k_dim) if site.k_dim == site.v_dim else f"{site.k_dim}/{site.v_dim}"
    return site.path, f"{site.heads} heads of {width}", "causal" if site.causal else "bidirectional"


def coverage_line(default: int, other: int, missing: int) -> str:
    """How many of the parameters that multiply activations are adapted by default."""
    total = default + other + missing
    share = f"{default / total:.1%}" if total else "none"
    tail = [f"{other:,} only when named"] * bool(other) + [f"{missing:,} in no site"] * bool(missing)
    return f"{share} of {total:,} matmul parameters adapted by default" + "".join(f"; {t}" for t in tail)
