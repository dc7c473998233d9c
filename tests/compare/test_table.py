"""The table's file: which recipes it makes, what it refuses, when two runs are the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ziggurat.compare.table import load_table, make_table, run_key
from ziggurat.errors import RecipeError


def values(**more: Any) -> dict[str, Any]:
    found = {
        "set": {"model": "embedded", "train.epochs": 2, "method.target_modules": ["query"]},
        "methods": {
            "LoRA": {"method.name": "lora", "method.r": 8},
            "pyramid": {"method": {"name": "msplora", "r": 4}, "tasks": {"stsb": {"train.lr": 0.01}}},
        },
        "tasks": {"rte": None, "stsb": {"train.epochs": 5}, "own": {"data.train": "mine.csv", "data.label": "class"}},
        "seeds": [3, 4],
    }
    return {**found, **more}


def test_every_method_meets_every_task_with_every_seed(tmp_path: Path) -> None:
    table = make_table(values(), "mine", tmp_path)
    assert len(table.runs) == 2 * 3 * 2 and len({run.key for run in table.runs}) == 12
    assert [run.seed for run in table.runs] == [3] * 6 + [4] * 6 and table.baseline == "LoRA"
    by = {(run.method, run.task): run.recipe for run in table.runs if run.seed == 3}
    assert by["LoRA", "rte"].data.train == "glue/rte" and by["LoRA", "rte"].task == "classification"
    assert by["LoRA", "stsb"].task == "regression" and by["LoRA", "stsb"].train.epochs == 5
    assert by["LoRA", "own"].data.train == "mine.csv" and by["LoRA", "own"].data.label == "class"
    assert by["pyramid", "stsb"].train.lr == 0.01 != by["pyramid", "rte"].train.lr
    assert by["pyramid", "rte"].method == {"name": "msplora", "r": 4, "target_modules": ["query"]}
    assert table.metrics == {"rte": "accuracy", "stsb": "pearson", "own": "accuracy"}
    assert all(Path(run.recipe.folder).parent == tmp_path / "runs" for run in table.runs)


def test_a_recipe_to_start_from_lends_no_data_or_method_to_others(tmp_path: Path) -> None:
    methods = {"LoRA": {"method.name": "lora", "method.r": 8}}
    table = make_table(values(set={}, recipe="roberta-cola", tasks=["rte"], methods=methods), "mine", tmp_path)
    recipe = table.runs[0].recipe
    assert (recipe.data.text, recipe.data.text_pair, recipe.metric) == ("sentence1", "sentence2", "accuracy")
    assert recipe.model == "FacebookAI/roberta-base" and recipe.train.epochs == 80 and recipe.data.max_length == 256
    assert recipe.method == {"name": "lora", "r": 8}  # none of MSPLoRA's fields


def test_the_key_follows_what_a_run_computes(tmp_path: Path) -> None:
    first = make_table(values(), "mine", tmp_path / "a").runs
    moved = make_table(values(), "other", tmp_path / "b").runs
    assert [run.key for run in first] == [run.key for run in moved]
    changed = make_table(values(set={"model": "embedded", "train.epochs": 3}), "mine", tmp_path).runs
    assert not {run.key for run in first} & {run.key for run in changed}
    renamed = values()
    renamed["methods"] = {"plain": renamed["methods"]["LoRA"]}
    assert {run.key for run in make_table(renamed, "mine", tmp_path).runs} < {run.key for run in first}
    assert run_key(first[0].recipe.model_copy(update={"name": "x", "about": "y"})) == first[0].key


def test_every_mistake_comes_at_once(tmp_path: Path) -> None:
    bad = values(seeds=[1, 1], baseline="Lora", published="glue", sedes=[2], confidence=120)
    bad["methods"]["nameless"] = {"method.r": 4}
    bad["tasks"]["mrcp"] = None
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    said = str(error.value)
    parts = ["sedes: unknown, did you mean seeds?", "seeds: one is given twice", "'Lora' is no method of this table"]
    parts += ["published: 'glue' is not one of", "confidence: per cent", "nameless: names no method", "'mrcp' is not"]
    for part in parts:
        assert part in said
    assert f"has {len(parts)} problems" in said


def test_mistakes_of_the_recipes_name_their_place(tmp_path: Path) -> None:
    bad = values()
    bad["methods"]["LoRA"]["method.rank"] = 3
    bad["tasks"]["stsb"]["metric"] = "accuracy"
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    said = str(error.value)
    assert "LoRA on rte: method.rank: unknown, did you mean method.r?" in said
    assert "pyramid on stsb: metric: accuracy does not go with task: regression" in said


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "torn.yaml").write_text("a: [1")
    for name, said in (("list", "a table is a mapping"), ("torn", "cannot be read"), ("nowhere", "does not exist")):
        with pytest.raises(RecipeError, match=said):
            load_table(tmp_path / f"{name}.yaml")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(values()))
    assert load_table(tmp_path / "good.yaml").folder == Path("ziggurat-tables/good")
