"""A small set of cases in which every pair of values that any case has occurs: a greedy cover, the same each time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import combinations

from tests.trainers.cases import FACTORS, Case

Pair = tuple[tuple[str, str], tuple[str, str]]  # (factor, value) twice


def pairs_of(case: Case) -> frozenset[Pair]:
    """The pairs of values, of different factors, that a case covers."""
    return frozenset(combinations(zip(FACTORS, astuple(case), strict=True), 2))


def covering(cases: Sequence[Case]) -> list[Case]:
    """Takes the case that covers most of what is not covered yet, the first of equals, until nothing is left."""
    covers = {case: pairs_of(case) for case in cases}
    left: set[Pair] = set().union(*covers.values())
    chosen: list[Case] = []
    while left:
        best = max(cases, key=lambda case: len(covers[case] & left))
        chosen.append(best)
        left -= covers[best]
    return _without_surplus(chosen)


def _without_surplus(chosen: list[Case]) -> list[Case]:
    """Leaves out, from the first on, each case whose pairs the others cover too."""
    kept = list(chosen)
    for case in chosen:
        rest = [other for other in kept if other != case]
        if pairs_of(case) <= _covered(rest):
            kept = rest
    return kept


def _covered(cases: Iterable[Case]) -> set[Pair]:
    return set().union(*(pairs_of(case) for case in cases))
