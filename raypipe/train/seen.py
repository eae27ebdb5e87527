"""What became of the rows of a step, and a log of all steps."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raypipe.data.batches import Batch
from raypipe.data.location import Location
from raypipe.models.checkpoint import Progress


@dataclass(kw_only=True)
class Seen:
    """What one rank has got or rejected in a step.

    The fields are those of `Progress`; `image_ids` are of all these rows.
    """

    image_ids: list[str] = field(default_factory=list)
    rejects: list[dict[str, str]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    boxes_from: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        rows = batch.rows
        self.image_ids += [row.image_id for row in rows]
        self.rejects += [row.reject for row in rows if row.reject is not None]
        self.damaged += sum(row.damaged for row in rows)
        if batch.epoch == 0:  # boxes are the same in later epochs
            self.dropped += [box for row in rows for box in row.dropped]
            self.boxes_from.update(row.boxes_from for row in rows if row.boxes_from is not None)


def add_seen(progress: Progress, steps: Sequence[Seen]) -> Progress:
    """Add what ranks saw in steps to the lists of `progress`. An image's reject is listed once."""
    known = {row["image_id"] for row in progress.rejects}
    fresh = [row for seen in steps for row in seen.rejects if row["image_id"] not in known]
    frames = sum((seen.boxes_from for seen in steps), Counter(progress.boxes_from))
    return replace(
        progress,
        rejects=[*progress.rejects, *fresh],
        dropped=[*progress.dropped, *(box for seen in steps for box in seen.dropped)],
        boxes_from=dict(frames),
        damaged=progress.damaged + sum(seen.damaged for seen in steps),
    )


class RowLog:
    """A log of the rows of each step, a JSON line a step, which proves that none is missed.

    Args:
        folder: local; None: no log.
        attempt: the folder of its checkpoints, whose name begins the file's.
    """

    def __init__(self, folder: str | None, attempt: str, rank: int):
        self._file = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            name = Location.of(attempt).name
            self._file = (Path(folder) / f"{name}-{rank}.jsonl").open("a", buffering=1)

    def write(self, step: int, batch: Batch) -> None:
        """Append the image ids of a step."""
        if self._file is not None:
            ids = [row.image_id for row in batch.rows]
            self._file.write(
                json.dumps({"step": step, "epoch": batch.epoch, "image_ids": ids}) + "\n"
            )
