"""A cluster that was joined: what it has now, and waiting for the nodes that a run needs."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from raypipe.insight.room import staying
from raypipe.run.cluster import internals
from raypipe.run.cluster.capacity import Bounds, bounds, nodes_now
from raypipe.run.cluster.machine import Session, cores_of
from raypipe.run.cluster.sizing import room_there
from raypipe.stages.stage import Stage, forms

LOOK_EVERY_S = 1.0
SAY_EVERY_S = 20.0


def as_it_is(session: Session, stages: Sequence[Stage], *, beside: int) -> Session:
    """`session` with what its cluster has now.

    Args:
        stages: whose actors need room.
        beside: CPUs for others than these actors.
    """
    nodes = staying(nodes_now())
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    there = min(room_there(stages, nodes), cpus - beside)
    known = bounds(session.address)
    most, most_gpus = _most(known, there=there, cpus=cpus)
    return replace(
        session,
        at_most=most,
        there=there,
        cores=cores_of(nodes),
        nodes=len(nodes),
        gpus=gpus,
        grows=known is not None,
        fits=known is not None and known.cpus is None,
        most_gpus=most_gpus,
    )


def _most(known: Bounds | None, *, there: int, cpus: int) -> tuple[int, float | None]:
    """Actors and GPUs when the autoscaler has added all of its nodes."""
    if known is None:
        return there, None
    more = 0 if known.cpus is None else max(known.cpus - cpus, 0)
    return there + more, math.inf if known.gpus is None else known.gpus


def with_nodes(
    session: Session,
    stages: Sequence[Stage],
    *,
    beside: int,
    goes_on: bool,
    run_id: str,
    tell: Callable[[str], None],
) -> Session:
    """Wait until there is a CPU for an actor of each stage, where nodes may come.

    That is so where no worker node is there yet, where an autoscaler adds nodes, and where an
    earlier run had its nodes.

    Args:
        session: as it is now.
        beside: CPUs for others than these actors, which are needed too.
        goes_on: an earlier run had room for the counts that are asked for.
        tell: prints a line for the user.

    Returns:
        The session as it is then. Counts beyond its room are fitted into it in two cases: the run
        `goes_on`; or it has waited for nodes, and nobody knows how many will come.
    """
    if not session.joined:
        return session
    began, said = time.monotonic(), -math.inf
    asking, waits = None, False
    while True:
        least = _least(stages, session) + beside
        has = session.room.actors + beside
        if has >= least or not (waits or session.grows or goes_on or has <= 0):
            fits = session.fits or goes_on or (waits and not session.grows)
            return replace(session, fits=fits)
        waits = True
        if session.grows and not internals.missing("autoscaling"):
            from raypipe.run.cluster.asking import Asking  # it imports Ray Data

            asking = asking or Asking(run_id)
            asking.ask(max(_asked(stages) + beside, least), 0)
        if (now := time.monotonic()) - said >= SAY_EVERY_S:
            said = now
            rest = (
                "the autoscaler is asked for them"
                if session.grows
                else "no autoscaler adds nodes here, so add one"
            )
            tell(
                f"Waiting for {least - max(has, 0)} of {least} CPUs, {now - began:.0f} s: {rest}. "
                f"A CPU is needed for an actor of each stage"
                f"{f', and {beside} for the workers' if beside else ''}. Ctrl-C ends the wait."
            )
        time.sleep(LOOK_EVERY_S)
        session = as_it_is(session, stages, beside=beside)


def _least(stages: Sequence[Stage], session: Session) -> int:
    """CPUs for an actor of each stage, in the form with the fewest stages."""

    def on_cpu(stage: Stage) -> bool:
        return stage.gpu is False or (stage.gpu is None and not session.gpus)

    return min(sum(map(on_cpu, form)) for form in forms(stages))


def _asked(stages: Sequence[Stage]) -> int:
    counts = [stage.actors if isinstance(stage.actors, int) else 1 for stage in stages]
    return sum(counts)
