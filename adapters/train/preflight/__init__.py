"""Before a run: tries out, on the model and the first rows, all that would make hours of training worthless."""

from adapters.train.preflight.examine import preflight
from adapters.train.preflight.report import Check, Preflight

__all__ = ["Check", "Preflight", "preflight"]
