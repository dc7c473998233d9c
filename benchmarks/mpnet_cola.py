"""The means and paired differences of mpnet_cola_lower.jsonl: python benchmarks/mpnet_cola.py"""

import json
import statistics
from pathlib import Path

from ziggurat.compare.statistics import paired

OURS, BASELINE = "MSPLoRA r 8 at 0.0005", "LoRA r 8 at 0.00025"


def main() -> None:
    text = (Path(__file__).parent / "mpnet_cola_lower.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for rows in ("held-out rows", "validation split"):
        scores: dict[str, dict[int, float]] = {OURS: {}, BASELINE: {}}
        for line in (line for line in lines if line["method"] in scores):
            value = line["score"] if rows == "held-out rows" else line["validation"]["matthews"]
            scores[line["method"]][line["seed"]] = value
        means = ", ".join(f"{method} {statistics.fmean(by_seed.values()):.2f}" for method, by_seed in scores.items())
        gap = paired(scores[OURS], scores[BASELINE], 95)
        assert gap is not None
        assert gap.half is not None
        print(f"{rows}: {means}; difference {gap.mean:+.2f} +- {gap.half:.2f}, {gap.pairs} seeds")


if __name__ == "__main__":
    main()
