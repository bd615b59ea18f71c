"""Where bottleneck adapters belong in well-known architectures: a reference read from the modeling files by hand.

Nothing here is discovered. Every entry was written by reading the forward methods of transformers 5.23 and then checked
with forward hooks on a tiny random model (the block's output was rebuilt from its input and the values of the streams,
with every stream in turn replaced by zero). It is what a search for such sites has to find, so it shares no code with
one.

What is pinned, and where it comes from:

* A *stream* is the value that one branch of a block adds to the residual stream. Houlsby et al. 2019 (arXiv 1902.00751,
  figure 2) put an adapter on two of them in each layer: after the projection that follows the multi-head attention and
  after the second feed-forward layer, each time before the skip connection is added back and, where the model has one,
  before the layer norm after it. Pfeiffer et al. 2020 (arXiv 2005.00247, section 3.2) keep only the one after the
  feed-forward. He et al. 2021 (arXiv 2110.04366, section 4) add a parallel adapter to the same value; it reads what the
  feed-forward branch reads, which in a pre-norm model is the normalised stream and in a post-norm model the stream.
* The *site* is the outermost module, below the residual addition, that returns the added value, or what becomes it by
  a norm, a dropout, a factor (one, or one per channel) or a rearrangement of the positions. Where the module that ends
  the branch also does the addition (BERT's outputs, BLOOM, the feed-forward of MPT), it is the projection inside.
  Dropouts, norms and factors, which a block holds next to its branches, are no sites.
* The *attentions* are the modules that compute a softmax attention: the one that is passed as ``module`` to the
  attention interface of transformers, or the one whose forward writes the attention out.
* The *roles* say what the weights of the same blocks do.

Paths start at the model class ``cls`` and have the number of the block written out. Only the blocks named in ``blocks``
are described, and those completely: the first block, and the first of every further kind where blocks differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["attention", "mlp", "ssm"]
Head: TypeAlias = Literal[
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"
]
Read: TypeAlias = tuple[Literal["argument"], int | str] | tuple[Literal["module"], str]
"""Where the input of a branch is found.

``("argument", 0)`` or ``("argument", "hidden_states")``: an argument of the site's own forward, by the position or the
name that its caller uses. ``("module", path)``: the first positional argument of that module.
"""


@dataclass(frozen=True)
class Stream:
    """One value that is added to the residual stream."""

    path: str  # the site
    key: int | None  # None: the site returns the value itself; i: it returns a tuple with the value at i
    kinds: tuple[Kind, ...]  # what the branch is; more than one where two answers are right
    reads: tuple[Read, ...]  # where its input is found; all are the same tensor, the first is below the addition


@dataclass(frozen=True)
class Attention:
    """One module that computes a softmax attention."""

    path: str
    kv_heads: str | int  # of the keys that enter the product: an attribute of the config, "name[i]" for a list there
    causal: bool  # with the defaults of the config
    how: Literal["interface", "by hand"]

    def heads(self, config: Any) -> int:
        """The number of key and value heads for a config."""
        if isinstance(self.kv_heads, int):
            return self.kv_heads
        name, bracket, index = self.kv_heads.partition("[")
        value = getattr(config, name)
        return int(value[int(index.rstrip("]"))] if bracket else value)


@dataclass(frozen=True)
class Golden:
    """What is known about one architecture."""

    type: str  # the ``model_type`` of the config
    head: Head  # the auto class
    cls: str  # the class that it maps the type to
    config: Mapping[str, Any]  # a tiny config, of the kind that the entry describes
    blocks: tuple[str, ...]
    streams: tuple[Stream, ...]  # in the order of execution
    attentions: tuple[Attention, ...]
    roles: Mapping[str, tuple[str, ...]]  # the parameter to its role; more than one where more than one answer is right
    note: str = ""


# The roles

QUERY, KEY, VALUE = "attention.query", "attention.key", "attention.value"
QKV, KV, OUTPUT = "attention.qkv", "attention.kv", "attention.output"
GATE, UP, GATE_UP, DOWN = "mlp.gate", "mlp.up", "mlp.gate_up", "mlp.down"
ROUTER = "router"
SSM_IN, SSM_OUT = "ssm.in", "ssm.out"
OTHER = "other"  # a matrix, but none of the above


def under(block: str, roles: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The roles with the path of the block in front."""
    return {f"{block}.{name}": (role,) if isinstance(role, str) else role for name, role in roles.items()}


# The reads

FIRST: tuple[Read, ...] = (("argument", 0),)
HIDDEN: tuple[Read, ...] = (("argument", "hidden_states"),)


def module(*paths: str) -> tuple[Read, ...]:
    """The first positional argument of these modules."""
    return tuple(("module", path) for path in paths)


# The streams


def attention(path: str, key: int | None, reads: tuple[Read, ...]) -> Stream:
    """The stream of an attention branch."""
    return Stream(path, key, ("attention",), reads)


def mlp(path: str, key: int | None, reads: tuple[Read, ...]) -> Stream:
    """The stream of a feed-forward branch."""
    return Stream(path, key, ("mlp",), reads)


def ssm(path: str, key: int | None, reads: tuple[Read, ...]) -> Stream:
    """The stream of a branch that mixes the positions by a recurrence or a convolution."""
    return Stream(path, key, ("ssm",), reads)


# Blocks that several architectures share

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

LAYER_0 = ("model.layers.0",)
LLAMA_STREAMS = (
    attention("model.layers.0.self_attn", 0, HIDDEN),
    mlp("model.layers.0.mlp", None, FIRST),
)
LLAMA_ATTENTIONS = (Attention("model.layers.0.self_attn", "num_key_value_heads", True, "interface"),)
SEPARATE: dict[str, str | tuple[str, ...]] = {
    "self_attn.q_proj.weight": QUERY,
    "self_attn.k_proj.weight": KEY,
    "self_attn.v_proj.weight": VALUE,
    "self_attn.o_proj.weight": OUTPUT,
}
GATED: dict[str, str | tuple[str, ...]] = {
    "mlp.gate_proj.weight": GATE,
    "mlp.up_proj.weight": UP,
    "mlp.down_proj.weight": DOWN,
}
EXPERTS: dict[str, str | tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": GATE_UP,
    "mlp.experts.down_proj": DOWN,
}
SHARED_EXPERT: dict[str, str | tuple[str, ...]] = {
    "mlp.gate.weight": ROUTER,
    **EXPERTS,
    "mlp.shared_expert.gate_proj.weight": GATE,
    "mlp.shared_expert.up_proj.weight": UP,
    "mlp.shared_expert.down_proj.weight": DOWN,
    "mlp.shared_expert_gate.weight": (ROUTER, OTHER),  # one logit per token: how much of the shared expert
}
LLAMA_ROLES = under("model.layers.0", {**SEPARATE, **GATED})
BERT_ROLES: dict[str, str | tuple[str, ...]] = {
    "attention.self.query.weight": QUERY,
    "attention.self.key.weight": KEY,
    "attention.self.value.weight": VALUE,
    "attention.output.dense.weight": OUTPUT,
    "intermediate.dense.weight": UP,
    "output.dense.weight": DOWN,
}


def bert_streams(block: str) -> tuple[Stream, ...]:
    """A block of BERT: both of its outputs do the addition and the layer norm themselves."""
    return (
        attention(
            f"{block}.attention.output.dense",
            None,
            module(f"{block}.attention.self", f"{block}.attention.self.query", f"{block}.attention"),
        ),
        mlp(f"{block}.output.dense", None, module(f"{block}.intermediate", f"{block}.intermediate.dense")),
    )


# Decoders: a norm before each branch, one branch after the other

PRE_NORM = (
    Golden(
        type="llama",
        head="AutoModelForCausalLM",
        cls="LlamaForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
    ),
    Golden(
        type="mistral",
        head="AutoModelForCausalLM",
        cls="MistralForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
    ),
    Golden(
        type="qwen2",
        head="AutoModelForCausalLM",
        cls="Qwen2ForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
    ),
    Golden(
        type="qwen3",
        head="AutoModelForCausalLM",
        cls="Qwen3ForCausalLM",
        config={**TEXT, "head_dim": 16},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="The norms of query and key are inside the attention.",
    ),
    Golden(
        type="gemma",
        head="AutoModelForCausalLM",
        cls="GemmaForCausalLM",
        config={**TEXT, "head_dim": 16},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
    ),
    Golden(
        type="granite",
        head="AutoModelForCausalLM",
        cls="GraniteForCausalLM",
        config={**TEXT, "residual_multiplier": 0.25},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="Both values are multiplied by residual_multiplier before they are added.",
    ),
    Golden(
        type="phi3",
        head="AutoModelForCausalLM",
        cls="Phi3ForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under(
            "model.layers.0",
            {
                "self_attn.qkv_proj.weight": QKV,
                "self_attn.o_proj.weight": OUTPUT,
                "mlp.gate_up_proj.weight": GATE_UP,
                "mlp.down_proj.weight": DOWN,
            },
        ),
    ),
    Golden(
        type="stablelm",
        head="AutoModelForCausalLM",
        cls="StableLmForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="The sites are the same with use_parallel_residual, which is off by default.",
    ),
    Golden(
        type="starcoder2",
        head="AutoModelForCausalLM",
        cls="Starcoder2ForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, "mlp.c_fc.weight": UP, "mlp.c_proj.weight": DOWN}),
        note="Both branches end in a dropout that is a function, inside the site.",
    ),
    Golden(
        type="gpt2",
        head="AutoModelForCausalLM",
        cls="GPT2LMHeadModel",
        config={"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64},
        blocks=("transformer.h.0",),
        streams=(
            attention("transformer.h.0.attn", 0, FIRST),
            mlp("transformer.h.0.mlp", None, FIRST),
        ),
        attentions=(Attention("transformer.h.0.attn", "num_attention_heads", True, "interface"),),
        roles=under(
            "transformer.h.0",
            {
                "attn.c_attn.weight": QKV,
                "attn.c_proj.weight": OUTPUT,
                "mlp.c_fc.weight": UP,
                "mlp.c_proj.weight": DOWN,
            },
        ),
        note="The weights are Conv1D, (in, out). With reorder_and_upcast_attn and eager the attention is by hand.",
    ),
    Golden(
        type="gpt_neo",
        head="AutoModelForCausalLM",
        cls="GPTNeoForCausalLM",
        config={
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 128,
            "max_position_embeddings": 64,
        },
        blocks=("transformer.h.0",),
        streams=(
            attention("transformer.h.0.attn", 0, FIRST),
            mlp("transformer.h.0.mlp", None, FIRST),
        ),
        attentions=(Attention("transformer.h.0.attn.attention", "num_heads", True, "by hand"),),
        roles=under(
            "transformer.h.0",
            {
                "attn.attention.q_proj.weight": QUERY,
                "attn.attention.k_proj.weight": KEY,
                "attn.attention.v_proj.weight": VALUE,
                "attn.attention.out_proj.weight": OUTPUT,
                "mlp.c_fc.weight": UP,
                "mlp.c_proj.weight": DOWN,
            },
        ),
        note="attn only hands the result of attn.attention on, so it is the outermost module that returns it.",
    ),
    Golden(
        type="opt",
        head="AutoModelForCausalLM",
        cls="OPTForCausalLM",
        config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
        },
        blocks=("model.decoder.layers.0",),
        streams=(
            attention("model.decoder.layers.0.self_attn", 0, HIDDEN),
            mlp("model.decoder.layers.0.fc2", None, module("model.decoder.layers.0.fc1")),
        ),
        attentions=(Attention("model.decoder.layers.0.self_attn", "num_attention_heads", True, "interface"),),
        roles=under(
            "model.decoder.layers.0",
            {
                "self_attn.q_proj.weight": QUERY,
                "self_attn.k_proj.weight": KEY,
                "self_attn.v_proj.weight": VALUE,
                "self_attn.out_proj.weight": OUTPUT,
                "fc1.weight": UP,
                "fc2.weight": DOWN,
            },
        ),
        note="The block is the feed-forward, on (batch x length, hidden). OPT-350m is post-norm: do_layer_norm_before.",
    ),
    Golden(
        type="bloom",
        head="AutoModelForCausalLM",
        cls="BloomForCausalLM",
        config={"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
        blocks=("transformer.h.0",),
        streams=(
            attention(
                "transformer.h.0.self_attention.dense",
                None,
                module("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention"),
            ),
            mlp(
                "transformer.h.0.mlp.dense_4h_to_h",
                None,
                module("transformer.h.0.mlp.dense_h_to_4h", "transformer.h.0.mlp"),
            ),
        ),
        attentions=(Attention("transformer.h.0.self_attention", "n_head", True, "by hand"),),
        roles=under(
            "transformer.h.0",
            {
                "self_attention.query_key_value.weight": QKV,
                "self_attention.dense.weight": OUTPUT,
                "mlp.dense_h_to_4h.weight": UP,
                "mlp.dense_4h_to_h.weight": DOWN,
            },
        ),
        note="Both sub-modules are handed the residual and return the sum.",
    ),
    Golden(
        type="mpt",
        head="AutoModelForCausalLM",
        cls="MptForCausalLM",
        config={"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64},
        blocks=("transformer.blocks.0",),
        streams=(
            attention("transformer.blocks.0.attn", 0, FIRST),
            mlp(
                "transformer.blocks.0.ffn.down_proj",
                None,
                module("transformer.blocks.0.ffn.up_proj", "transformer.blocks.0.ffn"),
            ),
        ),
        attentions=(Attention("transformer.blocks.0.attn", "n_heads", True, "by hand"),),
        roles=under(
            "transformer.blocks.0",
            {
                "attn.Wqkv.weight": QKV,
                "attn.out_proj.weight": OUTPUT,
                "ffn.up_proj.weight": UP,
                "ffn.down_proj.weight": DOWN,
            },
        ),
        note="The feed-forward is handed the residual and returns the sum, the attention is not.",
    ),
)


# Decoders: a norm after the branch, before the addition (with or without one in front)

SANDWICH = (
    Golden(
        type="gemma2",
        head="AutoModelForCausalLM",
        cls="Gemma2ForCausalLM",
        config={**TEXT, "head_dim": 16},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="A norm after each branch.",
    ),
    Golden(
        type="gemma3_text",
        head="AutoModelForCausalLM",
        cls="Gemma3ForCausalLM",
        config={**TEXT, "head_dim": 16},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="A norm after each branch. Not causal with use_bidirectional_attention, which is off by default.",
    ),
    Golden(
        type="glm4",
        head="AutoModelForCausalLM",
        cls="Glm4ForCausalLM",
        config={**TEXT, "head_dim": 16},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, "mlp.gate_up_proj.weight": GATE_UP, "mlp.down_proj.weight": DOWN}),
        note="A norm after each branch; post_attention_layernorm is the one before the feed-forward.",
    ),
    Golden(
        type="olmo2",
        head="AutoModelForCausalLM",
        cls="Olmo2ForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="A norm after each branch and none before: the branches read the stream itself.",
    ),
)


# Decoders: both branches read the same stream

PARALLEL = (
    Golden(
        type="phi",
        head="AutoModelForCausalLM",
        cls="PhiForCausalLM",
        config={**TEXT, "num_key_value_heads": 4},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under(
            "model.layers.0",
            {
                "self_attn.q_proj.weight": QUERY,
                "self_attn.k_proj.weight": KEY,
                "self_attn.v_proj.weight": VALUE,
                "self_attn.dense.weight": OUTPUT,
                "mlp.fc1.weight": UP,
                "mlp.fc2.weight": DOWN,
            },
        ),
        note="One norm for both branches.",
    ),
    Golden(
        type="cohere",
        head="AutoModelForCausalLM",
        cls="CohereForCausalLM",
        config=TEXT,
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=LLAMA_ROLES,
        note="One norm for both branches.",
    ),
    Golden(
        type="gptj",
        head="AutoModelForCausalLM",
        cls="GPTJForCausalLM",
        config={"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128, "n_positions": 64},
        blocks=("transformer.h.0",),
        streams=(
            attention("transformer.h.0.attn", 0, HIDDEN),
            mlp("transformer.h.0.mlp", None, FIRST),
        ),
        attentions=(Attention("transformer.h.0.attn", "num_attention_heads", True, "by hand"),),
        roles=under(
            "transformer.h.0",
            {
                "attn.q_proj.weight": QUERY,
                "attn.k_proj.weight": KEY,
                "attn.v_proj.weight": VALUE,
                "attn.out_proj.weight": OUTPUT,
                "mlp.fc_in.weight": UP,
                "mlp.fc_out.weight": DOWN,
            },
        ),
        note="One norm for both branches.",
    ),
    Golden(
        type="gpt_neox",
        head="AutoModelForCausalLM",
        cls="GPTNeoXForCausalLM",
        config={key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        blocks=("gpt_neox.layers.0",),
        streams=(
            attention("gpt_neox.layers.0.attention", 0, FIRST),
            mlp("gpt_neox.layers.0.mlp", None, FIRST),
        ),
        attentions=(Attention("gpt_neox.layers.0.attention", "num_attention_heads", True, "interface"),),
        roles=under(
            "gpt_neox.layers.0",
            {
                "attention.query_key_value.weight": QKV,
                "attention.dense.weight": OUTPUT,
                "mlp.dense_h_to_4h.weight": UP,
                "mlp.dense_4h_to_h.weight": DOWN,
            },
        ),
        note="A norm of its own for each branch. The sites are the same with use_parallel_residual off.",
    ),
    Golden(
        type="falcon",
        head="AutoModelForCausalLM",
        cls="FalconForCausalLM",
        config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128},
        blocks=("transformer.h.0",),
        streams=(
            attention("transformer.h.0.self_attention", 0, FIRST),
            mlp("transformer.h.0.mlp", None, FIRST),
        ),
        attentions=(Attention("transformer.h.0.self_attention", 1, True, "by hand"),),
        roles=under(
            "transformer.h.0",
            {
                "self_attention.query_key_value.weight": QKV,
                "self_attention.dense.weight": OUTPUT,
                "mlp.dense_h_to_4h.weight": UP,
                "mlp.dense_4h_to_h.weight": DOWN,
            },
        ),
        note=(
            "The default is Falcon-7B: multi_query (one key head, whatever num_kv_heads says) and parallel_attn. The "
            "block adds the value of the attention in place to the tensor that the feed-forward returned. With "
            "new_decoder_architecture the keys are repeated to num_attention_heads before the product."
        ),
    ),
)


# Decoders: experts

EXPERT = (
    Golden(
        type="mixtral",
        head="AutoModelForCausalLM",
        cls="MixtralForCausalLM",
        config={**TEXT, "num_local_experts": 4},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, "mlp.gate.weight": ROUTER, **EXPERTS}),
        note="mlp.gate is the router, whose weight is a parameter of its own class.",
    ),
    Golden(
        type="qwen2_moe",
        head="AutoModelForCausalLM",
        cls="Qwen2MoeForCausalLM",
        config={
            **TEXT,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, **SHARED_EXPERT}),
        note="mlp adds the shared expert, so mlp is one stream.",
    ),
    Golden(
        type="qwen3_moe",
        head="AutoModelForCausalLM",
        cls="Qwen3MoeForCausalLM",
        config={**TEXT, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        blocks=LAYER_0,
        streams=LLAMA_STREAMS,
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, "mlp.gate.weight": ROUTER, **EXPERTS}),
    ),
    Golden(
        type="gpt_oss",
        head="AutoModelForCausalLM",
        cls="GptOssForCausalLM",
        config={**TEXT, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        blocks=LAYER_0,
        streams=(
            attention("model.layers.0.self_attn", 0, HIDDEN),
            mlp("model.layers.0.mlp", 0, FIRST),
        ),
        attentions=LLAMA_ATTENTIONS,
        roles=under("model.layers.0", {**SEPARATE, "mlp.router.weight": ROUTER, **EXPERTS}),
        note="mlp returns the scores of the router next to the value. The experts are (expert, in, out), interleaved.",
    ),
    Golden(
        type="deepseek_v3",
        head="AutoModelForCausalLM",
        cls="DeepseekV3ForCausalLM",
        config={
            **TEXT,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            attention("model.layers.0.self_attn", 0, HIDDEN),
            mlp("model.layers.0.mlp", None, FIRST),
            attention("model.layers.1.self_attn", 0, HIDDEN),
            mlp("model.layers.1.mlp", None, FIRST),
        ),
        attentions=(
            Attention("model.layers.0.self_attn", "num_attention_heads", True, "interface"),
            Attention("model.layers.1.self_attn", "num_attention_heads", True, "interface"),
        ),
        roles={
            **under("model.layers.0", GATED),
            **under(
                "model.layers.1",
                {
                    "mlp.gate.weight": ROUTER,
                    **EXPERTS,
                    "mlp.shared_experts.gate_proj.weight": GATE,
                    "mlp.shared_experts.up_proj.weight": UP,
                    "mlp.shared_experts.down_proj.weight": DOWN,
                },
            ),
            **{
                path: role
                for layer in (0, 1)
                for path, role in under(
                    f"model.layers.{layer}.self_attn",
                    {
                        "q_a_proj.weight": QUERY,
                        "q_b_proj.weight": QUERY,
                        "kv_a_proj_with_mqa.weight": (KV, QKV),  # the latent of both, and the rotary part of the key
                        "kv_b_proj.weight": KV,
                        "o_proj.weight": OUTPUT,
                    },
                ).items()
            },
        },
        note=(
            "The first block is dense, the second has experts, and a shared one that mlp adds. Every head has a key of "
            "its own in the product, but the cache holds one head of the latent."
        ),
    ),
)


# State spaces and hybrids

RECURRENT = (
    Golden(
        type="mamba",
        head="AutoModelForCausalLM",
        cls="MambaForCausalLM",
        config={"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
        blocks=("backbone.layers.0",),
        streams=(ssm("backbone.layers.0.mixer", None, FIRST),),
        attentions=(),
        roles=under(
            "backbone.layers.0.mixer",
            {
                "in_proj.weight": SSM_IN,
                "x_proj.weight": (OTHER, SSM_IN),  # step, B and C from the inner stream
                "dt_proj.weight": (OTHER, SSM_IN),
                "out_proj.weight": SSM_OUT,
            },
        ),
        note="The weight of dt_proj is used without a call of the module.",
    ),
    Golden(
        type="jamba",
        head="AutoModelForCausalLM",
        cls="JambaForCausalLM",
        config={
            **TEXT,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            ssm("model.layers.0.mamba", None, HIDDEN),
            mlp("model.layers.0.feed_forward", None, FIRST),
            attention("model.layers.1.self_attn", 0, HIDDEN),
            mlp("model.layers.1.feed_forward", None, FIRST),
        ),
        attentions=(Attention("model.layers.1.self_attn", "num_key_value_heads", True, "interface"),),
        roles={
            **under(
                "model.layers.0",
                {
                    "mamba.in_proj.weight": SSM_IN,
                    "mamba.x_proj.weight": (OTHER, SSM_IN),
                    "mamba.dt_proj.weight": (OTHER, SSM_IN),
                    "mamba.out_proj.weight": SSM_OUT,
                    "feed_forward.gate_proj.weight": GATE,
                    "feed_forward.up_proj.weight": UP,
                    "feed_forward.down_proj.weight": DOWN,
                },
            ),
            **under(
                "model.layers.1",
                {
                    **SEPARATE,
                    "feed_forward.router.weight": ROUTER,
                    "feed_forward.experts.gate_up_proj": GATE_UP,
                    "feed_forward.experts.down_proj": DOWN,
                },
            ),
        },
        note="The first block is a mixer and a dense feed-forward, the second an attention and experts.",
    ),
    Golden(
        type="granitemoehybrid",
        head="AutoModelForCausalLM",
        cls="GraniteMoeHybridForCausalLM",
        config={
            **TEXT,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "residual_multiplier": 0.25,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            ssm("model.layers.0.mamba", None, HIDDEN),
            mlp("model.layers.0.shared_mlp", None, FIRST),
            attention("model.layers.1.self_attn", 0, HIDDEN),
            mlp("model.layers.1.shared_mlp", None, FIRST),
        ),
        attentions=(Attention("model.layers.1.self_attn", "num_key_value_heads", True, "interface"),),
        roles={
            **under(
                "model.layers.0",
                {
                    "mamba.in_proj.weight": SSM_IN,
                    "mamba.out_proj.weight": SSM_OUT,
                    "shared_mlp.input_linear.weight": GATE_UP,
                    "shared_mlp.output_linear.weight": DOWN,
                },
            ),
            **under(
                "model.layers.1",
                {
                    **SEPARATE,
                    "shared_mlp.input_linear.weight": GATE_UP,
                    "shared_mlp.output_linear.weight": DOWN,
                },
            ),
        },
        note=(
            "The dense kind, num_local_experts = 0. With experts the block adds block_sparse_moe and shared_mlp to "
            "each other, so no one module returns the value. Every value is multiplied by residual_multiplier."
        ),
    ),
    Golden(
        type="lfm2",
        head="AutoModelForCausalLM",
        cls="Lfm2ForCausalLM",
        config={**TEXT, "layer_types": ["conv", "full_attention"]},
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            ssm("model.layers.0.conv", None, HIDDEN),
            mlp("model.layers.0.feed_forward", None, FIRST),
            attention("model.layers.1.self_attn", 0, HIDDEN),
            mlp("model.layers.1.feed_forward", None, FIRST),
        ),
        attentions=(Attention("model.layers.1.self_attn", "num_key_value_heads", True, "interface"),),
        roles={
            **under(
                "model.layers.0",
                {
                    "conv.in_proj.weight": SSM_IN,
                    "conv.out_proj.weight": SSM_OUT,
                    "feed_forward.w1.weight": GATE,
                    "feed_forward.w3.weight": UP,
                    "feed_forward.w2.weight": DOWN,
                },
            ),
            **under(
                "model.layers.1",
                {
                    "self_attn.q_proj.weight": QUERY,
                    "self_attn.k_proj.weight": KEY,
                    "self_attn.v_proj.weight": VALUE,
                    "self_attn.out_proj.weight": OUTPUT,
                    "feed_forward.w1.weight": GATE,
                    "feed_forward.w3.weight": UP,
                    "feed_forward.w2.weight": DOWN,
                },
            ),
        },
        note="Short convolutions, gated.",
    ),
    Golden(
        type="recurrent_gemma",
        head="AutoModelForCausalLM",
        cls="RecurrentGemmaForCausalLM",
        config={**TEXT, "lru_width": 64, "block_types": ["recurrent", "attention"]},
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            ssm("model.layers.0.temporal_block", 0, FIRST),
            mlp("model.layers.0.mlp_block", None, FIRST),
            attention("model.layers.1.temporal_block", 0, FIRST),
            mlp("model.layers.1.mlp_block", None, FIRST),
        ),
        attentions=(Attention("model.layers.1.temporal_block", "num_key_value_heads", True, "interface"),),
        roles={
            **under(
                "model.layers.0",
                {
                    "temporal_block.linear_x.weight": SSM_IN,
                    "temporal_block.linear_y.weight": SSM_IN,
                    "temporal_block.linear_out.weight": SSM_OUT,
                    "temporal_block.rg_lru.input_gate_weight": (OTHER, SSM_IN),  # block-diagonal, (head, in, out)
                    "temporal_block.rg_lru.recurrent_gate_weight": (OTHER, SSM_IN),
                },
            ),
            **under(
                "model.layers.1",
                {
                    "temporal_block.q_proj.weight": QUERY,
                    "temporal_block.k_proj.weight": KEY,
                    "temporal_block.v_proj.weight": VALUE,
                    "temporal_block.o_proj.weight": OUTPUT,
                },
            ),
            **{
                path: role
                for layer in (0, 1)
                for path, role in under(
                    f"model.layers.{layer}.mlp_block",
                    {"gate_proj.weight": GATE, "up_proj.weight": UP, "down_proj.weight": DOWN},
                ).items()
            },
        },
        note="The recurrent block and the attention have the same name, and both return a tuple.",
    ),
    Golden(
        type="qwen3_next",
        head="AutoModelForCausalLM",
        cls="Qwen3NextForCausalLM",
        config={
            **TEXT,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
        },
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            Stream("model.layers.0.linear_attn", None, ("ssm", "attention"), HIDDEN),
            mlp("model.layers.0.mlp", None, FIRST),
            attention("model.layers.1.self_attn", 0, HIDDEN),
            mlp("model.layers.1.mlp", None, FIRST),
        ),
        attentions=(Attention("model.layers.1.self_attn", "num_key_value_heads", True, "interface"),),
        roles={
            **under(
                "model.layers.0",
                {
                    "linear_attn.in_proj_qkvz.weight": (SSM_IN, QKV),
                    "linear_attn.in_proj_ba.weight": (SSM_IN, OTHER),
                    "linear_attn.out_proj.weight": (SSM_OUT, OUTPUT),
                    **SHARED_EXPERT,
                },
            ),
            **under("model.layers.1", {**SEPARATE, **SHARED_EXPERT}),
        },
        note="A gated delta net: a recurrence, called attention. q_proj of the attention holds the query and a gate.",
    ),
)


# Encoders

ENCODERS = (
    Golden(
        type="bert",
        head="AutoModelForMaskedLM",
        cls="BertForMaskedLM",
        config=ENCODER,
        blocks=("bert.encoder.layer.0",),
        streams=bert_streams("bert.encoder.layer.0"),
        attentions=(Attention("bert.encoder.layer.0.attention.self", "num_attention_heads", False, "interface"),),
        roles=under("bert.encoder.layer.0", BERT_ROLES),
        note="The model of the paper: both outputs do the addition and then the layer norm.",
    ),
    Golden(
        type="roberta",
        head="AutoModelForMaskedLM",
        cls="RobertaForMaskedLM",
        config=ENCODER,
        blocks=("roberta.encoder.layer.0",),
        streams=bert_streams("roberta.encoder.layer.0"),
        attentions=(Attention("roberta.encoder.layer.0.attention.self", "num_attention_heads", False, "interface"),),
        roles=under("roberta.encoder.layer.0", BERT_ROLES),
        note="As BERT.",
    ),
    Golden(
        type="electra",
        head="AutoModelForMaskedLM",
        cls="ElectraForMaskedLM",
        config={**ENCODER, "embedding_size": 32},
        blocks=("electra.encoder.layer.0",),
        streams=bert_streams("electra.encoder.layer.0"),
        attentions=(Attention("electra.encoder.layer.0.attention.self", "num_attention_heads", False, "interface"),),
        roles=under("electra.encoder.layer.0", BERT_ROLES),
        note="As BERT.",
    ),
    Golden(
        type="deberta-v2",
        head="AutoModelForMaskedLM",
        cls="DebertaV2ForMaskedLM",
        config=ENCODER,
        blocks=("deberta.encoder.layer.0",),
        streams=(
            attention(
                "deberta.encoder.layer.0.attention.output.dense",
                None,
                module("deberta.encoder.layer.0.attention.self", "deberta.encoder.layer.0.attention"),
            ),
            mlp(
                "deberta.encoder.layer.0.output.dense",
                None,
                module("deberta.encoder.layer.0.intermediate", "deberta.encoder.layer.0.intermediate.dense"),
            ),
        ),
        attentions=(Attention("deberta.encoder.layer.0.attention.self", "num_attention_heads", False, "by hand"),),
        roles=under(
            "deberta.encoder.layer.0",
            {
                "attention.self.query_proj.weight": QUERY,
                "attention.self.key_proj.weight": KEY,
                "attention.self.value_proj.weight": VALUE,
                "attention.output.dense.weight": OUTPUT,
                "intermediate.dense.weight": UP,
                "output.dense.weight": DOWN,
            },
        ),
        note=(
            "As BERT. With relative_attention, off by default but on in the published models, query_proj and key_proj "
            "are called again on the position embeddings (share_att_key), so query_proj is no place to read from, or "
            "pos_key_proj and pos_query_proj are there for them."
        ),
    ),
    Golden(
        type="albert",
        head="AutoModelForMaskedLM",
        cls="AlbertForMaskedLM",
        config={**ENCODER, "embedding_size": 32},
        blocks=("albert.encoder.albert_layer_groups.0.albert_layers.0",),
        streams=(
            attention(
                "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
                None,
                module(
                    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query",
                    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
                ),
            ),
            mlp(
                "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
                None,
                module("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"),
            ),
        ),
        attentions=(
            Attention(
                "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
                "num_attention_heads",
                False,
                "interface",
            ),
        ),
        roles=under(
            "albert.encoder.albert_layer_groups.0.albert_layers.0",
            {
                "attention.query.weight": QUERY,
                "attention.key.weight": KEY,
                "attention.value.weight": VALUE,
                "attention.dense.weight": OUTPUT,
                "ffn.weight": UP,
                "ffn_output.weight": DOWN,
            },
        ),
        note="One block that every layer runs: a site is called num_hidden_layers times in a forward.",
    ),
    Golden(
        type="distilbert",
        head="AutoModelForMaskedLM",
        cls="DistilBertForMaskedLM",
        config={
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "vocab_size": 128,
            "max_position_embeddings": 64,
        },
        blocks=("distilbert.transformer.layer.0",),
        streams=(
            attention("distilbert.transformer.layer.0.attention", 0, FIRST),
            mlp("distilbert.transformer.layer.0.ffn", None, FIRST),
        ),
        attentions=(Attention("distilbert.transformer.layer.0.attention", "n_heads", False, "interface"),),
        roles=under(
            "distilbert.transformer.layer.0",
            {
                "attention.q_lin.weight": QUERY,
                "attention.k_lin.weight": KEY,
                "attention.v_lin.weight": VALUE,
                "attention.out_lin.weight": OUTPUT,
                "ffn.lin1.weight": UP,
                "ffn.lin2.weight": DOWN,
            },
        ),
        note="Post-norm, but the block does the addition, so the whole branches are the sites.",
    ),
    Golden(
        type="mpnet",
        head="AutoModelForMaskedLM",
        cls="MPNetForMaskedLM",
        config={**ENCODER, "pad_token_id": 1},
        blocks=("mpnet.encoder.layer.0",),
        streams=(
            attention("mpnet.encoder.layer.0.attention.attn", 0, FIRST),
            mlp(
                "mpnet.encoder.layer.0.output.dense",
                None,
                module("mpnet.encoder.layer.0.intermediate", "mpnet.encoder.layer.0.intermediate.dense"),
            ),
        ),
        attentions=(Attention("mpnet.encoder.layer.0.attention.attn", "num_attention_heads", False, "by hand"),),
        roles=under(
            "mpnet.encoder.layer.0",
            {
                "attention.attn.q.weight": QUERY,
                "attention.attn.k.weight": KEY,
                "attention.attn.v.weight": VALUE,
                "attention.attn.o.weight": OUTPUT,
                "intermediate.dense.weight": UP,
                "output.dense.weight": DOWN,
            },
        ),
        note="Post-norm; attn holds the output projection and returns a tuple of one.",
    ),
    Golden(
        type="xlnet",
        head="AutoModelForCausalLM",
        cls="XLNetLMHeadModel",
        config={"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 128},
        blocks=("transformer.layer.0",),
        streams=(
            mlp(
                "transformer.layer.0.ff.layer_2",
                None,
                module("transformer.layer.0.ff.layer_1", "transformer.layer.0.ff"),
            ),
        ),
        attentions=(Attention("transformer.layer.0.rel_attn", "n_head", False, "by hand"),),
        roles=under(
            "transformer.layer.0",
            {
                "rel_attn.q": QUERY,  # parameters of the attention itself, (hidden, head, head size)
                "rel_attn.k": KEY,
                "rel_attn.v": VALUE,
                "rel_attn.r": (KEY, OTHER),  # of the relative positions
                "rel_attn.o": OUTPUT,
                "ff.layer_1.weight": UP,
                "ff.layer_2.weight": DOWN,
            },
        ),
        note=(
            "Post-norm. No module returns the value of the attention: the projection is a parameter, and rel_attn does "
            "the addition and the layer norm. Its dropout does return it, but is called on the probabilities as well. "
            "The stream is (length, batch, hidden). Not causal by default, though the auto class says so."
        ),
    ),
    Golden(
        type="modernbert",
        head="AutoModelForMaskedLM",
        cls="ModernBertForMaskedLM",
        config={**ENCODER, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        blocks=("model.layers.0", "model.layers.1"),
        streams=(
            attention("model.layers.0.attn", 0, FIRST),
            mlp("model.layers.0.mlp", None, FIRST),
            attention("model.layers.1.attn", 0, FIRST),
            mlp("model.layers.1.mlp", None, FIRST),
        ),
        attentions=(
            Attention("model.layers.0.attn", "num_attention_heads", False, "interface"),
            Attention("model.layers.1.attn", "num_attention_heads", False, "interface"),
        ),
        roles={
            path: role
            for layer in (0, 1)
            for path, role in under(
                f"model.layers.{layer}",
                {
                    "attn.Wqkv.weight": QKV,
                    "attn.Wo.weight": OUTPUT,
                    "mlp.Wi.weight": GATE_UP,
                    "mlp.Wo.weight": DOWN,
                },
            ).items()
        },
        note="Pre-norm, but the attention of the first block reads the stream itself: its norm is an identity.",
    ),
)


# Encoders with a decoder

ENCODER_DECODERS = (
    Golden(
        type="t5",
        head="AutoModelForSeq2SeqLM",
        cls="T5ForConditionalGeneration",
        config={"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96, "vocab_size": 128},
        blocks=("encoder.block.0", "decoder.block.0"),
        streams=(
            attention("encoder.block.0.layer.0.SelfAttention", 0, FIRST),
            mlp("encoder.block.0.layer.1.DenseReluDense", None, FIRST),
            attention("decoder.block.0.layer.0.SelfAttention", 0, FIRST),
            attention("decoder.block.0.layer.1.EncDecAttention", 0, FIRST),
            mlp("decoder.block.0.layer.2.DenseReluDense", None, FIRST),
        ),
        attentions=(
            Attention("encoder.block.0.layer.0.SelfAttention", "num_heads", False, "interface"),
            Attention("decoder.block.0.layer.0.SelfAttention", "num_heads", True, "interface"),
            Attention("decoder.block.0.layer.1.EncDecAttention", "num_heads", False, "interface"),
        ),
        roles={
            **{
                path: role
                for attn in (
                    "encoder.block.0.layer.0.SelfAttention",
                    "decoder.block.0.layer.0.SelfAttention",
                    "decoder.block.0.layer.1.EncDecAttention",
                )
                for path, role in under(
                    attn, {"q.weight": QUERY, "k.weight": KEY, "v.weight": VALUE, "o.weight": OUTPUT}
                ).items()
            },
            **{
                path: role
                for ff in ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense")
                for path, role in under(ff, {"wi.weight": UP, "wo.weight": DOWN}).items()
            },
        },
        note=(
            "Pre-norm, with the norm and the addition in T5LayerFF and its like. With a gated feed_forward_proj wi_0 "
            "is the gate and wi_1 the up-projection."
        ),
    ),
    Golden(
        type="bart",
        head="AutoModelForSeq2SeqLM",
        cls="BartForConditionalGeneration",
        config={
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "vocab_size": 128,
            "max_position_embeddings": 64,
        },
        blocks=("model.encoder.layers.0", "model.decoder.layers.0"),
        streams=(
            attention("model.encoder.layers.0.self_attn", 0, FIRST),
            mlp("model.encoder.layers.0.fc2", None, module("model.encoder.layers.0.fc1")),
            attention("model.decoder.layers.0.self_attn", 0, FIRST),
            attention("model.decoder.layers.0.encoder_attn", 0, FIRST),
            mlp("model.decoder.layers.0.fc2", None, module("model.decoder.layers.0.fc1")),
        ),
        attentions=(
            Attention("model.encoder.layers.0.self_attn", "encoder_attention_heads", False, "interface"),
            Attention("model.decoder.layers.0.self_attn", "decoder_attention_heads", True, "interface"),
            Attention("model.decoder.layers.0.encoder_attn", "decoder_attention_heads", False, "interface"),
        ),
        roles={
            **{
                path: role
                for attn in (
                    "model.encoder.layers.0.self_attn",
                    "model.decoder.layers.0.self_attn",
                    "model.decoder.layers.0.encoder_attn",
                )
                for path, role in under(
                    attn,
                    {"q_proj.weight": QUERY, "k_proj.weight": KEY, "v_proj.weight": VALUE, "out_proj.weight": OUTPUT},
                ).items()
            },
            **{
                path: role
                for block in ("model.encoder.layers.0", "model.decoder.layers.0")
                for path, role in under(block, {"fc1.weight": UP, "fc2.weight": DOWN}).items()
            },
        },
        note="Post-norm; the block itself is the feed-forward.",
    ),
)


# Images

IMAGES = (
    Golden(
        type="vit",
        head="AutoModelForImageClassification",
        cls="ViTForImageClassification",
        config={**IMAGE, "intermediate_size": 96},
        blocks=("vit.layers.0",),
        streams=(
            attention("vit.layers.0.attention", 0, FIRST),
            mlp("vit.layers.0.mlp", None, FIRST),
        ),
        attentions=(Attention("vit.layers.0.attention", "num_attention_heads", False, "interface"),),
        roles=under(
            "vit.layers.0",
            {
                "attention.q_proj.weight": QUERY,
                "attention.k_proj.weight": KEY,
                "attention.v_proj.weight": VALUE,
                "attention.o_proj.weight": OUTPUT,
                "mlp.fc1.weight": UP,
                "mlp.fc2.weight": DOWN,
            },
        ),
    ),
    Golden(
        type="dinov2",
        head="AutoModelForImageClassification",
        cls="Dinov2ForImageClassification",
        config={**IMAGE, "mlp_ratio": 2},
        blocks=("dinov2.encoder.layer.0",),
        streams=(
            attention("dinov2.encoder.layer.0.attention", 0, FIRST),
            mlp("dinov2.encoder.layer.0.mlp", None, FIRST),
        ),
        attentions=(Attention("dinov2.encoder.layer.0.attention", "num_attention_heads", False, "interface"),),
        roles=under(
            "dinov2.encoder.layer.0",
            {
                "attention.q_proj.weight": QUERY,
                "attention.k_proj.weight": KEY,
                "attention.v_proj.weight": VALUE,
                "attention.o_proj.weight": OUTPUT,
                "mlp.fc1.weight": UP,
                "mlp.fc2.weight": DOWN,
            },
        ),
        note="A learned factor per channel before each addition (layer_scale1, layer_scale2).",
    ),
    Golden(
        type="swin",
        head="AutoModelForImageClassification",
        cls="SwinForImageClassification",
        config={
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
        },
        blocks=("swin.encoder.layers.0.blocks.0",),
        streams=(
            attention("swin.encoder.layers.0.blocks.0.attention", 0, FIRST),
            mlp("swin.encoder.layers.0.blocks.0.mlp", None, FIRST),
        ),
        attentions=(Attention("swin.encoder.layers.0.blocks.0.attention", "num_heads[0]", False, "interface"),),
        roles=under(
            "swin.encoder.layers.0.blocks.0",
            {
                "attention.q_proj.weight": QUERY,
                "attention.k_proj.weight": KEY,
                "attention.v_proj.weight": VALUE,
                "attention.o_proj.weight": OUTPUT,
                "mlp.fc1.weight": UP,
                "mlp.fc2.weight": DOWN,
            },
        ),
        note=(
            "The stages have different widths. The attention sees windows: (batch x windows, positions, width), "
            "shifted in every second block; the value is put back in place before it is added."
        ),
    ),
    Golden(
        type="swinv2",
        head="AutoModelForImageClassification",
        cls="Swinv2ForImageClassification",
        config={
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
        },
        blocks=("swinv2.encoder.layers.0.blocks.0",),
        streams=(
            attention("swinv2.encoder.layers.0.blocks.0.attention", 0, FIRST),
            mlp(
                "swinv2.encoder.layers.0.blocks.0.output",
                None,
                module(
                    "swinv2.encoder.layers.0.blocks.0.intermediate",
                    "swinv2.encoder.layers.0.blocks.0.intermediate.dense",
                ),
            ),
        ),
        attentions=(Attention("swinv2.encoder.layers.0.blocks.0.attention.self", "num_heads[0]", False, "by hand"),),
        roles=under(
            "swinv2.encoder.layers.0.blocks.0",
            {
                **BERT_ROLES,
                "attention.self.continuous_position_bias_mlp.0.weight": OTHER,  # of the relative positions
                "attention.self.continuous_position_bias_mlp.2.weight": OTHER,
            },
        ),
        note=(
            "A norm after each branch and none before. Unlike BERT's, these outputs do not do the addition, so the "
            "whole modules are the sites. Windows as in swin."
        ),
    ),
)


GOLDEN: tuple[Golden, ...] = (
    *PRE_NORM,
    *SANDWICH,
    *PARALLEL,
    *EXPERT,
    *RECURRENT,
    *ENCODERS,
    *ENCODER_DECODERS,
    *IMAGES,
)
