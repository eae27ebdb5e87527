"""What a run waits for, in words: nodes that are missing, and why nothing moves."""

from collections.abc import Mapping
from dataclasses import dataclass

from raypipe.insight.states import PoolView

STALLED_S = 30.0
"""After so long without a finished call anywhere, a run says why."""


@dataclass(frozen=True, kw_only=True)
class Short:
    """CPUs that a run is asked to use and does not have.

    asked: by all actors together, one each. there: so many has the cluster for them.
    for_s: how long that has been so. grows: an autoscaler was asked for the rest.
    """

    asked: int
    there: int
    for_s: float
    grows: bool

    def said(self) -> str:
        """What that means, in words."""
        rest = (
            "the autoscaler is asked for them"
            if self.grows
            else "no autoscaler adds nodes here, so add one, or ask for fewer actors"
        )
        return (
            f"Waiting for {self.asked - self.there} of {self.asked} CPUs, {self.for_s:.0f} s: "
            f"{rest}. The run goes on with {max(self.there, 0)}, and uses nodes as they come."
        )


Notice = tuple[str, str]
"""A notice: its kind, which stays the same while the seconds in it pass, and the text."""


def notices(
    pools: Mapping[str, PoolView],
    *,
    at_work: Mapping[str, int],
    idle_s: float,
    short: Short | None,
    free_cpus: float | None,
) -> list[Notice]:
    """What a run waits for; empty: for nothing that it knows.

    Args:
        pools: of each stage, in order.
        at_work: of each stage, how many actors are in a call.
        idle_s: since a call was finished anywhere.
        short: the CPUs that are missing; None: none are.
        free_cpus: of the cluster, which no actor holds; None: not known.
    """
    found = []
    if short is not None:
        found.append((f"short {short.asked} {short.there}", short.said()))
    if idle_s >= STALLED_S:
        why = _why(pools, at_work, free_cpus)
        found.append((why, f"Nothing has moved for {idle_s:.0f} s: {why}."))
    return found


def _why(pools: Mapping[str, PoolView], at_work: Mapping[str, int], free_cpus: float | None) -> str:
    there = {name: pool for name, pool in pools.items() if not pool.done}
    if not there:
        return "no actor has started yet" if not pools else "the rest is up to who takes the blocks"
    none = [name for name, pool in there.items() if not pool.running]
    if none:
        name, count = none[0], there[none[0]].pending
        free = "" if free_cpus is None else f"; {free_cpus:g} CPUs of the cluster are free"
        return f"no {name} actor runs, and {count} wait for a CPU or start{free}"
    busy = {name: count for name, count in at_work.items() if count and name in there}
    if busy:
        doing = " and ".join(f"{count} {name} actors" for name, count in busy.items())
        return f"{doing} are still at the shards that they had then"
    if all(not pool.queued for pool in there.values()):
        return "the actors are idle, and who takes the blocks takes none"
    return "the actors are idle while blocks wait for them: what they made is not taken on"
