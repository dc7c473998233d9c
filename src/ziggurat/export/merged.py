"""The base model with an adapter merged in, as a folder of its own."""

from pathlib import Path
from typing import Any

from torch import nn

from ziggurat.files.staging import written_beside
from ziggurat.host.base.tied import note_untied, untie
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.method import method_of
from ziggurat.host.plain import bare, lora_pairs
from ziggurat.host.saved.folder import adapter_config, load_adapter, load_base

from .beside import copy_tokenizer, name_labels, put_tokenizer, save_tokenizer
from .content import check_complete


def merge(adapter: str | Path, out: str | Path, *, base_model: str | None = None) -> Path:
    """Write the base model with the adapter in the folder `adapter` merged in, and its tokenizer, to `out`.

    The model keeps its dtype and generation settings; a classifier takes the names of the labels
    from the adapter's run.json, if `ziggurat train` wrote one. LoR2C's paths can't be merged into weights: the
    folder then brings their code along, and loads with `trust_remote_code=True`, without ziggurat.

    Raises:
        ConfigError: `adapter` is no adapter's folder, or its base model can't be loaded.
        ExportError: `out` is taken, the method can't be merged into weights, or the adapter's file lacks tensors.
    """
    source = Path(adapter)
    with written_beside(Path(out)) as folder:
        model = load_adapter(source, load_base(source, base_model))
        check_complete(source, model)
        name_labels(source, bare(model).config)
        _write_merged(model, folder)
        copy_tokenizer(source, folder)
        if not any(folder.glob("tokenizer*")):
            save_tokenizer(base_model or str(adapter_config(source).base_model_name_or_path), folder)
    return Path(out)


def merge_model(model: nn.Module, out: str | Path, tokenizer: Any = None) -> Path:
    """Write `model` with its active adapter merged in, and `tokenizer`, to the folder `out`. As `merge`, in memory.

    The adapter is gone from `model` afterwards, unless its method can't be merged into weights.

    Raises:
        ExportError: `out` is taken, or the method can't be merged into weights.
    """
    with written_beside(Path(out)) as folder:
        _write_merged(model, folder)
        put_tokenizer(tokenizer, folder)
    return Path(out)


def _write_merged(model: Any, folder: Path) -> None:
    method = method_of(next(iter(getattr(model, "peft_config", {}).values()), None))
    if method is not None and method.write is not None:  # no weight can absorb the update
        method.write(model, folder)
        return
    if any(isinstance(module, AdaptedLinear) or hasattr(module, "cannot_export") for module in model.modules()):
        lora_pairs(model)  # raises, with the reason, if the update isn't one of weights
    untie(bare(model))
    merged = model.merge_and_unload(safe_merge=True)
    note_untied(merged)
    merged.save_pretrained(str(folder))
