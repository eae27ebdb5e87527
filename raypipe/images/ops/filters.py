"""Ops that compute each pixel from its neighbours: blurring, sharpening, denoising."""

from dataclasses import dataclass
from typing import Annotated

from raypipe.images.header import Reject
from raypipe.images.ops.op import Kernel, Length, NonNegative, Op, Size, above


@dataclass(frozen=True, kw_only=True)
class Sharpness(Op):
    """Scales the distance from a slightly blurred image by `factor`: 0 blurred, 1 unchanged.

    Above 1 is sharper. The outermost pixels stay.
    """

    purpose = "emphasise"
    factor: NonNegative


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Op):
    """`kernel` x `kernel` Gaussian; borders are reflected."""

    purpose = "remove"
    kernel: Kernel
    sigma: Annotated[float, above(0)]

    def output_size(self, size: Size) -> Size:
        if self.kernel // 2 >= min(size):
            raise Reject(
                "too small",
                f"{size[0]}x{size[1]} (height x width) has no reflected border for {self}",
            )
        return size


@dataclass(frozen=True, kw_only=True)
class Median(Op):
    """Median of kernel x kernel pixels: removes salt-and-pepper noise, keeps edges. OpenCV only."""

    purpose = "remove"
    kernel: Kernel = 3


@dataclass(frozen=True, kw_only=True)
class Bilateral(Op):
    """Averages near pixels of a similar colour: smooths areas, keeps edges. OpenCV only."""

    purpose = "remove"
    diameter: Length = 5
    sigma_colour: NonNegative = 50.0
    sigma_space: NonNegative = 50.0


@dataclass(frozen=True, kw_only=True)
class NonLocalMeans(Op):
    """Averages similar patches. OpenCV only.

    The strongest of these denoisers, and slow: hundreds of ms an image.
    """

    purpose = "remove"
    strength: NonNegative = 3.0
    colour_strength: NonNegative = 3.0
    patch: Length = 7
    search: Length = 21
