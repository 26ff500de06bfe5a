"""The clock: calls take turns, each begins with a cold cache on a device, and the median with its quartiles is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ntops_mla.devices import device_module, synchronize

# At least what any board's last cache holds, twice over.
FLUSH_BYTES = 256 << 20
LEAST_RUNS = 3


class Call(NamedTuple):
    """What is timed, and what sets its state back, untimed, after each run."""

    run: Callable[[], object]
    after: Callable[[], object] = lambda: None


class Spread(NamedTuple):
    """Milliseconds of a call: median and quartiles of `runs`."""

    ms: float
    low: float
    high: float
    runs: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if not values:
        raise ValueError("values must hold at least one time, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


class Clock:
    """Times calls on one device: by its events and with its cache flushed, on a CPU by perf_counter as things lie."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cpu = device.type == "cpu"
        if not self.on_cpu:
            self._module = device_module(device)
            self._flush = torch.empty(self._flush_bytes() // 4, dtype=torch.int32, device=device)

    @property
    def said(self) -> str:
        """How a time came about."""
        if self.on_cpu:
            return "perf_counter around each call; caches are left as the turns leave them"
        size = self._flush.numel() * 4 >> 20
        return f"events of the device around each call; {size} MiB are written before each, so that its cache is cold"

    def _flush_bytes(self) -> int:
        try:
            cache = self._module.get_device_properties(self.device).L2_cache_size
        except (AttributeError, RuntimeError):  # not every vendor's torch tells
            cache = 0
        return max(FLUSH_BYTES, 2 * int(cache))

    def measure(self, calls: Sequence[Call], runs: int, seconds: float) -> list[Spread | Exception]:
        """Each call's times, or what it raised. They take turns, one run each, until every one has `runs` or `seconds`
        have passed, though never before LEAST_RUNS; so what else the machine does meets all of them."""
        times: list[list[float]] = [[] for _ in calls]
        raised: dict[int, Exception] = {}
        end = time.perf_counter() + seconds
        for turn in range(-1, runs):  # the first turn warms up
            if turn >= LEAST_RUNS and time.perf_counter() > end:
                break
            for index, call in enumerate(calls):
                if index in raised:
                    continue
                try:
                    elapsed = self._once(call)
                except Exception as error:
                    raised[index] = error
                    continue
                if turn >= 0:
                    times[index].append(elapsed)
        return [raised[i] if i in raised else spread(values) for i, values in enumerate(times)]

    def _once(self, call: Call) -> float:
        if self.on_cpu:
            begin = time.perf_counter()
            call.run()
            elapsed = (time.perf_counter() - begin) * 1e3
            call.after()
            return elapsed
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        # The host gets ahead while this is written: a short call's launches do not wait for Python.
        self._flush.zero_()
        start.record()
        call.run()
        end.record()
        synchronize(self.device)
        call.after()
        return start.elapsed_time(end)

    def peak_bytes(self, call: Call) -> int | None:
        """What one run allocates at most beyond what is there; None where the device does not say."""
        if self.on_cpu:
            return None
        try:
            synchronize(self.device)
            before = self._module.memory_allocated(self.device)
            self._module.reset_peak_memory_stats(self.device)
            call.run()
            synchronize(self.device)
            most = self._module.max_memory_allocated(self.device)
        except AttributeError:
            return None
        call.after()
        return most - before
