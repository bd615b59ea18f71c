"""Where a model can be adapted: found by tracing one forward, chosen by role, path or predicate."""

from __future__ import annotations

from adapters._sites.aside import Unreached
from adapters._sites.discover import example_inputs, sites
from adapters._sites.explain import explain
from adapters._sites.map import SiteMap
from adapters._sites.probe import Example, setting
from adapters._sites.record import site_of, site_record
from adapters._sites.select import Predicate, Targets, can_act, matches, select
from adapters._sites.tappable import running_as
from adapters._sites.written import Unfollowed, Written

__all__ = [
    "can_act",
    "Example",
    "example_inputs",
    "explain",
    "matches",
    "Predicate",
    "running_as",
    "select",
    "setting",
    "site_of",
    "site_record",
    "SiteMap",
    "sites",
    "Targets",
    "Unfollowed",
    "Unreached",
    "Written",
]
