"""Encode conversations in batches: token ids, and which of them are in the loss.

A conversation is one sequence where its template allows it: what is rendered up to an answer must
be the beginning of the whole, in text and in ids. Then loss and gradients are those of a row for
each answer. Where a template rewrites earlier turns, a conversation is a sequence for each answer.

An answer begins where the whole leaves the prompt with its generation prompt, as in trl. A template
with `{% generation %}` says within that what is in the loss. The tokenizer's backend encodes a
batch in one call, and `token_cuts` finds where texts may be cut, so that no part is encoded twice.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

from tokenizers import Encoding, Tokenizer

from sftlab.data.messages import Conversation
from sftlab.data.rendering import Rendered, Renderer
from sftlab.data.token_cuts import TurnEnds, common_prefix, cut_in
from sftlab.data.token_sequence import TokenSequence

# Characters per call of the backend, which needs about 100 bytes per token while it encodes.
CHARACTERS_AT_ONCE = 1_000_000


def marks_pattern(special: Sequence[str]) -> str:
    """Returns a pattern that finds the text of special tokens in JSON; '' for none."""
    written = (json.dumps(token, ensure_ascii=False)[1:-1] for token in special)
    return "|".join(map(re.escape, written))


# texts to encode, and what makes a sequence of them: None where they are no beginnings of the whole
_Plan = tuple[list[str], Callable[[list[Encoding]], TokenSequence | None]]


class Encoder:
    """Encodes conversations with one template.

    `template` and `special_tokens` are those of the Hugging Face tokenizer. `shortcut=False`
    encodes every prompt on its own, as trl does. The ids are the same. `offsets=False` says that
    the backend does not know where its tokens stand in the text.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str,
        special_tokens: Mapping[str, Any],
        shortcut: bool = True,
        offsets: bool = True,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._end = backend.token_to_id(str(special_tokens["eos_token"]))
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        pattern = marks_pattern(special)
        # what the backend reads as a control token wherever it stands, in messages as JSON
        self.marks = re.compile(pattern) if pattern else None
        self.render = Renderer(template, special_tokens, marked=offsets)
        ending = self.render.ending if shortcut else ""
        cut = cut_in(backend, ending) if ending else None
        self._ending, self._tail = (ending, ending[cut:]) if cut is not None else (None, "")
        self._tail_ids = self._encode([self._tail])[0] if self._tail else []
        self._may_cut = TurnEnds(backend) if shortcut else lambda text, place: False

    def __call__(self, conversations: Sequence[Conversation]) -> Iterator[list[TokenSequence]]:
        """Yield for each conversation its sequences, not truncated: one, or one for each answer.

        A document is one sequence, which divides.
        """
        for plain, alike in groupby(conversations, key=lambda one: one.is_document):
            encode = self._documents if plain else self._chats
            yield from encode(list(alike))

    def _documents(self, documents: list[Conversation]) -> Iterator[list[TokenSequence]]:
        texts = [one.messages[0]["content"] for one in documents]
        for one in self._backend.encode_batch_fast(texts, add_special_tokens=True):
            ended = one.ids if one.ids[-1:] == [self._end] else [*one.ids, self._end]
            yield [TokenSequence(ended, [0, len(ended)], divides=True)]

    def _chats(self, conversations: list[Conversation]) -> Iterator[list[TokenSequence]]:
        rendered = self.render(conversations)
        start = size = 0
        for end, one in enumerate(rendered, start=1):
            size += len(one.wholes[-1])
            if size >= CHARACTERS_AT_ONCE or end == len(rendered):
                yield from self._sequences(rendered[start:end])
                start, size = end, 0

    def refuse(self, conversations: Sequence[Conversation]) -> None:
        """Render conversations without encoding them. Raises what the template raises."""
        self.render([one for one in conversations if not one.is_document])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _sequences(self, rendered: list[Rendered]) -> Iterator[list[TokenSequence]]:
        parts = [[one] if one.is_one() else one.answers() for one in rendered]
        made = iter(self._planned(list(chain.from_iterable(parts))))
        found = [list(islice(made, len(part))) for part in parts]
        again = [n for n, sequences in enumerate(found) if None in sequences]
        retried = [rendered[number].answers() for number in again]
        made = iter(self._planned(list(chain.from_iterable(retried))))
        for number, part in zip(again, retried, strict=True):
            found[number] = list(islice(made, len(part)))
        yield from found

    def _planned(self, rendered: list[Rendered]) -> Iterator[TokenSequence | None]:
        """Yield the sequence of each, None where its answers are no beginnings of the whole."""
        plans = [self._plan(one) for one in rendered]
        texts = [text for these, _ in plans for text in these]
        # offsets of tokens, which take time, say where generated text is
        encode = (
            self._backend.encode_batch if self.render.marked else self._backend.encode_batch_fast
        )
        encoded = iter(encode(texts, add_special_tokens=False))
        for these, make in plans:
            yield make(list(islice(encoded, len(these))))

    def _plan(self, one: Rendered) -> _Plan:
        whole = one.wholes[-1]
        if one.generated is not None:
            unsure = [w for w in one.wholes[:-1] if not self._may_cut(whole, len(w))]
            return [*unsure, whole], partial(_generated, one)
        cuts = [len(prompt) - len(self._tail) for prompt in one.prompts]
        ends = [len(whole) for whole in one.wholes]
        joined = self._ending is not None and all(
            prompt.endswith(self._ending) and whole.startswith(prompt)
            for prompt, whole in zip(one.prompts, one.wholes, strict=True)
        )
        if not joined or any(cut < end for cut, end in zip(cuts[1:], ends, strict=False)):
            return [*one.prompts, *one.wholes], _compared
        return self._cut_plan(whole, cuts, ends)

    def _cut_plan(self, whole: str, cuts: list[int], ends: list[int]) -> _Plan:
        """Cut a text before and behind its answers.

        Where it may not be cut behind one, the answer is encoded alone and with what follows it.
        """
        texts, safe = [whole[: cuts[0]]], []
        for cut, end, following in zip(cuts, ends[:-1], cuts[1:], strict=False):
            safe.append(self._may_cut(whole, end))
            texts += [whole[cut:end], whole[end if safe[-1] else cut : following]]
        return [*texts, whole[cuts[-1] :]], partial(_joined, self._tail_ids, safe)


def _joined(tail: list[int], safe: list[bool], encoded: list[Encoding]) -> TokenSequence | None:
    """Join a text that was cut. `tail` are the ids of the prompts' end, behind each cut."""
    ids, spans = list(encoded[0].ids), []
    for number, answer in enumerate(encoded[1::2]):
        head = common_prefix(tail, answer.ids)
        _add(spans, len(ids) + head, len(answer.ids) - head)
        if number == len(safe):
            ids += answer.ids
            continue
        following = encoded[2 + 2 * number].ids
        if safe[number]:
            ids += answer.ids
        elif following[: len(answer.ids)] != answer.ids:
            return None
        ids += following
    return TokenSequence(ids, spans)


def _compared(encoded: list[Encoding]) -> TokenSequence | None:
    """Compare prompts and texts up to each answer, all encoded on their own."""
    half = len(encoded) // 2
    ids, spans = encoded[-1].ids, []
    for prompt, whole in zip(encoded[:half], encoded[half:], strict=True):
        start = common_prefix(prompt.ids, whole.ids)
        behind = sum(spans[-2:])
        if start < behind or ids[: len(whole.ids)] != whole.ids:
            return None
        _add(spans, start, len(whole.ids) - start)
    return TokenSequence(ids, spans)


def _generated(one: Rendered, encoded: list[Encoding]) -> TokenSequence | None:
    """Take the tokens that the template marks as generated, behind each answer's prompt."""
    whole, spans = encoded[-1], []
    if any(whole.ids[: len(part.ids)] != part.ids for part in encoded[:-1]):
        return None
    behind = 0
    for prompt, text in zip(one.prompts, one.wholes, strict=True):
        first = len(prompt) if text.startswith(prompt) else common_prefix(prompt, text)
        first, behind = max(first, behind), len(text)
        for start, end in one.generated[-1]:
            begin, end = max(start, first), min(end, len(text))
            token = whole.char_to_token(begin) if begin < end else None
            if token is not None:
                last = whole.char_to_token(end - 1)
                _add(spans, token, (len(whole.ids) if last is None else last + 1) - token)
    return TokenSequence(whole.ids, spans)


def _add(spans: list[int], start: int, length: int) -> None:
    if length > 0:
        spans += [start, length]
