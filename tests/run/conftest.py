"""What tests of runs share."""

import os
import subprocess
import sysconfig
import venv

import pytest

from raypipe.run.preprocess import run
from tests.conftest import jpeg
from tests.support.runs import quiet, settings


@pytest.fixture
def bare_python(tmp_path) -> str:
    """A Python with all packages of this one except raypipe.

    An editable install needs its own .pth file. A path from a .pth file is not searched for one.
    """
    venv.create(tmp_path / "node", symlinks=True)
    site = next((tmp_path / "node").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = str(tmp_path / "node/bin/python")
    code = (
        "import ray, cv2, torch, sys; import importlib.util as u; "
        "sys.exit(u.find_spec('raypipe') is not None)"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    assert subprocess.run([python, "-c", code], cwd=tmp_path, env=env).returncode == 0, (
        "raypipe is there: install it with pip install -e"
    )
    return python


@pytest.fixture(scope="session")
def made(session, tmp_path_factory):
    """A finished output of 24 images, of which one is rejected; only to be copied."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    for index in range(23):
        (folder / "in" / f"{index:02d}.jpg").write_bytes(jpeg(index))
    (folder / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    run(
        settings(input=folder / "in", output=folder / "out", shard_rows=4, max_reject_fraction=0.1),
        console=quiet(),
    )
    return folder


@pytest.fixture
def wanted(made, tmp_path):
    """The settings of that output, of which `tmp_path` has a copy."""
    subprocess.run(["cp", "-r", str(made / "out"), str(tmp_path / "out")], check=True)
    return settings(
        input=made / "in", output=tmp_path / "out", shard_rows=4, max_reject_fraction=0.1
    )
