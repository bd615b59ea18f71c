"""Which adapters other programs can hold that know linear layers and low-rank changes of them, and nothing else."""

from __future__ import annotations

from torch import nn

from adapters._attach import Adapter, adapters_of
from adapters._contract import WeightSite
from adapters._errors import AdapterError, nearest
from adapters.methods.dora import DoRA
from adapters.methods.lora import LoRA
from adapters.methods.qlora import QLoRA


def low_rank_adapter(model: nn.Module, name: str, program: str, dora: bool = False) -> Adapter:
    """The adapter, if the program has a word for all of it.

    Args:
        program: as sentences call it.
        dora: whether it has DoRA as well.

    Raises:
        AdapterError: none of that name is attached, or it is another method, trains biases, a head or rows of tokens,
            or acts at something else than linear layers that are called.
    """
    held = adapters_of(model)
    if name not in held:
        raise AdapterError(f"no adapter {name!r} is attached{nearest(name, held)}")
    adapter, method = held[name], held[name].method
    if not isinstance(method, LoRA | QLoRA) and not (dora and isinstance(method, DoRA)):
        kinds = "LoRA and DoRA" if dora else "LoRA"
        raise AdapterError(
            f"{program}'s adapters are {kinds}, and {name!r} is {method.name!r}: merge it, and export the model."
        )
    what = "trains biases" if getattr(method, "bias", False) else "holds a head" if adapter.head else ""
    what = what or ("holds rows of tokens" if adapter.tokens is not None else "")
    if what:
        raise AdapterError(f"{name!r} {what}, which {program}'s adapters do not have: merge it.")
    for site in adapter.sites:
        plain = isinstance(site, WeightSite) and site.access == "call" and site.experts is None and not site.folded
        if not plain or site.role == "embedding":
            raise AdapterError(
                f"{name!r} changes {site.path}, which is no linear layer of its own: {program}'s adapters change those "
                "alone; merge it, or train it on fewer targets."
            )
    return adapter
