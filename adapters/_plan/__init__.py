"""The memory that a training step will take, predicted from a configuration."""

from adapters._plan.predict import plan
from adapters._plan.report import Plan, Proposal
from adapters._plan.step import Batch

__all__ = ["Batch", "Plan", "Proposal", "plan"]
