"""What a run used of the machine."""

from __future__ import annotations

import os
import sys

import torch


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the platform does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def use_all_cores() -> int:
    """Lets torch compute on every core this process may use, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(available or 1)
    return torch.get_num_threads()
