"""What a run used of the machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the platform does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def hardware() -> str:
    """What computes here: the accelerators by name, or the processor with the threads that torch uses."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name, or its architecture where the platform does not tell."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def use_all_cores() -> int:
    """Lets torch compute on every core this process may use, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(available or 1)
    return torch.get_num_threads()
