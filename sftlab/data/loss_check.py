"""Is the answer with its end in the loss, and nothing else? Probes and real rows are looked at."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sftlab.data.batch_encoder import Encoder
from sftlab.data.chat_template import encoder_of, end_of_turn
from sftlab.data.messages import Conversation, Message
from sftlab.data.rendering import marks_answers
from sftlab.data.row_notes import THOUGHTS, THOUGHTS_END
from sftlab.data.template_errors import (
    LIMIT_S,
    TEMPLATE_ERRORS,
    is_of_template,
    rendering_limit,
)
from sftlab.data.template_facts import ANSWER, PROBES, THOUGHTFUL
from sftlab.data.time_limit import TooSlow, time_limit
from sftlab.data.token_cuts import common_prefix
from sftlab.data.token_sequence import labels_of
from sftlab.exit_messages import first_line

# real conversations that are looked at, and answers of each
ROWS_LOOKED_AT = 32
ANSWERS_LOOKED_AT = 4
# shorter questions may stand in a header by chance
SHORT = 7
# fields of an answer that hold its thoughts
REASONING = ("reasoning_content", "reasoning", "thinking")
WHAT_TO_DO = "give another template with --chat_template_path"
_LEAVE_OUT = f"leave the row out or {WHAT_TO_DO}"


class Finding(NamedTuple):
    """What a template does that it should not. `unsound` ones are not trained on."""

    kind: str
    sentence: str
    unsound: bool


MOVED = Finding(
    "moved",
    "the chat template renders a prompt differently once an answer follows; each answer is "
    "trained after the prompt as it is rendered when the model is asked",
    False,
)


def look_at_loss(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Conversation],
    rows_with: Collection[str],
    ends: int | list[int] | None = None,
) -> list[str]:
    """Render probes and the first rows. Returns a warning for each thing that the template does.

    `rows_with` says which probes matter (`row_notes`), `ends` are the model's end tokens. Raises
    ValueError where something else than answers is in the loss, and for a row that the template
    refuses. Documents have no template to look at.
    """
    rows = list(rows)
    if rows and all(row.is_document for row in rows):
        return []
    found: dict[str, Finding] = {}
    encoder, end_tokens = encoder_of(tokenizer, shortcut=False), end_tokens_of(tokenizer, ends)
    for probe in _probes(rows_with):
        try:
            _look(tokenizer, encoder, probe, end_tokens, found)
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            continue  # whether a real row is refused is found out row by row
    for number, row in enumerate(rows):
        if row.is_document:
            continue
        try:
            for answer in row.answers[:ANSWERS_LOOKED_AT]:
                _look(tokenizer, encoder, row.turn(answer), end_tokens, found)
        except TooSlow as error:
            raise ValueError(f"training row {number}: {error}; {_LEAVE_OUT}") from error
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            raise ValueError(_refusal(f"training row {number}", error)) from error
    for finding in found.values():
        if finding.unsound:
            raise ValueError(f"{finding.sentence}: {WHAT_TO_DO}")
    return [finding.sentence for finding in found.values()]


def _probes(rows_with: Collection[str]) -> list[Conversation]:
    """Returns made-up conversations with the parts that rows have."""
    probes = [before for n, before in PROBES.items() if n in rows_with or n == "a question"]
    answered = [(before, ANSWER) for before in probes]
    if THOUGHTS in rows_with:
        answered.append((PROBES["a question"], THOUGHTFUL))
    return [
        Conversation([*before, {"role": "assistant", "content": answer}], [len(before)], [])
        for before, answer in answered
    ]


def end_tokens_of(tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None) -> set[int]:
    """Returns the tokens that may end an answer. `ends` are the model's own."""
    try:
        return set(end_of_turn(tokenizer, ends).end_tokens)
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        given = [ends] if isinstance(ends, int) else ends or []
        return {tokenizer.eos_token_id, *given}


def _look(
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    turn: Conversation,
    ends: set[int],
    found: dict[str, Finding],
) -> None:
    with time_limit(LIMIT_S, "rendering a row with the chat template"):
        asked, whole = encoder.render.text_of(turn)
        moved = not encoder.render.is_as_written(turn, whole)
    ((made,),) = encoder([turn])
    ids = [i for i in labels_of(made.ids, made.spans) if i != -100]
    if moved:
        found.setdefault("moved", MOVED)
    for finding in _findings(tokenizer, turn, asked, whole, ids, ends):
        found.setdefault(finding.kind, finding)


def _findings(
    tokenizer: PreTrainedTokenizerBase,
    turn: Conversation,
    asked: str,
    whole: str,
    ids: list[int],
    ends: set[int],
) -> Iterator[Finding]:
    prompt, message = turn.messages[:-1], turn.messages[-1]
    same = common_prefix(asked, whole)
    # a template that marks what is generated leaves the rest out of the loss
    loss = tokenizer.decode(ids) if marks_answers(tokenizer.get_chat_template()) else whole[same:]
    if message.get("tool_calls"):
        yield from _call_findings(tokenizer, message, loss, ids, ends)
    else:
        yield from _answer_findings(tokenizer, prompt, message, loss, ids, ends)
    yield from _prompt_findings(prompt, asked, whole, same)


def _call_findings(
    tokenizer: PreTrainedTokenizerBase,
    message: Message,
    loss: str,
    ids: list[int],
    ends: set[int],
) -> Iterator[Finding]:
    names = [call["function"]["name"] for call in message["tool_calls"]]
    if not all(name in loss for name in names):
        yield Finding("calls", "the chat template does not write tool calls", False)
    said = message["content"].strip()
    if said and said not in loss:
        yield Finding("said", "the chat template leaves out what answers say beside calls", False)
    marks = [mark for end in ends if (mark := tokenizer.decode([end])) in loss]
    last = max((loss.rindex(mark) for mark in marks), default=0)
    yield from _end_findings(tokenizer, loss[last:], ids, ends)


def _answer_findings(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    message: Message,
    loss: str,
    ids: list[int],
    ends: set[int],
) -> Iterator[Finding]:
    said = message["content"].strip()
    visible = said.rpartition(THOUGHTS_END)[2].strip()
    # a short answer may be a part of its end token's name
    end = _trailing_ends(tokenizer, loss, ends)
    if visible in loss.removesuffix(end):
        loss = loss.removesuffix(end)
    else:
        end = ""
    before, there, after = loss.rpartition(said)
    if loss.lstrip().startswith(said):
        before, after = "", loss.lstrip().removeprefix(said)
    if not there and THOUGHTS_END in said:
        thoughts = said.partition(THOUGHTS_END)[0].rpartition("<think>")[2].strip()
        if thoughts and thoughts in loss:
            before, there, after = "", "x", loss.rpartition(visible)[2] if visible else loss
        elif not visible or visible in loss:
            yield Finding(
                "thoughts",
                "the chat template drops the thoughts of answers (all up to </think>), so they are "
                "not trained on",
                False,
            )
            before, there, after = loss.rpartition(visible) if visible else ("", "x", loss)
    if not there:
        yield Finding(
            "answer", f"the chat template does not write the answer {said!r:.60} as it is", True
        )
        return
    reasoning = [message[name].strip() for name in REASONING if message.get(name)]
    if any(text in before for text in reasoning):
        before = ""
    words = [m["content"].strip() for m in prompt if m["role"] in ("user", "system")]
    if any(len(word) > SHORT and (word in before or word in after) for word in words):
        yield Finding(
            "question",
            "the chat template writes prompts otherwise once they are answered, which puts the "
            "question into the loss",
            True,
        )
    elif before.strip():
        yield Finding("before", f"the chat template puts {before!r:.60} into the loss", False)
    yield from _end_findings(tokenizer, after + end, ids, ends)


def _trailing_ends(tokenizer: PreTrainedTokenizerBase, loss: str, ends: set[int]) -> str:
    """Returns the end tokens, with blanks, that a text ends with; '' without any."""
    marks = [mark for end in ends if (mark := tokenizer.decode([end]))]
    rest = loss
    while mark := next((one for one in marks if rest.rstrip().endswith(one)), ""):
        rest = rest.rstrip().removesuffix(mark)
    return loss[len(rest) :]


def _prompt_findings(prompt: list[Message], asked: str, whole: str, same: int) -> Iterator[Finding]:
    if not asked.startswith(whole[:same]) or same < len(asked.rstrip()):
        yield Finding(
            "prompt",
            f"the chat template ends prompts with {asked[same:]!r:.60} only where an answer is "
            "asked for, and not in the rows that are trained on",
            False,
        )
    system = [m["content"].strip() for m in prompt if m["role"] == "system"]
    if any(word and word not in whole for word in system):
        yield Finding("system", "the chat template leaves system prompts out", False)
    earlier = [m["content"].rpartition(THOUGHTS_END)[2] for m in prompt if m["role"] == "assistant"]
    if any(text.strip() not in whole for text in earlier):
        yield Finding("turns", "the chat template leaves earlier answers out", False)


def _end_findings(
    tokenizer: PreTrainedTokenizerBase, after: str, ids: list[int], ends: set[int]
) -> Iterator[Finding]:
    if not ends & set(ids):
        mark = f" ({after.strip()!r:.40} is no token of this tokenizer)" if after.strip() else ""
        yield Finding(
            "end",
            f"no end token is in the loss{mark}, so the model does not learn where to stop: give a "
            "template that ends answers with the tokenizer's eos_token, or set eos_token",
            False,
        )
        return
    for end in ends:
        after = after.replace(tokenizer.decode([end]), "")
    if after.strip():
        yield Finding(
            "after",
            f"the chat template writes {after.strip()!r:.60} after an answer's end, and it would "
            "be in the loss",
            True,
        )


def refuse_unrendered(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], split: str
) -> None:
    """Raise ValueError, with its number, for a row that the template refuses or never ends."""
    encoder, number = encoder_of(tokenizer, shortcut=False), 0
    try:
        with rendering_limit("it"):
            for number, row in enumerate(rows):
                _render(encoder, row, f"{split} row {number}")
    except TooSlow as error:
        raise ValueError(f"{split} row {number}: {error}; {_LEAVE_OUT}") from error


def _render(encoder: Encoder, row: Mapping[str, Any], name: str) -> None:
    try:
        encoder.refuse([Conversation.from_row(row)])
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        raise ValueError(_refusal(name, error)) from error


def _refusal(row: str, error: Exception) -> str:
    return f"{row}: the chat template refuses it: {first_line(error)}; {_LEAVE_OUT}"
