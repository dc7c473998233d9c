"""Words with BIO tags, to entities and their scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_tables import tiny_recipe, write_csv, write_jsonl

from word_tokenizer import byte_tokenizer
from ziggurat.errors import DataError
from ziggurat.evaluation.own import read_file, score_rows
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.answers.predict import predict, read_texts
from ziggurat.training.data.encode import Collator, encode
from ziggurat.training.data.examples import load_examples
from ziggurat.training.loop import metrics
from ziggurat.training.loop.entities import entities, entity_scores
from ziggurat.training.loop.run import train

FORM = Path(__file__).parents[1] / "forms" / "tagged.jsonl"


def recipe(data: Path, **more: Any):
    values = {"task": "tokens", "model": "m", "data.train": str(data), "method.name": "lora"}
    return make_recipe(values | {key.replace("__", "."): value for key, value in more.items()})


def test_lists_and_texts_with_blanks_are_the_same_words(tmp_path: Path) -> None:
    examples = load_examples(recipe(FORM, data__validation=str(FORM)))
    assert examples.label_names == ["O", "B-who", "I-who", "B-work", "I-work"]
    assert examples.train[0] == {
        "tokens": ["the", "actor", "one", "was", "good", "and", "film"],
        "label": [0, 1, 2, 0, 0, 0, 3],
    }
    rows = [{"words": "the actor one", "ner": "O B-who I-who"}, {"words": "the film", "ner": "O B-work"}]
    path = write_csv(tmp_path / "a.csv", rows)  # type: ignore[arg-type]
    named = {"data__columns__tokens": "words", "data__columns__tags": "ner", "data__validation": str(path)}
    assert load_examples(recipe(path, **named)).train[0] == {"tokens": ["the", "actor", "one"], "label": [0, 1, 2]}
    numbered = write_jsonl(tmp_path / "b.jsonl", [{"tokens": ["a", "b"], "tags": [1, 2]}])
    names = ["O", "B-x", "I-x"]
    examples = load_examples(recipe(numbered, data__validation=str(numbered), data__label_names=names))
    assert (examples.label_names, examples.train[0]["label"]) == (names, [1, 2])


def test_rows_that_are_not_in_bio_are_named_at_once(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["a", "b"], "tags": ["O", "I-x"]},
        {"tokens": ["a", "b"], "tags": ["B-y", "I-x"]},
        {"tokens": ["a", "b"], "tags": ["O", "X"]},
        {"tokens": ["a", "b"], "tags": ["O"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a", " "], "tags": ["O", "O"]},
    ]
    with pytest.raises(DataError) as error:
        load_examples(recipe(write_jsonl(tmp_path / "a.jsonl", rows)))
    for line in (
        "row 1: I-x follows O: an entity begins with B-",
        "row 2: I-x follows B-y: an entity begins with B-",
        "row 3: 'X' is no BIO tag: O, B-<kind> or I-<kind>",
        "row 4: the numbers of words and of tags differ",
        "row 5: no words, or no tags",
        "row 6: a word is empty, or no text",
    ):
        assert line in str(error.value)
    plain = write_jsonl(tmp_path / "b.jsonl", [{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(DataError, match=r"every word of .* is tagged O, so there is no entity to learn"):
        load_examples(recipe(plain))
    new = write_jsonl(tmp_path / "c.jsonl", [{"tokens": ["a"], "tags": ["B-place"]}])
    with pytest.raises(DataError, match=r"c.jsonl has 'B-place'; known: 'O', 'B-who', 'I-who', 'B-work', 'I-work'"):
        load_examples(recipe(FORM, data__validation=str(new)))


def test_the_first_token_of_a_word_has_its_label_and_batches_are_filled_up() -> None:
    from datasets import Dataset

    tokenizer = byte_tokenizer([], pad_token="<p>", unk_token="<p>")
    table = Dataset.from_dict({"tokens": [["ab", "c", "def"], ["g"]], "label": [[1, 0, 2], [1]]})
    encoded, lengths = encode(table, tokenizer, 5, separate=False)
    assert lengths == [6, 1]
    assert list(encoded["labels"]) == [[1, -100, 0, 2, -100], [1]]
    batch = Collator(tokenizer)([dict(row) for row in encoded])
    assert batch["labels"].tolist() == [[1, -100, 0, 2, -100], [1, -100, -100, -100, -100]]
    tokenizer.padding_side = "left"
    batch = Collator(tokenizer)([dict(row) for row in encoded])
    assert batch["labels"].tolist()[1] == [-100, -100, -100, -100, 1]
    assert (batch["labels"][1] != -100).equal(batch["attention_mask"][1].bool())


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-x I-x O", {("x", 1, 3)}),
        ("B-x B-x I-y", {("x", 0, 1), ("x", 1, 2), ("y", 2, 3)}),
        ("I-x I-x O I-y", {("x", 0, 2), ("y", 3, 4)}),  # as models predict, and seqeval counts
        ("B-x O I-x", {("x", 0, 1), ("x", 2, 3)}),
        ("O O", set()),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_entities(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == spans


def test_scores_of_entities_by_hand() -> None:
    # seqeval's own example: one of two entities is found with both its ends.
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    answers = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    scores = entity_scores(truth, answers)
    assert (scores["entity_f1"], scores["entity_precision"], scores["entity_recall"]) == (50.0, 50.0, 50.0)
    assert scores["token_accuracy"] == pytest.approx(80.0)
    nothing = entity_scores([["O"]], [["O"]])
    assert nothing["entity_f1"] == 0.0 and nothing["token_accuracy"] == 100.0


def test_the_loss_is_the_mean_over_labelled_tokens() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(2, 3, 4)), np.array([[0, 3, -100], [2, -100, -100]])
    wanted = torch.nn.functional.cross_entropy(torch.tensor(scores).flatten(0, 1), torch.tensor(labels).flatten())
    assert metrics.mean_loss(scores, labels) == pytest.approx(float(wanted), rel=1e-10)
    assert metrics.mean_loss(scores[..., :1], np.minimum(labels, 0)) == 0.0  # a single tag is certain


def test_trained_asked_and_scored(tiny_bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "tagged.jsonl"
    data.write_text(FORM.read_text() * 4)
    keys = {"task": "tokens", "data__validation": str(FORM), "data__validation_rows": None, "train__epochs": 8}
    result = train(tiny_recipe(tiny_bert, data, tmp_path / "run", **keys))
    assert result.metric == "entity_f1" and result.after["entity_f1"] > 90.0
    assert result.after["loss"] < result.before["loss"] / 2
    assert result.example[0].split()[0] == "the"

    loaded = load_adapter_model(tmp_path / "run")
    predictions = predict(loaded, ["the actor one was bad", ["the", "actor", "two", "was", "good"]])
    assert predictions[0].answer == [{"kind": "who", "text": "actor one", "start": 4, "end": 13}]
    assert predictions[1].text == "the actor two was good" and predictions[1].to_line() == "who: actor two"
    words, _ = read_texts(FORM, loaded)
    assert words[1] == ["the", "actor", "two", "was", "bad"]

    rows, notes = read_file(loaded.recipe, loaded.head, FORM)
    scored = score_rows(loaded, FORM, rows, notes)
    assert scored.scores == pytest.approx({name: result.after[name] for name in scored.scores})
    others = [
        [(place + 1) % 3 for place in label] if number < 2 else label for number, label in enumerate(rows["label"])
    ]
    wrong = score_rows(loaded, FORM, rows.remove_columns("label").add_column("label", others), notes)
    assert wrong.intervals.keys() == wrong.scores.keys()
    for name, (low, high) in wrong.intervals.items():
        assert low < wrong.scores[name] < high
