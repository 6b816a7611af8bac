"""Answers on disk, kept as they come."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sftlab.evaluation.generation import Answer, NotANumber, Unfinished


class AnswerFile:
    """Answers on disk, a batch a line: a killed evaluation goes on where it stopped, and scoring
    can be repeated.

    The file's name holds a hash of `settings`, whatever decides what the answers are; its first
    line holds them. A row is named by its number, or by the hash of its prompt.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], kind: str = "answers") -> None:
        text = json.dumps(settings, sort_keys=True)
        self.path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        self.found: dict[tuple[str, int | str], Answer] = {}
        self.seconds: dict[str, float] = {}
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")] or [text.encode() + b"\n"]
        if whole != lines:  # new, or torn by a kill in the midst of writing
            folder.mkdir(parents=True, exist_ok=True)
            mended = self.path.with_suffix(".part")
            mended.write_bytes(b"".join(whole))
            mended.replace(self.path)
        for line in whole[1:]:
            self._take(json.loads(line))

    def add(
        self, side: str, rows: Sequence[int | str], answers: Sequence[Answer], seconds: float
    ) -> None:
        """Keep the answers of `side` to these rows, all or none of them, and the time that they
        took.
        """
        batch = {"side": side, "rows": list(rows), "seconds": round(seconds, 4)}
        batch["answers"] = [answer._asdict() for answer in answers]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch, ensure_ascii=False) + "\n")
        self._take(batch)

    def pace(self, side: str) -> dict[str, Any]:
        """Seconds that all answers of `side` took, and rows a second, over every sitting."""
        rows, seconds = sum(found == side for found, _ in self.found), self.seconds[side]
        return {
            "seconds": round(seconds, 2),
            "rows_per_s": round(rows / seconds, 2) if seconds else None,
        }

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
) -> None:
    """Have `answer` (given prompts and a seed, the place of the batch) answer what `file` does not
    hold yet.
    """
    found = sum((side, row) in file.found for row in rows)
    with tqdm(total=len(rows), initial=found, desc=title, unit="row") as bar:
        for start in range(0, len(rows), size):
            batch = zip(rows[start : start + size], prompts[start : start + size], strict=True)
            missing = [(row, prompt) for row, prompt in batch if (side, row) not in file.found]
            if missing:
                names, asked = zip(*missing, strict=True)
                started = time.perf_counter()
                try:
                    new = answer(asked, start)
                except NotANumber as error:
                    raise ValueError(
                        f"{side} model, row {names[error.position]}: NaN logits while it answers"
                    ) from error
                except Unfinished as error:
                    kept = [names[position] for position in error.done]
                    file.add(side, kept, list(error.done.values()), time.perf_counter() - started)
                    raise
                file.add(side, names, new, time.perf_counter() - started)
                bar.update(len(missing))


def answer_facts(answers: Sequence[Answer]) -> dict[str, Any]:
    """How answers ended, and the hash of their texts."""
    return {
        "empty": sum(not answer.text for answer in answers),
        "cut_at_max_new_tokens": sum(answer.finish == "length" for answer in answers),
        "repetitive": sum(answer.repeats for answer in answers),
        "mean_tokens": round(sum(answer.tokens for answer in answers) / len(answers), 1),
        "hash": digest([answer.text for answer in answers]),
    }


def digest(content: Any) -> str:
    """SHA-256 of texts or ids (hexadecimal, 24 digits)."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:24]
