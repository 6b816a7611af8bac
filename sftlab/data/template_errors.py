"""What a chat template can do wrong while it renders: raise, and never end."""

import traceback
from contextlib import AbstractContextManager

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from sftlab.data.time_limit import call_limit

# seconds that one conversation may take
LIMIT_S = 10
# what the code of a template can raise
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RecursionError,
    MemoryError,
)


def rendering_limit(what: str) -> AbstractContextManager[None]:
    """Raise TooSlow, which names `what`, once rendering a conversation within takes too long."""
    return call_limit(LIMIT_S, render_jinja_template, f"rendering {what} with the chat template")


def is_of_template(error: BaseException) -> bool:
    """Returns whether an error was raised while a template rendered."""
    code = render_jinja_template.__code__
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, TemplateError) or any(frame.f_code is code for frame in frames)
