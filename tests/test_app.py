"""The chat app as its users meet it: the server in a process of its own, called through its API and by hand."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import ROOT, copy_of, load_script, read
from gradio_client import Client

from sftlab import votes
from sftlab.chat import Piece, Settings
from sftlab.conversation import Turn, column, history, inert, saved
from sftlab.lab import Lab
from sftlab.run import write_json

# The app with a model that takes its time, repeats the message, and writes down what reaches it.
SLOW = """
import json, os, runpy, sys, time
from sftlab import lab
from sftlab.chat import Piece
from sftlab.run import read_run

def log(**what):
    with open(os.environ["SLOW_LOG"], "a") as file:
        file.write(json.dumps(what) + chr(10))

class Slow:
    context = 512
    def __init__(self, folder, load_in_4bit=False):
        self.run = read_run(folder)
    def fit(self, history, most):
        return history, 0
    def close(self):
        pass
    def reply(self, history, sides, settings, stop):
        log(history=history, sides=sides, settings=vars(settings))
        step, how = 0, "closed"
        try:
            while not stop.is_set() and step < settings.max_new_tokens:
                time.sleep(0.02)
                step += 1
                how = "length" if step == settings.max_new_tokens else "stopped" if stop.is_set() else None
                text = "heard " + history[-1]["content"] + " " + "word " * step
                each = lambda value: dict.fromkeys(sides, value)
                yield Piece(each(text), each(step), each(50.0), 0.02, each(how))
        finally:
            log(ended=how or "closed", step=step)

lab.Chat = Slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A running app: where it listens, its process, what it said."""

    def __init__(self, process: subprocess.Popen, port: int, said: Path) -> None:
        self.url, self.process, self.said = f"http://127.0.0.1:{port}", process, said

    def memory(self) -> int:
        """Resident kilobytes."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1])


@contextlib.contextmanager
def serve(folder: Path, *arguments: str, slow: Path | None = None):
    """`python app/app.py ARGUMENTS` on a free port, its output in `folder`; `slow` is where the slow model logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [str(ROOT / "app" / "app.py")]
    if slow:
        (folder / "slow.py").write_text(textwrap.dedent(SLOW))
        script = [str(folder / "slow.py"), *script]
    said = folder / "said.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "SLOW_LOG": str(slow)}
    command = [sys.executable, *script, "--port", str(port), *arguments]
    with said.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
                break
            assert process.poll() is None, said.read_text()[-2000:]
            time.sleep(0.1)
        yield Server(process, port, said)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def offered(finished, tmp_path_factory) -> Path:
    """A folder of runs: first, second, broken (its adapter cut short) and one that failed."""
    folder = tmp_path_factory.mktemp("offered")
    for name in ("first", "second", "broken", "failed"):
        (folder / name).mkdir()
        copy_of(finished[0], folder / name)
    weights = folder / "broken" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    write_json(folder / "failed" / "run.json", read(folder / "failed") | {"status": "failed"})
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text('{"status": "succee')
    return folder


@pytest.fixture(scope="session")
def server(offered, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), "--run", str(offered / "first")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> Client:
    return Client(server.url, verbose=False)


@pytest.fixture
def app():
    return load_script("app/app.py")


def said(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_the_api_answers_as_both_sides_with_the_settings(client):
    asked = {"side": "both", "temperature": 1.0, "max_new_tokens": 12, "seed": 3, "run": "second"}
    one = client.predict("Repeat the number 5 in words.", **asked, api_name="/chat")
    assert set(one["texts"]) == {"base", "tuned"}
    assert one["run"] == "second"
    assert one["settings"] == vars(Settings(temperature=1.0, max_new_tokens=12, seed=3))
    again = client.predict("Repeat the number 5 in words.", **asked, api_name="/chat")
    other = client.predict("Repeat the number 5 in words.", **(asked | {"seed": 4}), api_name="/chat")
    assert one["texts"] == again["texts"] != other["texts"]


def test_the_api_is_documented_by_one_endpoint(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/chat"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"message": "x" * 600}, r"\d+ tokens .* 512 positions"),
        ({"run": "../first"}, "no finished run"),
        ({"run": "failed"}, "no finished run"),
        ({"run": "broken"}, "broken.*does not load"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(server, client, asked, words):
    with pytest.raises(Exception, match=words):
        client.predict(**({"message": "Hello", "max_new_tokens": 5} | asked), api_name="/chat")
    assert "Traceback" not in server.said.read_text()


def test_old_turns_are_left_out_where_the_context_is_full(client):
    turns = [{"role": role, "content": role * 20} for _ in range(4) for role in ("user", "assistant")]
    found = client.predict("And now?", history=turns, max_new_tokens=20, temperature=0, api_name="/chat")
    assert found["left_out"] >= 1
    assert found["tokens"]["tuned"] >= 1


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/file=/etc/passwd",
        "/gradio_api/file%3D/etc/passwd", "/gradio_api//file=/etc/passwd", "/gradio_api/file/etc/passwd",
        "/gradio_api/file={run}/run.json", "/gradio_api/file={run}/adapter/tokenizer.json",
        "/gradio_api/file=http://localhost:1/x", "/gradio_api/proxy=http://localhost:1/x",
        "/static/../../../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd", "/svelte/../../../../etc/passwd", "/monitoring",
        "/gradio_api/custom_component/../../../etc/passwd", "/gradio_api/run-history/records", "/gradio_api/deep_link",
    ],
)  # fmt: skip
def test_no_file_can_be_read_through_the_server(server, offered, path):
    host, port = server.url.removeprefix("http://").split(":")
    request = (
        f"GET {path.format(run=offered / 'first')} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:  # as it is: clients tidy paths
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split()[1] in (b"403", b"404", b"400"), answer[:300]
    assert b"root:" not in answer
    assert b"succeeded" not in answer


def test_files_cannot_be_uploaded_and_the_queue_cannot_be_passed_by(server):
    assert httpx.post(f"{server.url}/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert httpx.post(f"{server.url}/gradio_api/run/chat", json={"data": ["hello"]}).status_code == 404


def test_other_hosts_are_neither_answered_nor_asked(server):
    assert httpx.get(server.url, headers={"host": "evil.example"}).status_code == 403
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'self' data: blob:" in policy
    assert "http" not in policy


def test_eight_clients_at_once_get_their_own_answers(server, client):
    """40 messages, 5 of each client: every reply is that of its prompt, and the memory stays."""

    def ask(which: Client, number: int) -> str:
        asked = {"max_new_tokens": 24, "temperature": 1.0, "seed": number}
        return which.predict(f"Repeat the number {number} in words.", **asked, api_name="/chat")["texts"]["tuned"]

    expected = {number: ask(client, number) for number in range(40)}
    assert len(set(expected.values())) > 35
    clients = [Client(server.url, verbose=False) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        before = server.memory()
        started = time.perf_counter()
        parts = list(threads.map(lambda i: {n: ask(clients[i], n) for n in range(i * 5, i * 5 + 5)}, range(8)))
        seconds = time.perf_counter() - started
    after = server.memory()
    assert {number: text for part in parts for number, text in part.items()} == expected
    print(f"40 messages in {seconds:.1f} s; memory {before / 1024:.0f} MB before, {after / 1024:.0f} MB after")
    assert abs(after / before - 1) < 0.05


def test_auth_a_full_queue_and_a_client_that_leaves(offered, tmp_path):
    """One server of its own: passwords from a file, one place to wait, a slow model, other machines served."""
    (tmp_path / "accounts").write_text("ann:secret\nbob:other\n")
    log = tmp_path / "slow.jsonl"
    arguments = ("--auth", str(tmp_path / "accounts"), "--queue", "1", "--listen", "--runs", str(offered))
    with serve(tmp_path, *arguments, slow=log) as running:
        assert "warning: anyone who reaches this machine" in running.said.read_text()
        assert httpx.get(f"{running.url}/config").status_code == 401
        assert httpx.post(f"{running.url}/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        with pytest.raises(Exception, match=r"[Aa]uth|credentials|401"):
            Client(running.url, verbose=False)
        ann = Client(running.url, auth=("bob", "other"), verbose=False)
        jobs = [ann.submit(f"message {n}", max_new_tokens=100, api_name="/chat") for n in range(6)]
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

        job = ann.submit("long", max_new_tokens=2000, api_name="/chat")
        while not job.outputs():
            time.sleep(0.05)
        job.cancel()
        assert waits_for(lambda: "ended" in said(log)[-1])
        assert said(log)[-1]["step"] < 1000


def waits_for(true, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


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


class Recorder:
    """In a model's place: what reaches it, two pieces."""

    context = 100

    def __init__(self, folder, load_in_4bit=False):
        self.run, self.asked, self.four = read(folder), [], load_in_4bit

    def fit(self, history, most):
        return history, 1

    def reply(self, history, sides, settings, stop):
        self.asked.append((history, sides, settings))
        for end in (None, "stop"):
            each = {side: f"{side} says" for side in sides}
            yield Piece(each, dict.fromkeys(sides, 2), dict.fromkeys(sides, 9.0), 0.1, dict.fromkeys(sides, end))


@pytest.fixture
def page(app, offered, tmp_path, monkeypatch):
    monkeypatch.setattr("sftlab.lab.Chat", Recorder)
    return app.Page(Lab(offered, offered / "second", offered, tmp_path / "votes.jsonl", True))


def test_the_pages_settings_reach_the_model(page):
    request = SimpleNamespace(session_hash="one")
    settings = {"temperature": 0, "top_p": 0.5, "top_k": 7, "max_new_tokens": 9, "repetition_penalty": 1.2, "seed": 11}
    turns, *_ = page.begin(request, "0.5 Hello", [], "second", "both", True, *settings.values())
    *_, last = page.answer(turns, "Be brief.", request)
    chat = page.lab.model("second")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert chat.asked == [(asked, ("base", "tuned"), Settings(**settings))]
    assert chat.four
    assert "oldest turn was left out" in last[-1]
    asked, turns, seed = page.again(request, turns, settings["seed"])
    assert (asked.partition(" ")[2], turns, seed) == ("Hello", [], 12)
    turns, *_ = page.begin(request, "0.5 Hello", [], "second", "both", True, *(settings | {"seed": None}).values())
    assert "seed must be a whole number" in list(page.answer(turns, "", request))[-1][-1]


def test_a_message_waits_for_the_one_before(app, page):
    request, nothing = SimpleNamespace(session_hash="one"), app.gr.skip()
    turns, *_ = page.begin(request, "0.5 Hello", [], "second", "tuned", False, *vars(Settings()).values())
    assert page.send(request, "And?") == (nothing, nothing)
    assert page.clear(request, turns)[0] == turns
    box, turns, *_ = page.end(request, "", turns)  # what had no answer returns to the box
    assert (box, turns) == ("Hello", [])
    assert page.send(request, "  ") == (nothing, nothing)
    assert page.send(request, "And?")[0].endswith(" And?")
    page.leave(request)
    assert page.stops == {}


def test_a_vote_keeps_both_texts_and_the_settings(page):
    request = SimpleNamespace(session_hash="one")
    turns, *_ = page.begin(request, "0.5 Hello", [], "second", "both", True, *vars(Settings(seed=5)).values())
    list(page.answer(turns, "", request))
    left = turns[0].order[0]
    assert turns[0].footnote(left) == "answer A"
    assert "tuned" not in json.dumps(saved(turns, "")["turns"][0]["order"])
    page.vote(turns, "", "left")
    [vote] = votes.read(page.lab.ballot)
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
    orders = {page.begin(request, "0.5 Hi", [], "second", "both", True, *settings)[0][0].order for _ in range(50)}
    assert orders == {("base", "tuned"), ("tuned", "base")}
    assert page.begin(request, "0.5 Hi", [], "second", "both", False, *settings)[0][0].order == ("base", "tuned")


def test_the_table_of_votes_has_wilsons_interval(tmp_path):
    ballot = tmp_path / "votes.jsonl"
    for vote in ["tuned"] * 8 + ["base"] * 2 + ["tie"]:
        votes.cast(ballot, vote, run="x", adapter_hash="a", blind=True)
    votes.cast(ballot, "tie", run="x", adapter_hash="a", blind=False)
    with pytest.raises(ValueError, match="expected one of"):
        votes.cast(ballot, "left", run="x")
    opened, blind = votes.summary(votes.read(ballot))
    assert (blind["base"], blind["tuned"], blind["tie"], blind["won"]) == (2, 8, 1, 0.8)
    assert blind["interval_95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert opened["interval_95"] is None
    ballot.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no vote"):
        votes.read(ballot)


def test_the_conversation_goes_on_from_the_better_answer():
    first = Turn("one", ("base", "tuned"), False, "x", {"seed": 0}, texts={"base": "B", "tuned": "T"})
    turns = [first, Turn("two", ("tuned",), False, "x", {"seed": 0})]
    assert [m["content"] for m in history(turns, " ")] == ["one", "T", "two"]
    first.vote = "base"
    assert [m["content"] for m in history(turns, "S")] == ["S", "one", "B", "two"]
    blind = Turn(
        "one", ("base", "tuned"), True, "x", {"seed": 0}, {"base": "", "tuned": "T"}, finished={"base": "stop"}
    )
    assert blind.goes_on == "base"
    assert column([blind], 0)[1]["content"][0]["text"] == "*(an empty answer)*"


def test_html_is_shown_not_rendered():
    assert inert("a < b <script>x</script>") == "a < b &lt;script>x&lt;/script>"
    assert inert("`<b>` <b>\n```\n<i>\n```\n<i>") == "`<b>` &lt;b>\n```\n<i>\n```\n&lt;i>"


def test_the_space_needs_the_versions_that_were_tested():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = [x for x in (ROOT / "app" / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert needed
    assert not [line for line in needed if line not in lines]
    front = (ROOT / "app" / "README.md").read_text().split("---")[1]
    [gradio] = [line for line in lines if line.startswith("gradio==")]
    assert f"sdk_version: {gradio.removeprefix('gradio==')}" in front
    assert "app_file: app.py" in front


def test_the_model_is_loaded_anew_for_another_run_alone(page):
    one = page.lab.model("second")
    assert page.lab.model("second") is one
    one.close = threading.Event().set
    assert page.lab.model("first") is not one
