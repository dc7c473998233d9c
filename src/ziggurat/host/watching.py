"""The callback that looks at a training run as it begins. It loads transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ziggurat.host.lifecycle import Watch, check_something_trains


class TrainingWatch(TrainerCallback):
    """Says so where no parameter of an adapter trains. Rides along in every Trainer."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        check_something_trains(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        Watch.reset(model)
