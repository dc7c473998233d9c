"""A short profile of one way: which kernels take the time, and how many launches there are."""

from collections.abc import Callable

import torch
from benchmarks.gpu.rows import Rows
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

REPEATS = 3
TOP = 12


def profile(rows: Rows, run: Callable[[], object], device: torch.device, table: str, way: str) -> None:
    """Rows: the sum over one run, then its slowest kernels (a CPU's operations in the rehearsal)."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        with torch_profile(activities=activities) as profile:
            for _ in range(REPEATS):
                run()
            if on_gpu:
                torch.cuda.synchronize()
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        kernels = [event for event in profile.key_averages() if event.device_type == kind]
        times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / REPEATS for e in kernels}
        counts = {e.key: e.count / REPEATS for e in kernels}
    except Exception as error:
        rows.failed(error, table=f"profile: {table}", way=way)
        return
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:TOP]
    rows.add(table=f"profile: {table}", way=way, kernel="all", launches=sum(counts.values()), us=sum(times.values()))
    for name in slowest:
        rows.add(table=f"profile: {table}", way=way, kernel=name[:100], launches=counts[name], us=times[name])
