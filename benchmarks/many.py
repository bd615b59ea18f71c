"""Many adapters on one base: loading 50 of them, choosing among them, exchanging one, holding 500.

LoRA r8 on every linear layer, fp32. PEFT loads with `low_cpu_mem_usage`, its faster way. `hot swap` exchanges the only
adapter of a model. Beside it stand PEFT's `hotswap_adapter`, which checks nothing, and the floor under any swap: to
read the file with safetensors and to copy its tensors. Memory is what is resident, in a process of its own; an adapter
that was used also holds a view of each of its tensors, 0.7 KB apiece.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import adapters
from adapters._attach import tensors_of
from adapters._store.bundle import WEIGHTS
from benchmarks.fleet import LORA8, fleet, folders, keep, load_ours, load_theirs
from benchmarks.measure import Pair, Row, Side, Unit
from benchmarks.storing import total
from benchmarks.twins import NAME, Setting, close, saved, twins

CHOICES = 100  # of one measurement, each of another selection


def _load(setting: Setting) -> Pair:
    """All folders into one model, none of them acting."""
    places = folders(setting, "lora", setting.adapters)[: setting.adapters]
    held: dict[str, Any] = {}

    def base(side: str) -> None:
        held[side] = setting.base(torch.float32)

    def run_ours() -> Any:
        return held["ours"], load_ours(held["ours"], places)

    def after(side: str, found: tuple[Any, list[float]]) -> float:
        model, seconds = found
        keep(setting, "lora", **{side: model}).seconds[side] = seconds
        return _squares(model)

    return Pair(
        Side(run_ours, partial(base, "ours"), partial(after, "ours")),
        Side(lambda: load_theirs(held["theirs"], places), partial(base, "theirs"), partial(after, "theirs")),
        close(1e-12),
    )


def _squares(model: Any) -> float:
    """A number that depends on every tensor of every adapter of either side."""
    mine = adapters.adapters_of(model)
    if mine:
        tensors: Any = (t for name in mine for t in tensors_of(model, name).values())
    else:
        tensors = (p for name, p in model.named_parameters() if "lora_" in name)
    return sum(float(tensor.detach().double().pow(2).sum()) for tensor in tensors)


def _growth(setting: Setting) -> Pair:
    """The last ten of the loads above beside the first ten, of each side."""

    def ratio(side: str) -> float:
        seconds = fleet(setting).seconds[side]
        few = max(1, len(seconds) // 5)
        return mean(seconds[-few:]) / mean(seconds[:few])

    return Pair(Side(partial(ratio, "ours")), Side(partial(ratio, "theirs")))


def _switch(setting: Setting) -> Pair:
    """From one adapter to another, with all of them attached; both must then compute the same."""
    here = fleet(setting)
    batch = setting.batch(here.ours)

    def switch(activate: Callable[[str], Any]) -> None:
        activate("1")
        activate("2")

    def output(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**batch).logits
        return found

    def by_peft(name: str) -> None:
        here.theirs.set_adapter(name, inference_mode=True)

    return Pair(
        Side(lambda: switch(partial(adapters.activate, here.ours)), after=lambda _: output(here.ours)),
        Side(lambda: switch(by_peft), after=lambda _: output(here.theirs)),
        close(1e-4),
    )


def _choose(setting: Setting, selection: Callable[[list[str], int], Any]) -> Pair:
    """Each time one that was never chosen before, made before the clock starts."""
    here, order = fleet(setting), Random(0)
    names = [str(i) for i in range(setting.adapters)]
    made: list[Any] = []

    def before() -> None:
        made[:] = [selection(order.sample(names, len(names)), setting.mixed) for _ in range(CHOICES)]

    def choose() -> None:
        adapters.activate(here.ours, made.pop())

    return Pair(Side(choose, before, after=lambda _: adapters.activate(here.ours, None)))


def _row_list(names: list[str], rows: int) -> Any:
    return [names[i % len(names)] for i in range(rows)]


def _stacks(names: list[str], rows: int) -> Any:
    return [adapters.Stack(names[i % len(names)], names[(5 * i + 1) % len(names)]) for i in range(rows)]


def _average(names: list[str], rows: int) -> Any:
    some = names[:4]
    return adapters.Average(*some, weights=[0.1 * i for i in range(1, len(some) + 1)])


def _swaps(setting: Setting, label: str) -> tuple[Any, Any, list[Path]]:
    ours, theirs = twins(setting, torch.float32, train=False, **LORA8)
    return (
        ours,
        theirs,
        [saved(setting, setting.base(torch.float32), f"{label}-{i}", "lora", i, **LORA8) for i in (1, 2)],
    )


def _sources(how: str, places: list[Path]) -> list[Any]:
    return [adapters.read(place) for place in places] if how == "from memory" else list(places)


def _swap(setting: Setting, how: str) -> Pair:
    """PEFT reads the folder each time: it has no other way."""
    from peft.utils.hotswap import hotswap_adapter

    ours, theirs, places = _swaps(setting, "many")
    sources, turns = _sources(how, places), {"ours": count(), "theirs": count()}

    def run_ours() -> Any:
        adapters.swap(ours, NAME, sources[next(turns["ours"]) % 2], check=how != "unchecked")
        return ours

    def run_theirs() -> Any:
        hotswap_adapter(theirs, str(places[next(turns["theirs"]) % 2]), NAME, torch_device="cpu")
        return theirs

    return Pair(Side(run_ours, after=total), Side(run_theirs, after=total), close(1e-12))


def _swap_beside_the_floor(setting: Setting, how: str) -> Pair:
    ours, _, places = _swaps(setting, "floor")
    sources, turns = _sources(how, places), {"ours": count(), "theirs": count()}

    def run_ours() -> Any:
        adapters.swap(ours, NAME, sources[next(turns["ours"]) % 2], check=how != "unchecked")
        return ours

    def floor() -> dict[str, Tensor]:
        found = load_file(places[next(turns["theirs"]) % 2] / WEIGHTS)
        return {key: tensor.clone() for key, tensor in found.items()}

    def squares(copied: dict[str, Tensor]) -> float:
        return sum(float(tensor.double().pow(2).sum()) for tensor in copied.values())

    return Pair(Side(run_ours, after=total), Side(floor, after=squares), close(1e-12))


_PROGRAM = """
import ctypes, gc, os, sys
import torch, adapters
from adapters._attach import tensors_of
torch.set_num_threads(1)
folder, count = sys.argv[1], int(sys.argv[2])
{base}

def resident():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is nobody's
    except (AttributeError, OSError):
        pass
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

token = torch.tensor([[1]])
with torch.no_grad():
    model(token)  # what torch keeps of a first forward is no adapter's
pool = adapters.Pool(model)
pool.add(folder, name="first")
size = sum(tensor.nbytes for tensor in tensors_of(model, "first").values())
pool.remove("first")
before = resident()
for i in range(count):
    pool.add(folder, name=str(i))
full = resident()
with torch.no_grad():
    for i in range(count):
        with adapters.using(model, str(i)):
            model(token)
used = resident()
for i in range(count):
    pool.remove(str(i))
print((full - before) / (count * size), (used - before) / (count * size), (resident() - before) / 2**20)
"""


@lru_cache(maxsize=4)
def _pool(scratch: Path, folder: Path, size: int, base: str) -> list[float]:
    """Memory of `size` adapters per byte of their tensors, before and after each is used, and MiB left without them."""
    command = [sys.executable, "-c", _PROGRAM.format(base=base), str(folder), str(size)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [float(each) for each in found[-3:]]


def _memory(setting: Setting, part: int) -> Pair:
    place = setting.folder("pool")
    if not place.exists():
        saved(setting, setting.base(torch.float32), "pool", "lora", rank=4, alpha=8.0)
    return Pair(Side(lambda: _pool(setting.scratch, place, setting.pool, setting.program)[part]))


def _beside_peft(how: str) -> Row:
    # digests alone take longer than a fifth of PEFT's time, which checks nothing
    return Row(f"hot swap r8, {how}", partial(_swap, how=how), limit=0.2, gated=how != "checked")


def _beside_the_floor(how: str, most: int) -> Row:
    build = partial(_swap_beside_the_floor, how=how)
    return Row(f"hot swap r8, {how} (asked: at most {most})", build, peer="read + copy", gated=False)


def _pool_row(label: str, part: int, unit: Unit) -> Row:
    build = partial(_memory, part=part)
    return Row(f"pool of 500 r4: {label}", build, peer="", gated=False, units=(unit,), most_pairs=1)


ROWS = [
    Row("load 50 adapters r8", _load, limit=0.04, most_pairs=1, warm=False),
    Row("the last ten of 50 loads beside the first ten", _growth, gated=False, units=("ratio",), most_pairs=1),
    Row("switch among 50 adapters, twice", _switch, calls=3),
    Row("activate a new average of 4", partial(_choose, selection=_average), peer="", gated=False, calls=CHOICES),
    Row("activate a new list of 32 rows", partial(_choose, selection=_row_list), peer="", gated=False, calls=CHOICES),
    Row("activate a new list of 32 stacks of 2", partial(_choose, selection=_stacks), "", False, calls=CHOICES),
    *map(_beside_peft, ("checked", "unchecked", "from memory")),
    *(_beside_the_floor(how, most) for how, most in {"checked": 3, "unchecked": 2, "from memory": 2}.items()),
    Row("pool of 500 r4: memory per byte", partial(_memory, part=0), "", False, units=("ratio",), most_pairs=1),
    Row(
        "pool of 500 r4, each used: memory per byte",
        partial(_memory, part=1),
        "",
        False,
        units=("ratio",),
        most_pairs=1,
    ),
    Row("pool of 500 r4: left when removed", partial(_memory, part=2), "", False, units=("MiB",), most_pairs=1),
]
