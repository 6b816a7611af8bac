"""The chat answers as the evaluation does, streams what is settled, and stops when told to."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from conftest import byte_tokenizer, copy_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sftlab.chat.engine import UPDATE_S, Chat, Settings, _Draw
from sftlab.data.chat_template import prompt_ids
from sftlab.evaluation.base_and_tuned import answering, finished_run, load_pair
from sftlab.evaluation.generation import Generator, Sampling
from sftlab.runs.run_directory import SIDES

QUESTION = [{"role": "user", "content": "Repeat the number 7 in words."}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
GREEDY = Settings(temperature=0, max_new_tokens=24)


def letters_alone(model):
    """Let the model write letters and blanks alone, as bytes at random are seldom text."""
    letters = byte_tokenizer()("abcdefghij klmnop", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        head = model.get_base_model().lm_head.weight
        head[[i for i in range(259) if i not in letters]] = 0
        head[letters] += 0.01
    return model


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


def pieces(chat, history=QUESTION, sides=SIDES, settings=GREEDY, stop=None):
    return list(chat.reply(history, sides, settings, stop or threading.Event()))


def texts(chat, history=QUESTION, sides=SIDES, settings=GREEDY):
    return pieces(chat, history, sides, settings)[-1].texts


@contextmanager
def written(chat, text=None, seconds=0.002):
    """Every row writes `text` (bytes), or what it likes, a token in so many seconds, and each of
    them can be seen.

    Yields the list of its steps.
    """
    ids = [i for byte in text or b"" for i in byte_tokenizer().convert_tokens_to_ids([BYTES[byte]])]
    steps = []

    def script(module, args, logits):
        time.sleep(seconds)
        if len(steps) < len(ids):
            logits = torch.zeros_like(logits)
            logits[..., ids[len(steps)]] = 1
        steps.append(time.perf_counter())
        return logits

    hook = chat._model.get_base_model().lm_head.register_forward_hook(script)
    try:
        with patch("sftlab.chat.engine.UPDATE_S", 0):
            yield steps
    finally:
        hook.remove()


def byte_names():
    """GPT-2's name of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


BYTES = byte_names()


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


def test_every_setting_changes_what_is_generated(chat):
    greedy = texts(chat)
    drawn = texts(chat, settings=Settings(2.0, 1.0, 0, 24))
    assert drawn != greedy
    assert drawn == texts(chat, settings=Settings(2.0, 1.0, 0, 24))
    assert drawn != texts(chat, settings=Settings(2.0, 1.0, 0, 24, seed=1))
    assert drawn != texts(chat, settings=Settings(0.3, 1.0, 0, 24))
    assert texts(chat, settings=Settings(2.0, 1.0, 1, 24)) == greedy
    assert texts(chat, settings=Settings(2.0, 1e-6, 0, 24)) == greedy
    assert texts(chat, settings=Settings(0, repetition_penalty=5, max_new_tokens=24)) != greedy
    for tokens in (1, 9):
        last = pieces(chat, settings=Settings(0, max_new_tokens=tokens))[-1]
        assert last.tokens == {"base": tokens, "tuned": tokens}
        assert last.finished == {"base": "length", "tuned": "length"}


def test_tokens_are_drawn_with_their_probabilities(chat):
    prompt = torch.tensor([prompt_ids(chat._tokenizer, QUESTION)])
    with torch.no_grad():
        logits = chat._model(input_ids=prompt, adapter_names=["__base__"]).logits[0, -1]
    expected = (logits / 0.5).softmax(-1).max()
    best = chat._tokenizer.decode([int(logits.argmax())])
    drawn = [
        texts(chat, sides=["base"], settings=Settings(0.5, 1.0, 0, 1, seed=seed))["base"]
        for seed in range(400)
    ]
    assert best.strip()
    assert drawn.count(best) / 400 == pytest.approx(float(expected), abs=0.1)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, 50), (2.0, 0.6, 0), (0.5, 1.0, 9), (1.3, 1.0, 0)]
)
def test_what_may_be_drawn_is_what_transformers_processors_keep(temperature, top_p, top_k):
    scores = torch.randn(2, 1000, generator=torch.Generator().manual_seed(3)) * 3
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits, tokens = _Draw(Settings(temperature, top_p, top_k), 2, scores.device).kept(scores)
    found = (
        logits
        if tokens is None
        else torch.full_like(scores, -torch.inf).scatter(-1, tokens, logits)
    )
    assert torch.equal(found, processors(None, scores.clone()))
    assert found.isfinite().any(dim=-1).all()


def test_the_models_own_defaults_and_padding_do_not_count(
    finished, tmp_path, base, chat, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=20
    )
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    folder = copy_of(finished[0], tmp_path / "run")
    run = finished_run(folder)
    run["recipe"]["model_name_or_path"] = str(tmp_path / "base")
    (folder / "run.json").write_text(json.dumps(run))
    other = Chat(folder)
    letters_alone(other._model)
    assert texts(other) == texts(chat)


def test_stop_ends_within_a_token(chat):
    stop = threading.Event()
    with written(chat, seconds=0.02) as steps:
        replies = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), stop)
        for piece in replies:
            if piece.tokens["base"] == 3:
                break
        stop.set()
        taken = len(steps)
        rest = list(replies)
    assert len(steps) <= taken + 1
    assert rest[-1].finished == {"base": "stopped", "tuned": "stopped"}
    assert rest[-1].tokens["base"] == len(steps)
    assert rest[-1].texts["base"].startswith(piece.texts["base"])


def test_closing_the_iterator_ends_its_thread_and_the_next_reply_is_whole(chat):
    whole, before = texts(chat), threading.enumerate()
    with written(chat, seconds=0.02) as steps:
        replies = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(replies)
        replies.close()
        taken = len(steps)
        assert threading.enumerate() == before
        time.sleep(0.1)
        assert len(steps) == taken < 10
    assert texts(chat) == whole
    assert threading.enumerate() == before


def test_a_closed_reply_leaves_no_cache_behind(chat):
    def caches():
        return sum(isinstance(thing, Cache) for thing in gc.get_objects())

    gc.collect()
    before = caches()
    gc.disable()  # what goes must not wait for the collector
    try:
        replies = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(replies)
        assert caches() > before
        replies.close()
        assert caches() == before
        assert not chat._lock.locked()
    finally:
        gc.enable()


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", "1"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be [^.]*(0.01|0.1)?[^.]*, got"):
        Settings(**{field: value})


@pytest.mark.parametrize("sides", [[], ["base", "base"], ["other"]])
def test_sides_that_cannot_be_are_refused(chat, sides):
    with pytest.raises(ValueError, match="sides"):
        chat.reply(QUESTION, sides, GREEDY, threading.Event())


def test_a_run_that_cannot_be_loaded_is_refused_in_a_sentence(finished, tmp_path):
    def broken(name, change):
        folder = copy_of(finished[0], tmp_path / name)
        change(folder)
        with pytest.raises(ValueError) as caught:
            Chat(folder)
        message = str(caught.value)
        assert "\n" not in message, message
        return message

    def rewrite(**facts):
        return lambda folder: (folder / "run.json").write_text(
            json.dumps(finished_run(finished[0]) | facts)
        )

    weights, config = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    recipe = finished_run(finished[0])["recipe"]
    assert "does not load" in broken("no_weights", lambda x: (x / weights).unlink())
    assert "does not load" in broken(
        "torn", lambda x: (x / weights).write_bytes((x / weights).read_bytes()[:999])
    )
    assert "does not load" in broken("empty", lambda x: (x / weights).write_bytes(b""))
    assert "does not load" in broken("config", lambda x: (x / config).write_text("{"))
    assert "holds no tokenizer" in broken(
        "tokens", lambda x: (x / "adapter/tokenizer.json").unlink()
    )
    assert "did not succeed" in broken("failed", rewrite(status="failed", reason="boom"))
    assert "line 1" in broken("json", lambda x: (x / "run.json").write_text("{"))
    assert "cannot be loaded" in broken(
        "base", rewrite(recipe=recipe | {"model_name_or_path": "nowhere/at_all"})
    )
    with pytest.raises(ValueError, match="no run directory"):
        Chat(tmp_path / "nowhere")


def test_four_threads_get_each_its_own_answer(chat):
    histories = [
        [{"role": "user", "content": f"Repeat the number {i} in words."}]
        for i in (3, 14, 159, 2653)
    ]
    sides = [("base",), ("tuned",), SIDES, ("tuned",)]
    alone = [texts(chat, *asked) for asked in zip(histories, sides, strict=True)]
    assert len({text for answer in alone for text in answer.values()}) > 2
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda *asked: texts(chat, *asked), histories, sides)) == alone


def test_a_reply_that_waits_can_be_stopped_and_one_that_failed_hinders_none(chat):
    whole, stop = texts(chat), threading.Event()
    with written(chat, seconds=0.02):
        running = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(running)
        stop.set()
        started = time.perf_counter()
        waiting = pieces(chat, stop=stop)
        assert time.perf_counter() - started < 0.5
        assert waiting[-1].finished == {"base": "stopped", "tuned": "stopped"}
        assert waiting[-1].tokens == {"base": 0, "tuned": 0}
        running.close()
    seen = []

    def fail(module, args, logits):
        seen.append(logits)
        if len(seen) == 3:
            raise RuntimeError("out of memory")

    hook = chat._model.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pieces(chat, sides=["tuned"])
    hook.remove()
    assert texts(chat) == whole


def test_an_adapter_that_peft_cannot_mix_answers_one_side_after_the_other(finished, tmp_path, base):
    folder = copy_of(finished[0], tmp_path / "dora")
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        folder / "adapter"
    )
    chat = Chat(folder)
    letters_alone(chat._model)
    found = pieces(chat)
    model = letters_alone(load_pair(folder, finished_run(folder)))
    for side in SIDES:
        with answering(model, side):
            generator = Generator(model, chat._tokenizer, Sampling(24))
            assert (
                found[-1].texts[side]
                == generator.answers([prompt_ids(chat._tokenizer, QUESTION)])[0].text
            )
    assert found[-1].texts["base"] != found[-1].texts["tuned"]
    assert found[-1].finished == {"base": "length", "tuned": "length"}
    assert texts(chat, sides=["tuned"]) == {"tuned": found[-1].texts["tuned"]}


@pytest.mark.parametrize("width", [32, 64])
def test_four_bits_answer_both_sides_or_are_refused(finished, tmp_path, base, width):
    config = AutoConfig.from_pretrained(
        base, hidden_size=width, head_dim=width // 2, intermediate_size=64
    )
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    folder = copy_of(finished[0], tmp_path / "run")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")
    run = finished_run(folder)
    run["recipe"]["model_name_or_path"] = str(tmp_path / "base")
    (folder / "run.json").write_text(json.dumps(run))
    try:
        chat = Chat(folder, load_in_4bit=True)
    except ValueError as error:
        assert width == 32 and "does not run in 4 bits here" in str(error)
        return
    assert chat._model.get_base_model().is_loaded_in_4bit
    letters_alone(chat._model)
    both = texts(chat)
    assert both["base"] != both["tuned"]
    assert {side: texts(chat, sides=[side])[side] for side in SIDES} == both
    for side in SIDES:
        with answering(chat._model, side):
            generator = Generator(chat._model, chat._tokenizer, Sampling(24))
            assert both[side] == generator.answers([prompt_ids(chat._tokenizer, QUESTION)])[0].text


def test_a_model_that_gives_no_probabilities_is_named(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path / "nan")
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * float("nan") for name, weight in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="the tuned model gives no probabilities"):
        pieces(Chat(folder))


def test_close_ends_the_reply_and_frees_the_model(finished):
    chat = Chat(finished[0])
    with written(chat, seconds=0.02):
        replies = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(replies)
        chat.close()
        assert list(replies)[-1].finished == {"base": "stopped", "tuned": "stopped"}
    assert chat._model is None
    with pytest.raises(ValueError, match="closed"):
        pieces(chat)
