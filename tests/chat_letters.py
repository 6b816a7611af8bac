"""A tiny model whose tokens are letters, for the tests of the chat engine."""

import threading
import time
from contextlib import contextmanager
from unittest.mock import patch

import torch
from conftest import byte_tokenizer

from sftlab.chat.sampling import Settings
from sftlab.runs.run_directory import SIDES

QUESTION = [{"role": "user", "content": "Repeat the number 7 in words."}]
GREEDY = Settings(temperature=0, max_new_tokens=24)


def letters_alone(model):
    """Let the model write letters and blanks alone, as bytes at random are seldom text."""
    letters = byte_tokenizer()("abcdefghij klmnop", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        head = model.get_base_model().lm_head.weight
        head[[i for i in range(259) if i not in letters]] = 0
        head[letters] += 0.01
    return model


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
