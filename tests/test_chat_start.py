"""The chat offers the model that a run went on from, between base and tuned."""

import shutil
import threading

import pytest
from chat_letters import GREEDY, QUESTION, letters_alone, pieces, texts
from conftest import copy_of, load_script, read

from sftlab.chat.conversation import choices, sides
from sftlab.chat.engine import Chat
from sftlab.chat.sampling import Settings
from sftlab.chat.service import Lab
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.evaluation.start_model import load_start, start_of
from sftlab.files import write_json
from sftlab.runs.run_directory import SIDES

THREE = ("base", "start", "tuned")


@pytest.fixture(scope="module")
def chat(preferred):
    chat = Chat(preferred)
    letters_alone(chat._model)
    return chat


def moved(run, folder, **started_from):
    """A copy of a run whose record names another start."""
    folder.mkdir()
    copy_of(run, folder)
    record = read(folder)
    write_json(
        folder / "run.json", record | {"started_from": record["started_from"] | started_from}
    )
    return folder


def test_the_start_answers_as_it_does_in_the_evaluation(chat, preferred):
    run = finished_run(preferred)
    model = letters_alone(load_pair(preferred, run))
    load_start(model, start_of(preferred, run))
    expected = {}
    for side in THREE:
        with answering(model, side):
            generator = Generator(model, chat._tokenizer, Sampling(24))
            [answer] = generator.answers([prompt_ids(chat._tokenizer, QUESTION)])
        expected[side] = answer.text
    assert chat.sides == THREE
    assert len(set(expected.values())) == 3
    assert texts(chat, sides=THREE) == expected


@pytest.mark.parametrize("settings", [GREEDY, Settings(max_new_tokens=24)])
def test_a_side_says_the_same_alone_and_beside_any_other(chat, settings):
    assert chat.mixed
    alone = {side: texts(chat, sides=[side], settings=settings)[side] for side in THREE}
    for pair in (SIDES, ("start", "tuned"), ("tuned", "start")):
        assert texts(chat, sides=pair, settings=settings) == {side: alone[side] for side in pair}
    chat.mixed = False
    try:
        pair = ("start", "tuned")
        found = texts(chat, sides=pair, settings=settings)
    finally:
        chat.mixed = True
    assert found == {side: alone[side] for side in pair}


def test_a_run_without_a_start_says_so(finished):
    chat = Chat(finished[0])
    assert chat.sides == SIDES
    with pytest.raises(ValueError, match=r"start cannot answer: .* began with a new adapter"):
        pieces(chat, sides=("start", "tuned"))


@pytest.mark.parametrize(
    ("started_from", "said"),
    [
        ({"adapter": "runs/gone/adapter"}, "is not there: bring it back"),
        ({"weights": "0" * 16}, "has changed since"),
    ],
)
def test_without_its_start_a_run_still_chats_and_the_page_says_why(
    preferred, tmp_path, started_from, said
):
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = moved(preferred, tmp_path / "run", **started_from)
    page = load_script("app/app.py").Page(Lab(tmp_path, folder, tmp_path, None, False))
    _, facts, side = page.pick("run", "start and tuned")
    assert "its start is not offered" in facts
    assert said in facts
    assert side["choices"] == ["base and tuned", "tuned", "base"]
    assert side["value"] == "base and tuned"
    assert texts(page.lab.model("run")).keys() == set(SIDES)


def test_a_start_that_does_not_fit_is_not_offered(preferred, finished, tmp_path):
    adapter = shutil.copytree(finished[0] / "adapter", tmp_path / "other" / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    chat = Chat(moved(preferred, tmp_path / "run", adapter=str(adapter)))
    assert "does not load on its base model" in chat.no_start
    assert texts(chat) == texts(Chat(preferred))


def test_the_page_offers_the_start_and_keeps_a_choice_that_stays(preferred, finished, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    for name, run in (("dpo", preferred), ("sft", finished[0])):
        (tmp_path / name).mkdir()
        copy_of(run, tmp_path / name)
    page = load_script("app/app.py").Page(Lab(tmp_path, None, tmp_path, None, False))
    offered = ["base and tuned", "start and tuned", "tuned", "start", "base"]
    _, facts, side = page.pick("dpo", "tuned")
    assert (side["choices"], side["value"]) == (offered, "tuned")
    assert f"start {finished[0]}" in facts
    _, facts, side = page.pick("sft", "start")
    assert side["value"] == "base and tuned"
    assert "start" not in facts
    [*_, last] = page.lab.ask("Hello", None, "start and tuned", "", GREEDY, "dpo", STOP())
    assert last["texts"].keys() == {"start", "tuned"}
    with pytest.raises(ValueError, match="start cannot answer"):
        [*page.lab.ask("Hello", None, "start", "", GREEDY, "sft", STOP())]


def test_answers_of_the_start_depend_on_its_weights(preferred, tmp_path):
    lab = Lab(preferred.parent, preferred, tmp_path, None, False)
    lab.model(preferred.name)
    with_base = lab.models_hash(SIDES)
    assert lab.models_hash(("start", "tuned")) != with_base == lab.models_hash(("tuned",))


def test_names_of_sides_and_pairs():
    assert sides("both") == sides("base and tuned") == SIDES
    assert sides("start and tuned") == ("start", "tuned")
    assert sides("start") == ("start",)
    for wrong in ("all", ["start"], None, 5):
        with pytest.raises(ValueError, match="expected base, start, tuned, both"):
            sides(wrong)
    for offered in (SIDES, THREE):
        assert all(set(sides(choice)) <= set(offered) for choice in choices(offered))


STOP = threading.Event
