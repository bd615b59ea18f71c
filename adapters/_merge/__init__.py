"""Folding an adapter into the base's weights, measured against the adapted model."""

from adapters._merge.certificate import Certificate, SiteError
from adapters._merge.fold import merge

__all__ = ["Certificate", "SiteError", "merge"]
