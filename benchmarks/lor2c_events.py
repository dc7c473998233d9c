"""CPU seconds of one restructuring event on LLaMA2-7B's shapes: 32 paths, d 4096, r 64, one thread.

    python benchmarks/lor2c_events.py

Prints the spectra of all paths from QR of the factors, the decision, the whole event with the moved weights; and
beside them one dense d x d product with its singular values at d 1024, the way not taken. CPU seconds and not wall
time, so that what else runs on the machine matters little.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn

from ziggurat import LoR2CConfig
from ziggurat.lowrank.spectrum import singular_values
from ziggurat.methods.lor2c.paths import PathBank
from ziggurat.methods.lor2c.plan import decide


class Layer(nn.Module):
    """Only as much of a layer as paths look at: something of width d that runs."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(d), nn.Linear(d, d, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return x


class Stack(nn.Module):
    def __init__(self, depth: int, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d) for _ in range(depth))


def median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {given.depth} paths, d {given.d}, r {given.r}")
    torch.set_num_threads(1)
    model = get_peft_model(Stack(given.depth, given.d), LoR2CConfig(r=given.r, merges=8, init_weights=False))
    bank = next(m for m in model.modules() if isinstance(m, PathBank))
    structure, spectra = bank.adapters["default"].structure, bank.spectra("default")
    a, b = torch.randn(given.r, 1024), torch.randn(1024, given.r)
    rows = {
        "spectra of all paths, by QR": median(lambda: bank.spectra("default"), given.repeats),
        "decision": median(lambda: decide("merge", structure, spectra), given.repeats),
        "a whole event (mean of 8 merges)": median(lambda: model.restructure(10**9, 10**9), 1) / 8,
        "one path of d 1024, by QR": median(lambda: singular_values(a, b), given.repeats),
        "one path of d 1024, dense": median(lambda: torch.linalg.svdvals(b @ a), given.repeats),
    }
    for name, seconds in rows.items():
        print(f"{name:34s} {seconds:.4f} s")


if __name__ == "__main__":
    main()
