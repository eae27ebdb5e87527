"""The execution that a loader's batches come from. Rank 0 opens it; the others join its Ray."""

import atexit
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from rich.console import Console

from raypipe.data.location import Location
from raypipe.errors import UsageError
from raypipe.run import probe as probes
from raypipe.run.cluster.session import ends_soon, without_rays_lines
from raypipe.run.console import say
from raypipe.run.execution import Setup, executing, new_run_id
from raypipe.run.job import preprocess_stage
from raypipe.run.live.control import Control
from raypipe.run.result import leave_report, shown
from raypipe.stages.stage import auto_of
from raypipe.train.epochs import Segment
from raypipe.train.loading import Todo
from raypipe.train.served import Served
from raypipe.train.settings import LoaderSettings

_open: list["Supply"] = []
"""The supplies of this process that are open: a training's and a validation's, for example."""


class Supply:
    """Preprocess actors, and what their execution costs.

    Args:
        first: the epochs to begin with.
        images: all that are left, of all epochs.
        ranks: processes that take blocks, each with a CPU of the cluster where they run on it.
        started: time.time() when the loader was made.

    Attributes:
        before_close: called before the execution ends: ends what takes its blocks.

    Raises:
        UsageError: there is no room for the actors.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        todo: Todo,
        first: Segment,
        *,
        images: int,
        ranks: int,
        started: float,
        console: Console,
    ):
        self._settings, self._todo, self._ranks, self._console = settings, todo, ranks, console
        self.run_id = new_run_id(settings.running.run_id)
        self.report: dict[str, Any] | None = None
        self.before_close: Callable[[], None] = lambda: None
        self._closing = threading.Lock()
        with ExitStack() as stack:
            setup = self._setup(first, images=images, started=started)
            self.execution = stack.enter_context(
                executing(setup, console=console, touch=lambda: None)
            )
            self._stack = stack.pop_all()
        self.control = Control(self.run_id, self.execution.collector)
        self.served = Served(self.execution.begun)
        _open.append(self)
        # Later than Ray's own, so before it. weakref.finalize may come after.
        atexit.register(self.close)

    def _setup(self, first: Segment, *, images: int, started: float) -> Setup:
        settings, todo = self._settings, self._todo
        running, source, loading = settings.running, settings.source, settings.loading
        stages = (
            preprocess_stage(
                first.work,
                todo.pixels,
                running,
                running.reading(source.input),
                run_id=self.run_id,
            ),
        )
        auto = auto_of(stages)
        return Setup(
            run_id=self.run_id,
            what=(
                f"batches of {loading.batch_size} for a loop, {todo.epochs.rows} images, "
                f"{loading.epochs} epochs, recipe {todo.recipe.name}, {settings.decoding.backend}"
            ),
            given=settings.flat,
            started=started,
            images=images,
            stages=stages,
            threads=running.threads,
            output=None,
            recipe=todo.recipe.name,
            shard_bytes=todo.shard_bytes,
            auto=auto,
            probe=probes.of(first.work, stages, threads=running.threads) if auto else None,
            taken=sum(map(_actors, _open)) + self._cpus_of_ranks(),
            spare=1 if auto else 0,
        )

    def _cpus_of_ranks(self) -> int:
        """CPUs of the cluster that the ranks hold, as workers of Ray Train do."""
        if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
            return 0  # a driver holds none
        mine = ray.get_runtime_context().get_assigned_resources()
        return int(mine.get("CPU", 0)) * self._ranks

    def parts(self, segment: Segment) -> list[Any]:
        """What iterates over the blocks of these epochs (schema BLOCK), for each rank."""
        dataset = self.execution.dataset(segment.work)
        # So that epochs come one after the other, and two runs give equal batches.
        dataset.context.execution_options.preserve_order = True
        if self._ranks == 1:
            return [dataset]
        return dataset.streaming_split(self._ranks, equal=False)

    def close(self) -> None:
        """Write the report, and end the execution."""
        with self._closing:
            if self not in _open:
                return
            _open.remove(self)
            atexit.unregister(self.close)
            ends_soon()
            with without_rays_lines(), self._stack:
                self.before_close()
                if self.served.rows and ray.is_initialized():  # whoever ended it before
                    self._leave_report()
        if self.report is not None:
            say(self._console, f"verdict: {self.report['verdict']['reason']}")
            if (folder := self._settings.running.report) is not None:
                say(self._console, f"report: {folder}/report.html")

    def _leave_report(self) -> None:
        execution, served = self.execution, self.served
        measured = execution.measured()
        self.report = execution.report(
            measured,
            served.counts(dict(self._todo.skipped)),
            outputs=served.outputs,
            ready_s=execution.ready_s(measured.snapshot),
            consumer=served.consumed,
        )
        folder = self._settings.running.report
        if folder is not None:
            pictures = shown(self._todo.epochs.source, served.rejected)
            place = Location.of(folder)
            leave_report(place, "", self.report, served.rejected, pictures, served.dropped)


def _actors(supply: Supply) -> int:
    """How many actors a supply wants now."""
    there = {stage.name for stage in supply.execution.stages}
    try:
        wanted = [one.wanted for one in supply.control.look().stages if one.name in there]
    except UsageError:  # it does not answer
        wanted = []
    return sum(wanted) or sum(supply.execution.counts.values())
