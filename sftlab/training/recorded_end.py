"""How a training ends that does not succeed: run.json says why, and the last lines what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sftlab.data.loss_check import WHAT_TO_DO
from sftlab.data.template_errors import is_of_template
from sftlab.exit_messages import first_line, last_line
from sftlab.runs.run_directory import REMEDY, Run
from sftlab.training.disk_room import is_full
from sftlab.training.finiteness import NotFinite
from sftlab.training.save_adapter import AfterTraining
from sftlab.training.stop_on_signal import Stopped


@contextmanager
def recorded_end(run: Run, rank: int) -> Iterator[None]:
    """Write to run.json how the run was stopped or why it failed, and say how it goes on.

    Raises SystemExit after every Exception, a full disk and a signal.
    """
    try:
        yield
    except Stopped as stopped:
        if run.began:
            run.finish("interrupted", reason=f"signal {stopped.number}: stopped at once")
        say_how_to_go_on(run)
        sys.exit(128 + stopped.number)
    except NotFinite as error:
        run.fail(f"{error}", rank)
        if not run.is_main:
            sys.exit(2)
        sys.stderr.write("\n")  # the progress bar's line ends here
        sys.exit(f"error: the training {error}. {run.way_on()} {REMEDY}")
    except AfterTraining as error:
        cause = error.__cause__ or error
        if is_full(cause):
            run.finish("interrupted", reason=f"{error} ({cause})")
        run.fail(f"{error} ({type(cause).__name__}: {cause})", rank)
        why = last_line(cause, _traceback_file(run, rank)).removeprefix("error: ")
        sys.exit(f"error: {error} ({why}). {run.way_on()}" if run.is_main else 2)
    except BaseException as error:
        if is_full(error):
            if run.began:
                run.finish("interrupted", reason=f"{error}")
            say_how_to_go_on(run)
            sys.exit(f"error: {error}")
        if not isinstance(error, SystemExit):
            run.fail(f"{type(error).__name__}: {error}", rank)
        if not isinstance(error, Exception):
            raise
        say_how_to_go_on(run)
        if is_of_template(error):  # of a stream, whose rows are rendered as they come
            sys.exit(f"error: the chat template refuses a row: {first_line(error)}; {WHAT_TO_DO}")
        sys.exit(last_line(error, _traceback_file(run, rank)))
    finally:
        run.release()


def _traceback_file(run: Run, rank: int) -> Path | None:
    """Returns where a rank keeps the traceback of an internal error; None if no run began."""
    if not run.began:
        return None
    run.made.note(["traceback-*.txt"])
    return run.folder / f"traceback-{rank}.txt"


def say_how_to_go_on(run: Run) -> None:
    """Write to stderr how an unfinished run goes on."""
    if run.is_main and run.began:
        sys.stderr.write(f"{run.way_on()}\n")
