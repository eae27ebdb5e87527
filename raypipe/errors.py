"""Errors that are shown to the user, and the boundary at which foreign data is read.

Imports nothing of raypipe.
"""

import contextlib
import difflib
import logging
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_MOST = 300
"""Characters of a cause, so that a hostile file cannot make a message unreadable."""


class UsageError(ValueError):
    """The request cannot be done. The message states the given value, consequence and remedy.

    Commands print it in one line and exit with status 2.
    """


@dataclass(slots=True)
class Place:
    """The current position in a foreign file.

    at: its text, or a tuple of parts that are joined only when an error is shown.
    """

    at: object = ""

    def __str__(self) -> str:
        parts = self.at if isinstance(self.at, tuple) else (self.at,)
        return printable(
            " ".join(part if isinstance(part, str) else shown(part) for part in parts if part != "")
        )


@contextlib.contextmanager
def foreign(what: str, *, remedy: str, passes: tuple[type[Exception], ...] = ()) -> Iterator[Place]:
    """Turn any exception into a UsageError while structure is read that somebody else wrote.

        with foreign(f"the journal entry {name!r}", remedy="Delete it.") as place:
            for number, row in enumerate(json.loads(data)["rows"]):
                place.at = ("row", number)  # shown if the following raises
                ...

    Parsers of damaged bytes raise anything, so a list of exceptions is never complete. Truncated
    files, wrong footers, deep nesting and numbers beyond 64 bits all end here. Read the bytes
    outside, or name the store's exceptions in `passes`: a store that does not answer says nothing
    about the file.

    If only one row should fail and not the run, catch Exception there and use `words` of it as the
    reject's detail.

    Args:
        what: the file, as it stands after "cannot read": "the journal entry 'x.json'".
        remedy: what to do about it, a sentence.
        passes: exceptions with another meaning. They are raised unchanged, as is UsageError.

    Yields:
        The position, which the reader sets.

    Raises:
        UsageError: file, position, cause and remedy.
    """
    place = Place()
    try:
        yield place
    except Exception as error:
        if isinstance(error, (UsageError, *passes)):
            raise
        where = f", {place}" if str(place) else ""
        raise UsageError(
            f"cannot read {printable(what)}{where}: {words(error)}. {remedy}"
        ) from error


def words(error: BaseException) -> str:
    """Describe an error in a line of printable text, with its type unless the message suffices."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"not enough memory for it{text and f': {text}'}"
    if not isinstance(error, UsageError | OSError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return printable(text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 4, 8, 6, 80, 80


def shown(value: object) -> str:
    """The repr of a foreign value, shortened: deep nesting and long lists end in dots."""
    return printable(_SHORT.repr(value))


def printable(text: str, most: int = _MOST) -> str:
    """Escape control characters and lone surrogates, and cut the text after `most` characters."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in cut
    )


def did_you_mean(given: object, known: Iterable[object]) -> str:
    """The end of an error message: what was probably meant, and what exists."""
    names = [str(name) for name in known]
    given = str(given)[:100]  # the comparison takes time in the product of both lengths
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    lowered = [name for name in names if name.lower() == given.lower()]
    there = ", ".join(names) or "none"
    if lowered or close:
        return f"; did you mean {(lowered or close)[0]!r}? Known: {there}"
    return f"; known: {there}"


def logger(name: str) -> logging.Logger:
    """The logger of a module whose messages contain foreign names: they are `printable`."""
    log = logging.getLogger(name)
    log.addFilter(_make_printable)
    return log


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage(), 2000), ()
    return True
