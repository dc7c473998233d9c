"""Rows with several labels: lists or texts with a separator, to predictions and scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_tables import tiny_recipe, write_csv, write_jsonl

from ziggurat.errors import DataError
from ziggurat.evaluation.own import read_file, score_rows
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict
from ziggurat.training.answers.write import write_answers
from ziggurat.training.data.examples import load_examples
from ziggurat.training.heads import MeanPooledClassifier
from ziggurat.training.loop import metrics
from ziggurat.training.loop.run import train
from ziggurat.training.model.base import HeadSpec, load_base

FORM = Path(__file__).parents[1] / "forms" / "labels.jsonl"


def recipe(data: Path, **more: Any):
    values = {"task": "multilabel", "model": "m", "data.train": str(data), "method.name": "lora"}
    return make_recipe(values | {key.replace("__", "."): value for key, value in more.items()})


def test_lists_and_texts_with_a_separator_are_the_same_labels(tmp_path: Path) -> None:
    lists = load_examples(recipe(FORM, data__validation=str(FORM)))
    assert lists.label_names == ["colour", "praise"]
    assert list(lists.train["label"])[:4] == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    rows = [json.loads(line) for line in FORM.read_text().splitlines()]
    joined = write_csv(tmp_path / "a.csv", [row | {"label": " ; ".join(row["label"])} for row in rows])
    texts = load_examples(recipe(joined, data__validation=str(joined), data__label_separator=";"))
    assert list(texts.train["label"]) == list(lists.train["label"])
    with pytest.raises(DataError, match=r"rows 1, 2, .*: a text in column 'label': set data.label_separator"):
        load_examples(recipe(joined, data__validation=str(joined)))


def test_faults_and_classes_that_the_training_rows_lack(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": ["x", " "]}, {"text": "b", "label": None}])
    with pytest.raises(DataError) as error:
        load_examples(recipe(bad))
    assert "row 1: no label in column 'label'" in str(error.value)
    assert "row 2: nothing in column 'label'; a row without labels has an empty list" in str(error.value)
    new = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": ["praise", "blame"]}])
    with pytest.raises(DataError, match="validation data have 'blame' in column 'label', which the training data lack"):
        load_examples(recipe(FORM, data__validation=str(new)))
    table = write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "label": ["x"]}, {"text": "b", "label": []}])
    with pytest.raises(DataError, match="has 1 classes, and multilabel needs two"):
        load_examples(recipe(table))


def test_a_split_keeps_the_only_row_of_a_class(tmp_path: Path) -> None:
    rows = [{"text": f"text {place}", "label": ["a", "b"] if place % 2 else ["a"]} for place in range(20)]
    rows[3]["label"] = ["a", "b", "rare"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(8):
        examples = load_examples(recipe(path, data__validation_rows=9, seed=seed))
        assert len(examples.validation) == 9
        assert sum(label[2] for label in examples.train["label"]) == 1


def test_scores_and_losses_by_definition() -> None:
    truth = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scores = np.array([[2.0, -1.0, -1.0], [1.0, -1.0, -2.0], [-1.0, -3.0, -1.0], [0.5, 1.0, -1.0]])
    actual = metrics.score(recipe(FORM), scores, truth, 3)
    # Class 1: 2 hits, 1 wrong; class 2: 1 hit, 1 missed; class 3 never occurs.
    assert actual["f1_micro"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 1))
    assert actual["f1_macro"] == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)
    assert actual["subset_accuracy"] == 50.0
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores), torch.tensor(truth))
    assert metrics.mean_loss(scores, truth) == pytest.approx(float(loss), rel=1e-10)
    assert metrics.guessing(recipe(FORM), truth[:2], truth, 3)["subset_accuracy"] == 25.0

    from transformers import BertConfig

    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 3
    model, ids = MeanPooledClassifier(config).double().eval(), torch.tensor([[3, 4], [5, 6], [7, 8], [3, 9]])
    made = model(input_ids=ids, labels=torch.tensor(truth))
    assert made.loss.item() == pytest.approx(metrics.mean_loss(made.logits.detach().numpy(), truth), rel=1e-5)


def test_the_models_own_head_learns_each_class_by_itself(tiny_bert: Path) -> None:
    model = load_base(str(tiny_bert), HeadSpec("multilabel", ["a", "b", "c"])).model.eval()
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    made = model(input_ids=torch.tensor([[2, 7, 3], [2, 8, 3]]), labels=truth)
    assert made.loss.item() == pytest.approx(metrics.mean_loss(made.logits.detach().numpy(), truth.numpy()), rel=1e-5)


def test_trained_asked_and_scored(tiny_bert: Path, tmp_path: Path) -> None:
    # Each row four times over: ten rows alone are too few to learn from.
    data = tmp_path / "labels.jsonl"
    data.write_text(FORM.read_text() * 4)
    keys = {"task": "multilabel", "data__validation": str(FORM), "data__validation_rows": None, "train__epochs": 12}
    result = train(tiny_recipe(tiny_bert, data, tmp_path / "run", head__pooling="mean", **keys))
    assert result.metric == "f1_micro"
    assert result.after["f1_micro"] > max(80.0, result.guess["f1_micro"])
    assert result.after["loss"] < result.before["loss"] / 2

    loaded = load_adapter_model(tmp_path / "run")
    answers = predict(loaded, ["the film is good and blue", "the plot is one"])
    for answer in answers:
        assert answer.shares is not None
        assert answer.answer == [name for name, share in answer.shares.items() if share > 0.5]
    assert answers[0].answer == ["colour", "praise"]
    assert answers[0].to_line().startswith("colour, praise  (") and answers[1].to_line().startswith("none  (")
    write_answers(tmp_path / "a.csv", answers, None)
    assert '"[""colour"", ""praise""]"' in (tmp_path / "a.csv").read_text()

    rows, notes = read_file(loaded.recipe, loaded.head, FORM)
    scored = score_rows(loaded, FORM, rows, notes)
    assert {name: scored.scores[name] for name in result.guess} == pytest.approx(
        {name: result.after[name] for name in result.guess}
    )
    turned = [[1 - place for place in label] if number < 2 else label for number, label in enumerate(rows["label"])]
    wrong = score_rows(loaded, FORM, rows.remove_columns("label").add_column("label", turned), notes)
    assert wrong.intervals.keys() == wrong.scores.keys()
    for name, (low, high) in wrong.intervals.items():
        assert low < wrong.scores[name] < high
