"""Judges: a local causal model, or a model behind a server. Both are asked greedily."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from sftlab.data.chat_template import prompt_ids
from sftlab.data.template_errors import TEMPLATE_ERRORS
from sftlab.evaluation.generation import (
    Answer,
    Generator,
    Sampling,
    Unfinished,
    longest_prompt,
)
from sftlab.judging.judge_formats import Messages
from sftlab.models.identity import base_identity
from sftlab.models.loading import load_weights, read_config, read_tokenizer
from sftlab.tables import preview

RETRIES = 6


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
        except TEMPLATE_ERRORS:
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


class ServerJudge:
    """A model behind an OpenAI-compatible server, such as vLLM.

    The environment's `OPENAI_API_KEY` is sent. `context` is the model's context length in tokens;
    without it the server is asked. vLLM tells it. Where a server does not, prompts are not cut.
    Sizes are estimated at three bytes per token, because the server's tokenizer is not known.
    """

    def __init__(
        self, name: str, url: str, max_new_tokens: int, context: int | None = None
    ) -> None:
        import openai

        self.openai, self.name, self.url, self.max_new_tokens = openai, name, url, max_new_tokens
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=600)
        self.facts = {"judge": name, "server": url, "max_new_tokens": max_new_tokens}
        context = context or self._served_context()
        self.room = context - max_new_tokens if context else None

    def _served_context(self) -> int | None:
        with self._explained():
            served = {model.id: model for model in self.client.models.list().data or []}
        if self.name not in served:
            raise ValueError(
                f"the server at {self.url} has no model {self.name!r}: it has {', '.join(served)}"
            )
        return getattr(served[self.name], "max_model_len", None)

    def size(self, messages: Messages) -> int:
        """Returns an estimate of a prompt's tokens."""
        return math.ceil(sum(len(message["content"].encode()) for message in messages) / 3)

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """Returns one judgement per prompt, all asked at once.

        Raises Unfinished with the answers that came, where one request fails.
        """
        with ThreadPoolExecutor(len(prompts)) as threads:
            asked = [threads.submit(self._answer, messages) for messages in prompts]
        done = {i: one.result() for i, one in enumerate(asked) if one.exception() is None}
        try:
            with self._explained():
                return [one.result() for one in asked]
        except ValueError as error:
            raise Unfinished(str(error), done) from error

    def _answer(self, messages: Messages) -> Answer:
        done = self.client.chat.completions.create(
            model=self.name, messages=messages, temperature=0, max_tokens=self.max_new_tokens
        )
        choice, text = done.choices[0], (done.choices[0].message.content or "").strip()
        tokens = done.usage.completion_tokens if done.usage else len(text.split())
        return Answer(text, tokens, "length" if choice.finish_reason == "length" else "stop", False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into a ValueError of one sentence."""
        try:
            yield
        except (self.openai.APIConnectionError, self.openai.InternalServerError) as error:
            raise ValueError(
                f"the judge's server at {self.url} does not answer, tried {RETRIES + 1} times: "
                "judgements are kept, and the same command goes on from there"
            ) from error
        except self.openai.APIStatusError as error:
            said = preview(error.message, 300)
            raise ValueError(
                f"the judge's server at {self.url} refuses with status {error.status_code}: {said}"
            ) from error
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"what the judge's server at {self.url} answers is no completion: {error}"
            ) from error
