"""The shapes of published models of other families than Llama's, to measure them without weights.

A shape is transformers' `model_type` and the published sizes. Rope scaling for contexts beyond the
rows that are measured is left out: it changes no amount of work.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
_WINDOWED = {"rope_type": "default", "rope_theta": 10000.0}

# model type and fields by the name of the shape
FAMILY_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-1.7b": ("qwen3", {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "gemma3-1b": ("gemma3_text", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": _WINDOWED,
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    }),
    # OLMo 3 is published from 7B on: its layers at the sizes of OLMo-2-1B
    "olmo3-1.5b": ("olmo3", {
        "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "sliding_window": 4096, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }),
    "phi4-mini": ("phi3", {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "sliding_window": 262144, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75
        },
    }),
    # a hybrid: of four layers, three are gated delta nets; the text part of Qwen3.5-2B
    "qwen3.5-2b": ("qwen3_5_text", {
        "vocab_size": 248320, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "max_position_embeddings": 262144, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25
        },
    }),
    # mixtures, cut to as many layers as fit beside one another
    "qwen3-30b-a3b-6-layers": ("qwen3_moe", {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4,
        "num_local_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
    "gpt-oss-20b-4-layers": ("gpt_oss", {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def family_config(shape: str) -> PreTrainedConfig:
    """Returns the config of a family's shape; its last tokens are <eos> and <pad>.

    Raises KeyError for an unknown shape.
    """
    model_type, fields = FAMILY_SHAPES[shape]
    size = fields["vocab_size"]
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 2, "pad_token_id": size - 1}
    return AutoConfig.for_model(model_type, **fields, **ends)
