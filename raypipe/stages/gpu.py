"""What a worker's GPU does, from NVML. Everything is None where there is no GPU or NVML."""

import threading
import time
from dataclasses import dataclass

import torch

EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUse:
    """Means and peaks since the start, of the whole device: other processes on it count too."""

    percent: float | None = None  # mean share of the time in which a kernel ran, 0 to 100
    memory_peak_bytes: int | None = None


class GpuMeter:
    """Samples the device of this process, twice a second, in a thread; `use()` at any time."""

    def __init__(self, device: torch.device):
        self._sum = self._count = self._peak = 0
        self._handle = None if device.type != "cuda" else _handle(device)
        if self._handle is not None:
            threading.Thread(target=self._sample, daemon=True, name="raypipe-gpu").start()

    def _sample(self) -> None:
        import pynvml

        while True:
            self._sum += pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
            self._peak = max(self._peak, pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            self._count += 1
            time.sleep(EVERY_S)

    def use(self) -> GpuUse:
        """What was seen so far."""
        if not self._count:
            return GpuUse()
        return GpuUse(percent=self._sum / self._count, memory_peak_bytes=self._peak)


def _handle(device: torch.device):
    """NVML's handle of a CUDA device, by its UUID: CUDA_VISIBLE_DEVICES renumbers devices for CUDA, not for NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no NVML, a container without it, a partition that has no such handle: the figure is None then
        return None
