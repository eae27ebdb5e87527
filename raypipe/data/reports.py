"""Reports of finished runs, beside their results. Anybody may have written them."""

import json
from collections.abc import Sequence
from typing import Any

from raypipe.data import parts
from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.data.stores import one_line
from raypipe.errors import UsageError, foreign, printable

REMEDY = "It is no report of raypipe; give the output directory of a run that ended."


class NoReport(UsageError):
    """There is no report in a folder."""


def of(run: str) -> tuple[dict, str]:
    """Read the report.json of a finished run. Returns it and its location.

    Raises:
        UsageError: there is none.
    """
    folder = Location.of(run)
    places = [folder / f"{STATE}/report.json", folder / "report.json"]
    for place in places:
        try:
            data = place.read(once=True)  # who waits here can ask again
        except (FileNotFoundError, NotADirectoryError):  # the latter if `run` is a file
            continue
        except OSError as error:
            raise UsageError(
                f"The report {place} cannot be read: {one_line(error)}. Correct the address or the "
                "keys of its store, or try again."
            ) from error
        with foreign(f"the report {place}", remedy=REMEDY):
            return _shown(json.loads(data)), str(place)
    raise NoReport(
        f"There is no report in {run!r}: neither {' nor '.join(map(str, places))} exists. A run "
        f"writes it when it ends."
    )


def _shown(value: Any) -> Any:
    """A report that somebody else may have written, without control characters for the terminal."""
    if isinstance(value, str):
        return printable(value, 4000)
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, dict):
        return {_shown(name): _shown(one) for name, one in value.items()}
    return value


def of_all(runs: Sequence[str]) -> tuple[dict[str, dict], list[str]]:
    """The reports of several runs, by their location, with those of all parts of each.

    Returns:
        Also the places of parts that have no report yet.

    Raises:
        UsageError: a run has none.
    """
    found: dict[str, dict] = {}
    missing: list[str] = []
    for run in runs:
        try:
            record, place = of(run)
            found[place] = record
            continue
        except NoReport:
            root = Location.of(run)
            if not (divided := parts.there(root)):
                raise
        for part in (divided[0], *divided[0].others()):
            folder = str(root / part.state(root).state)
            try:
                record, place = of(folder)
                found[place] = record
            except NoReport:
                missing.append(folder)
    if not found:
        raise NoReport(f"There is no report yet of {', '.join(missing)}: no part has ended.")
    return found, missing
