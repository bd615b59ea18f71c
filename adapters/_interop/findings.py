"""What is said of a folder for another program, and what it is said from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Verdict = Literal["refused", "ignored", "to do"]
MERGE = "merge it: `adapters export --to merged`"


@dataclass(frozen=True)
class Finding:
    """What a program makes of one thing in the folder, and what would change that.

    Args:
        verdict: "refused" (it does not load), "ignored" (it loads and computes something else) or "to do" (it works
            when it is asked for in the way that `remedy` says).
    """

    verdict: Verdict
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.verdict:<8} {self.what}\n         -> {self.remedy}"


@dataclass(frozen=True)
class CheckReport:
    """What `program` makes of the adapter in `folder`. `works`: it loads, and computes what was trained."""

    folder: str
    program: str
    findings: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        return all(finding.verdict == "to do" for finding in self.findings)

    def __str__(self) -> str:
        head = f"{self.folder} in {self.program}: {'works' if self.works else 'does not work as it is'}"
        return "\n".join([head, *map(str, self.findings)])


@dataclass(frozen=True)
class Held:
    """What a folder holds: PEFT's configuration and tensors, and the method's name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    method: str

    def holding(self, *endings: str) -> list[str]:
        return [key for key in self.tensors if key.endswith(endings)]

    @property
    def is_lora(self) -> bool:
        return self.config.get("peft_type") == "LORA"

    @property
    def embeds(self) -> bool:
        """Whether rows or changes of the embeddings are in it."""
        return bool(
            self.config.get("trainable_token_indices") or self.holding("embed_tokens.weight", "lora_embedding_A")
        )


def not_lora(held: Held, dora: bool = False) -> Iterator[Finding]:
    """What programs that read LoRA alone refuse of the method.

    Args:
        dora: whether the program reads DoRA as well.
    """
    if not held.is_lora:
        what, remedy = f"the method is {held.method}, and it reads LoRA alone", MERGE
        if held.method in ("lora", "qlora"):  # of experts, which PEFT keeps otherwise than `save` does
            what, remedy = "its tensors are not in the form of PEFT's", "`adapters export --to peft`, and check that"
        yield Finding("refused", what, remedy)
    if held.config.get("use_dora") and not dora:
        yield Finding("refused", "DoRA", MERGE)
    if held.config.get("lora_bias") or held.config.get("bias") not in (None, "none"):
        yield Finding("refused", "trained biases", MERGE)
