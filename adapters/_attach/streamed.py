"""Entries at streams: the change of a branch's output, and a fusion of what several make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach.container import Entry
from adapters._attach.state import tapped
from adapters._contract import FusionMethod, StreamMethod, StreamSite
from adapters._errors import AdapterError


class Stream(Entry):
    """The change of a branch's output before it is added to the residual stream."""

    tap: nn.Module | None
    additive = False
    needs_factors = False

    def __init__(
        self, method: StreamMethod, site: StreamSite, tensors: Mapping[str, Tensor], tap: nn.Module | None
    ) -> None:
        super().__init__(method, site, tensors, tap=tap)

    def source(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        site = cast(StreamSite, self.site)
        return self._input(site, args, kwargs) if cast(StreamMethod, self.method).reads_input() else None

    @property
    def stackable(self) -> bool:
        return cast(StreamSite, self.site).axis == -1 and cast(StreamSite, self.site).input_axis == -1

    def factors(self, p: Mapping[str, Tensor]) -> None:
        return None

    def forward(
        self,
        x: Tensor | None,
        y: Tensor,
        p: Mapping[str, Tensor],
        owned: bool = True,
        weight: float = 1.0,
        before: Any = (),
    ) -> Tensor:
        site, method = cast(StreamSite, self.site), cast(StreamMethod, self.method)
        dtype = y.dtype
        x, seen = (None if x is None else _last(x, site.input_axis)), _last(y, site.axis)
        if x is not None and x.shape != seen.shape:
            x = x.reshape(seen.shape)
        cast_p = {name: tensor.to(dtype) for name, tensor in p.items()}
        changed = method.stream(x, seen, cast_p).to(dtype)
        if changed.shape != seen.shape:
            raise AdapterError(f"method {method.name!r} makes {tuple(changed.shape)} of an output {tuple(seen.shape)}.")
        if site.axis != -1:
            changed = changed.movedim(-1, site.axis)
            # in y's memory format, by which torch chooses the kernel of the convolution that follows
            changed = changed.contiguous() if y.is_contiguous() else changed
        return changed

    def _input(self, site: StreamSite, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        if site.input is not None:
            named: Mapping[Any, Any] = kwargs
            at = site.input
            found = args[at] if isinstance(at, int) and at < len(args) else named.get(at)
        else:
            found = tapped(self.tap) if self.tap is not None else None
        if not isinstance(found, Tensor):
            raise AdapterError(f"the input of the branch at {site.path} did not reach it in this forward.")
        return found


class Fusion(Entry):
    """What a fusion makes of the outputs that its parts made."""

    additive = False
    stackable = False
    tap = None

    def source(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        return None

    def forward(
        self,
        x: tuple[Tensor, ...],
        y: Tensor,
        p: Mapping[str, Tensor],
        owned: bool = True,
        weight: float = 1.0,
        before: Any = (),
    ) -> Tensor:
        """x: the parts' outputs."""
        axis = cast(StreamSite, self.site).axis
        cast_p = {name: tensor.to(y.dtype) for name, tensor in p.items()}
        made = torch.stack([_last(part, axis) for part in x])
        fused = cast(FusionMethod, self.method).fuse(_last(y, axis), made, cast_p).to(y.dtype)
        return fused if axis == -1 else fused.movedim(-1, axis)


def _last(value: Tensor, axis: int) -> Tensor:
    # contiguous: of other layouts torch makes other products where the adapter trains than where it is frozen
    return (value if axis == -1 else value.movedim(axis, -1)).contiguous()
