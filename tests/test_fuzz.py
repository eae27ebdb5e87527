"""Damaged files of every format give an error in a line or a reject, never a traceback or a hang.

All in this process and without Ray: what an actor does with a row is done here too.
"""

import contextlib
import io
import json
import logging
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from raypipe import UsageError, cli
from raypipe.data import journal, outputs, sizes
from raypipe.data.formats.coco import check_annotation_ids, write_annotations
from raypipe.data.listing import look
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.shapes import Placement
from raypipe.data.tables import Listed
from raypipe.data.work import make_work, wanted_by
from raypipe.images.header import Reject
from raypipe.images.ops.augment import HorizontalFlip
from raypipe.images.ops.geometry import Resize, ShortSide
from raypipe.images.recipe import Recipe
from raypipe.images.recipe_json import from_json, to_json
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress
from raypipe.stages.planning import Preprocessing
from raypipe.stages.predict import load
from raypipe.stages.preprocess import preprocess_shard
from tests import fuzzing
from tests.data.conftest import tar
from tests.insight.test_report import built, sample
from tests.models.toy import Toy

ROWS = 6
MOST_S = 10


class TooLong(BaseException):
    """A case took longer than MOST_S."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, MOST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Case:
    """A format: a good file, how it is damaged, and how it is read; None: it was read unchanged."""

    file: str
    good: bytes
    damage: Callable[[bytes, random.Random], bytes]
    use: Callable[[Path], None]
    count: int


def jpeg(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def processed(listed: Listed, *, at_least: int = ROWS) -> None:
    """Read, decode and plan every row. As many come out, or there is a reason for fewer."""
    assert listed.rows.num_rows >= at_least or listed.skipped or said, (
        listed.rows.num_rows,
        listed.skipped,
    )
    rows = wanted_by(listed.rows, needs_boxes=False, drops_crowds=False)
    if rows.num_rows:  # a recipe whose results differ in size looks at the headers before it starts
        shape = sizes.cut(
            VARYING, images=rows.num_rows, rows=None, backend="opencv", memory=1 << 30
        )
        assert make_work(rows, **shape.arguments).num_rows == rows.num_rows
    work = make_work(rows, rows_per_shard=1000)
    with contextlib.closing(Reader(0)) as reader:
        block, _ = preprocess_shard(
            work, Preprocessing(recipe=RECIPE, backend="opencv"), reader=reader
        )
    assert block.num_rows == work.num_rows
    assert block["image"].null_count == pa.compute.count(block["reason"]).as_py()


VARYING = Recipe(name="v", ops=(ShortSide(short=16, long=32),))
RECIPE = Recipe(name="r", ops=(Resize(height=16, width=16), HorizontalFlip()))
said: list[logging.LogRecord] = []


def listed(path: Path, **how: str) -> None:
    processed(look(str(path), **how))


def listed_as_said(path: Path) -> None:
    processed(look(str(path)), at_least=0)  # a footer says how many rows there are, and nobody else


def sidecar(k: int) -> bytes:
    frame = {"height": 20, "width": 30}
    return json.dumps(
        {"boxes": [[k, 1, 9, 9]], "labels": [k], "crowds": [False], "annotation_ids": [k], **frame}
    ).encode()


def tar_bytes(folder: Path, *, sidecars: Callable[[int], bytes] = sidecar) -> bytes:
    path = folder / "good.tar"
    members = [
        m
        for k in range(ROWS)
        for m in (
            (f"{'x' * 120 * (k == 1)}{k}.jpg", jpeg(k)),
            (f"{k}.json", sidecars(k)),
            (f"{k}.cls", b"3"),
        )
    ]
    tar(path, *members)
    data = path.read_bytes()
    path.unlink()
    return data


def parquet_bytes(**columns: object) -> bytes:
    out = io.BytesIO()
    boxes = pa.array([[[1, 1, 9, 9]]] * ROWS, pa.list_(pa.list_(pa.float32())))
    table = {
        "image": [jpeg(k) for k in range(ROWS)],
        "boxes": boxes,
        "labels": [[1]] * ROWS,
        "height": [20] * ROWS,
        "width": [30] * ROWS,
    }
    pq.write_table(pa.table(table | columns), out, row_group_size=4)
    return out.getvalue()


def coco(folder: Path) -> bytes:
    for k in range(ROWS):
        (folder / f"{k}.jpg").write_bytes(jpeg(k))
    images = [{"id": k, "file_name": f"{k}.jpg", "height": 20, "width": 30} for k in range(ROWS)]
    annotations = [
        {
            "id": k,
            "image_id": k,
            "category_id": 1,
            "bbox": [1.5, 2, 9, 9],
            "area": 81,
            "iscrowd": 0,
            "segmentation": [[1, 1, 9, 9, 1, 9]]
            if k % 2
            else {"size": [20, 30], "counts": [41, 9, 550]},
            "keypoints": [2, 3, 2, 5, 6, 1],
            "num_keypoints": 2,
        }
        for k in range(ROWS)
    ]
    categories = [{"id": 1, "name": "a", "keypoints": ["left_eye", "right_eye"]}]
    return json.dumps(
        {"images": images, "annotations": annotations, "categories": categories}
    ).encode()


def with_coco(path: Path) -> None:
    found = look(str(path.parent), annotations=str(path))
    processed(found, at_least=0)
    check_annotation_ids(found.rows, str(path))
    rows = (
        (i, f"{i}.jpg", 16, 16, b, a)
        for i, b, a in zip(
            *(found.rows[n].to_pylist() for n in ("image_id", "boxes", "annotation_ids")),
            strict=True,
        )
    )
    went = Placement(
        source=(20, 30), size=(16, 16), matrix=(-16 / 30, 0.0, 16.0, 0.0, 16 / 20, 0.0)
    )
    write_annotations(
        Location.of(str(path)),
        Location.of(str(path.parent / "out")),
        rows,
        placed=dict.fromkeys(map(str, range(ROWS)), went),
    )


def entries(path: Path) -> None:
    root = Location.of(str(path.parent.parent.parent))
    for entry in journal.read_entries(root, sorted(journal.done_shards(root))):
        assert entry.images == len(entry.written) + len(entry.rejected)


def work(path: Path) -> None:
    found = journal.read_work(Location.of(str(path.parent.parent)))
    assert found is not None
    found.to_pylist()


def made(path: Path) -> None:
    outputs.check_settings(Location.of(str(path.parent.parent)), {"a": 1})


def report(path: Path) -> None:
    quiet = Console(file=io.StringIO(), width=200)
    cli.report(cli.Report(runs=(str(path.parent.parent),)), quiet)
    with contextlib.suppress(UsageError):  # what it is of knows no costs
        cli.plan(cli.Plan(run=str(path.parent.parent), cpus=8), quiet)


def checkpoint(path: Path) -> None:
    folder = str(path.parent)
    checkpoints.find(folder)
    checkpoints.progress_of(folder)
    kept = checkpoints.load(folder)
    checkpoints.check_trusted(kept.settings, folder, ("tests.models.toy:Toy",))
    from_json(dict(kept.settings["recipe"]), trusted=())
    load(folder, torch.device("cpu"), trusted=("tests.models.toy:Toy",))


def cases(folder: Path) -> Iterator[Case]:
    for name in ("tar", "cls", "coco", "out/_raypipe/journal", "r/_raypipe", "c"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    yield Case("tar/a.tar", tar_bytes(folder), fuzzing.tar_of, listed, 600)
    yield Case("a.parquet", parquet_bytes(), fuzzing.parquet_of, listed_as_said, 350)
    tensors = pa.array(
        [np.full((4, 5, 3), k, np.uint8).tolist() for k in range(ROWS)],
        pa.list_(pa.list_(pa.list_(pa.uint8()))),
    )
    yield Case("b.parquet", parquet_bytes(image=tensors), fuzzing.parquet_of, listed_as_said, 150)
    yield Case("coco/a.json", coco(folder / "coco"), fuzzing.json_of, with_coco, 300)
    recipe = json.dumps(to_json(RECIPE)).encode()
    yield Case(
        "r.json",
        recipe,
        fuzzing.json_of,
        lambda path: from_json(path).plan(seed=0, epoch=0, image_id="", size=(9, 9)),
        200,
    )  # type: ignore[arg-type, func-returns-value]

    root = Location.of(str(folder / "out"))
    written = [
        journal.Written(
            image_id="a", file="a.jpg", height=1, width=2, boxes=[[0, 0, 1, 1]], annotation_ids=[1]
        )
    ]
    rejected = [journal.Rejected(image_id="b", uri="/b", reason="empty", detail="")]
    journal.put_entry(
        root,
        journal.Entry(
            epoch=0, shard=1, written=written, rejected=rejected, files=["a.jpg"], bytes=9
        ),
    )
    for file, damage, use, count in (
        ("journal/000000001.json", fuzzing.json_of, entries, 150),
        ("work.parquet", fuzzing.parquet_of, work, 50),
        ("run.json", fuzzing.json_of, made, 50),
    ):
        path = folder / "out/_raypipe" / file
        if file == "work.parquet":
            journal.put_work(root, make_work(look("demo:3").rows, rows_per_shard=2))
        if file == "run.json":
            path.write_text(json.dumps({"settings": {"a": 1}, "versions": {}, "endings": []}))
        yield Case(f"out/_raypipe/{file}", path.read_bytes(), damage, use, count)

    last = [sample("preprocess", "a", 9.0, busy=4.0), sample("write", "b", 9.0, busy=1.0)]
    good = json.dumps(
        built([sample("preprocess", "a", 1.0)], last, outputs=[(2.0, 5), (9.0, 5)])
    ).encode()
    yield Case("r/_raypipe/report.json", good, fuzzing.json_of, report, 100)

    settings = {
        "model": {"name": "tests.models.toy:Toy", "arguments": {}},
        "classes": [7, 9],
        "amp": "off",
        "recipe": to_json(RECIPE),
    }
    progress = Progress(
        epoch=1,
        step=2,
        rows=3,
        images=2,
        rejects=[{"image_id": "x", "uri": "x", "reason": "empty", "detail": ""}],
    )
    state = {"model": Toy(3).state_dict()}
    checkpoints.save(
        str(folder / "c"),
        Checkpoint(settings=settings, progress=progress, seen={"epoch": 1}, state=state),
    )
    for file, damage, count in (
        ("about.json", fuzzing.json_of, 120),
        ("state.pt", fuzzing.bytes_of, 10),
    ):
        yield Case(f"c/{file}", (folder / "c" / file).read_bytes(), damage, checkpoint, count)


def sidecar_cases(folder: Path) -> Iterator[Path]:
    """Tars that are whole, with sidecars that are not."""
    rng = random.Random(5)
    for _ in range(150):
        path = folder / "s.tar"
        path.write_bytes(tar_bytes(folder, sidecars=lambda k: fuzzing.json_of(sidecar(k), rng)))
        yield path


@pytest.fixture
def heard(caplog):
    """What was logged, of each case."""
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_2000_damaged_files_are_errors_in_a_line_or_rejects_and_nothing_is_lost(tmp_path, heard):
    global said
    count, failures, refused = 0, [], 0

    def one(use: Callable[[Path], None], path: Path, what: str) -> None:
        nonlocal count, refused
        global said
        count += 1
        heard.clear()
        said = heard.records
        try:
            with watched():
                use(path)
        except UsageError as error:
            refused += 1
            text = str(error)
            if not text.isprintable() and "\n  " not in text:
                failures.append((what, f"not one line: {text!r}"))
        except Reject:
            refused += 1
        except (TooLong, Exception) as error:
            failures.append((what, repr(error)))

    for case in cases(tmp_path):
        path = tmp_path / case.file
        path.write_bytes(case.good)
        before = refused
        one(case.use, path, f"{case.file}, whole")
        assert refused == before, f"{case.file} as it is written was refused"
        for seed in range(case.count):
            data = case.damage(case.good, random.Random(seed))
            path.write_bytes(data)
            one(case.use, path, f"{case.file} {seed}")
        path.write_bytes(case.good)
    for number, path in enumerate(sidecar_cases(tmp_path)):
        one(listed, path, f"sidecars {number}")
    assert count >= 2000
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(
        f"{what}: {error}" for what, error in failures[:40]
    )
    assert refused < count / 2 + 400  # many are read in spite of the damage
