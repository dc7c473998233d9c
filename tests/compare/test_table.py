"""The table's file: the recipes made from it, refusals, and equal runs."""

import os
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml

from ziggurat.compare.table import load_table, make_table, run_key
from ziggurat.errors import RecipeError


def values(**more: Any) -> dict[str, Any]:
    choices = {
        "set": {"model": "embedded", "train.epochs": 2, "method.target_modules": ["query"]},
        "methods": {
            "LoRA": {"method.name": "lora", "method.r": 8},
            "pyramid": {"method": {"name": "msplora", "r": 4}, "tasks": {"stsb": {"train.lr": 0.01}}},
        },
        "tasks": {"rte": None, "stsb": {"train.epochs": 5}, "own": {"data.train": "mine.csv", "data.label": "class"}},
        "seeds": [3, 4],
    }
    return {**choices, **more}


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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method.lora_dropout": 0}, {"method.lora_dropout": 0.0, "method.r": 8}),
        ({"method.target_modules": ["query", "value"]}, {"method.target_modules": ["value", "query"]}),
        ({"train.keep": 1, "train.workers": 2}, {"train.eval_batch": 4, "train.report_to": ["tensorboard"]}),
    ],
)
def test_the_key_does_not_follow_how_it_is_said(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")

    def key(keys: dict[str, Any]) -> str:
        methods = {"LoRA": {"method.name": "lora", "method.target_modules": ["query"], **keys}}
        return make_table(values(set={"model": "embedded"}, methods=methods), "mine", tmp_path).runs[0].key

    assert key(first) == key(second)
    assert key({"method.lora_dropout": 0.1}) != key({}) != key({"method.r": 9})


def test_the_key_knows_the_content_of_local_files(tmp_path: Path, tiny_llama: Path) -> None:
    places = {name: tmp_path / name for name in ("train.csv", "val.csv", "glue", "model", "tasks")}
    for name in ("train.csv", "val.csv"):
        places[name].write_text("text,label\na,1\n")
    shutil.copytree(tiny_llama, places["model"])
    (places["glue"] / "rte").mkdir(parents=True)
    (places["glue"] / "rte" / "train.parquet").write_bytes(b"rows")
    (places["tasks"] / "mmlu").mkdir(parents=True)
    (places["tasks"] / "mmlu" / "test.parquet").write_bytes(b"rows")
    data = {"data.train": str(places["train.csv"]), "data.validation": str(places["val.csv"])}
    scored = {**data, "evaluate": {"tasks": ["mmlu"], "data": str(places["tasks"])}}
    whole = {
        "set": {"model": str(places["model"]), "data.folder": None},
        "methods": {"LoRA": {"method.name": "lora"}, "base": {"method.name": "none", "tasks": ["mmlu"]}},
        "tasks": {"own": data, "rte": {"data.folder": str(places["glue"])}, "mmlu": scored},
    }

    def keys() -> dict[tuple[str, str], str]:
        runs = make_table(values(**whole, seeds=[1]), "mine", tmp_path / "out").runs
        return {(run.method, run.task): run.key for run in runs}

    mine, rte, mmlu, base = ("LoRA", "own"), ("LoRA", "rte"), ("LoRA", "mmlu"), ("base", "mmlu")
    changes = [
        ("train.csv", "text,label\nb,1\n", {mine, mmlu}),
        ("val.csv", "text,label\na,2\n", {mine, mmlu}),
        ("glue/rte/train.parquet", "others", {rte}),
        ("tasks/mmlu/test.parquet", "others", {mmlu, base}),
        ("model/config.json", "{}", {mine, rte, mmlu, base}),
        ("model/README.md", "hello", set()),
        ("glue/cola.parquet", "another task's", set()),
    ]
    before = keys()
    for name, text, affected in changes:
        (tmp_path / name).write_text(text)
        after = keys()
        assert {run for run in after if after[run] != before[run]} == affected, name
        before = after
    # What it holds counts, not where it lies.
    places["train.csv"].rename(tmp_path / "elsewhere.csv")
    data["data.train"] = scored["data.train"] = str(tmp_path / "elsewhere.csv")
    assert keys() == before


def test_the_key_holds_every_field_of_the_method_and_the_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig

    from ziggurat.compare import table

    recipe = make_table(values(), "mine", tmp_path).runs[0].recipe
    before = run_key(recipe)
    default = LoraConfig.__dataclass_fields__["lora_dropout"]
    monkeypatch.setattr(default, "default", 0.1)
    monkeypatch.setattr(LoraConfig, "__init__", partialmethod(LoraConfig.__init__, lora_dropout=0.1))
    changed = run_key(recipe)
    monkeypatch.undo()
    monkeypatch.setattr(table, "COMPUTATION", table.COMPUTATION + 1)
    assert len({before, changed, run_key(recipe)}) == 3


def test_the_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    recipe = make_table(values(), "mine", tmp_path).runs[0].recipe
    words = "import sys; from ziggurat.compare.table import run_key; from ziggurat.recipe.schema import Recipe; "
    words += "print(run_key(Recipe.model_validate_json(sys.argv[1])))"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    output = subprocess.run(
        [sys.executable, "-c", words, recipe.model_dump_json()],
        env={**os.environ, "PYTHONHASHSEED": other},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert output == run_key(recipe)


def test_labels_have_no_control_characters(tmp_path: Path) -> None:
    methods = {"Lo\nRA": {"method.name": "lora"}}
    with pytest.raises(RecipeError, match=r"methods: 'Lo\\nRA': a label has no line breaks"):
        make_table(values(methods=methods), "mine", tmp_path)
    with pytest.raises(RecipeError, match=r"tasks: 'own\\x1b\[2J': a label has no line breaks"):
        make_table(values(tasks={"own\x1b[2J": {"data.train": "mine.csv"}}), "mine", tmp_path)


def test_a_folder_is_found_under_another_label(tmp_path: Path) -> None:
    first = make_table(values(), "mine", tmp_path).runs[0]
    folder = Path(first.recipe.folder)
    folder.with_name(folder.name + ".unfinished").mkdir(parents=True)
    renamed = values()
    renamed["methods"] = {"plain": renamed["methods"]["LoRA"], "pyramid": renamed["methods"]["pyramid"]}
    runs = make_table(renamed, "mine", tmp_path).runs
    assert Path(runs[0].recipe.folder) == folder and len({run.recipe.folder for run in runs}) == len(runs)


def test_labels_may_be_as_long_as_they_like(tmp_path: Path) -> None:
    methods = {"\u4f4e" * 200: {"method.name": "lora"}, "\u4f4e" * 201: {"method.name": "lora", "method.r": 4}}
    runs = make_table(values(methods=methods), "mine", tmp_path).runs
    names = {Path(run.recipe.folder).name for run in runs}
    assert len(names) == len(runs) and max(len(name.encode()) for name in names) < 200


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(RecipeError, match=r"output: '.*taken' is a file; runs and results need a folder"):
        make_table(values(), "mine", tmp_path / "taken")


def test_every_seed_is_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"LoRA on rte: seed"):
        make_table(values(seeds=[0, 2**32]), "mine", tmp_path)


def test_nothing_is_given_twice_or_named_like_the_average(tmp_path: Path) -> None:
    labels = "LoRA: {method.name: lora}", "LoRA: {method.name: lora, method.r: 16}"
    text = "\n".join(("tasks: [rte]", "seeds: [1]", "methods:", *(f"  {label}" for label in labels)))
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"methods: 'LoRA' is given twice in line 5"):
        load_table(tmp_path / "twice.yaml")
    methods: dict[str, Any] = {"LoRA": {"method.name": "lora"}}
    with pytest.raises(RecipeError, match=r"tasks: average: is the table's name for the mean"):
        make_table(values(methods=methods, tasks={"average": {"data.train": "mine.csv"}}), "mine", tmp_path)
    methods["head"] = {"method.name": "head", "tasks": []}
    with pytest.raises(RecipeError, match=r"head: tasks: empty; name its only tasks"):
        make_table(values(methods=methods), "mine", tmp_path)


def test_every_mistake_comes_at_once(tmp_path: Path) -> None:
    bad = values(seeds=[1, 1], baseline="Lora", published="glue", sedes=[2], confidence=120)
    bad["methods"]["nameless"] = {"method.r": 4}
    bad["tasks"]["mrcp"] = None
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    message = str(error.value)
    parts = ["sedes: unknown, did you mean seeds?", "seeds: one is given twice", "'Lora' is no method of this table"]
    parts += [
        "published: 'glue' is not one of",
        "confidence: must be less than 100.0, got 120 [of the intervals, in per cent from 50 up to 100",
        "nameless: names no method",
        "'mrcp' is not",
    ]
    for part in parts:
        assert part in message
    assert f"has {len(parts)} problems" in message


@pytest.mark.parametrize("seeds", [[True], ["1"], [1.0, 2.0], [1, -1]])
def test_seeds_are_whole_numbers(seeds: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)has 1 problem.*seeds: .*\[the seeds, the same for every method"):
        make_table(values(seeds=seeds), "mine", tmp_path)


def test_mistakes_of_the_recipes_name_their_place(tmp_path: Path) -> None:
    bad = values()
    bad["methods"]["LoRA"]["method.rank"] = 3
    bad["tasks"]["stsb"]["metric"] = "accuracy"
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    message = str(error.value)
    assert "LoRA on rte: method.rank: unknown, did you mean method.r?" in message
    assert "pyramid on stsb: metric: accuracy does not go with task: regression" in message


def test_a_key_without_a_value_must_be_one(tmp_path: Path) -> None:
    bad = values()
    bad["set"]["train.epoch"] = None
    bad["methods"]["LoRA"] |= {"method.num_gruop": None, "method.num_groups": None}
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    assert "LoRA on rte: method.num_gruop: unknown" in str(error.value)
    assert "train.epoch: unknown, did you mean train.epochs?" in str(error.value)
    assert "num_groups:" not in str(error.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "torn.yaml").write_text("a: [1")
    for name, message in (
        ("list", "a table is a mapping"),
        ("torn", "not readable as YAML"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_table(tmp_path / f"{name}.yaml")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(values()))
    assert load_table(tmp_path / "good.yaml").folder == Path("ziggurat-tables/good")


def test_wrong_kinds_of_values_come_at_once_too(tmp_path: Path) -> None:
    methods = {
        "LoRA": {"method.name": "lora", "tasks": 3},
        "head": {"method.name": "head", "tasks": {"rte": 3, "stsb": {"seed": 1}}},
        1: {"method.name": "full"},
        "1": {"method.name": "bitfit"},
    }
    bad = values(set=["model"], methods=methods, baseline=["a"], about=3)
    bad["tasks"]["rte"] = 3
    bad["tasks"]["stsb"] = {"seed": 5}
    parts = [
        "set: recipe keys are needed, got ['model']",
        "LoRA: tasks: a list of its only tasks",
        "'1' is given twice",
    ]
    parts += [
        "head: tasks: rte: recipe keys are needed, got 3",
        "head: tasks: stsb: seed: is the table's to set, by seeds",
    ]
    parts += [
        "baseline: '['a']' is no method",
        "about: needs a text",
        "\n  tasks: rte: recipe keys are needed, got 3",
    ]
    parts += ["\n  tasks: stsb: seed: is the table's"]
    with pytest.raises(RecipeError) as error:
        make_table(bad, "mine", tmp_path)
    message = str(error.value)
    for part in parts:
        assert part in message
    assert f"has {len(parts)} problems" in message
    for tasks in (3, "rte", [["rte"]], [{"rte": None}]):
        with pytest.raises(RecipeError, match=r"tasks: a list of GLUE's tasks, or a mapping label"):
            make_table(values(tasks=tasks), "mine", tmp_path)
    for more, message in (
        (("set", "x"), "set: recipe keys"),
        (("set", {"seed": 1}), "set: seed"),
        (("output", 3), "output"),
    ):
        with pytest.raises(RecipeError, match=f"has 1 problem:\n  {message}"):
            make_table(values(**dict([more])), "mine", tmp_path)
    assert make_table(values(about=None, baseline=None), "mine", tmp_path).about == ""


def test_a_method_may_name_its_only_tasks(tmp_path: Path) -> None:
    methods = {"LoRA": {"method.name": "lora"}, "pyramid": {"method.name": "msplora", "tasks": ["rte"]}}
    table = make_table(values(methods=methods, tasks=["rte", "stsb"]), "mine", tmp_path)
    assert [(run.method, run.task) for run in table.runs[:3]] == [("LoRA", "rte"), ("pyramid", "rte"), ("LoRA", "stsb")]
    methods["LoRA"]["tasks"] = ["rte"]
    with pytest.raises(RecipeError, match="tasks: stsb: every method names other tasks"):
        make_table(values(methods=methods, tasks=["rte", "stsb"]), "mine", tmp_path)
    methods["LoRA"]["tasks"] = ["cola"]
    with pytest.raises(RecipeError, match="LoRA: tasks: 'cola' is no task of this table"):
        make_table(values(methods=methods, tasks=["rte", "stsb"]), "mine", tmp_path)


def test_fields_for_all_go_to_the_methods_that_have_them(tmp_path: Path) -> None:
    shared = {"model": "embedded", "method": {"target_modules": ["query"], "budget": 5000}}
    methods = {
        "LoRA": {"method.name": "lora"},
        "own rank": {"method.name": "lora", "method.r": 4},
        "LoRA²": {"method.name": "lora2", "method.target_rank": 2},
        "BitFit": {"method.name": "bitfit"},
        "head": {"method.name": "head"},
        "everything": {"method.name": "full"},
    }
    table = make_table(values(set=shared, methods=methods, tasks=["rte"]), "mine", tmp_path)
    choices = {run.method: run.recipe.method for run in table.runs}
    assert choices["LoRA"] == {"name": "lora", "target_modules": ["query"], "budget": 5000}
    assert choices["own rank"] == {"name": "lora", "target_modules": ["query"], "r": 4}
    assert choices["LoRA²"]["budget"] == 5000 and choices["BitFit"] == {"name": "bitfit"}
    rest = "BitFit, head, everything: no such field there, or of another meaning, or it has its own rank"
    assert sorted(table.notes) == [
        f"method.budget, given to all, is not for own rank, {rest}",
        f"method.target_modules, given to all, is not for {rest}",
    ]
    shared["method"]["target_module"] = shared["method"].pop("target_modules")  # type: ignore[index]
    with pytest.raises(RecipeError, match=r"method.target_module: no method .* did you mean method.target_modules\?"):
        make_table(values(set=shared, methods=methods, tasks=["rte"]), "mine", tmp_path)
    with pytest.raises(RecipeError, match=r"set: method.name: is for each method to say"):
        make_table(values(set={"method.name": "lora"}), "mine", tmp_path)


def test_bottlenecks_keep_their_place(tmp_path: Path) -> None:
    shared = {"model": "embedded", "method": {"target_modules": ["query"], "lora_alpha": 8, "r": 4}}
    methods = {"LoRA": {"method.name": "lora"}, "bottlenecks": {"method.name": "adapter"}}
    table = make_table(values(set=shared, methods=methods, tasks=["rte"]), "mine", tmp_path)
    choices = {run.method: run.recipe.method for run in table.runs}
    assert choices["bottlenecks"] == {"name": "adapter", "r": 4} and choices["LoRA"]["lora_alpha"] == 8
    assert len(table.notes) == 2 and all("is not for bottlenecks" in note for note in table.notes)


def test_set_reaches_tasks_with_data_of_their_own(tmp_path: Path) -> None:
    shared = {"model": "embedded", "task": "regression", "data.text": "review"}
    methods = {"head": {"method.name": "head"}}
    table = make_table(
        values(set=shared, recipe="roberta-cola", methods=methods, tasks={"own": {"data.train": "a.csv"}}),
        "m",
        tmp_path,
    )
    assert (table.runs[0].recipe.task, table.runs[0].recipe.data.text) == ("regression", "review")


def test_a_column_holds_one_metric(tmp_path: Path) -> None:
    whole = values()
    whole["methods"]["pyramid"]["tasks"] = {"rte": {"metric": "f1"}}
    with pytest.raises(RecipeError, match=r"tasks: rte: a column holds one metric.*accuracy in LoRA, f1 in pyramid"):
        make_table(whole, "mine", tmp_path)


def test_published_figures_without_a_column_are_told(tmp_path: Path) -> None:
    assert make_table(values(published="roberta-glue"), "mine", tmp_path).notes == []
    notes = make_table(values(published="llama2-alpaca"), "mine", tmp_path).notes
    assert notes == ["published: llama2-alpaca has figures for mmlu, bbh, drop, humaneval, no column of this table"]


def test_the_tables_of_the_docs_are_tables(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    glue, instruct = (
        make_table(yaml.safe_load(text.partition("```")[0]), "docs", tmp_path) for text in page.split("```yaml")[1:]
    )
    assert glue.metrics == {"rte": "accuracy", "cola": "matthews"} and "BitFit" in glue.notes[0]
    assert list(instruct.metrics) == ["mmlu", "bbh", "drop", "humaneval", "retention"]
    assert not instruct.notes
