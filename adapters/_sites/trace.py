"""Records one forward as a graph: every torch function through a mode, every module call through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from adapters._contract import Key, Rows
from adapters._fourbit import dequantize, shape_of
from adapters._sites.graph import Attention, Call, Graph, Slot, Use, Value, WrittenOut
from adapters._sites.operands import PRODUCTS, inner_axis, operation, reverses, same_object
from adapters._sites.rows import rows_of
from adapters._sites.written import pair

LOOKUPS = frozenset(
    {"embedding", "embedding_bag"}
)  # their result depends on the input, though their float operand is a weight


class Tracer(TorchFunctionMode):
    """Builds `graph` while active. `parameters` and `modules` map paths to what may become a site."""

    def __init__(self, parameters: dict[str, nn.Parameter], modules: dict[str, nn.Module], rows: int = 0) -> None:
        super().__init__()
        self.graph = Graph()
        self.rows = rows  # of the probe's batch, where they are alike in the way that `rows_of` needs
        self.parameters, self.modules = parameters, modules
        self.stack: list[Call] = []
        self.inside_interface = False  # in an attention that transformers' interface dispatches
        # weak: keeping every activation of a large mixture of experts alive would cost gigabytes
        self._current: Any = WeakTensorKeyDictionary()
        self._names: dict[int, str] = {}
        self._storages: dict[int, str] = {}
        self._buffers = {id(buffer) for module in modules.values() for buffer in module._buffers.values()}
        for path, parameter in parameters.items():
            self._names.setdefault(id(parameter), path)
            if parameter.numel() and _in_memory(parameter):
                self._storages.setdefault(parameter.untyped_storage().data_ptr(), path)

    def value(self, tensor: Tensor) -> Value:
        """The value that `tensor` holds now; one that no traced operation made starts here."""
        known: Value | None = self._current.get(tensor)
        if known is not None:
            return known
        path = self._weight_path(tensor)
        if path is not None:
            self.graph.touched.add(path)
            return self._new("weight", (), tensor, frozenset([path]))
        if id(tensor) in self._buffers:
            return self._new("buffer", (), tensor)
        return self._new("unknown", tuple(self.stack[-1].inputs.values()) if self.stack else (), tensor)

    def _weight_path(self, tensor: Tensor) -> str | None:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        if isinstance(tensor, nn.Parameter) and self.stack:  # offloaded weights are new objects inside the call
            module = self.modules[self.stack[-1].path]
            for name, parameter in module._parameters.items():
                if parameter is tensor:
                    return f"{self.stack[-1].path}.{name}"
        if type(tensor) not in (Tensor, nn.Parameter) or not _in_memory(tensor) or not tensor.numel():
            return None
        try:
            return self._storages.get(tensor.untyped_storage().data_ptr())
        except (NotImplementedError, RuntimeError):  # inside torch.func.vmap tensors have no storage
            return None

    def _new(self, op: str, parents: tuple[Value, ...], tensor: Tensor, weights: frozenset[str] = frozenset()) -> Value:
        live = not weights and any(p.floating and (p.live or p.weights) for p in parents)
        floating = tensor.is_floating_point()
        value = Value(len(self.graph.values), op, parents, tuple(tensor.shape), floating, weights, live)
        self.graph.values.append(value)
        self._current[tensor] = value
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = operation(func)
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        parents = tuple(self.value(t) for t in operands)
        result = func(*args, **kwargs)
        made = [args[0]] if op == "__setitem__" else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in made if not same_object(op, t, operands)]
        if made:
            values = [self._made(op, parents, operands, tensor) for tensor in made]
            if pair(op, args, kwargs) is not None and not self.inside_interface:
                self.graph.pairs.append(values[0].index)
            if op in PRODUCTS:
                self._product(op, args, operands, parents, values[0])
            elif op in LOOKUPS:
                self._lookup(operands, parents, values[0])
        return result

    def _made(self, op: str, parents: tuple[Value, ...], operands: list[Tensor], tensor: Tensor) -> Value:
        floats = [p for p in parents if p.floating]
        pure = bool(floats) and op not in LOOKUPS and all(p.weights for p in floats)
        weights = frozenset[str]().union(*[p.weights for p in floats]) if pure else frozenset[str]()
        value = self._new(op, parents, tensor, weights)
        if pure:
            value.flipped = floats[0].flipped ^ reverses(op, operands[0], tensor)
        return value

    def _product(
        self, op: str, args: tuple[Any, ...], operands: list[Tensor], parents: tuple[Value, ...], out: Value
    ) -> None:
        """Notes a product as the use of a weight, or as a meeting of two activations."""
        if out.weights:
            return
        heavy = [i for i, p in enumerate(parents) if p.weights and operands[i].dim() >= 2]
        light = [p for p in parents if p.floating and not p.weights]
        if self.inside_interface and not heavy:
            return  # `attended` notes the whole
        if op == "scaled_dot_product_attention":
            self.graph.products.append((out, parents[:3]))
            self.graph.attentions.append(Attention(parents[0], parents[1], parents[2]))
            self.graph.written.append(WrittenOut(parents[0], parents[1], parents[2], out, out, softmax=True))
        elif heavy and light:
            i = heavy[-1]  # the bias of addmm comes before its weight
            matrices = frozenset(w for w in parents[i].weights if len(shape_of(self.parameters[w])) >= 2)
            axis = inner_axis(op, args, operands[i], i)
            units = operands[i].shape[-1 if axis == -2 else -2] if operands[i].dim() > 1 else 0
            if axis is not None and parents[i].flipped:
                axis = -3 - axis
            if matrices:
                x = operands[len(parents) - 1 - parents[::-1].index(light[-1])]
                whole, rows = parents[i].op == "weight", self._rows(x, op)
                spread = op.startswith("conv") and operands[i].shape[2:].numel() > 1
                out.use = Use(matrices, op, self._module, light[-1], out, axis, whole, rows, units, spread)
                self.graph.uses.append(out.use)
        elif len(light) >= 2 and light[-1].live and light[-2].live:
            self.graph.products.append((out, tuple(light[-2:])))

    def _lookup(self, operands: list[Tensor], parents: tuple[Value, ...], out: Value) -> None:
        tables = [(i, p) for i, p in enumerate(parents) if p.weights and operands[i].dim() == 2]
        indices = [(i, p) for i, p in enumerate(parents) if not p.floating]
        if tables and indices:
            (i, x), (_, table) = indices[0], tables[0]
            rows = rows_of(operands[i], self.rows, 0)
            use = Use(table.weights, "embedding", self._module, x, out, None, table.op == "weight", rows)
            self.graph.lookups.append(use)

    @property
    def _module(self) -> str:
        return self.stack[-1].path if self.stack else ""

    def _rows(self, x: Tensor, op: str) -> Rows:
        return rows_of(x, self.rows, x.dim() - 1 if op.startswith("conv") else 1)

    def formed(self, parameter: nn.Parameter) -> Tensor:
        """A 4-bit parameter as a dense weight that is known by its path."""
        with torch._C.DisableTorchFunction():
            dense = dequantize(parameter)
        path = self._names[id(parameter)]
        self.graph.touched.add(path)
        self._new("weight", (), dense, frozenset([path]))
        return dense

    def multiplied(self, path: str, weight: str, x: Tensor, out: Tensor) -> None:
        """Notes `out` as the product of `x` with a weight that torch functions never see: a quantised one."""
        matrix = Value(len(self.graph.values), "weight", (), (), True, frozenset([weight]))
        self.graph.values.append(matrix)
        source = self.value(x)
        value = self._new("linear", (source, matrix), out)
        value.use = Use(
            frozenset([weight]), "linear", path, source, value, -1, True, self._rows(x, "linear"), out.shape[-1]
        )
        self.graph.touched.add(weight)
        self.graph.uses.append(value.use)

    def attended(self, path: str, causal: bool, operands: tuple[Value, Value, Value], rows: Rows, out: Tensor) -> None:
        """Notes an attention that went through transformers' attention interface."""
        if out not in self._current:  # a kernel that torch functions do not see
            self._new("attention", operands, out)
        self.graph.products.append((self.value(out), operands))
        self.graph.attentions.append(Attention(*operands, path, causal, rows))

    def watch(self) -> list[RemovableHandle]:
        """Hooks every module; the caller removes the handles."""
        handles = []
        for path, module in self.modules.items():
            if path:
                handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self._leave(path), with_kwargs=True))
        return handles

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(path, len(self.graph.values))
            for slot, tensor in _slots(args, kwargs):
                call.inputs[slot] = self.value(tensor)
            call.start, call.depth = len(self.graph.values), len(self.stack)
            self.stack.append(call)

        return enter

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            call = self.stack.pop()
            for key, tensor in _outputs(out):
                if tensor not in self._current:
                    self._new("opaque", tuple(call.inputs.values()), tensor)
                call.outputs[key] = self.value(tensor)
                call.rows[key] = rows_of(tensor, self.rows)
            call.end = len(self.graph.values)
            self.graph.calls.append(call)

        return leave


def _in_memory(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def _slots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Slot, Tensor]]:
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    slots: list[tuple[Slot, Any]] = [*arguments]
    for key, argument in arguments:
        slots += [
            ((key, i), element) for i, element in enumerate(argument if isinstance(argument, tuple | list) else ())
        ]
    return ((slot, t) for slot, t in slots if isinstance(t, Tensor) and t.is_floating_point())


def _outputs(out: Any) -> Iterator[tuple[Key, Tensor]]:
    pairs: list[tuple[Key, Any]]
    if isinstance(out, Tensor):
        pairs = [(None, out)]
    elif hasattr(out, "items"):
        pairs = list(out.items())
    else:
        pairs = list(enumerate(out)) if isinstance(out, tuple | list) else []
    for key, tensor in pairs:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield key, tensor


def record(tracer: Tracer, run: Callable[[], Any]) -> Graph:
    """Runs the model under the tracer and returns the graph."""
    handles = tracer.watch()
    try:
        with torch.no_grad(), tracer:
            out = run()
    finally:
        for handle in handles:
            handle.remove()
    floats = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    tracer.graph.results.extend(tracer.value(t) for t in floats)
    return tracer.graph
