"""A run's figures for Prometheus: the Ray agent of every node exports them, as `ray_raypipe_...`.

Ray's workers hand their metrics to the agent every 10 s (metrics_report_interval_ms), so rates are
means over that long.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

from raypipe.insight.states import STATES, LiveRun, Sample

EXPORT_EVERY_S = 10.0
GONE_AFTER_S = 5.0
"""An actor that has sent nothing for so long has ended: each sends every second."""

Place = tuple[str, str]
"""A stage on a node."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one stage does on one node.

    Rates are means of the last EXPORT_EVERY_S; None until there were two looks.
    """

    actors: int
    images: int
    images_per_s: float | None
    cpu_cores: float | None
    rss_bytes: int


class Places:
    """Turns the running totals of actors into shares of places."""

    def __init__(self) -> None:
        # When, and the images and CPU seconds of each place by then.
        self._totals: deque[tuple[float, dict[Place, int], dict[Place, float]]] = deque()
        # Of each actor, when its latest sample was taken, by its clock and by ours.
        self._seen: dict[str, tuple[float, float]] = {}

    def look(self, now: float, samples: Iterable[Sample]) -> dict[Place, Share]:
        """Every place that ever had an actor.

        Args:
            now: seconds, by the collector's clock.
            samples: the latest of every actor that ever was.
        """
        images: dict[Place, int] = defaultdict(int)
        cpu_s: dict[Place, float] = defaultdict(float)
        there: dict[Place, list[Sample]] = defaultdict(list)
        for sample in samples:
            place = (sample.stage, sample.node)
            images[place] += sample.images
            cpu_s[place] += sample.cpu_s
            # An actor is there while the times of its samples move: clocks of nodes may differ.
            if self._seen.get(sample.actor, (None, 0.0))[0] != sample.at:
                self._seen[sample.actor] = (sample.at, now)
            if now - self._seen[sample.actor][1] < GONE_AFTER_S:
                there[place].append(sample)
        while self._totals and now - self._totals[0][0] > EXPORT_EVERY_S:
            self._totals.popleft()
        since, images_then, cpu_then = self._totals[0] if self._totals else (now, images, cpu_s)
        self._totals.append((now, images, cpu_s))
        took = now - since
        return {
            place: Share(
                actors=len(there[place]),
                images=images[place],
                images_per_s=(images[place] - images_then.get(place, 0)) / took if took else None,
                cpu_cores=(cpu_s[place] - cpu_then.get(place, 0.0)) / took if took else None,
                rss_bytes=sum(sample.rss_bytes for sample in there[place]),
            )
            for place in images
        }


_BY_NODE = ("run", "stage", "node")
_BY_STAGE = ("run", "stage")


class Metrics:
    """The metrics of one run; lives in the run's collector."""

    def __init__(self, run_id: str):
        self._run = run_id
        self._counted: dict[tuple[object, ...], float] = defaultdict(float)
        self._actors = Gauge("raypipe_stage_actors", "Actors of the stage that run.", _BY_NODE)
        self._wanted = Gauge(
            "raypipe_stage_actors_wanted", "Actors that the stage is to have.", _BY_STAGE
        )
        self._images = Counter(
            "raypipe_stage_images_total", "Images that the stage has done.", _BY_NODE
        )
        self._rate = Gauge(
            "raypipe_stage_images_per_second", "Images a second, mean of the last 10 s.", _BY_NODE
        )
        self._cpu = Gauge(
            "raypipe_stage_cpu_cores",
            "Cores that the stage's actors kept busy, mean of the last 10 s.",
            _BY_NODE,
        )
        self._rss = Gauge(
            "raypipe_stage_rss_bytes", "Resident memory of the stage's actors.", _BY_NODE
        )
        self._ratios = {
            state: Gauge(
                f"raypipe_stage_{state}_ratio",
                f"Share of its time that an actor of the stage {meaning}.",
                _BY_STAGE,
            )
            for state, meaning in zip(
                STATES, ("works", "has no input", "waits for the next stage"), strict=True
            )
        }
        self._queued = Gauge(
            "raypipe_stage_queued_blocks", "Blocks that wait for the stage.", _BY_STAGE
        )
        self._todo = Gauge("raypipe_run_images", "Images that the run has to do.", ("run",))
        self._done = Counter(
            "raypipe_run_images_done_total", "Images done, rejected ones included.", ("run",)
        )
        self._rejected = Counter("raypipe_run_images_rejected_total", "Images rejected.", ("run",))

    def record(self, live: LiveRun, shares: Mapping[Place, Share]) -> None:
        """Set everything; about twice a second.

        Args:
            live: the run's live record.
            shares: what each stage does on each node.
        """
        self._run_totals(live)
        for stage in live.stages:
            tags = {"run": self._run, "stage": stage.name}
            self._wanted.set(stage.wanted, tags)
            self._queued.set(stage.queued, tags)
            for state, gauge in self._ratios.items():
                if (share := getattr(stage, state)) is not None:
                    gauge.set(share, tags)
        self._by_node(shares)

    def _run_totals(self, live: LiveRun) -> None:
        tags = {"run": self._run}
        self._todo.set(live.images, tags)
        self._raise(self._done, live.done, tags)
        self._raise(self._rejected, live.rejected, tags)

    def _raise(self, counter: Counter, total: float, tags: dict[str, str]) -> None:
        key = (counter, *tags.values())
        if total > self._counted[key]:
            counter.inc(total - self._counted[key], tags)
            self._counted[key] = total

    def _by_node(self, shares: Mapping[Place, Share]) -> None:
        for place, share in shares.items():
            tags = dict(zip(_BY_NODE, (self._run, *place), strict=True))
            self._actors.set(share.actors, tags)
            self._rss.set(share.rss_bytes, tags)
            self._raise(self._images, share.images, tags)
            if share.images_per_s is not None:
                self._rate.set(share.images_per_s, tags)
            if share.cpu_cores is not None:
                self._cpu.set(share.cpu_cores, tags)
