"""What attaching did: which sites are adapted, what share of the base that is, what was left out and why."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field, fields
from math import prod

from adapters._attach.tokens import Tokens
from adapters._contract import Method, Site, WeightSite
from adapters._sites import SiteMap, can_act


@dataclass(frozen=True)
class AttachReport:
    """The facts of one `attach`. `share` is the part of the base's matmul weights whose product is adapted."""

    name: str
    method: str
    sites: dict[str, int]  # by role
    parameters: int  # trainable, head and rows of tokens included
    base_parameters: int
    share: float | None  # None: the method does not act on weights
    head: tuple[str, ...] = ()
    left: dict[str, int] = field(default_factory=dict)  # reason -> how many sites, weights or layers
    notes: tuple[str, ...] = ()
    tokens: Tokens | None = None

    def __str__(self) -> str:
        roles = ", ".join(f"{count} {role}" for role, count in self.sites.items())
        part = 100 * self.parameters / max(1, self.base_parameters)
        lines = [
            f"{self.name!r}: {self.method}",
            f"  acts at {sum(self.sites.values())} sites: {roles}",
            f"  trains {self.parameters:,} parameters, {part:.2f} % of the base's {self.base_parameters:,}",
        ]
        if self.share is not None:
            lines.append(f"  adapts {100 * self.share:.1f} % of the weights that multiply activations")
        lines += [f"  trains the head {path} and saves it with the adapter" for path in self.head]
        lines += [f"  trains {self.tokens} and saves them with the adapter"] if self.tokens is not None else []
        lines += [f"  not adapted: {count} ({reason})" for reason, count in self.left.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def in_short(method: Method) -> str:
    """A method as it would be written, with long texts cut."""
    shown = []
    for each in fields(method):
        value = getattr(method, each.name)
        if value == {}:  # no value differs from site to site
            continue
        shown.append(
            f"{each.name}={textwrap.shorten(value, 60)!r}" if isinstance(value, str) else f"{each.name}={value!r}"
        )
    return f"{type(method).__name__}({', '.join(shown)})"


def describe(
    found: SiteMap, chosen: tuple[Site, ...], method: Method
) -> tuple[dict[str, int], float | None, dict[str, int]]:
    """Counts by role, the adapted share of matmul weights, and what is left out, counted by reason."""
    roles, kind = Counter(site.role for site in chosen), chosen[0].kind
    taken = {site.path for site in chosen}
    left = Counter(_why(site, method) for site in found.of(kind) if site.path not in taken)
    if kind == "weight":
        left.update(each.reason for each in (*found.unreached, *found.others))
        adapted = [site for site in found.weights if site.path in taken and site.role != "embedding"]
        return dict(roles), sum(map(_size, adapted)) / max(1, found.total_size), dict(left)
    if kind == "stream":
        left.update(each.reason for each in found.unplaced)
    if kind == "keyvalue":
        blocks = {site.block for site in chosen}
        without = sum(layer.path not in blocks for layer in found.layers)
        left.update({"a layer without an attention that takes a prefix": without} if without else {})
    return dict(roles), None, dict(left)


def _why(site: Site, method: Method) -> str:
    if site.reason:
        return site.reason
    if not can_act(method, site):
        return "its branch's input is not at hand where it acts"
    return "not among the targets" if method.wants(site) else "the method leaves it out by itself: name it to adapt it"


def _size(site: Site) -> int:
    return prod(site.shape) if isinstance(site, WeightSite) else 0
