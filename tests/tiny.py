"""Tiny random models by name, one per structure the library must cope with, and batches with unequal rows and tokens.

Every size is a multiple of 64 where a 4-bit block must fit; norms and biases are shaken, so that no weight is
trivially 0 or 1 and a mistake cannot hide behind a neutral element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from odd import OddConfig, OddForCausalLM
from torch import nn

HIDDEN, HEADS, KV_HEADS, WIDE, VOCAB, LAYERS = 64, 4, 2, 128, 160, 2

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": KV_HEADS}
_BERT: dict[str, Any] = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=32))


def _phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED))


def _gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=64))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_inner": WIDE, "n_positions": 128}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, **sizes, **dropouts, **_SPECIAL))


def _gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES))


def _bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**_BERT))


def _bert_classifier() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_BERT, num_labels=3))


def _modernbert() -> nn.Module:
    special = {"cls_token_id": 1, "sep_token_id": 2}
    # three layers: every third one attends globally, the others within a window
    return hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**{**_SIZES, "num_hidden_layers": 3}, **special, local_attention=8)
    )


def _qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_GROUPED, **experts, head_dim=16))


def _odd() -> nn.Module:
    return OddForCausalLM(OddConfig(**_SPECIAL))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bert": _bert,
    "modernbert": _modernbert,
    "qwen3_moe": _qwen3_moe,
    "bert_classifier": _bert_classifier,
    "odd": _odd,
}
NAMES = list(_BUILDERS)
CAUSAL = ["llama", "qwen3", "phi3", "gemma2", "gpt2", "gpt_neox", "qwen3_moe", "odd"]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The tiny model called `name`, the same for the same seed, in eval mode; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(3.0)  # at the usual scale, attention over so few dimensions is all but uniform
    return model.to(dtype).eval()


def inputs(model: Any, rows: int = 3, tokens: int = 7, seed: int = 1, padded: bool = False) -> dict[str, torch.Tensor]:
    """Token ids and mask, `(rows, tokens)`; `padded` shortens each row by one token more than the one before it."""
    vocabulary = VOCAB if isinstance(model, str) else int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    if padded:
        lengths = torch.tensor([max(1, tokens - row) for row in range(rows)])
        mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
        ids = torch.where(mask.bool(), ids, 0)
    return {"input_ids": ids, "attention_mask": mask}
