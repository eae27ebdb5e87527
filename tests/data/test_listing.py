import glob
import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import UsageError
from raypipe.data import listing
from raypipe.data.formats import files
from raypipe.data.listing import list_images, look
from raypipe.data.location import Location
from raypipe.data.tables import SOURCE
from tests.data.conftest import ids, names, put, read, reasons, tar


def test_directory_lists_images_by_path_components(tmp_path):
    contents = put(
        tmp_path,
        "b.jpg",
        "a/z.PNG",
        "a/b.JpEg",
        "a-1/c.webp",
        "a/sub/deep/x.bmp",
        "t.tif",
        "u.tiff",
        "v.npy",
    )
    put(
        tmp_path,
        "notes.txt",
        ".hidden.jpg",
        ".git/x.jpg",
        "_raypipe/tmp/y.jpg",
        "a/_raypipe/z.jpg",
        "noextension",
        "jpg",
    )
    table = list_images(str(tmp_path))
    assert table.schema == SOURCE
    assert ids(table) == [
        "a/b.JpEg",
        "a/sub/deep/x.bmp",
        "a/z.PNG",
        "a-1/c.webp",
        "b.jpg",
        "t.tif",
        "u.tiff",
        "v.npy",
    ]
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
    assert ids(table)[-2:] == ["c.jpg", "d.jpg"] and reasons(read(table))[-2:] == [
        "unreadable",
        "unreadable",
    ]


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
    strange = [
        "new\nline.jpg",
        "100%.jpg",
        "a?b#c.jpg",
        "ü/ß.jpg",
        "[x].jpg",
        "{0..1}.jpg",
        "s p a c e.jpg",
        "a:b.jpg",
        '"q".jpg',
    ]
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
    assert ids(list_images(f"{tmp_path}/**")) == [
        "a/1.jpg",
        "a/2.png",
        "b/1.jpg",
        "b/deep/1.jpg",
        "c.jpg",
    ]
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
    walk = files._entries
    monkeypatch.setattr(
        files,
        "_entries",
        lambda folder, skipped: [][1] if folder.endswith("/closed") else walk(folder, skipped),
    )
    put(tmp_path, "closed/z.jpg", "open-1/deep/x.jpg", "open-2/.thumbs/t.jpg")
    assert ids(list_images(f"{tmp_path}/open-*/**/*.jpg")) == ["open-1/deep/x.jpg"]
    assert ids(list_images(f"{tmp_path}/*/.thumbs/**/*.jpg")) == ["open-2/.thumbs/t.jpg"]


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jpg",
        "**/*.jpg",
        "a/**/x.jpg",
        "**",
        "a/*/*.jpg",
        "[ab]/?.jpg",
        "[!a]/*.jpg",
        "**/b/*",
        "a**/x.jpg",
    ],
)
def test_remote_globs_match_what_local_ones_do(tmp_path, pattern):
    paths = [
        "x.jpg",
        "a/x.jpg",
        "a/b/x.jpg",
        "a/b/c/x.jpg",
        "b/y.jpg",
        "c/z.jpg",
        "ab/x.jpg",
        "a/b/c.d/x.jpg",
    ]
    put(tmp_path, *paths)
    fixed = os.path.dirname(
        f"{tmp_path}/{pattern[: min(i for i in map(pattern.find, '*[?') if i >= 0)]}x"
    )
    found = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
    expected = {os.path.relpath(path, fixed) for path in found if path.endswith(".jpg")}
    assert set(ids(list_images(f"{tmp_path}/{pattern}"))) == expected
    base = pattern[: min(i for i in map(pattern.find, "*[?") if i >= 0)].rpartition("/")[0]
    regex = files._glob_regex(pattern.replace("?", "[!/]"))
    assert {
        os.path.relpath(file, base or ".") for file in paths if regex.fullmatch(file)
    } == expected


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
    assert listing._number_repeats(["a", "b", "a", "a", "a#2", "b"]) == [
        "a",
        "b",
        "a#2",
        "a#3",
        "a#2#2",
        "b#2",
    ]


# --- what is left out ------------------------------------------------------------------------


def test_what_is_left_out_is_counted_by_suffix_and_said_in_one_line(tmp_path, caplog):
    put(
        tmp_path,
        "a.jpg",
        "b.JFIF",
        "c.jpe",
        "d.gif",
        "e.avif",
        "f.HEIC",
        "g.heif",
        "h.pjpeg",
        "i.dib",
        "j.apng",
    )
    put(
        tmp_path,
        "x.cr2",
        "x/y.CR2",
        "notes.txt",
        "x/README",
        "z.tar.gz",
        "s/z.tgz",
        "t.tar",
        "p.parquet",
        ".hidden",
        "_raypipe/x",
    )
    found = look(str(tmp_path))
    assert [i[0] for i in ids(found.rows)] == list("abcdefghij")
    assert found.skipped == {
        ".cr2": 2,
        ".txt": 1,
        "(no suffix)": 1,
        ".tar.gz": 1,
        ".tgz": 1,
        ".tar": 1,
        ".parquet": 1,
        "(hidden)": 1,
    }
    assert len(caplog.records) == 1
    for part in (
        "9 files are left out",
        "2 .cr2",
        "1 .tar.gz",
        "unpack compressed tars first, with gunzip -k FILE",
    ):
        assert part in caplog.text


def test_what_is_left_out_of_tars_is_counted_too(tmp_path, caplog):
    tar(
        tmp_path / "0.tar",
        ("0.jpg", b"0"),
        ("0.txt", b"caption"),
        ("1.gif", b"1"),
        ("2.jfif", b"2"),
        ("3.nef", b"3"),
        (".x", b""),
    )
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    found = look(str(tmp_path))
    assert ids(found.rows) == ["0", "1", "2"]
    assert found.skipped == {".tar.gz": 1, ".txt": 1, ".nef": 1, "(hidden)": 1}
    assert "gunzip -k" in caplog.text


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a.tar.gz", "gunzip -k"),
        ("a.TGZ", "gunzip -k"),
        ("a.tar.zst", "unzstd"),
        ("a.tar.xz", "unxz -k"),
    ],
)
def test_only_compressed_tars_are_refused_with_the_command_that_unpacks_them(
    tmp_path, name, command
):
    put(tmp_path, name)
    for input, file in ((tmp_path, "FILE"), (tmp_path / name, name)):
        with pytest.raises(UsageError, match=f"{command} {file}"):
            look(str(input))


def test_many_suffixes_are_told_together(tmp_path):
    put(tmp_path, "a.jpg", *(f"x.s{i:02d}" for i in range(30)), *(f"{i}.txt" for i in range(3)))
    found = look(str(tmp_path))
    assert (
        found.skipped[".txt"] == 3
        and found.skipped["(others)"] == 11
        and found.skipped.total() == 33
    )


def test_control_characters_in_names_of_files_and_folders_do_not_reach_the_terminal(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a command: straight to stderr
    folder = tmp_path / "\x1b[2J\x1b]0;title\x07"
    folder.mkdir()
    members = (("a.jpg", b"a"), ("other.json", b"{}"), ("a.cls", b"cat\x1b[31m"))
    tar(folder / "a\x1b[1m.tar", *members)
    data = (folder / "a\x1b[1m.tar").read_bytes()
    (folder / "a\x1b[1m.tar").write_bytes(data[:3072] + b"\x1b" * 512)
    list_images(str(folder))
    (folder / "a\x1b[1m.tar").unlink()
    columns = {"image": [b"a", b"b"], "label": ["1", "\x1b[31mcat"], "boxes": ["x", "y"]}
    pq.write_table(pa.table(columns), folder / "b\x1b[1m.parquet")
    (folder / "x.a\x1b").touch()
    list_images(str(folder))
    (folder / "c.json").write_text(
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}'
    )
    list_images(str(folder), annotations=str(folder / "c.json"))
    said = capfd.readouterr().err
    assert said.count("\\x1b[2J") >= 6, said
    assert said.replace("\n", "").isprintable()


def test_hidden_files_and_circular_links_are_counted(tmp_path, bucket):
    files_ = ["a.jpg", ".b.jpg", "sub/.hidden/c.jpg", "sub/.hidden/d.jpg", "sub/e.jpg"]
    put(tmp_path / "in", *files_, "_raypipe/x.jpg", "sub/_raypipe/y.jpg")
    (tmp_path / "in/sub/up").symlink_to(tmp_path / "in")
    found = look(str(tmp_path / "in"))
    assert ids(found.rows) == ["a.jpg", "sub/e.jpg"]
    assert found.skipped == {"(hidden)": 2, "(link in a circle)": 1}
    assert not look(f"{tmp_path}/in/*.jpg").skipped
    assert not look(f"{tmp_path}/in/**/*.jpg").skipped
    place = Location.of(bucket("in"))
    for name in (*files_, "_raypipe/x.jpg"):
        place.write(name, b"x")
    assert look(bucket("in")).skipped == {"(hidden)": 2}
    assert not look(bucket("in/**/*.jpg")).skipped
    tar(tmp_path / "a.tar", ("a.jpg", b"a"), ("._a.jpg", b"b"), ("sub/.x", b"c"))
    assert look(str(tmp_path / "a.tar")).skipped == {"(hidden)": 2}
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}]}
    (tmp_path / "in/coco.json").write_text(json.dumps(coco))
    found = look(str(tmp_path / "in"), annotations=str(tmp_path / "in/coco.json"))
    assert found.skipped == {".jpg": 1, "(hidden)": 2, "(link in a circle)": 1}
