"""What attaching did: which sites are adapted, what share of the base that is, what was left out and why."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field, fields

from adapters._contract import Method, Site, WeightSite
from adapters._sites import SiteMap


@dataclass(frozen=True)
class AttachReport:
    """The facts of one `attach`. `share` is the part of the base's matmul weights whose product is adapted."""

    name: str
    method: str
    sites: dict[str, int]  # by role
    parameters: int  # trainable, head included
    base_parameters: int
    share: float | None  # None: the method does not act on weights
    head: tuple[str, ...] = ()
    left: dict[str, int] = field(default_factory=dict)  # reason -> sites
    notes: tuple[str, ...] = ()

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
        lines += [f"  not adapted: {count} sites ({reason})" for reason, count in self.left.items()]
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


def describe(found: SiteMap, chosen: tuple[Site, ...]) -> tuple[dict[str, int], float | None, dict[str, int]]:
    """Counts by role, the adapted share of matmul weights, and the sites left out by reason."""
    roles = Counter(site.role for site in chosen)
    if not isinstance(chosen[0], WeightSite):
        return dict(roles), None, {}
    taken = {site.path for site in chosen}
    size = {site.path: _size(site) for site in found.weights}
    left = Counter(site.reason or "not among the targets" for site in found.weights if site.path not in taken)
    if found.unreached:
        left["the probe did not reach them; pass example="] = len(found.unreached)
    share = sum(size[path] for path in taken) / max(1, sum(size.values()))
    return dict(roles), share, dict(left)


def _size(site: WeightSite) -> int:
    return site.n_in * site.n_out * (site.experts or 1)
