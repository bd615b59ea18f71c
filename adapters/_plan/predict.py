"""`plan`: the memory of a training step, predicted without loading a weight."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from adapters._attach.verbs import make_method
from adapters._contract import Method
from adapters._errors import AdapterError, nearest
from adapters._hub.quiet import quiet
from adapters._plan.hollow import Blueprint, Hollow, blueprint, hollow
from adapters._plan.proposals import propose
from adapters._plan.report import Plan, from_peak
from adapters._plan.sizes import bytes_in
from adapters._plan.step import Batch, Peak, loss_kind, measure

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_ATTACH = ("targets", "head", "tokenizer")


def plan(
    model: Any,
    method: str | Method = "lora",
    *,
    rows: int = 1,
    tokens: int = 512,
    memory: str | int | None = None,
    learned: int | None = None,
    dtype: torch.dtype | str | None = None,
    bits: int | None = None,
    checkpointing: bool = False,
    accumulation: int = 1,
    padded: bool = False,
    kind: str | None = None,
    **hyperparameters: Any,
) -> Plan:
    """Predicts the peak memory of a training step, by running it on tensors that have a shape and no memory.

    The model is built from its configuration, adapted, and taken through forward, loss, backward and AdamW's update by
    the code that trains it; counted is every storage that is alive, once.

    Args:
        model: an embedded name, a Hub id, a folder with a config.json, a configuration, or a live model, which is not
            touched.
        method: as `attach` takes it.
        rows, tokens: of a micro-batch, all rows being full and below each other: the largest that a run has.
        memory: what there is, in bytes, or as in "24GB"; where the step does not fit, other settings are proposed.
        learned: tokens of a row that have a label; all by default, and so many logits are made at a time.
        dtype: of the base; by default as `load_base` chooses it.
        bits: 4 for a base in nf4.
        checkpointing: activations are computed twice and few are kept.
        accumulation: micro-batches of a step; from the second on, gradients are there during the forward.
        padded: rows differ in length, so that there is a mask.
        kind: as `load_base` takes it.
        hyperparameters: fields of the method; `targets`, `head` and `tokenizer` as `attach` takes them.

    Raises:
        AdapterError: no such model, method or unit, or a model that cannot be run on fake tensors.

    Example:
        >>> import adapters
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, vocab_size=160)
        >>> found = adapters.plan(config, "lora", kind="causal", rank=4, rows=2, tokens=32, memory="1MB")
        >>> found.base, found.adapter, found.fits
        (329024, 29696, False)
    """
    batch = _batch(rows, tokens, learned, accumulation, checkpointing, padded)
    there = None if memory is None else bytes_in(memory)
    options = {key: hyperparameters.pop(key) for key in _OF_ATTACH if key in hyperparameters}
    chosen = make_method(method, hyperparameters)
    drawn = blueprint(model, _dtype(dtype), kind, _bits(bits))
    with quiet(), _Stage(drawn, chosen, options) as stage:
        now = 4 if chosen.quantize is not None else drawn.bits
        peak, loss = stage.peak(batch, now), stage.loss
        size = lambda other, bits: stage.peak(other, bits).total  # noqa: E731 - the shape that `propose` asks for
        short = there is not None and peak.total > there
        more, notes = propose(batch, now, peak.total, there, size) if short and there is not None else ((), ())
    facts = {"model": drawn.name, "method": chosen.name, "dtype": str(drawn.dtype).removeprefix("torch."), "bits": now}
    notes = (*_short_of_positions(drawn.config, tokens), *notes)
    return from_peak(peak, **facts, batch=batch, loss=loss, memory=there, proposals=more, notes=notes)


def _short_of_positions(config: Any, tokens: int) -> tuple[str, ...]:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= tokens:
        return ()
    return (f"the configuration has {positions:,} positions, and a row has {tokens:,} tokens",)


class _Stage:
    """Keeps the hollow model of the bits asked for last, since building one takes as long as a step."""

    def __init__(self, drawn: Blueprint, method: Method, options: dict[str, Any]) -> None:
        self.drawn, self.method, self.options = drawn, method, options
        self._stack, self._bits = ExitStack(), 0
        self._hollow: Hollow | None = None
        self._known: dict[tuple[Batch, int], Peak] = {}

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def loss(self) -> str:
        assert self._hollow is not None
        return loss_kind(self._hollow.model)

    def peak(self, batch: Batch, bits: int) -> Peak:
        key = batch, bits
        if key not in self._known:
            self._known[key] = measure(self._of(bits), batch)
        return self._known[key]

    def _of(self, bits: int) -> Hollow:
        if self._hollow is None or self._bits != bits:
            self._hollow = None  # the next one may be refused
            self._stack.close()
            self._hollow = self._stack.enter_context(hollow(self.drawn.in_bits(bits), self.method, self.options))
            self._bits = bits
        return self._hollow


def _batch(rows: int, tokens: int, learned: int | None, accumulation: int, checkpointing: bool, padded: bool) -> Batch:
    counts = {"rows": (rows, 1), "tokens": (tokens, 2), "accumulation": (accumulation, 1)}
    counts |= {} if learned is None else {"learned": (learned, 1)}
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AdapterError(f"{name} is {value!r}; it is a whole number from {least} on.")
    if learned is not None and learned >= tokens:
        raise AdapterError(f"learned is {learned}, and of {tokens} tokens at most {tokens - 1} are predicted.")
    return Batch(rows, tokens, learned or tokens - 1, accumulation, checkpointing, padded)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise AdapterError(f"dtype is {dtype!r}{nearest(str(dtype), _DTYPES)} Of the base: {', '.join(_DTYPES)}.")
    return found


def _bits(bits: int | None) -> int | None:
    if bits not in (None, 4):
        raise AdapterError(f"bits is {bits!r}; a base is planned in 4 bits, or as it is stored if bits are left out.")
    return bits
