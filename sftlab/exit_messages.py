"""How a script ends when it cannot go on: one sentence on stderr and an exit status.

| what happened                                     | last line             | status |
| ------------------------------------------------- | --------------------- | ------ |
| a mistake of the user, a file, a missing package  | `error: ...`          | 1      |
| the memory of the GPU or of the machine is full   | `error: ...`          | 1      |
| Ctrl-C                                            | `stopped by Ctrl-C`   | 130    |
| anything else, which is a fault of this program   | `internal error: ...` | 1      |

The traceback of an internal error is kept in a file. SFTLAB_TRACEBACK=1 prints every traceback.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftlab.paths import ROOT

CTRL_C = 130
# characters of a last line
LONGEST = 1200
# what the libraries raise where this machine or installation cannot do what was asked for
_CANNOT = (OSError, ImportError, NotImplementedError)


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, shortened, or its kind if it says nothing."""
    return short((str(error).strip().splitlines() or [type(error).__name__])[0])


def short(text: str) -> str:
    """Returns a message without the middle of what is too long to read, such as a value."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 300]} ... {text[-250:]}"


@contextmanager
def mistakes_in_one_line(*others: type[Exception]) -> Iterator[None]:
    """End the script in one sentence; `others` are mistakes of the user besides ValueError.

    Raises SystemExit, whose message Python prints on stderr.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        sys.exit(CTRL_C)
    except (ValueError, *others) as error:
        _print_if_asked(error)
        sys.exit(short(f"error: {error}"))
    except Exception as error:
        sys.exit(last_line(error))


def last_line(error: Exception, keep: Path | None = None) -> str:
    """Returns the sentence that a script ends with after an error that it did not expect.

    The traceback of an internal error is written to `keep`, or to a temporary file.
    """
    _print_if_asked(error)
    said = " ".join(f"{error}".split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in said:
        first = said.split(". ")[0]
        return (
            f"error: the GPU's memory is full ({first}): `python recipes/plan.py` with your recipe "
            "and `--gpu here` names what helps"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in said:
        return (
            f"error: this machine's memory is full ({said[:200]}): give fewer rows at once, "
            "shorter rows, a lower lora_r or a smaller model"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {error.filename}: {error.strerror}"
    if isinstance(error, _CANNOT) or _is_ours(error):
        return short(f"error: {said}")
    path = _kept(error, keep)
    return (
        f"internal error: {type(error).__name__}: {said[:300]} (a fault of this program; the "
        f"traceback is in {path}: report it as docs/troubleshooting.md says)"
    )


def _is_ours(error: Exception) -> bool:
    """Returns whether the project's own code raised an error whose message is a sentence."""
    if type(error) not in (RuntimeError, ValueError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised = Path(frame.f_code.co_filename)
    return raised.is_relative_to(ROOT / "sftlab") or raised.is_relative_to(ROOT / "recipes")


def _kept(error: Exception, path: Path | None) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        if path is None:
            number, name = tempfile.mkstemp(prefix="sftlab-traceback-", suffix=".txt")
            os.close(number)
            path = Path(name)
        path.write_text(text, encoding="utf-8")
    except OSError:  # nowhere to write: it must not be lost
        sys.stderr.write(text)
        return "the lines above"
    return str(path)


def _print_if_asked(error: Exception) -> None:
    if os.environ.get("SFTLAB_TRACEBACK") == "1":
        traceback.print_exception(error)
