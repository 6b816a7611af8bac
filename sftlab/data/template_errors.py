"""What a chat template can do wrong while it renders: raise, and never end.

The same kinds of errors can be faults of this program, so `except TEMPLATE_ERRORS` asks
`is_of_template` before it says that the template is at fault.
"""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from sftlab.data.time_limit import TooSlow, call_limit
from sftlab.exit_messages import first_line

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


@contextmanager
def refusals_of(row: str, advice: str = "") -> Iterator[None]:
    """Turn a template's refusal within into a ValueError that names the `row` and ends in `advice`.

    A template that never ends is stopped.
    """
    try:
        with rendering_limit("it"):
            yield
    except TEMPLATE_ERRORS as error:
        if not is_of_template(error):
            raise
        raise ValueError(
            f"{row}: the chat template refuses it: {first_line(error)}{advice}"
        ) from error


def is_of_template(error: BaseException) -> bool:
    """Returns whether a template raised an error while it rendered, or took too long."""
    code = render_jinja_template.__code__
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    rendered = any(frame.f_code is code for frame in frames)
    return rendered or isinstance(error, TemplateError | TooSlow)
