"""Recognises a base model by a few blocks of every weight, in any of fp32, bf16, fp16, int8 and nf4.

Measured on ten layers of SmolLM2 (92 weights, 70 in nf4; up to 1,024 sampled values each), recorded and met in each of
fp32, bf16, fp16, fp16 to bf16, and nf4 made from fp32, bf16 or fp16 (49 pairs), once as published and once with fp32
noise below bf16's precision added:

                                      values that differ in a weight       scale of its 4-bit blocks
    same base, same rounding path     0                                    0 to 0.35 % (double quantisation)
    same base, another path to nf4    0.2 % in the median, 1.0 % at most   0 to 0.35 %
    every weight moved by 1 %         1.5 % to 6 % of nf4, 65 % of 16 bit  any
    one weight moved by 1 %           3.9 % to 4.4 % of its nf4 codes      any
    all weights times 1.01            nf4 codes are blind to it            1.0 % in the median
Refused: codes that differ in more than 4 values and 8 deviations beyond the median weight's, more than 1 % of 16- or
32-bit values, a scale off by 0.6 %. All 49 pairs were accepted, and all pairs of each changed base refused.

int8 (bitsandbytes' row-wise codes), made from fp32, bf16 or fp16, beside each other format, measured likewise:

                                      beside 16 or 32 bits  beside int8              beside nf4
    same base                         0                     0                        0.7 % to 7.5 % of its codes
    same base, codes by way of bf16   1.6 % at most         0.23 to 0.70 of c / 256  0.9 % to 6.5 %
    every weight moved by 1 %         8.7 % to 44 %         2.1 to 4.3 of c / 256    1.7 % to 9.4 %
    one weight moved by 1 %           19 % to 29 % of its   2.6 to 2.8 of c / 256    any
    all weights times 1.01            11 % to 35 %          its scales, by 1.0 %     any
    every weight moved by 5 %         more                  more                     13 % to 27 %
c is the sum of the codes without their signs, of which rounding to bf16 first moves each by 1 / 256 of it at most.
Refused: 4 % of 16- or 32-bit values, codes that differ in more than 4 values and 3 deviations beyond that, 10 % of nf4
codes. Beside nf4 a change of 1 % hides in the rounding of both, which the sentence then says.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from adapters._attach import base_parameters
from adapters._attach.swap import base_class
from adapters._errors import DamagedAdapter, WrongBase
from adapters._store.compare import Difference, compare
from adapters._store.sample import Sample, restore, sample

FORMAT = 1
MOST_BLOCKS, FEWEST, ALL_BLOCKS, MOST_WEIGHTS = 16, 4, 4096, 1024
FLOAT_LIMIT, CODE_LIMIT, SCALE_LIMIT, VAGUE_SCALE_LIMIT = 0.01, 0.015, 0.006, 0.02


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, Any]:
    """What identifies the base of `model`: a function of its weights alone, whatever is attached to it.

    Args:
        exclude: paths of modules that belong to an adapter (trained heads) and not to the base.

    Returns:
        JSON-able: class, model type, and for every parameter its shape, stored dtype, further names (tied weights)
        and sampled values; for more than 1,024 parameters, values of 1,024 spread evenly over them.
    """
    found = dict(_named(model, exclude))
    count = max(FEWEST, min(MOST_BLOCKS, ALL_BLOCKS // max(1, len(found))))
    read = set(list(found)[:: -(-len(found) // MOST_WEIGHTS) or 1])
    entries = {}
    for path, (module, parameter, aliases) in found.items():
        entry = sample(module, parameter, count if path in read else 0, path).record()
        entries[path] = {**entry, **({"aliases": aliases} if aliases else {}), "sampled": path in read}
    return {"format": FORMAT, **identity(model), "blocks": count, "parameters": entries}


def identity(model: nn.Module) -> dict[str, str]:
    """Class and family of a model."""
    config = getattr(model, "config", None)
    return {"class": base_class(model).__name__, "model_type": str(getattr(config, "model_type", "") or "")}


def digest(recorded: Mapping[str, Any]) -> str:
    """A short name for a fingerprint, to show and to compare by eye."""
    return hashlib.sha256(repr(sorted(recorded.items(), key=str)).encode()).hexdigest()[:12]


def check(recorded: Mapping[str, Any], model: nn.Module, exclude: Collection[str] = ()) -> str:
    """Compares a model with a recorded fingerprint and says in one sentence how they were found to agree.

    Raises:
        WrongBase: they differ; the sentence names the first of class, missing or extra weights, shapes, values.
        DamagedAdapter: the record is not a fingerprint.
    """
    entries, blocks = _entries(recorded)
    for key, have in identity(model).items():
        if recorded[key] != have:
            what = "class" if key == "class" else "model type"
            raise WrongBase(f"the adapter's base has the {what} {recorded[key]!r}, this model {have!r}.")
    live = {name: (module, p) for path, (module, p, more) in _named(model, exclude) for name in (path, *more)}
    _same_names(entries, live)
    differences: list[Difference] = []
    skipped = shapes = 0
    for path, entry in entries.items():
        old = restore(entry, path)
        new = sample(*live[path], blocks if entry["sampled"] else 0, path)
        _same_shape(path, old, new)
        found = compare(path, old, new) if entry["sampled"] else None
        skipped += entry["sampled"] and found is None
        shapes += not entry["sampled"]
        differences += [found] if found is not None else []
    _judge(differences)
    values = sum(difference.count for difference in differences)
    left = f", {shapes} more in their shapes" if shapes else ""
    vague = sum(difference.vague for difference in differences)
    left += f"; {vague} of them in int8 and nf4 alone, where a change of 1 % could not be checked" if vague else ""
    left += f"; {skipped} could not be compared in their formats" if skipped else ""
    return f"the base is the one recorded: {len(differences)} weights agree in {values:,} sampled values{left}."


def _named(
    model: nn.Module, exclude: Collection[str]
) -> Iterator[tuple[str, tuple[nn.Module, nn.Parameter, list[str]]]]:
    """Every base parameter once, under the first of its names in the alphabet, with its other names; sorted."""
    names: dict[int, list[str]] = {id(parameter): [] for parameter in base_parameters(model).values()}
    where: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            path = f"{prefix}.{name}" if prefix else name
            if parameter is not None and id(parameter) in names and not _within(path, exclude):
                names[id(parameter)].append(path)
                where[path] = (module, parameter)
    for first, *more in sorted(sorted(paths) for paths in names.values() if paths):
        yield first, (*where[first], more)


def _within(path: str, modules: Collection[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def _entries(recorded: Mapping[str, Any]) -> tuple[Mapping[str, Mapping[str, Any]], int]:
    entries, blocks = recorded.get("parameters"), recorded.get("blocks")
    known = recorded.get("format") == FORMAT and isinstance(recorded.get("class"), str)
    if not known or not isinstance(entries, Mapping) or not isinstance(blocks, int) or "model_type" not in recorded:
        raise DamagedAdapter("the record of the adapter's base is not one that this version can read.")
    for entry in entries.values():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("sampled"), bool):
            raise DamagedAdapter("the record of the adapter's base holds something other than weights.")
    return entries, blocks


def _same_names(entries: Mapping[str, Mapping[str, Any]], live: Collection[str]) -> None:
    known = {name for path, entry in entries.items() for name in (path, *entry.get("aliases", ()))}
    missing, extra = sorted(known - set(live)), sorted(set(live) - known)
    if missing:
        raise WrongBase(
            f"this model lacks {len(missing)} of the {len(known)} weights of the adapter's base{_such(missing)}."
        )
    if extra:
        raise WrongBase(f"this model has {len(extra)} weights that the adapter's base had not{_such(extra)}.")


def _such(paths: list[str]) -> str:
    return f", {paths[0]}" if len(paths) == 1 else f", the first of them {paths[0]}"


def _same_shape(path: str, old: Sample, new: Sample) -> None:
    # an unknown quantiser packs its weights into another shape
    if old.comparable and new.comparable and old.shape != new.shape:
        raise WrongBase(f"{path} has the shape {list(old.shape)} in the adapter's base and {list(new.shape)} here.")


def _judge(differences: list[Difference]) -> None:
    """Refuses when a weight differs by more than its rounding can explain."""
    rates = [
        difference.rate
        for difference in differences
        if difference.coarse and difference.count and difference.explained is None
    ]
    usual = statistics.median(rates) if rates else 0.0  # what another rounding path does to every weight alike
    wrong = [difference for difference in differences if _differs(difference, usual)]
    if not wrong:
        return
    worst = max(wrong, key=lambda difference: (difference.rate, difference.scale))
    how = f"{worst.rate:.1%} of its sampled values" if worst.moved else f"its scale, by {worst.scale:.1%}"
    raise WrongBase(
        f"the weights are not those of the adapter's base: {len(wrong)} of {len(differences)} differ, "
        f"{worst.path} in {how}."
    )


def _differs(found: Difference, usual: float) -> bool:
    if found.explained is not None:
        return found.moved > found.explained or found.scale > (VAGUE_SCALE_LIMIT if found.vague else SCALE_LIMIT)
    if not found.coarse:
        return found.moved > FLOAT_LIMIT * found.count
    expected = min(usual, CODE_LIMIT) * found.count
    # 4 for values on the very edge of a code; 8 deviations, because a rounded scale moves a block's codes together
    return found.moved > expected + 8 * expected**0.5 + 4 or found.scale > SCALE_LIMIT or usual > CODE_LIMIT
