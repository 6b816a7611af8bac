"""Encode prompt/completion rows in batches, to the same ids and masks as trl.

trl encodes the prompt alone and then prompt and completion, row by row. Here the tokenizer's
backend encodes a batch in one call, and each prompt only once: `_cut` finds where the ids of two
parts may be joined.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer, models, normalizers
from transformers.utils.chat_template_utils import render_jinja_template

from sftlab.data.formats import Message

# Characters per call of the backend, which needs about 100 bytes per token while it encodes.
CHARACTERS_AT_ONCE = 1_000_000

# The pre-tokenizers of Llama 3 and Qwen 2. GPT-2's is built into the backend. In all three a match
# never goes on over a space behind a visible character, and never looks beyond that space.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
}


class Encoder:
    """Encodes rows with one template.

    `template` and `special_tokens` are those of the Hugging Face tokenizer. `shortcut=False`
    encodes every prompt on its own, as trl does. The ids are the same.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str,
        special_tokens: Mapping[str, Any],
        shortcut: bool = True,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        # what the backend reads as a control token wherever it stands
        self.marks = re.compile("|".join(map(re.escape, special))) if special else None
        self._render = partial(render_jinja_template, chat_template=template, **special_tokens)
        ending = self._constant_ending() if shortcut else ""
        cut = _cut(backend, ending)
        self._ending, self._tail = (ending, ending[cut:]) if cut is not None else (None, "")
        self._tail_ids = self._encode([self._tail])[0] if self._tail else []

    def __call__(
        self, prompts: Sequence[list[Message]], completions: Sequence[list[Message]]
    ) -> Iterator[tuple[list[int], int]]:
        """Yield for each row its token ids, not truncated, and how many belong to the prompt."""
        wholes = self._texts([p + c for p, c in zip(prompts, completions, strict=True)])
        alone = self._texts(prompts, add_generation_prompt=True)
        start = size = 0
        for end, text in enumerate(wholes, start=1):
            size += len(text)
            if size >= CHARACTERS_AT_ONCE or end == len(wholes):
                yield from self._joined(alone[start:end], wholes[start:end])
                start, size = end, 0

    def refuse(
        self, prompts: Sequence[list[Message]], completions: Sequence[list[Message]]
    ) -> None:
        """Render rows without encoding them. Raises what the template raises."""
        self._texts([p + c for p, c in zip(prompts, completions, strict=True)])
        self._texts(prompts, add_generation_prompt=True)

    def _texts(self, conversations: Sequence[list[Message]], **how: bool) -> list[str]:
        return self._render(conversations=conversations, **how)[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _joined(self, prompts: list[str], wholes: list[str]) -> Iterator[tuple[list[int], int]]:
        """Encode one slice of rows as pairs of texts.

        A pair is the text before and after the cut, or the prompt and the whole text.
        """
        pairs, at_cut = [], []
        for prompt, whole in zip(prompts, wholes, strict=True):
            joined = (
                self._ending is not None
                and prompt.endswith(self._ending)
                and whole.startswith(prompt)
            )
            cut = len(prompt) - len(self._tail)
            pairs += [whole[:cut], whole[cut:]] if joined else [prompt, whole]
            at_cut.append(joined)
        encoded = self._encode(pairs)
        for joined, first, second in zip(at_cut, encoded[::2], encoded[1::2], strict=True):
            if joined:
                yield first + second, len(first) + common_prefix(self._tail_ids, second)
            else:
                yield second, common_prefix(first, second)

    def _constant_ending(self) -> str:
        """Returns the text that every prompt ends with under this template, perhaps none."""
        asked = [[{"role": "user", "content": text}] for text in ("One", "Z")]
        one, two = self._texts(asked, add_generation_prompt=True)
        common = common_prefix(one[::-1], two[::-1])
        return one[len(one) - common :]


def common_prefix(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Returns the number of leading ids (or characters) that are equal."""
    return next(
        (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b),
        min(len(ids), len(others)),
    )


def _cut(backend: Tokenizer, ending: str) -> int | None:
    """Returns where in `ending` a text may be cut so that the parts' ids join to the whole's.

    One such place is before a special token, because the backend splits the text there first. For
    the pre-tokenizers named above another one is a space between two visible ASCII characters,
    because a word always ends there. Returns None where no place is known.
    """
    if backend.encode_special_tokens or not isinstance(backend.normalizer, normalizers.NFC | None):
        return None
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.single_word or token.lstrip or token.rstrip for token in added):
        return None
    raw = [token.content for token in added if not token.normalized]
    places = [
        ending.rfind(text)
        for text in raw
        if text in ending and not any(_overlaps(text, o) for o in raw)
    ]
    if _splits_at_blanks(backend) and not any(
        re.search(r"\S \S", token.content) for token in added
    ):
        places += [found.start() + 1 for found in re.finditer("(?=[!-~] [!-~])", ending)]
    return max(places, default=None)


def _overlaps(text: str, other: str) -> bool:
    """Whether `other` may be found at a place that overlaps an occurrence of `text`."""
    around = text in other and text != other
    return around or any(other.endswith(text[:size]) for size in range(1, len(text)))


def _splits_at_blanks(backend: Tokenizer) -> bool:
    if (
        not isinstance(backend.model, models.BPE)
        or backend.model.dropout
        or backend.pre_tokenizer is None
    ):
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if [part["type"] for part in parts] == ["ByteLevel"]:
        return parts[0]["use_regex"] and not parts[0]["add_prefix_space"]
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, byte_level = parts
    known = (
        split["pattern"].get("Regex") in _SPLITS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )
    return known and not byte_level["use_regex"] and not byte_level["add_prefix_space"]
