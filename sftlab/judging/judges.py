"""Judges: what they are asked for, and a local causal model that is asked greedily."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from sftlab.data.chat_template import prompt_ids
from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template
from sftlab.evaluation.generation import (
    Answer,
    Generator,
    Sampling,
    longest_prompt,
)
from sftlab.judging.judge_formats import Messages
from sftlab.models.identity import base_identity
from sftlab.models.loading import load_weights, read_config, read_tokenizer


class Judge(Protocol):
    """What an evaluation asks for judgements.

    `facts` name the judge. `room` is the longest prompt in tokens, or None where it is unknown.
    """

    facts: dict[str, Any]
    room: int | None

    def size(self, messages: Messages) -> int:
        """Returns the number of tokens of a prompt."""

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """Returns one judgement per prompt, all from one batch."""


class LocalJudge:
    """A causal model from the hub or a folder. Its weights are loaded at the first judgement.

    `many` says that there are enough prompts for compiling the decoding step to pay on a GPU.
    """

    def __init__(
        self, name: str, max_new_tokens: int, load_in_4bit: bool = False, batch_size: int = 16
    ) -> None:
        self.name, self.load_in_4bit, self.batch_size = name, load_in_4bit, batch_size
        self.sampling = Sampling(max_new_tokens)
        try:
            self.tokenizer = read_tokenizer(name)
            config = read_config(name, None)
        except ValueError as error:
            raise ValueError(f"the judge {name} cannot be loaded: {error}") from error
        # prompts are measured before they are cut, so a warning about a long one means nothing
        self.tokenizer.deprecation_warnings[
            "sequence-length-is-longer-than-the-specified-maximum"
        ] = True
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the judge {name} has no chat template, so it cannot be asked as it was trained: "
                "use a model whose tokenizer has one"
            )
        self.room = longest_prompt(config, self.sampling)
        if self.room < 1:
            raise ValueError(
                f"--judge_max_new_tokens {max_new_tokens} leaves the judge {name} no room for a "
                f"prompt: it has {self.room + max_new_tokens} positions"
            )
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        self.facts = {"judge": name, "weights": base_identity(name, None), "template": template}
        self.facts |= {
            "load_in_4bit": load_in_4bit,
            "dtype": str(config.dtype),
            "max_new_tokens": max_new_tokens,
        }
        self.many, self._generators = False, {}

    def size(self, messages: Messages) -> int:
        """Returns the number of tokens of a prompt."""
        return len(self._ids(messages))

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """Returns one judgement per prompt, all from one batch."""
        compiled = self.many and self._model.device.type == "cuda"
        if compiled not in self._generators:
            static_rows = self.batch_size if compiled else None
            self._generators[compiled] = Generator(
                self._model, self.tokenizer, self.sampling, static_rows
            )
        return self._generators[compiled].answers(
            [self._ids(messages) for messages in prompts], seed
        )

    def _ids(self, messages: Messages) -> list[int]:
        if not self._takes_system and messages[0]["role"] == "system":
            system, user = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}]
        return prompt_ids(self.tokenizer, messages)

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows a system prompt. Some refuse it, some leave it out."""
        probe = [
            {"role": "system", "content": "Judge fairly."},
            {"role": "user", "content": "Which?"},
        ]
        try:
            return "Judge fairly." in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            return False

    @cached_property
    def _model(self) -> PreTrainedModel:
        device, quantization = "cuda" if torch.cuda.is_available() else "cpu", None
        # cuDNN's attention differs from call to call (see sftlab/evaluation/base_and_tuned.py)
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.load_in_4bit:
            compute = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
            quantization = BitsAndBytesConfig(load_in_4bit=True, **compute)
        # in the dtype of the weights on every device, so that judgements from a GPU are found
        # again on a machine without one
        kwargs = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
        try:
            return load_weights(self.name, kwargs, device, quantization).eval()
        except ValueError as error:
            raise ValueError(f"the judge {self.name} cannot be loaded: {error}") from error
