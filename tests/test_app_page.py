"""The app's page hands its settings to the model, and keeps and counts votes."""

import html
import json
import os
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_script

from sftlab.chat import votes
from sftlab.chat.conversation import Turn, as_written, column, history, inert, saved
from sftlab.chat.engine import Piece
from sftlab.chat.options import parse_options
from sftlab.chat.request_filter import accounts
from sftlab.chat.sampling import Settings
from sftlab.chat.service import Lab

pytest.importorskip("gradio", reason="gradio is not installed")

from app_page import Recorder


@pytest.fixture
def app():
    return load_script("app/app.py")


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
    assert page.send(request, "And?") == (nothing, nothing, nothing)
    assert page.clear(request, turns)[0] == turns
    box, turns, *_ = page.end(request, "", turns)  # what had no answer returns to the box
    assert (box, turns) == ("Hello", [])
    refused = "**Not taken:** the message is empty: type something to answer"
    assert page.send(request, "  ") == (nothing, nothing, refused)
    sent, box, note = page.send(request, "And?")
    assert (sent.partition(" ")[2], box, note) == ("And?", "", "")
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
    assert (blind["other"], blind["tuned"], blind["tie"], blind["won"]) == (2, 8, 1, 0.8)
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
    assert column([blind], 0)[1]["content"][0]["text"] == "(an empty answer)"


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


def test_answers_are_shown_as_written_until_markdown_is_asked_for(page):
    request = SimpleNamespace(session_hash="one")
    text = "``` ` ``` <b>bold</b> **x** R&D &lt;\n  1. in && a < b"
    turn = Turn(
        text, ("tuned",), False, "r", {"seed": 1}, {"tuned": text}, finished={"tuned": "stop"}
    )
    left = page.columns([turn])[0]
    asked, said = (one["content"] for one in left["value"])
    assert not left["render_markdown"]
    assert asked == said[0]["text"] == as_written(text)
    assert "&lt;b>bold&lt;/b> **x** R&amp;D &amp;lt;\n  1. in && a < b" in as_written(text)
    assert html.unescape(as_written(text)) == text
    left = page.render(request, [turn], True)[1]
    shown = left["value"]
    assert left["render_markdown"]
    assert shown[1]["content"][0]["text"] == inert(text)
    asked, *_ = page.begin(
        request, "0.5 Hi", [], "second", "tuned", False, *vars(Settings()).values()
    )
    assert asked[0].markdown
    assert "markdown" not in saved(asked, "")["turns"][0]
    page.render(request, asked, False)
    assert not asked[0].markdown


def test_an_example_is_sent_as_a_message(page):
    request = SimpleNamespace(session_hash="one")
    chosen = SimpleNamespace(value={"text": "Write a poem."})
    assert page.example(request, chosen).partition(" ")[2] == "Write a poem."


def test_an_edit_goes_on_from_its_place_and_an_empty_one_is_refused(app, page):
    request = SimpleNamespace(session_hash="one")
    said = {"texts": {"tuned": "yes"}, "finished": {"tuned": "stop"}}
    turns = [Turn(text, ("tuned",), False, "second", {"seed": 0}, **said) for text in ("a", "b")]
    asked, left, *_, note = page.edit(request, turns, SimpleNamespace(index=2, value="&lt;b> R&D"))
    assert (asked.partition(" ")[2], left, note) == ("<b> R&D", turns[:1], "")
    asked, left, shown, _, note = page.edit(request, turns, SimpleNamespace(index=0, value=" "))
    assert (asked, left) == (app.gr.skip(), turns)
    assert [one["content"] for one in shown["value"]][::2] == ["a", "b"]  # as before the edit
    assert note == "**Not taken:** the message is empty: type something to answer"


def test_a_vote_that_is_refused_is_said_beside_the_conversation(app, page):
    *before, note, after = page.vote([], "", "left")
    assert note == "**Not taken:** there is nothing to vote on: ask something first"
    assert [*before, after] == [app.gr.skip()] * 5
