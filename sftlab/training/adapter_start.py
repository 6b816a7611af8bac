"""How an adapter begins that reads rows or exact weights first: once, before the first step.

A continued run takes the matrices of its checkpoint instead.
"""

from copy import copy
from typing import Any

import torch
from peft import PeftModel

from sftlab.config.recipe import Recipe
from sftlab.data.collator import Collator
from sftlab.models.loading import load_model, model_init_kwargs
from sftlab.models.loftq import begin_with_rounding_error
from sftlab.training.eva import EvaBatches, begin_with_inputs


class AdapterStart:
    """Begins an adapter as `init_lora_weights` eva or loftq says.

    `facts` says what was read or left, for run.json; checkpoints keep it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.facts: dict[str, Any] = {}
        self._model, args = recipe.model, recipe.training
        self._kwargs = model_init_kwargs(
            recipe.model, args.trust_remote_code, args.model_init_kwargs
        )

    def begin(self, model: PeftModel, rows: Any, collator: Collator, seed: int) -> None:
        """Set A and B, from training rows or from the base model's files.

        Every process does the same. The random state stays as it was.
        """
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(cuda):
            if self._model.init_lora_weights == "eva":
                batches = EvaBatches(rows, collator, self._model.lora_r, seed)
                self.facts = begin_with_inputs(model, batches)
            else:
                exact = copy(self._model)
                exact.load_in_4bit = False
                self.facts = begin_with_rounding_error(model, load_model(exact, self._kwargs, None))

    def state(self) -> dict[str, Any]:
        """Returns the facts, which a continued run does not measure again."""
        return self.facts

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the facts of the start before."""
        self.facts = state
