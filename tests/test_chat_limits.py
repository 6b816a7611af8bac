"""What the app's calls may hold, who may vote on what, and runs that cannot be read."""

import asyncio
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import copy_of, read
from gradio import EditData
from judging import untrained_run

from sftlab.chat.engine import Chat
from sftlab.chat.fair_queue import Shares, share_queue, shares_of
from sftlab.chat.limits import MESSAGES, check_size, conversation
from sftlab.chat.options import parse_options
from sftlab.chat.sampling import Settings
from sftlab.chat.service import Lab
from sftlab.files import write_json

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def chat(base, tmp_path_factory) -> Chat:
    return Chat(untrained_run(base, tmp_path_factory.mktemp("chat") / "run"))


@pytest.mark.parametrize(
    "message, history, system, named",
    [
        (None, None, "", "message is empty"),
        (" \n", [], "", "message is empty"),
        ([{"type": "text"}], [], "", "message is a list"),
        ("\ud800", [], "", "half a character"),
        ("x", "abc", "", "history is a text: expected a list of messages"),
        ("x", [1], "", r"history\[0\] is no message"),
        ("x", [{"role": "user"}], "", r"history\[0\] is no message"),
        ("x", [USER | {"role": "root"}], "", r"history\[0\].role is 'root'"),
        ("x", [USER | {"content": None}], "", "content is missing"),
        ("x", [USER | {"content": 5}], "", r"history\[0\].content is a number"),
        ("x", [USER, USER | {"role": "system"}], "", "second system message"),
        ("x", [USER | {"role": "system"}], "be brief", "second system message"),
        ("x", [], 5, "system is a number"),
    ],
)
def test_a_call_of_another_form_is_refused_in_a_sentence(message, history, system, named):
    with pytest.raises(ValueError, match=named):
        conversation(message, history, system)


def test_a_call_becomes_messages():
    assert conversation("x", None, None) == [USER | {"content": "x"}]
    assert [one["role"] for one in conversation("x", [USER], " s ")] == ["system", "user", "user"]


def test_sizes_are_limited_before_anything_is_done():
    check_size([USER] * MESSAGES, 512)
    with pytest.raises(ValueError, match="1,001 messages"):
        check_size([USER] * (MESSAGES + 1), 512)
    long = [USER | {"content": "x" * 300_000}]
    with pytest.raises(ValueError, match="300,000 characters: at most 200,000"):
        check_size(long, 512)
    check_size(long, 131_072)


def test_fitting_is_linear_and_drops_no_more_than_it_must(chat, monkeypatch):
    """The same turns as by trying each of them, and few prompts of bounded length."""
    asked: list[int] = []
    prompt = chat._prompt

    def seen(history: list) -> list[int]:
        ids = prompt(history)
        asked.append(len(ids))
        return ids

    monkeypatch.setattr(chat, "_prompt", seen)
    for turns, size, system in ((9, 30, False), (40, 3, True), (2, 400, False), (60, 5, False)):
        history = [{"role": "system", "content": "s" * 20}] if system else []
        for number in range(turns):
            history += [USER | {"content": "x" * (size + number % 7)}]
            history += [{"role": "assistant", "content": "y" * size}]
        history += [USER]
        asked.clear()
        kept, dropped = chat.fit(history, 20)
        assert len(asked) <= 9
        assert max(asked) < 40 * chat.context
        head = history[:1] if system else []
        starts = [i for i, one in enumerate(history) if one["role"] == "user"]
        tried = [(head + history[i:] if n else history, n) for n, i in enumerate(starts)]
        fitting = next(one for one in tried if len(prompt(one[0])) + 20 <= chat.context)
        assert (kept, dropped) == fitting
    many = [one for _ in range(400) for one in (USER | {"content": "z" * 400}, USER)]
    started = time.process_time()
    chat.fit([*many, USER], 20)
    assert time.process_time() - started < 2


def test_fitting_ends_once_it_is_stopped(chat):
    stop = threading.Event()
    stop.set()
    with pytest.raises(ValueError, match="stopped"):
        chat.fit([USER], 5, stop)


def test_a_template_that_loops_has_a_limit(chat, monkeypatch):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat._tokenizer, "chat_template", loop)
    monkeypatch.setattr("sftlab.chat.engine.TEMPLATE_S", 0.3)
    with pytest.raises(ValueError, match="chat template takes longer than"):
        chat.fit([USER], 5)
    monkeypatch.setattr(chat._tokenizer, "chat_template", "{{ 1 // 0 }}")
    with pytest.raises(ValueError, match="chat template refuses"):
        chat.fit([USER], 5)


def test_a_run_that_cannot_be_read_is_listed_with_why(untrained, tmp_path):
    for name in ("good", "five", "bare", "targets", "quality", "cut"):
        (tmp_path / name).mkdir()
        copy_of(untrained, tmp_path / name)
    record = read(untrained)

    def spoil(name: str, **changes: object) -> None:
        write_json(tmp_path / name / "run.json", record | changes)

    spoil("five", finished=5)
    spoil("bare", recipe={})
    spoil("targets", recipe=record["recipe"] | {"lora_target_modules": None, "lora_r": None})
    (tmp_path / "quality" / "eval").mkdir()
    (tmp_path / "quality" / "eval" / "quality.json").write_text('{"adapter_hash": [], "scores": 5}')
    (tmp_path / "cut" / "run.json").write_text('{"status": "succ')
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    lab = Lab(tmp_path, None, tmp_path, None, False)
    assert set(lab.runs()) == {"good", "targets", "quality"}
    table = lab.runs_table()
    for name in ("five", "bare", "cut", "folder"):
        assert f"- {name}: {tmp_path / name / 'run.json'}" in table
    assert "eval/quality.json cannot be read" in table
    assert lab.facts_line("targets")
    with pytest.raises(ValueError, match=r"run\.json: finished is 5"):
        lab.model("five")
    with pytest.raises(ValueError, match="no finished run"):
        lab.model(["good"])
    shutil.rmtree(tmp_path / "good")


def test_a_run_cannot_give_the_app_trust(untrained, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    copy_of(untrained, tmp_path / "run")
    recipe = read(untrained)["recipe"] | {"trust_remote_code": True}
    write_json(tmp_path / "run" / "run.json", read(untrained) | {"recipe": recipe})
    with pytest.raises(ValueError, match="pass --trust_remote_code on the command line"):
        Lab(tmp_path, None, tmp_path, None, False).model("run")
    monkeypatch.setenv("SFTLAB_TRUST_REMOTE_CODE", "1")
    assert not parse_options([], "app").trust_remote_code
    assert parse_options(["--trust_remote_code"], "app").trust_remote_code


@pytest.mark.parametrize(
    "argv", [["--port", "0"], ["--port", "70000"], ["--queue", "0"], ["--votes", "/nowhere/v"]]
)
def test_options_that_mean_nothing_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options(argv, "app")
    assert ended.value.code == 2
    assert "expected" in (said := capsys.readouterr().err) or "no folder" in said


def _edit(edited: EditData) -> None:
    """A function of the page that an edited message calls."""


class Queue:
    """In the place of gradio's queue: two functions, calls that never end."""

    def __init__(self) -> None:
        slow = SimpleNamespace(concurrency_id="model", inputs=[1, 2], api_name="chat", fn=None)
        quick = SimpleNamespace(concurrency_id="other", inputs=[], api_name=None, fn=None)
        edit = SimpleNamespace(concurrency_id="other", inputs=[], api_name="edit", fn=_edit)
        self.blocks = SimpleNamespace(fns={0: slow, 1: quick, 2: edit})
        self.waiting = SimpleNamespace(queue=[])
        self.event_queue_per_concurrency_id = {"model": self.waiting}
        self.active_jobs: list = [None]

    async def push(self, body, request, username):
        event = {"request": request, "username": username, "session_hash": body.session_hash}
        self.waiting.queue.append(SimpleNamespace(**event))
        return True, "id", "success"


def test_a_page_and_a_client_have_their_shares_of_the_queue():
    queue = Queue()
    share_queue(queue, "model", Shares(page=3, client=4), EditData)

    def call(
        host: str,
        username: str | None = None,
        fn: int = 0,
        data: tuple = (1, 2),
        page: str | None = None,
    ) -> tuple:
        request = SimpleNamespace(client=SimpleNamespace(host=host))
        body = SimpleNamespace(fn_index=fn, data=list(data), session_hash=page or host)
        body.event_data = None
        return asyncio.run(queue.push(body=body, request=request, username=username))

    assert [call("a")[0] for _ in range(5)] == [True, True, True, False, False]
    full = "Queue is full for you: {0} of your messages wait already, and a {1} may have {0}. "
    assert call("a")[1:] == (full.format(3, "page") + "Try again later.", "queue_full")
    assert call("a", page="a neighbour's")[0]
    assert call("a", page="a third")[1] == full.format(4, "client") + "Try again later."
    assert call("b")[0]
    assert call("a", "ann")[0]
    assert call("a", fn=1, data=())[0]
    assert call("b", data=(1,))[1] == "chat takes 2 values in data, got 1"
    assert "names no function" in call("b", fn=99)[1]
    assert (shares_of(16), shares_of(1)) == ((4, 12), (2, 2))


@pytest.mark.parametrize(
    ("event_data", "said"),
    [
        (None, "edit takes an object as event_data, got NoneType"),
        ("x", "edit takes an object as event_data, got str"),
        ({"index": 0, "value": "y"}, "edit takes previous_value in event_data, got none"),
        ({"index": 0, "value": "y", "previous_value": "x"}, "id"),
    ],
)
def test_a_call_without_its_event_is_refused_in_a_sentence(event_data, said):
    queue = Queue()
    share_queue(queue, "model", Shares(page=3, client=4), EditData)
    request = SimpleNamespace(client=SimpleNamespace(host="a"))
    body = SimpleNamespace(fn_index=2, data=[], session_hash="a", event_data=event_data)
    assert asyncio.run(queue.push(body=body, request=request, username=None))[1] == said


def test_settings_of_any_kind_are_refused_in_a_sentence():
    for bad in (float("nan"), float("inf"), "hot", None, [1], True, 10**400, -1):
        for name in ("temperature", "top_p", "repetition_penalty"):
            with pytest.raises(ValueError, match=f"{name} must be"):
                Settings(**{name: bad})
    with pytest.raises(ValueError, match="many digits"):
        Settings(seed=10**400)
    for name in ("top_k", "max_new_tokens"):  # the API's answer repeats them, in 64 bits
        with pytest.raises(ValueError, match=f"{name} must be"):
            Settings(**{name: 10**20})
