"""PEFT's own benchmark (MetaMathQA, Llama-3.2-3B, one GPU of 24 GB) with Ziggurat's methods.

    git clone https://github.com/huggingface/peft
    pip install -e peft -r peft/method_comparison/MetaMathQA/requirements.txt ziggurat-peft
    python benchmarks/method_comparison/run.py peft            # each experiment without a result, then the table
    python benchmarks/method_comparison/run.py peft lor2c      # those whose name begins so
    python benchmarks/method_comparison/run.py peft --table    # the table alone

PEFT's scripts run as they are: this one puts the folders of `experiments` beside theirs, and starts their run.py, which
finds the methods without an import, by Ziggurat's door.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "experiments"
#: Results that PEFT has committed, to stand beside ours.
PEERS = (
    "lily--llama-3.2-3B-rank140-mlp-a2-b2-s8.0",
    "hira--llama-3.2-3B-rank32-lr4.5e-3",
    "frod--llama-3.2-3B-default",
    "lora--llama-3.2-3B-rank10-target-mlp",
    "lora--llama-3.2-3B-rank32",
    "lokr--llama-3.2-3B-rank32-factor4-lr0.003",
)


def experiments() -> list[str]:
    return sorted(str(file.parent.relative_to(HERE)) for file in HERE.rglob("adapter_config.json"))


def results(place: Path, name: str) -> list[Path]:
    """Its results: PEFT's script writes to `results` on PEFT's main branch, to `temporary_results` on others."""
    stem = name.replace("/", "--")
    return [*place.glob(f"results/{stem}.json"), *sorted(place.glob(f"temporary_results/{stem}--*.json"))]


def run(place: Path, name: str) -> None:
    shutil.copytree(HERE / name, place / "experiments" / name, dirs_exist_ok=True)
    subprocess.run([sys.executable, "run.py", "-v", f"experiments/{name}"], cwd=place, check=True)


def row(file: Path) -> tuple[float, str]:
    """Test accuracy in %, and the line of the table."""
    result = json.loads(file.read_text(encoding="utf-8"))
    info, training = result["run_info"], result["train_info"]
    accuracy = 100 * next((m["test accuracy"] for m in training["metrics"] if "test accuracy" in m), float("nan"))
    cells = [
        info["experiment_name"],
        f"{training['num_trainable_params'] / 1e6:.2f}",
        f"{accuracy:.1f}",
        f"{training['accelerator_memory_max'] / 2**30:.1f}",
        f"{info['total_time'] / 60:.0f}",
    ]
    return accuracy, f"| {' | '.join(cells)} |"


def table(place: Path) -> str:
    files = [place / "results" / f"{name}.json" for name in PEERS]
    files += [results(place, name)[-1] for name in experiments() if results(place, name)]
    lines = [
        "| experiment | trainable parameters, M | test accuracy, % | memory, GiB | minutes |",
        "|---|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *(line for _, line in sorted(map(row, filter(Path.exists, files)), reverse=True))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="PEFT's repository")
    parser.add_argument("begins", nargs="*", help="which experiments: the beginning of their names")
    parser.add_argument("--table", action="store_true", help="run nothing")
    words = parser.parse_args()
    place = words.checkout / "method_comparison" / "MetaMathQA"
    if not (place / "run.py").exists():
        parser.error(f"{place / 'run.py'} isn't there: give the folder of PEFT's repository")
    chosen = [name for name in experiments() if not words.begins or name.startswith(tuple(words.begins))]
    for name in chosen if not words.table else ():
        if not results(place, name):
            run(place, name)
    print(table(place))


if __name__ == "__main__":
    main()
