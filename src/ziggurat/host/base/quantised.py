"""Linear layers with quantised weights: reading and changing a weight, and the error that a change makes."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from peft.import_utils import is_torchao_available
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ziggurat.host.older import ForwardOnlyQuantizationBackend, resolve_quantization_backend

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ForwardOnly(ForwardOnlyQuantizationBackend):
    """A weight that can be used in a forward but not changed. `way_round`: how to make it changeable, if possible."""

    def __init__(self, backend_name: str, way_round: str = "") -> None:
        super().__init__(backend_name)
        self.way_round = way_round


def backend_of(base: nn.Module, **kwargs: Any) -> Any:
    """The backend that reads and changes the weight of `base`; None for plain floating-point weights.

    `kwargs`: arguments of PEFT's backends (`get_apply_tensor_subclass`, for torchao). An adapter can train beside a
    quantised linear layer of an unknown kind, but can't be merged into it.
    """
    if kwargs.get("get_apply_tensor_subclass") is None and _is_torchao(base):
        return ForwardOnly(
            "torchao",
            "The model doesn't record how torchao's quantize_ was called, so the call can't be repeated: load the "
            "model through transformers with a TorchAoConfig, which keeps that.",
        )
    return resolve_quantization_backend(base, **kwargs) or (
        None if _is_plain(base) else ForwardOnly(type(base).__name__)
    )


def backend_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of PEFT's backends for this model: the function that quantises torchao weights again."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    again = getattr(config, "get_apply_tensor_subclass", None)
    return {} if again is None else {"get_apply_tensor_subclass": again}


def base_weight(layer: BaseTunerLayer) -> Tensor:
    """The weight of `layer`'s base, dequantised if it is quantised."""
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    if layer.quantization_backend is None:
        return weight.data
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # A forward in eval mode made bitsandbytes lay 4-bit weights out for the CPU's matrix units, which its
        # dequantise can't read; writing a state undoes that.
        layer.get_base_layer().state_dict()
    return layer.get_base_weight()


def replace_weight(layer: BaseTunerLayer, weight: Tensor) -> float:
    """Set the weight of `layer`'s base to `weight`, quantised like the old one. Returns ||Q(weight) - weight||_F."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    layer.set_base_weight(weight)
    base = layer.get_base_layer()
    if bias is not None and getattr(base, "bias", None) is None:
        base.bias = bias  # hqq's linear was made anew from its weight alone
    return float((base_weight(layer).float() - weight.float()).norm())


def check_changeable(backend: Any, where: str = "") -> None:
    """Raise unless a weight of `backend` can be changed.

    Raises:
        ValueError: it can't be dequantised, or not be quantised again; the text has a way round it.
    """
    if backend is not None and not backend.supports_merge:
        way = getattr(backend, "way_round", "")
        raise ValueError(
            f"Nothing can be merged into a {backend.backend_name} weight{f' ({where})' if where else ''}: it can't be "
            f"dequantised and quantised again. {f'{way} Or keep' if way else 'Keep'} the adapter beside the model, "
            "export it as plain LoRA with ziggurat.export, or merge it into the unquantised model (`ziggurat merge`) "
            "and quantise that."
        )


@contextmanager
def changing(layers: Iterable[tuple[str, Any]], verb: str) -> Iterator[None]:
    """Context for a merge (or unmerge) of many layers: refuses before any layer is changed, and logs the errors once.

    `layers`: paths and adapted linear layers; only those with quantised weights matter. `verb`: for the log, such as
    "merged into".
    """
    quantised = [(path, layer) for path, layer in layers if layer.quantization_backend is not None]
    for path, layer in quantised:
        check_changeable(layer.quantization_backend, path)
        layer.requantisation_error = None
    yield
    errors = [layer.requantisation_error for _, layer in quantised if layer.requantisation_error is not None]
    if errors:
        logger.warning(
            "%s %d %s weights: quantising them again changed them by %.2g%% of the update's size (median; at most "
            "%.2g%%)",
            *(verb, len(errors), quantised[0][1].quantization_backend.backend_name),
            *(100 * median(errors), 100 * max(errors)),
        )


def _is_torchao(base: nn.Module) -> bool:
    if not is_torchao_available():
        return False
    from torchao.utils import TorchAOBaseTensor  # pyright: ignore[reportMissingImports]

    return isinstance(getattr(base, "weight", None), TorchAOBaseTensor)


def _is_plain(base: nn.Module) -> bool:
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        return False
    # A subclass of Tensor may store its values in another form; a DTensor doesn't.
    return type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "device_mesh")
