"""What other programs make of an adapter's folder: what they accept, refuse, or leave out without a word.

The rules are those of each program's own reader: PEFT 0.21, mistral.rs 0.9.5 and mlx-lm 0.32, all run by the tests;
llama.cpp's llama-adapter.cpp, as `export_gguf` writes for it; vLLM 0.32, in vllm_rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from adapters._interop.findings import MERGE, Finding, Held, not_lora
from adapters._interop.folder import PREFIX
from adapters._interop.patterns import pattern_value
from adapters._interop.vllm_rules import vllm


def _peft(held: Held) -> Iterator[Finding]:
    if held.config.get("peft_type") not in (None, "ADAPTERS"):
        yield from _other_rank(held) if held.is_lora else ()
        return
    what = f"PEFT cannot read this folder, of the method {held.method}"
    if held.method in ("lora", "qlora", "prefix"):
        remedy = "`adapters export --to peft` writes what PEFT can express, or says why it cannot"
        yield Finding("refused", what, remedy)
    else:
        yield Finding("refused", what, "load it with this library, or merge it")


def _other_rank(held: Held) -> Iterator[Finding]:
    """PEFT makes tensors of the configuration's rank (8 where it is silent), and the file's must fit."""
    for key in held.holding(".lora_A.weight"):
        owner = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if "experts" in owner or owner.endswith(".base_layer"):
            continue  # side by side in one tensor
        said = pattern_value(held.config.get("rank_pattern") or {}, owner, held.config.get("r") or 8)
        if held.tensors[key].shape[0] != said:
            what = f"rank {said} in the configuration and {held.tensors[key].shape[0]} at {owner}"
            yield Finding("refused", what, "write the file's rank into the configuration")
            return


def _plain(held: Held, dora: bool = False) -> Iterator[Finding]:
    """What holds for programs that know linear layers alone."""
    yield from not_lora(held, dora)
    if held.config.get("modules_to_save"):
        yield Finding("refused", f"modules_to_save: {', '.join(held.config['modules_to_save'])}", MERGE)
    if held.embeds:
        yield Finding("refused", "rows or changes of the embeddings", MERGE)
    if held.config.get("target_parameters"):
        yield Finding("refused", "target_parameters: experts that are read as parameters", MERGE)


def _llama_cpp(held: Held) -> Iterator[Finding]:
    found = list(_plain(held))
    yield from found or [Finding("to do", "it reads GGUF files", "`adapters export --to gguf`")]


def _mlx(held: Held) -> Iterator[Finding]:
    found = list(_plain(held, dora=True))
    yield from found or [Finding("to do", "it reads folders of its own", "`adapters export --to mlx`")]


def _mistral_rs(held: Held) -> Iterator[Finding]:
    yield from _plain(held)
    yield Finding(
        "to do",
        "it looks for rope_theta at the top of the base's config.json, where transformers 5 writes it no more",
        "copy it there from rope_parameters",
    )


PROGRAMS: Mapping[str, Callable[[Held], Iterator[Finding]]] = {
    "peft": _peft,
    "vllm": vllm,
    "llama.cpp": _llama_cpp,
    "mistralrs": _mistral_rs,
    "mlx": _mlx,
}
