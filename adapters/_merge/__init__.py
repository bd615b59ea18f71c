"""Folding an adapter into the base's weights, measured against the adapted model."""

from adapters._merge.certificate import Certificate, SiteError
from adapters._merge.files import merge_files
from adapters._merge.fold import merge

__all__ = ["Certificate", "SiteError", "merge", "merge_files"]
