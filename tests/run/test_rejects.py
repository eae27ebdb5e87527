"""Every good image of a folder is delivered, and every bad one is a row with a fitting reason."""

import io
import json
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raypipe.run.preprocess import Settings, run, verdict_on
from tests.conftest import files, jpeg, photo
from tests.support.runs import plain_loop, quiet, settings

FITTING = {
    "empty": {"empty"},
    "cut": {"truncated", "corrupt", "damaged", "not an image"},
    "text": {"not an image"},
    "noise": {"corrupt", "truncated", "not an image"},
    "header": {
        "corrupt",
        "damaged",
        "not an image",
        "truncated",
        "unsupported mode",
    },  # one sort claims nine colour channels
    "huge": {"too many pixels"},
    "gone": {"unreadable"},
    "float": {"unsupported mode"},
    "crc": {"damaged"},
}


def encoded(image: Image.Image, format: str, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **how)
    return out.getvalue()


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def good_files() -> dict[str, bytes]:
    rgb = Image.fromarray(photo(1))
    deep = Image.fromarray((np.arange(120 * 160) * 3 % 65536).astype(np.uint16).reshape(120, 160))
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {f"good-{i}.jpg": jpeg(i) for i in range(30)}
    return good | {
        "good-grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "good-cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "good-progressive.jpeg": encoded(rgb, "JPEG", progressive=True),
        "good-turned.JPG": encoded(rgb, "JPEG", exif=exif),
        "good-trailing.jpg": jpeg(2) + b"\0" * 5000,
        "good-rgb.png": encoded(rgb, "PNG"),
        "good-palette.png": encoded(rgb.convert("P"), "PNG"),
        "good-alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "good-16-bit.png": encoded(deep, "PNG"),
        "good-bit.png": encoded(rgb.convert("1"), "PNG"),
        "good.webp": encoded(rgb, "WEBP"),
        "good-moving.webp": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        "good.bmp": encoded(rgb, "BMP"),
        "good.tiff": encoded(rgb, "TIFF"),
        "good-16-bit.tif": encoded(deep, "TIFF"),
    }


def bad_files() -> dict[str, bytes]:
    rgb = Image.fromarray(photo(3, height=200, width=300))
    rng = np.random.default_rng(0)
    bad = {
        f"empty-{i}.{ext}": b"" for i, ext in enumerate(["jpg", "png", "webp", "bmp", "tiff"] * 3)
    }
    for format, ext in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
    ):
        whole = encoded(rgb, format)
        for i, share in enumerate(np.linspace(0.02, 0.97, 20)):
            bad[f"cut-{i}.{ext}"] = whole[: int(len(whole) * share)]
    texts = [
        b"<html><body>404 Not Found</body></html>",
        b"PK\x03\x04 a zip",
        b"%PDF-1.7",
        "Grüße".encode(),
        b"{}",
        b"GIF8",
        b"\x00" * 4096,
    ]
    bad |= {
        f"text-{i}.{ext}": text for i, text in enumerate(texts) for ext in ("jpg", "PNG", "tiff")
    }
    for i in range(30):
        noise = rng.integers(0, 256, 4000, dtype=np.uint8).tobytes()
        start = [
            b"",
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
            b"\x89PNG\r\n\x1a\n",
            b"RIFF\xff\x0f\x00\x00WEBPVP8 ",
            b"BM",
            b"II*\x00",
        ][i % 6]
        bad[f"noise-{i}.{['jpg', 'jpg', 'png', 'webp', 'bmp', 'tif'][i % 6]}"] = start + noise
    whole = jpeg(5)
    size_at = whole.index(b"\xff\xc0") + 5
    for i in range(20):
        bad[f"header-{i}.jpg"] = (
            whole[:size_at]
            + (b"\0" * 4 if i % 2 else b"\0\x10" * 2)
            + b"\x09" * (i % 3 + 1)
            + whole[size_at + 5 + i % 3 :]
        )
    png = bytearray(encoded(rgb, "PNG"))
    for i in range(10):
        damaged = bytearray(png)
        damaged[200 + 900 * i] ^= 0xFF
        bad[f"crc-{i}.png"] = bytes(damaged)
    bad |= {f"huge-{i}.png": huge_png() for i in range(3)}
    bad |= {
        f"float-{i}.tiff": encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF")
        for i in range(3)
    }
    return bad


@pytest.mark.parametrize("backend", ["opencv", "torchvision"])
def test_200_broken_files_cost_themselves_and_nothing_else(session, tmp_path, backend):
    folder = tmp_path / "in"
    folder.mkdir()
    good, bad = good_files(), bad_files()
    for name, data in (good | bad).items():
        (folder / name).write_bytes(data)
    for i in range(3):
        (folder / f"gone-{i}.jpg").symlink_to(folder / "nothing there")
    names_of_bad = {*bad, "gone-0.jpg", "gone-1.jpg", "gone-2.jpg"}
    assert len(names_of_bad) >= 200

    wanted = settings(input=folder, output=tmp_path / "out", backend=backend, format="png")
    outcome = run(wanted, console=quiet())

    rejected = {
        row["image_id"]: row
        for row in pq.read_table(tmp_path / "out/_raypipe/rejects.parquet").to_pylist()
    }
    delivered = {name.removesuffix(".png") for name in files(tmp_path / "out")}
    assert rejected.keys() == names_of_bad
    assert len(delivered) == len(good)
    assert {Path(name).stem for name in good} <= delivered | {
        name.rpartition(".")[0] for name in delivered
    }
    for name, row in rejected.items():
        assert row["reason"] in FITTING[name.split("-")[0]], (name, row)
        assert row["detail"] and row["uri"] == str(folder / name)
    report = json.loads((tmp_path / "out/_raypipe/report.json").read_text())
    assert (
        report["images_in"]
        == len(good) + len(rejected)
        == report["images_out"] + report["images_rejected"]
    )
    assert sum(report["rejects_by_reason"].values()) == len(rejected)
    # The run counts as failed and says why. With a higher limit it does not.
    message = verdict_on(outcome, wanted)
    assert (
        message is not None
        and f"{len(rejected)} of {len(good) + len(rejected)} images were rejected" in message
    )
    assert (
        verdict_on(
            outcome, settings(input=folder, output=tmp_path / "out", max_reject_fraction=0.99)
        )
        is None
    )


@pytest.mark.parametrize("output", [True, False])
def test_kept_damaged_images_are_counted(session, photos, tmp_path, output):
    for name in ("a/001.jpg", "b/002.jpg"):
        whole = (photos / name).read_bytes()
        (photos / name).write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    wanted = settings(
        input=photos, damaged="keep", **({"output": tmp_path / "out"} if output else {})
    )
    report = run(wanted, console=quiet()).report
    assert (report["images_out"], report["images_rejected"], report["images_damaged_kept"]) == (
        60,
        0,
        2,
    )


def jpeg_of_many_scans(count: int) -> bytes:
    """A grey JPEG of 4000x4000 whose second scan comes `count` times more: 1.3 ms of CPU each."""
    data = encoded(
        Image.fromarray(np.full((4000, 4000), 90, np.uint8)), "JPEG", progressive=True, quality=50
    )
    second = data.find(b"\xff\xda", data.find(b"\xff\xda") + 2)
    start, end = (
        data.rfind(b"\xff\xc4", 0, second),
        data.rfind(b"\xff\xc4", second, data.find(b"\xff\xda", second + 2)),
    )
    return data[:start] + data[start:end] * count + data[start:]


def test_an_image_that_takes_too_long_is_rejected_and_no_other(session, photos, tmp_path):
    (photos / "a" / "long.jpg").write_bytes(jpeg_of_many_scans(20_000))  # half a minute
    wanted = settings(
        input=photos,
        output=tmp_path / "out",
        image_seconds=1.0,
        max_reject_fraction=0.5,
        writers=0,
    )
    outcome = run(wanted, console=quiet())
    assert [(row.image_id, row.reason) for row in outcome.rejected] == [
        ("a/long.jpg", "takes too long")
    ]
    assert outcome.rejected[0].detail == "more than --image-seconds 1 of CPU"
    assert len(files(tmp_path / "out")) == 60


def test_an_image_too_large_for_the_actors_memory_is_rejected_and_not_shown(
    session, photos, tmp_path
):
    (photos / "a" / "large.png").write_bytes(encoded(Image.new("RGB", (9000, 9000)), "PNG"))
    wanted = settings(
        input=photos, output=tmp_path / "out", actor_memory=0.6, max_reject_fraction=0.5
    )
    outcome = run(wanted, console=quiet())
    assert [(row.image_id, row.reason) for row in outcome.rejected] == [
        ("a/large.png", "too large for --actor-memory")
    ]
    assert "9000x9000 pixels (png) take 1.2" in outcome.rejected[0].detail


@pytest.mark.parametrize("written", [True, False])
def test_images_that_do_not_fit_together_are_done_by_the_same_run(session, tmp_path, written):
    """Parquet tells their encoded sizes: 20 kB a PNG of 12 MB, so one shard has all of them."""
    pages = [encoded(Image.new("RGB", (2000, 2000), (n, n, n)), "PNG") for n in range(12)]
    pq.write_table(pa.table({"image": pages}), tmp_path / "pages.parquet")
    recipe = tmp_path / "as-it-is.json"
    recipe.write_text(json.dumps({"name": "as-it-is", "ops": [{"op": "HorizontalFlip"}]}))
    wanted = settings(
        input=tmp_path / "pages.parquet",
        output=tmp_path / "out" if written else None,
        recipe=recipe,
        actor_memory=0.35,
        shard_rows=12,
        writers=0,
    )
    taken: list[str | None] = []
    outcome = run(
        wanted,
        console=quiet(),
        consume=None if written else lambda block: taken.extend(block["reason"].to_pylist()),
    )
    report = outcome.report
    assert (outcome.rejected, outcome.unread, verdict_on(outcome, wanted)) == ([], [], None)
    assert report is not None
    assert (report["images_in"], report["images_out"], report["images_unread"]) == (12, 12, 0)
    assert taken == ([] if written else [None] * 12)
    if written:
        assert len(files(tmp_path / "out")) > 1
        assert run(wanted, console=quiet()).report is None  # nothing is left to do


def test_bad_boxes_are_dropped_and_counted_and_their_images_stay(session, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    boxes = {
        "good": [10, 10, 20, 20],
        "sticks-out": [150, 110, 30, 30],
        "negative": [30, 30, -10, 5],
        "infinite": [0, 0, float("inf"), 5],
        "elsewhere": [500, 500, 10, 10],
    }
    coco: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for i, (name, box) in enumerate(boxes.items()):
        (folder / f"{name}.jpg").write_bytes(jpeg(i))
        coco["images"].append({"id": i, "file_name": f"{name}.jpg", "height": 120, "width": 160})
        coco["annotations"].append(
            {"id": 100 + i, "image_id": i, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
        )
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    wanted = Settings.of(
        input=str(folder),
        annotations=str(tmp_path / "instances.json"),
        output=str(tmp_path / "out"),
        actors=1,
        writers=1,
    )
    outcome = run(wanted, console=quiet())
    assert (
        not outcome.rejected
        and outcome.report["images_out"] == 5
        and outcome.report["boxes_dropped"] == 3
    )
    dropped = pq.read_table(tmp_path / "out/_raypipe/boxes_dropped.parquet").to_pylist()
    assert sorted((row["image_id"], row["annotation_id"], row["reason"]) for row in dropped) == [
        ("2", 102, "corners swapped"),
        ("3", 103, "not finite"),
        ("4", 104, "outside the image"),
    ]
    assert sorted(files(tmp_path / "out")) == [
        "annotations/instances.json",
        *sorted(f"in/{name}.jpg" for name in boxes),
    ]
    annotations = tmp_path / "out/annotations/instances.json"
    written = json.loads(annotations.read_text())
    assert [
        (image["id"], image["file_name"], image["height"], image["width"])
        for image in written["images"]
    ] == [(i, f"{name}.jpg", 300, 300) for i, name in enumerate(boxes)]
    # 160x120 to 300x300: x by 1.875, y by 2.5; what sticks out is clipped to the picture first.
    assert {a["id"]: a["bbox"] for a in written["annotations"]} == {
        100: pytest.approx([18.75, 25, 37.5, 50]),
        101: pytest.approx([281.25, 275, 18.75, 25]),
    }
    content = annotations.read_bytes()
    annotations.unlink()  # as if the run had been killed when its last shard was done
    assert run(wanted, console=quiet()).report is None
    assert annotations.read_bytes() == content


@pytest.fixture
def mount(tmp_path):
    """40 photos on what is taken away, and put back."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02d}.jpg").write_bytes(jpeg(index))
    return folder


def test_what_a_mount_did_not_give_is_done_by_the_next_run_as_if_nothing_had_been(
    session, mount, tmp_path
):
    wanted = settings(
        input=mount,
        output=tmp_path / "out",
        shard_rows=4,
        read_ms=40.0,
        read_patience=0.2,
        actors=1,
        writers=1,
    )

    def away(control) -> None:
        while len(list(tmp_path.glob("out/_raypipe/journal/*.json"))) < 2:
            time.sleep(0.01)
        mount.rename(tmp_path / "away")

    taken = threading.Thread(target=away, args=(None,))
    taken.start()
    outcome = run(wanted, console=quiet())
    taken.join()
    report = outcome.report
    unread = report["images_unread"]
    assert 0 < unread < 40 and report["images_out"] == 40 - unread == len(files(tmp_path / "out"))
    assert report["images_rejected"] == 0 and len(outcome.unread) == unread
    failure = verdict_on(outcome, wanted)
    assert (
        failure.startswith(f"{unread} of 40 images could not be read (")
        and "the same command tries them again" in failure
    )
    (tmp_path / "away").rename(mount)
    again = run(wanted, console=quiet())
    assert (
        again.report["images_out"],
        again.report["images_unread"],
        again.report["images_done_before"],
    ) == (40, 0, 40 - unread)
    plain_loop(wanted, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")
    assert verdict_on(again, wanted) is None and run(wanted, console=quiet()).report is None


def test_without_an_output_what_was_not_read_is_counted_too(session, mount):
    wanted = settings(input=mount, output=None, shard_rows=4, read_patience=0.2, actors=1)
    seen = []

    def consume(block) -> None:
        seen.append(block.num_rows)
        for path in mount.glob("*.jpg"):
            path.unlink()

    report = run(wanted.changed(read_ms=40.0), console=quiet(), consume=consume).report
    assert (
        sum(seen)
        == 40
        == report["images_out"] + report["images_unread"] + report["images_rejected"]
    )
    assert report["images_unread"] >= 20
