"""Arithmetic of adapters: weighted sums, differences, other ranks, extraction from a fine-tuned model, comparison."""

from adapters._algebra.combining import combine, subtract
from adapters._algebra.comparison import DiffReport
from adapters._algebra.differing import diff
from adapters._algebra.extracting import extract
from adapters._algebra.measures import SiteDiff
from adapters._algebra.reports import CombineReport, ExtractReport, ResizeReport
from adapters._algebra.resizing import resize

__all__ = [
    "CombineReport",
    "DiffReport",
    "ExtractReport",
    "ResizeReport",
    "SiteDiff",
    "combine",
    "diff",
    "extract",
    "resize",
    "subtract",
]
