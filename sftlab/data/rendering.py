"""Conversations as text, under one chat template: what the model is asked, and what it answers."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby, islice
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from sftlab.data.messages import Conversation, Message
from sftlab.data.template_errors import TEMPLATE_ERRORS, is_of_template
from sftlab.data.token_cuts import common_prefix

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_answers(template: str) -> bool:
    """Whether a template marks with `{% generation %}` what the model writes."""
    return bool(_GENERATION.search(template))


class Rendered(NamedTuple):
    """A sequence as text: for each answer the prompt before it, and the text up to its end.

    `generated` are the places in each of these texts that the template marks as generated; None
    where it marks none.
    """

    prompts: list[str]
    wholes: list[str]
    generated: list[list[tuple[int, int]]] | None

    def answers(self) -> list["Rendered"]:
        """Returns a sequence for each answer."""
        marks = self.generated
        return [
            Rendered([prompt], [whole], marks and [marks[number]])
            for number, (prompt, whole) in enumerate(zip(self.prompts, self.wholes, strict=True))
        ]

    def is_one(self) -> bool:
        """Whether the text up to each answer is the beginning of the whole."""
        return all(map(self.wholes[-1].startswith, self.wholes[:-1]))


class Renderer:
    """Renders conversations with one template.

    `marked` says whether to note what a template with `{% generation %}` marks. Some templates
    write a prompt in another way once it is answered: Mistral's moves the system prompt. What the
    model is asked then stands before the answer, as it will when the model is used.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, Any], marked: bool) -> None:
        self.marked = marked and marks_answers(template)
        self._render = partial(render_jinja_template, chat_template=template, **special_tokens)
        self._text_arguments = False
        self._text_arguments = "arguments" in template and self._needs_text_arguments()

    def __call__(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Returns each conversation as text, up to each of its answers."""
        found = []
        for tools, alike in groupby(conversations, key=lambda one: one.tools):
            group = list(alike)
            ends = [(one.messages, number) for one in group for number in one.answers]
            asked, whole = [m[:n] for m, n in ends], [m[: n + 1] for m, n in ends]
            prompts = iter(self._texts(asked, tools, add_generation_prompt=True)[0])
            texts, marks = self._texts(whole, tools, return_assistant_tokens_mask=self.marked)
            pairs = zip(texts, marks if self.marked else texts, strict=True)
            for one in group:
                count = len(one.answers)
                wholes, generated = zip(*islice(pairs, count), strict=True)
                before, marked = list(islice(prompts, count)), list(generated)
                contents = (one.messages[number]["content"] for number in one.answers)
                answered = list(map(self._as_asked, before, wholes, contents))
                found.append(Rendered(before, answered, marked if self.marked else None))
        return found

    def is_as_written(self, turn: Conversation, whole: str) -> bool:
        """Whether `whole`, the turn as it is trained, is what the template makes of it."""
        return self._texts([turn.messages], turn.tools)[0][0] == whole

    def _as_asked(self, prompt: str, whole: str, answer: str) -> str:
        """Returns an answer behind its prompt as it is asked, if `whole` has another prompt."""
        if self.marked or whole.startswith(prompt):
            return whole
        ending = self.ending
        if not ending or not prompt.endswith(ending):
            return whole
        place = whole.rfind(ending, 0, whole.rfind(answer.strip()))
        return whole if place < 0 else prompt + whole[place + len(ending) :]

    def text_of(self, turn: Conversation) -> tuple[str, str]:
        """Returns the text before an answer, with its generation prompt, and up to its end."""
        (rendered,) = self([turn])
        return rendered.prompts[-1], rendered.wholes[-1]

    @cached_property
    def ending(self) -> str:
        """Returns the text that every prompt ends with under this template, perhaps none."""
        asked = [[{"role": "user", "content": text}] for text in ("One", "Z")]
        try:
            one, two = self._texts(asked, [], add_generation_prompt=True)[0]
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            return ""
        common = common_prefix(one[::-1], two[::-1])
        return one[len(one) - common :]

    def _texts(
        self, chats: list[list[Message]], tools: list[dict[str, Any]], **how: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        if self._text_arguments:
            chats = [[_with_text_arguments(message) for message in chat] for chat in chats]
        return self._render(conversations=chats, tools=tools or None, **how)

    def _needs_text_arguments(self) -> bool:
        """Whether the template takes the arguments of a tool call as JSON text alone."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        chat = [{"role": "user", "content": "One"}, answer]
        return not self._renders(chat) and self._renders(list(map(_with_text_arguments, chat)))

    def _renders(self, chat: list[Message]) -> bool:
        try:
            self._texts([chat], [])
        except TEMPLATE_ERRORS as error:
            if not is_of_template(error):
                raise
            return False
        return True


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return message | {"tool_calls": calls}
