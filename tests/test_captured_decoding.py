"""Captured decoding: the same answers as plain steps, for every side, whoever leaves the batch.

On a CPU the steps run one by one; on a GPU they are captured and replayed.
"""

import pytest
import torch
from conftest import byte_tokenizer, writes_letters
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sftlab.data.chat_template import TurnEnd, set_template
from sftlab.evaluation import captured_decoding
from sftlab.evaluation.base_and_tuned import answering
from sftlab.evaluation.captured_decoding import CapturedSteps, NotCaptured, can_capture
from sftlab.evaluation.generation import Generator, NotANumber, Sampling

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU captures steps"),
    ),
]


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    set_template(tokenizer)
    return tokenizer


@pytest.fixture(params=DEVICES)
def model(base, request):
    """A random model with an adapter that changes its answers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(request.param)
    writes_letters(model)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).eval()


def prompts(tokenizer, count=9):
    texts = [f"{'word ' * (i % 5)}{i} x" for i in range(count)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def pair(model, tokenizer, sampling):
    """A generator of plain steps, and one of captured steps."""
    plain = Generator(model, tokenizer, sampling, capture=False)
    captured = Generator(model, tokenizer, sampling)
    captured.captures = True
    return plain, captured


def ended_at(generators, model, ends, stops=()):
    model.get_base_model().generation_config.eos_token_id = ends or None
    for generator in generators:
        generator.turn = TurnEnd(ends, list(stops))


@pytest.mark.parametrize("sampling", [Sampling(60), Sampling(60, temperature=0.9, top_p=0.8)])
def test_captured_steps_give_the_answers_of_plain_steps(model, tokenizer, sampling):
    texts = prompts(tokenizer)
    both = plain, captured = pair(model, tokenizer, sampling)
    ended_at(both, model, [])
    free = plain.token_ids(texts)
    if model.device.type == "cuda" and sampling.temperature:
        assert captured.token_ids(texts) == captured.token_ids(texts), "the seed decides"
        return
    assert captured.token_ids(texts) == free
    ends = sorted({free[0][9], free[2][20], free[5][40]})
    ended_at(both, model, ends)
    answers = plain.answers(texts)
    assert len({answer.tokens for answer in answers}) > 1, "they end at different steps"
    assert captured.answers(texts) == answers
    assert captured.answers(texts[:2]) == plain.answers(texts[:2])


def test_a_stop_string_ends_an_answer_at_the_same_token(model, tokenizer):
    texts = prompts(tokenizer)
    both = plain, captured = pair(model, tokenizer, Sampling(60))
    ended_at(both, model, [])
    stop = next(text[6:8] for one in plain.answers(texts) if len(text := one.text) > 20)
    ended_at(both, model, [257], [stop])
    answers = plain.answers(texts)
    assert "stop" in {answer.finish for answer in answers}
    assert captured.answers(texts) == answers


def test_each_side_has_its_own_steps(model, tokenizer):
    texts = prompts(tokenizer)
    both = plain, captured = pair(model, tokenizer, Sampling(24))
    ended_at(both, model, [])
    found = {}
    for side in ("base", "tuned", "base"):
        with answering(model, side):
            found[side] = captured.answers(texts)
            assert found[side] == plain.answers(texts)
    assert found["base"] != found["tuned"]


def test_other_weights_or_another_shape_need_other_tensors(model, tokenizer):
    steps = CapturedSteps(model, 4, 130, lambda ids, logits: logits.argmax(-1))
    assert steps.fits(4, 130) and steps.fits(4, 190)
    assert not steps.fits(5, 130) and not steps.fits(3, 130), "draws depend on the number of rows"
    assert not steps.fits(4, 90) and not steps.fits(4, 260)
    with model.disable_adapter():
        assert not steps.fits(4, 130)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    assert not steps.fits(4, 130), "weights that came in"


def test_nan_logits_name_the_prompt(model, tokenizer):
    [sign] = tokenizer("!", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[sign] = float("nan")
    texts = [*prompts(tokenizer)[:2], tokenizer("a!b", add_special_tokens=False)["input_ids"]]
    both = _, captured = pair(model, tokenizer, Sampling(4))
    ended_at(both, model, [])
    with pytest.raises(NotANumber) as caught:
        captured.answers(texts)
    assert caught.value.position == 2


def test_a_step_that_cannot_be_captured_is_said_and_the_answers_come(
    model, tokenizer, monkeypatch, caplog
):
    def refuses(*args):
        raise NotCaptured("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedSteps, "advance", refuses)
    both = plain, captured = pair(model, tokenizer, Sampling(24))
    ended_at(both, model, [])
    assert captured.answers(prompts(tokenizer)) == plain.answers(prompts(tokenizer))
    assert "not captured, so answers are slower: operation not permitted" in caplog.text
    assert captured.decoding == "plain"


@pytest.mark.parametrize(
    "other",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"_attn_implementation": "eager"},
        {"num_local_experts": 4},
        {"rope_parameters": {"rope_type": "longrope"}},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
    ],
)
def test_models_whose_steps_may_differ_are_not_captured(base, other, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    assert not can_capture(model), "a CPU captures nothing"
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert can_capture(model)
    for name, value in other.items():
        setattr(model.config, name, value)
    assert not can_capture(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU captures steps")
def test_a_gpu_captures_a_step_once_for_each_size(base, tokenizer, monkeypatch):
    captures, capture = [], CapturedSteps._capture
    monkeypatch.setattr(
        captured_decoding.CapturedSteps,
        "_capture",
        lambda self: captures.append(self.size) or capture(self),
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).cuda()
    generator = Generator(model, tokenizer, Sampling(40))
    assert generator.decoding == "captured"
    model.generation_config.eos_token_id = None
    generator.turn = TurnEnd([], [])
    for count in (8, 8, 3):
        generator.answers(prompts(tokenizer, count))
    assert captures == [8, 3]
