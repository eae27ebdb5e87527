"""Errors that are told to the user, and the one boundary at which foreign structure is read. Imports nothing of raypipe."""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_MOST = 300  # characters of a cause: a message stays readable, whatever a hostile file put into it


class UsageError(ValueError):
    """What the user asked for cannot be done. The message states the value given, the consequence and the remedy.

    Commands print it in one line and exit with status 2.
    """


@dataclass(slots=True)
class Place:
    """Where in a foreign file reading is. `at` is its text, or parts of one that are only joined when they are told."""

    at: Any = ""

    def __str__(self) -> str:
        parts = self.at if isinstance(self.at, tuple) else (self.at,)
        return printable(
            " ".join(part if isinstance(part, str) else shown(part) for part in parts if part != "")
        )


@contextlib.contextmanager
def foreign(what: str, *, remedy: str, passes: tuple[type[Exception], ...] = ()) -> Iterator[Place]:
    """The boundary at which structure that somebody else wrote is read: any exception becomes a UsageError.

        with foreign(f"the journal entry {name!r}", remedy="Delete it.", passes=(OSError,)) as place:
            for number, row in enumerate(json.loads(data)["rows"]):
                place.at = ("row", number)  # told if what follows raises
                ...

    Parsers of damaged bytes raise anything, so a list of exceptions is never complete. A file that was cut, a footer that
    lies, nesting that is too deep and numbers beyond 64 bits all end here. Read the bytes outside, or name what a store
    raises in `passes`: that a store does not answer says nothing of the file.

    Where one row pays and not the run, catch Exception there and give `words` of it as the reject's detail.

    Args:
        what: the file, as it stands after "cannot read": "the journal entry 'x.json'".
        remedy: what to do about it, a sentence.
        passes: exceptions with another meaning, which are raised as they are. So is UsageError.

    Yields:
        The place, for whoever reads to set.

    Raises:
        UsageError: file, place, cause and remedy.
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
    """What an error says, in one line of printable text that names its kind where the message alone would not be understood."""
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


def shown(value: Any) -> str:
    """A foreign value as Python writes it, shortened: nesting that is too deep, or a million entries, are shown as dots."""
    return printable(_SHORT.repr(value))


def printable(text: str, most: int = _MOST) -> str:
    """The text without control characters and lone surrogates, which are written as escapes, and cut after `most` characters."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in cut
    )


def did_you_mean(given: Any, known: Iterable[Any]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    names = [str(name) for name in known]
    given = str(given)[:100]  # comparing takes the product of both lengths
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    lowered = [name for name in names if name.lower() == given.lower()]
    there = ", ".join(names) or "none"
    if lowered or close:
        return f"; did you mean {(lowered or close)[0]!r}? Known: {there}"
    return f"; known: {there}"
