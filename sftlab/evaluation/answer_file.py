"""Answers on disk, kept batch by batch as they are generated."""

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sftlab.evaluation.generation import Answer, NotANumber, Unfinished
from sftlab.evaluation.processes import ALONE, Processes
from sftlab.schema import read_content


class AnswerFile:
    """A file with one line per batch of answers.

    A killed evaluation goes on from it, and scoring can be repeated. `settings` hold whatever the
    answers depend on: the file's name has their hash, and its first line has them. A row is named
    by its number or by the hash of its prompt. All `processes` open it together, and each has seen
    the same answers then.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        kind: str = "answers",
        processes: Processes = ALONE,
    ) -> None:
        self._text = json.dumps(settings, sort_keys=True)
        digits = hashlib.sha256(self._text.encode()).hexdigest()[:12]
        self.path, self.processes = folder / f"{kind}-{digits}.jsonl", processes
        if processes.is_main:  # it makes the file, or mends it
            self._read()
        processes.wait()
        if not processes.is_main:
            self._read()
        processes.wait()

    def read_others(self) -> None:
        """Wait for the other processes, and take the answers that they have added."""
        self.processes.wait()
        if self.processes.count > 1:
            self._read()
            self.processes.wait()

    def _read(self) -> None:
        """Read the file's answers; make it, or mend it, where it is not whole."""
        text, folder = self._text, self.path.parent
        self.found: dict[tuple[str, int | str], Answer] = {}
        self.seconds: dict[str, float] = {}
        lines = read_content(self.path).splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")] or [text.encode() + b"\n"]
        if whole[0].strip() != text.encode():
            raise ValueError(
                f"{self.path}, line 1: expected the settings that the file's name is a hash of; "
                "move the file aside, and its answers are generated again"
            )
        if whole != lines:  # new, or cut off by a kill while it was written
            folder.mkdir(parents=True, exist_ok=True)
            mended = self.path.with_suffix(".part")
            mended.write_bytes(b"".join(whole))
            mended.replace(self.path)
        for number, line in enumerate(whole[1:], 2):
            self._take(self._batch(number, line))

    def add(
        self, side: str, rows: Sequence[int | str], answers: Sequence[Answer], seconds: float
    ) -> None:
        """Append the answers of `side` to these rows, all or none, and the seconds they took."""
        batch = {"side": side, "rows": list(rows), "seconds": round(seconds, 4)}
        batch["answers"] = [answer._asdict() for answer in answers]
        line = json.dumps(batch, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several processes may write
            file.write(line.encode())
        self._take(batch)

    def pace(self, side: str) -> dict[str, Any]:
        """Returns the seconds of all answers of `side`, and rows/s, over all starts."""
        rows, seconds = sum(found == side for found, _ in self.found), self.seconds[side]
        return {
            "seconds": round(seconds, 2),
            "rows_per_s": round(rows / seconds, 2) if seconds else None,
        }

    def _batch(self, number: int, line: bytes) -> dict[str, Any]:
        """Returns a line's batch of answers. Raises ValueError where it is none."""
        try:
            batch = json.loads(line)
            rows, answers = batch["rows"], [Answer(**one) for one in batch["answers"]]
            typed = all(
                isinstance(one.text, str) and type(one.tokens) is int for one in answers
            ) and all(isinstance(row, int | str) for row in rows)
            numbers = type(batch["seconds"]) in (int, float) and isinstance(batch["side"], str)
            if not typed or not numbers or len(rows) != len(answers):
                raise ValueError("it has other types, or more rows than answers")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, line {number} is no batch of answers ({error}): move the file "
                "aside, and its answers are generated again"
            ) from error
        return batch

    def _take(self, batch: dict[str, Any]) -> None:
        self.seconds[batch["side"]] = self.seconds.get(batch["side"], 0.0) + batch["seconds"]
        for row, answer in zip(batch["rows"], batch["answers"], strict=True):
            self.found[batch["side"], row] = Answer(**answer)


def fill(
    file: AnswerFile,
    side: str,
    rows: Sequence[int | str],
    prompts: Sequence[Any],
    size: int,
    answer: Callable[[Sequence[Any], int], Sequence[Answer]],
    title: str,
    together: bool = True,
) -> None:
    """Generate and keep the answers that `file` does not hold yet.

    `answer` takes a batch of prompts and a seed, which is the batch's first row. Batches are dealt
    over the file's processes, and `file` has those of all of them in the end; if not `together`,
    only after `file.read_others`, so that a process goes on to what comes next. Raises ValueError
    where the model's logits are NaN.
    """
    processes, found = file.processes, sum((side, row) in file.found for row in rows)
    quiet = not processes.is_main
    with tqdm(total=len(rows), initial=found, desc=title, unit="row", disable=quiet) as bar:
        for number in processes.dealt(math.ceil(len(rows) / size)):
            start = number * size
            batch = zip(rows[start : start + size], prompts[start : start + size], strict=True)
            missing = [(row, prompt) for row, prompt in batch if (side, row) not in file.found]
            if missing:
                names, asked = zip(*missing, strict=True)
                started = time.perf_counter()
                try:
                    new = answer(asked, start)
                except NotANumber as error:
                    raise ValueError(
                        f"{side} model, row {names[error.position]}: its logits are NaN"
                    ) from error
                except Unfinished as error:
                    kept = [names[position] for position in error.done]
                    file.add(side, kept, list(error.done.values()), time.perf_counter() - started)
                    raise
                file.add(side, names, new, time.perf_counter() - started)
                bar.update(len(missing))
    if together:
        file.read_others()


def answer_facts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns how the answers ended, their mean length in tokens, and the hash of their texts."""
    return {
        "empty": sum(not answer.text for answer in answers),
        "cut_at_max_new_tokens": sum(answer.finish == "length" for answer in answers),
        "repetitive": sum(answer.repeats for answer in answers),
        "mean_tokens": round(sum(answer.tokens for answer in answers) / len(answers), 1),
        "hash": digest([answer.text for answer in answers]),
    }


def digest(content: Any) -> str:
    """Returns the SHA-256 of texts or token ids (24 hexadecimal digits)."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:24]
