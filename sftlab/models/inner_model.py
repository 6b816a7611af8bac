"""A model without peft's wrapper."""

from peft import PeftModel
from transformers import PreTrainedModel


def inner_model(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Returns the model itself, which holds the adapter's layers if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
