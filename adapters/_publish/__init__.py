"""Adapters for others: a card made of facts, nothing that should stay private, one commit on the Hub."""

from adapters._publish.publishing import PublishReport, publish

__all__ = ["PublishReport", "publish"]
