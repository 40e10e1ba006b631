"""Measures the variants of one operation side by side: time, spread, peak memory, and the floor.

A benchmark is a module in this folder. It has

    cases(device) -> list[Case]      what to measure (the usual form), or
    measure(device) -> list[Row]     rows that it has measured itself (for what is no function call), and
    TESTS = ["tests/..."]            the operation's tests; default tests/kernels/test_NAME.py

Time: the variants of a case take turns in random order, round after round, so that noise on the machine hits
all alike; reported are the median and the quartiles over rounds. On CUDA each call is timed between two
events, behind a write of 256 MiB that empties the caches and hides the launch.
Memory: the most bytes that torch's allocators had handed out during one call, over what was held before it.
Floor: a copy, on the same device and in the same rounds, of as many bytes as the operation must move.
"""

import dataclasses
import gc
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch

MIN_ROUNDS, MAX_ROUNDS, SLOW_ROUNDS = 9, 200, 3
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated inside one sample
CACHE_FLUSH_BYTES = 256 * 2**20
FLOOR = "copy of the same bytes"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the case. `run` takes nothing; its result is dropped.

    optional: a peer whose first call may fail on some machines (no compiler, not installed): its row then
        holds the reason instead of times.
    """

    run: Callable[[], object]
    note: str = ""
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One input on which all variants are measured.

    build: makes the inputs on the device and returns the variants by name; the project's own come first.
    bytes_moved: bytes that any implementation must read plus write; 0 where a copy is no sensible floor.
    """

    name: str
    shape: Mapping[str, int]
    dtype: str
    direction: str  # forward, backward or both
    build: Callable[[torch.device], Mapping[str, Variant | Callable[[], object]]]
    bytes_moved: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant's measurement of one case; times in milliseconds, None where it could not run."""

    case: str
    shape: Mapping[str, int]
    dtype: str
    direction: str
    variant: str
    median_ms: float | None
    low_ms: float | None
    high_ms: float | None
    peak_mib: float | None
    floor_ms: float | None
    note: str = ""


def measure_case(case: Case, device: torch.device, seconds: float) -> list[Row]:
    """Measure all variants of a case, about `seconds` each; the floor's own row comes last."""
    if case.direction not in ("forward", "backward", "both"):
        raise ValueError(f"direction must be forward, backward or both, got {case.direction!r}")
    given = case.build(device).items()
    variants = {name: v if isinstance(v, Variant) else Variant(v) for name, v in given}
    if case.bytes_moved:
        variants[FLOOR] = Variant(_copy(case.bytes_moved, device))
    failures, peaks = {}, {}
    for name, variant in variants.items():
        try:
            variant.run()
        except Exception as error:
            if not variant.optional:
                raise
            reason = (str(error).strip() or "no message").splitlines()[0][:160]
            failures[name] = f"could not run: {type(error).__name__}: {reason}"
            continue
        variant.run()  # compilers and autotuners may work on the second call too
        peaks[name] = peak_bytes(variant.run, device) / 2**20
    times = _interleave({name: variants[name].run for name in peaks}, device, seconds)
    floor = statistics.median(times[FLOOR]) * 1e3 if FLOOR in times else None
    rows = []
    for name, variant in variants.items():
        low, median, high = _quartiles(times[name]) if name in times else (None, None, None)
        about = (case.name, dict(case.shape), case.dtype, case.direction, name)
        measured = (median, low, high, _rounded(peaks.get(name)), _rounded(floor))
        rows.append(Row(*about, *measured, failures.get(name, variant.note)))
    return rows


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes handed out during one call, over those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler():
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as prof:
            run()
    held = peak = 0
    # Every allocation (+) and release (-) on the CPU, in order of time.
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _copy(bytes_moved: int, device: torch.device) -> Callable[[], object]:
    n = max(1, bytes_moved // 2)  # each byte of the copy is read once and written once
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _interleave(runs, device, seconds) -> dict[str, list[float]]:
    """Seconds per call, one sample a round; a variant leaves when its time is used up."""
    sample = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    repeats, times, spent = {}, {name: [] for name in runs}, dict.fromkeys(runs, 0.0)
    for name, run in runs.items():
        once = min(sample(run, 1), sample(run, 1))
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7)))
        spent[name] += once
    shuffle, active = random.Random(0).shuffle, list(runs)
    gc.collect()
    gc.disable()
    try:
        while active:
            shuffle(active)
            for name in active:
                start = time.perf_counter()
                times[name].append(sample(runs[name], repeats[name]))
                spent[name] += time.perf_counter() - start
            active = [name for name in active if not _enough(len(times[name]), spent[name], seconds)]
    finally:
        gc.enable()
    return times


def _enough(n_rounds: int, spent: float, seconds: float) -> bool:
    if n_rounds >= MAX_ROUNDS:
        return True
    # What takes longer than its whole budget even at the fewest rounds (a Python loop, say) gets three.
    least = SLOW_ROUNDS if spent / n_rounds * MIN_ROUNDS > 2 * seconds else MIN_ROUNDS
    return n_rounds >= least and spent >= min(seconds, spent / n_rounds * MAX_ROUNDS)


def _cpu_sample(run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _cuda_sampler(device):
    flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def sample(run, repeats: int) -> float:
        events = []
        for _ in range(min(repeats, 20)):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    return sample


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return _rounded(low * 1e3), _rounded(median * 1e3), _rounded(high * 1e3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


@contextmanager
def _quiet_profiler():
    """Keep the profiler's own start and stop lines off stderr, and pass on everything else."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if "ActivityProfiler" not in line:
                    print(line, file=sys.stderr)
