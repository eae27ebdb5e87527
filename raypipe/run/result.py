"""What a run leaves at its end: counts, rejects and the report, all functions of the journal.

report.json is written last, and its `shards` say which shards are covered. If a driver is killed
between its last shard and its end, not all are covered. The next run then has no shards to do and
writes the report again. Figures that were lost with the driver are null.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.data import journal
from raypipe.data.journal import Dropped, Rejected, Unread, Written
from raypipe.data.location import Location
from raypipe.data.parts import Part
from raypipe.data.reader import Reader
from raypipe.errors import UsageError
from raypipe.images.decode import thumbnail
from raypipe.images.frames import UPRIGHT
from raypipe.insight import html
from raypipe.insight import report as reports
from raypipe.run.settings import Running

FILES = ("rejects.parquet", "boxes_dropped.parquet", "report.html", "report.json")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    report: None if there was nothing left to do.
    rows: number of rows to account for.
    """

    report: dict[str, Any] | None
    rejected: list[Rejected]
    rows: int
    unread: list[Unread] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Became:
    """What became of the rows of a run: delivered, rejected, or not read.

    dropped: unusable boxes of delivered images.
    boxes_from: number of images by the frame of their boxes, if nothing was written.
    """

    written: list[Written] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    boxes_from: Counter[str] = field(default_factory=Counter)

    def counts(
        self,
        *,
        rows: int,
        before: int = 0,
        out: int | None = None,
        damaged: int | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> reports.Counts:
        """Count for the report.

        Args:
            rows: of the run and earlier ones.
            before: rows done by earlier runs.
            out: images delivered, if nothing was written.
            damaged: of these, the damaged ones.
            skipped: number of files that the listing left out, by suffix.
        """
        reasons = Counter(row.reason for row in self.rejected)
        return reports.Counts(
            images_in=rows,
            images_out=len(self.written) if out is None else out,
            rejects_by_reason=dict(reasons.most_common()),
            unread=len(self.unread),
            before=before,
            damaged_kept=sum(row.damaged for row in self.written) if out is None else damaged,
            skipped=dict(skipped or {}),
            boxes_dropped=len(self.dropped),
            boxes_from=frames_told(
                self.boxes_from
                if out is not None
                else Counter(row.boxes_from for row in self.written if row.boxes_from)
            ),
        )


def became(root: Location, work: pa.Table) -> Became:
    """Read from the journal in `root` what became of the rows of `work` (schema WORK).

    Raises:
        UsageError: an entry cannot be read.
    """
    ids, shards = (work.column(name).to_pylist() for name in ("image_id", "shard"))
    wanted = set(zip(shards, ids, strict=True))
    entries = list(journal.read_entries(root, sorted(set(shards) & journal.done_shards(root))))
    written, rejected, unread, dropped = (
        [
            row
            for entry in entries
            for row in getattr(entry, name)
            if (entry.shard, row.image_id) in wanted
        ]
        for name in ("written", "rejected", "unread", "dropped")
    )
    return Became(written=written, rejected=rejected, unread=unread, dropped=dropped)


def of_all_parts(root: Location, part: Part) -> list[Written] | None:
    """The images that all parts of an output have delivered; None: one has not ended."""
    written: list[Written] = []
    for each in (part, *part.others()):
        place = each.state(root)
        work = journal.read_work(place)
        if work is None or not covers(place, work):
            return None
        written += became(place, work).written
    return written


def frames_told(boxes_from: Mapping[str, int]) -> dict[str, int]:
    """The report's counts of images whose boxes were not drawn in the upright frame."""
    return {kind: count for kind, count in sorted(boxes_from.items()) if kind != UPRIGHT}


def ranges(shards: Iterable[int]) -> list[list[int]]:
    """Compress shard numbers to ranges: `[first, last]` each."""
    numbers = np.unique(np.fromiter(shards, np.int64))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []
    return [[int(run[0]), int(run[-1])] for run in runs]


def covers(root: Location, work: pa.Table) -> bool:
    """Whether the report of a run into `root`, which is written last, covers all shards of `work`.

    Raises:
        OSError: the store does not answer, which says nothing of the report.
    """
    report = _report_in(root / root.state)
    try:
        there: set[int] = set()
        for first, last in (report or {})["shards"]:
            there.update(range(int(first), min(int(last), int(first) + 10**8) + 1))
    except Exception:  # damaged, or of an older version: it is made again
        return False
    return set(pc.unique(work.column("shard")).to_pylist()) <= there


def is_report(folder: Location) -> bool:
    """Whether the report.json in `folder` is one of raypipe.

    Raises:
        OSError: the store does not answer.
    """
    found = _report_in(folder)
    return found is not None and {"run_id", "stages", "verdict", "versions"} <= found.keys()


def _report_in(folder: Location) -> dict[str, Any] | None:
    """The report.json in `folder`; None if there is none, or it is damaged."""
    try:
        data = (folder / "report.json").read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    try:
        found = json.loads(data)
    except Exception:  # whatever its bytes are
        return None
    return found if isinstance(found, dict) else None


def check_report(folder: str | None) -> None:
    """Raise UsageError if --report `folder` has files that are no report of raypipe."""
    if folder is None:
        return
    place = Location.of(folder)
    if not place.is_remote and os.path.exists(place.path) and not os.path.isdir(place.path):
        raise UsageError(
            f"--report {folder!r} is a file. Nothing was started. Give a folder for the report."
        )
    taken = [name for name in FILES if (place / name).exists()]
    if taken and not is_report(place):
        raise UsageError(
            f"--report {folder!r} has a {taken[0]} that is no report of raypipe: it would be "
            f"overwritten. Nothing was started. Give a folder without it."
        )


def leave_report(
    folder: Location,
    prefix: str,
    report: dict[str, Any],
    rejected: list[Rejected],
    shown: Sequence[dict[str, Any]] = (),
    dropped: Sequence[Dropped] = (),
) -> None:
    """Write rejects.parquet, boxes_dropped.parquet, report.html and, last, report.json.

    Args:
        prefix: put before their names.
        shown: rejects that the page shows.
    """
    page = html.page(report, rejects=shown, more_rejects=len(rejected) - len(shown))
    files = {
        "rejects.parquet": journal.rejects_parquet(rejected),
        "boxes_dropped.parquet": journal.dropped_parquet(dropped),
        "report.html": page.encode(),
        "report.json": json.dumps(report, indent=1).encode(),
    }
    for name, data in files.items():
        folder.write(prefix + name, data, tmp=None if prefix else "")


SHOWN_PER_REASON, SHOWN = 3, 12
_HARMFUL = (
    "kills its process",
    "takes too long",
    "too many pixels",
    "too large for --actor-memory",
)
"""Reasons for which an image may kill or fill a process: the driver must not decode it."""


def shown(work: pa.Table, rejected: list[Rejected]) -> list[dict[str, Any]]:
    """A few rejects of each reason, with thumbnails, for the report's page."""
    count: Counter[str] = Counter()
    rows: list[Rejected] = []
    for row in rejected:
        count[row.reason] += 1
        if count[row.reason] <= SHOWN_PER_REASON and len(rows) < SHOWN:
            rows.append(row)
    harmless = pa.array([row.image_id for row in rows if row.reason not in _HARMFUL], pa.string())
    work = work.filter(pc.is_in(work.column("image_id"), harmless))
    data = Reader(threads=0, patience_s=0).read(work)
    seen = {
        i: thumbnail(d)
        for i, d in zip(work.column("image_id").to_pylist(), data, strict=True)
        if isinstance(d, bytes)
    }
    return [{**asdict(row), "thumbnail": seen.get(row.image_id)} for row in rows]


def verdict_on(outcome: Outcome, running: Running, *, place: str | None) -> str | None:
    """Why a finished run failed: rows lost or unread, or too many rejected. None: it did not.

    place: the run's state in its output; None: it has no output.
    """
    report = outcome.report
    if report is not None:
        lost = (
            report["images_in"]
            - report["images_out"]
            - report["images_rejected"]
            - report["images_unread"]
        )
        if lost:
            return (
                f"{lost} of {report['images_in']} images are unaccounted for: "
                f"{report['images_out']} came out and {report['images_rejected']} were rejected. "
                f"This is a defect of raypipe; run again to have them done, and report it."
            )
    if outcome.unread:
        causes = Counter(row.detail for row in outcome.unread)
        again = (
            "the same command tries them again"
            if place
            else "nothing was kept, so they are tried when it is run again"
        )
        without = "" if running.resume else " without --no-resume"
        return (
            f"{len(outcome.unread)} of {outcome.rows} images could not be read "
            f"({causes.most_common(1)[0][0]}); {again}{without}. The first: "
            f"{outcome.unread[0].uri}."
        )
    share = len(outcome.rejected) / outcome.rows
    if share > running.max_reject_fraction:
        where = " or ".join(filter(None, (place, running.report)))
        first = outcome.rejected[0]
        return (
            f"{len(outcome.rejected)} of {outcome.rows} images were rejected "
            f"({100 * share:.1f}%), more than --max-reject-fraction "
            f"{running.max_reject_fraction:g} allows; what was good is kept. The first: "
            f"{first.uri}: {first.reason} ({first.detail}). "
            + (
                f"All are in {where}/rejects.parquet."
                if where
                else "Give --report FOLDER to get them all."
            )
        )
    return None
