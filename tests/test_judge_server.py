"""A judge behind a server is asked greedily, and keeps its answers when the server dies."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from judging import prompt
from local_server import LocalServer
from serving import waits_for

from sftlab.evaluation import server_client
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.judging.asking import ask
from sftlab.judging.judge_formats import load_format
from sftlab.judging.server_judge import ServerJudge

PLAIN = [{"role": "user", "content": "Which is better?"}]


class Server(LocalServer):
    """An OpenAI-compatible server on a thread; from `dies_at` requests on it answers 500.

    `says(number)` is the message of a request, or (status, body) of a fault.
    """

    def __init__(self, dies_at=10**6, refuses=None, garbles=None, says=None, ends="stop"):
        self.requests, self.dies_at, self.refuses = [], dies_at, refuses
        self.garbles, self.says, self.ends = garbles, says, ends
        super().__init__([{"id": "m", "object": "model", "max_model_len": 400}])

    def answer(self, path, asked):
        self.requests.append(asked)
        fault = self.says(len(self.requests)) if self.says else None
        if isinstance(fault, tuple):
            return fault
        if self.refuses:
            return 400, {"error": {"message": self.refuses}}
        if self.garbles is not None and asked["messages"][0]["content"] == "garble":
            return 200, self.garbles
        if len(self.requests) > self.dies_at:
            return 500, {"error": {"message": "out of order"}}
        text = f" judged {asked['messages'][0]['content']} [RESULT] A"
        message = fault or {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self.ends}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        top = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        return 200, {**top, "choices": [choice], "usage": usage}


def test_a_server_is_asked_greedily_and_its_context_is_its_own(monkeypatch):
    with Server() as server:
        judge = ServerJudge("m", server.url, 100)
        assert judge.room == 300
        assert judge.size(prompt("x" * 30)) == 10
        texts = [one.text for one in judge.answers([prompt("one"), prompt("two")])]
        assert texts == ["judged one [RESULT] A", "judged two [RESULT] A"]
        assert {
            (one["temperature"], one["max_tokens"], one["model"]) for one in server.requests
        } == {(0, 100, "m")}
        with pytest.raises(ValueError, match="has no model 'other': it has m"):
            ServerJudge("other", server.url, 100)
        assert ServerJudge("m", "http://127.0.0.1:1/v1", 100, context=200).room == 100


def test_a_server_that_dies_in_the_middle_leaves_everything_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(server_client, "RETRIES", 1)
    monkeypatch.setattr(server_client, "FIRST_PAUSE_S", 0.01)
    prompts = [prompt(f"prompt {i}") for i in range(8)]
    with Server(dies_at=5) as server:
        judge = ServerJudge("m", server.url, 100)
        file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
        with pytest.raises(
            ValueError, match="does not answer, tried 2 times: judgements are kept"
        ) as error:
            ask(judge, prompts, file, 2, "judging")
        assert "\n" not in str(error.value)
        assert len(file.found) == 5  # the batch that it died in too
        assert len(server.requests) == 5 + 2
    with pytest.raises(ValueError, match="does not answer"):
        ask(judge, prompts, file, 2, "judging")
    with Server() as server:
        judge = ServerJudge("m", server.url, 100)
        again = AnswerFile(tmp_path, {"server": "another"}, kind="verdicts")
        again.found.update(file.found)
        assert len(ask(judge, prompts, again, 2, "judging")) == 8
        assert len(server.requests) == 3


def test_a_server_that_refuses_says_why():
    with (
        Server(refuses="too long for me") as server,
        pytest.raises(ValueError, match=r"status 400: .*too long for me"),
    ):
        ServerJudge("m", server.url, 100).answers([PLAIN])


@pytest.mark.parametrize(
    "garbled", ["<html>", {"error": "x"}, {"choices": []}, {"choices": [{"message": None}]}]
)
def test_what_is_no_completion_is_said_and_the_others_are_kept(garbled, tmp_path):
    prompts = [prompt("one"), prompt("garble"), prompt("two")]
    with Server(garbles=garbled) as server:
        judge = ServerJudge("m", server.url, 100)
        file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
        with pytest.raises(
            ValueError, match=f"what the judge's server at {server.url} answers is no completion"
        ) as error:
            ask(judge, prompts, file, 3, "judging")
        said = garbled if isinstance(garbled, str) else json.dumps(garbled)
        assert f"no completion: {said}; judgements are kept" in str(error.value)
        assert len(file.found) == 2


def test_limited_requests_are_waited_for_and_not_for_ever(monkeypatch):
    limited = (429, {"error": {"message": "slow down"}})
    with Server(says=lambda number: limited if number == 1 else None) as server:
        (answer,) = ServerJudge("m", server.url, 100).answers([PLAIN])
        assert answer.text.endswith("[RESULT] A")
    monkeypatch.setattr(server_client, "RATE_LIMITED_S", 0.05)
    with (
        Server(says=lambda number: limited) as server,
        pytest.raises(ValueError, match=r"limits requests \(status 429: .*slow down.*are kept"),
    ):
        ServerJudge("m", server.url, 100).answers([PLAIN])


def test_a_server_that_hangs_is_given_up(monkeypatch):
    def hang(number):
        time.sleep(0.5)

    with (
        Server(says=hang) as server,
        pytest.raises(ValueError, match=r"did not answer within 0.1 s, tried 2 times: judgements"),
    ):
        ServerJudge("m", server.url, 100, timeout=0.1).answers([PLAIN])


WAITS = """
import signal, sys, time
from sftlab.judging.server_judge import ServerJudge
signal.signal(signal.SIGINT, signal.default_int_handler)
judge = ServerJudge("m", sys.argv[1], 100)
print("asking", flush=True)
judge.answers([[{"role": "user", "content": "Which?"}]] * 3)
"""


@pytest.mark.long
def test_a_stop_does_not_wait_for_a_server_that_hangs():
    released = threading.Event()
    with Server(says=lambda number: released.wait(60) and None) as server:
        command = [sys.executable, "-c", WAITS, server.url]
        waiting = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        try:
            assert waiting.stdout.readline() == "asking\n"
            assert waits_for(lambda: len(server.requests) == 3)
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(10) != 0
        finally:
            waiting.kill()
            waiting.wait()
            released.set()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "[[A]]"}]}, "[[A]]"),
        ({"content": None, "reasoning_content": "[[A]]"}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": None, "tool_calls": []}, ""),
    ],
)
def test_a_message_is_its_content(message, text):
    with Server(says=lambda number: {"role": "assistant"} | message) as server:
        assert ServerJudge("m", server.url, 100).answers([PLAIN])[0].text == text


@pytest.mark.parametrize(
    ("ends", "finish"),
    [("length", "length"), ("content_filter", "content_filter"), ("stop", "stop"), (None, "stop")],
)
def test_how_a_judgement_ended_is_kept(ends, finish):
    with Server(ends=ends) as server:
        assert ServerJudge("m", server.url, 100).answers([PLAIN])[0].finish == finish


@pytest.mark.parametrize("ends", ["abort", "error"])
def test_a_judgement_that_the_server_gave_up_is_not_kept(ends, tmp_path):
    with Server(ends=ends) as server:
        judge = ServerJudge("m", server.url, 100)
        file = AnswerFile(tmp_path, judge.facts, kind="verdicts")
        with pytest.raises(ValueError, match=rf"broke a judgement off \(finish_reason '{ends}'\)"):
            ask(judge, [PLAIN], file, 2, "judging")
        assert not file.found


@pytest.mark.parametrize("bad", ["", "Error: the upstream model is overloaded"])
def test_what_is_no_judgement_is_asked_again_by_the_same_command(bad, tmp_path):
    def sick(number):
        return {"role": "assistant", "content": bad} if number <= 2 else None

    def reads(text, finish):
        return load_format("prometheus").read("pair", text, finish)

    prompts = [prompt("one"), prompt("two")]
    with Server(says=sick) as server:
        judge = ServerJudge("m", server.url, 100)
        for asked, texts in ((2, {bad}), (4, {"judged one [RESULT] A", "judged two [RESULT] A"})):
            file = AnswerFile(tmp_path, {"judge": "m"}, kind="verdicts")
            assert {one.text for one in ask(judge, prompts, file, 2, "judging", reads)} == texts
            assert len(server.requests) == asked
        ask(judge, prompts, AnswerFile(tmp_path, {"judge": "m"}, kind="verdicts"), 2, "", reads)
        assert len(server.requests) == 4
