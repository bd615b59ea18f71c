"""Tiny configurations from default ones: sizes are set by the name of the field, everything else stays as shipped."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.matrix.exceptions import CONFIGS, DROP
from tests.matrix.pairs import Pair

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, LAYERS = 64, 4, 2, 16, 128, 2
VOCABULARY, POSITIONS, WINDOW = 128, 128, 64
_GROUPED = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups")
_NAMES = (
    (
        HIDDEN,
        """hidden_size d_model n_embd dim emb_dim embed_dim hidden_dim embedding_dim encoder_hidden_size
        decoder_hidden_size projection_dim pooler_hidden_size word_embed_proj_dim attention_hidden_size lru_width
        hidden_size_global pooler_output_size prediction_head_size projector_hidden_size out_hidden_size embedding_size
        d_latents true_hidden_size vision_output_dim output_dim input_embedding_size output_embedding_size codebook_dim
        xpath_unit_hidden_size d_embed entity_emb_size ple_embed_dim audio_hidden_size cross_attention_hidden_size
        projector_input_dim projector_output_dim adapter_in_dim adapter_out_dim backbone_hidden_size
        downsample_hidden_size mlp_hidden_size text_hidden_size router_hidden_size""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth num_blocks l_layers x_layers r_layers speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers num_self_attends_per_block conf_num_hidden_layers max_window_layers num_global_layers
        num_mem_blocks""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads
        num_cross_attention_heads linear_num_value_heads speech_encoder_attention_heads t2u_encoder_attention_heads
        t2u_decoder_attention_heads swa_num_attention_heads linear_num_heads conf_num_attention_heads""",
    ),
    (KV_HEADS, "linear_num_key_heads num_global_key_value_heads"),
    (
        HEAD_DIM,
        """head_dim attention_head_dim d_kv kv_channels d_head dim_head attention_head_size linear_key_head_dim
        linear_value_head_dim linear_head_dim swa_head_dim global_head_dim v_head_dim qk_nope_head_dim index_head_dim
        indexer_head_dim""",
    ),
    (24, "qk_head_dim"),
    (8, "qk_rope_head_dim rotary_dim"),
    (32, "kv_lora_rank q_lora_rank o_lora_rank index_rank hc_lowrank"),
    (
        WIDE,
        """intermediate_size ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff n_inner
        mlp_dim speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim feed_forward_size
        intermediate_size_mlp dense_intermediate_size block_ff_dim feed_forward_proj_dim""",
    ),
    (
        VOCABULARY,
        """vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
        decoder_vocab_size t2u_vocab_size unit_hifi_gan_vocab_size entity_vocab_size codebook_size char_vocab_size""",
    ),
    (
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_encoder_position_embeddings
        context_length max_decoder_position_embeddings max_source_positions max_target_positions
        original_max_position_embeddings max_seqlen max_2d_position_embeddings t2u_max_position_embeddings
        max_pos_emb""",
    ),
    (
        WINDOW,
        """sliding_window local_attention attention_chunk_size sliding_window_size attention_window_size
        attention_window""",
    ),
    # experts
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts"),
    (2, "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token num_selected_experts"),
    (
        64,
        """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size shared_experts_intermediate_size moe_ffn_hidden_size moe_latent_size
        intra_bottleneck_size intermediate_multiple_size""",
    ),
    (
        1,
        """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        num_nextn_predict_layers n_groups mamba_n_groups mamba_ngroups zero_expert_num""",
    ),
    # sparse attention
    (2, "index_n_heads indexer_n_heads"),
    (4, "index_topk indexer_budget"),
    # state space
    (16, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_headdim"),
    (8, "mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size mamba_dt_rank time_step_rank"),
    (128, "mamba_d_ssm"),
    # pictures, layouts and whatever else has a size
    (64, "image_size"),
    (16, "num_mel_bins num_filters expert_capacity rel_pos_bins rel_2d_pos_bins"),
    (8, "hidden_size_per_layer_input laurel_rank mm_tokens_per_image coordinate_size shape_size rel_extent d_rel"),
    (4, "prompt_length num_latents"),
)
SIZES = {name: size for size, names in _NAMES for name in names.split()}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KNOWN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}


def config_for(pair: Pair) -> PreTrainedConfig:
    """A tiny configuration of the pair's type, with the exceptions that `exceptions` lists for it."""
    cls: Any = CONFIG_MAPPING[pair.type]
    wanted = getattr(getattr(transformers, pair.cls), "config_class", None)
    name = pair.type
    if wanted is not None and wanted is not cls and not issubclass(cls, wanted):
        cls, name = wanted, getattr(wanted, "model_type", pair.type) or pair.type
    fields = shrunk(cls)
    for key in (name, (name, pair.head)):
        overlay(fields, copy.deepcopy(CONFIGS.get(key, {})))
    if pair.head == "causal" and "is_decoder" in _fields(cls):
        fields.setdefault("is_decoder", True)
    if pair.head in ("sequence", "token", "image"):
        fields["num_labels"] = 3
    config = cls(**fields)
    if pair.head == "sequence":
        for part in (config, _text(config)):
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = 0
    return config


def shrunk(cls: Any, default: Any = None) -> dict[str, Any]:
    """Arguments for a tiny configuration of class `cls`; `default` is the instance to shrink."""
    default = default if default is not None else _default(cls)
    known = _fields(cls)
    found: dict[str, Any] = {}
    for name in sorted(known | set(vars(default) if default is not None else ())):
        value = _value(cls, default, name)
        if isinstance(value, PreTrainedConfig):
            found[name] = {**shrunk(type(value), value), "model_type": value.model_type}
        elif name in known and not name.startswith("_") and name not in ("transformers_version", "num_labels"):
            small = _small(cls, default, name, value)
            if small is not None:
                found[name] = small
    _special_tokens(found)
    if default is not None:
        _one_layer_of_each_kind(found, default, known)
        _rotary(found, default, known)
    return found


def overlay(fields: dict[str, Any], more: dict[str, Any]) -> None:
    """Lays `more` over `fields`, sub-configurations field by field."""
    for name, value in more.items():
        if value == DROP:
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict) and name != "rope_parameters":
            overlay(fields[name], value)
        else:
            fields[name] = value


_ID = -7  # a token id that the tiny vocabulary does not have; a small one is chosen when all are known


def _small(cls: Any, default: Any, name: str, value: Any) -> Any:
    """The tiny value of a field, or None where its default stays."""
    if isinstance(value, bool) or name in ("id2label", "label2id"):
        return None
    if value is None:
        return {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}.get(name) if dataclasses.is_dataclass(cls) else None
    if isinstance(value, float):
        return 0.0 if "drop" in name else None
    if name in ("eos_token_id", "pad_token_id", "bos_token_id") and isinstance(value, list | tuple) and value:
        return 2
    if not isinstance(value, int) or value <= 0:  # 0 and -1 mean that there is none
        return None
    if name in _GROUPED:
        heads = next((h for n in ("num_attention_heads", "n_heads", "num_heads") if (h := _get(default, n))), None)
        return HEADS if isinstance(heads, int) and value >= heads else min(value, KV_HEADS)
    if name in SIZES:
        return SIZES[name] if name.endswith(("_dim", "_size", "_rank")) else min(value, SIZES[name])
    if name.endswith(("_token_id", "_token_index", "_id")) and value >= VOCABULARY:
        return _ID
    if name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") and value > 1:
        return 1
    return None


def _special_tokens(found: dict[str, Any]) -> None:
    free = VOCABULARY
    for name in sorted(found):
        if isinstance(found[name], int) and found[name] == _ID:
            free -= name not in _KNOWN_IDS
            found[name] = _KNOWN_IDS.get(name, free)


def _one_layer_of_each_kind(found: dict[str, Any], default: Any, known: set[str]) -> None:
    """As many layers as the default has kinds of them, in the order of their first appearance."""
    kinds = list(dict.fromkeys(_get(default, "layer_types") or ()))
    if kinds:
        count = max(2, len(kinds))
        kinds = (kinds * 2)[:count] if len(kinds) < 2 else kinds
        found.update({name: count for name in _DEPTHS if name in found})
        if "layer_types" in known:
            found["layer_types"] = kinds
    mlps = list(dict.fromkeys(_get(default, "mlp_layer_types") or ()))
    if mlps and "mlp_layer_types" in known:
        count = next((found[name] for name in _DEPTHS if name in found), LAYERS)
        found["mlp_layer_types"] = (mlps * count)[-count:] if len(mlps) <= count else mlps[:count]
    depths = _get(default, "depths")
    if depths and "depths" in known:
        # one stage of two layers: a stage's first layer often changes widths on its shortcut, and has no stream
        found["depths"] = type(depths)([2] + [1] * (len(depths) - 1))


def _rotary(found: dict[str, Any], default: Any, known: set[str]) -> None:
    """Sections and factors of the rotary embedding, whose lengths follow the dimension of a head."""
    rope = _get(default, "rope_parameters")
    if not isinstance(rope, dict) or "rope_parameters" not in known:
        return
    dim = found.get("head_dim") or found.get("hidden_size", HIDDEN) // (found.get("num_attention_heads") or HEADS)
    changed = _fitted(rope, dim)
    # the original length alone is derived from the configuration's own; the rest must be given whole
    if _without(changed) != _without(rope):
        found["rope_parameters"] = changed


def _fitted(rope: Any, dim: int) -> Any:
    if not isinstance(rope, dict):
        return rope
    made = {key: _fitted(value, dim) for key, value in rope.items()}
    if made.get("mrope_section") is not None:
        half, count = int(dim * (made.get("partial_rotary_factor") or 1.0)) // 2, len(made["mrope_section"])
        made["mrope_section"] = [half - half // count * (count - 1)] + [half // count] * (count - 1)
    if made.get("original_max_position_embeddings"):
        made["original_max_position_embeddings"] = 64
    for key in ("long_factor", "short_factor"):
        if made.get(key):
            made[key] = [1.0] * (dim // 2)
    return made


def _without(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    return {key: _without(value) for key, value in rope.items() if key != "original_max_position_embeddings"}


def _default(cls: Any) -> Any:
    try:
        return cls()
    except Exception:  # a composite configuration that must be given its parts: its fields' defaults are read
        return None


def _fields(cls: Any) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}


def _value(cls: Any, default: Any, name: str) -> Any:
    if default is not None:
        return _get(default, name)
    found = [field.default for field in dataclasses.fields(cls) if field.name == name]
    return found[0] if found and found[0] is not dataclasses.MISSING else None


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property of the configuration that its default does not support
        return vars(config).get(name)


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
