import io
import pickle
import subprocess
import sys
import threading
import time

import pytest
from pyarrow import fs

from raypipe.data import journal
from raypipe.data.formats.coco import read_coco
from raypipe.data.location import Location
from raypipe.data.patience import Patience
from raypipe.data.stores import StoreError
from tests.data.conftest import files
from tests.support.objects import objects


def test_readers_never_see_half_a_file(tmp_path):
    versions = [bytes([i]) * (1 << 20) for i in range(2)]
    Location.of(str(tmp_path)).write("x/y.bin", versions[0])
    stop = threading.Event()

    failures = []

    def rewrite(version: bytes) -> None:
        try:
            while not stop.is_set():
                Location.of(str(tmp_path)).write("x/y.bin", version)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=rewrite, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    try:
        assert all((tmp_path / "x/y.bin").read_bytes() in versions for _ in range(200))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert files(tmp_path).keys() == {"x/y.bin"}


def test_folders_that_vanish_come_back(tmp_path):
    root = Location.of(str(tmp_path / "out"))
    root.write("a/b/c.bin", b"1")
    root.delete_folder()
    root.write("a/b/c.bin", b"2")
    assert (root / "a/b/c.bin").read() == b"2"
    assert (root / "a/b").names() == ["c.bin"] and (root / "nowhere").names() == []


def test_s3_deletes(bucket):
    root = Location.of(bucket("out"))
    for file in ("a/1", "a/2", "b/3"):
        root.write(file, b"x")
    (root / "a/1").delete()
    (root / "a/1").delete()
    assert (root / "a").names() == ["2"]
    (root / "a").delete_folder()
    (root / "nowhere").delete_folder()
    assert (root / "a").names() == [] and (root / "b").names() == ["3"]
    with pytest.raises(FileNotFoundError):
        (root / "a/2").read()


# --- what a location is ----------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return Location.of(str(tmp_path / "out"))
    return Location.of(request.getfixturevalue("bucket")("out put/ü"))


def test_a_location_means_the_same_in_another_process(root):
    root.write("a/x.bin", b"abc")
    script = (
        "import pickle, sys\nplace = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write((place / 'a/x.bin').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(root), capture_output=True, check=True
    )
    assert done.stdout == b"abc"
    again = pickle.loads(pickle.dumps(root))
    assert again == root and hash(again) == hash(root) and str(again) == str(root)


def test_files_of_a_folder(root):
    assert not (root / "a/x.bin").exists() and root.names() == root.folders() == []
    for file in ("a/x.bin", "a/b/y.bin", "z #1?.bin"):
        root.write(file, file.encode())
        assert (root / file).exists() and (root / file).read() == file.encode()
        assert Location.of((root / file).uri) == root / file
        assert root.uris([file]) == [(root / file).uri]
    assert root.names() == ["z #1?.bin"] and "a" in root.folders()
    assert (root / "a").folders() == ["b"]
    assert (root / "a/b").within(root) and root.within(root) and not root.within(root / "a")
    assert root.contains("a/b/y.bin") and root / "" == root
    if root.is_remote:
        assert set(root.below()) == {"a/x.bin", "a/b/y.bin", "z #1?.bin"}
        assert (root / "a/x.bin").read_range(2, 4) == (b"x.", -1)


def test_creating_and_replacing_happens_once(root):
    assert root.create("lease", b"1") and not root.create("lease", b"2")
    assert not root.replace_same("lease", b"2", b"3") and (root / "lease").read() == b"1"
    assert root.replace_same("lease", b"1", b"3") and (root / "lease").read() == b"3"
    assert not root.replace_same("nowhere", b"", b"3") and not (root / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "name", "suffix", "child"),
    [
        ("s3://b/a%20b/c.JPG?region=x", "c.JPG", ".JPG", "s3://b/a%20b/c.JPG/d%20e?region=x"),
        ("s3://b?region=x", "", "", "s3://b/d%20e?region=x"),
        ("hdfs:///", "", "", "hdfs:///d%20e"),
        ("/a b/c.tar.gz", "c.tar.gz", ".gz", "/a b/c.tar.gz/d e"),
        ("file:///a%20b/c", "c", "", "/a b/c/d e"),
    ],
)
def test_names_of_a_location(text, name, suffix, child):
    place = Location.of(text)
    assert str(place) == text and (place.name, place.suffix) == (name, suffix)
    assert str(place / "d e") == child and Location.of(child) == place / "d e"


def test_equal_locations_may_be_written_differently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    same = {
        Location.of(text) for text in ("x/y", f"{tmp_path}/x/y", "~/x/y", f"file://{tmp_path}/x/y")
    }
    assert len(same) == 1 and {str(Location.of("x/y")), Location.of("x/y").uri} == {
        "x/y",
        f"{tmp_path}/x/y",
    }
    assert Location.of("s3://b/a b") == Location.of("s3://b/a%20b/") != Location.of("gs://b/a b")


# --- a store that fails for a while ----------------------------------------------------------


def test_reading_asks_again_while_the_store_fails(monkeypatch):
    monkeypatch.setattr(Patience.__init__, "__defaults__", (2.0,))
    entry = journal.Entry(epoch=0, shard=3, written=[], rejected=[], files=[], bytes=0)
    content = journal._json({name: getattr(entry, name) for name in entry.__slots__})
    key = journal.entry_path(Location.of("out"), 3)
    with objects(**{key: content, "coco.json": b'{"images": [{"id": 1}]}'}) as store:
        store.fails = lambda key, n: 503 if n == 0 else None
        assert list(journal.read_entries(Location.of(store.uri("")), [3])) == [entry]
        store.asked.clear()
        assert read_coco(Location.of(store.uri("coco.json")))["images"] == [{"id": 1}]
        store.asked.clear()
        with pytest.raises(StoreError):
            Location.of(store.uri(key)).read(once=True)
        store.fails = lambda key, n: 404
        store.asked.clear()
        with pytest.raises(FileNotFoundError):
            Location.of(store.uri(key)).read()
        assert len(store.asked) == 1


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation", True),
        ("AWS Error SLOW_DOWN during ListObjectsV2 operation", True),
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7", True),
        ("AWS Error UNKNOWN (HTTP status 429) during HeadObject operation", True),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation", False),
        ("AWS Error UNKNOWN (HTTP status 501) during PutObject operation", False),
        ("AWS Error ACCESS_DENIED during HeadObject operation", False),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation", False),
    ],
)
def test_what_pyarrow_asks_a_store_is_asked_again_if_that_may_help(monkeypatch, said, passes):
    class Failing:
        """A file system of which every other call fails."""

        type_name = "s3"
        calls = 0

        def get_file_info(self, what):
            self._fail()
            return [] if isinstance(what, fs.FileSelector) else fs.FileInfo("", fs.FileType.File)

        def open_output_stream(self, path):
            self._fail()
            return io.BytesIO()

        def delete_file(self, path):
            self._fail()

        def _fail(self):
            self.calls += 1
            if self.calls % 2:
                raise OSError(said)

    system = Failing()
    monkeypatch.setattr(Location, "filesystem", lambda self: (system, "b/key"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    place = Location.of("s3://b/key")
    for do in (
        place.exists,
        place.names,
        place.delete,
        lambda: list(place.below()),
        lambda: place.infos("b"),
        *([lambda: Location.of("abfs://b/key").write("x", b"1")] if passes else []),
    ):
        system.calls = 0
        if passes:
            do()
            assert system.calls == 2
        else:
            with pytest.raises(OSError, match="AWS Error"):
                do()
            assert system.calls == 1
