"""Times of several ways in turns: CUDA events on a GPU, the wall clock on a CPU."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], object]
_CACHE = 64 * 2**20  # more numbers of 4 bytes than any L2 cache holds


def in_turns(
    ways: Mapping[str, Run], device: torch.device, *, rounds: int, seconds: float, cold: bool = False
) -> dict[str, list[float]]:
    """Microseconds of each way in each round, in a random order each round.

    Ends after ``rounds`` rounds, or ``seconds`` seconds but not before the second round. With ``cold``, the L2 cache is
    overwritten before each run, so that no way finds what the one before it has left there.
    """
    clear = torch.empty(_CACHE if cold and device.type == "cuda" else 1, dtype=torch.int32, device=device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, end = list(ways), time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 2 and time.perf_counter() > end:
            break
        random.shuffle(order)
        for name in order:
            if cold:
                clear.zero_()
            elif device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(microseconds(ways[name], device))
    return times


def microseconds(run: Run, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return 1e3 * started.elapsed_time(ended)


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(of, to, strict=True)], n=4, method="inclusive")
    return {"ratio": median, "low": low, "high": high}


def captured(run: Run, device: torch.device) -> Run:
    """``run`` as the replay of a CUDA graph; on a CPU, which has none, ``run`` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A Triton kernel that is collected unloads its code, which isn't allowed while a graph is captured.
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        gc.enable()
    return graph.replay


def compile_backend(device: torch.device) -> dict[str, Any]:
    """Arguments for torch.compile: a CPU rehearses the tracing alone, without a C++ compiler."""
    return {"dynamic": False} if device.type == "cuda" else {"dynamic": False, "backend": "eager"}
