"""What saving, loading and looking at an adapter folder return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SaveReport:
    """What was written. `files` maps names to bytes; `peft` is "written", or why stock PEFT cannot read it."""

    folder: str
    name: str
    files: Mapping[str, int]
    tensors: int
    parameters: int
    peft: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"saved {self.name!r} into {self.folder}: {self.parameters:,} parameters in {self.tensors} tensors",
            *(f"  {name:<28}{size:>12,} bytes" for name, size in self.files.items()),
            f"  PEFT folder: {self.peft}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and how its base was checked."""

    folder: str
    name: str
    method: str
    sites: int
    tensors: int
    parameters: int
    base: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"loaded {self.name!r} ({self.method}) from {self.folder}: "
            f"{self.parameters:,} parameters in {self.tensors} tensors at {self.sites} sites",
            f"  base: {self.base}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder holds, as far as it can be known without a model."""

    folder: str
    name: str
    method: str
    hyperparameters: Mapping[str, Any]
    roles: Mapping[str, int]
    head: tuple[str, ...]
    tensors: int
    parameters: int
    files: Mapping[str, int]
    base: Mapping[str, str]
    labels: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    verified: bool = True  # False: a folder without our record, whose digests nobody wrote down

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {count}" for role, count in self.roles.items()) or "not recorded"
        base = ", ".join(f"{key} {value}" for key, value in self.base.items() if value) or "not recorded"
        fields = ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters.items())
        shown = {
            "method": f"{self.method}({fields})",
            "sites": roles,
            "head": ", ".join(self.head),
            "size": f"{self.parameters:,} parameters in {self.tensors} tensors, {sum(self.files.values()):,} bytes",
            "base": base,
            "labels": ", ".join((self.labels or {}).values()),
            "training": ", ".join(f"{key} {value}" for key, value in self.training.items())[:500],
            "written": f"{self.created} with {', '.join(f'{k} {v}' for k, v in self.versions.items())}"
            if self.created
            else "",
            "checked": "digests, shapes and values" if self.verified else "values only: the folder records no digests",
        }
        rows = [f"  {key:<9}{value}" for key, value in shown.items() if value]
        return "\n".join([f"{self.name!r} in {self.folder}", *rows])
