"""What tests of runs share."""

import os
import subprocess
import sysconfig
import venv

import pytest


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
