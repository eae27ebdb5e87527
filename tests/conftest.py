import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def session():
    """One local Ray for all tests that need none of their own: 8 logical CPUs, whatever the machine has."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def photo(index: int, height: int = 120, width: int = 160) -> np.ndarray:
    """A smooth random picture, (height, width, 3) RGB uint8: compresses and resizes as photos do, unlike noise."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(index: int, **size: int) -> bytes:
    """That picture as a JPEG file."""
    return cv2.imencode(".jpg", cv2.cvtColor(photo(index, **size), cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 60 JPEGs in two sub-folders, all sizes different, one name in both folders."""
    folder = tmp_path / "photos"
    for index in range(60):
        sub = folder / ("a" if index % 2 else "b")
        sub.mkdir(parents=True, exist_ok=True)
        (sub / f"{index // 2:03d}.jpg").write_bytes(jpeg(index, height=100 + index, width=150 + index % 7))
    return folder


def files(root: Path) -> dict[str, bytes]:
    """Every result file below `root` by its relative path; not raypipe's own state."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and "_raypipe" not in p.relative_to(root).parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


def buffer() -> io.StringIO:
    """Where a console writes in a test."""
    return io.StringIO()
