import io

import numpy as np
import pytest
from PIL import Image

from raypipe.data.location import Location
from raypipe.data.sinks import Sink
from raypipe.stages.write import JPEG_SIDE, write_block
from tests.data.test_sinks import block


@pytest.mark.parametrize("format", ["jpeg", "webdataset", "png"])
def test_an_image_that_is_too_long_for_a_jpeg_is_rejected_and_the_others_are_written(
    tmp_path, format
):
    images = [
        np.full((4, 5, 3), 7, np.uint8),
        np.zeros((JPEG_SIDE + 1, 1, 3), np.uint8),
        None,
        np.zeros((1, JPEG_SIDE, 3), np.uint8),
    ]
    entry = write_block(
        block(images),
        Sink(format=format, root=Location.of(str(tmp_path))),
        backend="opencv",
        finish=None,
    )
    long = [] if format == "png" else ["too many pixels"]
    assert [row.reason for row in entry.rejected] == [*long, "corrupt"]
    assert [(row.height, row.width) for row in entry.written if row.height < 5] == [
        (4, 5),
        (1, JPEG_SIDE),
    ]
    if format == "jpeg":
        found = Image.open(io.BytesIO((tmp_path / entry.written[-1].file).read_bytes()))
        assert found.size == (JPEG_SIDE, 1)
