"""A chat reply stops within a token, and replies share one model in turn."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_letters import QUESTION, letters_alone, pieces, texts, written
from transformers import (
    Cache,
)

from sftlab.chat.engine import Chat
from sftlab.chat.sampling import Settings
from sftlab.runs.run_directory import SIDES


@pytest.fixture(scope="module")
def chat(finished):
    chat = Chat(finished[0])
    letters_alone(chat._model)
    return chat


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
    with written(chat, seconds=0.1) as steps:
        replies = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(replies)
        replies.close()
        taken = len(steps)
        assert threading.enumerate() == before
        time.sleep(0.3)
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
    with written(chat, seconds=0.1):
        running = chat.reply(QUESTION, SIDES, Settings(0, max_new_tokens=200), threading.Event())
        next(running)
        stop.set()
        started = time.perf_counter()
        waiting = pieces(chat, stop=stop)
        assert time.perf_counter() - started < 10
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
