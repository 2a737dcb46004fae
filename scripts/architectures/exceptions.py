"""Settings of single architectures that the rules of `shrinking.py` cannot know."""

from __future__ import annotations

from typing import Any

_LINEAR, _FULL, _SLIDING, _HYBRID = "linear_attention", "full_attention", "sliding_attention", "hybrid"
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_PYRAMID = {"depths": (1, 2), "hidden_sizes": (16, 32), "patch_sizes": (4, 2), "strides": (4, 2),
            "num_attention_heads": (1, 2), "mlp_ratios": (2, 2), "num_encoder_blocks": 2}  # fmt: skip
_TOWER = {"num_hidden_layers": 1, "intermediate_size": 16}
_GEMMA4 = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 6,
           "layer_types": [_SLIDING, _FULL] * 3, "sliding_window": 8}  # fmt: skip

# By model type; "vision_config." and the like hold the changes of a nested configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Language models.
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 64, "cross_attn_k": 2,
            "vocab_size": 320, "patcher_config.": {"vocab_size": 320},
            "encoder_config.": {"vocab_size": 320, "hidden_size_global": 32},
            "decoder_config.": {"vocab_size": 320, "hidden_size_global": 32}},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 10000.0},
                                                _SLIDING: {"rope_type": "default", "rope_theta": 10000.0}},
                            "layer_types": [_SLIDING, _FULL, _SLIDING]},
    "dbrx": {"ffn_config.": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2}, "attn_config.":
             {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
                        "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
                        "swa_qk_rope_head_dim": 8, "layer_types": ["indexed_attention", _SLIDING, "indexed_attention"],
                        "mlp_layer_types": ["dense", "sparse", "sparse"]},
    # Towers that are not compressed are small compared to the language model, as in released models.
    "fuyu": {"patch_size": 2},
    "gemma3": {"vision_config.": _TOWER},
    "got_ocr2": {"vision_config.": {**_TOWER, "output_channels": 8, "mlp_dim": 16, "window_size": 2,
                                    "global_attn_indexes": (0,)}},
    "moss_transcribe_diarize": {"audio_config.": _TOWER},
    "gemma3n_text": {"layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING], "num_hidden_layers": 5,
                     "num_kv_shared_layers": 2, "intermediate_size": [48] * 5,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0]},
    "gemma4_text": {"layer_types": [_SLIDING, _FULL] * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
                    "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                    "moe_intermediate_size": 24},
    "gemma4_unified_text": {"layer_types": [_SLIDING, _FULL] * 3, "num_hidden_layers": 6, "num_kv_shared_layers": 2},
    "gemma4_assistant": {"text_config": {**_GEMMA4, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 6}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL, _LINEAR]},
    "hrm_text": {"num_hidden_layers": 8, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {"num_hidden_layers": 5,
                        "audio_config.": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
                                          "nemo_conv_channels": 32, "num_blocks": 1, "intermediate_size": 16,
                                          "input_size": 16},
                        "vision_config.": {"crop_size": 28, "image_size": 28, **_TOWER, "num_hidden_layers": 2}},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16), "num_buckets": 4,
                 "attn_layers": ["local", "lsh", "local"], "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    # Weights are divided in the first forward, from this layer on.
    "rwkv": {"rescale_every": 1},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 8, "num_blocks": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64,
              "attention_head_dim": 16, "layers_block_type": [_LINEAR, _HYBRID, _LINEAR, _HYBRID, _LINEAR]},
    # Image classifiers.
    "bit": {"hidden_sizes": [32, 64], "depths": [1, 2], "num_groups": 8},
    "convnext": {"hidden_sizes": (16, 32), "depths": (1, 2), "num_stages": 2},
    "convnextv2": {"hidden_sizes": (16, 32), "depths": (1, 2), "num_stages": 2},
    "cvt": {"embed_dim": (16, 32, 32), "num_heads": (1, 2, 2), "depth": (1, 2, 3), "mlp_ratio": (2.0, 2.0, 2.0)},
    "donut-swin": _SWIN,
    "swin": _SWIN,
    "swinv2": {**_SWIN, "pretrained_window_sizes": (0, 0)},
    "efficientnet": {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0,
                     "in_channels": (32, 8, 16), "out_channels": (8, 16, 16), "kernel_sizes": (3, 3, 3),
                     "strides": (1, 2, 2), "num_block_repeats": (1, 1, 2), "expand_ratios": (1, 2, 2)},
    "focalnet": {"embed_dim": 16, "hidden_sizes": (16, 32), "depths": (2, 2), "focal_levels": (2, 2),
                 "focal_windows": (3, 3)},
    "hgnet_v2": {"hidden_sizes": [16, 16, 32, 32], "depths": (1, 1, 1, 1), "stem_channels": (3, 8, 8),
                 "stage_in_channels": (8, 16, 16, 32), "stage_mid_channels": (8, 8, 8, 8),
                 "stage_out_channels": (16, 16, 32, 32), "stage_num_blocks": (1, 1, 1, 1),
                 "stage_numb_of_layers": (2, 2, 2, 2)},
    "hiera": {"embed_dim": 16, "image_size": (32, 32), "depths": (1, 2), "num_heads": (1, 2), "num_query_pool": 1,
              "masked_unit_size": (2, 2), "masked_unit_attention": (True, False)},
    "levit": {"hidden_sizes": (16, 32, 32), "num_attention_heads": (2, 2, 2), "depths": (1, 2, 1), "key_dim": (8, 8, 8),
              "image_size": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "mobilevit": {"hidden_sizes": (16, 32, 32), "neck_hidden_sizes": (8, 8, 16, 16, 16, 16, 32), "image_size": 64},
    "mobilevitv2": {"base_attn_unit_dims": (32, 32, 32), "n_attn_blocks": (1, 2, 1), "width_multiplier": 0.25,
                    "image_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 3,
                  "num_cross_attention_heads": 1, "image_size": 32},
    "poolformer": {"depths": (1, 2, 1, 1), "hidden_sizes": (8, 16, 16, 32)},
    "pp_lcnet": {"class_expand": 32, "scale": 0.25},
    "pvt": {**_PYRAMID, "sequence_reduction_ratios": (2, 1), "num_labels": 5},
    "pvt_v2": {**_PYRAMID, "sr_ratios": (2, 1), "image_size": (32, 32), "out_indices": [1]},
    "regnet": {"hidden_sizes": (16, 32), "depths": (1, 2), "groups_width": 8},
    "resnet": {"hidden_sizes": [32, 64], "depths": (1, 2)},
    "segformer": {**_PYRAMID, "sr_ratios": (2, 1), "decoder_hidden_size": 16},
    "siglip2": {"vision_config.": {"num_patches": 16, "patch_size": 8}},
    "swiftformer": {"depths": (1, 2), "embed_dims": (16, 32), "downsamples": (True, True), "image_size": 64},
    "textnet": {"hidden_sizes": (8, 8, 16, 16, 16), "stem_out_channels": 8, "image_size": (64, 64)},
}  # fmt: skip

# Image processor settings that differ from the usual ones, by model type.
PROCESSORS: dict[str, dict[str, Any]] = {
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16},
}
