"""The part of a judgement that speaks to the reader, without the judge's thinking."""

import re

# How models mark their thinking: where it begins, and where it ends. A tag counts at the beginning
# of a line or a sentence alone, since a judge may speak of a tag in an answer.
_TAG = r"(?:\w+[:_])?(?:think|thinking|thought|reasoning|reflection)|scratchpad|analysis"
_START = r"(?:^|[.!?])\s*"
_FINAL = r"<\|channel\|>\s*final\b[^\n]*?<\|message\|>"
_MARKS = (
    (rf"{_START}<({_TAG})\s*>", r"</{name}\s*>"),
    (rf"{_START}\[(THINK)\]", r"\[/{name}\]"),
    (rf"{_START}◁(think)▷", r"◁/{name}▷"),
    (r"<\|channel\|>\s*(analysis|commentary)\b", rf"<\|end\|>|{_FINAL}"),
    (r"<\|channel>\s*(thought)\b", r"<channel\|>"),
    (r"<unused94>\s*(thought)\b", r"<unused95>"),
    (r"<\|(begin_of_thought|START_THINKING)\|>", r"<\|(?:end_of_thought|END_THINKING)\|>"),
)
_OPENED = [(re.compile(begin, re.IGNORECASE | re.MULTILINE), end) for begin, end in _MARKS]
# An end without a beginning: the template of some models writes the beginning into the prompt.
_ENDS = re.compile(
    rf"</(?:{_TAG})\s*>|\[/THINK\]|◁/think▷|{_FINAL}|<channel\|>|<unused95>"
    r"|<\|(?:end_of_thought|END_THINKING)\|>",
    re.IGNORECASE,
)
# gpt-oss's channels, where a tokenizer has dropped their marks
_BARE_ANALYSIS = re.compile(r"analysis(?=[^\W\d_a-z]|[\"'“*(])")
_BARE_FINAL = re.compile(r"assistantfinal")
# marks of a turn's end that a server may leave in the text
_ENDINGS = re.compile(r"(?:\s*(?:</s>|<\|[\w ]{2,24}\|>|<end_of_turn>|<eos>))+\s*$")


def final_text(text: str) -> str | None:
    """Returns a judgement without its thinking, or None where it was cut off while thinking.

    Thinking is what stands between the marks of reasoning models: `<think>`, `[THINK]`, gpt-oss's
    channels. A verdict in it is a draft.
    """
    text = _ENDINGS.sub("", text)
    if (found := _BARE_ANALYSIS.match(text)) is not None:
        parts = _BARE_FINAL.split(text[found.end() :])
        return parts[-1].strip() if len(parts) > 1 else None
    ended = list(_ENDS.finditer(text))
    if ended:
        text = text[ended[-1].end() :]
    for begin, end in _OPENED:
        while (opened := begin.search(text)) is not None:
            closed = re.compile(end.format(name=re.escape(opened[1])), re.IGNORECASE)
            if (close := closed.search(text, opened.end())) is None:
                return None
            text = text[: opened.start()] + text[close.end() :]
    return text.strip()


def thinking_ended(text: str) -> bool:
    """Whether a text marks the end of its thinking.

    Without such a mark a text that was cut off may be thinking to its end: templates write the
    beginning into the prompt, and tokenizers drop marks that are special tokens.
    """
    return bool(_ENDS.search(text) or _BARE_FINAL.search(text))
