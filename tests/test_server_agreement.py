"""A running server is held to the run: weights, template and end tokens."""

import pytest
from conftest import load_script
from model_server import ModelServer

from sftlab.evaluation import server_client


@pytest.fixture(scope="module")
def script():
    return load_script("recipes/export.py")


@pytest.fixture
def server(finished):
    with ModelServer(finished[0]) as server:
        yield server


@pytest.fixture
def verify(script, finished):
    def verify(url, *more):
        script.main(["--run", str(finished[0]), "--verify-server", url, "--prompts", "3", *more])

    return verify


def test_a_server_that_answers_as_the_run_is_said_so(server, verify, finished, capsys):
    verify(server.url)
    said = capsys.readouterr().out
    assert f"tuned on {server.url} answers as {finished[0]} on 3 prompts (nats" in said
    assert "0 answers end otherwise" in said
    assert {path for path, _ in server.requests} == {
        "/tokenize",
        "/v1/completions",
        "/v1/chat/completions",
    }


def without_the_adapter(server):
    server.tuned_is = "base"


def with_another_template(server):
    changed = server.tokenizer.chat_template.replace("### Instruction:", "### Question:")
    server.tokenizer.chat_template = changed


def with_many_ends(server):
    server.ends = [*server.ends, *range(256)]


def without_an_end(server):
    """None of the answers is short enough to feel it."""
    server.ends = server.ends[:-1]


def with_the_pad_as_an_end(server):
    server.ends = [*server.ends, server.tokenizer.pad_token_id]


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (without_the_adapter, "the weights are not the run's"),
        (with_another_template, "prompt 0 has other token ids"),
        (with_many_ends, "3 of 3 greedy answers end otherwise, first at prompt 0"),
        (without_an_end, r"answers end at the tokens \[.*\], and in the run at \[\d+.*\]"),
        (with_the_pad_as_an_end, r"answers end at the tokens \[.*\], and in the run at \[\d+.*\]"),
    ],
)
def test_a_server_that_differs_is_refused(server, verify, sabotage, said):
    sabotage(server)
    with pytest.raises(SystemExit, match=f"does not answer as the run: .*{said}"):
        verify(server.url)


@pytest.mark.parametrize(
    ("path", "fault", "said"),
    [
        ("/tokenize", (404, {"detail": "Not Found"}), "refuses with status 404"),
        ("/tokenize", (200, {"ids": []}), "does not tokenize messages"),
        ("/v1/completions", (200, {"choices": [{"text": "x"}]}), "gives no log-probabilities"),
        ("/v1/chat/completions", (200, "<html>"), "is no completion: <html>; nothing was compared"),
    ],
)
def test_a_server_that_cannot_be_asked_is_said_in_one_sentence(server, verify, path, fault, said):
    server.fault = lambda asked, number: fault if asked == path else None
    with pytest.raises(SystemExit, match=said) as stopped:
        verify(server.url)
    assert "\n" not in str(stopped.value)


def test_a_model_that_is_not_served_is_named(server, verify, monkeypatch):
    with pytest.raises(SystemExit, match="has no model 'other': it has base, tuned"):
        verify(server.url, "--server-model", "other")
    monkeypatch.setattr(server_client, "RETRIES", 0)
    with pytest.raises(SystemExit, match=r"the server at .* does not answer, tried 1 times"):
        verify("http://127.0.0.1:9/v1")


def test_exporting_and_verifying_a_server_are_two_commands(verify, script, finished, capsys):
    with pytest.raises(SystemExit):
        verify("http://127.0.0.1:9/v1", "--to", "merged")
    assert "--verify_server exports nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--run", str(finished[0])])
    assert "expected --to and --out, or --verify_server" in capsys.readouterr().err
