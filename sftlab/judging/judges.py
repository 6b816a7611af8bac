"""Judges: a local causal model or a server, asked greedily in the format it was made for.

What it wrote is kept.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.answer_file import AnswerFile, digest, fill
from sftlab.evaluation.generation import (
    BATCHES_WORTH_COMPILING,
    Answer,
    Generator,
    Sampling,
    Unfinished,
    longest_prompt,
)
from sftlab.judging.verdict_parsing import READERS, Verdict
from sftlab.paths import ROOT
from sftlab.tables import preview

JUDGE_FORMATS = ROOT / "eval" / "judges"
RETRIES = 6
CUT = "\n[... cut from the middle ...]\n"
_EDGE = 2**20
Messages = list[dict[str, str]]


class JudgeFormat(NamedTuple):
    """How a kind of judge is asked and read: a file of eval/judges.

    `scale` is that of its scores.
    """

    name: str
    scale: tuple[int, int]
    content: dict[str, Any]

    def messages(self, kind: str, **fields: str) -> Messages:
        """The conversation that asks for a judgement:

        `kind` is pair, turn_1, turn_2 or turn_N_reference.
        """
        if "dialogue" in self.content and "question_2" in fields:
            fields["dialogue"] = self.content["dialogue"].format(**fields)
        rubric = "pair_rubric" if kind == "pair" else "score_rubric"
        user = self.content[kind]["user"].format(**fields, rubric=self.content.get(rubric))
        system = self.content[kind]["system"]
        if self.content["system_in_user"]:
            return [{"role": "user", "content": f"{system}\n{user}"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def read(self, kind: str, text: str) -> Verdict:
        """The verdict of a judgement's text, None where there is none."""
        return READERS[self.content["verdicts"]["pair" if kind == "pair" else "score"]](text)


def load_format(name: str) -> JudgeFormat:
    """A format by its name; ValueError lists those that there are."""
    found = {path.stem: path for path in JUDGE_FORMATS.glob("*.yaml")}
    if name not in found:
        raise ValueError(f"no judge format {name!r}: there are {', '.join(sorted(found))}")
    content = yaml.safe_load(found[name].read_text(encoding="utf-8"))
    return JudgeFormat(name, tuple(content["scale"]), content)


class Judge(Protocol):
    """What judges: `facts` name it, `room` is the longest prompt in tokens (None:

    no limit known).
    """

    facts: dict[str, Any]
    room: int | None

    def size(self, messages: Messages) -> int:
        """Tokens of a prompt."""

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
        """One judgement a prompt, all in one batch."""


class LocalJudge:
    """A causal model of the hub or of a folder.

    Its weights are loaded when something is to be judged.

    `many` says that there is so much to judge that compiling the decoding step pays (on a GPU).
    """

    def __init__(
        self, name: str, max_new_tokens: int, load_in_4bit: bool = False, batch_size: int = 16
    ) -> None:
        self.name, self.load_in_4bit, self.batch_size = name, load_in_4bit, batch_size
        self.sampling = Sampling(max_new_tokens)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the judge {name} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        # prompts are measured before they are cut: that one is too long is no news
        self.tokenizer.deprecation_warnings[
            "sequence-length-is-longer-than-the-specified-maximum"
        ] = True
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the judge {name} has no chat template, so it cannot be asked as it was trained: "
                "expected a model "
                "whose tokenizer has one"
            )
        self.room = longest_prompt(config, self.sampling)
        if self.room < 1:
            raise ValueError(
                f"--judge_max_new_tokens {max_new_tokens} leaves the judge {name} no room for a "
                "prompt: it has "
                f"{self.room + max_new_tokens} positions"
            )
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        self.facts = {"judge": name, "weights": _weights(name, config), "template": template}
        self.facts |= {
            "load_in_4bit": load_in_4bit,
            "dtype": str(config.dtype),
            "max_new_tokens": max_new_tokens,
        }
        self.many, self._generators = False, {}

    def size(self, messages: Messages) -> int:
        return len(self._ids(messages))

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
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
        """Whether the template shows a system prompt: some refuse it, some leave it out."""
        probe = [
            {"role": "system", "content": "Judge fairly."},
            {"role": "user", "content": "Which?"},
        ]
        try:
            return "Judge fairly." in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except TemplateError:
            return False

    @cached_property
    def _model(self) -> PreTrainedModel:
        device, quantization = "cuda" if torch.cuda.is_available() else "cpu", None
        # cuDNN's attention gives other values from call to call (see
        # sftlab/evaluation/base_and_tuned.py)
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.load_in_4bit:
            compute = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
            quantization = BitsAndBytesConfig(load_in_4bit=True, **compute)
        # in the dtype of the weights, wherever it runs: what it judged is found again on a machine
        # without a GPU
        kwargs = {"dtype": "auto", "device_map": device, "quantization_config": quantization}
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name, use_safetensors=True, **kwargs
            ).eval()
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"the judge {self.name} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error


class ServerJudge:
    """A model behind an OpenAI-compatible server (vLLM and others), `OPENAI_API_KEY` in the
    environment if it asks.

    Sizes are estimates of three bytes a token, as the server's tokenizer is not known. `context` is
    the model's in tokens; where it is not given the server is asked for it (vLLM says it; of others
    answers are not cut).
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
        return math.ceil(sum(len(message["content"].encode()) for message in messages) / 3)

    def answers(self, prompts: Sequence[Messages], seed: int = 0) -> list[Answer]:
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
        """Turns what the client raises into one sentence."""
        try:
            yield
        except (self.openai.APIConnectionError, self.openai.InternalServerError) as error:
            raise ValueError(
                f"the judge's server at {self.url} does not answer, tried {RETRIES + 1} times: "
                "judgements are kept, "
                "and the same command goes on from there"
            ) from error
        except self.openai.APIStatusError as error:
            said = preview(error.message, 300)
            raise ValueError(
                f"the judge's server at {self.url} refuses, status {error.status_code}: {said}"
            ) from error
        except (AttributeError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"what the judge's server at {self.url} answers is no completion: {error}"
            ) from error


def longest_fitting(
    judge: Judge, build: Callable[[Mapping[str, str]], Messages], texts: Mapping[str, str]
) -> tuple[Messages, int]:
    """The prompt that `build` makes of `texts`, the longest of them cut from the middle until the
    judge has room.

    Also the number of characters that were cut. ValueError where the prompt is too long without any
    of them.
    """
    kept, room = dict(texts), judge.room
    halves = {name: (text, "") for name, text in texts.items()}
    while room is not None and (over := judge.size(build(kept)) - room) > 0:
        name = max(halves, key=lambda one: sum(map(len, halves[one])))
        head, tail = halves[name]
        keep = (len(head + tail) - max(over, 16)) // 2
        if keep < 0:
            raise ValueError(
                f"the judge {judge.facts['judge']} has room for prompts of {room} tokens, and one "
                "without its answers "
                f"has {judge.size(build(dict.fromkeys(texts, '')))}: expected a judge with a "
                "longer context"
            )
        whole = texts[name]
        halves[name] = whole[:keep], whole[len(whole) - keep :]
        kept[name] = CUT.join(halves[name])
    return build(kept), sum(len(texts[name]) - len("".join(halves[name])) for name in texts)


def ask(
    judge: Judge, prompts: Sequence[Messages], file: AnswerFile, size: int, title: str
) -> list[Answer]:
    """The judgements of `prompts`, in their order.

    Only what `file` does not hold is asked, the longest first.

    One prompt is judged once, however often it stands there.
    """
    keys = [digest(messages) for messages in prompts]
    by_key = dict(zip(keys, prompts, strict=True))
    missing = [key for key in by_key if ("judge", key) not in file.found]
    if isinstance(judge, LocalJudge):
        judge.many |= len(missing) > BATCHES_WORTH_COMPILING * size
    order = sorted(missing, key=lambda key: (-judge.size(by_key[key]), key))
    known = [key for key in by_key if ("judge", key) in file.found]
    fill(
        file,
        "judge",
        known + order,
        [by_key[key] for key in known + order],
        size,
        judge.answers,
        title,
    )
    return [file.found["judge", key] for key in keys]


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a judge."""
    parser.add_argument(
        "--judge", help="a causal model (hub name or folder), or a server's model with --judge_url"
    )
    parser.add_argument(
        "--judge_url", help="an OpenAI-compatible server, for instance http://localhost:8000/v1"
    )
    parser.add_argument(
        "--judge_context",
        type=int,
        help="tokens that a server's model takes (default: it is asked)",
    )
    parser.add_argument(
        "--judge_format",
        help="prometheus or fastchat (default: by whether its name has 'prometheus')",
    )
    parser.add_argument("--judge_in_4bit", action="store_true", help="load a local judge in 4 bits")
    parser.add_argument("--judge_batch_size", type=int, default=16, help="judgements at once")
    parser.add_argument("--judge_max_new_tokens", type=int, default=1024, help="longest judgement")


def judge_from(arguments: argparse.Namespace) -> tuple[Judge, JudgeFormat]:
    """The judge that the flags name, and how it is asked.

    ValueError where they contradict themselves.
    """
    name = arguments.judge
    if arguments.judge_batch_size < 1:
        raise ValueError(f"--judge_batch_size must be at least 1, got {arguments.judge_batch_size}")
    style = load_format(
        arguments.judge_format or ("prometheus" if "prometheus" in name.lower() else "fastchat")
    )
    if arguments.judge_url:
        if arguments.judge_in_4bit:
            raise ValueError(
                "--judge_in_4bit is for a local judge: --judge_url names a server, which loads its "
                "own"
            )
        new_tokens, context = arguments.judge_max_new_tokens, arguments.judge_context
        return ServerJudge(name, arguments.judge_url, new_tokens, context), style
    if arguments.judge_context:
        raise ValueError(
            "--judge_context is for a server (--judge_url): a local judge's config says how much "
            "it takes"
        )
    new_tokens, size = arguments.judge_max_new_tokens, arguments.judge_batch_size
    return LocalJudge(name, new_tokens, arguments.judge_in_4bit, size), style


def _weights(name: str, config: Any) -> str | None:
    """What tells two states of the weights apart: the hub's commit.

    Of a folder sizes and both ends of its files.
    """
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if not files:
        return getattr(config, "_commit_hash", None)
    seen = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            seen.update(f"{path.name} {path.stat().st_size}".encode() + file.read(_EDGE))
            file.seek(max(0, path.stat().st_size - _EDGE))
            seen.update(file.read(_EDGE))
    return seen.hexdigest()[:16]
