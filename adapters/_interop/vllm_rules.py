"""What vLLM makes of PEFT's folders: the rules of 0.32, whose CPU build was run on folders of each kind.

From vllm/lora/peft_helper.py (fields of the configuration), lora_model.py and utils.py (names of tensors),
model_manager.py (experts, heads) and vllm/config/lora.py (ranks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapters._interop.findings import MERGE, Finding, Held, not_lora

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be; 16 where it is not given
USUAL = 16
REQUIRED = ("r", "lora_alpha", "target_modules")  # target_modules may be null
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # those that leave the base's weights as they are
UNKNOWN = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
HEADS = {"score", "classifier"}
EARLIER = "use vLLM 0.32 or newer: earlier ones read one rank and one alpha for all layers, without a word"
POOLING = (
    "serve a sequence classifier whose class takes LoRA (--runner pooling, vLLM 0.31 or newer), as Llama's does and "
    "BERT's does not; or merge it"
)
EMBEDDING = (
    "bases whose class in vLLM has embedding_modules take it (Llama, Qwen3, Phi3 and more); Qwen2, Mistral and Gemma "
    "refuse it: merge it for those"
)
MIXED = "start it with --enable-mixed-moe-lora-format, and set is_3d_lora_weight=True in the request; or merge it"


def vllm(held: Held) -> Iterator[Finding]:
    refused = list(not_lora(held))
    yield from refused
    if not held.is_lora:
        return
    yield from _fields(held)
    yield from _ranks(held)
    yield from _heads(held)
    yield from _embeddings(held)
    yield from _experts(held)
    if held.tensors and all(re.match(r"base_model\.model\.(layers|h|blocks?)\.", key) for key in held.tensors):
        yield Finding(
            "ignored",
            "it was attached to a model without its head, whose layers have other names",
            "attach it to the causal model (AutoModelForCausalLM), and save it again",
        )


def _fields(held: Held) -> Iterator[Finding]:
    missing = [field for field in REQUIRED if held.config.get(field) is None and field not in held.config]
    if missing:
        yield Finding("refused", f"the configuration lacks {', '.join(missing)}", "write it there")
    start = held.config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS:
        yield Finding("refused", f"init_lora_weights {start!r}, which changed the weights of the base", MERGE)
    for key in UNKNOWN:
        if held.config.get(key):
            yield Finding("refused", key, MERGE)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if held.config.get(key)]
    if patterns:
        yield Finding("to do", " and ".join(patterns), EARLIER)


def _ranks(held: Held) -> Iterator[Finding]:
    """The configuration decides, and not the tensors."""
    rank = max(int(held.config.get("r") or 0), *map(int, (held.config.get("rank_pattern") or {0: 0}).values()))
    enough = next((each for each in RANKS if each >= rank), None)
    if enough is None:
        yield Finding("refused", f"rank {rank}, above {RANKS[-1]}", f"`adapters.resize` it, or {MERGE}")
    elif rank > USUAL:
        yield Finding("to do", f"rank {rank}", f"start it with --max-lora-rank {enough}")


def _heads(held: Held) -> Iterator[Finding]:
    saved = held.config.get("modules_to_save") or []
    if not saved:
        return
    what = f"modules_to_save: {', '.join(saved)}"
    whole = {key.rpartition(".")[0] for key in held.tensors if ".lora_" not in key}
    known = set(saved) <= HEADS and len(whole) == 1
    yield Finding("to do", what, POOLING) if known else Finding("refused", what, MERGE)


def _embeddings(held: Held) -> Iterator[Finding]:
    if held.config.get("trainable_token_indices"):
        yield Finding("refused", "rows of tokens", MERGE)
    if held.holding("lora_embedding_A", "lm_head.lora_A.weight"):
        yield Finding("to do", "changes of the embeddings or the head", EMBEDDING)


def _experts(held: Held) -> Iterator[Finding]:
    inner, outer = held.holding(".experts.base_layer.lora_A.weight"), held.holding(".experts.lora_A.weight")
    if inner and outer:
        yield Finding("to do", "experts side by side in one tensor", MIXED)
    elif outer:
        yield Finding("refused", "one of the two stacks of experts alone", f"adapt both, or {MERGE}")
