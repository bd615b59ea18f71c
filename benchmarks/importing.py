"""Import time beyond torch, in new processes: CPU time from before to after the import, the smallest of five."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.measure import Pair, Row, Side
from benchmarks.twins import Setting

_PROGRAM = """
import time, torch
start = time.process_time()
{work}
print((time.process_time() - start) * 1e3)
"""


def _time(work: str) -> float:
    command = [sys.executable, "-c", _PROGRAM.format(work=work)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _import(setting: Setting) -> Pair:
    return Pair(Side(partial(_time, "import adapters")), Side(partial(_time, "import peft")))


def _everything(setting: Setting) -> Pair:
    """Every module of ours that a public name needs; transformers and the like come when they are used."""
    return Pair(Side(partial(_time, "import adapters\nfor name in adapters.__all__: getattr(adapters, name)")))


ROWS = [
    Row("import adapters", _import, units=("import ms",), most_pairs=5),
    Row("import every public name", _everything, peer="", gated=False, units=("import ms",), most_pairs=5),
]
