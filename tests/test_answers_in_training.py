"""A training that generates answers at its evaluations is the same training, and logs scores."""

from functools import partial

import pytest
import torch
from conftest import arguments, read
from packed_training import build, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sftlab.config.launch import Launch
from sftlab.config.parser import parse_recipe
from sftlab.data.splits import Splits, load_splits
from sftlab.evaluation import answers_in_training as answers_file
from sftlab.evaluation.answers_in_training import answers_in_training
from sftlab.evaluation.generation import Answer, Generator, Sampling
from sftlab.fastpath import varlen_attention

EVALUATED = {
    **{"eval_strategy": "steps", "eval_steps": "1", "max_steps": "2"},
    "answers_during_training": "5",
}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """The tests' model does not stop by itself."""
    monkeypatch.setattr(answers_file, "Sampling", partial(Sampling, max_new_tokens=8))


def answered(fields, **more):
    """A trainer that answers the validation rows, and what answers them."""
    data = parse_recipe(arguments(fields), Launch.from_environment()).data
    trainer = build(fields | EVALUATED, lora_dropout="0.1", **more)
    tokenizer = trainer.processing_class
    trainer.answer = answers_in_training(
        trainer.args, load_splits(data), tokenizer, trainer.model.config
    )
    return trainer


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def test_answers_change_nothing_of_the_training(fields, tmp_path):
    plain = build(fields | EVALUATED, lora_dropout="0.1")
    losses = train(plain)
    trainer = answered(fields | {"output_dir": str(tmp_path / "other")})
    settings = trainer.model.get_base_model().generation_config
    assert [one["loss"] for one in train(trainer)] == [one["loss"] for one in losses]
    assert trainer.model.get_base_model().generation_config is settings
    first, *_ = found = evaluations(trainer)
    assert len(found) == 2 and "eval_bleu" not in evaluations(plain)[0]
    assert [one["eval_loss"] for one in found] == [one["eval_loss"] for one in evaluations(plain)]
    assert 0 <= first["eval_rougeL"] <= 1 and 0 < first["eval_answer_tokens"] <= 256
    assert len(trainer.answer.rows.numbers) == 5


def test_the_scores_are_those_of_the_answers(fields, monkeypatch):
    trainer = answered(fields)
    references = [row["reference"] for row in trainer.answer.rows.rows]
    given = [Answer(text, 7, "stop", False) for text in references]
    monkeypatch.setattr(Generator, "answers", lambda self, prompts, seed=0: given[: len(prompts)])
    assert trainer.answer(trainer.model) == {
        **{"bleu": pytest.approx(100), "rouge1": 1, "rouge2": 1, "rougeL": 1, "exact_match": 1},
        **{"answer_tokens": 7, "empty_answers": 0, "cut_answers": 0},
    }
    given[0] = Answer("", 256, "length", False)
    scores = trainer.answer(trainer.model)
    assert (scores["empty_answers"], scores["cut_answers"]) == (0.2, 0.2)


def test_packed_attention_gives_way_to_padding(fields):
    trainer = answered(fields)
    model = trainer.model.get_base_model()
    before = trainer.answer(trainer.model)
    varlen_attention.register()
    model.set_attn_implementation(varlen_attention.NAME)
    state = torch.get_rng_state()
    assert trainer.answer(trainer.model) == before
    assert model.config._attn_implementation == varlen_attention.NAME
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.long
def test_a_run_writes_the_curves_of_its_answers(fields, trained_here):
    trained_here(fields | EVALUATED | {"answers_during_training": "2"})
    curves = EventAccumulator(f"{fields['output_dir']}/tensorboard").Reload().Tags()["scalars"]
    assert {"eval/bleu", "eval/rougeL", "eval/answer_tokens", "eval/empty_answers"} <= set(curves)
    assert read(fields["output_dir"])["recipe"]["answers_during_training"] == 2


def test_what_has_no_question_is_refused(fields):
    recipe = parse_recipe(arguments(fields | EVALUATED), Launch.from_environment())
    for facts, tokens, message in (
        ({"shape": "text"}, None, "holds plain text, which asks nothing"),
        ({"shape": "dolly"}, {"tokenized": {}}, "holds tokens, whose text is gone"),
    ):
        with pytest.raises(ValueError, match=message):
            answers_in_training(recipe.training, Splits([], [], [], facts, tokens), None, None)
