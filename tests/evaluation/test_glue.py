"""GLUE's tasks as a recipe's data: every task trains from a local folder, is scored, and writes the server's file."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from glue_folder import rows_of, write_glue

from commands import main
from ziggurat.errors import DataError, RecipeError
from ziggurat.evaluation.glue import (
    check_data,
    class_order,
    glue_scores,
    labels_of,
    task_for,
    task_of,
    write_server_files,
)
from ziggurat.evaluation.subject import check_tasks, find_subject
from ziggurat.recipe.glue import GLUE, HUB, glue_name
from ziggurat.recipe.recipe import load_recipe, make_recipe, resolved, to_yaml
from ziggurat.recipe.schema import Recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.data.examples import load_examples
from ziggurat.training.data.glue import read_glue
from ziggurat.training.loop.run import train
from ziggurat.training.model.base import HeadSpec

EXPECTED = {
    "cola": ("classification", "matthews"),
    "sst2": ("classification", "accuracy"),
    "mrpc": ("classification", "accuracy"),
    "stsb": ("regression", "pearson"),
    "qqp": ("classification", "accuracy"),
    "mnli": ("classification", "accuracy"),
    "qnli": ("classification", "accuracy"),
    "rte": ("classification", "accuracy"),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("data") / "glue")


def recipe_for(name: str, folder: Path, **more: Any) -> Recipe:
    values = {"model": "embedded", "data.train": f"glue/{name}", "data.folder": str(folder), "method.name": "lora"}
    return make_recipe({**values, **{key.replace("__", "."): value for key, value in more.items()}})


def test_the_eight_tasks_say_their_columns_classes_and_metric(glue: Path) -> None:
    assert set(GLUE) == set(EXPECTED)
    for name, (task, metric) in EXPECTED.items():
        recipe = recipe_for(name, glue)
        assert (recipe.task, recipe.main_metric) == (task, metric)
        examples = load_examples(recipe)
        assert (len(examples.train), len(examples.validation)) == (24, 6)
        assert examples.label_names == list(GLUE[name].classes)
        assert ("text_pair" in examples.train.column_names) == (name not in ("cola", "sst2"))
        assert examples.train["text"][0] == ("the film is good" if name in ("cola", "sst2") else "the film")
        assert resolved(make_recipe(resolved(recipe))) == resolved(recipe)


def test_the_hubs_name_and_subset_read_the_folder_too(glue: Path) -> None:
    recipe = load_recipe("roberta-mrpc", [f"data.folder={glue}"])
    assert recipe.data.train == HUB
    examples = load_examples(recipe)
    assert examples.label_names == ["not_equivalent", "equivalent"] and len(examples.validation) == 6


def test_rows_split_off_to_tune_on_leave_the_validation_set_alone(glue: Path) -> None:
    examples = load_examples(recipe_for("rte", glue, data__validation_rows=5))
    # Equal rows stay on one side, so one row fewer than asked is split off here.
    assert (len(examples.train), len(examples.validation)) == (20, 4)


def test_what_the_recipe_says_itself_stands(glue: Path) -> None:
    recipe = recipe_for("mrpc", glue, metric="f1", data__label_names=["no", "yes"], data__max_train=7)
    assert recipe.main_metric == "f1" and load_examples(recipe).label_names == ["no", "yes"]
    assert len(load_examples(recipe).train) == 7
    assert "glue/mrpc" in to_yaml(recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data.train": "glue/mrcp"}, r"'glue/mrcp' is not one of glue/cola, .*did you mean mrpc\?"),
        ({"data.train": "glue/rte", "data.subset": "rte"}, "data.subset: has no meaning"),
        ({"data.train": "x.csv", "data.folder": "y"}, "data.folder: is for GLUE's tasks"),
        ({"data.train": "glue/stsb", "metric": "accuracy"}, "accuracy does not go with task: regression"),
    ],
)
def test_a_recipe_that_misnames_glue(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"model": "embedded", "method.name": "lora", **values})


def test_a_folder_without_the_split_says_what_it_holds(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no validation_matched\.parquet .*it holds train\.parquet"):
        (tmp_path / "mnli").mkdir()
        pq.write_table(pa.Table.from_pylist(rows_of("mnli", 3, False)), tmp_path / "mnli" / "train.parquet")
        read_glue("mnli", "validation_matched", str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        read_glue("mnli", "train", str(tmp_path / "nowhere"))
    assert len(read_glue("rte", "train", str(glue / "rte"))) == 24
    with pytest.raises(DataError, match=r"no train\.parquet"):
        read_glue("rte", "train", str(glue / "mrpc"))


def test_names_that_are_no_task() -> None:
    assert glue_name("glue/rte") == "rte" and glue_name(HUB, "rte") == "rte"
    assert glue_name(HUB, "ax") is None and glue_name("my/glue") is None and glue_name("glue/rte.csv") is None


@pytest.mark.parametrize("name", ["mnli", "stsb", "mrpc"])
def test_train_score_and_write_the_servers_files(name: str, glue: Path, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        name,
        glue,
        model=str(tiny_bert),
        method__r=4,
        train__lr=4.0e-2,
        train__epochs=12 if name == "mnli" else 3,
        head__pooling="mean" if name == "mnli" else "model",
        train__batch=8,
        train__evaluate="never",
        train__save="never",
        output=str(tmp_path / "out"),
    )
    result = train(recipe)
    loaded = load_adapter_model(result.folder)
    assert task_of(loaded) == name
    scores = glue_scores(loaded, name, str(glue))
    main = recipe.main_metric
    assert scores[main] == pytest.approx(result.after[main], abs=1e-4) and scores["rows"] == 6
    assert ("mismatched_accuracy" in scores) == (name == "mnli")
    files = write_server_files(loaded, name, tmp_path / "server", str(glue))
    wanted = {"mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"], "stsb": ["STS-B.tsv"], "mrpc": ["MRPC.tsv"]}[name]
    assert [file.name for file in files] == wanted
    lines = files[0].read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [
        str(100 + index) for index in range(6)
    ]
    labels = [line.split("\t")[1] for line in lines[1:]]
    if name == "mnli":
        assert scores["accuracy"] > 60 and set(labels) <= set(GLUE["mnli"].classes)
        # The test rows are the validation rows: what the file says is what was scored.
        right = sum(GLUE["mnli"].classes[index % 3] == item for index, item in enumerate(labels))
        assert 100 * right / 6 == pytest.approx(scores["accuracy"])
    elif name == "stsb":
        assert all(0 <= float(item) <= 5 and len(item.split(".")[1]) == 3 for item in labels)
    else:
        assert set(labels) <= {"0", "1"}
        assert json.loads((result.folder / "run.json").read_text())["head"]["label_names"] == list(GLUE["mrpc"].classes)


def own_table(path: Path, rows: list[dict[str, Any]], classes: Sequence[str]) -> str:
    """The rows in a file of the user's own, whose labels are words."""
    pq.write_table(pa.Table.from_pylist([{**row, "label": classes[row["label"]]} for row in rows]), path)
    return str(path)


def test_classes_of_a_file_of_ones_own_are_known_by_their_names(glue: Path, tiny_bert: Path, tmp_path: Path) -> None:
    task = GLUE["mnli"]
    result = train(
        make_recipe(
            {
                "model": str(tiny_bert),
                "data.train": own_table(tmp_path / "train.parquet", rows_of("mnli", 24, False), task.classes),
                "data.validation": own_table(tmp_path / "val.parquet", rows_of("mnli", 6, False), task.classes),
                "data.text": "premise",
                "data.text_pair": "hypothesis",
                "head.pooling": "mean",
                "method": {"name": "lora", "r": 4},
                "train": {"lr": 4.0e-2, "epochs": 12, "batch": 8, "evaluate": "never", "save": "never"},
                "output": str(tmp_path / "out"),
            }
        )
    )
    loaded = load_adapter_model(result.folder)
    assert loaded.head.label_names == sorted(task.classes) != list(task.classes)
    scores = glue_scores(loaded, "mnli", str(glue))
    assert scores["accuracy"] == pytest.approx(result.after["accuracy"]) and scores["accuracy"] > 60
    labels = write_server_files(loaded, "mnli", tmp_path / "server", str(glue))[0].read_text().splitlines()[1:]
    right = sum(task.classes[index % 3] == line.split("\t")[1] for index, line in enumerate(labels))
    assert 100 * right / 6 == pytest.approx(scores["accuracy"])


@pytest.mark.parametrize(
    ("name", "trained_on", "names", "places"),
    [
        ("mrpc", "own.csv", ["equivalent", "not_equivalent"], [1, 0]),
        ("qqp", "own.csv", ["duplicate", "not_duplicate"], [1, 0]),
        ("mnli", "own.csv", ["Contradiction", "Entailment", "Neutral"], [2, 0, 1]),
        ("qnli", "glue/rte", ["entailment", "not_entailment"], [0, 1]),
        ("mrpc", "own.csv", ["0", "1"], [0, 1]),
        ("mrpc", "own.csv", ["1", "0"], [1, 0]),
        ("mnli", "own.csv", ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
        # Trained on the task itself: the numbers are the task's, whatever they are called.
        ("mrpc", "glue/mrpc", ["no", "yes"], [0, 1]),
        ("stsb", "own.csv", [], []),
    ],
)
def test_which_class_is_which(name: str, trained_on: str, names: list[str], places: list[int]) -> None:
    recipe = make_recipe({"model": "m", "data.train": trained_on, "method.name": "lora"})
    head = HeadSpec("classification" if names else "regression", names, pair=True)
    assert class_order(recipe, head, name) == places and task_for(recipe, head, name) == name


@pytest.mark.parametrize("names", [["no", "yes"], ["1", "2"], ["equivalent", "other"], ["0", "equivalent"]])
def test_classes_that_could_be_either_are_refused(names: list[str]) -> None:
    recipe = make_recipe({"model": "m", "data.train": "own.csv", "method.name": "lora"})
    with pytest.raises(DataError, match=rf"own\.csv', knows {', '.join(names)}, and they can't be matched"):
        task_for(recipe, HeadSpec("classification", names, pair=True), "mrpc")


def test_labels_of_a_folder_in_words(tmp_path: Path, glue: Path) -> None:
    rows = read_glue("rte", "validation", str(glue))
    words = [{**row, "label": GLUE["rte"].classes[row["label"]]} for row in rows.to_list()]
    assert labels_of(datasets.Dataset.from_list(words), "rte", "validation") == list(rows["label"])
    with pytest.raises(DataError, match="row 1 of split 'validation' has the label 'yes', none of entailment, not_"):
        labels_of(datasets.Dataset.from_list([{"label": "yes"}]), "rte", "validation")
    for name, hidden in (("rte", -1), ("stsb", -1.0), ("rte", None)):
        with pytest.raises(DataError, match="are hidden"):
            labels_of(datasets.Dataset.from_list([{"label": 0}, {"label": hidden}]), name, "validation")


def test_what_a_folder_lacks_is_known_before_a_model_is_loaded(glue: Path, tmp_path: Path) -> None:
    for server in (False, True):
        check_data("mnli", str(glue), server=server)
    shutil.copytree(glue / "mnli", tmp_path / "mnli")
    (tmp_path / "mnli" / "validation_mismatched.parquet").unlink()
    with pytest.raises(DataError, match=r"no validation_mismatched\.parquet"):
        check_data("mnli", str(tmp_path), server=False)
    for column, server, split in (("idx", True, "test_matched"), ("premise", False, "validation_matched")):
        rows = read_glue("mnli", split, str(glue)).remove_columns(column)
        rows.to_parquet(tmp_path / "mnli" / f"{split}.parquet")
        with pytest.raises(DataError, match=rf"glue/mnli: split '{split}' has no column '{column}'"):
            check_data("mnli", str(tmp_path), server=server)


def test_an_adapter_of_other_data_is_refused(
    glue: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe_for(
        "cola", glue, model=str(tiny_bert), train__max_steps=1, output=str(tmp_path / "out"), train__save="never"
    )
    folder = train(made).folder
    with pytest.raises(RecipeError, match=r"mmlu: .* was trained for classification: score it on glue"):
        check_tasks(find_subject(folder), ["glue/cola", "mmlu"])
    with pytest.raises(DataError, match="3 classes and 2 texts a row"):
        check_tasks(find_subject(folder), ["glue/mnli"])
    loaded = load_adapter_model(folder)
    with pytest.raises(DataError, match=r"glue/sst2 has the classes negative, positive; .* knows unacceptable, accept"):
        task_of(loaded, "sst2")
    with pytest.raises(
        DataError, match=r"3 classes and 2 texts a row; the data that this adapter .* have 2 classes and 1 a row"
    ):
        task_of(loaded, "mnli")
    (glue / "cola" / "test.parquet").rename(glue / "cola" / "away.parquet")
    with pytest.raises(DataError, match=r"no test.parquet"):
        write_server_files(loaded, "cola", tmp_path / "server", str(glue))
    # The command sees that before it loads anything.
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "away")
    assert main("eval", str(folder), "--tasks", "glue/cola", "--predictions", str(tmp_path / "server")) == 2
    assert "no test.parquet" in capsys.readouterr().err
    for more, message in (
        (("--predictions", "server", "--limit", "5"), "--limit leaves"),
        (("--dtype", "float16"), "--dtype is"),
        (("--dtype", "bf16"), "--dtype is"),
        (("--dtype", "int8"), "bfloat16 or float16"),
    ):
        assert main("eval", str(folder), "--tasks", "glue/cola", *more) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "away").rename(weights)
    assert not (tmp_path / "server").exists()
    with pytest.raises(DataError, match="labels of split"):
        (glue / "cola" / "validation.parquet").unlink()
        (glue / "cola" / "away.parquet").rename(glue / "cola" / "validation.parquet")
        glue_scores(loaded, "cola", str(glue))
