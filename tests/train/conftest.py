"""What tests of training share."""

from pathlib import Path

import pytest

from tests.support.labelled import make_labelled


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A folder with labelled photos, a COCO JSON and a recipe."""
    return make_labelled(tmp_path)
