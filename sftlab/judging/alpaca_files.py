"""Files in AlpacaEval's form: a JSON list of objects with instruction, output and generator."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from sftlab.evaluation.answer_file import digest
from sftlab.judging.pairwise import Pair
from sftlab.schema import read_content

# the hash of the 805 instructions in their published order
_ALPACA_EVAL = "e4356cd997a280afd66c7dd3"
_PUBLISHED = {
    "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json",
    "text_davinci_003": "alpaca_eval.json",
}


class Outputs(NamedTuple):
    """Instructions with one model's answers.

    `published` says that the instructions are AlpacaEval's 805.
    """

    name: str
    instructions: list[str]
    texts: list[str]
    published: bool

    def first(self, limit: int) -> "Outputs":
        """Returns the first `limit` of them (0: all)."""
        stop = limit or None
        return self._replace(instructions=self.instructions[:stop], texts=self.texts[:stop])

    def answering(self, instructions: list[str], asker: str) -> "Outputs":
        """Returns the answers in the order of `instructions`.

        `asker` names where they are from. Raises ValueError where one is not answered here.
        """
        known = dict(zip(self.instructions, self.texts, strict=True))
        missing = [one for one in instructions if one not in known]
        if missing:
            raise ValueError(
                f"the reference {self.name} answers other instructions than {asker}: "
                f"{len(missing)} of {len(instructions)} are not in it, the first is "
                f"{missing[0][:80]!r}; give a reference that answers each, or other instructions"
            )
        return self._replace(instructions=instructions, texts=[known[one] for one in instructions])


def read_outputs(path: Path) -> Outputs:
    """Read a file in AlpacaEval's form.

    Raises ValueError where it has another form, and where an instruction comes twice.
    """
    rows = read_json_list(path, ("instruction", "output"))
    instructions = [row["instruction"] for row in rows]
    name = rows[0].get("generator", path.stem)
    refuse_twice(path, instructions)
    texts = [row["output"] for row in rows]
    return Outputs(name, instructions, texts, is_alpaca_eval(instructions))


def is_alpaca_eval(instructions: list[str]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their published order."""
    return digest(instructions) == _ALPACA_EVAL


def refuse_twice(path: Path, instructions: list[str]) -> None:
    """Raise ValueError where an instruction comes twice."""
    first: dict[str, int] = {}
    for place, instruction in enumerate(instructions):
        if instruction in first:
            raise ValueError(
                f"{path} has the instruction {instruction[:60]!r} twice, in rows "
                f"{first[instruction]} and {place}: expected each once"
            )
        first[instruction] = place


def published_outputs(name: str) -> Outputs:
    """Download the published reference answers of AlpacaEval.

    `name` is gpt4_1106_preview (AlpacaEval 2) or text_davinci_003 (AlpacaEval 1).
    """
    if name not in _PUBLISHED:
        raise ValueError(
            f"reference {name!r} is neither base nor a file (looked in {Path.cwd()}) nor one of "
            f"{', '.join(_PUBLISHED)}"
        )
    try:
        path = hf_hub_download("tatsu-lab/alpaca_eval", _PUBLISHED[name], repo_type="dataset")
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"AlpacaEval's {_PUBLISHED[name]} is not in the hub's cache, and the hub cannot be "
            "reached: pass a file of instructions and outputs as --reference FILE, or with "
            "--reference base as --instructions FILE"
        ) from error
    return read_outputs(Path(path))


class Task(NamedTuple):
    """Instructions, the reference's answers, and answers that are known to be good.

    `reference` is None where the base model is the reference.
    """

    questions: Outputs
    reference: Outputs | None
    good: list[str]


def read_task(reference: str, instructions: Path | None, limit: int) -> Task:
    """Returns the first `limit` instructions (0: all) with the reference's answers.

    `reference` is base, a file or a published name. `instructions` is a file; without it they are
    the reference's.
    """
    if reference == "base":
        asked = (
            read_outputs(instructions)
            if instructions
            else published_outputs(next(iter(_PUBLISHED)))
        )
        return Task(asked.first(limit), None, asked.first(limit).texts)
    path = Path(reference)
    answered = read_outputs(path) if path.is_file() else published_outputs(reference)
    questions = (read_outputs(instructions) if instructions else answered).first(limit)
    answered = answered.answering(questions.instructions, str(instructions or reference))
    return Task(questions, answered, answered.texts)


def read_preferences(path: Path) -> tuple[list[Pair], list[bool], str]:
    """Read published annotations of pairs in alpaca-eval's form.

    A row has instruction, output_1, output_2, a preference from 1 to 2, and annotator. Returns the
    pairs (output_2 as the answer), whether the annotator preferred the answer, and the annotator's
    name. Ties are left out.
    """
    rows = read_json_list(path, ("instruction", "output_1", "output_2"))
    # alpaca-eval writes null for a pair that could not be annotated
    if not all(
        "preference" in row and isinstance(row["preference"], int | float | None) for row in rows
    ):
        raise ValueError(
            f"{path} has rows without a preference from 1 to 2: expected alpaca-eval's annotations"
        )
    rows = [row for row in rows if row["preference"] in (1, 2) or 1 < (row["preference"] or 0) < 2]
    rows = [row for row in rows if row["preference"] != 1.5]
    if not rows:
        raise ValueError(f"{path} prefers neither answer anywhere: there is nothing to agree with")
    pairs = [
        Pair(i, row["instruction"], row["output_2"], row["output_1"]) for i, row in enumerate(rows)
    ]
    return pairs, [row["preference"] > 1.5 for row in rows], rows[0].get("annotator", path.stem)


def read_json_list(path: Path, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns a list of objects with the texts named. Raises ValueError for another form."""
    content = read_content(path)
    try:
        rows = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not whole or not all(isinstance(row.get(key), str) for row in rows for key in texts):
        raise ValueError(
            f"{path} is no list of objects with the texts {', '.join(texts)}, as alpaca-eval "
            "writes them"
        )
    return rows
