"""One thread a test process: the tests run side by side, and timings are compared in one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

# an installed plugin: a module and its metadata on the path, found through the entry point alone
sys.path.insert(0, str(Path(__file__).parent / "plugin"))
