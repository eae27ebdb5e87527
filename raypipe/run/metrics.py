"""A run's figures for Prometheus, through Ray: every node's Ray agent exports them, as `ray_raypipe_...`.

Ray's workers hand their metrics to the agent every 10 s (metrics_report_interval_ms), so figures that are rates are means over that long.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge

from raypipe.run.meter import Sample

EXPORT_EVERY_S = 10.0
GONE_AFTER_S = 5.0
"""An actor that has sent nothing for so long has ended: they send every second."""

_Place = tuple[str, str]
"""A stage on a node."""

_BY_NODE = ("run", "stage", "node")
_BY_STAGE = ("run", "stage")


class Metrics:
    """The metrics of one run, set from live records and the latest sample of each actor; lives in the run's collector."""

    def __init__(self, run_id: str):
        self._run = run_id
        self._totals: deque[tuple[float, dict[_Place, float], dict[_Place, float]]] = (
            deque()
        )  # when, and per (stage, node): images, CPU seconds
        self._counted: dict[tuple, float] = defaultdict(float)
        self._seen: dict[str, tuple[float, float]] = {}  # actor -> when its latest sample was taken, by its clock and by this one
        self._actors = Gauge("raypipe_stage_actors", "Actors of the stage that run.", _BY_NODE)
        self._wanted = Gauge("raypipe_stage_actors_wanted", "Actors that the stage is to have.", _BY_STAGE)
        self._images = Counter("raypipe_stage_images_total", "Images that the stage has done.", _BY_NODE)
        self._rate = Gauge("raypipe_stage_images_per_second", "Images a second, mean of the last 10 s.", _BY_NODE)
        self._cpu = Gauge("raypipe_stage_cpu_cores", "Cores that the stage's actors kept busy, mean of the last 10 s.", _BY_NODE)
        self._rss = Gauge("raypipe_stage_rss_bytes", "Resident memory of the stage's actors.", _BY_NODE)
        self._shares = {
            state: Gauge(f"raypipe_stage_{state}_ratio", f"Share of its time that an actor of the stage {meaning}.", _BY_STAGE)
            for state, meaning in (("busy", "works"), ("starved", "has no input"), ("blocked", "waits for the next stage"))
        }
        self._queued = Gauge("raypipe_stage_queued_blocks", "Blocks that wait for the stage.", _BY_STAGE)
        self._todo = Gauge("raypipe_run_images", "Images that the run has to do.", ("run",))
        self._done = Counter("raypipe_run_images_done_total", "Images done, rejected ones included.", ("run",))
        self._rejected = Counter("raypipe_run_images_rejected_total", "Images rejected.", ("run",))

    def record(self, live: dict, samples: Iterable[Sample]) -> None:
        """Set everything; about once a second.

        Args:
            live: the run's live record.
            samples: of every actor that ever was its latest.
        """
        now = time.monotonic()
        self._run_totals(live)
        for stage in live["stages"]:
            tags = {"run": self._run, "stage": stage["name"]}
            self._wanted.set(stage["wanted"], tags)
            self._queued.set(stage["queued"], tags)
            for state, gauge in self._shares.items():
                if stage[state] is not None:
                    gauge.set(stage[state], tags)
        self._by_node(now, list(samples))

    def _run_totals(self, live: dict) -> None:
        tags = {"run": self._run}
        self._todo.set(live["images"], tags)
        self._raise(self._done, live["done"], tags)
        self._raise(self._rejected, live["rejected"], tags)

    def _raise(self, counter: Counter, total: float, tags: dict[str, str]) -> None:
        key = (counter, *tags.values())
        if total > self._counted[key]:
            counter.inc(total - self._counted[key], tags)
            self._counted[key] = total

    def _by_node(self, now: float, samples: list[Sample]) -> None:
        images: dict[_Place, float] = defaultdict(float)
        cpu_s: dict[_Place, float] = defaultdict(float)
        actors: dict[_Place, int] = defaultdict(int)
        rss: dict[_Place, int] = defaultdict(int)
        for sample in samples:
            place = (sample.stage, sample.node)
            images[place] += sample.images
            cpu_s[place] += sample.cpu_s
            at, seen = self._seen.get(sample.actor, (0.0, now))
            if at != sample.at:  # by whether it moves, as the clocks of two nodes may differ
                seen = now
                self._seen[sample.actor] = (sample.at, now)
            if now - seen < GONE_AFTER_S:
                actors[place] += 1
                rss[place] += sample.rss_bytes
        while self._totals and now - self._totals[0][0] > EXPORT_EVERY_S:
            self._totals.popleft()
        since, images_then, cpu_then = self._totals[0] if self._totals else (now, images, cpu_s)
        self._totals.append((now, images, cpu_s))
        for place in images:
            tags = dict(zip(_BY_NODE, (self._run, *place), strict=True))
            self._actors.set(actors[place], tags)
            self._rss.set(rss[place], tags)
            self._raise(self._images, images[place], tags)
            if now > since:
                self._rate.set((images[place] - images_then[place]) / (now - since), tags)
                self._cpu.set((cpu_s[place] - cpu_then[place]) / (now - since), tags)
