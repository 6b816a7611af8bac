"""What the app offers without a page: finished runs, one model in memory, votes, the report."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sftlab.chat import votes
from sftlab.chat.conversation import Turn, saved, sides
from sftlab.chat.engine import Chat, Piece, Settings
from sftlab.runs.run_directory import adapter_hash, read_run
from sftlab.tables import interval

HEADINGS = (
    "run",
    "base model",
    "data",
    "targets",
    "rank",
    "precision",
    "perplexity of base",
    "of tuned",
)

NO_RUN = """## No finished run yet

Looked in `{folder}`. Training makes a run. From the repository's root:

```
make demo    # base model, data, a run and its evaluation, on a CPU in minutes
```

or, with your own rows,

```
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py \\
    --config recipes/demo/attn_r16.yaml --dataset_name my_rows.jsonl --output_dir runs/mine
```

Then load this page again. On a Space, upload the run's folder (app/README.md has the commands).
"""


class Lab:
    """The runs that can be chatted with, and the one model in memory."""

    def __init__(
        self, runs: Path, first: Path | None, report: Path, ballot: Path | None, load_in_4bit: bool
    ) -> None:
        """Offer the runs in `runs`, or `first` and the runs beside it. Votes go to `ballot`."""
        self.folder = first.parent if first else runs
        self.first = first.name if first else None
        self.report_folder = report
        self.ballot = ballot or self.folder / "votes.jsonl"
        self.load_in_4bit = load_in_4bit
        self._loaded: tuple[Path, int] | None = None
        self.adapter: str | None = None  # the loaded one's hash
        self._chat: Chat | None = None

    def runs(self) -> dict[str, dict[str, Any]]:
        """Returns run.json of each finished run by name: the requested one, then the newest."""
        found = {}
        for path in self.folder.glob("*/run.json"):
            try:
                run = read_run(path.parent)
            except ValueError:
                continue
            if isinstance(run, dict) and run.get("status") == "succeeded":
                found[path.parent.name] = run
        order = {
            name: (name == self.first, run.get("finished") or "") for name, run in found.items()
        }
        return {name: found[name] for name in sorted(found, key=order.get, reverse=True)}

    def model(self, name: str | None) -> Chat:
        """Load a run's model in place of the last one. Raises ValueError where it cannot."""
        if name not in self.runs():
            raise ValueError(
                f"there is no finished run {name!r}: pick one of {', '.join(self.runs()) or 'none'}"
            )
        folder = self.folder / name
        # a run that was trained again has another time
        state = (folder, (folder / "run.json").stat().st_mtime_ns)
        if self._chat is None or self._loaded != state:
            self.close()
            self._chat, self._loaded = Chat(folder, load_in_4bit=self.load_in_4bit), state
            self.adapter = adapter_hash(folder)
        return self._chat

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
            kept, left_out = chat.fit(messages, settings.max_new_tokens)
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
        history: list[dict[str, str]],
        side: str,
        system: str,
        settings: Settings,
        run: str | None,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """Answer one message, as the API does it, with the named run or the first one.

        Yields the answer so far as a dict. Raises ValueError where it cannot be answered.
        """
        earlier = [{"role": "system", "content": system.strip()}] if system.strip() else []
        messages = [*earlier, *history, {"role": "user", "content": message}]
        name = run or next(iter(self.runs()), None)
        about = {"run": name, "settings": asdict(settings)}
        for piece, left_out in self.answer(name, messages, sides(side), settings, stop):
            yield piece._asdict() | about | {"left_out": left_out}

    def facts(self, name: str, run: dict[str, Any]) -> list[str]:
        """Returns a run's cells under HEADINGS."""
        recipe, targets = run["recipe"], run["recipe"]["lora_target_modules"]
        path, perplexity = self.folder / name / "eval" / "quality.json", ["not measured", ""]
        quality = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if quality and quality["adapter_hash"] == adapter_hash(self.folder / name):
            perplexity = [
                interval(quality["scores"]["response_perplexity"][side])
                for side in ("base", "tuned")
            ]
        names = (
            targets
            if isinstance(targets, str)
            else " ".join(sorted(t.removesuffix("_proj") for t in targets))
        )
        base = recipe["model_name_or_path"]
        return [
            name,
            base,
            recipe["dataset_name"],
            names,
            str(recipe["lora_r"]),
            run["launch"]["precision"],
            *perplexity,
        ]

    def facts_line(self, name: str) -> str:
        """Returns a finished run's facts in one line."""
        cells = zip(HEADINGS[1:], self.facts(name, self.runs()[name])[1:], strict=True)
        return " · ".join(f"{heading} {cell}" for heading, cell in cells if cell)

    def without_runs(self) -> str:
        """Returns Markdown on how to make a run."""
        return NO_RUN.format(folder=self.folder)

    def runs_table(self) -> str:
        """Returns a Markdown table of the finished runs."""
        return table(HEADINGS, [self.facts(name, run) for name, run in self.runs().items()])

    def votes_table(self) -> str:
        """Returns a Markdown table of the votes, with intervals."""
        rows = [
            [
                one["run"],
                "blind" if one["blind"] else "open",
                *(str(one[choice]) for choice in votes.CHOICES),
            ]
            + [interval({"value": one["won"], **one}) if one["interval_95"] else "no decided vote"]
            for one in votes.summary(votes.read(self.ballot))
        ]
        said = (
            "Share of tuned among the decided votes, with Wilson's 95 % interval. It takes votes "
            "as independent."
        )
        headings = ("run", "how", "base better", "tuned better", "tie", "tuned won")
        return (
            f"{table(headings, rows)}\n\n{said}"
            if rows
            else "No votes yet: answer with both, then say which is better."
        )

    def vote(self, turns: list[Turn], system: str, choice: str) -> str:
        """Record which answer to the last turn is better: left, right or tie.

        Returns a sentence that says whose answer it was.
        """
        turn = turns[-1]
        turn.vote = {"left": turn.order[0], "right": turn.order[-1]}.get(choice, "tie")
        votes.cast(
            self.ballot,
            turn.vote,
            run=turn.run,
            adapter_hash=turn.adapter,
            blind=turn.blind,
            order=turn.order,
            texts=turn.texts,
            settings=turn.settings,
            message=turn.message,
            system=system,
            before=saved(turns, system)["turns"][:-1],
        )
        return f"Voted: {turn.vote}. Left was {turn.order[0]}, right was {turn.order[-1]}."

    def report(self) -> str:
        """Returns the report as Markdown, with its plots inside."""
        folder = self.report_folder
        if not (folder / "report.md").is_file():
            return (
                "There is no report yet: `python eval/report.py --runs runs --out results/report` "
                "makes one."
            )

        def plot(match: re.Match[str]) -> str:
            image = folder / f"{match[2]}.png"
            data = base64.b64encode(image.read_bytes()).decode() if image.is_file() else ""
            return f"![{match[1]}](data:image/png;base64,{data})"

        return re.sub(
            r"!\[([\w ]+)\]\(([\w-]+)\.svg\)",
            plot,
            (folder / "report.md").read_text(encoding="utf-8"),
        )


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
