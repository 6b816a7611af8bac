"""The running app answers its API, keeps files to itself and queues its clients."""

import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, load_script
from serving import serve, waits_for

from sftlab.chat.engine import Chat
from sftlab.chat.options import parse_options
from sftlab.chat.sampling import Settings
from sftlab.chat.service import Lab

pytest.importorskip("gradio", reason="gradio is not installed")
from app_page import Recorder
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
        ({"history": "x"}, "history is a text: expected a list of messages"),
        ({"history": {}}, "history is an object: expected a list of messages"),
        ({"message": None}, "the message is empty"),
        ({"message": True}, "message is true: expected a text"),
        ({"max_new_tokens": -5}, "max_new_tokens must be a whole number of at least 1, got -5"),
        ({"side": ["base"]}, "side .*expected base, start, tuned, both"),
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


@pytest.mark.long
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
        f"40 messages in {seconds:.1f} s; memory {before / 2**20:.1f} MB before, "
        f"{after / 2**20:.1f} MB after"
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
        assert time.monotonic() - started < 10
        assert job.outputs()[-1]["tokens"]["tuned"] < 400


def test_without_a_run_the_page_says_how_to_make_one(app, tmp_path):
    page = app.Page(Lab(tmp_path, None, tmp_path, None, False))
    _, found, empty = page.arrive()
    assert (found["visible"], empty["visible"]) == (False, True)
    assert "make demo" in page.lab.without_runs()
    command = f"eval/report.py --runs {tmp_path} --out {tmp_path}"
    assert f"There is no report yet: `python {command}` makes one." in page.lab.report()
    # what the project's own runs found is never shown under a user's names
    shown = parse_options([], "").report
    assert f"| [{shown.name}]" not in (ROOT / "results" / "README.md").read_text()
    assert shown != Path("results")


def test_a_run_that_cannot_be_used_is_said_on_the_page(app, offered):
    page = app.Page(Lab(offered, None, offered, None, False))
    assert set(page.lab.runs()) == {"first", "second", "broken"}
    said = page.pick("broken", "tuned")[1]
    assert said.startswith("**broken cannot be used:**")
    assert "does not load" in said
    slider, facts, side = page.pick("first", "start and tuned")
    assert slider["maximum"] == 511
    assert "rank 16" in facts
    assert (side["choices"], side["value"]) == (
        ["base and tuned", "tuned", "base"],
        "base and tuned",
    )


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


@pytest.fixture
def page(app, offered, tmp_path, monkeypatch):
    monkeypatch.setattr("sftlab.chat.service.Chat", Recorder)
    return app.Page(Lab(offered, offered / "second", offered, tmp_path / "votes.jsonl", True))
