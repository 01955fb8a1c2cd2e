"""What figures of cost depend on: the machine's name, and the peak of a process's memory, which only Linux tells."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mb() -> float:
    """Megabytes at the peak; NaN where the system does not tell. ``getrusage`` would include the parent process."""
    if not _STATUS.is_file():
        return float("nan")
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


class PeakMemory:
    """How far the memory of this process grows from now on.

    Args:
        kept (Callable[[], int]): Bytes that are held for other purposes, now and later; their growth does not count.
    """

    def __init__(self, kept: Callable[[], int] = lambda: 0) -> None:
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the next model would find room that the last one left
            _RESET.write_text("5", encoding="ascii")
            self._before = peak_mb()
        except OSError:
            self._before = float("nan")
        self._kept, self._kept_before = kept, kept()

    def growth(self) -> float:
        """Megabytes at the peak since the start, on top of what was there; NaN where the system does not tell."""
        return peak_mb() - self._before - (self._kept() - self._kept_before) / 1e6


def machine() -> str:
    """The GPU, or how many cores of which processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores, {model or platform.processor() or platform.machine()}"
