"""What was predicted, as a record and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adapters._plan.sizes import shown
from adapters._plan.step import Batch, Peak


@dataclass(frozen=True)
class Proposal:
    """Other settings, what they cost, and the bytes that they are predicted to take."""

    change: str
    cost: str
    batch: Batch
    bits: int
    peak: int
    fits: bool

    def __str__(self) -> str:
        return f"{self.change}: {shown(self.peak)}, {'fits' if self.fits else 'does not fit'} ({self.cost})"


@dataclass(frozen=True)
class Plan:
    """The predicted peak of a training step, in bytes of tensors, on the path that the code takes on a CPU.

    `base` to `activations` are what is alive at the peak and add up to it, `at` is the op that made it. What a kernel
    takes and gives back within one op, a GPU's context and the gaps of its allocator come on top. `proposals` are made
    where it does not fit in `memory`, and `notes` say what to look at, and what this model cannot take.
    """

    model: str
    method: str
    dtype: str
    bits: int
    batch: Batch
    base: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    at: str
    loss: str
    memory: int | None = None
    proposals: tuple[Proposal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return self.base + self.adapter + self.gradients + self.moments + self.activations

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the memory that was given, if any was."""
        return None if self.memory is None else self.peak <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.method}: {describe(self.batch, self.bits)}, {self.dtype}"]
        for name in ("base", "adapter", "gradients", "moments", "activations", "peak"):
            lines.append(f"  {name:<12}{shown(getattr(self, name)):>12}  {self._about(name)}".rstrip())
        return "\n".join([*lines, *self._verdict(), *(f"note: {note}" for note in self.notes)])

    def _about(self, name: str) -> str:
        none_yet = "" if self.gradients else f"none yet at the peak, {shown(self.adapter)} after the backward pass"
        notes = {
            "base": "weights in 4 bits, and what stays as it is" if self.bits == 4 else "",
            "gradients": none_yet,
            "moments": "AdamW's two",
            "activations": "kept for the backward pass, and under way",
            "peak": f"at {self.at}; the loss is {self.loss}",
        }
        return notes.get(name, "")

    def _verdict(self) -> list[str]:
        if self.memory is None:
            return []
        if self.fits:
            spare = shown(self.memory - self.peak)
            return [f"fits in {shown(self.memory)}: {spare} are left for a GPU's context and its allocator's gaps"]
        lines = [f"does not fit in {shown(self.memory)}: {shown(self.peak - self.memory)} too much"]
        return lines + [f"  {each}" for each in self.proposals]


def describe(batch: Batch, bits: int) -> str:
    """A batch in words: `8 rows x 1,024 tokens, checkpointing, 4 bits`."""
    parts = [f"{batch.rows:,} row{'s' if batch.rows > 1 else ''} x {batch.tokens:,} tokens"]
    parts += [f"{batch.learned:,} of them learned"] if batch.learned < batch.tokens - 1 else []
    parts += [f"{batch.accumulation} micro-batches a step"] if batch.accumulation > 1 else []
    parts += ["checkpointing"] if batch.checkpointing else []
    parts += ["4 bits"] if bits == 4 else []
    return ", ".join(parts)


def from_peak(peak: Peak, **facts: Any) -> Plan:
    """A plan whose parts are those of a peak."""
    parts = {name: getattr(peak, name) for name in ("base", "adapter", "gradients", "moments", "activations", "at")}
    return Plan(**parts, **facts)
