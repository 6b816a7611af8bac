"""A conversation with the models of a run: its prompt, what a page shows, what is saved."""

import html
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sftlab.chat.limits import message_text
from sftlab.runs.run_directory import SIDES, START

# who is asked; "both" are base and tuned
Answering = Literal["tuned", "start", "base", "both", "base and tuned", "start and tuned"]
PAIRS = {"both": SIDES, "base and tuned": SIDES, "start and tuned": (START, "tuned")}


@dataclass
class Turn:
    """One message and its answers. `order` names the answering sides from left to right."""

    message: str
    order: tuple[str, ...]
    blind: bool
    run: str
    settings: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    finished: dict[str, str | None] = field(default_factory=dict)
    first_token_s: float | None = None
    left_out: int = 0
    vote: str | None = None
    adapter: str | None = None  # the hash of the adapter that answered
    models: str | None = None  # the hash of base, adapter, tokenizer and template
    markdown: bool = False  # whether the page renders its answers, or shows them as written

    @property
    def hidden(self) -> bool:
        """Whether the page must not yet say which answer is whose."""
        return self.blind and len(self.order) > 1 and self.vote is None

    @property
    def goes_on(self) -> str:
        """Returns the side whose answer the conversation continues.

        It is the voted one, else tuned, or the left one while the page is blind.
        """
        if self.vote in self.order:
            return self.vote
        return "tuned" if "tuned" in self.order and not self.blind else self.order[0]

    def update(
        self, piece: Any, left_out: int, adapter: str | None = None, models: str | None = None
    ) -> None:
        """Take over the state of an answer, a `sftlab.chat.engine.Piece`.

        `left_out` is the number of old turns that did not fit the context, `adapter` the adapter's
        hash, `models` that of all that answered. An answer that was stopped before its first token
        leaves the turn without texts.
        """
        if not piece.first_token_s:
            return
        self.left_out, self.adapter, self.models = left_out, adapter, models
        self.texts, self.tokens, self.tokens_per_s = (
            dict(piece.texts),
            dict(piece.tokens),
            dict(piece.tokens_per_s),
        )
        self.finished, self.first_token_s = dict(piece.finished), piece.first_token_s

    def remark(self) -> str:
        """Returns a note on turns that the model did not get."""
        turns = "turn was" if self.left_out == 1 else f"{self.left_out} turns were"
        return (
            f"The oldest {turns} left out: the conversation is longer than the context."
            if self.left_out
            else ""
        )

    def footnote(self, side: str) -> str:
        """Returns whose answer it is, its tokens, tokens/s and how it ended.

        For a hidden answer only its letter is told.
        """
        if self.hidden:
            return f"answer {'AB'[self.order.index(side)]}"
        ended = {"length": "cut at max new tokens", "stopped": "stopped"}.get(
            self.finished.get(side) or ""
        )
        first = (
            f"first after {self.first_token_s:.2f} s" if self.first_token_s is not None else None
        )
        speed = f"{self.tokens_per_s.get(side, 0):.1f} tokens/s"
        parts = [
            side,
            f"{self.tokens.get(side, 0)} tokens",
            speed,
            first,
            f"seed {self.settings['seed']}",
            ended,
        ]
        return " · ".join(part for part in parts if part)


def new_turn(message: str, side: str, blind: bool, run: str, settings: dict[str, Any]) -> Turn:
    """Returns a turn without answers. A blind one has its sides in random order.

    Raises ValueError for an empty message and an unknown side.
    """
    order = list(sides(side))
    if blind:
        random.shuffle(order)
    return Turn(message_text(message), tuple(order), blind, run, settings)


def edited_message(edited: Any) -> tuple[int, str]:
    """Returns the place and the new text of gradio's EditData, which shows the text as HTML.

    Raises ValueError without them, and for an empty text.
    """
    place, value = getattr(edited, "index", None), getattr(edited, "value", None)
    place = place[0] if isinstance(place, list | tuple) and place else place
    if type(place) is not int or not isinstance(value, str):
        raise ValueError("an edit needs the place of a message and its new text")
    return place, message_text(html.unescape(value))


def history(turns: Sequence[Turn], system: str) -> list[dict[str, str]]:
    """Returns the messages up to the last turn's, as the chat template takes them."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns[:-1]:
        messages.append({"role": "user", "content": turn.message})
        messages.append({"role": "assistant", "content": turn.texts[turn.goes_on]})
    return [*messages, {"role": "user", "content": turns[-1].message}]


def inert(text: str) -> str:
    """Returns Markdown that shows a text's HTML instead of rendering it. Code stays as it is."""
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(
        part if i % 2 else re.sub(r"<(?=[/!?a-zA-Z])", "&lt;", part) for i, part in enumerate(parts)
    )


def as_written(text: str) -> str:
    """Returns HTML that shows a text as it was written. `html.unescape` gives the text again."""
    return re.sub(r"<(?=[/!?a-zA-Z])", "&lt;", re.sub(r"&(?=[#a-zA-Z])", "&amp;", text))


def column(turns: Sequence[Turn], place: int) -> list[dict[str, Any]]:
    """Returns the messages of the page's left (0) or right (1) column.

    Texts are HTML that shows what was written, or inert Markdown where the turn says `markdown`.
    """
    shown: list[dict[str, Any]] = []
    for turn in turns:
        side = turn.order[min(place, len(turn.order) - 1)]
        safe = inert if turn.markdown else as_written
        shown.append({"role": "user", "content": safe(turn.message)})
        if turn.texts:
            empty = turn.finished[side] and not turn.texts[side].strip()
            said = "(an empty answer)" if empty else safe(turn.texts[side])
            parts = [{"type": "text", "text": text} for text in (said or "…", turn.footnote(side))]
            shown.append({"role": "assistant", "content": parts})
    return shown


def saved(turns: Sequence[Turn], system: str) -> dict[str, Any]:
    """Returns a conversation as it is saved. Answers of a hidden turn are named A and B."""
    rows = []
    for turn in turns:
        row = asdict(turn)
        del row["markdown"]
        if turn.hidden:
            letters = dict(zip(turn.order, "AB", strict=True))
            row |= {
                key: {letters[s]: v for s, v in row[key].items()}
                for key in ("texts", "tokens", "finished")
            }
            row |= {"order": ["A", "B"], "tokens_per_s": None}
        rows.append(row)
    return {"system": system, "turns": rows}


def sides(choice: str) -> tuple[str, ...]:
    """Returns the sides that answer for the name of a model or of a pair (`PAIRS`).

    Raises ValueError for another name.
    """
    if isinstance(choice, str) and choice in PAIRS:
        return PAIRS[choice]
    if choice not in ("base", START, "tuned"):
        raise ValueError(
            f"side {str(choice)[:40]!r}: expected base, start, tuned, {', '.join(PAIRS)}"
        )
    return (choice,)


def choices(offered: Sequence[str]) -> list[str]:
    """Returns what a page offers to ask where a run's `offered` sides can answer."""
    pairs = [name for name, pair in PAIRS.items() if name != "both" and set(pair) <= set(offered)]
    return [*pairs, *reversed(offered)]
