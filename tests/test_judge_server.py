"""A judge behind a server is asked greedily, and keeps its answers when the server dies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from judging import prompt

from sftlab.evaluation.answer_file import AnswerFile
from sftlab.judging import judges as judging
from sftlab.judging.asking import ask
from sftlab.judging.judges import ServerJudge

PLAIN = [{"role": "user", "content": "Which is better?"}]


class Server:
    """An OpenAI-compatible server on a thread; from `dies_at` requests on it answers 500."""

    def __init__(self, dies_at=10**6, refuses=None, garbles=None):
        self.requests, outer = [], self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(
                    200,
                    {
                        "object": "list",
                        "data": [{"id": "m", "object": "model", "max_model_len": 400}],
                    },
                )

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked)
                if refuses:
                    self.reply(400, {"error": {"message": refuses}})
                elif garbles is not None and asked["messages"][0]["content"] == "garble":
                    self.reply(200, garbles)
                elif len(outer.requests) > dies_at:
                    self.reply(500, {"error": {"message": "out of order"}})
                else:
                    text = f" judged {asked['messages'][0]['content']} [RESULT] A"
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
                    top = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
                    self.reply(200, {**top, "choices": [choice], "usage": usage})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


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
    monkeypatch.setattr(judging, "RETRIES", 1)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
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
        ):
            ask(judge, prompts, file, 3, "judging")
        assert len(file.found) == 2
