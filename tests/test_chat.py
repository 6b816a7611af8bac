"""The chat engine answers as the evaluation does, and streams only settled text."""

import threading
import time
from itertools import pairwise

import pytest
from chat_letters import GREEDY, QUESTION, letters_alone, pieces, texts, written
from conftest import byte_tokenizer

from sftlab.chat.engine import UPDATE_S, Chat
from sftlab.chat.sampling import Settings
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.runs.run_directory import SIDES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


@pytest.fixture(scope="module")
def chat(finished):
    chat = Chat(finished[0])
    letters_alone(chat._model)
    return chat


@pytest.fixture(scope="module")
def evaluated(finished):
    """The answer of one side to a conversation, as the evaluation generates it."""
    model = letters_alone(load_pair(finished[0], finished_run(finished[0])))

    def answer(chat, history, side, tokens=24):
        with answering(model, side):
            return Generator(model, chat._tokenizer, Sampling(tokens)).answers(
                [prompt_ids(chat._tokenizer, history)]
            )[0]

    return answer


@pytest.mark.parametrize("history", [QUESTION, TALK])
def test_both_sides_in_one_batch_answer_as_the_evaluation_does(chat, evaluated, history):
    last = pieces(chat, history)[-1]
    answers = {side: evaluated(chat, history, side) for side in SIDES}
    assert last.texts == {side: answer.text for side, answer in answers.items()}
    assert last.tokens == {side: answer.tokens for side, answer in answers.items()}
    assert last.finished == {side: answer.finish for side, answer in answers.items()}
    assert last.texts["base"] != last.texts["tuned"]


@pytest.mark.parametrize(
    "settings", [GREEDY, Settings(max_new_tokens=24), Settings(3.0, 1.0, 0, 24, 1.3, 5)]
)
def test_a_side_says_the_same_alone_and_beside_the_other(chat, settings):
    both = texts(chat, settings=settings)
    assert {side: texts(chat, sides=[side], settings=settings)[side] for side in SIDES} == both
    assert texts(chat, sides=("tuned", "base"), settings=settings) == both


def test_pieces_grow_and_the_last_is_whole(chat):
    with written(chat):
        found = pieces(chat)
    assert len(found) > 12
    for earlier, later in pairwise(found):
        for side in SIDES:
            assert later.texts[side].startswith(earlier.texts[side])
            assert later.tokens[side] >= earlier.tokens[side]
        assert later.first_token_s == earlier.first_token_s > 0
    assert found[-1].texts == texts(chat)
    assert found[0].finished == {"base": None, "tuned": None}
    assert all(1 < speed < 1 / 0.002 for speed in found[-1].tokens_per_s.values())


def test_a_fast_model_is_not_kept_from_its_work(chat):
    settings = Settings(0, max_new_tokens=200)
    started = time.perf_counter()
    found = pieces(chat, settings=settings)
    assert found[-1].tokens["base"] == 200
    assert len(found) <= (time.perf_counter() - started) / UPDATE_S + 2


def test_a_stop_string_ends_the_answer_and_never_flashes_up(chat):
    with written(chat, b"Seven. # ### In a row\n\n### Instruction: more", seconds=0.01):
        found = pieces(chat, settings=Settings(0, max_new_tokens=60))
    assert found[-1].texts["base"] == "Seven. # ### In a row"
    assert found[-1].finished == {"base": "stop", "tuned": "stop"}
    assert found[-1].tokens["base"] == len("Seven. # ### In a row\n\n### Instruction:")
    shown = list(dict.fromkeys(piece.texts["base"] for piece in found))
    assert shown == ["Seven. # ### In a row"[:end] for end in (*range(1, 7), 8, 15, 17, 19, 20, 21)]


def test_an_answer_that_ends_within_a_stop_string_keeps_it(chat):
    with written(chat, b"Seven ##"):
        assert texts(chat, settings=Settings(0, max_new_tokens=8))["base"] == "Seven ##"


def test_half_a_character_is_never_shown(chat):
    whole = "añ日本😀!"
    with written(chat, whole.encode(), seconds=0.01):
        found = pieces(chat, settings=Settings(0, max_new_tokens=len(whole.encode())))
    shown = list(dict.fromkeys(piece.texts["base"] for piece in found))
    assert shown == [whole[:end] for end in range(1, len(whole) + 1)]
    with written(chat, whole.encode()):
        assert texts(chat, settings=Settings(0, max_new_tokens=4))["base"] == "añ"


def test_a_side_that_has_ended_stays_as_it_is(chat):
    free, kept = texts(chat), chat._turn
    letter = max(
        "abcdefghijklmnop", key=lambda x: abs(free["base"].find(x) - free["tuned"].find(x))
    )
    chat._turn = kept._replace(
        end_tokens=byte_tokenizer()(letter, add_special_tokens=False)["input_ids"]
    )
    try:
        last = pieces(chat)[-1]
    finally:
        chat._turn = kept
    assert last.texts == {side: text.partition(letter)[0].strip() for side, text in free.items()}
    assert last.finished == {
        side: "stop" if letter in text else "length" for side, text in free.items()
    }
    assert last.tokens["base"] != last.tokens["tuned"]


def test_the_history_goes_through_the_runs_template(chat, monkeypatch):
    seen = []
    original = chat._model.generate
    monkeypatch.setattr(
        chat._model, "generate", lambda **given: (seen.append(given), original(**given))[1]
    )
    pieces(chat, TALK)
    expected = prompt_ids(chat._tokenizer, TALK)
    assert seen[0]["input_ids"].tolist() == [expected, expected]
    assert seen[0]["attention_mask"].all()
    assert chat._tokenizer.decode(expected).count("### Instruction:") == 2


def test_fit_drops_the_oldest_whole_turns(chat):
    assert chat.context == 512
    assert chat.fit(TALK, 24) == (TALK, 0)
    room = chat.context - len(prompt_ids(chat._tokenizer, TALK))
    assert chat.fit(TALK, room) == (TALK, 0)
    assert chat.fit(TALK, room + 1) == ([TALK[0], TALK[3]], 1)
    assert chat.fit(TALK[1:], room + 50) == ([TALK[3]], 1)
    talk = [
        {"role": role, "content": f"{turn}"} for turn in range(9) for role in ("user", "assistant")
    ]
    kept, dropped = chat.fit([*talk, *QUESTION], 300)
    assert 0 < dropped < 9
    assert kept == [*talk[2 * dropped :], *QUESTION]
    with pytest.raises(ValueError, match="drop"):
        chat.reply([*talk, *QUESTION], SIDES, Settings(max_new_tokens=300), threading.Event())
    tokens = len(prompt_ids(chat._tokenizer, [TALK[0], TALK[3]]))
    with pytest.raises(ValueError, match=rf"takes {tokens} tokens .* up to 500, .* 512 positions"):
        chat.fit(TALK, 500)
    for history in ([], TALK[:3], TALK[:1]):
        with pytest.raises(ValueError, match="must end with a message of the user"):
            chat.fit(history, 10)
