"""Base model, head and tokenizer of a recipe."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ziggurat.errors import ConfigError, RecipeError, first_line
from ziggurat.extras import require
from ziggurat.nearest import is_path, missing_path
from ziggurat.recipe.embedded import model_path
from ziggurat.recipe.methods import METHODS
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import NUMBERS, TASKS

from ..heads import MeanPooledClassifier


@dataclass(frozen=True)
class HeadSpec:
    """The head: its labels' names, pooling and dropout, one text or two, and whether the model takes images.

    Stored beside the adapter, needed to reload it.
    """

    task: str
    label_names: list[str]
    pooling: str = "model"
    dropout: float = 0.1
    pair: bool = False
    images: bool = False

    @property
    def num_labels(self) -> int:
        return 1 if self.task in NUMBERS else len(self.label_names)

    @property
    def model(self) -> str:
        """transformers' name of such models, after AutoModelFor."""
        return "ImageTextToText" if self.images else TASKS[self.task].model


@dataclass(frozen=True)
class Base:
    """A model ready to be adapted, and its freshly initialised modules, which train with any method.

    `processor`: of a vision-language model, for its inputs of images and texts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: list[str]
    processor: ProcessorMixin | None = None


def base_of(recipe: Recipe, spec: HeadSpec, **more: Any) -> Base:
    """The base model of a recipe, by `load_base`; `more` are its further arguments."""
    where: dict[str, Any] = {"gguf_file": recipe.gguf_file, "revision": recipe.revision, "dtype": recipe.dtype}
    return load_base(recipe.model, spec, **where, four_bits=METHODS[recipe.method["name"]].four_bits, **more)


def load_base(
    model: str,
    spec: HeadSpec,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    tokenizer_from: str | None = None,
    four_bits: bool = False,
    attention: str | None = None,
) -> Base:
    """Load the base model of a task with its head.

    `attention`: transformers' name of an implementation. `four_bits`: all linear layers but those of the head become
    NF4 with doubly quantised constants (QLoRA).

    Raises RecipeError if the model can't be found or read, has no head for the task, or can't be quantised here;
    MissingExtraError if packages that it needs aren't installed.
    """
    path = model_path(model)
    gguf_file = find_gguf(path, gguf_file)
    if gguf_file is not None:
        require(f"reading {gguf_file}", "gguf")
    if four_bits:
        require(f"loading {model} in 4 bits", "bitsandbytes")
    where: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    try:
        reading = {"trust_remote_code": False} if tokenizer_from else dict(where)
        if spec.task == "tokens":
            reading["add_prefix_space"] = True  # else byte-level tokenizers join each word to the one before
        source = tokenizer_from or path
        processor = load_processor(source, model, reading) if spec.images else None
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **reading) if processor is None else processor.tokenizer
        config = AutoConfig.from_pretrained(path, **where)
        _check_kind(model, spec.task, config)
        how = {**where, "dtype": dtype} | ({"attn_implementation": attention} if attention is not None else {})
        how |= {"quantization_config": _nf4(dtype)} if four_bits else {}
        built, fresh = _build(path, spec, config, how)
        if gguf_file is not None:
            _forget_gguf(built)
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise RecipeError(f"model: {_reason(model, path, error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    text_config = built.config.get_text_config() if spec.images else built.config
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    return Base(built, tokenizer, fresh, processor)


def _check_kind(model: str, task: str, config: Any) -> None:
    """Raises RecipeError for an encoder-decoder if a decoder is needed, and vice versa.

    transformers would make a decoder of BART, without its encoder.
    """
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    needs_encoder_decoder = TASKS[task].model == "Seq2SeqLM"
    if TASKS[task].writes and is_encoder_decoder != needs_encoder_decoder:
        parts, do = ("no encoder", "instruct") if needs_encoder_decoder else ("an encoder and a decoder", "seq2seq")
        raise RecipeError(f"model: '{model}' is of type {config.model_type}, which has {parts}; set task: {do}")


def _build(path: str, spec: HeadSpec, config: Any, where: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    kind: Any = getattr(transformers, f"AutoModelFor{spec.model}")
    if TASKS[spec.task].writes:
        if spec.images and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(f"it is a {config.model_type}, which sees no images, and the data have some")
        return kind.from_pretrained(path, config=config, **where), []
    config.num_labels = spec.num_labels
    if spec.label_names:
        config.id2label = dict(enumerate(spec.label_names))
        config.label2id = {name: index for index, name in enumerate(spec.label_names)}
    if spec.pooling == "mean":
        pool_mean(config, spec.pair, spec.dropout)
        # A checkpoint saved with a head names its encoder by the architecture, not by this class.
        prefix = getattr(AutoModel._model_mapping[type(config)], "base_model_prefix", "")
        if prefix and prefix != MeanPooledClassifier.base_model_prefix:
            where = {**where, "key_mapping": {rf"^{prefix}\.": f"{MeanPooledClassifier.base_model_prefix}."}}
        kind = MeanPooledClassifier
    else:
        config.problem_type = _PROBLEMS.get(spec.task)
    # A checkpoint's own head belongs to another task, may have another size, and is initialised afresh.
    model, info = kind.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **where
    )
    inside = {name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")}
    if inside and inside <= set(info["missing_keys"]):
        raise ValueError(f"none of the checkpoint's weights fit this {config.model_type}")
    fresh = fresh_modules(model, info["missing_keys"])
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if not is_in(name, fresh):
            raise ValueError(f"the checkpoint's {name} is of shape {tuple(stored)}, its config says {tuple(expected)}")
    return model, fresh


#: Task -> transformers' problem type, which selects the loss.
_PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


def pool_mean(config: Any, pair: bool, dropout: float) -> None:
    """Make a model's config one of `MeanPooledClassifier`. Raises ConfigError for a model that is no encoder."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise ConfigError(
            f"head.pooling: mean needs an encoder, this is a {config.model_type}; set head.pooling: model"
        )
    config.mean_pooled_pair, config.mean_pooled_dropout = pair, dropout


def _nf4(dtype: str) -> BitsAndBytesConfig:
    compute = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        # Fresh modules are trained, which isn't possible in 4 bits.
        llm_int8_skip_modules=list(_HEAD_NAMES),
    )


_HEAD_NAMES = ("classifier", "pre_classifier", "score", "pooler", "lm_head", "qa_outputs", "summary")


def is_quantised_linear(path: str) -> bool:
    """Whether QLoRA's base keeps the linear layer at `path` in 4 bits; transformers skips names by start and end."""
    return not (path.startswith(_HEAD_NAMES) or path.endswith(_HEAD_NAMES))


def fresh_modules(model: PreTrainedModel, missing: set[str] | list[str]) -> list[str]:
    """Names of the modules that train with every method: the head, and modules that the checkpoint has no weights for.

    The head is every child of the model with weights, except its encoder, even if the checkpoint has weights for it:
    those belong to another task. Inside the encoder it's the smallest freshly initialised module (BERT's pooler, say).
    Embeddings that are buffers (position ids) have no weights and don't count.
    """
    prefix = model.base_model_prefix
    head = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    parameters = dict(model.named_parameters())
    for key in sorted(missing):
        owner = key.rpartition(".")[0]
        if key in parameters and owner and owner.split(".")[0] not in head and owner not in head:
            head.append(owner)
    return head


def is_in(name: str, modules: Iterable[str]) -> bool:
    """True for the name of a parameter in one of the base model's `modules`, also of an adapted model."""
    return name.removeprefix("base_model.model.").startswith(tuple(f"{module}." for module in modules))


def sees_images(config: Any) -> bool:
    """True for the config of a vision-language model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def load_processor(path: str, model: str, where: dict[str, Any]) -> ProcessorMixin:
    """The processor of a model. Raises RecipeError if it has none, MissingExtraError for missing packages."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, **where)
    except ImportError as error:
        require(f"reading the images of {model}", "pillow", "torchvision", "num2words")
        raise RecipeError(f"model: '{model}' cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise RecipeError(f"model: '{model}' sees no images, and the data have some; take a vision-language model")
    return processor


def find_gguf(path: str, gguf_file: str | None) -> str | None:
    """The GGUF file of a model: the named one, or the only one in a folder without a config.

    Raises RecipeError if it isn't there, or several are.
    """
    folder = Path(path)
    if not folder.is_dir():
        return gguf_file
    names = sorted(entry.name for entry in folder.glob("*.gguf"))
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise RecipeError(f"gguf_file: {missing_path(folder / gguf_file)}")
        return gguf_file
    if (folder / "config.json").is_file() or not names:
        return None
    if len(names) > 1:
        raise RecipeError(f"gguf_file: '{path}' holds several, name one: {', '.join(names)}")
    return names[0]


def _forget_gguf(model: PreTrainedModel) -> None:
    """Remove the mark of quantisation from a model read from llama.cpp's format: its weights were unpacked to floats.

    With it, transformers would refuse to train the model, and save it as quantised.
    """
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")


def _reason(model: str, path: str, error: Exception) -> str:
    first = first_line(error)
    if "head.pooling" in first:
        return first
    folder = Path(path)
    if not folder.is_dir() and is_path(model):
        return missing_path(model)
    if folder.is_dir() and not (folder / "config.json").is_file() and "gguf" not in first.lower():
        return f"'{model}' is a folder without config.json, so not a model saved by transformers"
    near = "" if folder.is_dir() else " (no folder of this name either)"
    return f"'{model}' cannot be loaded{near}: {first}"


def device() -> torch.device:
    """The accelerator if there is one, else the processor."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None else torch.device("cpu")
