"""Base's and tuned's answers for a judge, generated under the run's template and kept."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sftlab.data.chat_template import prompt_ids
from sftlab.data.formats import Message
from sftlab.evaluation.answer_file import AnswerFile, digest, fill
from sftlab.evaluation.base_and_tuned import (
    answering,
    load_pair,
    model_settings,
    refuse_unknown_ids,
    refuse_untrusted,
    run_tokenizer,
)
from sftlab.evaluation.generation import (
    Answer,
    Generator,
    Sampling,
    longest_prompt,
    rows_worth_compiling,
)
from sftlab.evaluation.processes import ALONE, Processes
from sftlab.evaluation.served_answers import FACTS, ServedModels
from sftlab.evaluation.start_model import load_start, sides_of, start_of
from sftlab.export.server_agreement import LoadedRun, answers_of_held_server
from sftlab.models.loading import read_config
from sftlab.runs.run_directory import START


class Contestants:
    """Base and tuned of a finished run. Answers are kept in RUN/eval/answers-*.jsonl."""

    def __init__(
        self,
        folder: Path,
        run: dict[str, Any],
        batch_size: int,
        trusted: bool = False,
        served: ServedModels | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """`trusted` lets code that the base model brings run. `served` answers in their place.

        Batches are dealt over `processes`.
        """
        self.folder, self.run, self.batch_size, self.trusted = folder, run, batch_size, trusted
        self.served, self.processes = served, processes
        refuse_untrusted(folder, run, trusted)
        self.tokenizer = run_tokenizer(folder, run)
        name, revision = (run["recipe"][x] for x in ("model_name_or_path", "model_revision"))
        try:
            self.config = read_config(name, revision, trusted)
        except ValueError as error:
            raise ValueError(
                f"the base model {name} of the run cannot be loaded: {error}"
            ) from error
        self.prompts_cut, self.start = 0, None

    @property
    def sides(self) -> tuple[str, ...]:
        """Returns the names of the models that answer."""
        return sides_of(self.start)

    def add_start(self) -> None:
        """Let the model that the run went on from answer too, as the side start.

        Raises ValueError for a run that began with a new adapter, and where a server answers.
        """
        if self.served:
            raise ValueError(
                "--with_start loads the model that the run went on from, and --server has base "
                "and tuned alone: leave one of them out"
            )
        self.start = start_of(self.folder, self.run)
        if self.start is None:
            raise ValueError(
                f"{self.folder} began with a new adapter, so there is no model that it went on "
                "from: leave --with_start out"
            )

    @cached_property
    def model(self) -> PeftModel | PreTrainedModel:
        """Returns the models, loaded at the first answer that is not kept."""
        model = load_pair(self.folder, self.run, self.trusted)
        if self.start:
            load_start(model, self.start)
        refuse_unknown_ids(model, self.tokenizer)
        return model

    def free(self) -> None:
        """Free the models' memory for the judge."""
        self.__dict__.pop("model", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(
        self, side: str, conversations: Sequence[list[Message]], sampling: Sampling, title: str
    ) -> list[Answer]:
        """Returns the answers of one of `sides`.

        A prompt that leaves no room for an answer is cut in the middle and counted. A sampled
        answer depends on its batch, so other conversations or another batch size give other ones.
        """
        longest = longest_prompt(self.config, sampling)
        if longest < 1:
            raise ValueError(
                f"--max_new_tokens {sampling.max_new_tokens} leaves the model no room for a prompt"
            )
        prompts = [prompt_ids(self.tokenizer, conversation) for conversation in conversations]
        self.prompts_cut += sum(len(prompt) > longest for prompt in prompts)
        prompts = [_without_middle(prompt, longest) for prompt in prompts]
        keys = [digest(prompt) for prompt in prompts]
        settings = model_settings(self.folder, self.run) | asdict(sampling)
        if side == START:
            settings |= {START: self.start.weights}
        by_key = dict(zip(keys, prompts, strict=True))
        rows = sorted(by_key, key=lambda key: (-len(by_key[key]), key))
        if sampling.temperature > 0:
            settings |= {"batch_size": self.batch_size, "prompts": digest(rows)}
        if self.served:
            file = AnswerFile(self.folder / "eval", settings | FACTS)
            if any((side, row) not in file.found for row in rows):
                loaded = LoadedRun(self.run, self.model, self.tokenizer)
                asked = rows, [by_key[row] for row in rows], sampling
                answers_of_held_server(self.served, loaded, side, file, *asked, title)
            return [file.found[side, key] for key in keys]
        file = AnswerFile(self.folder / "eval", settings, processes=self.processes)
        missing = sum((side, row) not in file.found for row in rows)
        if missing:
            fixed = rows_worth_compiling(self.model, missing, self.batch_size)
            generator = Generator(self.model, self.tokenizer, sampling, fixed)
            with answering(self.model, side):
                asked = [by_key[row] for row in rows]
                fill(file, side, rows, asked, self.batch_size, generator.answers, title)
        return [file.found[side, key] for key in keys]

    def draws(
        self, conversations: Sequence[list[Message]], sampling: Sampling, title: str
    ) -> list[list[Answer]]:
        """Returns two sampled answers of the base model to each conversation, from two seeds.

        They differ by chance alone.
        """
        seeds = (sampling.seed + 1000, sampling.seed + 2000)
        return [
            self.answers("base", conversations, replace(sampling, seed=seed), title)
            for seed in seeds
        ]


def refuse_twins(facts: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError where two models gave the same answers."""
    for one, other in combinations(facts, 2):
        if facts[one]["hash"] == facts[other]["hash"]:
            raise ValueError(
                f"{one} and {other} gave the same answers word for word (their hashes are equal): "
                "the adapter changes nothing, or one model was taken for the other; there is "
                "nothing to judge"
            )


def _without_middle(prompt: list[int], longest: int) -> list[int]:
    if len(prompt) <= longest:
        return prompt
    head = longest // 2
    return prompt[:head] + prompt[len(prompt) - (longest - head) :]
