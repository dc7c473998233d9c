"""Training steps and scores that don't depend on how many processes and micro-batches they are split over."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from ..folder.checkpoints import Resumable
from . import metrics

#: The key of a batch for the number of its rows that count, those in front; the others repeat the epoch's start.
COUNTED = "counted_rows"


class ExactSteps(Resumable):
    """Mixed into a Trainer: its loss is the mean over a step's examples (or tokens), each counted once.

    Over the micro-batches of all processes L = sum_b (n_b / N) L_b: a batch of n_b examples with the mean loss L_b
    counts by its share of the N of its step. At the end of an epoch accelerate fills the last batches with rows from
    its start, so that all processes have equally many; these are left out.
    """

    # transformers assumes that a model which takes any keyword divides by `num_items_in_batch` itself. BERT doesn't:
    # its loss would be summed over processes and micro-batches.
    loss_is_scaled_for_ga = True
    #: The weight of each class in the loss; None: all 1.
    class_weights: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if self.args.world_size == 1:
            return batches, sum(labelled(batch["labels"]) for batch in batches)
        for batch in batches:
            batch[COUNTED] = labelled(batch["labels"])
        if batches and (counted := counted_rows(self, self.args.per_device_train_batch_size)) is not None:
            # One row stays even if none counts: every process has to run the model.
            last = {name: value[: max(counted, 1)] for name, value in batches[-1].items() if isinstance(value, Tensor)}
            batches[-1] = {**batches[-1], **last, COUNTED: labelled(batches[-1]["labels"][:counted])}
        number = torch.tensor([sum(batch[COUNTED] for batch in batches)], device=device)
        return batches, self.accelerator.gather(number).sum()

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        counted = inputs.pop(COUNTED, labelled(inputs["labels"]))
        outputs = model(**inputs)
        loss = outputs["loss"]
        if self.class_weights is not None and model.training:
            weights = self.class_weights.to(inputs["labels"].device)[inputs["labels"]]
            loss = (cross_entropy(outputs["logits"].float(), inputs["labels"], reduction="none") * weights).mean()
        if num_items_in_batch is not None:
            # The processes' gradients are averaged: multiplying by their number gives the sum.
            loss = loss * (counted * self.args.world_size / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class ExactTrainer(ExactSteps, Trainer):
    """A Trainer for scored tasks."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if output.metrics is not None and name in output.metrics:
            # transformers averages over batches, of which the last holds rows again.
            output.metrics[name] = metrics.mean_loss(output.predictions, output.label_ids)
        return output


def labelled(labels: Tensor) -> int:
    """The number of items of a batch's mean loss: its rows, or its tokens if these have the labels."""
    of_tokens = labels.dim() == 2 and not labels.is_floating_point()
    return int(labels.ne(-100).sum()) if of_tokens else len(labels)


class TokenLoss:
    """Mixed into a Trainer: the loss of scoring is the mean over all tokens at once, and comes with the perplexity.

    Perplexity is exp(L), L = -sum_i ln p(token_i | before) / number of tokens, over all validation texts.
    """

    #: The first place of a row whose label counts.
    first = 0

    def prediction_step(
        self: Any, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if (counted := counted_rows(self, self.args.per_device_eval_batch_size)) is not None:
            inputs["labels"][counted:] = -100
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        tokens = inputs["labels"][:, self.first :].ne(-100).sum().to(loss)
        total = torch.where(tokens > 0, loss * tokens, 0.0)  # the mean over no token is NaN
        self._sums += self.accelerator.gather(torch.stack([total, tokens])[None]).sum(0).cpu().double()
        return loss, outputs, labels

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        total, tokens = self._sums.tolist()
        if tokens:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = total / tokens
            output.metrics[f"{prefix}_perplexity"] = metrics.perplexity(total / tokens)
        return output


def exact_sft(base: type) -> type:
    """TRL's SFTTrainer `base`, with loss and perplexity of every token once, however the texts are split."""

    class ExactSFTTrainer(TokenLoss, Resumable, base):
        """SFTTrainer that reports the perplexity beside the loss, so that it can be watched and chosen by."""

        first = 1  # the first token has no context to be predicted from

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
            batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
            if batches and (counted := counted_rows(self, self.args.per_device_train_batch_size)) is not None:
                batches[-1]["labels"][counted:] = -100
                number = self._get_num_items_in_batch(batches, device)
            return batches, number

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # In scoring the mean over this process's tokens is wanted, to be weighted by `TokenLoss`.
            number = num_items_in_batch if self.model.training else None
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=number)

    return ExactSFTTrainer


def counted_rows(trainer: Trainer, size: int) -> int | None:
    """The number of new rows in the data's last batch of `size`. None: all, or it isn't the last batch.

    The processes have consecutive batches of the last round, and only the first N mod (processes x size) of its rows
    are new. accelerate's own `remainder` ignores the processes when a resumed run skips batches.
    """
    state, processes = trainer.accelerator.gradient_state, trainer.args.world_size
    rows: Any = getattr(state.active_dataloader, "dataset", None)
    if processes == 1 or not state.end_of_dataloader or not hasattr(rows, "__len__"):
        return None
    new_rows = len(rows) % (processes * size)
    return min(max(new_rows - trainer.args.process_index * size, 0), size) if new_rows else None
