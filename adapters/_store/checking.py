"""Checks a folder for a program that is to read it, without a model."""

from __future__ import annotations

import os

from adapters._errors import AdapterError, nearest
from adapters._interop.findings import CheckReport, Finding, Held
from adapters._interop.programs import PROGRAMS
from adapters._store import commit
from adapters._store.inspecting import inspect
from adapters._store.parts import record_in
from adapters._store.reading import peft_files, resolve

_COMPOSED = Finding(
    "refused",
    "it is a composition of adapters",
    "`adapters compose` makes one adapter of several, where arithmetic can",
)


def check_for(folder: str | os.PathLike[str], program: str) -> CheckReport:
    """What another program makes of an adapter: what it accepts, refuses, or leaves out without a word.

    No model is needed; every tensor of the folder is verified first.

    Args:
        folder: a saved adapter, ours or PEFT's.
        program: "peft", "vllm", "llama.cpp", "mistralrs" or "mlx".

    Raises:
        AdapterError: no such program, or no adapter in the folder.
        DamagedAdapter: the folder is not what was saved.
    """
    if program not in PROGRAMS:
        known = f"{nearest(program, PROGRAMS) or '.'} Choose one of {', '.join(PROGRAMS)}."
        raise AdapterError(f"there is no program {program!r} here{known}")
    info, place = inspect(folder), resolve(folder)
    composition = record_in(place)
    if composition is not None and composition["selection"] is not None:
        return CheckReport(place, program, (_COMPOSED,))
    with commit.reading(place) as view:
        config, tensors = peft_files(view)
    return CheckReport(place, program, tuple(PROGRAMS[program](Held(config, tensors, info.method))))
