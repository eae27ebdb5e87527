import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import tarfile
import tracemalloc

import pyarrow as pa
import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images, look
from raypipe.data.location import Location
from raypipe.data.reader import Reader
from raypipe.data.sinks import Sink
from raypipe.data.tables import BLOCK
from raypipe.images.header import Reject
from tests.data.conftest import IMAGES, block, ids, names, read, reasons, tar, write_block
from tests.support.objects import objects


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_members_and_sidecars(tmp_path, format):
    long = "folder/" + "x" * (60 if format == tarfile.USTAR_FORMAT else 180)
    sidecar = {
        "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "labels": [4, 5],
        "crowds": [False, True],
        "image_id": "mine",
    }
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
    tar(
        tmp_path / "a.tar",
        ("../../etc/passwd.jpg", b"1"),
        ("/etc/shadow.jpg", b"2"),
        ("a\nb.jpg", b"3"),
    )
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
    assert "1 files are left out: 1 (link to nothing" in caplog.text


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
    "content",
    [
        b"{",
        b'{"boxes": [[1, 2]]}',
        b'{"boxes": [[1, 2, 3, 4]], "labels": []}',
        b'{"boxes": [3]}',
        b"\xff",
    ],
)
def test_tar_sidecars_that_make_no_sense(tmp_path, caplog, content):
    tar(tmp_path / "a.tar", ("0.jpg", b"0"), ("0.json", content), ("1.jpg", b"1"), ("1.cls", b"5"))
    with caplog.at_level(logging.WARNING):
        table = list_images(str(tmp_path / "a.tar"))
    assert table["labels"].to_pylist() == [[], [5]]
    assert "1 .json or .cls files make no sense" in caplog.text


@pytest.mark.parametrize("failure", [503, "reset", "short"])
def test_a_store_that_fails_while_a_tar_is_listed_is_asked_again(tmp_path, failure):
    tar(tmp_path / "a.tar", *((f"{i:03d}.jpg", os.urandom(200_000)) for i in range(100)))
    with objects(**{"a.tar": (tmp_path / "a.tar").read_bytes()}) as store:
        gets = itertools.count()
        store.fails = lambda key, n: failure if n > 1 and next(gets) in (1, 3) else None
        table = list_images(store.uri("a.tar"))
    assert table.num_rows == 100
    assert next(gets) > 4


# --- which sidecar belongs to which image ----------------------------------------------------


def boxed(k: int, **more: object) -> bytes:
    return json.dumps({"boxes": [[10 * k, 5, 10 * k + 20, 50]], "labels": [k + 1], **more}).encode()


def known(table: pa.Table) -> dict[str, list[int]]:
    """The labels of each image; where there are boxes, these fit them."""
    for boxes, labels in zip(table["boxes"].to_pylist(), table["labels"].to_pylist(), strict=True):
        assert not boxes or [box[0] for box in boxes] == [10 * (label - 1) for label in labels]
    return dict(zip(ids(table), table["labels"].to_pylist(), strict=True))


def test_a_sidecar_belongs_to_the_image_with_its_full_stem(tmp_path, caplog):
    names = (
        "cam1_12.0",
        "cam1_12.1",
        "2024-05-01T10.30.15.123",
        "2024-05-01T10.30.15.124",
        "v1.2/model_v1.0.3",
    )
    for order in ("beside", "before", "after", "images first", "sidecars first"):
        images = [(f"{name}.jpg", name.encode()) for name in names]
        sidecars = [(f"{name}.json", boxed(k)) for k, name in enumerate(names)]
        members = {
            "beside": [m for pair in zip(images, sidecars, strict=True) for m in pair],
            "before": [m for pair in zip(sidecars, images, strict=True) for m in pair],
            "after": [
                images[0],
                *(m for pair in zip(sidecars, images[1:], strict=False) for m in pair),
                sidecars[-1],
            ],
            "images first": images + sidecars[::-1],
            "sidecars first": sidecars[::-1] + images,
        }[order]
        tar(tmp_path / "a.tar", *members)
        caplog.clear()
        table = list_images(str(tmp_path))
        assert known(table) == {name: [k + 1] for k, name in enumerate(names)}, order
        assert not caplog.records, order
        assert list_images(str(tmp_path), limit=2).equals(table.slice(0, 2)), order


def test_webdatasets_key_and_the_whole_name_count_where_no_stem_fits(tmp_path, caplog):
    tar(
        tmp_path / "a.tar",
        ("000.left.jpg", b"l"),
        ("000.right.png", b"r"),
        ("000.json", boxed(1)),
        ("1.jpg", b"1"),
        ("1.jpg.json", boxed(2)),
        ("1.json", boxed(3)),  # 1.jpg has one that is closer
        ("2.jpg", b"2"),
        ("2.png", b"2"),
        ("2.json", boxed(4)),
        ("2.cls", b"9"),
    )
    assert known(list_images(str(tmp_path))) == {
        "000.left": [2],
        "000.right": [2],
        "1": [3],
        "2": [5],
        "2#2": [5],
    }
    assert (
        "1 .json or .cls files belong to no image in it, or to one that has another" in caplog.text
    )


def test_a_sidecar_whose_image_never_comes_is_given_to_no_other_and_named(tmp_path, caplog):
    tar(
        tmp_path / "a.tar",
        ("cam.0.jpg", b"0"),
        ("cam.1.json", boxed(1)),
        ("cam.2.cls", b"7"),
        ("cam.3.jpg", b"3"),
        ("cam.3.json", boxed(3)),
    )
    found = look(str(tmp_path))
    assert known(found.rows) == {"cam.0": [], "cam.3": [4]}
    assert (
        "2 .json or .cls files belong to no image in it" in caplog.text
        and "cam.1.json" in caplog.text
    )
    assert found.skipped == {".json": 1, ".cls": 1}


def test_samples_of_one_name_each_have_their_own_sidecar(tmp_path):
    one = [("0.jpg", b"a"), ("0.json", boxed(1)), ("1.jpg", b"b"), ("1.json", boxed(2))]
    two = [("0.json", boxed(3)), ("0.jpg", b"c"), ("1.json", boxed(4)), ("1.jpg", b"d")]
    tar(tmp_path / "a.tar", *one, *two)
    table = list_images(str(tmp_path))
    assert known(table) == {"0": [2], "1": [3], "0#2": [4], "1#2": [5]}
    tar(tmp_path / "a.tar", *one[::2], *one[::2], *one[1::2], *two[::2])
    assert known(list_images(str(tmp_path))) == {"0": [2], "1": [3], "0#2": [4], "1#2": [5]}


def test_an_id_that_a_sidecar_gives_to_several_images_is_none_of_theirs(tmp_path):
    tar(
        tmp_path / "a.tar",
        ("0.a.jpg", b"0"),
        ("0.b.jpg", b"1"),
        ("0.json", boxed(1, image_id="mine")),
    )
    assert known(list_images(str(tmp_path))) == {"0.a": [2], "0.b": [2]}


@pytest.mark.parametrize("padding", [0, 1024, 10240, 3 << 20])
def test_what_is_behind_an_end_mark_is_read(tmp_path, caplog, padding):
    for name in "ab":
        tar(tmp_path / f"{name}.part", *((f"{name}{k}.jpg", b"%d" % k) for k in range(3)))
    one, two = ((tmp_path / f"{name}.part").read_bytes() for name in "ab")
    (tmp_path / "c.tar").write_bytes(one + bytes(padding) + two + bytes(padding))
    table = list_images(str(tmp_path / "c.tar"))
    assert ids(table) == ["a0", "a1", "a2", "b0", "b1", "b2"] and not caplog.records
    assert read(table) == [b"0", b"1", b"2"] * 2
    (tmp_path / "c.tar").write_bytes(one + b"appended " * 100)
    found = look(str(tmp_path / "c.tar"))
    assert ids(found.rows) == ["a0", "a1", "a2"]
    assert (
        "c.tar breaks off after 3 members" in caplog.text
        and found.skipped["(tar that breaks off)"] == 1
    )


def header(name: str, size: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    data = bytearray(info.tobuf())
    data[124:136] = size
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfe\x00",
        b"\x80" + b"\xff" * 11,
        b"\x80\x00\x00\x00\x7f" + b"\xff" * 7,
    ],
)
def test_a_member_of_absurd_size_ends_nothing_and_hangs_nothing(tmp_path, caplog, size):
    tar(tmp_path / "good.part", ("0.jpg", b"0"), ("1.jpg", b"1"))
    good = (tmp_path / "good.part").read_bytes()[: 4 * 512]
    (tmp_path / "a.tar").write_bytes(good + header("2.jpg", size) + good)
    table = list_images(str(tmp_path))
    assert ids(table)[:2] == ["0", "1"] and "breaks off after" in caplog.text
    assert read(table)[:2] == [b"0", b"1"] and set(reasons(read(table))[2:]) <= {"unreadable"}


def test_a_long_name_of_absurd_length_is_not_read(tmp_path):
    tar(tmp_path / "good.part", ("0.jpg", b"0"))
    long = bytearray(header("././@LongLink", b"%011o\0" % (2**33 - 1)))
    long[156:157] = b"L"
    long[148:156] = b"        "
    long[148:156] = b"%06o\0 " % sum(long[:512])
    (tmp_path / "a.tar").write_bytes(
        (tmp_path / "good.part").read_bytes()[:1024] + bytes(long) + bytes(512)
    )
    assert ids(list_images(str(tmp_path))) == ["0"]


def test_sidecars_have_the_numbers_of_coco_jsons(tmp_path, caplog):
    whole = {
        "boxes": [["1", 2.0, "3.5", 4]],
        "labels": ["5.0"],
        "crowds": ["0"],
        "annotation_ids": [7.0],
        "height": 10.0,
        "width": "20",
    }
    huge, half = (
        {"boxes": [[1, 2, 3, 4]], "labels": [2**70]},
        {"boxes": [[1, 2, 3, 4]], "labels": [1.5]},
    )
    members = [("0", whole), ("1", huge), ("2", half)]
    tar(
        tmp_path / "a.tar",
        *(
            m
            for name, of in members
            for m in ((f"{name}.jpg", b"x"), (f"{name}.json", json.dumps(of).encode()))
        ),
        ("3.jpg", b"3"),
        ("3.cls", b"%d" % 2**70),
        ("4.jpg", b"4"),
        ("4.cls", b"6.0\n"),
    )
    table = list_images(str(tmp_path))
    assert table["labels"].to_pylist() == [[5], [], [], [], [6]]
    assert (
        table["crowds"][0].as_py(),
        table["annotation_ids"][0].as_py(),
        table["frame"][0].as_py(),
    ) == ([False], [7], [10, 20])
    assert table["boxes"][0].as_py() == [[1, 2, 3.5, 4]]
    assert "3 .json or .cls files make no sense" in caplog.text


# --- writing, and reading what was written ---------------------------------------------------


def test_webdataset_layout(tmp_path):
    content = block(IMAGES[:3], names=["a/x.1", "100%", "c"])
    rows = content.to_pylist()
    rows[2] |= {"boxes": [], "labels": [9], "crowds": [], "annotation_ids": []}
    written = write_block(
        Sink(format="webdataset", root=Location.of(str(tmp_path))),
        pa.Table.from_pylist(rows, schema=BLOCK),
    )
    assert written.files == ["shard-000012.tar"]
    with tarfile.open(tmp_path / "shard-000012.tar") as archive:
        members = archive.getmembers()
        assert [one.name for one in members] == [
            "a/x%2E1.jpg",
            "a/x%2E1.json",
            "100%25.jpg",
            "100%25.json",
            "c.jpg",
            "c.json",
            "c.cls",
        ]
        assert {
            (one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in members
        } == {(0, 0, 0, "", "", 0o644)}
        sidecar = json.load(archive.extractfile("100%25.json"))  # type: ignore[arg-type]
        assert archive.extractfile("c.cls").read() == b"9"  # type: ignore[union-attr]
    assert sidecar == {
        "image_id": "id-1",
        "height": 41,
        "width": 59,
        "boxes": [[1.5, 2.0, 3.0, 5.0]],
        "labels": [5],
        "crowds": [False],
        "annotation_ids": [10],
    }
    table = list_images(str(tmp_path))
    assert table["name"].to_pylist() == ["a/x.1", "100%", "c"]
    assert table["labels"].to_pylist()[2] == [9]


def test_s3_failures_while_reading_are_rejects(bucket):
    write_block(Sink(format="webdataset", root=Location.of(bucket("out"))), block(IMAGES))
    table = list_images(bucket("out"))
    root = Location.of(bucket("out"))
    root.write("shard-000012.tar", (root / "shard-000012.tar").read()[:6000])
    with contextlib.closing(Reader(patience_s=5.0)) as reader:
        results = list(reader.read(table))
        assert (
            isinstance(results[0], bytes)
            and isinstance(results[-1], Reject)
            and results[-1].reason == "unreadable"
        )
    Location.of(table["uri"][0].as_py()).delete()
    with contextlib.closing(Reader(patience_s=1.0)) as reader:
        assert {one.reason for one in reader.read(table) if isinstance(one, Reject)} == {"unread"}


def test_what_sidecars_hold_besides_annotations_is_not_kept(tmp_path):
    def sidecar(i: int) -> bytes:
        of = {"caption": "x" * (1 << 20), "boxes": [[i, 0, i + 2, 1.5]], "labels": ["7.0"]}
        return json.dumps(of | {"image_id": i, "height": 9, "width": 90}).encode()

    members = [((f"{i}.jpg", b"x"), (f"{i}.json", sidecar(i))) for i in range(40)]
    tar(tmp_path / "a.tar", *itertools.chain(*members), ("z.jpg", b"x"), ("z.json", b"[" * 9999))
    tracemalloc.start()
    table = list_images(str(tmp_path / "a.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table["boxes"].to_pylist() == [[[i, 0, i + 2, 1.5]] for i in range(40)] + [[]]
    assert table["labels"].to_pylist() == [[7]] * 40 + [[]]
    assert table["frame"].to_pylist() == [[9, 90]] * 40 + [[0, 0]]
    assert ids(table) == [*map(str, range(40)), "z"]
    assert peak < 12 << 20  # 40 MiB of text
