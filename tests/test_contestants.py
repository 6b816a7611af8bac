"""Base and tuned as they answer a judge's questions:

kept answers, drawn ones, prompts without room.
"""

import pytest
from conftest import read

from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import answering, load_pair
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.judging import model_answers as module
from sftlab.judging.model_answers import Contestants

ASKED = [[{"role": "user", "content": f"Question {i}{'!' * (7 * i)}"}] for i in range(5)]


def test_each_model_answers_as_itself_and_only_once(run, monkeypatch):
    two, sampling = Contestants(run, read(run), 2), Sampling(8)
    assert "model" not in vars(two)
    found = {
        side: two.answers(side, [*ASKED, ASKED[0]], sampling, "answers")
        for side in ("base", "tuned")
    }
    model = load_pair(run, read(run))
    for side, answers in found.items():
        with answering(model, side):
            alone = Generator(model, two.tokenizer, sampling)
            assert answers == [
                alone.answers([prompt_ids(two.tokenizer, one)])[0] for one in [*ASKED, ASKED[0]]
            ]
    assert found["base"] != found["tuned"]
    two.free()
    monkeypatch.setattr(module, "load_pair", lambda *_: pytest.fail("loaded again"))
    again = Contestants(run, read(run), 3)
    assert again.answers("tuned", ASKED[::-1], sampling, "answers") == found["tuned"][4::-1]


def test_drawn_answers_repeat_and_two_draws_differ(run):
    sampling = Sampling(8, temperature=1.0)
    first = Contestants(run, read(run), 2).draws(ASKED, sampling, "drawn")
    assert [one.text for one in first[0]] != [one.text for one in first[1]]
    for path in (run / "eval").iterdir():
        path.unlink()
    assert Contestants(run, read(run), 2).draws(ASKED, sampling, "drawn") == first
    Contestants(run, read(run), 3).answers("base", ASKED, sampling, "drawn")
    Contestants(run, read(run), 3).answers("base", ASKED[:4], sampling, "drawn")
    assert len(list((run / "eval").iterdir())) == 4


def test_of_a_prompt_without_room_the_middle_is_cut_and_counted(run, monkeypatch):
    seen = []

    def answers(self, prompts, seed=0):
        seen.extend(prompts)
        return [module.Answer("x", 1, "stop", False) for _ in prompts]

    monkeypatch.setattr(Generator, "answers", answers)
    asked = [[{"role": "user", "content": "start" + "x" * 600 + "end"}], ASKED[0]]
    two = Contestants(run, read(run), 2)
    two.answers("base", asked, Sampling(12), "answers")
    assert two.prompts_cut == 1
    whole = prompt_ids(two.tokenizer, asked[0])
    assert seen[0] == whole[:250] + whole[-250:]
    assert seen[1] == prompt_ids(two.tokenizer, ASKED[0])
    with pytest.raises(ValueError, match="--max_new_tokens 512 leaves the model no room"):
        two.answers("base", asked, Sampling(512), "answers")


def test_a_base_model_that_is_gone_is_said_before_anything_is_asked(run):
    record = read(run)
    record["recipe"]["model_name_or_path"] = str(run / "nowhere")
    with pytest.raises(ValueError, match=r"the base model .*nowhere of the run cannot be loaded"):
        Contestants(run, record, 2)
