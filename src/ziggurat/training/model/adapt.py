"""Put a recipe's method into a base model, and count the trainable parameters."""

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from ziggurat.errors import ConfigError, RecipeError, first_line, with_article
from ziggurat.host.method import rank_of
from ziggurat.nearest import did_you_mean
from ziggurat.recipe.embedded import model_path
from ziggurat.recipe.methods import METHODS, method_config
from ziggurat.recipe.schema import Recipe

from .base import Base, is_in


@dataclass(frozen=True)
class Counts:
    """Trainable parameters, each counted once however many layers share it.

    `adapter` are the method's own, `head` those of fresh modules, `lora` those of plain LoRA of the same rank,
    `lora_rank`, on the same linear layers (None if there is no such LoRA).
    """

    adapter: int
    head: int
    lora: int | None
    total: int
    lora_rank: int | None = None


def adapt(recipe: Recipe, base: Base) -> nn.Module:
    """The base model with the recipe's method in it: a PeftModel, or the model itself with some weights trainable.

    Raises RecipeError with the method's own error for this model (targets that match nothing, ranks too high, ...).
    """
    method = METHODS[recipe.method["name"]]
    if base.processor is None and recipe.tower != "language":
        raise RecipeError(f"tower: {recipe.tower} sees images, and the data have none; leave the key out")
    outside = other_towers(base.model, recipe.tower) if base.processor is not None else []
    if method.config is None:
        if recipe.adapter is not None:
            raise RecipeError(f"adapter: method.name {recipe.method['name']} trains no adapter to go on with")
        trains = method.trains
        assert trains is not None
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(is_in(name, base.head) or (trains(name) and not is_in(name, outside)))
        names = [name for name, parameter in base.model.named_parameters() if parameter.requires_grad]
        if not names or (recipe.method["name"] != "head" and all(is_in(name, base.head) for name in names)):
            raise RecipeError(f"method.name: {recipe.method['name']} finds nothing to train in {recipe.model}")
        return base.model
    config = method_config(recipe.method, **beside(recipe, base.head, base.processor is not None))
    assert config is not None
    check_targets(config, base.model)
    if not recipe.resume:  # an earlier version took any name
        check_whole(config, base.model)
    leave_out(config, outside)
    if method.four_bits:
        prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=recipe.train.gradient_checkpointing)
        for module in base.model.modules():
            # On some processors the first scoring would repack the weights for a kernel without gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    config.base_model_name_or_path = model_path(recipe.model)
    config.revision = recipe.revision
    if recipe.adapter is not None:
        return _trained_on(recipe, base, config, recipe.adapter)
    try:
        with warnings.catch_warnings():
            # PEFT warns if the other tower has no layers of the targets' names.
            warnings.filterwarnings("ignore", message=".*no modules were excluded")
            return get_peft_model(base.model, config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise RecipeError(f"method: {recipe.method['name']} cannot adapt {recipe.model}: {error}") from error


def _trained_on(recipe: Recipe, base: Base, config: Any, folder: str) -> nn.Module:
    """The base model with the adapter in `folder`, trainable. Raises RecipeError if the adapter's method, settings or
    classes differ from the recipe's."""
    from ziggurat.files.untrusted import MOST_RUN, read_json
    from ziggurat.host.saved.folder import adapter_config

    path = Path(folder).expanduser()
    try:
        saved = adapter_config(path)
    except ConfigError as error:
        raise RecipeError(f"adapter: {error}") from error
    if type(saved) is not type(config):
        names = ", ".join(name for name, row in METHODS.items() if row.config_class() is type(saved))
        raise RecipeError(f"adapter: '{folder}' was trained with method.name: {names}, not {recipe.method['name']}")
    settings = {key: value for key, value in recipe.method.items() if isinstance(value, bool | int | float)}
    others = [f"method.{key}: {value}, not {getattr(saved, key)}" for key, value in settings.items()
              if getattr(saved, key) != value]  # fmt: skip
    if others:
        raise RecipeError(f"adapter: '{folder}' has other settings than the recipe; leave out {'; '.join(others)}")
    names = list((base.model.config.id2label or {}).values()) if base.head else []
    if (path / "run.json").is_file() and base.head:
        before = [str(name) for name in read_json(path, "run.json", MOST_RUN).get("head", {}).get("label_names", [])]
        if before and before != [str(name) for name in names]:
            raise RecipeError(
                f"adapter: '{folder}' knows the classes {', '.join(before)}, and the data have {', '.join(names)}; "
                "data.label_names says their order"
            )
    try:
        model = PeftModel.from_pretrained(base.model, str(path), is_trainable=True)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise RecipeError(f"adapter: '{folder}' does not fit {recipe.model}: {first_line(error)}") from error
    model.peft_config["default"].base_model_name_or_path = model_path(recipe.model)
    model.peft_config["default"].revision = recipe.revision
    return model


def other_towers(model: nn.Module, tower: str) -> list[str]:
    """The modules of a vision-language model that `tower` excludes.

    For `language` these are the vision tower and the projector; for `vision` the language model itself. Heads belong to
    neither. Raises RecipeError if the language model can't be identified.
    """
    if tower == "both":
        return []
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    path = next((path for path, module in model.named_modules() if path and module is decoder), None)
    if path is None or "." not in path:
        raise RecipeError(
            f"tower: the language model of {with_article(type(model).__name__)} can't be identified; take tower: both"
        )
    if tower == "vision":
        return [path]
    body, _, name = path.rpartition(".")
    return [f"{body}.{child}" for child, _ in model.get_submodule(body).named_children() if child != name]


def leave_out(config: Any, outside: list[str]) -> None:
    """Add modules to those that a PEFT config excludes."""
    if not outside:
        return
    if not hasattr(config, "exclude_modules"):
        raise RecipeError(f"tower: {type(config).__name__} can't exclude modules; take tower: both, or another method")
    excluded = config.exclude_modules
    named = [excluded] if isinstance(excluded, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in excluded or ()]
    whole = "|".join(re.escape(path) for path in outside)
    config.exclude_modules = "|".join([*named, rf"(?:{whole})(?:\..*)?"])


def beside(recipe: Recipe, head: list[str], images: bool = False) -> dict[str, Any]:
    """The fields of a method's config that depend on the task: modules_to_save and PEFT's task type."""
    saved = {"modules_to_save": sorted({*head, *(recipe.method.get("modules_to_save") or [])})} if head else {}
    return {"task_type": task_type(recipe, images), **saved}


def check_targets(config: Any, model: nn.Module) -> None:
    """Raise RecipeError for a target that matches nothing, which PEFT ignores if another one matches."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, (list, tuple, set)):
        return
    paths = [path for path, _ in model.named_modules() if path]
    unmatched = sorted(name for name in targets if not any(path == name or path.endswith(f".{name}") for path in paths))
    if unmatched:
        leaves = dict.fromkeys(path.rpartition(".")[2] for path, module in model.named_modules() if _has_weight(module))
        faults = "; ".join(f"'{name}' matches no module{did_you_mean(name, leaves)}" for name in unmatched)
        names = ", ".join(leaf for leaf in leaves if not leaf.isdigit())
        raise RecipeError(f"method.target_modules: {faults}; modules with weights: {names}")


def check_whole(config: Any, model: nn.Module) -> None:
    """Raise RecipeError for a module to save that the model lacks, which PEFT ignores."""
    paths = [path for path, _ in model.named_modules() if path]
    for name in getattr(config, "modules_to_save", None) or ():
        if not any(path.endswith(name) for path in paths):
            leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            raise RecipeError(f"method.modules_to_save: '{name}' matches no module{did_you_mean(name, leaves)}")


def _has_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def count(model: nn.Module, base: Base) -> Counts:
    """Count the trainable parameters of an adapted model."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}  # shared ones once
    total, head = sum(trained.values()), sum(size for name, size in trained.items() if is_in(name, base.head))
    lora, rank = _lora_count(model, base)
    return Counts(adapter=total - head, head=head, lora=lora, total=total, lora_rank=rank)


def _lora_count(model: nn.Module, base: Base) -> tuple[int, int] | tuple[None, None]:
    """Parameters and rank of plain LoRA with the method's rank and targets, built on the meta device without memory."""
    if not isinstance(model, PeftModel):
        return None, None
    config = model.peft_config["default"]
    rank = rank_of(config)
    if rank is None:
        return None, None
    same = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
    fields = {name: getattr(config, name, None) for name in same}
    lora = LoraConfig(r=rank, **{name: copy.deepcopy(value) for name, value in fields.items() if value is not None})
    try:
        with torch.device("meta"):
            bare = type(base.model)(copy.deepcopy(base.model.config))
            adapted = get_peft_model(bare, lora)
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        # A method may adapt places that LoRA can't (whole layers); then there is no comparison.
        return None, None
    return sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name), rank


def task_type(recipe: Recipe, images: bool = False) -> TaskType | None:
    """PEFT's task of a recipe."""
    if images:
        return None  # PEFT has no task for vision-language models, and stores the class of a model without a task
    # PEFT has no task for our head: without a task it stores the class, from which AutoPeftModel rebuilds it.
    return _TASK_TYPES[recipe.kind.model] if recipe.writes or recipe.head.pooling == "model" else None


_TASK_TYPES = {
    "CausalLM": TaskType.CAUSAL_LM,
    "Seq2SeqLM": TaskType.SEQ_2_SEQ_LM,
    "SequenceClassification": TaskType.SEQ_CLS,
    "TokenClassification": TaskType.TOKEN_CLS,
}
