"""What a loader has given to the loop, and where the time of the loop went."""

import time
from collections import Counter

import ray

from raypipe.data.journal import Dropped, Rejected
from raypipe.insight import report as reports
from raypipe.insight.states import Consumed
from raypipe.run.result import frames_told
from raypipe.train.seen import Seen
from raypipe.train.steps import Step

_TOLD_EVERY_S = 0.5
_NOTED_EVERY_S = 0.5


class Served:
    """Counts what goes to the loop, and times it.

    Busy is from when a batch is given to when the loop asks for the next one, passes apart
    included. The wait for the first batch is start-up, and does not count.

    Args:
        begun: time.perf_counter() when the execution began.
    """

    def __init__(self, begun: float):
        self._begun = begun
        self._asked = begun
        self._given: float | None = None
        self._cpu = 0.0
        self._busy_s = self._waiting_s = 0.0
        self._told = 0.0
        self._rejects: dict[str, Rejected] = {}
        self._reasons: Counter[str] = Counter()
        self._seen = Seen()
        self.rows = 0
        self.outputs: list[tuple[float, int]] = []

    def asks(self) -> None:
        """The loop wants the next batch."""
        self._asked = time.perf_counter()
        if self._given is not None:
            self._busy_s += self._asked - self._given

    def gives(self, step: Step) -> None:
        """The loop gets a batch."""
        now = time.perf_counter()
        if self._given is None:
            self._cpu = time.process_time()
        else:
            self._waiting_s += now - self._asked
        self._given = now
        rows = 0
        for seen in step.seen:
            rows += len(seen.image_ids)
            self._add(seen)
        self.rows += rows
        if len(self.outputs) > 1 and now - self._begun - self.outputs[-2][0] < _NOTED_EVERY_S:
            self.outputs[-1] = (now - self._begun, self.outputs[-1][1] + rows)
        else:
            self.outputs.append((now - self._begun, rows))

    def _add(self, seen: Seen) -> None:
        for reject in seen.rejects:
            self._reasons[reject["reason"]] += 1
            self._rejects.setdefault(reject["image_id"], Rejected(**reject))
        self._seen.dropped += seen.dropped
        self._seen.boxes_from.update(seen.boxes_from)
        self._seen.damaged += seen.damaged

    @property
    def consumed(self) -> Consumed:
        """The loop as the stage `consume`."""
        return Consumed(
            images=self.rows,
            busy_s=self._busy_s,
            waiting_s=self._waiting_s,
            cpu_s=0.0 if self._given is None else time.process_time() - self._cpu,
        )

    @property
    def rejected(self) -> list[Rejected]:
        """The rejected images, each once."""
        return list(self._rejects.values())

    @property
    def dropped(self) -> list[Dropped]:
        """The unusable boxes of the first epoch; later ones have the same."""
        return [Dropped(**box) for box in self._seen.dropped]

    def tell(self, collector: ray.actor.ActorHandle) -> None:
        """Send the counts to those who watch, at most twice a second."""
        now = time.time()
        if now - self._told >= _TOLD_EVERY_S:
            self._told = now
            collector.progress.remote(now, self.rows, self._reasons.total(), self.consumed)

    def counts(self, skipped: dict[str, int]) -> reports.Counts:
        """Count for the report: rows that came to the loop."""
        return reports.Counts(
            images_in=self.rows,
            images_out=self.rows - self._reasons.total(),
            rejects_by_reason=dict(self._reasons.most_common()),
            damaged_kept=self._seen.damaged,
            skipped=skipped,
            boxes_dropped=len(self._seen.dropped),
            boxes_from=frames_told(self._seen.boxes_from),
        )
