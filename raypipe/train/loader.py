"""`raypipe.loader`: preprocessed batches for a training loop of one's own.

    loop's thread   asks, gets a batch, and only then is it seen      `Loader`
    feeding thread  blocks -> steps (`steps.py`) -> tensors           `Feed`, `Collate`
    Ray             shards -> preprocess actors -> blocks             `Execution`

All epochs are one execution (`epochs.py`): its actors start once. A batch counts as seen when the
loop gets it, so a state (`position.py`) has nothing of what is prefetched. With several ranks, rank
0 opens the execution, and the others get their blocks from it.
"""

import atexit
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray
import ray.cloudpickle
import torch.distributed as dist
from rich.console import Console

from raypipe.data.stores import StoreError
from raypipe.errors import UsageError
from raypipe.run.causes import breaks, cause_of, causes
from raypipe.run.cluster.session import joins, output_is_there
from raypipe.run.console import say
from raypipe.run.live import control
from raypipe.train.epochs import Segment
from raypipe.train.feed import PREFETCHED, Feed
from raypipe.train.loading import Facts, Todo, device_of, plan
from raypipe.train.minibatch import Collate, Minibatch, Prepared
from raypipe.train.peers import Peers
from raypipe.train.position import Position, from_states, to_state
from raypipe.train.settings import LoaderSettings, Loading
from raypipe.train.steps import Step
from raypipe.train.supply import Supply

_ENDS_WITHIN_S, _RANKS_END_WITHIN_S = 30.0, 5.0
"""How long `close` waits for the feeding thread. A shard that is under way ends within the first;
one of several ranks may wait for a block of rank 0, which has ended."""

_RAY_DATA_ENDS_WITHIN_S = 15.0
"""How long a rank waits at its end for threads of Ray Data. They end with the other ranks."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A step as the loop gets it, and the position after it. `batch`: None has no image."""

    step: Step
    after: Position
    batch: Prepared | None


class Loader:
    """Batches of an input, epoch after epoch (`raypipe.loader`).

    Iterate over it: one pass is one epoch. A pass that is left early goes on with the next one.

    Attributes:
        classes: names of the classes, where the input has them; labels are numbers of them.
        report: after `close`, what report.json has. None: nothing was given, or this is not rank 0.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        *,
        transform: Callable[[Minibatch], Any] | None = None,
        console: Console | None = None,
    ):
        self._settings, self._transform = settings, transform
        self._console = console or Console(stderr=True)
        self._started = time.time()
        self._peers = _peers()
        _check_hosts(self._peers)
        self._todo: Todo | None = None
        self._facts: Facts = self._peers.share(self._look)
        loading = settings.loading
        self._device = device_of(loading.device, finished=loading.finish is not None)
        self._collate = Collate(
            one_label=self._facts.one_label, finish=self._facts.finish, device=self._device
        )
        self._position = Position()
        self._ahead: _Item | None = None  # given out, and still the first of the feed
        self._feed: Feed[Step, _Item] | None = None
        self._supply: Supply | None = None  # on rank 0
        self._joined = self._closed = False
        self._told_end = False

    def _look(self) -> Facts:
        self._say(f"Listing {self._settings.source.input} ...")
        facts, self._todo = plan(self._settings, ranks=self._peers.size)
        return facts

    def _say(self, line: str) -> None:
        if self._peers.rank == 0:
            say(self._console, line)

    # --- what a loop asks ------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of; after the last batch of all, their number."""
        return self._position.epoch

    @property
    def classes(self) -> tuple[str, ...]:
        return self._facts.classes

    @property
    def report(self) -> dict[str, Any] | None:
        return None if self._supply is None else self._supply.report

    def __len__(self) -> int:
        """Number of batches of an epoch in which no image is rejected, on each rank."""
        return self._facts.steps

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        if epoch >= self._settings.loading.epochs and not self._told_end:
            self._told_end = True
            self._say(f"All {epoch} epochs are over, so this pass is empty. Give more epochs.")
        while self.epoch == epoch and (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Any:
        """The next batch of this epoch; None: it has no more."""
        epoch = self.epoch
        if epoch >= self._settings.loading.epochs:
            return None
        feed = self._started_feed()
        if self._supply is not None:
            self._supply.served.asks()
        while self.epoch == epoch:
            try:
                if self._ahead is not None and feed.peek() is self._ahead:
                    feed.take()
                item = feed.peek()
            except Exception as error:
                self._end_feed()
                raise _told(error) from error
            assert item is not None
            # The one statement that makes the batch seen, whenever Ctrl-C comes.
            self._ahead, self._position = item, item.after
            if self._supply is not None:
                self._supply.served.gives(item.step)
                output_is_there()
                self._supply.served.tell(self._supply.execution.collector)
            if item.batch is not None:
                batch = self._collate.take(item.batch)
                return batch if self._transform is None else self._transform(batch)
        return None

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the loop has got so far, on all ranks: small, and JSON types.

        Take it between two batches, on any rank: all have the same after the same step. What is
        prefetched is not in it.
        """
        return to_state(self._position, self._facts.decides)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where a state was taken, on every rank, with any number of ranks.

        The next pass gives the rest of its epoch.

        Args:
            state: what `state_dict` returned; or a list of what it returned on several ranks.

        Raises:
            UsageError: it is no state, or of other images, another seed or another order.
        """
        position = from_states(state, self._facts.decides)
        self._end_feed()
        self._position, self._told_end = position, False

    # --- looking and scaling ---------------------------------------------------------------------

    def scale(self, **counts: int) -> dict[str, int]:
        """Change actor counts while batches go on, as in scale(preprocess=8), on rank 0.

        Returns:
            The wanted counts of all stages.

        Raises:
            UsageError: there is no room for them, or no batch was asked for yet.
        """
        if self._supply is None or self._closed:
            raise UsageError(
                "There are no actors to scale: they start with the first batch, and rank 0 has "
                "them. Ask for a batch first, on rank 0; or give actors=."
            )
        return self._supply.control.scale(counts, wait=True)

    def close(self) -> None:
        """End the execution, and write the report. The loader gives no more batches."""
        self._closed = True
        if self._supply is not None:
            self._supply.close()  # and the feed
        self._end_feed()
        if self._joined and self._supply is None:
            self._joined = False
            control.leave()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the feed --------------------------------------------------------------------------------

    def _started_feed(self) -> Feed[Step, _Item]:
        """The feed from the position on. Collective: all ranks start theirs together."""
        if self._closed:
            raise UsageError("This loader is closed. Make a new one, and load its state.")
        if self._feed is not None:
            return self._feed
        segments: Iterator[Segment] = iter(())
        if self._todo is not None:
            segments = self._todo.epochs.segments(self._position, ranks=self._peers.size)
            if self._supply is None:
                first = next(segments)
                segments = chain([first], segments)
        if not self._joined:
            self._join(*self._peers.share(lambda: self._open(first)))
        loading = self._settings.loading
        # A group of its own: the thread of a feed that was ended may still wait in another.
        peers, before = _peers(), set(threading.enumerate())
        self._feed = Feed(
            _steps(peers, self._supply, segments, loading),
            _Prepare(self._collate, self._position),
            self._device,
            prefetched=PREFETCHED + 1,
        )
        self._ends = weakref.finalize(self, _end, self._feed, peers, before)
        # atexit calls it before it calls Ray's end; weakref's own call may come after that.
        self._ends.atexit = False
        if self._supply is not None:
            self._supply.before_close = self._ends  # its end is registered with atexit
        else:
            atexit.register(self._ends)
        return self._feed

    def _open(self, first: Segment) -> tuple[str, str | None]:
        """Start the execution, on rank 0. Returns the address of its Ray, and RAY_AUTH_MODE."""
        assert self._todo is not None
        self._supply = Supply(
            self._settings,
            self._todo,
            first,
            images=self._images_left(),
            ranks=self._peers.size,
            started=self._started,
            console=self._console,
        )
        weakref.finalize(self, self._supply.close).atexit = False
        return self._supply.execution.session.address, os.environ.get("RAY_AUTH_MODE")

    def _images_left(self) -> int:
        seen = sum(stop - start for start, stop in self._position.seen)
        return (self._settings.loading.epochs - self.epoch) * self._facts.rows - seen

    def _join(self, address: str, auth_mode: str | None) -> None:
        """Join the Ray of rank 0, on another rank."""
        self._joined = True
        if self._peers.rank and not ray.is_initialized():
            control.connect(address, send_token=auth_mode == "token")

    def _end_feed(self) -> None:
        """End the feed. What it has prefetched is not seen, and comes again."""
        if self._feed is not None:
            self._ends()
            atexit.unregister(self._ends)
            self._feed = self._ahead = None


def _end(feed: Feed[Step, "_Item"], peers: Peers, before: set[threading.Thread]) -> None:
    """End a feed. With several ranks, wait also for the threads of Ray Data that it has started.

    These wait in a call of Ray for the next block. If Ray ended in this process meanwhile, it would
    free what they use, and the process would end by SIGSEGV.

    Args:
        before: the threads that were there before the feed.
    """
    peers.leave()
    feed.close(wait_s=_ENDS_WITHIN_S if peers.size == 1 else _RANKS_END_WITHIN_S)
    if peers.size > 1:
        ends = time.monotonic() + _RAY_DATA_ENDS_WITHIN_S
        for thread in set(threading.enumerate()) - before:
            if thread.name == "iter_threaded":
                thread.join(max(ends - time.monotonic(), 0.0))


class _Prepare:
    """Makes the loop's items of steps, in order."""

    def __init__(self, collate: Collate, position: Position):
        self._collate, self._position = collate, position

    def __call__(self, step: Step) -> _Item:
        self._position = self._position.after(step.ranges, ends=step.ends)
        batch = self._collate(step.epoch, step.rows) if step.good else None
        return _Item(step=step, after=self._position, batch=batch)


def _steps(
    peers: Peers, supply: Supply | None, segments: Iterator[Segment], loading: Loading
) -> Iterator[Step]:
    """The steps of this rank, one execution after the other."""

    def begin() -> tuple[Segment, bytes | list[Any]] | None:
        segment = next(segments, None)
        if segment is None:
            return None
        assert supply is not None
        parts = supply.parts(segment)
        if peers.size == 1:
            return segment, parts
        return segment.without_rows(), ray.cloudpickle.dumps(parts)

    while (begun := peers.share(begin)) is not None:
        segment, parts = begun
        part = (ray.cloudpickle.loads(parts) if isinstance(parts, bytes) else parts)[peers.rank]
        # Prefetching is for blocks of other nodes. Here it would delay each block by one.
        ahead = 1 if len(ray.nodes()) > 1 else 0
        blocks = part.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=ahead)
        yield from segment.steps(blocks, size=loading.batch_size, peers=peers, equal=loading.equal)


def _peers() -> Peers:
    """This process and the others of its training.

    Raises:
        UsageError: there are others, but nothing to talk to them with.
    """
    if dist.is_available() and dist.is_initialized():
        return Peers(dist.get_rank(), dist.get_world_size())
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) > 1:
        raise UsageError(
            f"WORLD_SIZE is {started}, but torch.distributed is not initialised: each process "
            f"would get all images. Call torch.distributed.init_process_group() first (Ray "
            f"Train's TorchTrainer and Lightning do), or unset WORLD_SIZE."
        )
    return Peers(0, 1)


def _check_hosts(peers: Peers) -> None:
    """Raise UsageError if ranks are on several machines that are no Ray cluster."""
    there = peers.exchange((socket.gethostname(), joins()))
    hosts = sorted({host for host, _ in there})
    if len(hosts) > 1 and not all(joined for _, joined in there):
        raise UsageError(
            f"The ranks are on {len(hosts)} machines ({', '.join(hosts)}), which are no Ray "
            f"cluster: rank 0 would start a Ray that the others cannot reach. Nothing was "
            f"started. Start one (`ray start`) and set RAY_ADDRESS for every rank, or use Ray "
            f"Train."
        )


def _told(error: Exception) -> Exception:
    """The error for the loop: its innermost cause, with what to do."""
    for cause in causes(error):
        if isinstance(cause, UsageError | StoreError):
            return cause
    if not isinstance(error, breaks()):
        return error
    return RuntimeError(
        f"Preprocessing ended: {cause_of(error)}. No batch was lost: iterate again, or go on from "
        f"state_dict() in a new process."
    )
