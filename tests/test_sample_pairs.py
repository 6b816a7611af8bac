"""Preference pairs of a run's own solutions: right against wrong, by the final number."""

import json
from decimal import Decimal

import pytest
import torch
from conftest import byte_tokenizer, copy_of, load_script, read, write_jsonl

from sftlab.config.recipe import DataArguments
from sftlab.data.converter import PAIRS
from sftlab.data.splits import load_splits
from sftlab.evaluation.final_number import final_number, marked_number
from sftlab.evaluation.generation import Answer, Generator
from sftlab.evaluation.sampled_pairs import counts, solved

QUESTIONS = [
    {"question": "One?", "answer": "It is one.\n#### 1"},
    {"question": "Two?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    {"question": "Many?", "answer": "#### 9,999,999"},
    {"question": "None?", "answer": "There is no number 5 here."},
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 72.\n#### 72", "72"),
        ("#### $1,000.50 in 2 days", "1000.50"),
        ("#### -3", "-3"),
        ("first #### 1, then #### 2 of 3", "2"),
        ("48 + 24 = 72 clips.", "72"),
        ("48-24", "24"),
        ("It is (-5).", "-5"),
        ("1, 2, 3.", "3"),
        ("costs $.75", "0.75"),
        ("12,345,678 people", "12345678"),
        ("x2 or B12", None),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value_and_references_need_the_mark():
    assert final_number("It costs 72.00 dollars") == final_number("#### 72")
    assert marked_number("the last is 5") is None
    assert marked_number("#### 5") == marked_number("#### 5 apples") == 5
    assert marked_number("#### \u22125") == -5
    assert not any(
        map(marked_number, ("#### 1/2", "#### 1e3", "#### 1 000", "#### ", "#### 3 or 4"))
    )
    assert final_number("It is 5.\n#### ") == 5


def test_unfinished_and_repeated_solutions():
    def answer(text, finish="stop"):
        return Answer(text, 1, finish, False)

    texts = ["it is 5", "it is 5", "it is 6", "who knows"]
    found = solved([*map(answer, texts), answer("it is 5", "length"), answer("")], Decimal(5))
    assert (found.right, found.wrong) == (["it is 5"], ["it is 6", "who knows"])
    facts = counts([found])
    assert facts["solutions_right"] == 2
    assert facts["solutions_wrong"] == 2
    assert facts["solutions_unfinished"] == 2
    assert facts["questions_with_both"] == 1


@pytest.fixture
def script(monkeypatch):
    """The script with a model that writes the digits 1 and 2, and ends often."""
    script = load_script("recipes/sample_pairs.py")
    load = script.load_pair

    def load_digits(*args):
        model = load(*args)
        tokenizer = byte_tokenizer()
        digits = tokenizer("12", add_special_tokens=False)["input_ids"]
        kept = [*digits, tokenizer.eos_token_id]
        head = model.get_base_model().lm_head

        def scores(module, given, logits):
            made = torch.full_like(logits, -1e4)
            made[..., kept] = 0.1 * logits[..., kept]
            return made

        head.register_forward_hook(scores)
        return model

    monkeypatch.setattr(script, "load_pair", load_digits)
    return script


@pytest.fixture
def asked(finished, tmp_path):
    """The words of a command, without the script's name."""
    (tmp_path / "run").mkdir()
    copy_of(finished[0], tmp_path / "run")
    data = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    words = {"run": tmp_path / "run", "dataset_name": data, "out": tmp_path / "pairs.jsonl"}
    words |= {"solutions": 16, "max_new_tokens": 12, "batch_size": 8, "temperature": 1.0}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def made(tmp_path):
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def test_right_solutions_are_chosen_and_what_is_left_out_is_counted(
    script, asked, tmp_path, capsys
):
    script.main([*asked, "--pairs_a_question", "3"])
    pairs = made(tmp_path)
    for pair in pairs:
        right = {"One?": 1, "Two?": 2}[pair["prompt"][-1]["content"]]
        assert final_number(pair["chosen"][0]["content"]) == right
        assert final_number(pair["rejected"][0]["content"]) != right
    facts = read_facts(tmp_path)
    assert facts["pairs"] == len(pairs) >= 2
    assert facts["questions"] == 3
    assert facts["questions_with_both"] == 2
    assert facts["questions_all_wrong"] == facts["questions_without_a_number"] == 1
    assert sum(facts[f"solutions_{kind}"] for kind in ("right", "wrong", "unfinished")) == 48
    assert f"{len(pairs)} pairs of 2 questions" in capsys.readouterr().out
    as_data = {"dataset_shape": PAIRS, "split_fractions": [1.0, 0.0, 0.0]}
    splits = load_splits(DataArguments(str(tmp_path / "pairs.jsonl"), **as_data))
    assert len(splits.train) == len(pairs)


def read_facts(tmp_path):
    return json.loads((tmp_path / "pairs.json").read_text())


def test_a_killed_sampling_goes_on_to_the_same_pairs(script, asked, tmp_path, monkeypatch):
    script.main(asked)
    pairs, facts = made(tmp_path), read_facts(tmp_path)
    [kept] = (tmp_path / "run" / "eval").glob("answers-*.jsonl")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:3]))
    asked_again, answers = [], Generator.answers
    monkeypatch.setattr(
        Generator,
        "answers",
        lambda self, *given: asked_again.append(given) or answers(self, *given),
    )
    with pytest.raises(SystemExit, match=r"pairs.jsonl is there already"):
        script.main(asked)
    script.main([*asked, "--overwrite"])
    assert len(asked_again) == 4, "of six batches two were kept"
    assert made(tmp_path) == pairs
    assert read_facts(tmp_path)["answers"]["hash"] == facts["answers"]["hash"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--solutions", "1"], "--solutions 2 or more"),
        (["--temperature", "0"], "a --temperature above 0"),
        (["--out", "pairs.txt"], "ends in .jsonl"),
        (["--batch_size", "0"], "expected at least 1"),
    ],
)
def test_what_can_make_no_pairs_is_refused_before_loading(script, asked, more, said, monkeypatch):
    monkeypatch.setattr(script, "finished_run", lambda *_: pytest.fail("it loads"))
    with pytest.raises(SystemExit, match=said):
        script.main([*asked, *more])


def test_data_without_marked_numbers_and_models_without_pairs_are_refused(script, asked, tmp_path):
    data = tmp_path / "questions.jsonl"
    write_jsonl(data, QUESTIONS[3:])
    with pytest.raises(SystemExit, match=r"no answer of .* has '#### n'"):
        script.main(asked)
    write_jsonl(data, QUESTIONS[2:3])
    with pytest.raises(SystemExit, match="no question has both a right and a wrong solution"):
        script.main(asked)
    assert not (tmp_path / "pairs.jsonl").exists()
    assert read(tmp_path / "run")["status"] == "succeeded"
