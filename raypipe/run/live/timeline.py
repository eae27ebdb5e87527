"""The timeline of a run: what each stage did in each stretch of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from raypipe.insight.states import Moment, PoolView, Sample, shares

BUCKETS = 3600
"""A longer timeline has its buckets joined in pairs: an hour at 1 s each, a day at 32 s."""


@dataclass(slots=True)
class Bucket:
    """What one stage did in one stretch of the timeline. `told`: an actor reported in it."""

    told: bool = False
    images: float = 0.0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    rss_bytes: dict[str, int] = field(default_factory=dict)
    private_bytes: dict[str, int] = field(default_factory=dict)
    actors: int | None = None
    queued: int | None = None
    actor_s: float = 0.0
    starved_s: float = 0.0
    gpu_seen_s: float = 0.0
    gpu_busy_s: float = 0.0

    def add(self, other: "Bucket") -> None:
        """Take in the stretch that follows."""
        self.told = self.told or other.told
        self.images += other.images
        self.busy_s += other.busy_s
        self.cpu_s += other.cpu_s
        self.rss_bytes |= other.rss_bytes
        self.private_bytes |= other.private_bytes
        self.actors = self.actors if other.actors is None else other.actors
        self.queued = self.queued if other.queued is None else other.queued
        self.actor_s += other.actor_s
        self.starved_s += other.starved_s
        self.gpu_seen_s += other.gpu_seen_s
        self.gpu_busy_s += other.gpu_busy_s

    def moment(self, *, t_s: float, stage: str, width_s: float, last: bool) -> Moment:
        """As a record. What no actor, or no look at the execution, told is None."""
        divided = None
        if self.told and self.actor_s:
            divided = shares(
                busy_s=self.busy_s, starved_s=self.starved_s, actor_s=self.actor_s, last=last
            )
        return Moment(
            t_s=t_s,
            stage=stage,
            actors=self.actors,
            images_per_s=self.images / width_s if self.told else None,
            cpu_cores=self.cpu_s / width_s if self.told else None,
            rss_bytes=sum(self.rss_bytes.values()) if self.rss_bytes else None,
            private_bytes=sum(self.private_bytes.values()) if self.private_bytes else None,
            gpu_percent=100 * self.gpu_busy_s / self.gpu_seen_s if self.gpu_seen_s else None,
            busy=None if divided is None else divided.busy,
            starved=None if divided is None else divided.starved,
            blocked=None if divided is None else divided.blocked,
            queued=self.queued,
        )


class Timeline:
    """Buckets of equal width for each stage, from the begin of the execution."""

    def __init__(self, started: float, width_s: float):
        self._started = started
        self._width = width_s
        self._buckets: dict[tuple[int, str], Bucket] = {}

    def begin(self, at: float) -> None:
        """The execution begins: the timeline counts from here."""
        self._started = at

    def actor(self, before: Sample, sample: Sample) -> None:
        """Add what an actor did between two of its samples."""
        for bucket, share in self._between(before.at, sample.at, sample.stage):
            bucket.told = True
            bucket.images += share * (sample.images - before.images)
            bucket.busy_s += share * (sample.busy_s - before.busy_s)
            bucket.cpu_s += share * (sample.cpu_s - before.cpu_s)
            bucket.gpu_seen_s += share * (sample.gpu_seen_s - before.gpu_seen_s)
            bucket.gpu_busy_s += share * (sample.gpu_busy_s - before.gpu_busy_s)
            bucket.rss_bytes[sample.actor] = sample.rss_bytes
            if sample.private_bytes is not None:
                bucket.private_bytes[sample.actor] = sample.private_bytes

    def consumer(
        self, stage: str, since: float, until: float, *, images: int, busy_s: float, cpu_s: float
    ) -> None:
        """Add what the consumer of the last blocks did between two moments."""
        for bucket, share in self._between(since, until, stage):
            bucket.told = True
            bucket.images += share * images
            bucket.busy_s += share * busy_s
            bucket.cpu_s += share * cpu_s

    def pool(
        self, stage: str, since: float, until: float, before: PoolView, pool: PoolView
    ) -> None:
        """Add what the execution saw of a stage's actors between two looks."""
        for bucket, share in self._between(since, until, stage):
            bucket.actors, bucket.queued = pool.end, pool.queued
            bucket.actor_s += share * (pool.actor_s - before.actor_s)
            bucket.starved_s += share * (pool.starved_s - before.starved_s)

    def moments(self, last: str | None) -> Iterator[Moment]:
        """All of it, in order. `last`: the stage that none follows."""
        for (place, stage), bucket in sorted(self._buckets.items()):
            yield bucket.moment(
                t_s=place * self._width, stage=stage, width_s=self._width, last=stage == last
            )

    def _between(self, since: float, until: float, stage: str) -> Iterable[tuple[Bucket, float]]:
        """The buckets between two moments, each with its share of the time.

        Totals do not tell what happened on the way, so it is spread evenly.
        """
        last = self._bucket(until, stage)  # first, as it may change the width
        places = range(
            int((since - self._started) // self._width),
            int((until - self._started) // self._width) + 1,
        )
        if until <= since or len(places) < 2:
            return [(last, 1.0)]
        parts = []
        for place in places:
            begin = self._started + place * self._width
            inside = min(until, begin + self._width) - max(since, begin)
            parts.append((self._bucket(begin + self._width / 2, stage), inside / (until - since)))
        return parts

    def _bucket(self, at: float, stage: str) -> Bucket:
        place = max(int((at - self._started) / self._width), 0)
        if place >= BUCKETS:
            joined: dict[tuple[int, str], Bucket] = {}
            for (earlier, of), bucket in sorted(self._buckets.items()):
                joined.setdefault((earlier // 2, of), Bucket()).add(bucket)
            self._buckets = joined
            self._width *= 2
            return self._bucket(at, stage)
        return self._buckets.setdefault((place, stage), Bucket())
