"""One table of work, done by several drivers: each part has every n-th shard of it.

Results of all parts are in one output. Each part has a state of its own beside the others', with
journal, lease and report: `_raypipe/part-3-of-8/`. `_raypipe/parts.json` says which table the parts
divide. The first part to start puts it, and parts that would divide another table are refused.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe.data.location import Location
from raypipe.data.names import STATE
from raypipe.errors import UsageError, foreign

FILE = f"{STATE}/parts.json"
_FOLDER = re.compile(r"part-(\d+)-of-(\d+)")


@dataclass(frozen=True, order=True)
class Part:
    """Part `number` (from 1 on) of `of`."""

    of: int
    number: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """What `--part 3/8` means. Raises UsageError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        number, of = map(int, match.groups()) if match is not None else (0, 0)
        if not 1 <= number <= of:
            raise UsageError(
                f"--part is {text!r}; it is K/N, part K of N, such as 3/8 for the third of eight."
            )
        return cls(of, number)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def state(self, root: Location) -> Location:
        """The output `root` with this part's state."""
        return replace(root, state=f"{STATE}/part-{self.number}-of-{self.of}")

    def rows(self, work: pa.Table) -> pa.Table:
        """The rows of `work` (schema WORK) in this part's shards."""
        return work.filter(pa.array(work.column("shard").to_numpy() % self.of == self.number - 1))

    def others(self) -> "list[Part]":
        """The other parts."""
        return [Part(self.of, n) for n in range(1, self.of + 1) if n != self.number]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The table that parts divide.

    Attributes:
        of: the number of parts.
        rows: of the table.
        digest: of its image ids and shards.
        settings: those that decide the results (JSON types).
    """

    of: int
    rows: int
    digest: str
    settings: dict[str, Any]

    @classmethod
    def of_work(cls, work: pa.Table, *, parts: int, settings: dict[str, Any]) -> "Table":
        """The table `work` (schema WORK) of that many parts."""
        digest = sha256(work.column("shard").to_numpy().astype(np.int64).tobytes())
        for image_id in work.column("image_id").to_pylist():
            digest.update(image_id.encode(errors="surrogatepass") + b"\0")
        return cls(of=parts, rows=work.num_rows, digest=digest.hexdigest(), settings=settings)


def there(root: Location) -> list[Part]:
    """The parts that have a state in `root`, in order."""
    try:
        found = [_FOLDER.fullmatch(name) for name in (root / STATE).folders()]
    except NotADirectoryError:
        return []
    return sorted(Part(int(match[2]), int(match[1])) for match in found if match is not None)


def is_alone(root: Location) -> bool:
    """Whether no part but that of `root`'s own state is there."""
    return all(part.state(root).state == root.state for part in there(root))


def check(root: Location, part: Part | None, table: Table | None) -> None:
    """Check that a run may work in `root` beside what is there. Changes nothing.

    Args:
        part: of the run; None: it does all shards.
        table: that the part divides.

    Raises:
        UsageError: it may not.
    """
    stored = _stored(root)
    if part is None or table is None:
        if stored is not None:
            raise UsageError(
                f"{root} is being made in {stored.of} parts, and a run of all would do their work "
                f"again. Nothing was changed. Give --part 1/{stored.of} ..., or another --output."
            )
        return
    if (root / f"{STATE}/run.json").exists():
        raise UsageError(
            f"{root} has results of a run without --part, which has done other shards than part "
            f"{part}. Nothing was changed. Leave out --part to go on there, or give another "
            "--output."
        )
    if stored is None or is_alone(root):
        return
    if stored.of != part.of:
        raise UsageError(
            f"{root} is being made in {stored.of} parts, and --part is {part}. Nothing was "
            f"changed. Give --part K/{stored.of}, or another --output."
        )
    if (stored.rows, stored.digest) != (table.rows, table.digest):
        raise UsageError(
            f"The input makes another table of shards than when the first part of {root} began: "
            f"{table.rows} images, {stored.rows} then. Parts of both would miss images or do them "
            "twice, so nothing was changed. Give the same images and --shard-rows, or another "
            "--output."
        )
    if not _same(stored, table):
        raise _other_settings(root)


def settle(root: Location, table: Table, *, alone: bool) -> None:
    """Record the table that the parts of `root` divide; `check` it if another part has.

    Args:
        alone: no other part is there, so a recorded table may be replaced.
    """
    data = json.dumps(asdict(table), indent=1).encode()
    if root.create(FILE, data):
        return
    if alone:
        root.write(FILE, data)
    elif (stored := _stored(root)) is None or not _same(stored, table):
        raise _other_settings(root)


def _same(one: Table, other: Table) -> bool:
    """Whether two tables are equal, as JSON."""
    return json.dumps(asdict(one), sort_keys=True) == json.dumps(asdict(other), sort_keys=True)


def _other_settings(root: Location) -> UsageError:
    return UsageError(
        f"Another part of {root} has begun with other settings or another input. Nothing was "
        "changed. Give all parts the same, or another --output."
    )


def _stored(root: Location) -> Table | None:
    try:
        data = (root / FILE).read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    remedy = "It is unknown what its parts divide. Use another --output."
    with foreign(str(root / FILE), remedy=remedy):
        found = Table(**json.loads(data))
        if not isinstance(found.of, int) or not isinstance(found.rows, int):
            raise TypeError("`of` and `rows` are numbers")
        return found
