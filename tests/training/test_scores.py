"""Metrics against their definitions, the mean-pooled head against its formula, batches, and counts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ziggurat.nearest import nearest
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.heads import MeanPooledClassifier, mean_pool
from ziggurat.training.loop import metrics


def _recipe(task: str):
    return make_recipe({"task": task, "model": "m", "data.train": "a", "method.name": "lora"})


def test_classification_scores_by_definition() -> None:
    labels, classes = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    tp, fp, fn, tn = 2, 1, 1, 4
    actual = metrics.score(_recipe("classification"), np.eye(2)[classes], labels, 2)
    matthews = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert actual["accuracy"] == pytest.approx(100 * 6 / 8)
    assert actual["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    assert actual["matthews"] == pytest.approx(100 * matthews)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), min_size=1))
    )
)
def test_classification_scores_are_those_of_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes, pairs = drawn
    labels, answers = np.array(pairs).T
    as_floats = metrics.score(_recipe("classification"), answers.astype(float), labels.astype(float), classes)
    average = "binary" if classes <= 2 else "macro"
    expected = {
        "accuracy": accuracy_score(labels, answers),
        "f1": f1_score(labels, answers, average=average, zero_division=0),
        "matthews": matthews_corrcoef(labels, answers),
    }
    actual = metrics.score(_recipe("classification"), answers, labels, classes)
    assert (
        actual == as_floats == pytest.approx({name: 100 * float(value) for name, value in expected.items()}, abs=1e-9)
    )


@pytest.mark.parametrize("as_scores", [True, False])
def test_f1_of_three_classes_is_a_mean_also_where_the_last_never_occurs(as_scores: bool) -> None:
    labels, answers = np.array([0, 0, 1, 1, 0]), np.array([0, 0, 0, 1, 0])
    of_each = (2 * 3 / (2 * 3 + 1), 2 * 1 / (2 * 1 + 1))  # 2 tp / (2 tp + fp + fn) of classes 0 and 1
    predictions = np.eye(3)[answers] if as_scores else answers
    actual = metrics.score(_recipe("classification"), predictions, labels, 3)
    assert actual["f1"] == pytest.approx(100 * sum(of_each) / 2)
    assert metrics.score(_recipe("classification"), answers, labels, 2)["f1"] == pytest.approx(100 * of_each[1])


def test_regression_scores_by_definition() -> None:
    truth, guess = np.array([1.0, 2.0, 4.0, 3.0]), np.array([[1.0], [3.0], [5.0], [3.5]])
    actual = metrics.score(_recipe("regression"), guess, truth, 0)
    assert actual["pearson"] == pytest.approx(100 * np.corrcoef(guess[:, 0], truth)[0, 1])
    assert actual["spearman"] == pytest.approx(100.0)
    assert actual["rmse"] == pytest.approx(float(np.sqrt(np.mean((guess[:, 0] - truth) ** 2))))


def test_guessing_takes_the_class_of_the_training_data() -> None:
    actual = metrics.guessing(_recipe("classification"), np.array([0, 2, 2]), np.array([2, 0, 0, 0]), 3)
    assert actual["accuracy"] == 25.0 and actual["matthews"] == 0.0
    assert metrics.guessing(_recipe("regression"), np.array([1.0, 3.0]), np.array([1.0, 3.0]), 0)["pearson"] == 0.0


def test_perplexity_never_overflows() -> None:
    assert metrics.perplexity(0.0) == 1.0 and metrics.perplexity(1e6) == float("inf")


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10_000))
def test_padding_does_not_move_the_mean(length: int, padding: int, seed: int) -> None:
    states = torch.randn(2, length + padding, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.zeros(2, length + padding, dtype=torch.long)
    mask[:, :length] = 1
    torch.testing.assert_close(mean_pool(states, mask), states[:, :length].mean(1), rtol=1e-10, atol=1e-10)


def _head(labels: int, pair: bool) -> MeanPooledClassifier:
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels, config.mean_pooled_pair = labels, pair
    return MeanPooledClassifier(config).double().eval()


def test_the_pair_head_is_its_formula() -> None:
    model = _head(3, pair=True)
    ids = torch.tensor([[[3, 4, 5], [6, 7, 0]], [[8, 9, 0], [3, 4, 5]]])
    mask = (ids != 0).long()
    encoded = [mean_pool(model.encoder(ids[:, i], mask[:, i]).last_hidden_state, mask[:, i]) for i in (0, 1)]
    u, v = encoded
    features = torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
    expected = features @ model.classifier.weight.T + model.classifier.bias
    actual = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(actual.logits, expected, rtol=1e-10, atol=1e-10)
    loss = torch.nn.functional.cross_entropy(expected.float(), torch.tensor([0, 2]))
    torch.testing.assert_close(actual.loss, loss, rtol=1e-5, atol=1e-6)


def test_one_label_is_regression_and_a_single_text_is_refused_by_a_pair_head() -> None:
    model = _head(1, pair=False)
    ids, truth = torch.tensor([[3, 4], [5, 6]]), torch.tensor([0.5, -1.0])
    actual = model(input_ids=ids, labels=truth)
    expected = ((actual.logits[:, 0].float() - truth) ** 2).mean()
    torch.testing.assert_close(actual.loss, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"takes two texts, input_ids of shape \(batch, 2, length\)"):
        _head(2, pair=True)(input_ids=ids)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lr", "train.lr"), ("method.R", "method.r"), ("train.epoch", "train.epochs"), ("zzz", None)],
)
def test_the_nearest_name(wrong: str, right: str | None) -> None:
    assert nearest(wrong, ["method.r", "train.lr", "train.epochs", "train.batch"]) == right
