import compileall
import io
import os
import re
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray

from raypipe.data import demo, patience
from raypipe.data.location import Location
from raypipe.run.cluster.forkserver import ForkServer
from raypipe.run.cluster.starting import Start
from tests.support.clusters import environment
from tests.support.s3 import query, server

HERE = Path(__file__).parent
ROOT = HERE.parent

# Each test process lists its own runs only. Set this before test modules copy the environment.
CACHE = tempfile.TemporaryDirectory(prefix="raypipe-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # its actor takes 1 s of CPU in each Ray
# Where several tests share the cores, torch's threads spin while they wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# xdist's processes inherit the variable: demo images are rendered once for all of them.
if "RAYPIPE_TESTS_DEMO" in os.environ:
    _own = Path(demo.cache_dir())
    _own.rmdir()
    _own.symlink_to(os.environ["RAYPIPE_TESTS_DEMO"])
else:
    os.environ["RAYPIPE_TESTS_DEMO"] = demo.cache_dir()
    # With PYTHONDONTWRITEBYTECODE each of a thousand processes would compile all modules: 0.2 s.
    compileall.compile_dir(ROOT / "raypipe", quiet=2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on Ray as slow, run slow tests first, and keep xdist's groups together.

    A long test that comes last would leave the other process without work.
    """
    for item in items:
        on_ray = "session" in getattr(item, "fixturenames", ())
        if on_ray and item.get_closest_marker("smoke") is None:
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if getattr(config.option, "loadgroup", False):
        for item in items:
            _keep_group(item)


def _keep_group(item: pytest.Item) -> None:
    """Append the group to the node id. xdist 3.8 does so too, but pytest 9.2 ignores it.

    Without groups each process trains the model of `trained`, and measures the sweep of `swept`.
    """
    group = item.get_closest_marker("xdist_group")
    if group is not None and hasattr(item, "_id"):
        item._id = item.id.parse(f"{item.nodeid}@{group.args[0]}")


@pytest.fixture(scope="session")
def session():
    """One local Ray with 8 logical CPUs and 64 GB, for all tests that need none of their own.

    Without Ray's log monitor, autoscaler and idle workers: these took a tenth of the suite's CPU.
    Its workers are forked with torch, which takes each of them 5 s of CPU otherwise. An OpenCV
    actor of a user has no torch (tests/test_imports.py).
    """
    steps = (f"raypipe.stages.{name}" for name in ("preprocess", "write", "predict"))
    backends = ("raypipe.images.opencv", "raypipe.images.torchvision")
    start = Start(ForkServer((*steps, *backends)))
    # There is no dashboard. With no address, Ray Train would look for one for 12 s at each end.
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"
    with start.quick(workers=0, agents=True):
        ray.init(
            address="local",
            num_cpus=8,
            _memory=64 * 10**9,
            _system_config={"num_workers_soft_limit": 2},  # an idle one takes 1% of a CPU
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    del os.environ["RAY_API_SERVER_ADDRESS"]
    yield
    ray.shutdown()
    start.close()


@pytest.fixture
def joined(session) -> dict[str, str]:
    """The environment of a command that joins the tests' Ray: it saves 5 to 8 s of CPU.

    Only tests about starting, ending or watching a Ray have commands start their own.
    """
    address = ray.get_runtime_context().gcs_address
    return environment(RAY_ADDRESS=address, RAY_AUTH_MODE="token")  # its token is in ~/.ray


def photo(index: int, height: int = 120, width: int = 160) -> np.ndarray:
    """A smooth random picture, (height, width, 3) RGB uint8. It compresses as photos do."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(index: int, **size: int) -> bytes:
    """That picture as a JPEG file."""
    return cv2.imencode(".jpg", cv2.cvtColor(photo(index, **size), cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 60 JPEGs in two sub-folders, all sizes different, one name in both folders."""
    return make_photos(tmp_path / "photos")


def make_photos(folder: Path) -> Path:
    """What `photos` is, in `folder`."""
    for index in range(60):
        sub = folder / ("a" if index % 2 else "b")
        sub.mkdir(parents=True, exist_ok=True)
        (sub / f"{index // 2:03d}.jpg").write_bytes(
            jpeg(index, height=100 + index, width=150 + index % 7)
        )
    return folder


@pytest.fixture(scope="session")
def s3():
    """Where a real S3 server on this machine listens."""
    with server() as address:
        yield address


@pytest.fixture
def bucket(s3, request, monkeypatch):
    """A bucket of the test's own: the URI of a key in it."""
    # A server on this machine that fails once fails always: do not ask it for 60 s.
    monkeypatch.setattr(patience.Patience.__init__, "__defaults__", (1.0,))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    name = "b" + re.sub("[^a-z0-9]", "-", request.node.name.lower())[:50].strip("-")
    system, path = Location.of(f"s3://{name}?{query(s3)}").filesystem()
    system.create_dir(path)
    return lambda key: f"s3://{name}/{key}?{query(s3)}"


def files(root: Path) -> dict[str, bytes]:
    """Every result file below `root` by its relative path; not raypipe's own state."""
    found = sorted(
        p for p in root.rglob("*") if p.is_file() and "_raypipe" not in p.relative_to(root).parts
    )
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its relative path, raypipe's own state among them."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def buffer() -> io.StringIO:
    """Where a console writes in a test."""
    return io.StringIO()
