"""Is the answer with its end in the loss, and nothing else? Probes and real rows are looked at."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sftlab.data.batch_encoder import common_prefix
from sftlab.data.chat_template import encode, end_of_turn
from sftlab.data.row_notes import THOUGHTS, THOUGHTS_END
from sftlab.data.template_errors import (
    LIMIT_S,
    TEMPLATE_ERRORS,
    reason,
    rendering_limit,
)
from sftlab.data.template_facts import ANSWER, PROBES, THOUGHTFUL
from sftlab.data.time_limit import TooSlow, time_limit

# real rows that are looked at
ROWS_LOOKED_AT = 32
# shorter questions may stand in a header by chance
SHORT = 7
WHAT_TO_DO = "give another template with --chat_template_path"
_LEAVE_OUT = f"leave the row out or {WHAT_TO_DO}"


class Finding(NamedTuple):
    """What a template does that it should not. `unsound` ones are not trained on."""

    kind: str
    sentence: str
    unsound: bool


def look_at_loss(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    rows_with: Collection[str],
    ends: int | list[int] | None = None,
) -> list[str]:
    """Render probes and the first rows. Returns a warning for each thing that the template does.

    `rows_with` says which probes matter (`row_notes`), `ends` are the model's end tokens. Raises
    ValueError where something else than answers is in the loss, and for a row that the template
    refuses.
    """
    found: dict[str, Finding] = {}
    end_tokens = _end_tokens(tokenizer, ends)
    for name, before in PROBES.items():
        if name in rows_with or name == "a question":
            _look(tokenizer, before, ANSWER, end_tokens, found)
    if THOUGHTS in rows_with:
        _look(tokenizer, PROBES["a question"], THOUGHTFUL, end_tokens, found)
    for number, row in enumerate(rows):
        try:
            answer = row["completion"][0]["content"]
            _look(tokenizer, row["prompt"], answer, end_tokens, found, real=True)
        except TooSlow as error:
            raise ValueError(f"training row {number}: {error}; {_LEAVE_OUT}") from error
        except TEMPLATE_ERRORS as error:
            raise ValueError(_refusal(f"training row {number}", error)) from error
    for finding in found.values():
        if finding.unsound:
            raise ValueError(f"{finding.sentence}: {WHAT_TO_DO}")
    return [finding.sentence for finding in found.values()]


def _end_tokens(tokenizer: PreTrainedTokenizerBase, ends: int | list[int] | None) -> set[int]:
    try:
        return set(end_of_turn(tokenizer, ends).end_tokens)
    except TEMPLATE_ERRORS:
        given = [ends] if isinstance(ends, int) else ends or []
        return {tokenizer.eos_token_id, *given}


def _look(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, str]],
    answer: str,
    ends: set[int],
    found: dict[str, Finding],
    real: bool = False,
) -> None:
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
    try:
        with time_limit(LIMIT_S, "rendering a row with the chat template"):
            asked = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
            whole = tokenizer.apply_chat_template(prompt + row["completion"], tokenize=False)
    except TEMPLATE_ERRORS:
        if real:
            raise
        return  # whether a real row is refused is found out row by row
    encoded = encode(tokenizer, row, None)
    ids = [i for i in encoded["labels"] if i != -100]
    for finding in _findings(tokenizer, prompt, answer, asked, whole, ids, ends):
        found.setdefault(finding.kind, finding)


def _findings(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, str]],
    answer: str,
    asked: str,
    whole: str,
    ids: list[int],
    ends: set[int],
) -> Iterable[Finding]:
    same = common_prefix(asked, whole)
    loss, said = whole[same:], answer.strip()
    visible = said.rpartition(THOUGHTS_END)[2].strip()
    before, there, after = loss.rpartition(said)
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
    words = [m["content"].strip() for m in prompt if m["role"] in ("user", "system")]
    if any(len(word) > SHORT and word in before for word in words):
        yield Finding(
            "question",
            "the chat template writes prompts otherwise once they are answered, which puts the "
            "question into the loss",
            True,
        )
    elif before.strip():
        yield Finding("before", f"the chat template puts {before!r:.60} into the loss", False)
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
    yield from _end_findings(tokenizer, after, ids, ends)


def _end_findings(
    tokenizer: PreTrainedTokenizerBase, after: str, ids: list[int], ends: set[int]
) -> Iterable[Finding]:
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
    number = 0
    try:
        with rendering_limit("it"):
            for number, row in enumerate(rows):
                _render(tokenizer, row, f"{split} row {number}")
    except TooSlow as error:
        raise ValueError(f"{split} row {number}: {error}; {_LEAVE_OUT}") from error


def _render(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], name: str) -> None:
    try:
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    except TEMPLATE_ERRORS as error:
        raise ValueError(_refusal(name, error)) from error


def _refusal(row: str, error: Exception) -> str:
    return f"{row}: the chat template refuses it: {reason(error)}; {_LEAVE_OUT}"
