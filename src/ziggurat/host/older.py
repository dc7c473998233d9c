"""What older versions lack, under the names that the newest have. A part goes when LOWEST in supported.py passes it.

transformers 5.23 renames gradient checkpointing to activation checkpointing. PEFT 0.21 has an error class of its own
for targets that match nothing, which was a ValueError before. PEFT 0.20 has backends that read and write quantised
weights; before it, quantised linear layers train by their own forward, and nothing is merged into them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft.utils.error import NoMatchingPeftModuleError
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
    from peft.utils.quantization_utils import resolve_quantization_backend
else:
    try:
        from peft.utils.error import NoMatchingPeftModuleError
    except ImportError:

        class NoMatchingPeftModuleError(ValueError):
            """No module of the model is a target."""

    try:
        from peft.utils.quantization_utils import (
            ForwardOnlyQuantizationBackend,
            QuantizationBackend,
            resolve_quantization_backend,
        )
    except ImportError:

        class ForwardOnlyQuantizationBackend:
            """A quantised weight that computes but is neither read nor changed."""

            supports_merge = False

            def __init__(self, backend_name: str = "") -> None:
                self.backend_name = backend_name

            def maybe_clone_base_result(self, y: Any) -> Any:
                """A copy: what bitsandbytes returns may be a view that must not be changed in place."""
                return y.clone()

        QuantizationBackend = ForwardOnlyQuantizationBackend

        def resolve_quantization_backend(base_layer: Any, **kwargs: Any) -> None:
            """No backend reads or changes quantised weights in this PEFT."""


def as_no_match(error: ValueError) -> ValueError:
    """`error`, or PEFT's own class for it if the text says that no target was found."""
    if isinstance(error, NoMatchingPeftModuleError) or "not found in the base model" not in str(error):
        return error
    return NoMatchingPeftModuleError(str(error))


def checkpointing_argument() -> str:
    """What TrainingArguments calls the choice to compute activations again in the backward."""
    from transformers import TrainingArguments  # which takes a second to load

    newest = "activation_checkpointing"
    return newest if hasattr(TrainingArguments, newest) else "gradient_checkpointing"


__all__ = [
    "ForwardOnlyQuantizationBackend",
    "NoMatchingPeftModuleError",
    "QuantizationBackend",
    "as_no_match",
    "checkpointing_argument",
    "resolve_quantization_backend",
]
