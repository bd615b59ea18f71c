"""Adapter folders that mlx-lm reads."""

from adapters._mlx.adapter import MlxReport, export_mlx

__all__ = ["MlxReport", "export_mlx"]
