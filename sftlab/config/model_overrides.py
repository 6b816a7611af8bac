"""What may `model_init_kwargs` change? Fields of the model's config that are plain data.

Recipes and run.json files travel between people, so no key of theirs may name code, a file or a
folder. Everything else that `from_pretrained` takes is decided by a recipe field or not at all.
"""

from typing import Any

ALLOWED = frozenset(
    {
        "num_hidden_layers",
        "max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_experts_per_tok",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
    }
)
# what else decides these arguments of `from_pretrained`
_ELSEWHERE = {
    "trust_remote_code": "pass --trust_remote_code on the command line, each time",
    "revision": "use model_revision",
    "dtype": "use dtype",
    "torch_dtype": "use dtype",
    "attn_implementation": "use attn_implementation, beside model_init_kwargs",
    "load_in_4bit": "use load_in_4bit, beside model_init_kwargs",
    "load_in_8bit": "use load_in_8bit, beside model_init_kwargs",
    "quantization_config": "use load_in_4bit or load_in_8bit",
    "use_safetensors": "only safetensors are loaded",
    "device_map": "the launch config decides where the model is",
}
# More than any model has; a plan builds every layer.
MOST_LAYERS = 1000


def check_overrides(overrides: object) -> dict[str, Any]:
    """Returns `model_init_kwargs` as a dict, {} for None.

    Raises ValueError where it is no mapping, and for a key that is not in `ALLOWED`.
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, dict):
        raise ValueError(
            f"model_init_kwargs is {overrides!r}: expected a mapping such as "
            "{num_hidden_layers: 4}"
        )
    for name in overrides:
        if name not in ALLOWED:
            instead = _ELSEWHERE.get(name, f"it may hold {', '.join(sorted(ALLOWED))}")
            raise ValueError(f"model_init_kwargs may not hold {name!r}: {instead}")
    layers = overrides.get("num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise ValueError(
            f"model_init_kwargs.num_hidden_layers is {layers!r}: expected a whole number from 1 "
            f"to {MOST_LAYERS}"
        )
    return dict(overrides)
