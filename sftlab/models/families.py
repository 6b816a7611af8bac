"""Tiny models of today's families: what docs/models.md is asked of, and the tests."""

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
GRANITE = {"logits_scaling": 8.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA_NET = {
    **LINEAR,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
MAMBA2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    **{"mamba_chunk_size": 16, "mamba_d_conv": 4, "mamba_expand": 2},
}
SHARED_EXPERT = {"num_experts": 4, "shared_expert_intermediate_size": 32, **MIXTURE}
# Family, the class of its config without `Config`, and fields of a tiny model that differ.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "Llama 2, 3; SmolLM2": ("Llama", {}),
    "Llama 4 (text)": (
        "Llama4Text",
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 8192,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
        },
    ),
    "Qwen 2, 2.5": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", {"head_dim": 16}),
    "Qwen 2.5-VL (text)": ("Qwen2_5_VLText", {"rope_parameters": MROPE}),
    "Qwen 3-VL (text)": ("Qwen3VLText", {"head_dim": 16, "rope_parameters": MROPE}),
    "Qwen 3 MoE": ("Qwen3Moe", {"head_dim": 16, "num_local_experts": 4, **MIXTURE}),
    "Qwen3-Next": ("Qwen3Next", {"head_dim": 16, **DELTA_NET, **SHARED_EXPERT}),
    "Qwen 3.5 (text)": ("Qwen3_5Text", {"head_dim": 16, **DELTA_NET}),
    "Qwen 3.5 MoE (text)": ("Qwen3_5MoeText", {"head_dim": 16, **DELTA_NET, **SHARED_EXPERT}),
    "Gemma 2": ("Gemma2", {"head_dim": 32, **WINDOWS}),
    "Gemma 3 (text)": ("Gemma3Text", {"head_dim": 32, **WINDOWS}),
    "Gemma 4 (text)": ("Gemma4Text", {"head_dim": 32, **WINDOWS, **PER_LAYER}),
    "Mistral 7B v0.1": ("Mistral", {"sliding_window": 8}),
    "Mistral 7B v0.2 and later": ("Mistral", {"sliding_window": None}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Phi-2": ("Phi", {}),
    "Phi-3, Phi-4": ("Phi3", {"sliding_window": 8}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", dict(WINDOWS)),
    "OLMo Hybrid": ("OlmoHybrid", dict(DELTA_NET)),
    "SmolLM3": ("SmolLM3", {}),
    "Granite 3": ("Granite", dict(GRANITE)),
    "Granite MoE": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite 4 hybrid": (
        "GraniteMoeHybrid",
        {
            **LINEAR,
            **MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
        },
    ),
    "Bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "Falcon-H1": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 128}),
    "Nemotron-H": (
        "NemotronH",
        {
            **MIXTURE,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
            **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
            **{"chunk_size": 16, "head_dim": 16, "n_routed_experts": 4},
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "Command R": ("Cohere", {"logit_scale": 0.0625}),
    "Command R7B": ("Cohere2", {"logit_scale": 0.0625, **WINDOWS}),
    "GLM-4": ("Glm4", {"head_dim": 16}),
    "Seed-OSS": ("SeedOss", {"head_dim": 16}),
    "Exaone 4": ("Exaone4", dict(WINDOWS)),
    "ERNIE 4.5": ("Ernie4_5", {}),
    "Hunyuan (dense)": ("HunYuanDenseV1", {"head_dim": 16}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, **MIXTURE, **WINDOWS}),
    "DeepSeek V3": (
        "DeepseekV3",
        {
            **MIXTURE,
            **MLA,
            "qk_nope_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        },
    ),
    "Kimi Linear": (
        "KimiLinear",
        {
            **{**LINEAR, **MIXTURE, **MLA, "num_key_value_heads": 4},
            **{"linear_num_heads": 2, "linear_head_dim": 16, "num_local_experts": 4},
        },
    ),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "LFM2 MoE": (
        "Lfm2Moe",
        {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1}
        | MIXTURE,
    ),
    "GPT-2": ("GPT2", {"attn_pdrop": 0.1, "n_inner": 96}),
    "Pythia": ("GPTNeoX", {}),
    "RecurrentGemma": ("RecurrentGemma", {"lru_width": 64, "attention_window_size": 32}),
    "Mamba": ("Mamba", {}),
}
