"""Where AdapterHub has its bottleneck layers in this model: our sites, proven on the trace of one forward.

AdapterHub ports each architecture by hand, and its layers see what the port hands them: what a branch adds to the
residual stream, and the stream itself, before the norms of a pre-norm model (adapters/methods/bottleneck.py, 1.3.0).
Nothing is concluded from names of architectures: that a site returns the very tensor that is added, and that a module
is given the very tensor that it is added to, is read off the dataflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from adapters._attach.swap import base_class
from adapters._contract import Key, StreamSite
from adapters._errors import AdapterError
from adapters._sites.discover import Discovery
from adapters._sites.graph import Call, Value
from adapters._sites.operands import COPIES, SUMS
from adapters._sites.streams import Branch
from adapters._sites.weights import block_of

ATTENTIONS = ("attention_adapters", "cross_attention_adapters")  # which AdapterHub gives a layer, in this order
OUTPUT = "output_adapters"
# what adapter_interface.json, written where AdapterHub works by hooks, calls the module whose output its layer at a
# branch sees, the one whose input it takes for the residual stream, and the norm after both
HOOKED = {
    "attention": (("layer_self_attn", "attn_o_proj"), "layer_pre_self_attn", "layer_ln_1"),
    "mlp": (("layer_output_proj",), "layer_pre_ffn", "layer_ln_2"),
}
Interface: TypeAlias = Mapping[str, Any]
Way: TypeAlias = tuple[Key, str | None]  # an argument of the site's own call, or the module to tap


@dataclass(frozen=True)
class Places:
    """The places of one model. `interface` is what AdapterHub's hooks go by, None where it has a port."""

    trace: Discovery
    interface: Interface | None
    model: nn.Module

    def at(self, owner: str) -> StreamSite:
        """The site where AdapterHub's layer in the module `owner` acts.

        Raises:
            AdapterError: there is none, or the layer sees another tensor than the site.
        """
        layer, _, last = owner.rpartition(".")
        inside = [site for site in self.trace.sites.streams if _within(site.path, layer)]
        attentions = [site for site in inside if site.branch == "attention"]
        others = [site for site in inside if site.branch != "attention"]
        if last not in (*ATTENTIONS, OUTPUT):
            found = [site for site in self.trace.sites.streams if _within(site.path, owner)]
        elif len(others) != 1 or not attentions:
            found = []  # AdapterHub's layers are in something else than a layer, and see something else
        else:
            found = others if last == OUTPUT else attentions[ATTENTIONS.index(last) :][:1]
        if len(found) != 1:
            raise AdapterError(f"the adapter acts in {owner}, where this model has no branch of its own.")
        site = found[0]
        for branch in self._branches(site):
            self._require_added(site, branch, layer)
        return site

    def reading_residual(self, site: StreamSite, layer: str) -> StreamSite | None:
        """The site with the residual stream as the branch's input; None where AdapterHub's hooks see none.

        Raises:
            AdapterError: no module before the branch's end is given it.
        """
        if self.interface is not None:
            return self._hooked_residual(site, layer)
        ways = [self._ways_to(self._residual(branch, site), branch, site) for branch in self._branches(site)]
        common = [way for way in ways[0] if all(way in other for other in ways)]
        if not common:
            raise AdapterError(
                f"AdapterHub's layer at {site.path} reads the residual stream, which no module here is given."
            )
        slot, tap = common[0]
        return replace(site, input=slot, tap=tap, input_axis=-1)

    def norm_after(self, site: StreamSite, layer: str) -> nn.LayerNorm | None:
        """The norm of a post-norm model, through which branch and residual go together; None in a pre-norm model.

        Raises:
            AdapterError: it is another norm than torch's LayerNorm, or AdapterHub's hooks apply one of their own.
        """
        if self.interface is not None:
            named = self.interface.get(HOOKED[site.branch][2]) if site.branch in HOOKED else None
            if named is None:
                return None
            raise AdapterError(f"AdapterHub's hook applied the base's {layer}.{str(named)[:60]} once more.")
        paths = {self._only_consumer(branch.total, site) for branch in self._branches(site)}
        path = paths.pop()
        if path is None and not paths:
            return None
        module = self.model.get_submodule(path) if path is not None and not paths else None
        if not isinstance(module, nn.LayerNorm) or base_class(module) is not nn.LayerNorm:
            raise AdapterError(f"the sum after {site.path} goes through {path}, which is no LayerNorm of torch.")
        return module

    def _branches(self, site: StreamSite) -> list[Branch]:
        found = [b for b in self.trace.branches if b.call.path == site.path and b.key == site.output]
        if not found:
            raise AdapterError(f"this model's {site.path} is no branch of a residual sum.")
        return found

    def _require_added(self, site: StreamSite, branch: Branch, layer: str) -> None:
        """AdapterHub's ports act on the very tensor that is added, its hooks on the output of a named module."""
        if self.interface is None:
            if not _copied(branch.value, branch.returned):
                raise AdapterError(
                    f"what {site.path} returns is scaled or normalised before AdapterHub's layer sees it."
                )
            return
        names = HOOKED[site.branch][0] if site.branch in HOOKED else ()
        path = ".".join([layer, *(str(self.interface.get(name))[:60] for name in names)])
        made = {call.path for call, _ in self.trace.graph.producers.get(branch.returned.index, [])}
        if path not in made:
            raise AdapterError(f"AdapterHub's layer sees the output of {path}, which {site.path} does not return.")

    def _residual(self, branch: Branch, site: StreamSite) -> Value:
        others = [p for p in branch.total.parents if p.floating and p is not branch.value]
        plain = any(p is branch.value for p in branch.total.parents) and branch.total.use is None
        if len(others) != 1 or not plain or others[0].shape != branch.total.shape:
            raise AdapterError(f"the residual stream is not all that {site.path} is added to, as in parallel branches.")
        return others[0]

    def _ways_to(self, residual: Value, branch: Branch, site: StreamSite) -> list[Way]:
        """How the site can get at the residual: as an argument of its own, or the first of an earlier module's."""
        slots = [slot for slot, value in branch.call.inputs.items() if value is residual]
        before = [call for call in self._calls_with(residual, site.block) if call.end <= branch.call.start]
        own: list[Way] = [(slot, None) for slot in slots if isinstance(slot, int | str)]
        return own + [(None, call.path) for call in before]

    def _calls_with(self, value: Value, block: str) -> list[Call]:
        calls = sorted(self.trace.graph.calls, key=lambda call: call.order)
        return [call for call in calls if call.inputs.get(0) is value and _inside(call.path, block)]

    def _only_consumer(self, total: Value, site: StreamSite) -> str | None:
        """The module of the site's block that alone is given the sum, if there is one."""
        users = [value for value in self.trace.graph.values if any(p is total for p in value.parents)]
        if any(user.op in SUMS for user in users):
            return None  # the sum itself goes on, and is what the next branch is added to
        for call in self._calls_with(total, site.block):
            if users and all(call.holds(user.index) for user in users):
                return call.path
        return None

    def _hooked_residual(self, site: StreamSite, layer: str) -> StreamSite | None:
        assert self.interface is not None
        named = self.interface.get(HOOKED[site.branch][1]) if site.branch in HOOKED else None
        if named is None:
            return None
        path = f"{layer}.{str(named)[:60]}"
        calls = self.trace.graph.calls_of.get(path, [])
        if not calls or any(0 not in call.inputs for call in calls):
            raise AdapterError(f"AdapterHub's layer reads the first argument of {path}, and there is none here.")
        own = path == site.path
        return replace(site, input=0 if own else None, tap=None if own else path, input_axis=-1)


def _within(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.")


def _inside(path: str, block: str) -> bool:
    return path != block and block_of(path) == block


def _copied(value: Value, source: Value) -> bool:
    """Whether `value` is `source`, or a copy of it: dropout, which does nothing where it is off, or a conversion."""
    while value is not source and value.op in COPIES and len(value.active) == 1:
        value = value.active[0]
    return value is source
