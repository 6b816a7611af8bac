"""Chat with the models of a run, two of them in one batch, with streamed replies."""

import gc
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

import torch
import transformers as hf
from peft import PeftModel

from sftlab.chat.fitting import fit
from sftlab.chat.sampling import Draw, Settings
from sftlab.config.lora_variants import allows_mixed_batches
from sftlab.data.chat_template import TurnEnd, prompt_ids
from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template
from sftlab.data.time_limit import time_limit
from sftlab.evaluation.base_and_tuned import (
    answering,
    finished_run,
    load_pair,
    refuse_unknown_ids,
    run_tokenizer,
)
from sftlab.evaluation.generation import turn_of
from sftlab.evaluation.start_model import Start, load_start, sides_of, start_of
from sftlab.exit_messages import first_line
from sftlab.models.inner_model import inner_model
from sftlab.runs.run_directory import START

History = list[dict[str, str]]
Sides = tuple[str, ...]
# Seconds between two states of a reply. Each decodes the whole text, and a page takes tens of
# milliseconds to show it.
UPDATE_S = 0.04
# seconds that the chat template may take for one prompt
TEMPLATE_S = 10
_ADAPTERS = {"base": "__base__", START: START, "tuned": "default"}  # peft's names


class Piece(NamedTuple):
    """What is generated so far, for every side.

    `texts` only grow at their end. `tokens` do not count the end token. Times start with the
    generation: they include the prompt, but no waiting for another reply. `finished` is None, stop,
    length, or stopped (by the user).
    """

    texts: dict[str, str]
    tokens: dict[str, int]
    tokens_per_s: dict[str, float]
    first_token_s: float
    finished: dict[str, str | None]


class _Stream(hf.StoppingCriteria):
    """Reads each row's new tokens, and ends the rows whose turn is over.

    It decodes only what is asked for.
    """

    def __init__(
        self, tokenizer: Any, turn: TurnEnd, sides: Sides, most: int, stops: tuple[Event, ...]
    ) -> None:
        self.tokenizer, self.turn, self.sides, self.most, self.stops = (
            tokenizer,
            turn,
            sides,
            most,
            stops,
        )
        self.heads = tuple({stop[:n] for stop in turn.stop_strings for n in range(1, len(stop))})
        self.window = max((len(stop.encode()) for stop in turn.stop_strings), default=0)
        self.ids: dict[str, list[int]] = {side: [] for side in sides}
        self.speeds, self.finished = dict.fromkeys(sides, 0.0), dict.fromkeys(sides)
        self.first_token_s, self.news = 0.0, Event()

    def begin(self, rows: Sides, device: torch.device) -> None:
        """Start the clock for the generation of these sides."""
        self.rows, self.started = rows, time.perf_counter()
        self.over = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def must_stop(self) -> bool:
        """Whether the user, the reader or the app ended the reply."""
        return any(stop.is_set() for stop in self.stops)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids[:, -1].tolist()
        seconds, going_on = (
            time.perf_counter() - self.started,
            "stopped" if self.must_stop() else None,
        )
        self.first_token_s = self.first_token_s or seconds
        for row, (side, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if self.finished[side] is None:
                self.finished[side] = self._read(self.ids[side], token) or going_on
                self.speeds[side] = len(self.ids[side]) / seconds
                if self.finished[side]:
                    self.over[row] = True
        self.news.set()
        return self.over

    def _read(self, ids: list[int], token: int) -> str | None:
        if token in self.turn.end_tokens:
            return "stop"
        ids.append(token)
        if self.window:
            end = self.tokenizer.decode(ids[-self.window :], skip_special_tokens=True)
            if any(stop in end for stop in self.turn.stop_strings):
                return "stop"
        return "length" if len(ids) == self.most else None

    def piece(self, over: bool) -> Piece:
        """Returns the state now. If generation is `over`, unfinished sides were stopped."""
        finished = {
            side: how or ("stopped" if over else None) for side, how in self.finished.items()
        }
        ids = {side: list(ids) for side, ids in self.ids.items()}
        texts = {side: self._shown(ids[side], finished[side]) for side in self.sides}
        tokens = {side: len(ids[side]) for side in self.sides}
        return Piece(texts, tokens, dict(self.speeds), self.first_token_s, finished)

    def _shown(self, ids: list[int], finished: str | None) -> str:
        whole = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = min(
            (whole.partition(stop)[0] for stop in self.turn.stop_strings), key=len, default=whole
        )
        # held back: half a character, what may become a stop string, and spaces
        text = text.rstrip("\ufffd")
        if not finished and text.endswith(self.heads):
            text = text[: len(text) - max(len(head) for head in self.heads if text.endswith(head))]
        return text.strip()


def _answers_in_one_batch(model: PeftModel | hf.PreTrainedModel) -> bool:
    """Returns whether a run's models can be rows of one batch.

    peft ignores or refuses a row's side for modules saved whole and for target parameters.
    """
    if not isinstance(model, PeftModel):
        return False
    return all(
        allows_mixed_batches(one) and not (one.modules_to_save or one.target_parameters)
        for one in model.peft_config.values()
    )


def _loaded_start(
    model: PeftModel | hf.PreTrainedModel, folder: Path, run: dict[str, Any]
) -> tuple[Start | None, str | None]:
    """Load what a run went on from beside its own adapter, or say why it cannot answer."""
    try:
        start = start_of(folder, run)
        if start is not None:
            load_start(model, start)
    except ValueError as error:
        return None, str(error)
    return start, None if start else f"{folder.name} began with a new adapter"


class Chat:
    """The models of a finished run, from one load of the weights: base, tuned, and its start.

    Replies for several threads wait for one another. `run` is run.json, `context` the model's
    context length, `sides` names the models that can answer. `start` is the adapter that the run
    went on from; where it is None, `no_start` says why. `load_in_4bit` quantizes the base model,
    however the run loaded it. `trusted` lets code that the base model brings run. Raises ValueError
    where the run, its adapter or its base model cannot be loaded.
    """

    def __init__(self, folder: Path, load_in_4bit: bool = False, trusted: bool = False) -> None:
        self.run: dict[str, Any] = finished_run(folder)
        quantized = {"load_in_4bit": True, "load_in_8bit": False} if load_in_4bit else {}
        self._tokenizer = run_tokenizer(folder, self.run)
        self._model: PeftModel | hf.PreTrainedModel | None = load_pair(
            folder, self.run | {"recipe": self.run["recipe"] | quantized}, trusted
        )
        self.start, self.no_start = _loaded_start(self._model, folder, self.run)
        self.sides: Sides = sides_of(self.start)
        self.context: int = self._model.config.get_text_config().max_position_embeddings
        inner = inner_model(self._model)
        refuse_unknown_ids(self._model, self._tokenizer)
        turn = turn_of(self._model, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        self._turn = TurnEnd(sorted({*turn.end_tokens, pad}), turn.stop_strings)
        # it replaces the model's own sampling defaults, which a call of generate would fall back to
        inner.generation_config = hf.GenerationConfig(
            eos_token_id=self._turn.end_tokens, pad_token_id=pad
        )
        self.mixed = _answers_in_one_batch(self._model)
        self._lock, self._closed = Lock(), Event()

    def fit(
        self, history: History, max_new_tokens: int, stop: Event | None = None
    ) -> tuple[History, int]:
        """Drop the oldest turns until history and reply fit the context: see `fitting.fit`.

        Returns the history and the number of dropped turns.
        """
        return fit(history, self.context, max_new_tokens, self._prompt, self._sizes, stop)

    def reply(
        self, history: History, sides: Sequence[str], settings: Settings, stop: Event
    ) -> Iterator[Piece]:
        """Answer the user message that ends the history, as each of `sides` in one batch.

        Yields the newest state at most 25 times a second, and the finished one last. Ends within a
        token once `stop` is set or the iterator is closed. Raises ValueError at once for unknown
        sides and for a history that does not fit.
        """
        if START in sides and self.start is None:
            raise ValueError(f"the start cannot answer: {self.no_start}")
        if not sides or len(set(sides)) < len(sides) or set(sides) - set(self.sides):
            raise ValueError(f"sides must be some of {', '.join(self.sides)}, got {list(sides)}")
        if self.fit(history, settings.max_new_tokens)[1]:
            raise ValueError(
                f"conversation and reply exceed the model's {self.context} positions: drop the "
                "oldest turns"
            )
        stops = (stop, left := Event(), self._closed)
        stream = _Stream(self._tokenizer, self._turn, tuple(sides), settings.max_new_tokens, stops)
        return self._pieces(self._prompt(history), settings, stream, left)

    def close(self) -> None:
        """Stop the running reply, refuse others, and free the weights."""
        self._closed.set()
        with self._lock:
            self._model = None
        gc.collect()
        torch.cuda.empty_cache()

    def _sizes(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _prompt(self, history: History) -> list[int]:
        try:
            with time_limit(TEMPLATE_S, "the run's chat template"):
                return prompt_ids(self._tokenizer, history)
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            raise ValueError(
                f"the run's chat template refuses this conversation: {first_line(error)}"
            ) from error

    def _pieces(
        self, prompt: list[int], settings: Settings, stream: _Stream, left: Event
    ) -> Iterator[Piece]:
        ended = False
        with ThreadPoolExecutor(1) as thread:
            try:
                future = thread.submit(self._generate, prompt, settings, stream)
                future.add_done_callback(lambda _: stream.news.set())
                while not ended:
                    stream.news.wait()
                    stream.news.clear()
                    if ended := future.done():
                        future.result()
                    yield stream.piece(ended)
                    wait([future], timeout=UPDATE_S)
            finally:
                left.set()

    def _generate(self, prompt: list[int], settings: Settings, stream: _Stream) -> None:
        while not self._lock.acquire(timeout=0.05):
            if stream.must_stop():
                return
        try:
            if self._model is None:
                raise ValueError("the conversation was closed: load the run again")
            both = self.mixed and len(stream.sides) > 1
            for rows in [stream.sides] if both else [(side,) for side in stream.sides]:
                if not stream.must_stop():
                    self._generate_rows(prompt, rows, settings, stream)
        finally:
            self._lock.release()

    def _generate_rows(
        self, prompt: list[int], rows: Sides, settings: Settings, stream: _Stream
    ) -> None:
        ids = torch.tensor([prompt] * len(rows), device=self._model.device)
        draw = Draw(settings, len(rows), ids.device)
        stream.begin(rows, ids.device)
        both = len(rows) > 1
        with nullcontext() if both else answering(self._model, rows[0]):
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.max_new_tokens,
                repetition_penalty=float(settings.repetition_penalty),
                logits_processor=hf.LogitsProcessorList([draw]),
                stopping_criteria=hf.StoppingCriteriaList([stream]),
                **({"adapter_names": [_ADAPTERS[side] for side in rows]} if both else {}),
            )
        if broken := [side for side, nan in zip(rows, draw.nan.tolist(), strict=True) if nan]:
            raise ValueError(
                f"the {' and the '.join(broken)} model gives no probabilities (NaN logits)"
            )
