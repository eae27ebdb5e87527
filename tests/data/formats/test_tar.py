import gzip
import io
import itertools
import json
import logging
import os
import tarfile

import pytest

from raypipe import UsageError
from raypipe.data.listing import list_images
from tests.data.conftest import ids, names, read, reasons, tar
from tests.objects import objects


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
    "content", [b"{", b'{"boxes": [[1, 2]]}', b'{"boxes": [[1, 2, 3, 4]], "labels": []}', b'{"boxes": [3]}', b"\xff"]
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
