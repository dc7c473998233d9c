"""A classifier on the mean-pooled states of an encoder, for one text or two."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are no padding: (batch, length, d), (batch, length) -> (batch, d).

    u = sum_t m_t h_t / max(1, sum_t m_t) [Reimers & Gurevych 2019].
    """
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class MeanPooledClassifier(PreTrainedModel):
    r"""Any encoder with a linear head on its mean-pooled states: (batch, length) ids -> (batch, labels) scores.

    One text: W [u]. Two texts, encoded separately as in the training of sentence encoders: W [u, v, |u - v|, u * v]
    [Conneau et al. 2017]. With one label the loss is the mean squared error, else cross-entropy. Sentence encoders such
    as all-MiniLM learn slowly through a fresh head on the first token, which their training never used, and fast
    through this one. With labels of shape (batch, labels), each 0 or 1, the loss is the mean binary cross-entropy.

    The config carries `mean_pooled_pair` (two texts) and `mean_pooled_dropout`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        if config._attn_implementation == "sdpa" and not AutoModel._model_mapping[type(config)]._supports_sdpa:  # type: ignore[attr-defined]
            config._attn_implementation = "eager"  # else the encoder (MPNet's) refuses this class's choice
        self.encoder = AutoModel.from_config(config)
        self.pair = bool(getattr(config, "mean_pooled_pair", False))
        self.dropout = nn.Dropout(float(getattr(config, "mean_pooled_dropout", 0.0)))
        self.classifier = nn.Linear(config.hidden_size * (4 if self.pair else 1), int(config.num_labels or 2))
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, length) ids, or (batch, 2, length) for two texts -> (batch, d) or (batch, 4 d)."""
        if not self.pair:
            return self._means(input_ids, attention_mask)
        # Both texts go through the encoder in one call: half the kernel launches, one low-rank product per layer.
        mask = attention_mask.flatten(0, 1) if attention_mask is not None else None
        u, v = self._means(input_ids.flatten(0, 1), mask).unflatten(0, (-1, 2)).unbind(1)
        return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        if input_ids is None:
            raise ValueError("MeanPooledClassifier needs input_ids")
        if self.pair and (input_ids.dim() != 3 or input_ids.shape[1] != 2):
            raise ValueError(
                f"this head takes two texts, input_ids of shape (batch, 2, length), got {tuple(input_ids.shape)}"
            )
        logits = self.classifier(self.dropout(self.features(input_ids, attention_mask)).to(self.classifier_dtype))
        loss = None
        if labels is not None:
            if labels.dim() == 2:
                loss = functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
            elif logits.shape[-1] == 1:
                loss = functional.mse_loss(logits.squeeze(-1).float(), labels.float())
            else:
                loss = functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @property
    def classifier_dtype(self) -> torch.dtype:
        return next(self.classifier.parameters()).dtype

    def _means(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        # Without a mask the encoder gets none either: it would have to read a mask's values.
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return mean_pool(states, mask if mask is not None else torch.ones_like(ids))
