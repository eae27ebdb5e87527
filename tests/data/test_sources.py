import glob
import gzip
import io
import itertools
import json
import logging
import os
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import sources
from raypipe.data.sources import SOURCE, list_images
from raypipe.images.decode import Reject
from tests.data.conftest import ids, put, read, reasons


def names(table: pa.Table) -> list[str]:
    return table["name"].to_pylist()


# --- directories, files, globs ---------------------------------------------------------------------------------------------


def test_directory_lists_images_by_path_components(tmp_path):
    contents = put(tmp_path, "b.jpg", "a/z.PNG", "a/b.JpEg", "a-1/c.webp", "a/sub/deep/x.bmp", "t.tif", "u.tiff", "v.npy")
    put(tmp_path, "notes.txt", ".hidden.jpg", ".git/x.jpg", "_raypipe/tmp/y.jpg", "a/_raypipe/z.jpg", "noextension", "jpg")
    table = list_images(str(tmp_path))
    assert table.schema == SOURCE
    assert ids(table) == ["a/b.JpEg", "a/sub/deep/x.bmp", "a/z.PNG", "a-1/c.webp", "b.jpg", "t.tif", "u.tiff", "v.npy"]
    assert names(table) == ["a/b", "a/sub/deep/x", "a/z", "a-1/c", "b", "t", "u", "v"]
    assert table["uri"].to_pylist() == [str(tmp_path / one) for one in ids(table)]
    assert read(table) == [contents[one] for one in ids(table)]
    assert table["boxes"].to_pylist() == [[]] * 8
    assert table["labels"].null_count == table["boxes"].null_count == 0


def test_limit_gives_the_first_rows(tmp_path):
    put(tmp_path, *(f"{i % 7}/{i:03d}.jpg" for i in range(60)))
    whole = list_images(str(tmp_path))
    for limit in (1, 13, 60, 100):
        assert list_images(str(tmp_path), limit=limit).equals(whole.slice(0, limit))


def test_limit_stops_the_walk(tmp_path, monkeypatch):
    put(tmp_path, *(f"{i:02d}/x.jpg" for i in range(50)))
    opened = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(path) or scandir(path))
    assert list_images(str(tmp_path), limit=3).num_rows == 3
    assert len(opened) < 8


def test_relative_paths_and_home_become_absolute(tmp_path, monkeypatch):
    put(tmp_path, "in/a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("in", "./in/", "~/in", "in/a.jpg", f"file://{tmp_path}/in", "in/*.jpg"):
        assert list_images(spelling)["uri"].to_pylist() == [str(tmp_path / "in/a.jpg")], spelling
        assert ids(list_images(spelling)) == ["a.jpg"], spelling


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, "a/x.jpg", "b/y.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.jpg").symlink_to(tmp_path / "d.jpg")
    table = list_images(str(tmp_path))
    assert {"a/x.jpg", "b/a/x.jpg", "b/y.jpg", "c.jpg"} <= set(ids(table))
    assert table.num_rows < 20
    assert ids(table)[-2:] == ["c.jpg", "d.jpg"] and reasons(read(table))[-2:] == ["unreadable", "unreadable"]


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        with open(path, "wb") as file:
            file.write(b"bytes")
    except OSError:
        pytest.skip("this file system only takes UTF-8")
    put(tmp_path, "plain.jpg")
    table = list_images(str(tmp_path))
    assert ids(table) == ["caf\\udce9.jpg", "plain.jpg"]
    assert read(table)[0] == b"bytes"


def test_strange_but_legal_names_can_be_read(tmp_path):
    strange = ["new\nline.jpg", "100%.jpg", "a?b#c.jpg", "ü/ß.jpg", "[x].jpg", "{0..1}.jpg", "s p a c e.jpg", "a:b.jpg", '"q".jpg']
    contents = put(tmp_path, *strange)
    table = list_images(str(tmp_path))
    assert sorted(ids(table)) == sorted(strange)
    assert read(table) == [contents[one] for one in ids(table)]
    for one in strange:
        assert read(list_images(str(tmp_path / one))) == [contents[one]], one


def test_globs(tmp_path):
    put(tmp_path, "a/1.jpg", "a/2.png", "b/1.jpg", "b/deep/1.jpg", "c.jpg", "a/.h.jpg")
    assert ids(list_images(f"{tmp_path}/*/1.jpg")) == ["a/1.jpg", "b/1.jpg"]
    assert ids(list_images(f"{tmp_path}/**/1.jpg")) == ["a/1.jpg", "b/1.jpg", "b/deep/1.jpg"]
    assert ids(list_images(f"{tmp_path}/a/[12].*")) == ["1.jpg", "2.png"]
    assert ids(list_images(f"{tmp_path}/**")) == ["a/1.jpg", "a/2.png", "b/1.jpg", "b/deep/1.jpg", "c.jpg"]
    assert ids(list_images(f"{tmp_path}/**/*.jpg", limit=2)) == ["a/1.jpg", "b/1.jpg"]
    assert ids(list_images(f"{tmp_path}/{{b,a}}/*.jpg")) == ["1.jpg", "1.jpg#2"]
    with pytest.raises(UsageError, match=r"no images in .*\*\*"):
        list_images(f"{tmp_path}/*.png")


def test_deep_globs_have_the_guards_of_directories(tmp_path, monkeypatch):
    put(tmp_path, "a/x.jpg", "b/y.jpg", "_raypipe/work.parquet")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b/up").symlink_to(tmp_path)
    assert len(ids(list_images(f"{tmp_path}/**/*.jpg"))) < 20
    with pytest.raises(UsageError, match="no images"):
        list_images(f"{tmp_path}/**/*.parquet")
    with pytest.raises(UsageError, match="no images"):
        list_images(f"{tmp_path}/*/*.parquet")
    # Folders that the pattern excludes are not looked into.
    walk = sources._entries
    monkeypatch.setattr(sources, "_entries", lambda folder: [][1] if folder.endswith("/closed") else walk(folder))
    put(tmp_path, "closed/z.jpg", "open-1/deep/x.jpg", "open-2/.thumbs/t.jpg")
    assert ids(list_images(f"{tmp_path}/open-*/**/*.jpg")) == ["open-1/deep/x.jpg"]
    assert ids(list_images(f"{tmp_path}/*/.thumbs/**/*.jpg")) == ["open-2/.thumbs/t.jpg"]


@pytest.mark.parametrize(
    "pattern", ["*.jpg", "**/*.jpg", "a/**/x.jpg", "**", "a/*/*.jpg", "[ab]/?.jpg", "[!a]/*.jpg", "**/b/*", "a**/x.jpg"]
)
def test_remote_globs_match_what_local_ones_do(tmp_path, pattern):
    files = ["x.jpg", "a/x.jpg", "a/b/x.jpg", "a/b/c/x.jpg", "b/y.jpg", "c/z.jpg", "ab/x.jpg", "a/b/c.d/x.jpg"]
    put(tmp_path, *files)
    fixed = os.path.dirname(f"{tmp_path}/{pattern[: min(i for i in map(pattern.find, '*[?') if i >= 0)]}x")
    found = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
    expected = {os.path.relpath(path, fixed) for path in found if path.endswith(".jpg")}
    assert set(ids(list_images(f"{tmp_path}/{pattern}"))) == expected
    base = pattern[: min(i for i in map(pattern.find, "*[?") if i >= 0)].rpartition("/")[0]
    regex = sources._glob_regex(pattern.replace("?", "[!/]"))
    assert {os.path.relpath(file, base or ".") for file in files if regex.fullmatch(file)} == expected


def test_inputs_that_hold_nothing(tmp_path):
    put(tmp_path, "readme.txt", "full/a.jpg")
    (tmp_path / "empty").mkdir()
    for input, message in (
        (f"{tmp_path}/empty", "no images"),
        (f"{tmp_path}/readme.txt", "is a file, and none that can hold images"),
        (f"{tmp_path}/nowhere", "does not exist"),
        ("", "empty"),
        ("nosuchscheme://bucket/key", "cannot open nosuchscheme://bucket"),
        (f"{tmp_path}/x{{9..1}}.tar", "counts downwards"),
    ):
        with pytest.raises(UsageError, match=message):
            list_images(input)
    for limit in (0, -5):
        with pytest.raises(UsageError, match=str(limit)):
            list_images(f"{tmp_path}/full", limit=limit)


def test_unlistable_directory_is_an_error_and_not_a_hole(tmp_path, monkeypatch):
    put(tmp_path, "a/x.jpg", "locked/y.jpg")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UsageError, match=r"locked.*Permission denied"):
        list_images(str(tmp_path))


def test_ids_that_occur_again_are_numbered():
    assert sources._number_repeats(["a", "b", "a", "a", "a#2", "b"]) == ["a", "b", "a#2", "a#3", "a#2#2", "b#2"]


# --- COCO ------------------------------------------------------------------------------------------------------------------


def coco(tmp_path, **changes) -> str:
    content = {
        "images": [
            {"id": 7, "file_name": "two.jpg", "height": 10, "width": 20},
            {"id": 3, "file_name": "sub/one.jpg", "height": 10, "width": 20},
            {"id": 9, "file_name": "missing.jpg", "height": 10, "width": 20},
        ],
        "annotations": [
            {"id": 100, "image_id": 3, "category_id": 18, "bbox": [1, 2, 3.5, 4], "iscrowd": 0, "area": 14},
            {"id": 101, "image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1, "area": 25},
            {"id": 102, "image_id": 3, "category_id": 90, "bbox": [5, 5, 1, 1], "area": 1},
            {"id": 90, "image_id": 3, "category_id": 2, "bbox": [0, 1, 2, 3], "area": 6},
        ],
        "categories": [{"id": 1, "name": "person"}],
    } | changes
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_coco_lists_the_json_in_its_order(tmp_path):
    contents = put(tmp_path / "images", "two.jpg", "sub/one.jpg", "unlisted.jpg")
    table = list_images(str(tmp_path / "images"), annotations=coco(tmp_path))
    assert table.schema == SOURCE
    assert ids(table) == ["7", "3", "9"]
    assert names(table) == ["two", "sub/one", "missing"]
    assert table["boxes"].to_pylist() == [[[0, 0, 5, 5]], [[1, 2, 4.5, 6], [5, 5, 6, 6], [0, 1, 2, 4]], []]
    assert table["labels"].to_pylist() == [[1], [18, 90, 2], []]
    assert table["crowds"].to_pylist() == [[True], [False] * 3, []]
    assert table["annotation_ids"].to_pylist() == [[101], [100, 102, 90], []]
    results = read(table)
    assert results[:2] == [contents["two.jpg"], contents["sub/one.jpg"]]
    assert isinstance(results[2], Reject) and results[2].reason == "unreadable" and "missing.jpg" in results[2].detail
    assert list_images(str(tmp_path / "images"), annotations=coco(tmp_path), limit=2).equals(table.slice(0, 2))


def test_coco_annotations_of_unknown_images_are_counted_and_ignored(tmp_path, caplog):
    put(tmp_path, "two.jpg")
    strangers = [{"id": i, "image_id": 555, "category_id": 1, "bbox": [0, 0, 1, 1]} for i in range(4)]
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path), annotations=coco(tmp_path, annotations=strangers))
    assert table["labels"].to_pylist() == [[], [], []]
    assert "4 annotations" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, 'no list "images"'),
        ({"images": []}, "list no image"),
        ({"images": [{"id": 1}]}, "number 0 has no id or no file_name"),
        ({"images": [{"file_name": "a.jpg"}]}, "number 0"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, "1 occurs twice"),
        ({"images": [{"id": [], "file_name": "a.jpg"}]}, "id"),
        ({"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, "number 0"),
        ({"annotations": {}}, '"annotations" is no list'),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3]}]}, "annotation number 0"),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": "1234x"}]}, "annotation number 0"),
        ({"annotations": [{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4]}]}, "category_id"),
        ({"annotations": [{"id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}]}, "image_id"),
        ({"annotations": ["x"]}, "annotation number 0"),
    ],
)
def test_coco_that_makes_no_sense(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        list_images(str(tmp_path), annotations=coco(tmp_path, **changes))


def test_annotations_that_are_no_coco_at_all(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "x.json").write_text('{"images": [')
    (tmp_path / "y.json").write_text("[1, 2]")
    (tmp_path / "z.json").write_bytes(b"\xff\xfe\x00")
    for file, message in (("x.json", "not JSON"), ("y.json", "not COCO"), ("z.json", "not JSON"), ("nowhere.json", "cannot read")):
        with pytest.raises(UsageError, match=message):
            list_images(str(tmp_path), annotations=str(tmp_path / file))
    with pytest.raises(UsageError, match="is no directory"):
        list_images(str(tmp_path / "a.jpg"), annotations=coco(tmp_path))
    with pytest.raises(UsageError, match="its own boxes"):
        list_images("demo", annotations=coco(tmp_path))


def test_coco_boxes_may_be_nonsense_here(tmp_path):
    """They are the recipe's to judge: the image becomes a reject with a reason, not the run an error."""
    boxes = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [float("nan"), 2, -3, 4]}]
    table = list_images(str(tmp_path), annotations=coco(tmp_path, annotations=boxes))
    left, top, right, bottom = table["boxes"][0].as_py()[0]
    assert np.isnan([left, right]).all() and (top, bottom) == (2, 6)


# --- tars ------------------------------------------------------------------------------------------------------------------


def tar(path: pathlib.Path, *members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_members_and_sidecars(tmp_path, format):
    long = "folder/" + "x" * (60 if format == tarfile.USTAR_FORMAT else 180)
    sidecar = {"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": [4, 5], "crowds": [False, True], "image_id": "mine"}
    tar(
        tmp_path / "a.tar",
        ("000.jpg", b"first"),
        ("000.cls", b"12\n"),
        ("001.json", json.dumps(sidecar).encode()),
        ("001.png", b"second"),
        (long + ".jpg", b"third" * 1000),
        ("002.txt", b"no image"),
        ("003.left.jpg", b"left"),
        ("003.right.jpg", b"right"),
        ("003.json", b'{"caption": "foreign"}'),
        ("._004.jpg", b"what macOS adds"),
        ("005.jpg", b""),
        format=format,
    )
    table = list_images(str(tmp_path / "a.tar"))
    assert ids(table) == ["000", "mine", long, "003.left", "003.right", "005"]
    assert names(table) == ["000", "001", long, "003.left", "003.right", "005"]
    assert table["labels"].to_pylist() == [[12], [4, 5], [], [], [], []]
    assert table["boxes"].to_pylist()[1] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert table["crowds"].to_pylist()[1] == [False, True]
    results = read(table)
    assert results[:5] == [b"first", b"second", b"third" * 1000, b"left", b"right"]
    assert reasons(results)[5] == "empty"
    shuffled = table.take([4, 0, 2, 1, 2])
    assert read(shuffled) == [b"right", b"first", b"third" * 1000, b"second", b"third" * 1000]
    assert list_images(str(tmp_path / "a.tar"), limit=2).equals(table.slice(0, 2))


def test_tars_by_braces_directory_and_glob(tmp_path):
    for i in range(12):
        tar(tmp_path / f"set-{i:03d}.tar", ("0.jpg", b"%d-0" % i), ("1.jpg", b"%d-1" % i))
    everything = list_images(str(tmp_path))
    assert everything.num_rows == 24
    assert ids(everything)[:4] == ["0", "1", "0#2", "1#2"]
    assert len(set(names(everything))) == 24
    assert read(everything) == [b"%d-%d" % pair for pair in itertools.product(range(12), range(2))]
    assert list_images(f"{tmp_path}/set-{{000..011}}.tar").equals(everything)
    assert list_images(f"{tmp_path}/*.tar").equals(everything)
    assert list_images(f"{tmp_path}/set-{{000..011}}.tar", limit=5).equals(everything.slice(0, 5))
    with pytest.raises(UsageError, match=r"set-012\.tar.*does not exist"):
        list_images(f"{tmp_path}/set-{{010..012}}.tar")


def test_tar_sidecar_with_an_id_that_is_no_unicode(tmp_path):
    tar(tmp_path / "a.tar", ("0.jpg", b"0"), ("0.json", b'{"image_id": "\\ud800", "boxes": []}'))
    assert ids(list_images(str(tmp_path / "a.tar"))) == ["\\ud800"]


def test_tar_members_with_hostile_names_stay_below_the_root(tmp_path):
    tar(tmp_path / "a.tar", ("../../etc/passwd.jpg", b"1"), ("/etc/shadow.jpg", b"2"), ("a\nb.jpg", b"3"))
    table = list_images(str(tmp_path / "a.tar"))
    assert names(table) == ["_/_/etc/passwd", "etc/shadow", "a_b"]
    assert read(table) == [b"1", b"2", b"3"]


def test_a_damaged_header_is_no_end_of_a_tar(tmp_path, caplog):
    tar(tmp_path / "whole.tar", *((f"{i}.jpg", bytes([i]) * 3000) for i in range(5)))
    data = bytearray((tmp_path / "whole.tar").read_bytes())
    third = 2 * (512 + 3072)
    (tmp_path / "cut.tar").write_bytes(data[: third + 100])
    data[third + 3] ^= 1
    (tmp_path / "flipped.tar").write_bytes(data)
    for name in ("cut", "flipped"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ids(list_images(str(tmp_path / f"{name}.tar"))) == ["0", "1"]
        assert f"{name}.tar breaks off after 2 members" in caplog.text


def test_links_in_tars_are_what_they_lead_to(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, to in (
            ("set/a.jpg", tarfile.REGTYPE, ""),
            ("set/hard.jpg", tarfile.LNKTYPE, "set/a.jpg"),
            ("set/soft.jpg", tarfile.SYMTYPE, "../set/a.jpg"),
            ("set/nowhere.jpg", tarfile.SYMTYPE, "gone.jpg"),
            ("folder.jpg", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"here") if info.size else None)
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path / "a.tar"))
    assert ids(table) == ["set/a", "set/hard", "set/soft"]
    assert read(table) == [b"here"] * 3
    assert "1 images are left out" in caplog.text


def test_broken_tars(tmp_path, caplog):
    tar(tmp_path / "whole.tar", *((f"{i}.jpg", bytes([i]) * 3000) for i in range(5)))
    data = (tmp_path / "whole.tar").read_bytes()
    third = 2 * (512 + 3072) + 512  # where the third member's data starts
    (tmp_path / "cut.tar").write_bytes(data[: third + 1000])
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path / "cut.tar"))
    assert ids(table) == ["0", "1", "2"] and "cut.tar breaks off after 3 members" in caplog.text
    assert reasons(read(table)) == [None, None, "unreadable"]
    table = list_images(str(tmp_path / "whole.tar"))
    os.truncate(tmp_path / "whole.tar", third + 1000)  # cut after it was listed
    assert reasons(read(table)) == [None, None, "unreadable", "unreadable", "unreadable"]
    (tmp_path / "noise.tar").write_bytes(os.urandom(4096))
    (tmp_path / "packed.tar").write_bytes(gzip.compress(data))
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("noise", "packed", "empty"):
        with pytest.raises(UsageError, match=f"cannot read the tar .*{name}.tar"):
            list_images(str(tmp_path / f"{name}.tar"))


@pytest.mark.parametrize(
    "content", [b"{", b'{"boxes": [[1, 2]]}', b'{"boxes": [[1, 2, 3, 4]], "labels": []}', b'{"boxes": [3]}', b"\xff"]
)
def test_tar_sidecars_that_make_no_sense(tmp_path, caplog, content):
    tar(tmp_path / "a.tar", ("0.jpg", b"0"), ("0.json", content), ("1.jpg", b"1"), ("1.cls", b"5"))
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path / "a.tar"))
    assert table["labels"].to_pylist() == [[], [5]]
    assert "1 .json or .cls files make no sense" in caplog.text


# --- Parquet ---------------------------------------------------------------------------------------------------------------

PICTURES = [bytes([i]) * (50 + i) for i in range(20)]


def struct(pictures: list[bytes | None]) -> pa.Array:
    rows = [{"bytes": picture, "path": f"p{i}.jpg"} for i, picture in enumerate(pictures)]
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(PICTURES, pa.binary())},
        {"image": pa.array(PICTURES, pa.large_binary()), "mask": pa.array(PICTURES[::-1], pa.binary())},
        {"jpg": pa.array(PICTURES, pa.binary()), "__key__": [str(i) for i in range(20)]},
        {"picture": pa.array(PICTURES, pa.binary()), "height": [9] * 20, "width": [9] * 20},
        {"image": struct(PICTURES)},
        {"label": list(range(20)), "content": struct(PICTURES)},
    ],
)
def test_parquet_of_encoded_images(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=6)
    table = list_images(str(tmp_path / "a.parquet"))
    assert ids(table) == [f"a.parquet#{i}" for i in range(20)]
    assert names(table) == [f"a/{i:06d}" for i in range(20)]
    assert table["offset"].to_pylist() == list(range(20)) and set(table["length"].to_pylist()) == {1}
    assert read(table) == PICTURES
    order = np.random.default_rng(0).permutation(20)
    assert read(table.take(order)) == [PICTURES[i] for i in order]
    assert list_images(str(tmp_path / "a.parquet"), limit=7).equals(table.slice(0, 7))
    if "label" in columns:
        assert table["labels"].to_pylist() == [[i] for i in range(20)]


def test_parquet_of_raw_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3 + i, 4, 3), np.uint8) for i in range(5)]
    columns = {
        "image": [i.tobytes() for i in images],
        "height": [i.shape[0] for i in images],
        "width": [4] * 5,
        "image_id": [5, 4, 3, 2, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert ids(table) == ["5", "4", "3", "2", "1"]
    for data, image in zip(read(table), images, strict=True):
        np.testing.assert_array_equal(np.load(io.BytesIO(data)), image)


def test_parquet_of_thumbnails_as_long_as_their_pixels(tmp_path):
    jpeg = b"\xff\xd8\xff" + bytes(297)  # 300 bytes, as 10 x 10 raw pixels have
    columns = {"image": [jpeg, b"\xfe" + jpeg[1:]], "height": [10, 10], "width": [10, 10]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = read(list_images(str(tmp_path)))
    assert first == jpeg and second.startswith(b"\x93NUMPY")


def test_parquet_with_annotations_and_holes(tmp_path):
    columns = {
        "image": pa.array([b"a", None, b""], pa.binary()),
        "image_id": ["x", None, "x"],
        "boxes": pa.array([[[1, 2, 3, 4]], None, []], pa.list_(pa.list_(pa.float64()))),
        "labels": pa.array([[3], None, []], pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.pq")
    table = list_images(str(tmp_path))
    assert ids(table) == ["x", "a.pq#1", "x#2"]
    assert table["boxes"].to_pylist() == [[[1, 2, 3, 4]], [], []]
    assert table["labels"].to_pylist() == [[3], [], []]
    results = read(table)
    assert results[0] == b"a" and reasons(results) == [None, "empty", "empty"]


def test_parquet_directory_in_order(tmp_path):
    for part in range(3):
        pq.write_table(pa.table({"image": [b"%d-%d" % (part, i) for i in range(4)]}), tmp_path / f"part-{part}.parquet")
    table = list_images(str(tmp_path))
    assert read(table) == [b"%d-%d" % pair for pair in itertools.product(range(3), range(4))]
    assert list_images(f"{tmp_path}/part-*.parquet").equals(table)
    assert list_images(str(tmp_path), limit=6).equals(table.slice(0, 6))
    tar(tmp_path / "a.tar", ("0.jpg", b"0"))
    with pytest.raises(UsageError, match="1 tars and 3 Parquet files"):
        list_images(str(tmp_path))


def test_parquet_that_cannot_be_an_input(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "one": [b"1"], "two": [b"2"]}), tmp_path / "which.parquet")
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + os.urandom(200))
    with pytest.raises(UsageError, match=r"no column with images.*one \(binary\)"):
        list_images(str(tmp_path / "which.parquet"))
    with pytest.raises(UsageError, match="cannot read the Parquet file"):
        list_images(str(tmp_path / "noise.parquet"))


def test_parquet_annotations_fit_each_other(tmp_path):
    boxes = pa.array([[[1, 2, 3, 4], [5, 6, 7, 8]], []], pa.list_(pa.list_(pa.float32())))
    columns = {"image": [b"a", b"b"], "boxes": boxes, "labels": [[1, 2], [3]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert table["crowds"].to_pylist() == [[False, False], []]
    assert table["annotation_ids"].to_pylist() == [[0, 1], []]
    assert table["labels"].to_pylist() == [[1, 2], [3]]
    pq.write_table(pa.table(columns | {"labels": [[1], []]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="row 0 has 2 boxes, but 1 labels"):
        list_images(str(tmp_path))
    foreign = {
        "image": [b"a", b"b"],
        "boxes": ["no", "boxes"],
        "name": [[1], [2]],
        "labels": ["cat", "dog"],
        "image_id": [1.5, 2.5],
    }
    pq.write_table(pa.table(foreign), tmp_path / "a.parquet")
    table = list_images(str(tmp_path))
    assert table["boxes"].to_pylist() == table["labels"].to_pylist() == [[], []]


def test_parquet_without_rows(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no images"):
        list_images(str(tmp_path))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    assert ids(list_images(str(tmp_path))) == ["b.parquet#0"]


def test_parquet_damaged_after_listing(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": [os.urandom(5000) for _ in range(8)]}), path, row_group_size=4, use_dictionary=False, compression="gzip"
    )
    table = list_images(str(path))
    data = bytearray(path.read_bytes())
    data[2000:2600] = bytes(600)  # within the first row group
    path.write_bytes(data)
    assert reasons(read(table)) == ["unreadable"] * 4 + [None] * 4
    pq.write_table(pa.table({"image": [b"x"]}), path)
    assert reasons(read(table)) == [None] + ["unreadable"] * 7
    path.unlink()
    assert reasons(read(table)) == ["unreadable"] * 8
