"""The adapter that a recipe asks for, as peft takes it."""

from peft import LoraConfig
from trl import get_peft_config

from sftlab.config.lora_start import DEFAULT, reads_first
from sftlab.config.recipe import ModelArguments


def lora_config(model: ModelArguments) -> LoraConfig | None:
    """Returns trl's config with the fields that trl's ModelConfig lacks; None without an adapter.

    peft checks some of them when a config is made, which config/lora_start.py does before.
    """
    config = get_peft_config(model)
    if config is None:
        return None
    init, excluded = model.init_lora_weights, model.exclude_modules
    config.init_lora_weights = True if init == DEFAULT or reads_first(init) else init
    config.lora_bias = model.lora_bias
    config.exclude_modules = set(excluded) if isinstance(excluded, list) else excluded
    return config
