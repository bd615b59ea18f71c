"""The configuration by which peft, and trainers that know peft, name our methods. Imported only after peft."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import PeftConfig

from adapters._attach import Adapter
from adapters._interop.peft_write import REGISTRY_TYPE
from adapters._store.bundle import method_of, method_record
from adapters._store.record import json_safe


class _Type(str):
    """Stands where peft has a member of an enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    name = value


TYPE = _Type(REGISTRY_TYPE)


@dataclass
class AdaptersConfig(PeftConfig):  # type: ignore[misc]
    """A method of ours with what `attach` needs beside it. `source` is the attached adapter that it was read from."""

    method: Any = None
    targets: Any = None
    head: Any = None
    tokens: Any = None
    dtype: Any = torch.float32
    tokenizer: Any = field(default=None, repr=False)
    example: Any = field(default=None, repr=False)
    sites: Any = field(default=None, repr=False)
    source: Any = field(default=None, repr=False)
    saved: bool = False  # read from a folder, which holds the tensors as well

    def __post_init__(self) -> None:
        self.task_type = None  # peft knows its own tasks only, and chooses its classes by them: ours comes afterwards
        super().__post_init__()
        self.peft_type = self.task_type = TYPE
        if isinstance(self.method, dict):  # from a file
            self.method = method_of(self.method)

    @property
    def target_modules(self) -> tuple[str, ...] | None:
        """Under peft's name: the modules that an attached adapter acts on, or what was asked for."""
        if self.source is None:
            return self.targets  # type: ignore[no-any-return]
        return tuple(dict.fromkeys(getattr(site, "owner", site.path) for site in self.source.sites))

    @property
    def modules_to_save(self) -> list[str] | None:
        """Under peft's name: the heads that are trained whole."""
        if self.source is not None:
            return list(self.source.head) or None
        return None if isinstance(self.head, bool) or self.head is None else list(self.head)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, without what only lives in this process."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _LIVE}
        record = method_record(self.method) if self.method is not None else None
        return {**json_safe(kept), "method": record, "peft_type": str(TYPE), "task_type": None}


_LIVE = ("tokenizer", "example", "sites", "source", "dtype", "method")


def config_of(adapter: Adapter, dtype: torch.dtype) -> AdaptersConfig:
    """The configuration of an attached adapter: another model attaches the same by it, at the same places."""
    return AdaptersConfig(
        method=adapter.method,
        targets=tuple(site.path for site in adapter.sites),
        head=adapter.head,
        dtype=dtype,
        tokens=list(adapter.tokens.ids) if adapter.tokens is not None else None,
        source=adapter,
        inference_mode=not adapter.trainable,
    )
