"""Data sets in seven shapes become prompt/completion rows, and every row its split.

A row is `{"prompt": [message, ...], "completion": [assistant message]}` with messages `{"role", "content"}`: the
conversational prompt-completion format of trl, whose loss is on the completion alone. A conversation gives one row
for each of its assistant turns, with the turns before it as prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from sftlab.data.tokenized_dataset import SPLITS, is_tokenized, open_tokens

if TYPE_CHECKING:
    # workers that tokenize need no torch
    from sftlab.config.parser import DataArguments

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
Message = dict[str, str]
Turn = tuple[list[Message], str]


class Splits(NamedTuple):
    """The three splits (columns prompt and completion) and what is known of them, for run.json.

    Of a tokenized data set `tokens` is the manifest, and train has columns input_ids and prompt_length instead.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    test: Dataset
    facts: dict[str, Any]
    tokens: dict[str, Any] | None = None


def load_splits(args: "DataArguments", num_proc: int | None = None) -> Splits:
    """Load the data set that `args` names and split its rows by a hash of their prompts.

    Raises ValueError with one sentence for a missing file or data set, no access, unknown columns, an empty data set
    or split, a row that is not text, and tokens that were made of other rows or other splits than `args` says.
    """
    if is_tokenized(args.dataset_name):
        return Splits(*open_tokens(args))
    dataset, shape = read_source(args)
    convert = Converter(shape, tuple(args.split_fractions), args.dataset_name)
    facts = {"dataset": args.dataset_name, "shape": shape}
    if isinstance(dataset, IterableDataset):
        return _split_stream(dataset, convert, args, facts)
    rows_read = len(dataset)
    rows = dataset.map(
        convert, batched=True, with_indices=True, remove_columns=dataset.column_names, num_proc=num_proc,
        desc="Reading rows",
    )  # fmt: skip
    split_of = np.asarray(rows.with_format("numpy")["split"])
    facts |= {"rows_read": rows_read, "empty_responses_dropped": int((split_of < 0).sum())}
    parts = []
    for index, name in enumerate(SPLITS):
        part = rows.select(np.flatnonzero(split_of == index))
        usable = len(rows) - facts["empty_responses_dropped"]
        refuse_empty(len(part), name, args.dataset_name, args.split_fractions, usable)
        facts[name] = {"rows": len(part), "fingerprint": fingerprint(part["row_hash"])}
        parts.append(part.select_columns(["prompt", "completion"]))
    return Splits(*parts, facts)


def read_source(args: "DataArguments") -> tuple[Dataset | IterableDataset, str]:
    """The rows that `args` asks for, not converted yet, and their shape. A stream is not cut to its fraction."""
    dataset = _load(args)
    shape = args.dataset_shape or recognise_shape(_columns(dataset))
    _require_columns(dataset, shape)
    if isinstance(dataset, IterableDataset):
        return dataset, shape
    if len(dataset) == 0:
        raise ValueError(f"{args.dataset_name} is empty")
    return dataset.select(range(max(1, int(len(dataset) * args.dataset_fraction)))), shape


def fingerprint(row_hashes: Any) -> str:
    """SHA-256 over the hashes of the rows in their order (hexadecimal, 16 digits)."""
    digest = hashlib.sha256()
    for row_hash in row_hashes:
        digest.update(row_hash.encode())
    return digest.hexdigest()[:16]


def opening(prompt: list[Message]) -> str:
    """The first user message of a prompt, white space folded."""
    return " ".join(next((m["content"] for m in prompt if m["role"] == "user"), prompt[0]["content"]).split())


def opening_key(prompt: list[Message]) -> int:
    """64 bits of the opening's SHA-256."""
    return int.from_bytes(hashlib.sha256(opening(prompt).encode()).digest()[:8], "big")


def split_index(prompt: list[Message], fractions: tuple[float, ...]) -> int:
    """The split (0 train, 1 validation, 2 test) of a prompt.

    It depends on the opening alone: the same on every machine and for every subset, the same for duplicates, for all
    turns of a conversation and for one question under several system prompts.
    """
    position = opening_key(prompt) / 2**64
    return int(np.searchsorted(np.cumsum(fractions)[:2], position, side="right"))


def recognise_shape(columns: list[str]) -> str:
    """The shape whose columns are all there; ValueError lists what was found and what is known."""
    for shape, (needed, _, _) in SHAPES.items():
        if set(needed) <= set(columns):
            return shape
    known = "; ".join(f"{shape} ({', '.join(needed)})" for shape, (needed, _, _) in SHAPES.items())
    raise ValueError(f"the columns {', '.join(columns)} match no known shape; known are {known}")


class Converter:
    """Turns a batch of rows of one shape into prompt/completion rows; picklable, hashed by `datasets` for its cache."""

    def __init__(self, shape: str, fractions: tuple[float, ...], name: str | None) -> None:
        self.shape, self.fractions, self.name = shape, fractions, name

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"prompt": [], "completion": [], "split": [], "row_hash": []}
        needed, optional, turns = SHAPES[self.shape]
        columns = [c for c in (*needed, *optional) if c in batch]
        for offset, index in enumerate(indices):
            row = {column: batch[column][offset] for column in columns}
            try:
                pairs = list(turns(row))
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"row {index} of {self.name} ({self.shape}): {error}") from error
            for prompt, response in pairs:
                self._append(out, prompt, response)
        return out

    def _append(self, out: dict[str, list], prompt: list[Message], response: str) -> None:
        completion = [{"role": "assistant", "content": response}]
        text = json.dumps([prompt, completion], ensure_ascii=False, sort_keys=True)
        out["prompt"].append(prompt)
        out["completion"].append(completion)
        out["split"].append(split_index(prompt, self.fractions) if response.strip() else -1)
        out["row_hash"].append(hashlib.sha256(text.encode()).hexdigest()[:16])


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{column} is not text but {type(value).__name__} ({value!r:.60})")
    return value


def _single(user: str, response: str, system: str = "") -> Iterator[Turn]:
    if not user.strip():
        raise ValueError("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    yield [*messages, {"role": "user", "content": user}], response


def _with_context(instruction: str, context: str) -> str:
    # The heading is part of the message, so that it reads the same under every chat template.
    return f"{instruction}\n\n### Context:\n{context}" if context.strip() else instruction


def _conversation(messages: Any, first: int = 0) -> Iterator[Turn]:
    """The assistant's messages from number `first` on that follow a user's, each with what comes before it."""
    if not isinstance(messages, list):
        raise TypeError(f"a conversation must be a list of messages, got {type(messages).__name__}")
    history: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"message {number} has no role and content but is {message!r:.60}")
        name = _text(message, "from") or _text(message, "role")
        content = _text(message, "value") or _text(message, "content")
        if name not in _ROLES:
            raise ValueError(f"unknown role {name!r}: known are {', '.join(_ROLES)}")
        role = _ROLES[name]
        if number >= first and role == "assistant" and any(m["role"] == "user" for m in history):
            yield list(history), content
        if role != "assistant" or history:
            history.append({"role": role, "content": content})


def _prompt_completion(row: dict[str, Any]) -> Iterator[Turn]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        yield from _single(_text(row, "prompt"), _text(row, "completion"))
        return
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": _text(row, "prompt")}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    turns = list(_conversation([*before, *after], first=len(before)))
    if not turns:
        raise ValueError("the completion has no assistant's message that follows a user's")
    yield from turns


# shape: (columns it needs, columns it may have, row -> (prompt, response) pairs)
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], Iterator[Turn]]]] = {
    "openorca": (
        ("question", "response"),
        ("system_prompt",),
        lambda r: _single(_text(r, "question"), _text(r, "response"), _text(r, "system_prompt")),
    ),
    "dolly": (
        ("instruction", "response"),
        ("context",),
        lambda r: _single(_with_context(_text(r, "instruction"), _text(r, "context")), _text(r, "response")),
    ),
    "alpaca": (
        ("instruction", "output"),
        ("input",),
        lambda r: _single(_with_context(_text(r, "instruction"), _text(r, "input")), _text(r, "output")),
    ),
    "gsm8k": (("question", "answer"), (), lambda r: _single(_text(r, "question"), _text(r, "answer"))),
    "sharegpt": (("conversations",), (), lambda r: _conversation(r["conversations"])),
    "messages": (("messages",), (), lambda r: _conversation(r["messages"])),
    "prompt_completion": (("prompt", "completion"), (), _prompt_completion),
}


def _load(args: "DataArguments") -> Dataset | IterableDataset:
    name = str(args.dataset_name)
    path = Path(name)
    streaming = args.dataset_streaming
    try:
        if path.suffix in _READERS:
            if not path.is_file():
                raise ValueError(f"data file {name} not found (looked in {Path.cwd()})")
            if path.stat().st_size == 0:
                raise ValueError(f"{name} is empty")
            reader = _READERS[path.suffix]
            words = {"keep_default_na": False} if reader == "csv" else {}  # "None", "NA" and "null" are text
            return load_dataset(reader, data_files=name, split="train", streaming=streaming, **words)
        if path.is_file():
            raise ValueError(f"{name}: unknown file type {path.suffix!r}; known are {', '.join(_READERS)}")
        return load_dataset(name, args.dataset_config, split=args.dataset_train_split, streaming=streaming)
    except GatedRepoError as error:
        raise ValueError(f"{name} is gated: ask for access on its page, then log in with `hf auth login`") from error
    except DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name} is neither a local file ({', '.join(_READERS)}) nor on the hub under that name; "
            f"a private or gated one needs `hf auth login`"
        ) from error
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError) as error:
        raise ValueError(f"data set {name} is not here and the hub cannot be reached: {_first_line(error)}") from error
    except DatasetGenerationError as error:
        raise ValueError(f"{name} cannot be read: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the data set is empty")
    return list(first)


def _require_columns(dataset: Dataset | IterableDataset, shape: str) -> None:
    missing = set(SHAPES[shape][0]) - set(_columns(dataset))
    if missing:
        raise ValueError(
            f"shape {shape} needs the columns {', '.join(SHAPES[shape][0])}; found {', '.join(_columns(dataset))}"
        )


def refuse_empty(rows: int, split: str, dataset: str | None, fractions: list[float], total: int) -> None:
    """Raise ValueError for a split without rows that is wanted."""
    if rows == 0 and fractions[SPLITS.index(split)] > 0:
        raise ValueError(
            f"the {split} split of {dataset} is empty: {total} usable rows with split_fractions {fractions}; give more "
            f"rows or other fractions (0 for a split that is not wanted)"
        )


def _split_stream(dataset: IterableDataset, convert: Converter, args: "DataArguments", facts: dict[str, Any]) -> Splits:
    """Train stays a stream; validation and test are its first `streaming_eval_rows` rows each, held in memory.

    What is not known before the end of the stream (rows, dropped responses) is None in the facts.
    """
    if args.dataset_fraction < 1:
        splits = dataset.info.splits or {}
        if args.dataset_train_split not in splits:
            raise ValueError("dataset_fraction needs a data set whose number of rows is known; this stream's is not")
        dataset = dataset.take(int(splits[args.dataset_train_split].num_examples * args.dataset_fraction))
    rows = dataset.map(convert, batched=True, with_indices=True, remove_columns=_columns(dataset))
    parts = []
    for index, name in enumerate(SPLITS[1:], start=1):
        wanted = args.split_fractions[index] > 0
        kept = list(rows.filter(partial(_in_split, index)).take(args.streaming_eval_rows)) if wanted else []
        refuse_empty(len(kept), name, args.dataset_name, args.split_fractions, 0)
        facts[name] = {"rows": len(kept), "fingerprint": fingerprint(r["row_hash"] for r in kept)}
        columns = {c: [r[c] for r in kept] for c in ("prompt", "completion")}
        parts.append(Dataset.from_dict(columns))
    train = rows.filter(partial(_in_split, 0)).remove_columns(["split", "row_hash"])
    if next(iter(train), None) is None:
        refuse_empty(0, "train", args.dataset_name, args.split_fractions, 0)
    facts |= {"streaming": True, "empty_responses_dropped": None, "train": {"rows": None, "fingerprint": None}}
    return Splits(train, *parts, facts)


def _in_split(index: int, row: dict[str, Any]) -> bool:
    return row["split"] == index
