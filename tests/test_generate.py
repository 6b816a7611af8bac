"""Generation: batches equal single prompts, turns end where the template ends them, kept answers
survive.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, writes_letters
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sftlab.data.chat_template import TurnEnd, end_of_turn, set_template
from sftlab.evaluation.answer_file import AnswerFile
from sftlab.evaluation.generation import Answer, Generator, NotANumber, Sampling

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    return tokenizer


@pytest.fixture
def model(base):
    """A random model that writes letters and blanks alone, as bytes at random are seldom text."""
    model = AutoModelForCausalLM.from_pretrained(base)
    writes_letters(model)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))


def prompts(tokenizer, count=9):
    return [
        tokenizer(f"{'word ' * (i % 5)}{i} x", add_special_tokens=False)["input_ids"]
        for i in range(count)
    ]


def test_batched_and_single_answers_are_the_same(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=24))
    texts = prompts(tokenizer)
    together = generator.answers(texts)
    assert together == [generator.answers([text])[0] for text in texts]
    assert len({answer.text for answer in together}) > 1
    assert {answer.finish for answer in together} == {"length"}
    assert {answer.tokens for answer in together} == {24}


def test_a_cache_of_fixed_shape_and_a_filled_batch_change_no_answer(model, tokenizer):
    texts = prompts(tokenizer)
    free = Generator(model, tokenizer, Sampling(max_new_tokens=24)).answers(texts)
    fixed = Generator(model, tokenizer, Sampling(max_new_tokens=24), static_rows=4)
    assert [answer for i in range(0, 9, 4) for answer in fixed.answers(texts[i : i + 4])] == free


def test_an_answer_ends_at_the_end_token_and_before_a_stop_string(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=40))
    texts = prompts(tokenizer)
    free = generator.answers(texts)
    stop = free[0].text[6:10]
    generator.turn = TurnEnd(generator.turn.end_tokens, [stop])
    stopped = generator.answers(texts)
    for answer, whole in zip(stopped, free, strict=True):
        assert answer.text == whole.text.partition(stop)[0].strip()
        assert answer.finish == ("stop" if stop in whole.text else "length")
    assert stopped[0].tokens < 40
    assert stopped == [generator.answers([text])[0] for text in texts]
    end = tokenizer(free[0].text[5], add_special_tokens=False)["input_ids"]
    generator.turn = TurnEnd(end, [])
    model.get_base_model().generation_config.eos_token_id = end
    ended = generator.answers(texts)
    for answer, whole in zip(ended, free, strict=True):
        assert answer.text == whole.text.partition(free[0].text[5])[0].strip()


@pytest.fixture
def sizes(model, monkeypatch):
    """The rows of each call of the model's generation."""
    found, generate = [], model.generate
    spy = lambda **given: found.append(len(given["input_ids"])) or generate(**given)  # noqa: E731
    monkeypatch.setattr(model, "generate", spy)
    return found


def ended_at(generator, model, ends):
    """A generator whose answers end at the tokens `ends`."""
    generator.turn = TurnEnd(ends, [])
    model.get_base_model().generation_config.eos_token_id = ends
    return generator


def test_rows_that_have_ended_leave_the_batch_and_no_answer_changes(model, tokenizer, sizes):
    texts, greedy = prompts(tokenizer), Sampling(max_new_tokens=60)
    free = Generator(model, tokenizer, greedy).answers(texts)
    assert sizes == [9] * 4, "a look every 16 tokens"
    sizes.clear()
    [end] = tokenizer(free[0].text[5], add_special_tokens=False)["input_ids"]
    generator = ended_at(Generator(model, tokenizer, greedy), model, [end])
    answers = generator.answers(texts)
    left = [answer.tokens // 16 + 1 for answer in answers]
    assert sizes == [sum(calls > number for calls in left) for number in range(max(left))]
    assert sizes[-1] < 9, "some have left"
    assert answers == [generator.answers([text])[0] for text in texts]


def test_rows_stay_where_the_others_would_go_on_otherwise(model, tokenizer, sizes):
    Generator(model, tokenizer, Sampling(40, temperature=1.0)).answers(prompts(tokenizer))
    Generator(model, tokenizer, Sampling(40), static_rows=9).answers(prompts(tokenizer))
    assert sizes == [9, 9]
    greedy = Generator(model, tokenizer, Sampling(40))
    assert greedy._rows_leave()
    model.get_base_model().config.layer_types = ["full_attention", "sliding_attention"]
    assert not greedy._rows_leave()


def test_the_prompt_is_no_part_of_the_answer(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=8))
    for text, answer in zip(prompts(tokenizer), generator.answers(prompts(tokenizer)), strict=True):
        assert tokenizer.decode(text) not in answer.text
        assert len(answer.text) <= 8


def test_sampling_repeats_with_its_seed_and_the_models_own_defaults_do_not_count(model, tokenizer):
    model.get_base_model().generation_config.repetition_penalty = 5.0
    greedy = Generator(model, tokenizer, Sampling(max_new_tokens=16)).answers(prompts(tokenizer))
    assert model.get_base_model().generation_config.repetition_penalty is None
    one, again, other = (
        Generator(model, tokenizer, Sampling(16, temperature=1.5, seed=seed)).answers(
            prompts(tokenizer)
        )
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert one != greedy


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1), ("top_p", 0), ("top_p", 2)]
)
def test_sampling_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


def test_nan_logits_name_the_prompt(model, tokenizer):
    with torch.no_grad():
        model.get_input_embeddings().weight[
            tokenizer("!", add_special_tokens=False)["input_ids"][0]
        ] = float("nan")
    texts = [*prompts(tokenizer)[:2], tokenizer("a!b", add_special_tokens=False)["input_ids"]]
    with pytest.raises(NotANumber) as caught:
        Generator(model, tokenizer, Sampling(max_new_tokens=4)).answers(texts)
    assert caught.value.position == 2


def test_an_answer_that_goes_round_in_circles_is_marked(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(max_new_tokens=16))
    assert generator._answer([5] * 16).repeats
    assert generator._answer([5, 6] * 10).repeats
    assert not generator._answer([5, 6] * 9).repeats
    assert not generator._answer(list(range(20))).repeats
    assert not generator._answer([5] * 3).repeats
    assert not generator._answer([]).repeats


def test_turns_end_as_their_template_says(tokenizer):
    assert end_of_turn(tokenizer) == TurnEnd([257], ["### Instruction:", "### Response:"])
    assert end_of_turn(tokenizer, [3, 257]).end_tokens == [3, 257]
    tokenizer.chat_template = LLAMA2
    assert end_of_turn(tokenizer) == TurnEnd([256, 257], ["[INST]"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    turn = end_of_turn(tokenizer)
    assert {tokenizer.decode([i]) for i in turn.end_tokens} == {
        "<eos>",
        "<|im_start|>",
        "<|im_end|>",
    }
    assert turn.stop_strings == []


def test_kept_answers_survive_a_torn_line_and_other_settings_have_another_file(tmp_path):
    answers = [Answer("one", 2, "stop", False), Answer("zwei\n", 3, "length", True)]
    kept = AnswerFile(tmp_path, {"adapter": "a"})
    kept.add("base", [4, 7], answers, 0.5)
    kept.add("tuned", [4, 7], answers, 0.25)
    whole = kept.path.read_bytes()
    with kept.path.open("ab") as file:
        file.write(b'{"side": "tuned", "rows": [9], "sec')
    again = AnswerFile(tmp_path, {"adapter": "a"})
    assert again.found == kept.found
    assert again.found["base", 7] == answers[1]
    assert again.pace("base") == {"seconds": 0.5, "rows_per_s": 4.0}
    assert again.path.read_bytes() == whole
    assert json.loads(whole.splitlines()[0]) == {"adapter": "a"}
    again.path.write_bytes(b'{"adapt')
    torn = AnswerFile(tmp_path, {"adapter": "a"})
    torn.add("base", [4, 7], answers, 0.5)
    assert AnswerFile(tmp_path, {"adapter": "a"}).found == torn.found != {}
    assert AnswerFile(tmp_path, {"adapter": "b"}).found == {}
    assert len(list(Path(tmp_path).iterdir())) == 2
