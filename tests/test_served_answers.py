"""A server answers an evaluation: as transformers does, and with nothing lost where it fails."""

import json
from types import SimpleNamespace

import httpx
import openai
import pytest
from conftest import load_script
from model_server import ModelServer

from sftlab.data.chat_template import TurnEnd
from sftlab.evaluation import server_client
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.base_and_tuned import finished_run
from sftlab.evaluation.generation import Sampling
from sftlab.evaluation.served_answers import WORDS, Asking, ServedModels, fill_served
from sftlab.evaluation.server_client import ServerClient
from sftlab.export import agreement, server_agreement
from sftlab.judging.model_answers import Contestants

GENERATED = "/v1/completions"


@pytest.fixture(scope="module")
def quality():
    return load_script("eval/quality.py")


@pytest.fixture
def served(finished, tmp_path, monkeypatch):
    """A server of the finished run, and a copy of the run that nothing has evaluated."""
    monkeypatch.setattr(server_client, "RETRIES", 1)
    monkeypatch.setattr(server_client, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(server_agreement, "HELD_ROWS", 2)
    for module in (agreement, server_agreement):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("adapter", "run.json"):
        (run / name).symlink_to(finished[0] / name)
    with ModelServer(finished[0]) as server:
        yield server, run


def evaluate(quality, run, *more):
    quality.main(["--run", str(run), "--samples", "6", "--max_new_tokens", "8", *more])
    records = (run / "eval" / "quality.jsonl").read_text().splitlines()
    return [json.loads(line) for line in records]


def generating(server):
    """The requests for answers, without those that hold the server to transformers."""
    asked = [one for path, one in server.requests if path == GENERATED]
    return [one for one in asked if not one.get("echo")]


@pytest.mark.long
def test_a_server_gives_the_answers_of_transformers(quality, served, capsys):
    server, run = served
    here = evaluate(quality, run)
    there = evaluate(quality, run, "--server", server.url, "--server_requests", "3")
    assert there == here
    report = json.loads((run / "eval" / "quality.json").read_text())
    assert report["generation"]["server"] == server.url
    asked = generating(server)
    assert {one["model"] for one in asked} == {"base", "tuned"}
    assert {(one["temperature"], one["repetition_penalty"]) for one in asked} == {(0.0, 1.0)}
    evaluate(quality, run, "--server", server.url)
    assert len(generating(server)) == len(asked), "kept answers are not asked for again"


def test_a_server_that_differs_answers_nothing(quality, served):
    server, run = served
    server.tuned_is = "base"
    with pytest.raises(SystemExit, match=r"tuned on the server at .*the weights are not the run's"):
        evaluate(quality, run, "--server", server.url)
    assert {one["model"] for one in generating(server)} == {"base"}


class Answering:
    """As much of vLLM as gives answers: the prompt's length in words, or a fault."""

    def __init__(self, fault=lambda number: None):
        self.asked, self.fault = [], fault

    def create(self, **request):
        self.asked.append(request)
        found = self.fault(len(self.asked)) or {"finish_reason": "stop"}
        if isinstance(found, str):
            return SimpleNamespace(text=found)
        choice = {"text": f" {len(request['prompt'])}"} | found
        return SimpleNamespace(text=json.dumps({"choices": [choice]}))


@pytest.fixture
def ask(tokenizer, tmp_path, monkeypatch):
    """Asks `server` for the answers to eight prompts; returns the kept ones."""
    monkeypatch.setattr(server_client, "RETRIES", 1)
    monkeypatch.setattr(server_client, "FIRST_PAUSE_S", 0.001)

    def ask(server):
        client = ServerClient("http://127.0.0.1:1/v1", WORDS)
        client.client = SimpleNamespace(completions=SimpleNamespace(with_raw_response=server))
        turn = TurnEnd([257], ["### Instruction:"])
        asking = Asking(client, "tuned", tokenizer, Sampling(5), turn)
        file = AnswerFile(tmp_path, {})
        prompts = [[1] * length for length in range(8, 0, -1)]
        served = ServedModels(client, {}, 1)
        try:
            fill_served(file, "tuned", list(range(8)), prompts, served, asking, "")
        finally:
            kept = AnswerFile(tmp_path, {}).found
            assert {row: one.text for (_, row), one in kept.items()} == {
                row: str(8 - row) for _, row in kept
            }
        return kept

    return ask


def refused(number):
    request = httpx.Request("POST", "http://127.0.0.1:1/v1")
    raise openai.InternalServerError("sick", response=httpx.Response(500, request=request), body={})


@pytest.mark.parametrize(
    ("fault", "said", "asked"),
    [
        (refused, "does not answer, tried 2 times: answers are kept.*sick", 2),
        (lambda number: '{"choices": [{"te', "is no completion: .*; answers are kept", 1),
        (lambda number: {"finish_reason": "abort"}, "broke an answer off .*'abort'.*are kept", 1),
        (lambda number: {"finish_reason": "stop", "text": None}, "is no completion", 1),
    ],
)
def test_a_server_that_fails_loses_nothing(ask, fault, said, asked):
    server = Answering(lambda number: fault(number) if number > 4 else None)
    with pytest.raises(ValueError, match=said) as error:
        ask(server)
    assert "\n" not in str(error.value)
    assert len(server.asked) == 4 + asked, "nothing more is asked for"
    again = Answering()
    assert len(ask(again)) == 8 and len(again.asked) == 4


def test_a_cut_answer_says_so(ask):
    found = ask(Answering(lambda number: {"finish_reason": "length"}))
    assert {one.finish for one in found.values()} == {"length"}


def test_judged_answers_come_from_a_server_too(served):
    server, run = served
    names = {"base": "base", "tuned": "tuned"}
    pair = ServedModels(ServerClient(server.url, WORDS), names, 2)
    facts = finished_run(run)
    asked = [[{"role": "user", "content": text}] for text in ("Repeat 7.", "Say yes.")]
    here, there = Contestants(run, facts, 2), Contestants(run, facts, 2, served=pair)
    for side in names:
        answers = [one.answers(side, asked, Sampling(6), "") for one in (here, there)]
        assert answers[0] == answers[1]
    sampled = there.answers("tuned", asked, Sampling(6, 0.7, seed=5), "")
    assert len(sampled) == 2 and {one["seed"] for one in generating(server)[-2:]} == {5, 6}
