"""What the tests of the app's page share."""

import pytest
from conftest import read

from sftlab.chat.engine import Piece

pytest.importorskip("gradio", reason="gradio is not installed")


class Recorder:
    """In a model's place: what reaches it, two pieces."""

    context, mixed, sides, start, no_start = 100, True, ("base", "tuned"), None, "no start"

    def __init__(self, folder, load_in_4bit=False, trusted=False):
        self.run, self.asked, self.four = read(folder), [], load_in_4bit

    def fit(self, history, most, stop=None):
        return history, 1

    def close(self):
        pass

    def reply(self, history, sides, settings, stop):
        self.asked.append((history, sides, settings))
        for end in (None, "stop"):
            each = {side: f"{side} says" for side in sides}
            yield Piece(
                each,
                dict.fromkeys(sides, 2),
                dict.fromkeys(sides, 9.0),
                0.1,
                dict.fromkeys(sides, end),
            )
