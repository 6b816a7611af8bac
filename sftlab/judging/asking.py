"""Prompts cut to a judge's context, and judgements that are asked for once and kept."""

from collections.abc import Callable, Mapping, Sequence

from sftlab.evaluation.answer_file import AnswerFile, digest, fill
from sftlab.evaluation.generation import BATCHES_WORTH_COMPILING, Answer
from sftlab.judging.judge_formats import Messages
from sftlab.judging.judges import Judge, LocalJudge
from sftlab.judging.verdict_parsing import NO_JUDGEMENT, Reading

CUT = "\n[... cut from the middle ...]\n"


def longest_fitting(
    judge: Judge, build: Callable[[Mapping[str, str]], Messages], texts: Mapping[str, str]
) -> tuple[Messages, int]:
    """Cut the longest of `texts` from the middle until the prompt fits the judge's context.

    `build` makes the prompt of the texts. Returns the prompt and the number of characters cut.
    Raises ValueError where the prompt is too long even with empty texts.
    """
    kept, room = dict(texts), judge.room
    halves = {name: (text, "") for name, text in texts.items()}
    while room is not None and (over := judge.size(build(kept)) - room) > 0:
        name = max(halves, key=lambda one: sum(map(len, halves[one])))
        head, tail = halves[name]
        keep = (len(head + tail) - max(over, 16)) // 2
        if keep < 0:
            empty = judge.size(build(dict.fromkeys(texts, "")))
            raise ValueError(
                f"the judge {judge.facts['judge']} has room for prompts of {room} tokens, and one "
                f"without its answers has {empty}: use a judge with a longer context"
            )
        whole = texts[name]
        halves[name] = whole[:keep], whole[len(whole) - keep :]
        kept[name] = CUT.join(halves[name])
    return build(kept), sum(len(texts[name]) - len("".join(halves[name])) for name in texts)


def ask(
    judge: Judge,
    prompts: Sequence[Messages],
    file: AnswerFile,
    size: int,
    title: str,
    read: Callable[[str, str], Reading] | None = None,
) -> list[Answer]:
    """Returns the judgements of `prompts`, in their order.

    The judge is asked only what `file` does not hold, the longest prompts first, `size` in a
    batch. Equal prompts are judged once. `read` reads a judgement's text and end. What a server
    answered that is no judgement is asked again: an empty text or an error may be gone.
    """
    keys = [digest(messages) for messages in prompts]
    by_key = dict(zip(keys, prompts, strict=True))
    if read and "server" in judge.facts:
        for key in by_key:
            kept = file.found.get(("judge", key))
            if kept and read(kept.text, kept.finish).why in NO_JUDGEMENT:
                del file.found["judge", key]
    missing = [key for key in by_key if ("judge", key) not in file.found]
    if isinstance(judge, LocalJudge):
        judge.many |= len(missing) > BATCHES_WORTH_COMPILING * size
    order = sorted(missing, key=lambda key: (-judge.size(by_key[key]), key))
    known = [key for key in by_key if ("judge", key) in file.found]
    rows = known + order
    fill(file, "judge", rows, [by_key[key] for key in rows], size, judge.answers, title)
    return [file.found["judge", key] for key in keys]
