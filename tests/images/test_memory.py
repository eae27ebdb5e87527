"""The estimate of an image's memory, checked against the peak of a process of its own."""

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import io, json, sys
import cv2, numpy as np
from PIL import Image
from raypipe.images import backend
from raypipe.images.ops import augment, colour, filters, geometry
from raypipe.images.decode import read_header
from raypipe.images.memory import needed

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return peak()

def encoded(image, format, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()

module = backend(sys.argv[1])
module.setup(1)
small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
large = cv2.resize(small, (2800, 2100), interpolation=cv2.INTER_CUBIC)
exif = Image.Exif()
exif[0x0112] = 6
files = {"jpeg": encoded(large, "JPEG")}
if "resizes" not in sys.argv:
    files |= {
        "progressive": encoded(large, "JPEG", progressive=True, subsampling=0),
        "turned": encoded(large, "JPEG", exif=exif),
        "png": encoded(large, "PNG", compress_level=1),
        "palette": encoded(large[..., 0], "GIF"),
        "webp": encoded(large, "WEBP", method=0),
        "bmp": encoded(large, "BMP"),
        "tiff": encoded(large, "TIFF", compression="tiff_lzw"),
        "avif": encoded(large, "AVIF", speed=10),
    }
some = [
    geometry.Resize(height=300, width=300, antialias=True),
    geometry.Flip(),
    colour.Hue(shift=0.1),
    colour.Saturation(factor=2.0),
    augment.AddNoise(sigma=3.0, seed=1),
    filters.Sharpness(factor=2.0),
    filters.GaussianBlur(kernel=5, sigma=1.0),
    colour.Equalize(),
    geometry.Affine(matrix=(1, 0.1, 0, 0, 1, 0)),
    geometry.Resize(height=2800, width=1400, antialias=True),
]
if "resizes" in sys.argv:
    some = [op for op in some if isinstance(op, geometry.Resize)]
found = {}
for name, data in files.items():
    header = read_header(data)
    before = reset()
    image = module.decode(data, header)
    found[name] = [peak() - before, needed(header, (), sys.argv[1])]
    del image
header = read_header(files["jpeg"])
image = module.decode(files["jpeg"], header)
for op in some:
    before = reset()
    result = module.apply(op, image)
    measured = peak() - before + 3 * header.height * header.width
    found[repr(op)] = [measured, needed(header, (op,), sys.argv[1])]
    del result
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("given", "cpu"),
    [
        (("opencv",), {}),
        (("torchvision",), {}),
        (("torchvision", "resizes"), {"ATEN_CPU_CAPABILITY": "default"}),  # as without AVX2
    ],
    ids=["opencv", "torchvision", "torchvision on a CPU without AVX2"],
)
def test_an_image_takes_no_more_than_is_said_beforehand(given, cpu):
    command = [sys.executable, "-c", MEASURE, *given]
    env = os.environ | cpu
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    for name, (measured, said) in json.loads(done.stdout).items():
        assert measured <= 1.1 * said + 1_000_000, (name, measured / 5.9e6, said / 5.9e6)
