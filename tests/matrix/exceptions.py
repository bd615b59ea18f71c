"""What the rules of `shrink` and `batch` get wrong, by model type: sizes that depend on each other, unusual inputs.

Types are named here because tiny models must be built of them; nothing in the library knows any of these names.
"""

from __future__ import annotations

from typing import Any

DROP = "(the field is left out)"
_HYBRID = ["linear_attention", "linear_attention", "hybrid"]
_SWIN = {"embed_dim": 16, "num_heads": (1, 2, 2, 4), "window_size": 4, "patch_size": 4, "image_size": 128}
_DOTS = {  # the sliding layers' sizes, which no field of the default configuration shows
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 32 for name in ("q_lora_rank", "kv_lora_rank")},
    **{f"swa_{name}": 16 for name in ("qk_nope_head_dim", "v_head_dim")},
    "swa_head_dim": 24,
}
_BLT = {"hidden_size": 32, "hidden_size_global": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
_BLT = {**_BLT, "intermediate_size": 128, "vocab_size": 260, "head_dim": 16, "num_hidden_layers": 1}

# by type, or by (type, head): laid over the shrunk fields
CONFIGS: dict[Any, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": "auto"},
    "blt": {
        "vocab_size": 260,
        "cross_attn_k": 2,
        "encoder_hash_byte_group_vocab": 64,
        "max_position_embeddings": 128,
        "patcher_config": {**_BLT, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64},
        "encoder_config": {**_BLT, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64},
        "decoder_config": {**_BLT, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64},
        "global_config": {**_BLT, "hidden_size": 64, "num_hidden_layers": 2},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": DROP,
        "moe_intermediate_size": 64,
    },
    "donut-swin": _SWIN,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "efficientnet": {"width_coefficient": 0.25, "hidden_dim": 320, "depth_coefficient": 0.3},
    "encoder-decoder": {
        "decoder": {"add_cross_attention": True, "is_decoder": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4},
    "falcon_h1": {"mamba_d_head": "auto", "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "intermediate_size": [128] * 3,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "gemma4_text": {"global_head_dim": 32, "per_layer_config": DROP},
    "gemma4_unified_text": {"global_head_dim": 32, "per_layer_config": DROP},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech": {"encoder_config": {"context_size": 32, "max_pos_emb": 64}},
    "granite_speech_plus": {"encoder_config": {"context_size": 32, "max_pos_emb": 64}},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_d_head": "auto",
        "shared_intermediate_size": 64,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "visual_embed": False},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 4, "intermediate_size": 128},
    "longcat_flash": {"head_dim": 8},
    "longt5": {"decoder_start_token_id": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mt5": {"decoder_start_token_id": 0},
    "neomme": {"sliding_window": 64},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "d_model": 64,
        "max_position_embeddings": 12,
        "qk_channels": 64,
        "v_channels": 64,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": (3, 4),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "local"],
        "is_decoder": True,
        "max_position_embeddings": 12,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    **{("reformer", head): {"is_decoder": False} for head in ("masked", "sequence", "question", "encoder")},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "siglip2": {"vision_config": {"num_patches": 16, "patch_size": 16, "num_channels": 3}},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "textnet": {"image_size": [64, 64], "stem_out_channels": 32, "hidden_sizes": [32, 32, 32, 64, 64]},
    "umt5": {"decoder_start_token_id": 0},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16, "num_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [*_HYBRID, "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": _HYBRID, "adapter_rank": 8, "mamba_d_state": 16},
}
