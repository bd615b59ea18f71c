"""The sites of a model as one record: comparable, printable, and the same after a trip through JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from adapters._contract import KeyValueSite, LayerSite, Site, StreamSite, WeightSite
from adapters._errors import DamagedAdapter
from adapters._sites.aside import Unreached
from adapters._sites.record import site_of, site_record
from adapters._sites.table import coverage_line, sections


@dataclass(frozen=True)
class SiteMap:
    """Every place of a model where a method can act, in order of execution, and what is left out and why.

    `unreached` are weights that multiply activations, or would, but are no site; `others` all further parameters of two
    or more dimensions: tables, masks, scales. Together with the sites they are all of the model's weights.
    """

    model: str
    weights: tuple[WeightSite, ...] = ()
    streams: tuple[StreamSite, ...] = ()
    keyvalues: tuple[KeyValueSite, ...] = ()
    layers: tuple[LayerSite, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    others: tuple[Unreached, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        yield from self.weights
        yield from self.streams
        yield from self.keyvalues
        yield from self.layers

    def of(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind: "weight", "stream", "keyvalue" or "layer"."""
        return tuple(site for site in self if site.kind == kind)

    @property
    def default_size(self) -> int:
        """Parameters in weight sites that are adapted by default."""
        return sum(prod(site.shape) for site in self.weights if site.default)

    @property
    def other_size(self) -> int:
        """Parameters in weight sites that are adapted only when named, tables left out: they multiply nothing."""
        return sum(prod(site.shape) for site in self.weights if not site.default and site.role != "embedding")

    @property
    def unreached_size(self) -> int:
        """Parameters that multiply activations but are no site."""
        return sum(left.size for left in self.unreached)

    @property
    def total_size(self) -> int:
        return self.default_size + self.other_size + self.unreached_size

    @property
    def coverage(self) -> float:
        """The fraction of the parameters that multiply activations which is adapted by default."""
        return self.default_size / self.total_size if self.total_size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_dict` makes an equal map."""
        return {
            "model": self.model,
            "weights": [site_record(site) for site in self.weights],
            "streams": [site_record(site) for site in self.streams],
            "keyvalues": [site_record(site) for site in self.keyvalues],
            "layers": [site_record(site) for site in self.layers],
            "unreached": [asdict(left) for left in self.unreached],
            "others": [asdict(left) for left in self.others],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SiteMap:
        """The map that `to_dict` wrote.

        Raises:
            DamagedAdapter: it holds something else than sites.
        """
        try:
            sites = {kind: tuple(map(site_of, record[kind])) for kind in ("weights", "streams", "keyvalues", "layers")}
            left = {kind: tuple(Unreached(**each) for each in record[kind]) for kind in ("unreached", "others")}
            return cls(str(record["model"]), **sites, **left)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise DamagedAdapter(f"this is no site map: {error}.") from error

    def __str__(self) -> str:
        coverage = coverage_line(self.default_size, self.other_size, self.unreached_size)
        left = (*self.unreached, *self.others)
        return sections(self.model, self.weights, self.streams, self.keyvalues, left, coverage)
