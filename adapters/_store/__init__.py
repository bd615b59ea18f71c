"""Adapter folders: written in one step, read strictly, tied to their base by a fingerprint."""

from adapters._attach import swap as _classes
from adapters._interop.findings import CheckReport, Finding
from adapters._store.bundle import Bundle
from adapters._store.checking import check_for
from adapters._store.composed import load, save
from adapters._store.fingerprints import check, fingerprint
from adapters._store.inspecting import inspect
from adapters._store.loading import swap
from adapters._store.reading import read
from adapters._store.reports import AdapterInfo, LoadReport, SaveReport
from adapters._store.restoring import restore, restore_attached
from adapters._store.saving import export_peft, save_attached

_classes.save_attached = save_attached  # `save_pretrained` of an adapted model comes back here

__all__ = [
    "AdapterInfo",
    "Bundle",
    "CheckReport",
    "Finding",
    "LoadReport",
    "SaveReport",
    "check",
    "check_for",
    "export_peft",
    "fingerprint",
    "inspect",
    "load",
    "read",
    "restore",
    "restore_attached",
    "save",
    "save_attached",
    "swap",
]
