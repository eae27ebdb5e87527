"""One execution: what preprocess, train and predict have in common around their own loops.

`executing` is the entry. It starts Ray and the timing of a few images, sizes the pools, claims the
output, registers the run for `raypipe watch`, and starts its collector. The caller iterates blocks
or attempts inside, then asks for the report.
"""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import psutil
import pyarrow as pa
import ray
from ray.exceptions import RayError
from rich.console import Console

from raypipe.data.location import Location
from raypipe.errors import UsageError
from raypipe.insight import planner
from raypipe.insight import report as reports
from raypipe.insight.room import fitted
from raypipe.insight.states import Consumed, NodeCpu, Snapshot
from raypipe.run import probe as probes
from raypipe.run import processes
from raypipe.run.causes import Untouched
from raypipe.run.cluster.joined import as_it_is, with_nodes
from raypipe.run.cluster.machine import Session, hardware, versions
from raypipe.run.cluster.session import check_shared, forking, ray_session
from raypipe.run.cluster.sizing import chosen, on_gpus, seated, size_pools, stage_costs
from raypipe.run.console import say
from raypipe.run.live.collector import collecting
from raypipe.run.live.registry import registered
from raypipe.run.live.watchdog import following
from raypipe.run.meter import busy_cpu_s
from raypipe.run.opening import facts_of, opening
from raypipe.stages.stage import Stage

if TYPE_CHECKING:
    from ray.data import Dataset

SNAPSHOT_AT_MOST_S = 60.0


class Hold(Protocol):
    """An output that no other run may write."""

    def check(self) -> None:
        """Raise LeaseLost if this run has lost it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The output of a run, and how the run takes it.

    option: the user's flag.
    take: `take(check=...)` holds the output until its end, and deletes or writes first. Before it
        deletes anything, it calls `check` with a file that it has just made there.
    """

    root: Location
    option: str
    take: Callable[..., AbstractContextManager[Hold]]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes beside the stages, each with a CPU or a GPU: the workers of a training.

    must: as in `on_gpus`.
    """

    name: str
    count: int
    must: bool | None
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an execution needs to know before it begins.

    what: what is done, for the opening line of the run.
    given: all settings by their flat names, for the report.
    started: time.time() of the user's command.
    images: still to do.
    shard_bytes: memory that an actor of the first stage takes for its largest shard.
    auto: stages whose count the planner may change.
    probe: what is timed while Ray starts; None: nothing.
    taken: room for actors that others of this process have.
    spare: room for actors to leave to others, if there is enough.
    goes_on: an earlier run has begun it, with room for the counts that were asked for then.
    """

    run_id: str
    what: str
    given: Mapping[str, Any]
    started: float
    images: int
    stages: tuple[Stage, ...]
    threads: int
    output: str | None
    recipe: str
    shard_bytes: int = 0
    auto: tuple[str, ...] = ()
    probe: probes.Probe | None = None
    claim: Claim | None = None
    workers: Workers | None = None
    taken: int = 0
    spare: int = 0
    goes_on: bool = False

    @property
    def input(self) -> str:
        """What the user gave as --input."""
        return str(self.given["input"])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The costs of an execution.

    wall_s: since its begin.
    driver_cpu_s: CPU of this process, the consumer of the blocks included.
    """

    wall_s: float
    driver_cpu_s: float
    snapshot: Snapshot
    cpu_percent: float | None


@dataclass(kw_only=True)
class Execution:
    """An execution that has begun.

    stages: each with the decision whether it holds GPUs.
    counts: actors of each stage.
    costs: of the timing beforehand.
    check: raises LeaseLost when another driver has taken the output.
    """

    setup: Setup
    session: Session
    stages: tuple[Stage, ...]
    counts: dict[str, int]
    costs: list[planner.StageCost] | None
    collector: ray.actor.ActorHandle
    workers_on_gpu: bool
    check: Callable[[], None] = lambda: None
    begun: float = field(default_factory=time.perf_counter)
    begun_at: float = field(default_factory=time.time)
    _cpu: float = field(default_factory=time.process_time)
    _machine: Any = field(default_factory=psutil.cpu_times)

    def dataset(
        self,
        work: pa.Table,
        stages: Sequence[Stage] | None = None,
        *,
        counts: Mapping[str, int] | None = None,
        observed: bool = True,
    ) -> "Dataset":
        """The stages on Ray Data, for `work` (schema WORK).

        Args:
            stages, counts: others than the execution's.
            observed: whether the actors report to the collector.
        """
        # It imports ray.data: 1.3 s of CPU, while the first workers start.
        from raypipe.run.dataset import dataset_of

        return dataset_of(
            work,
            self.stages if stages is None else stages,
            self._counts_now() if counts is None else counts,
            threads=self.setup.threads,
            cpus_each=self.session.cpus_each,
            collector=self.collector if observed else None,
            asks_as=self.setup.run_id if self.session.grows else None,
            places=self.session.joined,
        )

    def _counts_now(self) -> dict[str, int]:
        """The counts, as far as there is room for them now."""
        if not self.session.joined:
            return self.counts
        room = as_it_is(self.session, self.stages, beside=self._beside).room
        room = replace(room, actors=room.actors - self.session.left_out)
        on_gpu = [stage.name for stage in self.stages if stage.gpu]
        return fitted(self.counts, room, on_gpu=on_gpu)

    @property
    def _beside(self) -> int:
        return self.setup.workers.cpus if self.setup.workers is not None else 0

    def measured(self) -> Measured:
        """The costs until now."""
        wall_s = time.perf_counter() - self.begun
        driver_cpu_s = time.process_time() - self._cpu
        snapshot, cpu_percent = _collected(self.collector, since=self._machine)
        return Measured(
            wall_s=wall_s, driver_cpu_s=driver_cpu_s, snapshot=snapshot, cpu_percent=cpu_percent
        )

    def ready_s(self, snapshot: Snapshot) -> float:
        """The mean time at which the first preprocess actors were ready, since the begin."""
        first = self.stages[0].name
        ready = sorted(one.at for one in snapshot.first if one.stage == first)
        ready = ready[: self.counts[first]]
        return sum(ready) / len(ready) - self.begun_at if ready else 0.0

    def report(
        self,
        measured: Measured,
        counts: reports.Counts,
        *,
        outputs: list[tuple[float, int]],
        ready_s: float | None,
        consumer: Consumed | None = None,
    ) -> dict[str, Any]:
        """Build report.json.

        Args:
            outputs: seconds since the begin, and rows done.
            ready_s: when actors were ready, since the begin.
            consumer: the function that consumed the last blocks.
        """
        setup = self.setup
        names = [stage.name for stage in self.stages]
        on_gpu = [stage.name for stage in self.stages if stage.gpu]
        machine = hardware(self.session)
        if setup.workers is not None:
            names.append(setup.workers.name)
            on_gpu += [setup.workers.name] if self.workers_on_gpu else []
            machine["gpus"] = setup.workers.count if self.workers_on_gpu else 0
        return reports.build(
            run_id=setup.run_id,
            settings=dict(setup.given),
            versions=versions(),
            hardware=machine,
            counts=counts,
            clock=reports.Clock(
                wall_s=measured.wall_s,
                setup_s=self.begun_at - setup.started,
                ready_s=ready_s,
                outputs=outputs,
            ),
            cpu_percent=measured.cpu_percent,
            driver_cpu_s=0.0 if setup.workers is not None else measured.driver_cpu_s,
            stage_names=names,
            on_gpu=tuple(on_gpu),
            snapshot=measured.snapshot,
            predicted=self._predicted(),
            consumer=consumer,
        )

    def _predicted(self) -> float | None:
        """Images/s by the planner, from the timing beforehand; None if a stage was not timed."""
        if self.setup.workers is not None or self.costs is None:
            return None
        costs = stage_costs(self.stages, self.costs)
        if len(costs) < len(self.stages) or any(stage.gpu for stage in self.stages):
            return None
        machine = planner.Machine(cores=self.session.cores)
        return planner.bound(planner.with_actors(costs, self.counts), machine)[0]


@contextmanager
def executing(setup: Setup, *, console: Console, touch: Callable[[], None]) -> Iterator[Execution]:
    """Open an execution. Its clocks start when this yields.

    Args:
        touch: called before anything of the user's is changed.

    Raises:
        UsageError: it cannot go on; nothing was changed.
    """
    beside = setup.workers.cpus if setup.workers else 0
    with ExitStack() as stack:
        forks = stack.enter_context(forking(setup.stages))
        begin = forks.start if forks is not None else processes.start
        timing = stack.enter_context(probes.started(setup.probe, begin)) if setup.probe else None
        say(console, "Joining Ray ..." if os.environ.get("RAY_ADDRESS") else "Starting Ray ...")
        session = stack.enter_context(
            ray_session(
                setup.stages,
                beside=beside,
                trains=setup.workers is not None,
                shard_bytes=setup.shard_bytes,
                run_id=setup.run_id,
                forks=forks,
            )
        )
        session = with_nodes(
            session,
            setup.stages,
            beside=beside,
            goes_on=setup.goes_on,
            run_id=setup.run_id,
            tell=partial(say, console),
        )
        session = _with_room_for_others(setup, session)
        workers_on_gpu = setup.workers is not None and on_gpus(
            setup.workers.count, "workers", must=setup.workers.must, session=session
        )
        costs = probes.finish(timing) if timing else None
        pipeline = chosen(setup.stages, costs, session, images=setup.images)
        first, *others = pipeline
        stages = (first, *(seated(stage, session) for stage in others))
        asked = size_pools(stages, costs, session, images=setup.images)
        # Before the claim: it refuses a run id that is in progress, and changes nothing.
        facts = facts_of(setup, session, stages, asked, workers_on_gpu=workers_on_gpu)
        on_gpu = [stage.name for stage in stages if stage.gpu]
        counts = fitted(asked, session.room, on_gpu=on_gpu)
        collector = stack.enter_context(collecting(setup.run_id, facts))
        check = stack.enter_context(_claimed(setup.claim, session, touch))
        stack.enter_context(registered(setup.run_id, address=session.address, output=setup.output))
        stack.enter_context(tracks(setup.run_id))
        execution = Execution(
            setup=setup,
            session=session,
            stages=stages,
            counts=counts,
            costs=costs,
            collector=collector,
            workers_on_gpu=workers_on_gpu,
            check=check,
        )
        for line in opening(execution, asked, unscalable=facts.unscalable):
            say(console, line)
        collector.begin.remote(execution.begun_at)
        stack.enter_context(following(collector, partial(say, console)))
        yield execution


def _with_room_for_others(setup: Setup, session: Session) -> Session:
    """`session` with the room that this execution has.

    Raises:
        UsageError: others of this process have all of it.
    """
    free, least = session.at_most - setup.taken, len(setup.stages)
    if setup.taken and free < least:
        raise UsageError(
            f"There is room for {session.at_most} actors, and others of this process take "
            f"{setup.taken} of them: {max(free, 0)} are left, and this one needs {least}. Nothing "
            f"was started. Close the others first, or start them with fewer actors."
        )
    free -= min(setup.spare, max(free - least, 0))
    there = session.room.actors - (session.at_most - free)
    return replace(session, at_most=free, there=there, left_out=session.at_most - free)


def new_run_id(given: str | None) -> str:
    """The given name of the run, or one made from the time."""
    return given or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"


@contextmanager
def untouched() -> Iterator[Callable[[], None]]:
    """Turn an interruption into Untouched, until the function that this yields is called."""
    touched = False

    def touch() -> None:
        nonlocal touched
        touched = True

    try:
        yield touch
    except KeyboardInterrupt as error:
        if not touched:
            raise Untouched from error
        raise


@contextmanager
def _claimed(
    claim: Claim | None, session: Session, touch: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Hold the output. Yields a function that raises LeaseLost once it is lost."""
    if claim is None:
        touch()
        yield lambda: None
        return
    option = f"{claim.option} {str(claim.root)!r}"

    def check(file: Location) -> None:
        if session.nodes > 1 and not file.is_remote:
            check_shared(file.path, option=option)
        touch()

    with claim.take(check=check) as held:
        yield held.check


def _collected(collector: ray.actor.ActorHandle, *, since: Any) -> tuple[Snapshot, float | None]:
    """The collector's snapshot, and the mean use of all cores, 0 to 100.

    Args:
        since: psutil.cpu_times() of this node when the execution began.
    """
    try:
        snapshot = ray.get(collector.snapshot.remote(), timeout=SNAPSHOT_AT_MOST_S)
        here = ray.get_runtime_context().get_node_id()
        others = [seen for node, seen in snapshot.nodes.items() if node != here]
    except RayError:  # the collector or its node was killed, and the stages' costs are lost
        snapshot, others = reports.NOTHING_SEEN, []
    return snapshot, _cpu_percent(since, psutil.cpu_times(), others)


def _cpu_percent(before: Any, after: Any, others: list[NodeCpu]) -> float | None:
    """The mean use of all cores, 0 to 100.

    Args:
        before, after: psutil.cpu_times() of this node.
        others: the other nodes, as their actors measured them.
    """
    used = busy_cpu_s(after) - busy_cpu_s(before) + sum(node.cpu_busy_s for node in others)
    total = sum(after[:8]) - sum(before[:8]) + sum(node.cpu_total_s for node in others)
    return 100 * used / total if total else None


@contextmanager
def tracks(run_id: str) -> Iterator[None]:
    """Delete the position files of a run's actors on this node afterwards."""
    try:
        yield
    finally:
        shutil.rmtree(tracks_folder(run_id), ignore_errors=True)


def tracks_folder(run_id: str) -> str:
    """The folder for the position files of a run's preprocess actors, on each node."""
    return os.path.join(tempfile.gettempdir(), f"raypipe-{run_id}")
