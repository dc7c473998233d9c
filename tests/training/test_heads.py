"""The mean-pooled head on checkpoints as they are published: saved with another head, or with none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_tables import _save_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ziggurat.errors import RecipeError
from ziggurat.training.model.base import HeadSpec, load_base

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40,
}  # fmt: skip
PAIRS = HeadSpec("classification", ["a", "b", "c"], pooling="mean", pair=True)


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(str(folder))
    _save_tokenizer(folder, chat=False)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture", "encoder", "fresh"),
    [
        (BertConfig, BertModel, None, ["classifier"]),
        (BertConfig, BertForPreTraining, "bert", ["classifier"]),
        (RobertaConfig, RobertaForMaskedLM, "roberta", ["classifier", "encoder.pooler.dense"]),
        (MPNetConfig, MPNetForMaskedLM, "mpnet", ["classifier", "encoder.pooler.dense"]),
        (DebertaV2Config, DebertaV2ForMaskedLM, "deberta", ["classifier"]),
    ],
)
def test_the_encoder_has_the_checkpoints_weights(
    config: Any, architecture: Any, encoder: str | None, fresh: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = architecture(config(**SIZES))
    base = load_base(str(saved(tmp_path, model)), PAIRS)
    inner: nn.Module = getattr(model, encoder) if encoder else model
    loaded = base.model.encoder.state_dict()  # type: ignore[operator]
    for name, tensor in inner.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    assert base.head == fresh


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, MPNetForMaskedLM(MPNetConfig(**SIZES)))
    BertConfig(**SIZES).save_pretrained(str(folder))
    with pytest.raises(RecipeError, match="none of the checkpoint's weights fit this bert"):
        load_base(str(folder), PAIRS)


@pytest.mark.parametrize("pooling", ["model", "mean"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_a_head_of_another_size_is_made_afresh(kind: str, pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, n_layers=2, n_heads=2, dim=16, hidden_dim=32, num_labels=5)
    model = AutoModelForSequenceClassification.from_config(config)
    spec = HeadSpec("classification", ["a", "b", "c"], pooling=pooling)
    base = load_base(str(saved(tmp_path, model)), spec)
    assert base.model.config.num_labels == 3 and any("classifier" in module for module in base.head)
    parameters = dict(model.base_model.named_parameters())
    loaded = dict(base.model.base_model.named_parameters())
    same = [name for name in parameters if name in loaded and torch.equal(parameters[name], loaded[name])]
    assert set(parameters) <= {*same, *(name for name in parameters if "pooler" in name)}


def test_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, BertModel(BertConfig(**SIZES)))
    BertConfig(**{**SIZES, "intermediate_size": 48}).save_pretrained(str(folder))
    for pooling in ("model", "mean"):
        with pytest.raises(RecipeError, match=r"is of shape \(32,.*\), its config says \(48,"):
            load_base(str(folder), HeadSpec("classification", ["a", "b"], pooling=pooling))
