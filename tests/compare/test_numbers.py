"""Paired differences against their definition, bold entries, and the written tables."""

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_table import values

from ziggurat.compare.plot import draw
from ziggurat.compare.published import PublishedName, published
from ziggurat.compare.report import markdown, table_csv
from ziggurat.compare.results import Results
from ziggurat.compare.statistics import Cell, averages, paired
from ziggurat.compare.summary import summarise
from ziggurat.compare.table import Table, make_table

scores = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=8), st.sampled_from([80.0, 95.0, 99.0]))
def test_the_interval_is_that_of_the_paired_t_test(pairs: list[tuple[float, float]], confidence: float) -> None:
    ours, theirs = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    gap = paired(ours, theirs, confidence)
    assert gap is not None and gap.pairs == len(pairs)
    assert gap.mean == pytest.approx(statistics.fmean(a - b for a, b in pairs), abs=1e-9)
    back = paired(theirs, ours, confidence)
    assert back is not None and (back.low, back.high) == pytest.approx((-gap.high, -gap.low), abs=1e-9)
    spread = statistics.stdev(a - b for a, b in pairs)
    if spread > 1e-6:
        test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
        low, high = test.confidence_interval(confidence / 100)
        assert (gap.low, gap.high) == pytest.approx((low, high), abs=1e-6)
        if abs(test.pvalue - (1 - confidence / 100)) > 1e-9:
            assert gap.excludes_zero() == (test.pvalue < 1 - confidence / 100)


def test_only_seeds_that_both_have_are_paired() -> None:
    gap = paired({1: 10.0, 2: 20.0, 3: 99.0}, {2: 18.0, 1: 9.0, 4: 0.0}, 95)
    assert gap is not None and gap.pairs == 2 and gap.mean == 1.5
    single_pair = paired({1: 10.0}, {1: 9.0}, 95)
    assert single_pair is not None and single_pair.half is None and not single_pair.excludes_zero()
    assert paired({1: 10.0}, {2: 9.0}, 95) is None


def test_the_average_is_taken_seed_by_seed() -> None:
    whole = averages([Cell({1: 10.0, 2: 20.0}), Cell({1: 30.0, 2: 50.0, 3: 7.0})])
    assert whole is not None and whole.scores == {1: 20.0, 2: 35.0}
    assert averages([Cell({1: 1.0}), None]) is None and averages([Cell({1: 1.0}), Cell({2: 1.0})]) is None


def line(table: Table, method: str, task: str, seed: int, score: float) -> dict[str, Any]:
    run = next(run for run in table.runs if (run.method, run.task, run.seed) == (method, task, seed))
    return {
        "key": run.key,
        "method": method,
        "task": task,
        "seed": seed,
        "status": "done",
        "metric": run.recipe.main_metric,
        "score": score,
        "parameters": {"adapter": 1000 + len(method)},
        "stored_bytes": 2**20,
        "peak_mb": 512.0,
        "step_seconds": 0.25,
        "versions": {"torch": "2"},
        "hardware": {"processor": "a chip"},
        "commit": None,
    }


@pytest.fixture
def table(tmp_path: Path) -> Table:
    methods = {"LoRA": {"method.name": "lora"}, "pyramid": {"method.name": "msplora"}}
    whole = values(seeds=[1, 2, 3], published="roberta-glue", tasks=["rte", "cola"], methods=methods)
    return make_table(whole, "mine", tmp_path)


def test_bold_only_where_the_interval_excludes_zero(table: Table) -> None:
    lines = []
    for seed, wobble in ((1, 0.0), (2, 0.3), (3, -0.2)):
        lines += [line(table, "LoRA", "rte", seed, 60 + wobble), line(table, "LoRA", "cola", seed, 50 + wobble)]
        # On rte always about 3 better; on cola better on the mean, but by anything between -4 and 9.
        lines += [line(table, "pyramid", "rte", seed, 63 + 1.2 * wobble)]
        lines += [line(table, "pyramid", "cola", seed, 50 + {1: 9, 2: -4, 3: 2}[seed])]
    text = markdown(summarise(table, lines))
    row = next(item for item in text.splitlines() if item.startswith("| pyramid | 1,007"))
    assert row.startswith("| pyramid | 1,007 | **63.04 ± 0.30** | 52.33 ± 6.51 | 57.69")
    assert "**+3.01 [+2.88, +3.13]**" in text and "| +2.30 [-14.22, +18.82] |" in text
    assert text.count("**") == 4
    assert "| *published: MSPLoRA* | *0.135M* | *81.7* | *65.6* |" in text and "are not measured here" in text
    assert "60.03 ± 0.25" in text and "not run yet" not in text


def test_unfinished_tables_say_so(table: Table) -> None:
    lines = [line(table, "LoRA", "rte", 1, 60.0), line(table, "pyramid", "rte", 1, 70.0)]
    broken = next(run for run in table.runs if (run.method, run.task, run.seed) == ("pyramid", "cola", 2))
    place = {"method": "pyramid", "task": "cola", "seed": 2}
    failed = [{**place, "key": broken.key, "error": "RuntimeError: no | memory"}]
    text = markdown(summarise(table, lines), failed)
    assert "60.00 (1 of 3 seeds)" in text and "+10.00 (1 pair)" in text and "**" not in text
    assert "pyramid on cola, seed 2: RuntimeError: no | memory" in text and "not run yet: 9 of 12" in text
    rows = list(csv.DictReader(io.StringIO(table_csv(summarise(table, lines)))))
    assert [(row["method"], row["task"], row["mean"], row["sd"], row["low"]) for row in rows] == [
        ("LoRA", "rte", "60.0", "", ""),
        ("pyramid", "rte", "70.0", "", ""),
    ]
    assert rows[1]["difference"] == "10.0" and rows[1]["parameters"] == "1007"


def test_published_figures_are_the_papers() -> None:
    glue, llama = (published(name) for name in get_args(PublishedName))
    means = {row.label + row.parameters: statistics.fmean(row.scores.values()) for row in glue.rows}
    assert means["MSPLoRA0.135M"] == pytest.approx(86.2, abs=0.1) and means["Lily0.3M"] == pytest.approx(86.0, abs=0.1)
    assert [len(row.scores) for row in glue.rows] == [6] * 9 and [len(row.scores) for row in llama.rows] == [4] * 6
    assert llama.rows[-1].scores["humaneval"] == 17.23


def test_the_last_line_of_a_killed_program_is_passed_over(tmp_path: Path, table: Table) -> None:
    results = Results(tmp_path / "out")
    results.add(line(table, "LoRA", "rte", 1, 60.0))
    with results.path.open("a") as file:
        file.write('{"key": "torn')
    again = Results(tmp_path / "out")
    assert again.done(table.runs[0].key) and len(again.lines) == 1
    again.add(line(table, "LoRA", "rte", 2, 61.0))
    assert len(Results(tmp_path / "out").lines) == 2


def test_tasks_of_two_metrics_show_both(tmp_path: Path) -> None:
    methods = {"LoRA": {"method.name": "lora"}, "pyramid": {"method.name": "msplora"}}
    table = make_table(values(seeds=[1, 2], tasks=["mrpc", "stsb", "rte"], methods=methods), "mine", tmp_path)
    lines = []
    for method, gain in (("LoRA", 0.0), ("pyramid", 2.0)):
        for seed in (1, 2):
            for task in table.tasks:
                result = line(table, method, task, seed, 80 + seed + gain + (0.008 if gain and seed == 2 else 0.0))
                lines.append(
                    {**result, "after": {result["metric"]: result["score"], "f1": 90.0 + seed, "spearman": 85.0 - seed}}
                )
    summary = summarise(table, lines)
    text = markdown(summary)
    assert (
        "| method | parameters | mrpc (accuracy / f1) | stsb (pearson / spearman) | rte (accuracy) | average |" in text
    )
    assert "| 81.50 ± 0.71 / 91.50 ± 0.71 | 81.50 ± 0.71 / 83.50 ± 0.71 | 81.50 ± 0.71 |" in text
    # Differences, what is bold and the average go by the first.
    assert "**83.50 ± 0.71** / 91.50 ± 0.71" in text and text.count("**+2.00 [+1.95, +2.05]**") == 4
    rows = {(row["method"], row["task"]): row for row in csv.DictReader(io.StringIO(table_csv(summary)))}
    assert (rows["LoRA", "mrpc"]["second_metric"], rows["LoRA", "mrpc"]["second_mean"]) == ("f1", "91.5")
    assert rows["pyramid", "stsb"]["second_metric"] == "spearman" and rows["LoRA", "rte"]["second_mean"] == ""
    # What an older version left without the other scores is shown as it is.
    assert "| 81.50 ± 0.71 |" in markdown(summarise(table, [{**result, "after": {}} for result in lines]))


def test_pairs_that_differ_by_the_same_are_not_bold(table: Table) -> None:
    lines = [
        line(table, method, "rte", seed, 60.0 + gain)
        for method, gain in (("LoRA", 0), ("pyramid", 1))
        for seed in (1, 2)
    ]
    text = markdown(summarise(table, lines))
    assert "+1.00 [+1.00, +1.00]" in text and "**" not in text


def test_scores_without_bounds_have_no_interval() -> None:
    endless = Cell({1: 3.0, 2: math.inf})
    gap = paired(endless.scores, {1: 2.0, 2: 2.0}, 95)
    assert endless.spread is not None and math.isnan(endless.spread)
    assert gap is not None and not gap.excludes_zero()


def test_a_line_cut_inside_a_sign_and_lines_inside_a_text(tmp_path: Path, table: Table) -> None:
    results = Results(tmp_path / "out")
    results.add({**line(table, "LoRA", "rte", 1, 60.0), "error": "one\u2028two\u0085three"})
    with results.path.open("ab") as file:
        file.write('{"method": "LoRA\u00b2'.encode()[:-1])
    again = Results(tmp_path / "out")
    assert again.done(table.runs[0].key) and len(again.lines) == 1


def test_runs_that_failed_stand_under_the_labels_of_today(tmp_path: Path, table: Table) -> None:
    results = Results(tmp_path / "out")
    old = {**line(table, "LoRA", "rte", 1, 0.0), "method": "old name", "status": "failed", "error": "no"}
    results.add(old)
    assert [(item["method"], item["error"]) for item in results.failed(table)] == [("LoRA", "no")]


def test_per_cent_and_shares_have_no_average(tmp_path: Path) -> None:
    tasks = {"alpaca": {"evaluate": {"tasks": {"mmlu": "acc", "truthfulqa_gen": "bleu_acc"}}}}
    methods = {"LoRA": {"method.name": "lora"}}
    table = make_table({"recipe": "llama2-alpaca", "methods": methods, "tasks": tasks, "seeds": [1]}, "mine", tmp_path)
    result = line(table, "LoRA", "alpaca", 1, 4.0)
    parts = {"mmlu": {"scores": {"acc": 46.0}, "per_cent": ["acc"]}}
    parts["truthfulqa_gen"] = {"scores": {"bleu_acc": 0.34}, "per_cent": []}
    assert "average" not in summarise(table, [{**result, "evaluated": parts}]).columns
    parts["truthfulqa_gen"] = {"scores": {"bleu_acc": 34.0}, "per_cent": ["bleu_acc"]}
    assert summarise(table, [{**result, "evaluated": parts}]).cells["LoRA", "average"].scores == {1: 40.0}


def test_sizes_follow_the_task_and_every_method_is_named(tmp_path: Path) -> None:
    methods = {
        "LoRA": {"method.name": "lora", "tasks": {"cola": {"method.r": 64}}},
        "late": {"method.name": "msplora", "tasks": ["cola"]},
    }
    table = make_table(values(seeds=[1], tasks=["rte", "cola"], methods=methods), "mine", tmp_path)
    small, large = line(table, "LoRA", "rte", 1, 60.0), line(table, "LoRA", "cola", 1, 50.0)
    large["parameters"] = {"adapter": 8000}
    summary = summarise(table, [small, large, line(table, "late", "cola", 1, 51.0)])
    assert "| LoRA | 1,004 to 8,000 |" in markdown(summary)
    rows = {(row["method"], row["task"]): row["parameters"] for row in csv.DictReader(io.StringIO(table_csv(summary)))}
    assert rows["LoRA", "rte"] == "1004" and rows["LoRA", "cola"] == rows["LoRA", "average"] == "8000"
    picture = next(path for path in draw(summary, tmp_path) if path.suffix == ".svg").read_text()
    assert picture.count("<!-- late -->") == 1 and picture.count("<!-- LoRA -->") == 1


def test_names_are_no_formulas_in_the_csv_and_no_commands_in_the_page(tmp_path: Path) -> None:
    methods = {name: {"method.name": "lora", "method.r": r} for r, name in enumerate(("=1+1", "@x", "LoRA-a"), start=1)}
    table = make_table(values(methods=methods, tasks={"-rte": {"data.train": "a.csv"}}, seeds=[1]), "mine", tmp_path)
    lines = [line(table, name, "-rte", 1, 50.0) for name in methods]
    rows = list(csv.DictReader(io.StringIO(table_csv(summarise(table, lines)))))
    assert [(row["method"], row["task"]) for row in rows] == [("'=1+1", "'-rte"), ("'@x", "'-rte"), ("LoRA-a", "'-rte")]
    failed = [{"key": "", "method": "@x", "task": "-rte", "seed": 1, "error": "no \x1b[2J"}]
    assert "- @x on -rte, seed 1: no \\u001b[2J" in markdown(summarise(table, lines), failed)
