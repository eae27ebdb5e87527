"""What a job tells the terminal when it ends, and its exit status. The first line of a failure is its cause."""

import tempfile
import traceback
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from raypipe.errors import UsageError, printable
from raypipe.run.causes import BREAKS, Untouched, cause_of

T = TypeVar("T")


def attempt(do: Callable[[], T], *, kept: str, again: str, console: Console) -> T | int:
    """What `do` returns; or where it did not come to its end, the exit status of a job, and the user is told why.

    Args:
        kept: what there is of an execution that broke off, a sentence.
        again: the command that goes on, in a sentence.
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
    except BREAKS as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C again, while Ray was ending
            return 130
        say(console, f"error: {cause_of(error)}", bad=True)
        say(console, f"{kept} {again}\nAll that Ray says of it: {_trace(error)}")
        return 1


def ended(failure: str | None, *, console: Console) -> int:
    """The exit status of a job that came to its end; the user is told why it counts as failed, if it does."""
    if failure:
        say(console, f"error: {printable(failure, 4000)}", bad=True)
    return 1 if failure else 0


def say(console: Console, text: str, *, bad: bool = False) -> None:
    """Print `text` as it is, control characters of names aside; red where it is `bad`."""
    lines = [printable(line, 4000) for line in text.split("\n")]
    style = "red" if bad else None
    # Unwrapped: what is to be copied stays in one line.
    console.print("\n".join(lines), style=style, markup=False, highlight=False, soft_wrap=True)


def goes_on(*, resume: bool) -> str:
    """How a run goes on, in a sentence: with --no-resume it would delete what is finished."""
    return f"The same command {'' if resume else 'without --no-resume '}goes on from there."


def _trace(error: BaseException) -> str:
    """The file that now has the whole trace of an error, which runs over pages."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="raypipe-error-", suffix=".log", delete=False, errors="backslashreplace"
    ) as file:
        file.write(text)
    return file.name
