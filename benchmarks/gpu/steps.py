"""Whole training steps in bf16 autocast: the frozen model, PEFT's LoRA, ours with and without Triton, compiled.

    python -m benchmarks.gpu.steps --out DIR

A step is forward, loss, backward and fused AdamW, as in `benchmarks/paired.py`: the frozen model's passes gradients
through all of its layers. The base's weights are bf16, the adapters' factors float32, as PEFT makes them. "saved" is
what autograd keeps between forward and backward, "peak" is what a step needs beyond the weights and the optimiser's
state. "kernels" counts how often the forward went down by the Triton kernels, for one or several linear layers. After
the shapes, the slowest of our ways is profiled; compiled steps come last, because compiling may use up the time.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.gpu.models import SHAPES, Shape, batch, layers_of
from benchmarks.gpu.profiles import profile
from benchmarks.gpu.rows import Rows, arguments
from benchmarks.gpu.timing import compile_backend, in_turns, ratios
from benchmarks.paired import Step
from peft import LoraConfig, get_peft_model
from torch import nn

from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.lowrank import product, triton_product

Adapt = Callable[[nn.Module], nn.Module]
MIB = 2**20
PLAIN = ", without Triton"
#: Seconds that compiling one way may take: none is begun with less time left.
COMPILING = 35
#: Layers of the compiled models: compiling takes some seconds a layer, and every layer costs the same.
COMPILED_LAYERS = 4


def adapters(shape: Shape) -> dict[str, Adapt | None]:
    """Name -> what puts the adapter in; ours begin with a method's name."""

    def by(config: object) -> Adapt:
        return lambda model: get_peft_model(model, config)  # type: ignore[arg-type]

    lora = {"target_modules": list(shape.targets), "lora_dropout": shape.dropout}
    return {
        "frozen": None,
        "PEFT LoRA r 8": by(LoraConfig(r=8, **lora)),
        "PEFT LoRA r 14": by(LoraConfig(r=14, **lora)),
        "MSPLoRA r 8": by(MSPLoraConfig(r=8, **lora)),
        f"MSPLoRA r 8{PLAIN}": by(MSPLoraConfig(r=8, **lora)),
        "LoRA² r 8": by(LoRA2Config(r=8, **lora)),
        "LoR2C r 8": by(LoR2CConfig(r=8, lora_dropout=shape.dropout)),
    }


class Way:
    """A step with Triton's kernels switched on or off, which `low_rank_add` otherwise decides once a process."""

    def __init__(self, step: Step, triton: bool) -> None:
        self.step, self.triton = step, triton

    def __call__(self) -> None:
        self._switch()
        self.step()

    def costs(self) -> dict[str, object]:
        """What one step trains, keeps and needs; run after a first step, which makes the optimiser's state."""
        self._switch()
        device = self.step.batch["input_ids"].device
        row: dict[str, object] = {
            "trainable parameters": self.step.parameters,
            "kernels": kernels_in(self.step.loss()),
            "saved MiB": self.step.saved() / MIB,
        }
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            torch.cuda.synchronize()
            row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / MIB
        return row

    def _switch(self) -> None:
        os.environ["ZIGGURAT_TRITON"] = str(int(self.triton))
        product._fused.cache_clear()


def kernels_in(loss: torch.Tensor) -> int:
    """How often the loss's graph goes down by the Triton kernels."""
    seen, waiting, count = set(), [loss.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += getattr(node, "parts", None) is triton_product
        waiting += [following for following, _ in node.next_functions]
    return count


class Part:
    """The part's rows, device, and the time that is left."""

    def __init__(self, rows: Rows, device: torch.device, until: float, rehearse: bool) -> None:
        self.rows, self.device, self.until, self.rehearse = rows, device, until, rehearse
        self.rounds, self.seconds = (2, 1.0) if rehearse else (30, 8.0)

    def left(self) -> float:
        return self.until - time.time()

    def way(self, base: nn.Module, shape: Shape, name: str, compiled: bool = False) -> Way:
        step = Step(base, adapters(shape)[name], batch(shape, self.device), torch.bfloat16)
        if compiled:
            for layer in layers_of(step.model):
                layer.compile(**compile_backend(self.device))
        return Way(step, triton=not name.endswith(PLAIN))

    def ready(self, make: Callable[[], Way], table: str, name: str) -> tuple[Way, dict[str, object]] | None:
        """A way that has run, with its costs; None where it raised, which is a row."""
        begin = time.perf_counter()
        try:
            way = make()
            way()
            first = time.perf_counter() - begin
            return way, {**way.costs(), "first step s": first}
        except Exception as error:
            self.rows.failed(error, table=table, way=name)
            return None

    def timed(self, table: str, ways: dict[str, tuple[Way, dict[str, object]]]) -> dict[str, float]:
        """Rows of the ways, and each one's median ratio to the frozen model."""
        runs = {name: way for name, (way, _) in ways.items()}
        took = in_turns(runs, self.device, rounds=self.rounds, seconds=self.seconds)
        by_way = {}
        for name, (_, costs) in ways.items():
            times = sorted(took[name])
            ratio = ratios(took[name], took["frozen"])
            by_way[name] = ratio["ratio"]
            ms = times[len(times) // 2] / 1e3
            self.rows.add(table=table, way=name, ms=ms, **ratio, rounds=len(times), **costs)
        return by_way


def eager(part: Part, shape: Shape, profiled: bool) -> None:
    """A shape's ways, and a profile of the slowest of ours beside the frozen model's."""
    table = shape.named(shape.layers)
    base = shape.make(shape.layers, part.rehearse, part.device)
    ways = {}
    for name in adapters(shape):
        if way := part.ready(partial(part.way, base, shape, name), table, name):
            ways[name] = way
    if "frozen" not in ways:
        return
    slowness = part.timed(table, ways)
    ours = {name: value for name, value in slowness.items() if not name.startswith(("frozen", "PEFT"))}
    for name in ("frozen", max(ours, key=ours.__getitem__)) if ours and profiled else ():
        profile(part.rows, ways[name][0], part.device, table, name)


def compiled(part: Part, shape: Shape) -> None:
    """Compiled ways one after the other, each timed in turns with the frozen model as it is and compiled."""
    layers = 1 if part.rehearse else COMPILED_LAYERS
    table = f"compiled: {shape.named(layers)}"
    base = shape.make(layers, part.rehearse, part.device)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # each layer is compiled anew, and the default of 8 ends in no compiling
    frozen = part.ready(partial(part.way, base, shape, "frozen"), table, "frozen")
    if frozen is None:
        return
    names = ("MSPLoRA r 8", "PEFT LoRA r 8", "frozen")
    for name in names[:1] if part.rehearse else names:
        if part.left() < COMPILING:
            part.rows.failed("left out: no time", table=table, way=f"{name}, compiled")
        elif way := part.ready(partial(part.way, base, shape, name, True), table, f"{name}, compiled"):
            part.timed(table, {"frozen": frozen, f"{name}, compiled": way})


def main() -> int:
    given, rows = arguments("steps", __doc__)
    device = torch.device("cpu" if given.rehearse else "cuda")
    part = Part(rows, device, given.until, given.rehearse)
    shapes = [shape.small() if given.rehearse else shape for shape in SHAPES.values()]
    for number, shape in enumerate(shapes):
        eager(part, shape, profiled=number == 0 or not given.rehearse)  # profiling takes seconds on a CPU
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for shape in shapes[:1] if given.rehearse else shapes:
        compiled(part, shape)
    return int(rows.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
