"""Adding a method's callback to every transformers Trainer, so that nobody has to add it by hand."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainerCallback


def ride_along(callback: "type[TrainerCallback]") -> None:
    """Give each Trainer made from now on (TRL's are Trainers too) one `callback()`. Asking twice adds it once.

    A tuner calls this when it adds an adapter that needs the callback, before the Trainer is made: transformers'
    Trainer starts from a list of default callbacks, which this extends. The callback must do nothing for models without
    its method.
    """
    from transformers import trainer

    defaults: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if callback not in defaults:
        defaults.append(callback)
