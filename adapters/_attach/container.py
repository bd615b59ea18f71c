"""Where an adapter's tensors live: `module.adapters[slot]`, modules that are called with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call

from adapters._contract import Key, KeyValueMethod, Method, Rows, Site
from adapters._errors import AdapterError

CHILD = "adapters"


class Container(nn.ModuleDict):
    """The child `adapters` of an adapted module; its entries are named by slot."""

    is_adapter_container = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Has no tensors of its own."""


class Entry(nn.Module):
    """One adapter's tensors at one site. Entries missing from a base's state dict are not an error of that dict."""

    def __init__(self, method: Method, site: Site, tensors: Mapping[str, Tensor], **own: Any) -> None:
        super().__init__()
        self.method, self.site = method, site
        for name, value in own.items():
            self.__dict__[name] = value  # before the tensors, whose names must not hide them; never a child
        # one order, fresh or loaded: an optimizer's state is matched with parameters by their order
        for name, tensor in sorted(tensors.items()):
            if hasattr(self, name) or "." in name or not name:
                raise AdapterError(f"method {method.name!r} cannot call a tensor {name!r}: the name is taken.")
            self.register_parameter(name, nn.Parameter(tensor))

    def own(self) -> dict[str, Tensor]:
        """The tensors that the entry itself holds; none where an adapter's are in a row of the bank."""
        return cast(dict[str, Tensor], self._parameters)

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def rows(self) -> Rows:
        return self.site.rows

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)


class KeyValue(Entry):
    """Keys and values that the attention interface prepends; never called by the module that holds it."""

    def forward(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return cast(KeyValueMethod, self.method).prefix(p)


class LayerStates(Entry):
    """Hidden states with which virtual tokens enter a layer; never called by the layer itself."""

    def forward(self, p: Mapping[str, Tensor]) -> Tensor:
        return cast(KeyValueMethod, self.method).states(p)


class Replica(nn.Module):
    """A trained copy of a head: while its adapter acts it answers in the head's place, in the dtype of its input."""

    rows = Rows("flattened", 0)  # it may be given several vectors a row, as for multiple choice
    additive = False

    def __init__(self, head: nn.Module, path: str) -> None:
        super().__init__()
        self.head, self.path = head, path

    def own(self) -> dict[str, Tensor]:
        return {}

    def source(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, dict(kwargs)

    def forward(
        self,
        x: tuple[tuple[Any, ...], dict[str, Any]],
        y: Any,
        p: Mapping[str, Tensor],
        owned: bool = True,
        weight: float = 1.0,
        before: Any = (),
    ) -> Any:
        args, kwargs = x
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        trained = {name: p.to(inputs[0].dtype) if inputs else p for name, p in self.head.named_parameters()}
        return functional_call(self.head, trained, args, dict(kwargs))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Has no tensors of its own."""


def put(output: Any, key: Key, changed: Tensor) -> Any:
    """`output` with the element at `key` exchanged; containers keep their type."""
    if key is None:
        return changed
    if isinstance(output, tuple):
        items = [changed if i == key else item for i, item in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    output[key] = changed
    return output
