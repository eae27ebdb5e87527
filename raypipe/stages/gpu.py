"""What an actor's GPU does, from NVML. The figures are None without a GPU or without NVML."""

import threading
import time

import torch

from raypipe.stages.stage import GpuUse

EVERY_S = 0.5


class GpuMeter:
    """Samples the device of this process, twice a second, in a thread; `use()` at any time."""

    def __init__(self, device: torch.device):
        self._use = GpuUse()
        self._handle = None if device.type != "cuda" else _handle(device)
        if self._handle is not None:
            threading.Thread(target=self._sample, daemon=True, name="raypipe-gpu").start()

    def _sample(self) -> None:
        import pynvml

        while True:
            share = pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
            used = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used
            self._use = GpuUse(
                seen_s=self._use.seen_s + EVERY_S,
                busy_s=self._use.busy_s + share * EVERY_S,
                memory_peak_bytes=max(self._use.memory_peak_bytes or 0, used),
            )
            time.sleep(EVERY_S)

    def use(self) -> GpuUse:
        """The totals so far."""
        return self._use


def _handle(device: torch.device):
    """Find a CUDA device in NVML by UUID. CUDA_VISIBLE_DEVICES renumbers devices for CUDA only."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
    except Exception:  # no NVML, a container without it, or a partition without such a handle
        return None
