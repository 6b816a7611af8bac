"""The chat template, which training, evaluation, the app and the harness share."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sftlab.data.batch_encoder import Encoder
from sftlab.data.messages import Conversation, Message
from sftlab.data.token_sequence import labels_of
from sftlab.paths import ROOT

INSTRUCTION_TEMPLATE = ROOT / "recipes" / "templates" / "instruction.jinja"


def set_template(tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> str:
    """Give `tokenizer` its chat template. Returns where the template comes from.

    It is the file `path` if given, else the model's own, else the Instruction / Context / Response
    form. Raises ValueError where the file is missing, and where the tokenizer has no end token,
    because the model could not learn to stop.
    """
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end-of-sequence token: set eos_token in the recipe")
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"chat_template_path {path} not found: give a .jinja file")
        if not str(path).endswith((".jinja", ".j2")):
            raise ValueError(
                f"chat_template_path {path} is no .jinja file: rename it, because trl would "
                "read it as a model's name"
            )
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"chat_template_path {path} is not UTF-8 text (byte {error.start:,})"
            ) from error
        return str(path)
    if tokenizer.chat_template:
        return "the model's own"
    tokenizer.chat_template = INSTRUCTION_TEMPLATE.read_text(encoding="utf-8")
    return INSTRUCTION_TEMPLATE.name


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of the template's text (16 hexadecimal digits)."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """Returns the token ids of a conversation up to where the response begins."""
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


class _PythonBackend:
    """A tokenizer without a fast backend, with the methods of one that `Encoder` calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def no_truncation(self) -> None:
        """Do nothing: every call says it."""

    no_padding = no_truncation

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Returns the added tokens by their ids."""
        return self._tokenizer.added_tokens_decoder

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token."""
        return self._tokenizer.convert_tokens_to_ids(token)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        """Returns an object with `ids` for each text."""
        ids = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return [SimpleNamespace(ids=one) for one in ids]


def encoder_of(tokenizer: PreTrainedTokenizerBase, shortcut: bool = True) -> Encoder:
    """Returns the encoder of a tokenizer and its template.

    Without a fast backend nothing says where generated text is, so `{% generation %}` is not read.
    """
    fast = tokenizer.is_fast
    return Encoder(
        tokenizer.backend_tokenizer if fast else _PythonBackend(tokenizer),
        tokenizer.get_chat_template(),
        tokenizer.special_tokens_map,
        shortcut=shortcut and fast,
        offsets=fast,
    )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    max_length: int | None,
    truncation_mode: str = "keep_start",
) -> dict[str, list[int]]:
    """Returns `input_ids` and `labels` of a prompt/completion row, cut to `max_length` tokens.

    The row has the messages of `prompt`, one message of `completion`, and perhaps `tools`.
    `truncation_mode` is keep_start or keep_end, as in the recipe. Labels are -100 on the prompt.
    Both equal those of trl's SFTTrainer (`SFTTrainer._prepare_dataset`, trl 1.16), unless the
    template has `{% generation %}`.
    """
    messages = row["prompt"] + row["completion"]
    conversation = Conversation(messages, [len(row["prompt"])], row.get("tools") or [])
    (found,) = next(encoder_of(tokenizer, shortcut=False)([conversation]))
    kept = found.cut(max_length, truncation_mode)
    return {"input_ids": kept.ids, "labels": labels_of(kept.ids, kept.spans)}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that fills rows up: the pad token, or the end token where there is none."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


class TurnEnd(NamedTuple):
    """What ends an assistant's turn: token ids, and texts that begin the next turn."""

    end_tokens: list[int]
    stop_strings: list[str]


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, model_ends: int | list[int] | None = None
) -> TurnEnd:
    """Returns where an answer ends under the tokenizer's template.

    It ends at the tokenizer's end token, at `model_ends`, or at the head of the next turn. A head
    of plain text ('### Instruction:') is a stop string. Where a special token begins the head, that
    token is an end token, and the words behind it ('user') do not count.
    """
    ends = {
        tokenizer.eos_token_id,
        *([model_ends] if isinstance(model_ends, int) else model_ends or []),
    }
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    edges = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    question, answer = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
    asked = tokenizer.apply_chat_template([question], tokenize=False)
    dialogue = tokenizer.apply_chat_template([question, answer, question], tokenize=False)
    next_question = dialogue.partition(answer["content"])[2].partition(question["content"])[0]
    answer_begins = tokenizer.apply_chat_template(
        [question], tokenize=False, add_generation_prompt=True
    )
    stops = set()
    for head in (next_question, answer_begins.removeprefix(asked)):
        found = special & set(tokenizer(head, add_special_tokens=False)["input_ids"])
        ends |= found
        if found <= edges:
            for edge in edges & found:
                head = head.replace(tokenizer.decode([edge]), "")
            stops.add(head.strip())
    return TurnEnd(sorted(ends), sorted(stops - {""}))
