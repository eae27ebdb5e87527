"""What a job prints when it ends, and its exit status. A failure's first line is its cause."""

import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from raypipe.errors import UsageError, printable
from raypipe.run.causes import Untouched, breaks, cause_of

T = TypeVar("T")


def attempt(do: Callable[[], T], *, kept: str, again: str, console: Console) -> T | int:
    """Call `do`. If it fails, print why.

    Args:
        kept: a sentence that says what is left of an execution that ended early.
        again: a sentence that says which command goes on.

    Returns:
        What `do` returns, or the exit status of a job that failed.
    """
    try:
        return do()
    except UsageError as error:
        say(console, f"error: {printable(str(error), 4000)}", bad=True)
        return 2
    except Untouched:
        say(console, "\nInterrupted. Nothing was changed.")
        return 130
    except KeyboardInterrupt:
        say(console, f"\nInterrupted. {again} {kept}")
        return 130
    except breaks() as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C again, as Ray was ending
            return 130
        say(console, f"error: {cause_of(error)}", bad=True)
        say(console, f"{kept} {again}\nRay's whole trace: {_trace(error)}")
        return 1


def ended(failure: str | None, *, console: Console) -> int:
    """The exit status of a job that ran to its end. Prints `failure`, the reason why it failed."""
    if failure:
        say(console, f"error: {printable(failure, 4000)}", bad=True)
    return 1 if failure else 0


def say(console: Console, text: str, *, bad: bool = False) -> None:
    """Print `text` with control characters escaped; red if it is `bad`."""
    lines = [printable(line, 4000) for line in text.split("\n")]
    style = "red" if bad else None
    # Unwrapped, so that commands and paths can be copied from one line.
    console.print("\n".join(lines), style=style, markup=False, highlight=False, soft_wrap=True)


def goes_on(*, resume: bool) -> str:
    """A sentence that says how the run goes on: --no-resume would delete what is finished."""
    return f"The same command {'' if resume else 'without --no-resume '}goes on from there."


def _trace(error: BaseException) -> str:
    """Write the whole trace of an error, which takes pages, to a file. Returns its name."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="raypipe-error-", suffix=".log", delete=False, errors="backslashreplace"
    ) as file:
        file.write(text)
    return file.name
