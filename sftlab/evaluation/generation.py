"""Generated answers: prompts in left-padded batches, ended where the template ends a turn."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sftlab.data.chat_template import TurnEnd, end_of_turn, pad_id
from sftlab.evaluation.captured_decoding import (
    CapturedSteps,
    NotCaptured,
    can_capture,
    only_full_attention,
)
from sftlab.models.inner_model import inner_model

logger = logging.getLogger(__name__)

# tokens between two looks for a stop string, because decoding takes time
_CHECK_EVERY = 8
# tokens after which rows that have ended leave their batch; a multiple of the number above
_LEAVE_EVERY = 16
# Compiling takes as long as six uncompiled batches of 64 rows and 256 tokens (1B model, H200).
BATCHES_WORTH_COMPILING = 6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else sampled with `seed`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be 0 (greedy) or more and top_p in (0, 1], got "
                f"{self.temperature} and {self.top_p}"
            )
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be a whole number from 0 to 2^62, got {self.seed}")


class Answer(NamedTuple):
    """A generated answer: its stripped text, its number of tokens, and what ended it.

    `finish` is stop or length. `repeats` says that the text repeats itself: at most a tenth of its
    tokens are distinct.
    """

    text: str
    tokens: int
    finish: str
    repeats: bool


class NotANumber(ArithmeticError):
    """The model's logits were NaN. `position` is the prompt's place in its batch."""

    def __init__(self, position: int) -> None:
        super().__init__(f"NaN logits at prompt {position} of the batch")
        self.position = position


class Unfinished(ValueError):
    """A batch was interrupted. `done` has the finished answers by their place in it."""

    def __init__(self, reason: str, done: dict[int, Answer]) -> None:
        super().__init__(reason)
        self.done = done


def turn_of(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """Returns what ends an answer: the template's end of a turn, and the model's own end tokens."""
    return end_of_turn(tokenizer, inner_model(model).generation_config.eos_token_id)


class Generator:
    """Generates with one model. The model's own sampling defaults do not apply.

    On a GPU a step is captured and replayed where the model allows it, unless `capture` is false.
    Elsewhere, with `static_rows`, every batch has that many rows and a key-value cache of fixed
    shape, so that transformers compiles the decoding step on a GPU. Compiling takes half a minute
    per model. Without it, and where steps are captured, rows that have ended leave a greedy batch.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        static_rows: int | None = None,
        capture: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.captures = capture and can_capture(model)
        self.static_rows = None if self.captures else static_rows
        self._steps: CapturedSteps | None = None
        inner, self.turn = inner_model(model), turn_of(model, tokenizer)
        self.pad = pad_id(tokenizer)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        inner.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=self.turn.end_tokens,
            pad_token_id=self.pad,
            cache_implementation="static" if static_rows else None,
            **(drawn if sampling.temperature > 0 else {}),
        )

    @property
    def decoding(self) -> str:
        """How steps run: captured, compiled or plain."""
        return "captured" if self.captures else "compiled" if self.static_rows else "plain"

    def answers(self, prompts: Sequence[list[int]], seed: int = 0) -> list[Answer]:
        """Returns one answer to each prompt (token ids), all from one batch.

        `seed` is added to the seed of the sampling. Raises NotANumber where logits are NaN.
        """
        return [self._answer(new) for new in self.token_ids(prompts, seed)]

    @torch.no_grad()
    def token_ids(self, prompts: Sequence[list[int]], seed: int = 0) -> list[list[int]]:
        """Returns the token ids that each prompt is continued with, what ends it included.

        What an end token is followed by is of no meaning.
        """
        filled = [*prompts, *[prompts[-1]] * ((self.static_rows or 0) - len(prompts))]
        ids, mask = left_padded(filled, self.pad, self.model.device)
        torch.manual_seed(self.sampling.seed + seed)
        try:
            continued = self._replayed if self.captures else self._continued
            return continued(ids, mask)[: len(prompts)]
        except NotCaptured as error:
            logger.warning(f"the decoding step is not captured, so answers are slower: {error}")
            self.captures, self._steps = False, None
            return self.token_ids(prompts, seed)

    def _continued(self, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Returns the token ids that each row [rows, width] is continued with.

        A row that has ended is no longer computed, where rows can leave a batch.
        """
        width, most = ids.shape[1], self.sampling.max_new_tokens
        rows, found, kept = list(range(len(ids))), {}, {}
        while rows:
            done = ids.shape[1] - width
            step = min(_LEAVE_EVERY, most - done) if self._rows_leave() else most
            broken = _NanWatch()
            next_turn = _NextTurn(self.tokenizer, self.turn.stop_strings, width)
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=step,
                logits_processor=LogitsProcessorList([broken]),
                stopping_criteria=StoppingCriteriaList([next_turn]),
                return_dict_in_generate=True,
                **kept,
            )
            if broken.rows is not None and broken.rows.any():
                raise NotANumber(rows[int(broken.rows.int().argmax())])
            ids, new = made.sequences, made.sequences[:, width:].tolist()
            full = step == most - done
            ended = [full or self._answer(one).finish == "stop" for one in new]
            ended = [one or at_stop for one, at_stop in zip(ended, next_turn.ended(), strict=True)]
            found |= {row: one for row, one, end in zip(rows, new, ended, strict=True) if end}
            stay = [place for place, end in enumerate(ended) if not end]
            rows = [rows[place] for place in stay]
            if rows:
                grown = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
                places = torch.tensor(stay, device=ids.device)
                ids, mask = ids[places], torch.cat([mask, grown], dim=1)[places]
                made.past_key_values.batch_select_indices(places)
                kept = {"past_key_values": made.past_key_values}
        return [found[row] for row in sorted(found)]

    def _replayed(self, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Returns what `_continued` does, by captured steps."""
        width, most = ids.shape[1], self.sampling.max_new_tokens
        if self._steps is None or not self._steps.fits(len(ids), width + most):
            self._steps = None  # its memory is needed
            self._steps = CapturedSteps(self.model, len(ids), width + most, self._chosen)
        steps, look = self._steps, _CHECK_EVERY if self.turn.stop_strings else _LEAVE_EVERY
        steps.start(ids, mask)
        rows, found, done = list(range(len(ids))), {}, 1
        while rows:
            turn = min(look - done % look, most - done)
            steps.advance(turn)
            done += turn
            broken = steps.nan[: len(rows)]
            if broken.any():
                raise NotANumber(rows[int(broken.int().argmax())])
            new = steps.ids[: len(rows), width : width + done].tolist()
            ended = [done == most or self._answer(one).finish == "stop" for one in new]
            if self.sampling.temperature > 0 and not all(ended):
                continue  # drawn tokens depend on the rows beside them
            found |= {row: one for row, one, end in zip(rows, new, ended, strict=True) if end}
            stay = [place for place, end in enumerate(ended) if not end]
            rows = [rows[place] for place in stay]
            if rows and len(stay) < len(ended):
                steps.keep(stay)
        return [found[row] for row in sorted(found)]

    def _chosen(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the next token of each row [rows] by the logits [rows, vocabulary]."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        logits = TemperatureLogitsWarper(self.sampling.temperature)(ids, logits)
        if self.sampling.top_p < 1:
            logits = TopPLogitsWarper(self.sampling.top_p)(ids, logits)
        return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]

    def _rows_leave(self) -> bool:
        """Returns whether rows can leave a batch: the others must go on as they would have.

        Drawn tokens depend on the rows beside them. A cache of fixed shape keeps its rows, and
        only full attention's is known to lose some rightly.
        """
        plain = only_full_attention(inner_model(self.model))
        return plain and self.static_rows is None and self.sampling.temperature == 0

    def _answer(self, new: list[int]) -> Answer:
        ends = [
            position
            for position, token in enumerate(new)
            if token in (*self.turn.end_tokens, self.pad)
        ]
        kept = new[: ends[0]] if ends else new
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in self.turn.stop_strings if stop in text]
        finish = "stop" if ends or cuts else "length"
        text = text[: min(cuts)] if cuts else text
        return Answer(text.strip(), len(kept), finish, repeats_itself(kept))


def rows_worth_compiling(
    model: PeftModel | PreTrainedModel, prompts: int, batch_size: int
) -> int | None:
    """Returns the fixed rows of a batch where there are enough prompts for compiling to pay.

    That is on a GPU alone; None elsewhere.
    """
    many = prompts > BATCHES_WORTH_COMPILING * batch_size
    return batch_size if many and model.device.type == "cuda" else None


def repeats_itself(ids: Sequence[int]) -> bool:
    """Returns whether at most a tenth of an answer's tokens are distinct."""
    return len(ids) >= 10 * len(set(ids)) > 0


def left_padded(
    prompts: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns prompts filled up on the left, and their mask, [prompts, longest] each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


class _NextTurn(StoppingCriteria):
    """Ends a row whose last tokens spell a stop string.

    It looks every few tokens. The text beyond the stop string is cut off afterwards.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: list[str], width: int
    ) -> None:
        self.tokenizer, self.stop_strings, self.width = tokenizer, stop_strings, width
        self.window = max((len(stop.encode()) for stop in stop_strings), default=0) + _CHECK_EVERY
        self.done: torch.Tensor | None = None  # [rows], at the last token

    def ended(self) -> list[bool]:
        """Returns of each row whether its last token ended it."""
        assert self.done is not None
        return self.done.tolist()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        drawn = input_ids.shape[1] - self.width
        if self.stop_strings and drawn % _CHECK_EVERY == 0:
            texts = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.window :])
            hits = [any(stop in text for stop in self.stop_strings) for text in texts]
            done |= torch.tensor(hits, device=done.device)
        self.done = done
        return done


class _NanWatch(LogitsProcessor):
    """Remembers which rows [rows] had NaN logits, without synchronizing at each token."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        now = scores.isnan().any(dim=-1)
        self.rows = now if self.rows is None else self.rows | now
        return scores


def longest_prompt(config: PreTrainedConfig, sampling: Sampling) -> int:
    """Returns the most tokens of a prompt whose answer still fits the model's positions."""
    return config.get_text_config().max_position_embeddings - sampling.max_new_tokens


def generation_facts(sampling: Sampling, turn: TurnEnd) -> dict[str, Any]:
    """Returns the generation settings for the records."""
    return asdict(sampling) | {"end_tokens": turn.end_tokens, "stop_strings": turn.stop_strings}
