"""Attentions written out in a model's own code: scores, a softmax, and a second product with the values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from adapters._sites.graph import Graph, Value, WrittenOut
from adapters._sites.operands import SOFTMAXES

Products: TypeAlias = Mapping[int, tuple[Value, ...]]  # the operands of each, by the index of its result


def written_out(graph: Graph) -> list[WrittenOut]:
    """Pairs of products without a weight in between: the second takes what became of the first's result."""
    products: Products = {value.index: operands for value, operands in graph.products if len(operands) == 2}
    return [found for out, operands in graph.products for found in _pair(products, out, operands)]


def _pair(products: Products, out: Value, operands: tuple[Value, ...]) -> Iterator[WrittenOut]:
    if len(operands) != 2:
        return
    made_of = [_scores(operand, products) for operand in operands]
    for found, other in zip(made_of, reversed(operands), strict=True):
        # a product of two such results is a recurrence between chunks, and no attention
        if found is not None and sum(each is not None for each in made_of) == 1:
            scores, softmax = found
            query, key = products[scores.index]
            yield WrittenOut(query, key, other, scores, out, softmax)


def _scores(operand: Value, products: Products) -> tuple[Value, bool] | None:
    """A product before `operand` with no weight in between, and whether a softmax lies on the way to it.

    Of several that are added up, as where positions have scores of their own, it is the first: that of the contents.
    """
    seen: set[tuple[int, bool]] = set()
    todo = [(operand, False)]
    found: tuple[Value, bool] | None = None
    while todo:
        value, softmax = todo.pop()
        if value.index in products:
            if found is None or (softmax, -value.index) > (found[1], -found[0].index):
                found = value, softmax
            continue
        if (value.index, softmax) in seen or value.use is not None:
            continue
        seen.add((value.index, softmax))
        todo.extend((parent, softmax or value.op in SOFTMAXES) for parent in value.active)
    return found
