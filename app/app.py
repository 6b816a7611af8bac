"""Chat in the browser with the base and the tuned model of a finished run.

A Hugging Face Space as it stands.

python app/app.py --run runs/x [--port 7860] [--listen] [--auth user:password|FILE] [--load-in-4bit]

Without --run it takes the newest finished run under runs/. It serves localhost alone unless
--listen says otherwise. Each option is an environment variable as well: SFTLAB_RUN=runs/x,
SFTLAB_PORT=7860, SFTLAB_LOAD_IN_4BIT=1.
"""

import argparse
import dataclasses
import html
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import sftlab.startup.filter_warnings  # noqa: I001  (before torch)
import sftlab.startup.preload  # noqa: F401
import gradio as gr
from starlette.middleware import Middleware
from transformers.hf_argparser import string_to_bool

from sftlab.chat.engine import Settings
from sftlab.chat.conversation import Turn, column, history, saved, sides
from sftlab.chat.request_filter import Gate, accounts
from sftlab.chat.service import Lab

MODEL = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "show_progress": "minimal",
    "api_visibility": "private",
}
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
REPORTS = (Path("results/report"), Path("results/demo"))
FAILED = (
    "**Not answered:** too many messages wait already, or the server failed. Try again in a moment."
)
BETTER = {"left": "Left is better", "tie": "Tie", "right": "Right is better"}
DOWNLOAD = """(text) => { const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([text], {type: "application/json"})); link.download = "conversation.json";
link.click(); setTimeout(() => URL.revokeObjectURL(link.href), 1000); }"""
CSS = """.gradio-container {max-width: 1280px !important; width: 100%; margin: auto}
.tables table {display: block; overflow-x: auto; font-size: 13px; border: 0 !important}
.tables :is(th, td) {white-space: nowrap; padding: 4px 8px !important} .tables img {background: white; max-width: 100%}
.off, .form:has(> .off) {display: none}
#note {min-height: 24px} #facts small {opacity: .8} .message small {font-size: 11px; opacity: .75}"""


class Page:
    """The handlers of the page. A conversation is its session's own: a list of turns."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.stops: dict[str | None, threading.Event] = {}

    def arrive(self) -> tuple[Any, ...]:
        """What a freshly loaded page shows: the runs there are, or how to make one."""
        names = list(self.lab.runs())
        run = gr.update(choices=names, value=names[0] if names else None)
        return run, gr.update(visible=bool(names)), gr.update(visible=not names)

    def pick(self, run: str | None) -> tuple[Any, str]:
        """Load a run; its facts, or why it cannot be used."""
        if run is None:
            return gr.skip(), ""
        try:
            chat = self.lab.model(run)
        except ValueError as error:
            return gr.skip(), f"**{run} cannot be used:** {error}"
        limits = gr.update(maximum=chat.context - 1, value=min(256, chat.context // 2))
        return limits, f"<small>{self.lab.facts_line(run)}</small>"

    def busy(self, request: gr.Request) -> bool:
        """Whether the session's last message is still being answered:

        until then only Stop does anything.
        """
        return request.session_hash in self.stops and not self.stops[request.session_hash].is_set()

    def send(self, request: gr.Request, box: str) -> tuple[Any, ...]:
        """Take the message out of the box.

        A message to answer comes after the time, so that it is news each time.
        """
        return (
            (f"{time.time()} {box}", "")
            if box.strip() and not self.busy(request)
            else (gr.skip(), gr.skip())
        )

    def begin(
        self, request: gr.Request, asked: str, turns: list[Turn], run: str,
        side: str, blind: bool, *settings: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Take a message as a new turn and show it."""
        order = list(sides(side))
        if blind:
            random.shuffle(order)
        chosen = dict(zip(Settings.__dataclass_fields__, settings, strict=True))
        turns = [*turns, Turn(asked.partition(" ")[2], tuple(order), blind, run, chosen)]
        self.stops[request.session_hash] = threading.Event()
        shown = (gr.update(visible=False), gr.update(visible=True), gr.update(visible=False))
        return turns, *self.columns(turns), *shown

    def columns(self, turns: list[Turn]) -> tuple[Any, Any]:
        """Both columns; the right one only where two models answer."""
        both = bool(turns) and len(turns[-1].order) > 1
        names = (
            ("A", "B")
            if both and turns[-1].hidden
            else turns[-1].order
            if turns
            else ("conversation",)
        )
        left = gr.update(value=column(turns, 0), label=names[0])
        return left, gr.update(
            value=column(turns, 1) if both else [], label=names[-1], visible=both
        )

    def answer(
        self, turns: list[Turn], system: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answers to the last turn."""
        stop, turn = self.stops.setdefault(request.session_hash, threading.Event()), turns[-1]
        yield turns, gr.skip(), gr.skip(), ""
        try:
            messages = history(turns, system)
            for piece, left_out in self.lab.answer(
                turn.run, messages, turn.order, Settings(**turn.settings), stop
            ):
                turn.update(piece, left_out, self.lab.adapter)
                yield turns, *self.columns(turns), turn.remark()
        except ValueError as error:
            yield turns, gr.skip(), gr.skip(), f"**Not answered:** {error}"

    def end(self, request: gr.Request, box: str, turns: list[Turn]) -> tuple[Any, ...]:
        """Free the page again; a message that got no answer returns to the box."""
        self.stop(request)
        if turns and not turns[-1].texts:
            box, turns = box or turns[-1].message, turns[:-1]
        votable = bool(turns) and len(turns[-1].order) > 1 and turns[-1].vote is None
        free = (gr.update(visible=True), gr.update(visible=False), gr.update(visible=votable))
        return box, turns, *self.columns(turns), *free

    def stop(self, request: gr.Request) -> None:
        """End the session's generation."""
        self.stops.setdefault(request.session_hash, threading.Event()).set()

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.stops.pop(request.session_hash, threading.Event()).set()

    def again(self, request: gr.Request, turns: list[Turn], seed: int) -> tuple[Any, ...]:
        """Retry: the last message once more, under the next seed."""
        if not turns or self.busy(request):
            return gr.skip(), gr.skip(), gr.skip()
        return f"{time.time()} {turns[-1].message}", turns[:-1], seed + 1

    def edit(self, request: gr.Request, turns: list[Turn], edited: gr.EditData) -> tuple[Any, ...]:
        """A message changed by hand: the conversation begins anew there."""
        place = edited.index if isinstance(edited.index, int) else edited.index[0]
        asked = f"{time.time()} {html.unescape(edited.value)}"
        return (gr.skip(), gr.skip()) if self.busy(request) else (asked, turns[: place // 2])

    def undo(self, request: gr.Request, box: str, turns: list[Turn]) -> tuple[Any, ...]:
        """Take the last message back into the box."""
        if not turns or self.busy(request):
            return box, turns, *self.columns(turns), gr.skip()
        return (
            box or turns[-1].message,
            turns[:-1],
            *self.columns(turns[:-1]),
            gr.update(visible=False),
        )

    def clear(self, request: gr.Request, turns: list[Turn]) -> tuple[Any, ...]:
        """Begin a new conversation."""
        turns = turns if self.busy(request) else []
        return turns, *self.columns(turns), gr.update(visible=False), ""

    def vote(self, turns: list[Turn], system: str, choice: str) -> tuple[Any, ...]:
        """Write down which answer is better, and say whose it was."""
        said = self.lab.vote(turns, system, choice)
        return turns, *self.columns(turns), gr.update(visible=False), said, self.lab.votes_table()

    def chat(
        self,
        message: str, history: list[dict[str, str]] | None = None, side: Literal["tuned", "base", "both"] = "tuned",
        system: str = "", temperature: float = Settings.temperature, top_p: float = Settings.top_p,
        top_k: int = Settings.top_k, max_new_tokens: int = Settings.max_new_tokens,
        repetition_penalty: float = Settings.repetition_penalty, seed: int = Settings.seed, run: str | None = None,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Answer a message as the tuned model, the base model or both, from one load of the
        weights.

        history: earlier messages, each with role and content. run: a finished run's name, the first
        one if left out. Yields texts, tokens, tokens_per_s and finished (stop, length or stopped),
        each by side, as they grow; with first_token_s, left_out (old turns the context had no room
        for), run and settings.
        """
        earlier = [{"role": "system", "content": system.strip()}] if system.strip() else []
        stop, name = threading.Event(), run or next(iter(self.lab.runs()), None)
        try:
            settings = Settings(temperature, top_p, top_k, max_new_tokens, repetition_penalty, seed)
            messages = [*earlier, *(history or []), {"role": "user", "content": message}]
            for piece, left_out in self.lab.answer(name, messages, sides(side), settings, stop):
                said = {"run": name, "settings": dataclasses.asdict(settings), "left_out": left_out}
                yield piece._asdict() | said
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            stop.set()


def settings_column() -> list[gr.components.Component]:
    """System instruction and what steers generation, in the order of `Settings`."""
    system = gr.Textbox(label="System instruction", lines=2, placeholder="none")
    return [
        system,
        gr.Slider(0, 2, Settings.temperature, step=0.05, label="Temperature", info="0 is greedy"),
        gr.Slider(0.05, 1, Settings.top_p, step=0.05, label="Top-p"),
        gr.Slider(0, 200, Settings.top_k, step=1, label="Top-k", info="0 is off"),
        gr.Slider(1, 2048, Settings.max_new_tokens, step=1, label="Max new tokens"),
        gr.Slider(1, 2, Settings.repetition_penalty, step=0.05, label="Repetition penalty"),
        gr.Number(Settings.seed, precision=0, label="Seed", info="Retry takes the next one"),
    ]


def build(page: Page) -> gr.Blocks:
    """The page: chat, runs, votes, results, and the API's one endpoint."""
    with gr.Blocks(title="sftlab chat", analytics_enabled=False) as blocks:
        gr.Markdown("# Base and tuned, side by side")
        empty = gr.Markdown(page.lab.without_runs(), visible=False)
        with gr.Column(visible=True) as found:
            run = gr.Dropdown([], label="Run", elem_id="run")
            facts = gr.Markdown(elem_id="facts")
            with gr.Tab("Chat"):
                chat_tab(page, blocks, run, facts)
            for name, content in (("Runs", page.lab.runs_table), ("Results", page.lab.report)):
                with gr.Tab(name) as tab:
                    tab.select(content, None, gr.Markdown(elem_classes="tables"), **QUICK)
        blocks.load(page.arrive, None, [run, found, empty], **QUICK)
        blocks.unload(page.leave)
        gr.api(page.chat, api_name="chat", concurrency_id="model", concurrency_limit=1)
    return blocks


def chat_tab(page: Page, blocks: gr.Blocks, run: gr.Dropdown, facts: gr.Markdown) -> None:
    """The conversation, its buttons, settings and votes, and what each of them does."""
    turns, pending = gr.State([]), gr.Textbox(elem_classes="off")
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                look = {
                    "height": "50vh",
                    "buttons": ["copy", "copy_all"],
                    "allow_tags": False,
                    "latex_delimiters": [],
                }
                left = gr.Chatbot(label="conversation", elem_id="left", min_width=280, **look)
                right = gr.Chatbot(visible=False, elem_id="right", min_width=280, **look)
            with gr.Row(visible=False) as ballot:
                better = {
                    name: gr.Button(text, size="sm", min_width=80) for name, text in BETTER.items()
                }
            note = gr.Markdown(elem_id="note")
            with gr.Row():
                box = gr.Textbox(
                    show_label=False,
                    placeholder="Your message",
                    lines=1,
                    max_lines=8,
                    scale=5,
                    min_width=200,
                    elem_id="message",
                )
                send = gr.Button("Send", variant="primary", scale=1, min_width=80)
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)
            with gr.Row():
                names = ("Retry", "Undo", "Clear", "Save")
                retry, undo, clear, save = (
                    gr.Button(name, size="sm", min_width=60) for name in names
                )
        with gr.Column(scale=1, min_width=260):
            side = gr.Radio(
                ["both", "tuned", "base"], value="both", label="Who answers", elem_id="side"
            )
            blind = gr.Checkbox(label="Blind: say whose answer it was after the vote")
            system, *settings = settings_column()
    file, ballots = gr.Textbox(elem_classes="off"), gr.Markdown(elem_classes="tables")
    shown = [turns, left, right]

    chosen = [pending, turns, run, side, blind, *settings]
    begun = pending.change(page.begin, chosen, [*shown, send, stop, ballot], **QUICK)
    answered = begun.success(page.answer, [turns, system], [*shown, note], **MODEL)
    ended = {
        "fn": page.end,
        "inputs": [box, turns],
        "outputs": [box, *shown, send, stop, ballot],
        **QUICK,
    }
    answered.then(**ended)  # not after a failure, such as a full queue
    answered.failure(**ended).then(lambda: FAILED, None, note, **QUICK)
    gr.on([send.click, box.submit], page.send, box, [pending, box], **QUICK)
    retry.click(page.again, [turns, settings[-1]], [pending, turns, settings[-1]], **QUICK)
    gr.on([left.edit, right.edit], page.edit, turns, [pending, turns], **QUICK)
    stop.click(page.stop, None, None, **QUICK)
    undo.click(page.undo, [box, turns], [box, *shown, ballot], **QUICK)
    gr.on(
        [clear.click, left.clear, right.clear], page.clear, turns, [*shown, ballot, note], **QUICK
    )
    written = save.click(
        lambda *talk: json.dumps(saved(*talk), indent=2), [turns, system], file, **QUICK
    )
    written.then(None, file, None, js=DOWNLOAD, api_visibility="private")
    for name, button in better.items():
        cast = partial(page.vote, choice=name)
        button.click(cast, [turns, system], [*shown, ballot, note, ballots], **QUICK)
    blocks.load(page.lab.votes_table, None, ballots, **QUICK)
    run.change(page.pick, run, [settings[3], facts], **MODEL)


def main(argv: list[str]) -> None:
    """Read the options, load the model, serve until Ctrl-C or SIGTERM."""
    options = parse(argv)
    lab = Lab(options.runs, options.run, options.report, options.votes, options.load_in_4bit)
    if listen := options.listen or "SPACE_ID" in os.environ:
        print(
            "warning: anyone who reaches this machine can "
            f"chat{'' if options.auth else ', without a password'}"
        )
    for first in list(lab.runs())[:1]:
        try:
            lab.model(first)
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr)
    print(f"chat on http://localhost:{options.port}", flush=True)
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    build(Page(lab)).queue(max_size=options.queue, api_open=False).launch(
        server_name="0.0.0.0" if listen else "127.0.0.1", server_port=options.port, share=False, auth=options.auth,
        theme=theme, css=CSS, footer_links=["api", "settings"], run_history=False, enable_monitoring=False, quiet=True,
        ssr_mode=False, pwa=False, mcp_server=False, prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(Gate, local_only=not listen)]},
    )  # fmt: skip
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("closing", flush=True)
        lab.close()
        os._exit(
            0
        )  # the server would wait for open pages, and the interpreter clean up for two seconds


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, from the command line or the environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    switch = {
        "nargs": "?",
        "type": string_to_bool,
        "const": True,
        "default": False,
        "metavar": "true|false",
    }
    parser.add_argument("--run", type=Path, help="run directory (default: the newest finished)")
    parser.add_argument("--runs", type=Path, default="runs", help="folder of runs (default: runs)")
    reports = [folder for folder in REPORTS if (folder / "report.md").is_file()]
    parser.add_argument(
        "--report", type=Path, default=[*reports, REPORTS[0]][0], help="what eval/report.py wrote"
    )
    parser.add_argument("--votes", type=Path, help="JSONL of votes (default: beside the runs)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--queue", type=int, default=16, help="messages that may wait (default: 16)"
    )
    parser.add_argument("--listen", **switch, help="serve other machines too")
    parser.add_argument("--auth", type=accounts, metavar="USER:PASSWORD|FILE")
    parser.add_argument("--load-in-4bit", **switch)
    given = {name: os.environ.get(f"SFTLAB_{name.upper()}") for name in vars(parser.parse_args([]))}
    parser.set_defaults(**{name: value for name, value in given.items() if value})
    options = parser.parse_args(argv)
    if options.run and not (options.run / "run.json").is_file():
        parser.error(f"--run {options.run}: no run directory (it has no run.json)")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
