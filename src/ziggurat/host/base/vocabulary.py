"""Embeddings that were resized after the base model was made: finding them, and resizing a fresh base."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ziggurat.errors import ConfigError
from ziggurat.host.base.unwrap import PREFIX, unwrap

#: Parts that wrappers add to the names of the weights that they hold.
_WRAPPED = frozenset({"base_layer", "original_module", "modules_to_save", "token_adapter"})


def base_name(name: str) -> str:
    """The name in the base model of a tensor in an adapter's file."""
    return ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in _WRAPPED)


def embedding_paths(model: nn.Module) -> list[str]:
    """The paths of the input and the output embeddings of a transformers model; empty for other models."""
    layers: list[Any] = []
    untyped: Any = model
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(untyped, getter)())
        except (AttributeError, NotImplementedError):
            continue
    held = {id(layer) for layer in layers if isinstance(layer, nn.Module)}
    return [path for path, module in model.named_modules() if id(module) in held]


def check_rows(model: nn.Module, rows: list[int] | dict[str, list[int]] | None) -> None:
    """Raise ConfigError if `rows`, an adapter's `trainable_token_indices`, name rows that an embedding doesn't have."""
    if rows is None:
        return
    by_name = rows if isinstance(rows, dict) else dict.fromkeys(embedding_paths(model)[:1], rows)
    for path, module in model.named_modules():
        numbers = next((listed for name, listed in by_name.items() if f".{path}".endswith(f".{name}")), [])
        if not numbers:
            continue
        weight = getattr(module, "weight", None)
        # A weight that DeepSpeed has split has no rows here.
        size = getattr(module, "num_embeddings", None) or (0 if weight is None else len(weight))
        if size and max(numbers) >= size:
            raise ConfigError(
                f"trainable_token_indices names row {max(numbers)}, and {path!r} has the rows 0 to {size - 1}. "
                "For new tokens, call model.resize_token_embeddings first."
            )


def embedding_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The members of `names`, tensors of a model with adapters, that are embedding weights of `model`, its base."""
    weights = {f"{path}.weight" for path in embedding_paths(model)}
    return {name for name in names if base_name(name) in weights}


def fit_vocabulary(model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Resize the embeddings of `model` to their number of rows in `saved`, name -> shape of an adapter's file."""
    shapes = {base_name(name): shape for name, shape in saved.items()}
    for path in embedding_paths(model):
        weight = getattr(model.get_submodule(path), "weight", None)
        shape = shapes.get(f"{path}.weight")
        if weight is not None and shape is not None and weight.shape[1:] == shape[1:] and len(weight) != shape[0]:
            model.resize_token_embeddings(shape[0], mean_resizing=False)  # type: ignore[operator]
            return


def grown_beside_adapters(model: Any, adapter: PeftConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The resized embeddings in `state`, the tensors of `model`, that an adapter's file must hold.

    Empty unless the adapter changes an embedding: PEFT then saves that layer alone; otherwise it saves all of them
    itself.
    """
    base = unwrap(model)[0]
    layers = [base.get_submodule(path) for path in embedding_paths(base)]
    if not any(isinstance(layer, BaseTunerLayer | TrainableTokensWrapper) for layer in layers):
        return {}
    if not has_grown(base, adapter):
        return {}
    names = {name for name in embedding_names(base, state) if ".original_module." not in name}
    return {name: state[name] for name in names}


def has_grown(model: nn.Module, adapter: PeftConfig) -> bool:
    """Whether the vocabulary size of `model` differs from its base's; False if the base can't be found."""
    config: Any = getattr(model, "config", None)
    name = adapter.base_model_name_or_path
    if not name or not hasattr(config, "get_text_config"):
        return False
    size = _vocabulary_size(type(config), str(name), adapter.revision)
    return size is not None and size != getattr(config.get_text_config(), "vocab_size", None)


@cache  # a training loop asks after each step
def _vocabulary_size(config_class: Any, name: str, revision: str | None) -> int | None:
    try:
        base = config_class.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
    return getattr(base.get_text_config(), "vocab_size", None)
