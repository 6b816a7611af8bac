"""Chat in the browser with the base, the tuned model and the start of a finished run.

python app/app.py --run runs/x [--port 7860] [--listen] [--auth user:password|FILE] [--load-in-4bit]
    [--trust_remote_code]

Without --run it takes the newest finished run under runs/. It serves localhost alone unless
--listen is given. Each option but --trust_remote_code is an environment variable as well:
SFTLAB_RUN=runs/x, SFTLAB_PORT=7860, SFTLAB_LOAD_IN_4BIT=1. This folder is also a Hugging Face
Space.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import sftlab.startup.filter_warnings  # noqa: I001  (before torch)
import sftlab.startup.preload  # noqa: F401
import gradio as gr
from starlette.middleware import Middleware

from sftlab.chat.conversation import Answering, Turn, choices, column, edited_message
from sftlab.chat.conversation import history, new_turn, saved
from sftlab.chat.fair_queue import share_queue, shares_of
from sftlab.chat.limits import in_a_note, message_text, refusal, text
from sftlab.chat.options import parse_options
from sftlab.chat.page_words import BETTER, COLUMN, EXAMPLES, FAILED, FONTS
from sftlab.chat.request_filter import Gate
from sftlab.chat.sampling import Settings
from sftlab.chat.service import Lab, lab_of
from sftlab.exit_messages import mistakes_in_one_line
from sftlab.runs.run_directory import SIDES

PRIVATE = {"api_visibility": "private"}
MODEL = PRIVATE | {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
OFF = dict.fromkeys(
    ("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False
)
SAID = partial(in_a_note, gr.skip)  # refusals of a handler, in the note
QUICK = PRIVATE | {"queue": False, "show_progress": "hidden"}
CSS = Path(__file__).with_name("page.css")
DOWNLOAD, COPY = (Path(__file__).with_name(f"{name}.js") for name in ("download", "copy"))


class Page:
    """The page's handlers. A session's conversation is a list of turns."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.stops: dict[str | None, threading.Event] = {}
        self.rendered: set[str | None] = set()

    def arrive(self) -> tuple[Any, ...]:
        """Show a fresh page: the finished runs, or how to make one."""
        names = list(self.lab.runs())
        run = gr.update(choices=names, value=names[0] if names else None)
        return run, gr.update(visible=bool(names)), gr.update(visible=not names)

    def pick(self, run: str | None, side: str) -> tuple[Any, str, Any]:
        """Load a run, and show its facts and who can answer, or why it cannot be used."""
        if not run or not isinstance(run, str):
            return gr.skip(), "", gr.skip()
        try:
            chat, facts = self.lab.model(run), self.lab.page_line(run)
        except ValueError as error:
            return gr.skip(), f"**{run} cannot be used:** {error}", gr.skip()
        most, offered = chat.context, choices(chat.sides)
        limits = gr.update(maximum=most - 1, value=min(Settings.max_new_tokens, most // 2))
        asked = gr.update(choices=offered, value=side if side in offered else offered[0])
        return limits, f"<small>{facts}</small>", asked

    def busy(self, request: gr.Request) -> bool:
        """Whether the session's last message is still being answered. Only Stop works then."""
        return request.session_hash in self.stops and not self.stops[request.session_hash].is_set()

    @SAID(outputs=3, note=2)
    def send(self, request: gr.Request, box: str) -> tuple[Any, ...]:
        """Take the message out of the box. The time before it makes every pending text new."""
        if self.busy(request):
            return gr.skip(), gr.skip(), gr.skip()
        return f"{time.time()} {message_text(box)}", "", ""

    def begin(
        self,
        request: gr.Request,
        asked: str,
        turns: list[Turn],
        run: str,
        side: str,
        blind: bool,
        *settings: Any,
    ) -> tuple[Any, ...]:
        """Add a message as a new turn, and show it."""
        chosen = dict(zip(Settings.__dataclass_fields__, settings, strict=True))
        try:
            message = text(asked, "message").partition(" ")[2]
            turns = [*turns, new_turn(message, side, bool(blind), run, chosen)]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        turns[-1].markdown = request.session_hash in self.rendered
        self.stop(request)
        self.stops[request.session_hash] = threading.Event()
        shown = (gr.update(visible=False), gr.update(visible=True), gr.update(visible=False))
        return turns, *self.columns(turns), *shown

    def columns(self, turns: list[Turn]) -> tuple[Any, Any]:
        """Returns both columns. The right one is visible only where two models answer."""
        both = bool(turns) and len(turns[-1].order) > 1
        names = turns[-1].order if turns else ("conversation",)
        if both and turns[-1].hidden:
            names = ("A", "B")
        look = {"render_markdown": bool(turns) and turns[-1].markdown}
        left = gr.update(value=column(turns, 0), label=names[0], **look)
        right = column(turns, 1) if both else []
        return left, gr.update(value=right, label=names[-1], visible=both, **look)

    def answer(
        self, turns: list[Turn], system: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answers to the last turn."""
        if not turns or turns[-1].texts:
            raise gr.Error("there is no message to answer: send one", print_exception=False)
        stop, turn = self.stops.setdefault(request.session_hash, threading.Event()), turns[-1]
        yield turns, gr.skip(), gr.skip(), ""
        try:
            messages = history(turns, text(system, "system"))
            for piece, left_out in self.lab.answer(
                turn.run, messages, turn.order, Settings(**turn.settings), stop
            ):
                turn.update(piece, left_out, self.lab.adapter, self.lab.models_hash(turn.order))
                yield turns, *self.columns(turns), turn.remark()
        except ValueError as error:
            yield turns, gr.skip(), gr.skip(), f"**Not answered:** {error}"

    def end(self, request: gr.Request, box: str, turns: list[Turn]) -> tuple[Any, ...]:
        """Free the page again. A message without an answer returns to the box."""
        self.stop(request)
        if turns and not turns[-1].texts:
            box, turns = box or turns[-1].message, turns[:-1]
        votable = bool(turns) and len(turns[-1].order) > 1 and turns[-1].vote is None
        free = (gr.update(visible=True), gr.update(visible=False), gr.update(visible=votable))
        return box, turns, *self.columns(turns), *free

    def render(self, request: gr.Request, turns: list[Turn], markdown: bool) -> tuple[Any, ...]:
        """Show answers as rendered Markdown, or as they were written."""
        (self.rendered.add if markdown else self.rendered.discard)(request.session_hash)
        for turn in turns:
            turn.markdown = bool(markdown)
        return turns, *self.columns(turns)

    def example(self, request: gr.Request, chosen: gr.SelectData) -> Any:
        """Send an example prompt."""
        return gr.skip() if self.busy(request) else f"{time.time()} {chosen.value['text']}"

    def stop(self, request: gr.Request) -> None:
        """Stop the session's answer."""
        self.stops.setdefault(request.session_hash, threading.Event()).set()

    def leave(self, request: gr.Request) -> None:
        """Stop the answer of a closed tab."""
        self.stops.pop(request.session_hash, threading.Event()).set()
        self.rendered.discard(request.session_hash)

    def again(self, request: gr.Request, turns: list[Turn], seed: int) -> tuple[Any, ...]:
        """Ask the last message again, under the next seed."""
        if not turns or self.busy(request):
            return gr.skip(), gr.skip(), gr.skip()
        return f"{time.time()} {turns[-1].message}", turns[:-1], int(seed or 0) + 1

    def edit(self, request: gr.Request, turns: list[Turn], edited: gr.EditData) -> tuple[Any, ...]:
        """Ask a message that was edited. The conversation continues from there."""
        same = gr.skip(), turns, *self.columns(turns)
        if self.busy(request):
            return *same, gr.skip()
        try:
            place, asked = edited_message(edited)
        except ValueError as error:  # the page shows the edited text already
            return *same, refusal(error)
        left = turns[: place // 2]
        return f"{time.time()} {asked}", left, *self.columns(left), ""

    def undo(self, request: gr.Request, box: str, turns: list[Turn]) -> tuple[Any, ...]:
        """Take the last message back into the box."""
        if not turns or self.busy(request):
            return box, turns, *self.columns(turns), gr.skip()
        left = turns[:-1]
        return box or turns[-1].message, left, *self.columns(left), gr.update(visible=False)

    def clear(self, request: gr.Request, turns: list[Turn]) -> tuple[Any, ...]:
        """Start a new conversation."""
        turns = turns if self.busy(request) else []
        return turns, *self.columns(turns), gr.update(visible=False), ""

    @SAID(outputs=6, note=4)
    def vote(self, turns: list[Turn], system: str, choice: str) -> tuple[Any, ...]:
        """Record which answer is better, and say whose it was."""
        said = self.lab.vote(turns, text(system, "system"), choice)
        return turns, *self.columns(turns), gr.update(visible=False), said, self.lab.votes_table()

    def chat(
        self,
        message: str,
        history: list[dict[str, str]] | None = None,
        side: Answering = "tuned",
        system: str = "",
        temperature: float = Settings.temperature,
        top_p: float = Settings.top_p,
        top_k: int = Settings.top_k,
        max_new_tokens: int = Settings.max_new_tokens,
        repetition_penalty: float = Settings.repetition_penalty,
        seed: int = Settings.seed,
        run: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Answer a message as the tuned model, the start, the base model, or two of them.

        start: what the run went on from, where it has one. history: earlier messages, each with
        role and content. run: a finished run's name, by default the first one. Yields texts,
        tokens, tokens_per_s and finished (stop, length or stopped) by side as they grow, and
        first_token_s, left_out (old turns that did not fit the context), run and settings.
        """
        stop = threading.Event()
        try:
            settings = Settings(temperature, top_p, top_k, max_new_tokens, repetition_penalty, seed)
            yield from self.lab.ask(message, history, side, system, settings, run, stop)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            stop.set()


def settings_column() -> list[gr.components.Component]:
    """Returns the system instruction and the fields of `Settings`, in order."""
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
    """Build the page: chat, runs, votes, results, and the API's one endpoint."""
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
        blocks.load(page.arrive, None, [run, found, empty], js=COPY.read_text(), **QUICK)
        blocks.unload(page.leave)
        gr.api(page.chat, api_name="chat", concurrency_id="model", concurrency_limit=1)
    return blocks


def chat_tab(page: Page, blocks: gr.Blocks, run: gr.Dropdown, facts: gr.Markdown) -> None:
    """Build the chat tab and connect it to the page's handlers."""
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            shown = conversation_column()
        with gr.Column(scale=1, min_width=260):
            asked = choices(SIDES)
            side = gr.Radio(asked, value=asked[0], label="Who answers", elem_id="side")
            blind = gr.Checkbox(label="Blind: say whose answer it was after the vote")
            shown.markdown = gr.Checkbox(label="Render Markdown (else answers as written)")
            system, *settings = settings_column()
    connect_messages(page, shown, [run, side, blind, system, *settings])
    connect_votes(page, blocks, shown, system)
    run.change(page.pick, [run, side], [settings[3], facts, side], **MODEL)


def conversation_column() -> SimpleNamespace:
    """Returns the components of the conversation: both columns, votes, message box, buttons."""
    shown = SimpleNamespace(turns=gr.State([]), pending=gr.Textbox(elem_classes="off"))
    with gr.Row():
        shown.left = gr.Chatbot(label="conversation", elem_id="left", examples=EXAMPLES, **COLUMN)
        shown.right = gr.Chatbot(visible=False, elem_id="right", **COLUMN)
    with gr.Row(visible=False) as shown.ballot:
        shown.better = {
            name: gr.Button(text, size="sm", min_width=80) for name, text in BETTER.items()
        }
    shown.note = gr.Markdown(elem_id="note")
    with gr.Row():
        size = {"show_label": False, "lines": 1, "max_lines": 8, "scale": 5, "min_width": 200}
        shown.box = gr.Textbox(placeholder="Your message", elem_id="message", **size)
        shown.send = gr.Button("Send", variant="primary", scale=1, min_width=80)
        shown.stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, visible=False)
    with gr.Row():
        names = ("Retry", "Undo", "Clear", "Save")
        shown.retry, shown.undo, shown.clear, shown.save = (
            gr.Button(name, size="sm", min_width=60) for name in names
        )
    return shown


def connect_messages(page: Page, shown: SimpleNamespace, chosen: list[Any]) -> None:
    """Connect sending, answering, stopping and editing.

    `chosen` are the components of run, side, blind, system instruction and settings.
    """
    run, side, blind, system, *settings = chosen
    turns, pending, box = shown.turns, shown.pending, shown.box
    talk = [turns, shown.left, shown.right]
    begun = pending.change(
        page.begin,
        [pending, turns, run, side, blind, *settings],
        [*talk, shown.send, shown.stop, shown.ballot],
        **QUICK,
    )
    answered = begun.success(page.answer, [turns, system], [*talk, shown.note], **MODEL)
    ended = {
        "fn": page.end,
        "inputs": [box, turns],
        "outputs": [box, *talk, shown.send, shown.stop, shown.ballot],
        **QUICK,
    }
    answered.then(**ended)  # not after a failure, such as a full queue
    answered.failure(**ended).then(lambda: FAILED, None, shown.note, **QUICK)
    gr.on([shown.send.click, box.submit], page.send, box, [pending, box, shown.note], **QUICK)
    seed = settings[-1]
    shown.retry.click(page.again, [turns, seed], [pending, turns, seed], **QUICK)
    edits = [shown.left.edit, shown.right.edit]
    gr.on(edits, page.edit, turns, [pending, *talk, shown.note], **QUICK)
    shown.stop.click(page.stop, None, None, **QUICK)
    shown.markdown.change(page.render, [turns, shown.markdown], talk, **QUICK)
    shown.left.example_select(page.example, None, pending, **QUICK)
    shown.undo.click(page.undo, [box, turns], [box, *talk, shown.ballot], **QUICK)
    clears = [shown.clear.click, shown.left.clear, shown.right.clear]
    gr.on(clears, page.clear, turns, [*talk, shown.ballot, shown.note], **QUICK)


def connect_votes(
    page: Page, blocks: gr.Blocks, shown: SimpleNamespace, system: gr.Textbox
) -> None:
    """Connect saving a conversation, voting and the table of votes below."""
    file, ballots = gr.Textbox(elem_classes="off"), gr.Markdown(elem_classes="tables")
    talk = [shown.turns, system]
    written = shown.save.click(
        lambda *given: json.dumps(saved(*given), indent=2), talk, file, **QUICK
    )
    written.then(None, file, None, js=DOWNLOAD.read_text(), api_visibility="private")
    after = [shown.turns, shown.left, shown.right, shown.ballot, shown.note, ballots]
    for name, button in shown.better.items():
        button.click(partial(page.vote, choice=name), talk, after, **QUICK)
    blocks.load(page.lab.votes_table, None, ballots, **QUICK)


def main(argv: list[str]) -> None:
    """Read the options, load the model, serve until Ctrl-C or SIGTERM."""
    options = parse_options(argv, __doc__.splitlines()[0])
    lab = lab_of(options)
    listen = options.listen or "SPACE_ID" in os.environ
    for warning in lab.warnings(listen, bool(options.auth)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"chat on http://localhost:{options.port}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks = build(Page(lab)).queue(max_size=options.queue, api_open=False)
    share_queue(blocks._queue, MODEL["concurrency_id"], shares_of(options.queue), gr.EventData)
    blocks.launch(
        server_name="0.0.0.0" if listen else "127.0.0.1",
        server_port=options.port,
        auth=options.auth,
        theme=gr.themes.Default(**FONTS),
        css=CSS.read_text(),
        footer_links=["api", "settings"],
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(Gate, local_only=not listen)]},
        **OFF,
    )
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("closing", flush=True)
        lab.close()
        # a normal exit would wait for open pages, and two seconds for the interpreter
        os._exit(0)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
