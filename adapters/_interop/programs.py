"""What other programs make of an adapter's folder: what they accept, refuse, or leave out without a word.

The rules are those of each program's own reader: PEFT 0.21 and mistral.rs 0.9.5, both run by the tests; llama.cpp's
llama-adapter.cpp, as `export_gguf` writes for it; vLLM's vllm/lora/peft_helper.py, read and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Verdict = Literal["refused", "ignored", "to do"]
MERGE = "merge it: `adapters export --to merged`"
VLLM_RANK = 16  # of --max-lora-rank, where it is not given


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


EMBEDDINGS = Finding("refused", "rows or changes of the embeddings", MERGE)


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
    def rank(self) -> int:
        """The largest."""
        return max((self.tensors[key].shape[0] for key in self.holding("lora_A.weight")), default=0)

    @property
    def embeds(self) -> bool:
        """Whether rows or changes of the embeddings are in it."""
        return bool(
            self.config.get("trainable_token_indices") or self.holding("embed_tokens.weight", "lora_embedding_A")
        )

    @property
    def patterns(self) -> str:
        """Those that are not empty."""
        return " and ".join(key for key in ("rank_pattern", "alpha_pattern") if self.config.get(key))


def _only_lora(held: Held) -> Iterator[Finding]:
    """What holds for every program but PEFT."""
    if held.config.get("peft_type") != "LORA":
        yield Finding("refused", f"the method is {held.method}, and it reads LoRA alone", MERGE)
    if held.config.get("use_dora"):
        yield Finding("refused", "DoRA", MERGE)
    if held.config.get("lora_bias") or held.config.get("bias", "none") != "none":
        yield Finding("refused", "trained biases", MERGE)
    if held.config.get("modules_to_save"):
        yield Finding("refused", f"modules_to_save: {', '.join(held.config['modules_to_save'])}", MERGE)


def _peft(held: Held) -> Iterator[Finding]:
    if held.config.get("peft_type") in (None, "ADAPTERS"):
        yield Finding(
            "refused", f"PEFT cannot express this adapter ({held.method})", "load it with this library, or merge it"
        )


def _vllm(held: Held) -> Iterator[Finding]:
    yield from _only_lora(held)
    if held.patterns:
        yield Finding(
            "ignored",
            f"{held.patterns}: one rank and one alpha are read for all layers",
            "`adapters.resize` to one rank, and train with one alpha; or merge it",
        )
    if held.embeds:
        yield EMBEDDINGS
    if held.config.get("target_parameters"):
        yield Finding("ignored", "target_parameters: experts that are read as parameters", MERGE)
    if held.rank > VLLM_RANK:
        yield Finding("to do", f"rank {held.rank}", f"start it with --max-lora-rank {_at_least(held.rank)}")


def _at_least(rank: int) -> int:
    """The smallest rank that vLLM offers for this one (vllm/config/lora.py)."""
    offered = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    return next((each for each in offered if each >= rank), rank)


def _llama_cpp(held: Held) -> Iterator[Finding]:
    found = list(_only_lora(held))
    yield from found
    if held.embeds:
        yield EMBEDDINGS
    elif held.config.get("target_parameters"):
        yield Finding("refused", "target_parameters: experts that are read as parameters", MERGE)
    elif not found:
        yield Finding("to do", "it reads GGUF files", "`adapters export --to gguf`")


def _mistral_rs(held: Held) -> Iterator[Finding]:
    yield from _only_lora(held)
    if held.embeds:
        yield EMBEDDINGS
    yield Finding(
        "to do",
        "it looks for rope_theta at the top of the base's config.json, where transformers 5 writes it no more",
        "copy it there from rope_parameters",
    )


PROGRAMS: Mapping[str, Callable[[Held], Iterator[Finding]]] = {
    "peft": _peft,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "mistralrs": _mistral_rs,
}
