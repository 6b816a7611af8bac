"""What the app offers without a page: finished runs, one model in memory, votes, the report."""

import base64
import re
import shlex
import threading
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sftlab.chat import votes
from sftlab.chat.conversation import Turn, inert, saved, sides
from sftlab.chat.engine import Chat, Piece
from sftlab.chat.limits import check_size, conversation
from sftlab.chat.run_list import HEADINGS, cells, list_runs
from sftlab.chat.sampling import Settings
from sftlab.evaluation.answer_file import digest
from sftlab.evaluation.base_and_tuned import model_settings
from sftlab.runs.run_directory import START, adapter_hash
from sftlab.tables import interval

NO_RUN = """## No finished run yet

Looked in `{folder}`. Training makes a run. From the repository's root:

```
make demo    # base model, data, a run and its evaluation, on a CPU in minutes
```

or, with your own rows,

```
python recipes/sft.py --config_file accelerate_configs/cpu.yaml \\
    --config recipes/demo/attn_r16.yaml --dataset_name my_rows.jsonl --output_dir runs/mine
```

Then load this page again. On a Space, upload the run's folder (app/README.md has the commands).
"""


class Lab:
    """The runs that can be chatted with, and the one model in memory."""

    def __init__(
        self,
        runs: Path,
        first: Path | None,
        report: Path,
        ballot: Path | None,
        load_in_4bit: bool,
        trusted: bool = False,
    ) -> None:
        """Offer the runs in `runs`, or `first` and the runs beside it. Votes go to `ballot`.

        `trusted` lets code that a base model brings run.
        """
        self.folder = first.parent if first else runs
        self.first = first.name if first else None
        self.report_folder = report
        self.ballot = ballot or self.folder / "votes.jsonl"
        self.load_in_4bit, self.trusted = load_in_4bit, trusted
        self._loaded: tuple[Path, int] | None = None
        self.adapter: str | None = None  # the loaded one's hash
        self._settings: dict[str, Any] = {}  # what its answers depend on
        self._voting = threading.Lock()
        self._chat: Chat | None = None

    def runs(self) -> dict[str, dict[str, Any]]:
        """Returns run.json of each finished run by name: the requested one, then the newest."""
        return list_runs(self.folder, self.first).runs

    def model(self, name: str | None) -> Chat:
        """Load a run's model in place of the last one. Raises ValueError where it cannot."""
        listed = list_runs(self.folder, self.first)
        if not isinstance(name, str) or name not in listed.runs:
            why = listed.unreadable.get(name) if isinstance(name, str) else None
            names = ", ".join(listed.runs) or "none"
            raise ValueError(
                why or f"there is no finished run {str(name)[:80]!r}: pick one of {names}"
            )
        folder = self.folder / name
        # a run that was trained again has another time
        state = (folder, (folder / "run.json").stat().st_mtime_ns)
        if self._chat is None or self._loaded != state:
            self.close()
            self._chat = Chat(folder, load_in_4bit=self.load_in_4bit, trusted=self.trusted)
            self._loaded, self.adapter = state, adapter_hash(folder)
            self._settings = model_settings(folder, listed.runs[name])
        return self._chat

    def models_hash(self, sides: tuple[str, ...]) -> str:
        """Returns the hash of all that the answers of the loaded run's sides depend on."""
        start = {"start": self._chat.start.weights} if START in sides else {}
        return digest(self._settings | start)

    def warnings(self, listen: bool, accounts: bool) -> list[str]:
        """Load the first run; returns what a user should know before the first message."""
        password = "with a password" if accounts else "without a password"
        found = [f"anyone who reaches this machine can chat, {password}"] if listen else []
        if self.trusted:
            found.append("code that a base model brings is run (--trust_remote_code)")
        for first in list(self.runs())[:1]:
            try:
                self.model(first)
            except ValueError as error:
                found.append(str(error))
        unreadable = list_runs(self.folder, self.first).unreadable
        return found + [f"{name} is not offered: {why}" for name, why in unreadable.items()]

    def close(self) -> None:
        """Stop the running answer, and free the model."""
        if self._chat is not None:
            self._chat.close()
        self._chat = None

    def answer(
        self,
        run: str | None,
        messages: list[dict[str, str]],
        sides: tuple[str, ...],
        settings: Settings,
        stop: threading.Event,
    ) -> Iterator[tuple[Piece, int]]:
        """Answer a conversation as the sides.

        Yields the answer so far, and the number of old turns that did not fit the context. Raises
        ValueError where it cannot be answered. Only one caller at a time; the page's queue ensures
        it.
        """
        chat = self.model(run)
        try:
            check_size(messages, chat.context)
            kept, left_out = chat.fit(messages, settings.max_new_tokens, stop)
            # in one batch the order decides the samples; otherwise it decides who answers first
            for piece in chat.reply(
                kept, tuple(sorted(sides)) if chat.mixed else sides, settings, stop
            ):
                yield piece, left_out
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "out of memory: ask for fewer new tokens, or start with --load-in-4bit"
            ) from error
        finally:
            stop.set()

    def ask(
        self,
        message: str,
        history: list[dict[str, str]] | None,
        side: str,
        system: str | None,
        settings: Settings,
        run: str | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """Answer one message, as the API does it, with the named run or the first one.

        Yields the answer so far as a dict. Raises ValueError where it cannot be answered.
        """
        messages = conversation(message, history, system)
        name = run if run is not None else next(iter(self.runs()), None)
        about = {"run": name, "settings": asdict(settings)}
        for piece, left_out in self.answer(name, messages, sides(side), settings, stop):
            yield piece._asdict() | about | {"left_out": left_out}

    def facts_line(self, name: str) -> str:
        """Returns a finished run's facts in one line."""
        found = cells(self.folder / name, self.runs()[name])
        named = zip(HEADINGS[1:], found[1:], strict=True)
        return " · ".join(f"{heading} {inert(cell)}" for heading, cell in named if cell)

    def page_line(self, name: str) -> str:
        """Returns what a run went on from, or why that is not offered, before its other facts.

        Loads the run. Raises ValueError where it cannot.
        """
        chat, facts = self.model(name), self.facts_line(name)
        if not chat.run.get("started_from"):
            return facts
        if chat.start is None:
            return f"**its start is not offered:** {inert(chat.no_start)} · {facts}"
        return f"start {inert(str(chat.start.run or chat.start.adapter))} · {facts}"

    def without_runs(self) -> str:
        """Returns Markdown on how to make a run."""
        return NO_RUN.format(folder=self.folder)

    def runs_table(self) -> str:
        """Returns a Markdown table of the finished runs, and which others cannot be used."""
        listed = list_runs(self.folder, self.first)
        rows = [cells(self.folder / name, run) for name, run in listed.runs.items()]
        lines = [table(HEADINGS, rows)]
        if listed.unreadable:
            lines.append("Not usable:")
            lines += [
                f"- {inert(name)}: {inert(why)}" for name, why in sorted(listed.unreadable.items())
            ]
        return "\n\n".join([lines[0], "\n".join(lines[1:])]).strip()

    def votes_table(self) -> str:
        """Returns a Markdown table of the votes, with intervals."""
        kept = votes.read(self.ballot)
        rows = [
            [
                one["run"],
                "blind" if one["blind"] else "open",
                one["against"],
                *(str(one[choice]) for choice in ("other", "tuned", "tie")),
            ]
            + [interval({"value": one["won"], **one}) if one["interval_95"] else "no decided vote"]
            for one in votes.summary(kept.votes)
        ]
        said = (
            "Share of tuned among the decided votes, with Wilson's 95 % interval. It takes votes "
            "as independent. A run whose models have changed has a row for each."
        )
        headings = ("run", "how", "against", "other better", "tuned better", "tie", "tuned won")
        shown = (
            f"{table(headings, rows)}\n\n{said}"
            if rows
            else "No votes yet: let two models answer, then say which is better."
        )
        return "\n\n".join([shown, *map(inert, kept.broken[:5])])

    def vote(self, turns: list[Turn], system: str, choice: str) -> str:
        """Record which answer to the last turn is better: left, right or tie.

        Returns a sentence that says whose answer it was. Raises ValueError for a choice of another
        name, before both answers are there, and for a turn that has its vote.
        """
        if choice not in ("left", "right", "tie"):
            raise ValueError(f"vote {str(choice)[:40]!r}: expected left, right or tie")
        with self._voting:
            if not turns:
                raise ValueError("there is nothing to vote on: ask something first")
            turn = turns[-1]
            if turn.vote is not None:
                raise ValueError(f"this turn has its vote already: {turn.vote}")
            if len(turn.order) < 2:
                raise ValueError("one model answered, so there is nothing to compare: ask two")
            if any(not turn.finished.get(side) for side in turn.order):
                raise ValueError("the answers are not finished: vote when both are there")
            vote = {"left": turn.order[0], "right": turn.order[-1]}.get(choice, "tie")
            votes.cast(
                self.ballot,
                vote,
                run=turn.run,
                adapter_hash=turn.adapter,
                models=turn.models,
                blind=turn.blind,
                order=turn.order,
                texts=turn.texts,
                settings=turn.settings,
                message=turn.message,
                system=system,
                before=saved(turns, system)["turns"][:-1],
            )
            turn.vote = vote
        return f"Voted: {turn.vote}. Left was {turn.order[0]}, right was {turn.order[-1]}."

    def report(self) -> str:
        """Returns the report as Markdown, with its plots inside."""
        folder = self.report_folder
        if not (folder / "report.md").is_file():
            command = ("python", "eval/report.py", "--runs", str(self.folder), "--out", str(folder))
            return f"There is no report yet: `{shlex.join(command)}` makes one."

        def plot(match: re.Match[str]) -> str:
            image = folder / f"{match[2]}.png"
            data = base64.b64encode(image.read_bytes()).decode() if image.is_file() else ""
            return f"![{match[1]}](data:image/png;base64,{data})"

        return re.sub(
            r"!\[([\w ]+)\]\(([\w-]+)\.svg\)",
            plot,
            (folder / "report.md").read_text(encoding="utf-8", errors="replace"),
        )


def lab_of(options: Namespace) -> Lab:
    """Returns the runs that the app's options name."""
    return Lab(
        options.runs,
        options.run,
        options.report,
        options.votes,
        options.load_in_4bit,
        options.trust_remote_code,
    )


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(inert(cell).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )
