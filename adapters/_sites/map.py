"""The sites of a model as one record: comparable, printable, and the same after a trip through JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from adapters._contract import KeyValueSite, LayerSite, Site, StreamSite, WeightSite
from adapters._errors import DamagedAdapter
from adapters._sites.aside import Unreached
from adapters._sites.record import site_of, site_record
from adapters._sites.table import coverage_line, sections
from adapters._whole import write_whole


@dataclass(frozen=True)
class SiteMap:
    """Every place of a model where a method can act, in order of execution, and what is left out and why.

    `unreached` are weights that multiply activations, or would, but are no site; `others` all further parameters of two
    or more dimensions: masks, scales, biases. Together with the sites they are all of the model's weights. `unplaced`
    are branches of the residual stream whose value no module returns by itself.
    """

    model: str
    weights: tuple[WeightSite, ...] = ()
    streams: tuple[StreamSite, ...] = ()
    keyvalues: tuple[KeyValueSite, ...] = ()
    layers: tuple[LayerSite, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    others: tuple[Unreached, ...] = ()
    unplaced: tuple[Unreached, ...] = ()

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
            "unplaced": [asdict(left) for left in self.unplaced],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SiteMap:
        """The map that `to_dict` wrote.

        Raises:
            DamagedAdapter: it holds something else than sites.
        """
        try:
            sites = {kind: tuple(map(site_of, record[kind])) for kind in ("weights", "streams", "keyvalues", "layers")}
            left = {
                kind: tuple(Unreached(**each) for each in record[kind]) for kind in ("unreached", "others", "unplaced")
            }
            return cls(str(record["model"]), **sites, **left)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise DamagedAdapter(f"this is no site map: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the map as JSON, whole or not at all; `attach(..., sites=SiteMap.load(path))` then needs no trace."""
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SiteMap:
        """The map that `save` wrote.

        Raises:
            DamagedAdapter: the file is not one.
        """
        with open(path) as file:
            try:
                return cls.from_dict(json.load(file))
            except ValueError as error:
                raise DamagedAdapter(f"{os.fspath(path)} is no site map: {error}.") from error

    def __str__(self) -> str:
        coverage = coverage_line(self.default_size, self.other_size, self.unreached_size)
        left = (*self.unreached, *self.others, *self.unplaced)
        return sections(self.model, self.weights, self.streams, self.keyvalues, left, coverage)
