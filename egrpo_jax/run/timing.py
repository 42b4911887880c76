"""Seconds by phase, programs compiled, device memory, and what a chip could compute."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax


class PhaseTimer:
    """Seconds per phase of one iteration. The caller blocks on the phase's last result inside the phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase `name`."""
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{"seconds/<phase>": seconds} since the last call, and starts anew."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


@contextlib.contextmanager
def count_compilations() -> Iterator[list[float]]:
    """The seconds of each program that is compiled meanwhile, or read from the compilation cache: a growing list."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 operations a second of a device, from its vendor's data sheet, by the beginning of its name in JAX. A
chip of TPU7x is two devices."""


def peak_flops(device_kind: str) -> float | None:
    """The most bfloat16 operations a second of a device, or None if it is unknown; the longest fitting name counts."""
    fitting = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def peak_device_memory() -> float | None:
    """The most bytes in use at once so far on any local device, or None where the backend does not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [float(values["peak_bytes_in_use"]) for values in stats if values and "peak_bytes_in_use" in values]
    return max(peaks, default=None)
