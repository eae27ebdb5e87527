"""How far a loader is: an epoch, and which of its rows were delivered. Small, and JSON types.

A row's place is its number in the order of its epoch, which the seed and the epoch decide alone. So
places mean the same with any number of ranks, actors and images a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.data.tables import whole
from raypipe.errors import UsageError, foreign

Range = tuple[int, int]
"""Places from the first number up to, not including, the second."""

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Position:
    """What was delivered: all rows of the epochs before `epoch`, and its rows in `seen`."""

    epoch: int = 0
    seen: tuple[Range, ...] = ()

    def after(self, ranges: Iterable[Range], *, ends: bool) -> "Position":
        """The position after rows of this epoch were delivered.

        Args:
            ends: they were the last of the epoch.
        """
        if ends:
            return Position(epoch=self.epoch + 1)
        return Position(epoch=self.epoch, seen=union([*self.seen, *ranges]))

    def left(self, rows: int) -> np.ndarray:
        """The places of the epoch's `rows` rows that were not delivered, ascending."""
        fresh = np.ones(rows, bool)
        for start, stop in self.seen:
            fresh[start:stop] = False
        return np.flatnonzero(fresh)


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same places as ascending ranges that do not touch."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif stop > start:
            found.append((start, stop))
    return tuple(found)


def ranges_of(places: Sequence[int] | np.ndarray) -> list[Range]:
    """Places in any order as ranges."""
    numbers = np.sort(np.asarray(places, np.int64))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


# --- as JSON ---------------------------------------------------------------------------------


def to_state(position: Position, decides: Mapping[str, Any]) -> dict[str, Any]:
    """The position as JSON types.

    Args:
        decides: what decides the rows and their order, as JSON types.
    """
    seen = [list(one) for one in position.seen]
    return {"version": _VERSION, "epoch": position.epoch, "seen": seen, "rows": dict(decides)}


def from_states(
    states: Mapping[str, Any] | Sequence[Mapping[str, Any]], decides: Mapping[str, Any]
) -> Position:
    """The position of a state, or what several ranks' states say together.

    Raises:
        UsageError: a state is none, or is of other rows or another order.
    """
    given = [states] if isinstance(states, Mapping) else list(states)
    if not given:
        raise UsageError("load_state_dict got no state. Give what state_dict() returned.")
    positions = [_position(state, decides) for state in given]
    epoch = max(position.epoch for position in positions)
    seen = [one for position in positions if position.epoch == epoch for one in position.seen]
    places = union(seen)
    return Position(epoch=epoch).after(places, ends=places == ((0, decides["count"]),))


def _position(state: Mapping[str, Any], decides: Mapping[str, Any]) -> Position:
    with foreign("the loader's state", remedy="Give what state_dict() returned.") as place:
        place.at = "version"
        if whole(state["version"]) != _VERSION:
            raise ValueError(f"it is {state['version']}, and this raypipe knows {_VERSION}")
        place.at = "rows"
        saved = dict(state["rows"])
        place.at = "epoch"
        epoch = whole(state["epoch"])
        place.at = "seen"
        seen = [(whole(start), whole(stop)) for start, stop in state["seen"]]
        rows = decides["count"]
        if epoch < 0 or any(not 0 <= start <= stop <= rows for start, stop in seen):
            raise ValueError(f"its places are not among the {rows} images of an epoch")
    if saved != decides:
        differs = ", ".join(
            f"{name} {saved.get(name)} then, {decides[name]} now"
            for name in decides
            if saved.get(name) != decides[name]
        )
        raise UsageError(
            f"The state is of other rows, or of another order: {differs}. Going on would miss "
            f"images or give some twice. Nothing was changed. Give the loader the same images, "
            f"seed and shuffle as then, or begin again without the state."
        )
    return Position(epoch=epoch, seen=union(seen))
