"""How few parameters are enough to learn from rewards: GRPO of many methods on sums, with a small decoder, on one core.

    nice -n 19 python benchmarks/rewards_frontier.py --model SMOLLM2 --out benchmarks/rewards_frontier.jsonl

The plan is rewards_frontier.yaml: methods, rates, seeds. Every run is one line of JSON; a run whose line is there
already is skipped, so a killed command goes on where it was. All runs of a task see the same prompts; rates are chosen
on prompts apart from those that are reported. `--list` prints what is missing. SMOLLM2: a folder with
SmolLM2-135M-Instruct's weights and tokenizer.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import digits
from typing import Any, NamedTuple

import torch
import yaml
from frontier import machine, read

from ziggurat.recipe.methods import TABLE, Method
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.loop.run import train

HERE = Path(__file__).resolve().parent
#: Decides which prompts lie in which part; the same for all runs, whatever their seed.
SPLIT_SEED = 0
#: Numbers of a sum, by task.
TASKS = {"sums": 2, "three": 3}
TABLE.setdefault("tinylora", Method("few trained values on frozen singular vectors", "peft:TinyLoraConfig"))


class Run(NamedTuple):
    """One line of the results. `config`: `method.*` of the recipe."""

    task: str
    method: str
    config: dict[str, Any]
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """What makes two runs the same: a method that is changed in the plan is another one."""
        return json.dumps([self.task, self.config, self.rate, self.seed], sort_keys=True)


def missing(plan: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[Run]:
    """The runs that can be started, in the plan's order: of each task all first rates, then the others, then seeds."""
    done = {line["key"]: line for line in lines}
    for task in plan["sizes"]:
        tuned = {
            name: [Run(task, name, plan["methods"][name], float(rate), plan["seeds"][0]) for rate in rates]
            for name, rates in plan["rates"].items()
        }
        turns = [run for turn in itertools.zip_longest(*tuned.values()) for run in turn if run is not None]
        yield from (run for run in turns if run.key not in done)
        for seed in plan["seeds"][1:]:
            again = [best._replace(seed=seed) for runs in tuned.values() if (best := best_rate(runs, done)) is not None]
            yield from (run for run in again if run.key not in done)


def best_rate(runs: list[Run], done: dict[str, Any]) -> Run | None:
    """The run with the highest reward on the tuning prompts; None where one of them isn't done or all failed."""
    if any(run.key not in done for run in runs):
        return None
    scores = [done[run.key].get("tuning_after", -1.0) for run in runs]
    return runs[scores.index(max(scores))] if max(scores) >= 0 else None


def prompts(task: str, sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part: a sum of one-digit numbers, its value, and the part's name."""
    sums = list(itertools.product(range(10), repeat=TASKS[task]))
    random.Random(SPLIT_SEED).shuffle(sums)
    left = iter(sums)
    return {
        part: [
            {"prompt": f"What is {' + '.join(map(str, terms))}?", "answer": sum(terms), "part": part}
            for terms in itertools.islice(left, size)
        ]
        for part, size in sizes.items()
    }


def _right(completion: Any, answer: Any) -> float:
    """1 where the last number of the completion is the answer."""
    words = "".join(sign if sign in digits else " " for sign in completion[-1]["content"]).split()
    return float(bool(words) and int(words[-1]) == answer)


def tuning(completions: Sequence[Any], answer: Sequence[int], part: Sequence[str]) -> list[float | None]:
    """The reward in training and on the tuning prompts."""
    rows = zip(completions, answer, part, strict=True)
    return [None if where == "reported" else _right(completion, right) for completion, right, where in rows]


def reported(completions: Sequence[Any], answer: Sequence[int], part: Sequence[str]) -> list[float | None]:
    """The same reward on the prompts that are reported."""
    rows = zip(completions, answer, part, strict=True)
    return [_right(completion, right) if where == "reported" else None for completion, right, where in rows]


def measured(run: Run, model: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Train, score, save: the line of `run`, without what all lines have."""
    config = dict(run.config)
    if config["name"] != "lor2c":
        config["target_modules"] = ["q_proj", "v_proj"]
    parts = prompts(run.task, plan["sizes"][run.task])
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", parts["training"]), ("validation", parts["tuning"] + parts["reported"])):
            Path(folder, f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        recipe = make_recipe(
            {
                "task": "grpo",
                "model": str(model),
                "data.train": f"{folder}/train.jsonl",
                "data.validation": f"{folder}/validation.jsonl",
                "data.as_chat": True,
                "train.max_steps": plan["steps"],
                "train.lr": run.rate,
                "train.evaluate": "never",
                "train.save": "never",
                "seed": run.seed,
                "output": f"{folder}/out",
                "method": config,
                **plan["recipe"],
            }
        )
        result = train(recipe, rewards=[tuning, reported])
        stored = sum(file.stat().st_size for file in result.folder.glob("*.safetensors"))
    steps = [line for line in result.history if "reward" in line]
    scores = {f"{part}_{when}": round(scores[part], 4) for part in ("tuning", "reported")
              for when, scores in (("before", result.before), ("after", result.after))}  # fmt: skip
    return {
        "parameters": result.counts.adapter,
        "stored_bytes": stored,
        **scores,
        "rewards": [round(line["reward"], 4) for line in steps],
        "without_signal": [round(line["frac_reward_zero_std"], 3) for line in steps],
        "seconds": round(result.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model and its tokenizer")
    parser.add_argument("--plan", type=Path, default=HERE / "rewards_frontier.yaml")
    parser.add_argument(
        "--out", type=Path, default=HERE / "rewards_frontier.jsonl", help="file that lines are added to"
    )
    parser.add_argument("--until", type=float, default=float("inf"), help="no run starts after this Unix time")
    parser.add_argument("--list", action="store_true", help="print the runs that can be started, and end")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # one core, and the same sums in the same order whatever the machine has
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    if args.list:
        for run in missing(plan, read(args.out)):
            print(run.task, run.method, run.rate, run.seed)
        return
    while time.time() < args.until and (run := next(missing(plan, read(args.out)), None)) is not None:
        head = {**run._asdict(), "key": run.key, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        where = {
            **machine(),
            "command": [
                "python",
                "benchmarks/rewards_frontier.py",
                *(word.rpartition("/")[2] for word in sys.argv[1:]),
            ],
        }
        try:
            line = {**head, **measured(run, args.model, plan), **where}
        except Exception as error:  # the other runs go on; the line says which one did not
            line = {**head, "error": f"{type(error).__name__}: {error}"[:600], **where}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(
            {name: line.get(name) for name in ("task", "method", "rate", "seed", "reported_after", "error")}, flush=True
        )


if __name__ == "__main__":
    main()
