"""Features that older versions lack, under the names of the newest. A part goes when LOWEST in supported.py passes it.

transformers 5.23 renames gradient checkpointing to activation checkpointing. PEFT 0.21 has an error class of its own
for targets that match nothing, which was a ValueError before. PEFT 0.20 has backends that read and write quantised
weights; before it, quantised linear layers train by their own forward, and nothing is merged into them. torch 2.8
exposes the hooks on autograd's saved tensors; before it, a checkpoint between linear layers that read one input would
go unnoticed.
"""

from functools import cache
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner

from ziggurat.errors import ConfigError
from ziggurat.host.method import needs_steps

try:
    from peft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError  # pyright: ignore[reportAssignmentType]
except ImportError:

    class NoMatchingPeftModuleError(ValueError):
        """No module of the model is a target."""


try:
    from peft.utils import quantization_utils

    ForwardOnlyQuantizationBackend = quantization_utils.ForwardOnlyQuantizationBackend  # pyright: ignore
    resolve_quantization_backend = quantization_utils.resolve_quantization_backend
except (ImportError, AttributeError):

    class ForwardOnlyQuantizationBackend:
        """A quantised weight that computes but is neither read nor changed."""

        supports_merge = False

        def __init__(self, backend_name: str = "") -> None:
            self.backend_name = backend_name

        def maybe_clone_base_result(self, y: Any) -> Any:
            """A copy: what bitsandbytes returns may be a view that must not be changed in place."""
            return y.clone()

    def resolve_quantization_backend(base_layer: Any, **kwargs: Any) -> Any:
        """None: no backend reads or changes quantised weights in this PEFT."""


#: Whether linear layers that read one input can go down together, see siblings.py.
SHARES = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # pyright: ignore[reportAttributeAccessIssue]


def as_no_match(error: ValueError) -> ValueError:
    """`error`, or PEFT's own class for it if the text says that no target was found."""
    says = any(text in str(error) for text in ("not found in the base model", "No modules were targeted"))
    return NoMatchingPeftModuleError(str(error)) if says and type(error) is ValueError else error


def check_saved_whole(config: Any) -> None:
    """Raise ConfigError if PEFT before 0.21 would save or load this adapter without a part that it trains.

    Before 0.21 PEFT saves the factors alone. So biases would be lost, and so would the structure of a LoR2C adapter
    that merges and injects when a Trainer resumes or loads its best checkpoint. An adapter whose training is over has
    its structure in its config.
    """
    if hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    if config.bank is not None:
        raise ConfigError(
            f"an adapter of a set: PEFT {peft.__version__} would leave the tensors that lie in the set's bank as they "
            "are made afresh. Install peft>=0.21."
        )
    lost = [f"bias={config.bias!r}"] if config.bias != "none" else []
    if config.no_factors and not config.inference_mode and needs_steps(config):
        settings = [f"{name}={getattr(config, name)}" for name in config.method.step_fields if getattr(config, name)]
        lost += settings or ["the sharing that training changes"]
    if lost:
        raise ConfigError(
            f"{', '.join(lost)}: PEFT {peft.__version__} saves an adapter's factors only, so the values that this "
            "trains would be lost. Install peft>=0.21, or take the field's default."
        )


def check_finds_parameters() -> None:
    """Raise ConfigError if this PEFT looks for target_parameters in another way than the tuner answers it."""
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        raise ConfigError(
            f"target_parameters: PEFT {peft.__version__} finds parameters of experts for its LoRA alone. Install "
            "peft>=0.21, or take target_parameters out."
        )


@cache
def trainer_counts_shifted_labels() -> bool:
    """Whether Trainer's `num_items_in_batch` leaves out each row's first label, which no causal model predicts."""
    from transformers import Trainer  # which takes a second to load

    return "_loss_shifts_labels" in Trainer.__init__.__code__.co_names


def checkpointing_argument() -> str:
    """The name of TrainingArguments' field for gradient checkpointing."""
    from transformers import TrainingArguments  # which takes a second to load

    newest = "activation_checkpointing"
    return newest if hasattr(TrainingArguments, newest) else "gradient_checkpointing"
