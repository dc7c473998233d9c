"""Reading an adapter's folder: its config, its tensors' shapes, and the base model it belongs to."""

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import own_file, read_config, stored_tensors
from ziggurat.host.base.vocabulary import base_name, fit_vocabulary
from ziggurat.host.method_layer import layers_of
from ziggurat.host.values import shown

#: A number of labels that is no other size in any model, to find the dimension of the labels in a shape.
_PROBE = 7919
#: Tasks whose models have no labels.
_NO_LABELS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.FEATURE_EXTRACTION)

AUTO_CLASSES = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def adapter_config(folder: str | Path) -> PeftConfig:
    """The config of the adapter in `folder`.

    Raises:
        ConfigError: no such folder (with the nearest names), no adapter in it, an invalid config, files that are links
            out of the folder, or weights that are missing or a pickle.
    """
    folder = Path(folder)
    if folder.is_file():
        where = f" Name its folder: {folder.parent}." if (folder.parent / CONFIG_NAME).is_file() else ""
        raise ConfigError(f"{folder} is a file; an adapter is a folder with {CONFIG_NAME} and its weights.{where}")
    if not folder.is_dir():
        recipe = folder.suffix in (".yaml", ".yml")  # `ziggurat analyze` takes one too
        entries = folder.parent.iterdir() if folder.parent.is_dir() else ()
        siblings = [p.name for p in entries if (p.suffix == folder.suffix if recipe else p.is_dir())]
        near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(str(folder.parent / name) for name in near)}?" if near else ""
        raise ConfigError(f"there is no {'file' if recipe else 'folder'} {folder}.{hint}")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(p.parent for p in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" Adapters lie in {', '.join(map(str, inside))}." if inside else ""
        raise ConfigError(f"{folder} is no adapter: it has no {CONFIG_NAME}.{hint}")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickled = f" It has {WEIGHTS_NAME}, a pickle, which is never read." if (folder / WEIGHTS_NAME).is_file() else ""
        raise ConfigError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}.{pickled}")
    own_file(folder, SAFETENSORS_WEIGHTS_NAME)
    kind = read_config(folder).get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(
            f"{folder / CONFIG_NAME}: unknown PEFT method {shown(kind)}. Install the package that brings it, or name "
            "its Python file or module by --plugin; in Python, import it first. Its README.md may say where it "
            "comes from."
        )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].from_pretrained(str(folder))
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / CONFIG_NAME} is no config of {kind}: {error}.") from error


def tensor_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in the adapter's file, read from its header alone.

    Raises:
        ConfigError: the file isn't readable as safetensors.
    """
    return {name: stored.shape for name, stored in stored_tensors(folder).items()}


def load_base(folder: str | Path, base_model: str | None = None, *, on_meta: bool = False, **kwargs: Any) -> nn.Module:
    """The base model of the adapter in `folder`: the one that its config names, or `base_model`.

    `on_meta`: the architecture alone, without weights. The number of labels, and of rows of resized embeddings, is
    taken from the adapter's file. Code in the base model's folder is never run, unless `trust_remote_code=True` is
    among `kwargs`.

    Raises:
        ConfigError: the config doesn't say which model or which task it is for, or the model can't be found.
    """
    config = adapter_config(folder)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{folder} doesn't say which base model it belongs to: give it (base_model=, --base).")
    auto = _auto_class(config, folder)
    import transformers

    saved = tensor_shapes(folder)
    extra: dict[str, Any] = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
    try:
        if config.task_type not in _NO_LABELS:
            extra |= _other_labels(auto, transformers.AutoConfig.from_pretrained(name, **extra), saved)
        if on_meta:
            model = _on_meta(auto, transformers.AutoConfig.from_pretrained(name, **extra))
        else:
            # The checkpoint's own head may have other labels; the adapter's file brings the one that was trained.
            model = auto.from_pretrained(name, ignore_mismatched_sizes="num_labels" in extra, **extra, **kwargs)
    except OSError as error:
        raise ConfigError(
            f"the base model {name!r} of {folder} can't be loaded: {error}. Give the folder where it lies "
            "(base_model=, --base)."
        ) from error
    fit_vocabulary(model, saved)
    return model


def load_adapter(folder: str | Path, base: nn.Module) -> PeftModel:
    """`base` with the adapter in `folder` put in, ready for inference.

    Raises:
        ConfigError: the adapter's tensors have other shapes than `base` asks for.
    """
    on_meta = any(p.is_meta for p in base.parameters())
    try:
        model = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=on_meta).eval()
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = str(error).partition("size mismatch for ")[2].strip()
        raise ConfigError(
            f"the adapter in {folder} doesn't fit its base model: {mismatch} "
            "Name the model that it was trained on; if its vocabulary has grown, a model that was saved after that."
        ) from error
    for layer in layers_of(model, "default") if on_meta else ():
        layer.draw_seeded("default")
    return model


def _auto_class(config: PeftConfig, folder: str | Path) -> Any:
    import transformers

    if config.task_type is not None:
        return getattr(transformers, AUTO_CLASSES[TaskType(config.task_type)])
    mapping = config.auto_mapping or {}
    library, name = (str(mapping.get(key, "")) for key in ("parent_library", "base_model_class"))
    # Only models of transformers: a config from elsewhere must not make other code run.
    if library.split(".")[0] == "transformers":
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and (
            issubclass(model_class, transformers.PreTrainedModel) or name.startswith("AutoModel")
        ):
            return model_class
    raise ConfigError(
        f"{folder} doesn't name the task of its model (task_type is empty and auto_mapping names "
        f"{name or 'no class'!r}). Load the base model yourself and use ziggurat.export.export_model."
    )


def _on_meta(auto: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto.from_config(config) if hasattr(auto, "from_config") else auto(config)


def _other_labels(auto: Any, config: Any, saved: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of labels, if the head among `saved` (name -> shape in an adapter's file) has others than `config`."""
    shapes = {base_name(name): shape for name, shape in saved.items()}
    probe = copy.deepcopy(config)
    probe.num_labels = _PROBE
    for name, weight in _on_meta(auto, probe).named_parameters():
        if _PROBE in weight.shape and len(shapes.get(name, ())) == weight.dim():
            labels = shapes[name][list(weight.shape).index(_PROBE)]
            return {} if labels == config.num_labels else {"num_labels": labels}
    return {}
