"""benchmarks/frontier.py: the plan's order, the choice of rates, resuming, and the page, on a tiny model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.training_tables import WORDS, save_tiny_llama

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PLAN = {
    "sizes": {"training": 8, "tuning": 4, "reported": 4, "plain": 2},
    "tokens": 8,
    "batch": 4,
    "seeds": [0, 1, 2],
    "targets": {"q v": ["q_proj", "v_proj"]},
    "methods": {
        "frozen": {},
        "LoRA r 8": {"config": "LoraConfig", "r": 8, "lora_alpha": 16},
        "LoR2C r 2": {"config": "LoR2CConfig", "r": 2, "lora_alpha": 4},
    },
    "groups": [
        {
            "task": "french",
            "targets": "q v",
            "rates": {"frozen": [0], "LoRA r 8": [1e-2, 5e-3, 2e-2], "LoR2C r 2": [4e-3, 2e-3, 8e-3]},
        }
    ],
}


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier

    return frontier


def line(run: Any, tuning: float, **more: Any) -> dict[str, Any]:
    return {"key": run.key, **run._asdict(), "tuning_after": tuning, **more}


def test_the_best_rate_gets_neighbours_before_the_other_seeds_get_it(frontier: Any) -> None:
    """The lowest loss lies at the highest rate, twice: twice a higher one is tried, and then no further."""
    lines: list[dict[str, Any]] = []
    order = []
    while (run := next(frontier.missing(PLAN, lines), None)) is not None:
        order.append((run.method, run.rate, run.seed))
        lines.append(line(run, 4.0 - run.rate if run.method == "LoRA r 8" else 3 + abs(run.rate - 4e-3)))
    first = [("frozen", 0, 0), ("LoRA r 8", 1e-2, 0), ("LoR2C r 2", 4e-3, 0), ("LoRA r 8", 5e-3, 0)]
    assert order[:4] == first
    assert [rate for method, rate, seed in order if method == "LoRA r 8" and not seed] == [1e-2, 5e-3, 2e-2, 4e-2, 8e-2]
    assert [rate for method, rate, seed in order if method == "LoR2C r 2" and not seed] == [4e-3, 2e-3, 8e-3]
    assert order[-4:] == [(m, r, s) for s in (1, 2) for m, r in (("LoRA r 8", 8e-2), ("LoR2C r 2", 4e-3))]


def test_seeds_may_come_before_the_other_rates_and_be_a_groups_own(frontier: Any) -> None:
    plan = PLAN | {"groups": [PLAN["groups"][0] | {"seeds_first": True, "seeds": [0, 1, 2, 3]}]}  # type: ignore[index]
    lines: list[dict[str, Any]] = []
    order = []
    while (run := next(frontier.missing(plan, lines), None)) is not None:
        order.append((run.method, run.rate, run.seed))
        lines.append(line(run, 3 + abs(run.rate - (1e-2 if run.method == "LoRA r 8" else 4e-3))))
    firsts = [(method, rate, seed) for seed in range(4) for method, rate in (("LoRA r 8", 1e-2), ("LoR2C r 2", 4e-3))]
    assert order[:9] == [("frozen", 0, 0), *firsts]
    assert len(order) == len(set(order)) == 13


def test_a_method_whose_every_rate_fails_gets_no_seeds(frontier: Any) -> None:
    lines: list[dict[str, Any]] = []
    while (run := next(frontier.missing(PLAN, lines), None)) is not None:
        broken = {"tuning_after": None, "error": "out of memory"} if run.method == "LoR2C r 2" else {}
        lines.append(line(run, 3 + abs(run.rate - 1e-2)) | broken)
    assert [run["seed"] for run in lines if run["method"] == "LoR2C r 2"] == [0, 0, 0]
    assert [run["seed"] for run in lines if run["method"] == "LoRA r 8"] == [0, 0, 0, 1, 2]


@pytest.fixture
def model_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a command in the folder that holds both."""
    save_tiny_llama(tmp_path / "model")
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(12):
        text = " ".join(WORDS[(number + i * (1 + number % 3)) % len(WORDS)] for i in range(20))
        (pages / f"{number}.txt").write_text(f"HEAD(1)\n\n{text}\n", encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return ["--model", "model", "--pages", "pages", "--plan", "plan.yaml", "--out", "runs.jsonl"]


def test_a_plan_is_run_resumed_and_reported(
    frontier: Any, tmp_path: Path, model_and_pages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import frontier_report
    import pandas

    passages = pandas.DataFrame({"passage": [" ".join(WORDS[i : i + 10]) for i in range(4)]})
    passages.to_parquet(tmp_path / "plain.parquet")
    out = tmp_path / "runs.jsonl"
    monkeypatch.setattr(sys, "argv", ["frontier.py", *model_and_pages, "--alpaca", "none", "--plain", "plain.parquet"])
    frontier.main()
    lines = frontier.read(out)
    assert len({run["key"] for run in lines}) == len(lines) >= 1 + 2 * (3 + 2)
    assert not [run for run in lines if "error" in run]
    frozen, lora = lines[0], lines[1]
    assert [run["method"] for run in lines[:3]] == ["frozen", "LoRA r 8", "LoR2C r 2"]
    assert (frozen["parameters"], frozen["reported_after"]) == (0, lora["reported_before"])
    assert lora["parameters"] == 4 * 2 * 8 * (32 + 32)  # layers, q and v, rank, both sides
    assert 0 < lora["stored_bytes"] - 4 * lora["parameters"] < 8000  # the rest is the file's header
    assert len(lora["losses"]) == lora["steps"] == 2

    # A line that a killed process left unfinished is run again and gives the same numbers; the others stay.
    whole = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:40] + "\n", encoding="utf-8")
    frontier.main()
    again = frontier.read(out)
    same = ("key", "losses", "tuning_after", "reported_after", "plain_after", "parameters", "stored_bytes")
    assert [[run.get(name) for name in same] for run in again] == [[run.get(name) for name in same] for run in lines]

    monkeypatch.setattr(
        sys, "argv", ["frontier_report.py", "--plan", "plan.yaml", "--runs", "runs.jsonl", "--out", "."]
    )
    frontier_report.main()
    page = (tmp_path / "plan.md").read_text(encoding="utf-8")
    row = next(text for text in page.splitlines() if text.startswith("| LoRA r 8 |"))
    assert "| 100% ± 0 |" in row
    assert f"{lora['parameters']:,}" in row
    assert "| LoR2C r 2 |" in page
    assert "Not run" not in page
    assert (tmp_path / "plan_french.png").stat().st_size > 10_000

    out.write_text("\n".join(json.dumps(run) for run in again[:2]) + "\n", encoding="utf-8")
    frontier_report.main()
    page = (tmp_path / "plan.md").read_text(encoding="utf-8")
    assert "- french, q v, LoRA r 8: rates 0.005, 0.02; seeds 1, 2" in page
    assert "- french, q v, LoR2C r 2: rates 0.004, 0.002, 0.008; seeds 1, 2" in page


def test_a_plan_may_train_on_more_blocks_of_a_page(frontier: Any, tmp_path: Path, model_and_pages: list[str]) -> None:
    """Pages of five blocks: four count, or as many as the plan says, and the other splits stay as they are."""
    import frontier_data
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sizes = {"reported": 4, "tuning": 4, "training": 8}
    four = frontier_data.pages(Path("pages"), tokenizer, sizes, 4)
    five = frontier_data.pages(Path("pages"), tokenizer, sizes | {"training_a_page": 5}, 4)
    texts = [path.read_text(encoding="utf-8").partition("\n")[2] for path in Path("pages").glob("*.txt")]
    whole_pages = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert five.training.ids[:5].flatten().tolist() in whole_pages
    assert four.training.ids[:5].flatten().tolist() not in whole_pages
    assert five.reported.ids.equal(four.reported.ids) and five.tuning.ids.equal(four.tuning.ids)


def test_a_plan_may_train_beside_a_model_in_bfloat16(
    frontier: Any, tmp_path: Path, model_and_pages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas

    pandas.DataFrame({"passage": [" ".join(WORDS[i : i + 10]) for i in range(4)]}).to_parquet("plain.parquet")
    plan = PLAN | {"dtype": "bfloat16", "groups": [PLAN["groups"][0] | {"rates": {"frozen": [0], "LoRA r 8": [1e-2]}}]}  # type: ignore[index]
    made = []
    adapted = frontier.adapted
    monkeypatch.setattr(frontier, "adapted", lambda base, config: made.append(adapted(base, config)) or made[-1])
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    words = [
        "--model",
        "model",
        "--pages",
        "pages",
        "--alpaca",
        "none",
        "--plain",
        "plain.parquet",
        "--plan",
        "plan.yaml",
    ]
    monkeypatch.setattr(sys, "argv", ["frontier.py", *words])
    frontier.main()
    assert [run.get("error") for run in frontier.read(tmp_path / "plan.jsonl")] == [None] * 4
    dtypes = {(str(p.dtype), p.requires_grad) for model in made for p in model.parameters()}
    assert dtypes == {("torch.bfloat16", False), ("torch.float32", True)}


def test_the_tiers_of_a_pyramid_are_measured(
    frontier: Any, tmp_path: Path, model_and_pages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import pyramid_study
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(sys, "argv", ["pyramid_study.py", *model_and_pages])
    pyramid_study.main()
    pyramid_study.main()  # nothing is left to run
    lines = {run["name"]: run for run in frontier.read(tmp_path / "runs.jsonl")}
    assert list(lines) == ["", *pyramid_study.VARIANTS]
    published = lines["as published"]
    assert published["parameters"] == 2 * (32 + 32) * (8 + 3 * 4 + 4 * 2)  # q and v; tiers of four layers
    assert sum(tier["energy"] for tier in published["tiers"].values()) == pytest.approx(1, abs=1e-3)
    assert all(0 < share <= 1 for run in lines.values() for share in (run.get("updates") or run["gradients"]).values())
    slower = lines["shared tiers at a third of the rate"]["tiers"]
    assert slower["global"]["norm"] < published["tiers"]["global"]["norm"]
    assert lines["A's orthogonal across tiers and layers"]["losses"][0] == published["losses"][0]  # B is 0

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = frontier.adapted(base, pyramid_study.PYRAMID)
    of_queries = [p for name, p in model.named_parameters() if ":A_" in name and "q_proj" in name]
    norms = [float(A.detach().norm()) for A in of_queries]
    pyramid_study.orthonormal(model)
    assert [float(A.detach().norm()) for A in of_queries] == pytest.approx(norms, rel=1e-5)
    rows = torch.cat([A.detach() for A in of_queries]).double()
    rows /= rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(28, dtype=rows.dtype), atol=1e-5, rtol=0)

    monkeypatch.setattr(sys, "argv", ["pyramid_study.py", "--report", "--out", "runs.jsonl"])
    capsys.readouterr()
    pyramid_study.main()
    page = capsys.readouterr().out
    assert f"| as published | 0 | {published['reported_after']:.3f} | " in page
    assert page.count("\n| ") == 1 + len(lines)


def test_two_methods_differ_by_the_pairs_of_their_seeds(frontier: Any) -> None:
    """Gaps -0.1, -0.2, -0.3: mean -0.2, and t = 4.303 with two degrees of freedom times 0.1 / sqrt(3)."""
    import frontier_report

    table = [frontier_report.Row(name, "q v", []) for name in ("LoRA r 8", "LoRA r 3", "LoRA r 1")]
    for row, losses in zip(table, ((1.0, 2.0, 3.0, 9.0), (1.1, 2.2, 3.3), (1.0, 2.0)), strict=True):
        row.lines.update({seed: {"reported_after": loss} for seed, loss in enumerate(losses)})
    assert list(frontier_report.differences(table)) == ["- LoRA r 8 minus LoRA r 3: -0.200 ± 0.248 (3 seeds)"]
