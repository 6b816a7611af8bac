"""The chat app as its users meet it:

the server in a process of its own, called through its API and by hand.
"""

import json
import os
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from conftest import ROOT, load_script, read
from serving import serve, waits_for

from sftlab.chat import votes
from sftlab.chat.conversation import Turn, column, history, inert, saved
from sftlab.chat.engine import Chat, Piece, Settings
from sftlab.chat.options import parse_options
from sftlab.chat.request_filter import accounts
from sftlab.chat.service import Lab

pytest.importorskip("gradio", reason="gradio is not installed")
from gradio_client import Client


@pytest.fixture
def app():
    return load_script("app/app.py")


def test_the_api_answers_as_both_sides_with_the_settings(client):
    asked = {"side": "both", "temperature": 1.0, "max_new_tokens": 12, "seed": 3, "run": "second"}
    one = client.predict("Repeat the number 5 in words.", **asked, api_name="/chat")
    assert set(one["texts"]) == {"base", "tuned"}
    assert one["run"] == "second"
    assert one["settings"] == vars(Settings(temperature=1.0, max_new_tokens=12, seed=3))
    again = client.predict("Repeat the number 5 in words.", **asked, api_name="/chat")
    other = client.predict(
        "Repeat the number 5 in words.", **(asked | {"seed": 4}), api_name="/chat"
    )
    assert one["texts"] == again["texts"] != other["texts"]


def test_the_api_is_documented_by_one_endpoint(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"message": "x" * 600}, r"\d+ tokens .* 512 positions"),
        ({"message": " "}, "the message is empty"),
        ({"message": 5}, "message is a number: expected a text"),
        ({"message": "x" * 300_000}, "300,000 characters: at most 200,000"),
        ({"history": [{"role": "root", "content": "x"}]}, r"history\[0\].role is 'root'"),
        ({"history": "abc"}, "history is a str: expected a list"),
        ({"side": ["base"]}, "side .*expected base, tuned or both"),
        ({"system": 5}, "system is a number"),
        ({"run": {"a": 1}}, "no finished run"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_k": 10**320}, "top_k must be"),
        ({"run": "../first"}, "no finished run"),
        ({"run": "failed"}, "no finished run"),
        ({"run": "broken"}, "broken.*does not load"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(server, client, asked, words):
    with pytest.raises(Exception, match=words):
        client.predict(**({"message": "Hello", "max_new_tokens": 5} | asked), api_name="/chat")
    assert "Traceback" not in server.said()


def test_old_turns_are_left_out_where_the_context_is_full(client):
    turns = [
        {"role": role, "content": role * 20} for _ in range(4) for role in ("user", "assistant")
    ]
    found = client.predict(
        "And now?", history=turns, max_new_tokens=20, temperature=0, api_name="/chat"
    )
    assert found["left_out"] >= 1
    assert found["tokens"]["tuned"] >= 1


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api//file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/file={run}/run.json",
        "/gradio_api/file={run}/adapter/tokenizer.json",
        "/gradio_api/file=http://localhost:1/x",
        "/gradio_api/proxy=http://localhost:1/x",
        "/static/../../../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/svelte/../../../../etc/passwd",
        "/monitoring",
        "/gradio_api/custom_component/../../../etc/passwd",
        "/gradio_api/run-history/records",
        "/gradio_api/deep_link",
    ],
)
def test_no_file_can_be_read_through_the_server(server, offered, path):
    host, port = server.url.removeprefix("http://").split(":")
    asked = f"GET {path.format(run=offered / 'first')} HTTP/1.1"
    request = f"{asked}\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(
        (host, int(port)), timeout=10
    ) as connection:  # as it is: clients tidy paths
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"403", b"404", b"400"), answer[:300]
    assert b"root:" not in answer
    assert b"succeeded" not in answer


def test_files_cannot_be_uploaded_and_the_queue_cannot_be_passed_by(server):
    assert httpx.post(f"{server.url}/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert (
        httpx.post(f"{server.url}/gradio_api/run/chat", json={"data": ["hello"]}).status_code == 404
    )


def test_other_hosts_are_neither_answered_nor_asked(server):
    assert httpx.get(server.url, headers={"host": "evil.example"}).status_code == 403
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'self' data: blob:" in policy
    assert "http" not in policy


def test_eight_clients_at_once_get_their_own_answers(server, offered):
    """40 messages, 5 of each client:

    every reply is the engine's to that prompt, and the memory stays.
    """
    chat, steered = Chat(offered / "first"), {"max_new_tokens": 24, "temperature": 1.0}

    def engine(number: int) -> str:
        said = [{"role": "user", "content": f"Repeat the number {number} in words."}]
        settings = Settings(**steered, seed=number)
        return list(chat.reply(said, ("tuned",), settings, threading.Event()))[-1].texts["tuned"]

    def ask(which: Client, number: int) -> str:
        message = f"Repeat the number {number} in words."
        return which.predict(message, **steered, seed=number, api_name="/chat")["texts"]["tuned"]

    expected = {number: engine(number) for number in range(40)}
    assert len(set(expected.values())) > 35
    clients = [Client(server.url, verbose=False) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, clients, range(8)))
        before = server.memory()
        started = time.perf_counter()
        parts = list(
            threads.map(
                lambda i: {n: ask(clients[i], n) for n in range(i * 5, i * 5 + 5)}, range(8)
            )
        )
        seconds = time.perf_counter() - started
    after = server.memory()
    assert {number: text for part in parts for number, text in part.items()} == expected
    print(
        f"40 messages in {seconds:.1f} s; memory {before / 1024:.1f} MB before, {after / 1024:.1f} "
        "MB after"
    )
    assert abs(after / before - 1) < 0.05


def test_a_full_queue_says_so_and_a_client_that_leaves_ends_its_answer(slow):
    client = Client(slow.url, verbose=False)
    jobs = [client.submit(f"message {n}", max_new_tokens=15, api_name="/chat") for n in range(6)]
    full, answered = 0, []
    for number, job in enumerate(jobs):
        try:
            answered.append((number, job.result(timeout=30)))
        except Exception as error:
            assert "ueue is full" in str(error)
            full += 1
    assert full >= 3
    assert answered
    assert all(found["texts"]["tuned"].startswith(f"heard message {n} ") for n, found in answered)

    job = client.submit("long", max_new_tokens=2000, api_name="/chat")
    assert waits_for(job.outputs)
    job.cancel()
    assert waits_for(lambda: "ended" in slow.last_answer())
    last = slow.last_answer()
    assert last["history"][-1]["content"] == "long"
    assert last["step"] - last["stopped_at"] <= 1
    assert last["step"] < 1000


def test_passwords_and_an_end_in_the_middle_of_an_answer(offered, tmp_path):
    """A server of its own: accounts from a file, other machines served, ended by Ctrl-C while it
    answers.
    """
    (tmp_path / "accounts").write_text("ann:secret\nbob:other\n")
    arguments = ("--auth", str(tmp_path / "accounts"), "--listen", "--run", str(offered / "first"))
    with serve(tmp_path, *arguments) as running:
        assert "warning: anyone who reaches this machine" in running.said()
        assert httpx.get(f"{running.url}/config").status_code == 401
        assert (
            httpx.post(
                f"{running.url}/login", data={"username": "ann", "password": "wrong"}
            ).status_code
            == 400
        )
        with pytest.raises(Exception, match=r"[Aa]uth|credentials|401"):
            Client(running.url, verbose=False)
        bob = Client(running.url, auth=("bob", "other"), verbose=False)
        job = bob.submit("Hello", max_new_tokens=400, repetition_penalty=2, api_name="/chat")
        assert waits_for(job.outputs)
        started = time.monotonic()
        assert running.interrupt() == 0
        assert time.monotonic() - started < 3
        assert job.outputs()[-1]["tokens"]["tuned"] < 400


def test_without_a_run_the_page_says_how_to_make_one(app, tmp_path):
    page = app.Page(Lab(tmp_path, None, tmp_path, None, False))
    _, found, empty = page.arrive()
    assert (found["visible"], empty["visible"]) == (False, True)
    assert "make demo" in page.lab.without_runs()
    assert "no report yet" in page.lab.report()


def test_a_run_that_cannot_be_used_is_said_on_the_page(app, offered):
    page = app.Page(Lab(offered, None, offered, None, False))
    assert set(page.lab.runs()) == {"first", "second", "broken"}
    said = page.pick("broken")[1]
    assert said.startswith("**broken cannot be used:**")
    assert "does not load" in said
    slider, facts = page.pick("first")
    assert slider["maximum"] == 511
    assert "rank 16" in facts


def test_one_model_is_in_memory(offered, tmp_path):
    lab = Lab(offered, None, tmp_path, None, False)
    first = lab.model("first")
    assert lab.model("first") is first
    weights = weakref.ref(first._model)
    settings = Settings(0, max_new_tokens=400)
    answer = lab.answer(
        "first", [{"role": "user", "content": "Hello"}], ("base",), settings, threading.Event()
    )
    next(answer)
    second = lab.model("second")
    assert weights() is None
    assert list(answer)[-1][0].finished == {"base": "stopped"}
    assert isinstance(second, Chat)
    lab.close()
    with pytest.raises(ValueError, match="closed"):
        list(
            second.reply(
                [{"role": "user", "content": "Hello"}], ("base",), settings, threading.Event()
            )
        )


class Recorder:
    """In a model's place: what reaches it, two pieces."""

    context, mixed = 100, True

    def __init__(self, folder, load_in_4bit=False, trusted=False):
        self.run, self.asked, self.four = read(folder), [], load_in_4bit

    def fit(self, history, most, stop=None):
        return history, 1

    def close(self):
        pass

    def reply(self, history, sides, settings, stop):
        self.asked.append((history, sides, settings))
        for end in (None, "stop"):
            each = {side: f"{side} says" for side in sides}
            yield Piece(
                each,
                dict.fromkeys(sides, 2),
                dict.fromkeys(sides, 9.0),
                0.1,
                dict.fromkeys(sides, end),
            )


@pytest.fixture
def page(app, offered, tmp_path, monkeypatch):
    monkeypatch.setattr("sftlab.chat.service.Chat", Recorder)
    return app.Page(Lab(offered, offered / "second", offered, tmp_path / "votes.jsonl", True))


def test_the_pages_settings_reach_the_model(page):
    request = SimpleNamespace(session_hash="one")
    settings = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
        "seed": 11,
    }
    turns, *_ = page.begin(request, "0.5 Hello", [], "second", "both", True, *settings.values())
    *_, last = page.answer(turns, "Be brief.", request)
    chat = page.lab.model("second")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert chat.asked == [(asked, ("base", "tuned"), Settings(**settings))]
    assert chat.four
    assert "oldest turn was left out" in last[-1]
    asked, turns, seed = page.again(request, turns, settings["seed"])
    assert (asked.partition(" ")[2], turns, seed) == ("Hello", [], 12)
    turns, *_ = page.begin(
        request, "0.5 Hello", [], "second", "both", True, *(settings | {"seed": None}).values()
    )
    assert "seed must be a whole number" in list(page.answer(turns, "", request))[-1][-1]


def test_a_message_waits_for_the_one_before(app, page):
    request, nothing = SimpleNamespace(session_hash="one"), app.gr.skip()
    turns, *_ = page.begin(
        request, "0.5 Hello", [], "second", "tuned", False, *vars(Settings()).values()
    )
    assert page.send(request, "And?") == (nothing, nothing)
    assert page.clear(request, turns)[0] == turns
    box, turns, *_ = page.end(request, "", turns)  # what had no answer returns to the box
    assert (box, turns) == ("Hello", [])
    assert page.send(request, "  ") == (nothing, nothing)
    assert page.send(request, "And?")[0].endswith(" And?")
    page.leave(request)
    assert page.stops == {}


def test_a_run_trained_anew_is_loaded_anew_and_votes_name_the_adapter_that_answered(page, offered):
    request = SimpleNamespace(session_hash="one")
    turns, *_ = page.begin(
        request, "0.5 Hello", [], "second", "both", True, *vars(Settings(seed=5)).values()
    )
    list(page.answer(turns, "", request))
    answered, before = page.lab.adapter, page.lab.model("second")
    weights, record = (
        offered / "second" / "adapter" / "adapter_model.safetensors",
        offered / "second" / "run.json",
    )
    old, times = weights.read_bytes(), (record.stat().st_atime_ns, record.stat().st_mtime_ns)
    try:
        weights.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        os.utime(record, ns=(times[0], times[1] + 10**9))
        page.vote(turns, "", "left")
        assert votes.read(page.lab.ballot).votes[-1]["adapter_hash"] == answered
        assert page.lab.model("second") is not before
        assert page.lab.adapter != answered
    finally:
        weights.write_bytes(old)
        os.utime(record, ns=times)


def test_models_that_answer_one_after_the_other_do_so_in_the_drawn_order(page):
    chat = page.lab.model("second")
    for mixed, order in ((True, ("base", "tuned")), (False, ("tuned", "base"))):
        chat.mixed = mixed
        list(page.lab.answer("second", [], ("tuned", "base"), Settings(), threading.Event()))
        assert chat.asked[-1][1] == order


@pytest.mark.parametrize(
    "said, means", [("0", False), ("false", False), ("1", True), ("yes", True)]
)
def test_switches_in_the_environment_mean_what_they_say(monkeypatch, said, means, capsys):
    monkeypatch.setenv("SFTLAB_LISTEN", said)
    monkeypatch.setenv("SFTLAB_PORT", "7999")
    options = parse_options([], "app")
    assert (options.listen, options.load_in_4bit, options.port) == (means, False, 7999)
    monkeypatch.setenv("SFTLAB_LISTEN", "perhaps")
    with pytest.raises(SystemExit):
        parse_options([], "app")
    said = capsys.readouterr().err
    assert "--listen" in said and "got perhaps but expected one of yes/no" in said
    assert parse_options(["--listen"], "app").listen


def test_a_password_may_have_blanks(tmp_path):
    (tmp_path / "accounts").write_text("ann:my secret\n\nbob:a b:c\n")
    assert accounts(str(tmp_path / "accounts")) == [("ann", "my secret"), ("bob", "a b:c")]


def test_a_vote_keeps_both_texts_and_the_settings(page):
    request = SimpleNamespace(session_hash="one")
    turns, *_ = page.begin(
        request, "0.5 Hello", [], "second", "both", True, *vars(Settings(seed=5)).values()
    )
    list(page.answer(turns, "", request))
    left = turns[0].order[0]
    assert turns[0].footnote(left) == "answer A"
    assert "tuned" not in json.dumps(saved(turns, "")["turns"][0]["order"])
    page.vote(turns, "", "left")
    [vote] = votes.read(page.lab.ballot).votes
    assert vote["vote"] == left
    assert vote["texts"] == {"base": "base says", "tuned": "tuned says"}
    assert vote["settings"]["seed"] == 5
    assert vote["order"] == list(turns[0].order)
    assert (vote["run"], vote["blind"], len(vote["adapter_hash"])) == ("second", True, 16)
    assert turns[0].footnote(left).startswith(f"{left} · 2 tokens · 9.0 tokens/s")
    assert "| second | blind |" in page.lab.votes_table()


def test_the_hidden_order_is_random(page):
    request = SimpleNamespace(session_hash="one")
    settings = vars(Settings()).values()
    orders = {
        page.begin(request, "0.5 Hi", [], "second", "both", True, *settings)[0][0].order
        for _ in range(50)
    }
    assert orders == {("base", "tuned"), ("tuned", "base")}
    assert page.begin(request, "0.5 Hi", [], "second", "both", False, *settings)[0][0].order == (
        "base",
        "tuned",
    )


def test_the_table_of_votes_has_wilsons_interval(tmp_path):
    ballot = tmp_path / "votes.jsonl"
    for vote in ["tuned"] * 8 + ["base"] * 2 + ["tie"]:
        votes.cast(ballot, vote, run="x", adapter_hash="a", blind=True)
    votes.cast(ballot, "tie", run="x", adapter_hash="a", blind=False)
    with pytest.raises(ValueError, match="expected one of"):
        votes.cast(ballot, "left", run="x")
    opened, blind = votes.summary(votes.read(ballot).votes)
    assert (blind["base"], blind["tuned"], blind["tie"], blind["won"]) == (2, 8, 1, 0.8)
    assert blind["interval_95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert opened["interval_95"] is None


def test_the_conversation_goes_on_from_the_better_answer():
    first = Turn(
        "one", ("base", "tuned"), False, "x", {"seed": 0}, texts={"base": "B", "tuned": "T"}
    )
    turns = [first, Turn("two", ("tuned",), False, "x", {"seed": 0})]
    assert [m["content"] for m in history(turns, " ")] == ["one", "T", "two"]
    first.vote = "base"
    assert [m["content"] for m in history(turns, "S")] == ["S", "one", "B", "two"]
    blind = Turn(
        "one",
        ("base", "tuned"),
        True,
        "x",
        {"seed": 0},
        {"base": "", "tuned": "T"},
        finished={"base": "stop"},
    )
    assert blind.goes_on == "base"
    assert column([blind], 0)[1]["content"][0]["text"] == "*(an empty answer)*"


def test_an_answer_stopped_while_it_waited_gives_its_message_back(page):
    turn = Turn("Hello", ("tuned",), False, "x", {"seed": 0})
    turn.update(Piece({"tuned": ""}, {"tuned": 0}, {"tuned": 0.0}, 0.0, {"tuned": "stopped"}), 0)
    assert page.end(SimpleNamespace(session_hash="one"), "", [turn])[:2] == ("Hello", [])


def test_html_is_shown_not_rendered():
    assert inert("a < b <script>x</script>") == "a < b &lt;script>x&lt;/script>"
    assert inert("`<b>` <b>\n```\n<i>\n```\n<i>") == "`<b>` &lt;b>\n```\n<i>\n```\n&lt;i>"


def test_the_space_needs_the_versions_that_were_tested():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = [
        x
        for x in (ROOT / "app" / "requirements.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert needed
    assert not [line for line in needed if line not in lines]
    front = (ROOT / "app" / "README.md").read_text().split("---")[1]
    [gradio] = [line for line in lines if line.startswith("gradio==")]
    assert f"sdk_version: {gradio.removeprefix('gradio==')}" in front
    assert "app_file: app.py" in front
