"""What an allocation step costs: LoRA²'s against that of PEFT's AdaLoRA, side by side on DeBERTaV3-base's shape.

    OMP_NUM_THREADS=1 python benchmarks/lora2_allocation.py [--device cuda] [--rank 8] [--out FILE]

Counted are the sensitivities that one step computes, as both hold them in memory. Timed is one step that takes the
gradients in and prunes (the median of some, both in turns); measured is the memory that the averages keep, and that the
step itself needs on top at its highest (on a GPU only). The weights are random: nothing here depends on their values.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModel, DebertaV2Config

import ziggurat
from ziggurat import LoRA2Config
from ziggurat.methods.lora2.layer import LoRA2Linear
from ziggurat.methods.lora2.pruning import sensitivities

TARGETS = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
STEPS = 1000


def adapted(config: Any, device: str) -> Any:
    """DeBERTaV3-base's layers with random weights; a small vocabulary, which no adapter touches."""
    shape = DebertaV2Config(vocab_size=100, hidden_size=768, num_hidden_layers=12, intermediate_size=3072)
    torch.manual_seed(0)
    model = get_peft_model(AutoModel.from_config(shape), config).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02)
            parameter.grad = torch.randn_like(parameter)
    return model


def adalora(rank: int, device: str) -> tuple[Callable[[int], None], Callable[[], tuple[int, int]]]:
    config = AdaLoraConfig(
        init_r=rank, target_r=rank // 2, tinit=10, tfinal=10, deltaT=1, total_step=STEPS, target_modules=TARGETS
    )
    model = adapted(config, device)
    allocator = model.base_model.rankallocator

    def held() -> tuple[int, int]:
        states = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        kept = sum(t.numel() * t.element_size() for state in states for t in state.values())
        return sum(t.numel() for t in allocator.ipt.values()), kept

    return model.base_model.update_and_allocate, held


def lora2(rank: int, device: str) -> tuple[Callable[[int], None], Callable[[], tuple[int, int]]]:
    config = LoRA2Config(
        r=rank,
        outer_rank=rank,
        target_rank=rank // 2,
        initial_warmup=10,
        final_warmup=10,
        mask_interval=1,
        target_modules=TARGETS,
    )
    model = adapted(config, device)

    def held() -> tuple[int, int]:
        layers = [layer for layer in model.modules() if isinstance(layer, LoRA2Linear)]
        kept = sum(t.numel() * t.element_size() for layer in layers for t in layer.importance["default"])
        return sensitivities(model), kept

    return lambda step: model.prune(step, STEPS), held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    methods = {"AdaLoRA (PEFT)": adalora(options.rank, options.device), "LoRA²": lora2(options.rank, options.device)}
    times: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, int] = dict.fromkeys(methods, 0)
    for repeat in range(options.repeats + 2):
        for name, (allocate, _) in methods.items():
            before = 0
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            allocate(20 + repeat)
            if on_gpu:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - before
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    rows = []
    for name, (_, held) in methods.items():
        count, kept = held()
        row = {"method": name, "rank": options.rank, "sensitivities": count, "averages_MiB": round(kept / 2**20, 3)}
        rows.append(row | {"ms": round(statistics.median(times[name]), 2)})
        if on_gpu:
            rows[-1]["peak_MiB"] = round(peaks[name] / 2**20, 3)
    device = torch.cuda.get_device_name() if on_gpu else platform.machine()
    print(f"{device}, torch {torch.__version__}, ziggurat {ziggurat.__version__}, r = k = {options.rank}\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) + " |")
    fewer = 100 * (1 - rows[1]["sensitivities"] / rows[0]["sensitivities"])
    print(f"\n{fewer:.2f}% fewer sensitivities; the abstract says about 98.5%.")
    if options.out:
        options.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
