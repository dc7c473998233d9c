"""The base of a recipe without weights: its head, its labels, and its fresh modules, as in a run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ziggurat.errors import DataError, MissingExtraError
from ziggurat.recipe.embedded import model_path
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.tasks import NUMBERS

from ..data.examples import class_names
from ..heads import MeanPooledClassifier
from .base import find_gguf, fresh_modules, pool_mean
from .meta import bare_config, bare_model


@dataclass(frozen=True)
class BareBase:
    """A model on the meta device, the modules that train with any adapter, and notes about assumptions."""

    model: nn.Module
    head: list[str]
    pair: bool
    notes: list[str]


def bare_base(recipe: Recipe, model: str | Path | None = None) -> BareBase:
    """The result of `load_base` for the recipe (with another `model`, if named), without weights.

    Raises:
        ConfigError: there is no such model, or it can't have the recipe's head.
    """
    where = str(model if model is not None else recipe.model)
    gguf = find_gguf(model_path(where), recipe.gguf_file)
    if recipe.writes:
        built = bare_model(where, recipe.task, recipe.dtype, revision=recipe.revision, gguf_file=gguf)
        return BareBase(built, [], False, [])
    notes: list[str] = []
    labels = {"num_labels": _labels(recipe, notes)}
    pair = recipe.head.pooling == "mean" and recipe.data.text_pair is not None
    if recipe.head.pooling == "mean":
        config = bare_config(where, revision=recipe.revision, gguf_file=gguf)
        pool_mean(config, pair, recipe.head.dropout)
        config.num_labels = labels["num_labels"]
        dtype = getattr(config, "dtype", None) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        with torch.device("meta"):
            built: nn.Module = MeanPooledClassifier._from_config(config, dtype=dtype)
    else:
        built = bare_model(where, recipe.task, recipe.dtype, revision=recipe.revision, gguf_file=gguf, **labels)
    assert isinstance(built, PreTrainedModel)
    names = _stored_names(model_path(where), recipe.revision) if gguf is None else None
    lacking = _lacking(built, names) if names is not None else None
    if lacking is None:
        notes.append("the model has no safetensors weights here; the checkpoint is assumed to have all of the encoder")
    return BareBase(built, fresh_modules(built, lacking or []), pair, notes)


def _labels(recipe: Recipe, notes: list[str]) -> int:
    if recipe.task in NUMBERS:
        return 1
    try:
        names = class_names(recipe)
        if names is not None:
            return len(names)
        why = "the data are on the hub"
    except (DataError, MissingExtraError) as error:
        why = f"the data can't be read ({error})"
    notes.append(f"2 classes are assumed: {why}; data.label_names gives their number")
    return 2


def _stored_names(path: str, revision: str | None) -> set[str] | None:
    """The tensors of a checkpoint in a folder or in the cache, None if it isn't there."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def file(name: str) -> str | None:
        try:
            return cached_file(path, name, revision=revision, local_files_only=True)
        except OSError:
            return None

    if (index := file("model.safetensors.index.json")) is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    if (whole := file("model.safetensors")) is not None:
        with safe_open(whole, framework="pt") as opened:
            return set(opened.keys())
    return None


def _lacking(model: PreTrainedModel, stored: Iterable[str]) -> list[str] | None:
    """Parameters in children of the encoder (a pooler) that the checkpoint lacks completely; None if it lacks all.

    Names are compared by their ends, because a checkpoint may use another prefix of the encoder, or none.
    """
    ends: set[str] = set()
    for name in stored:
        words = name.replace(".gamma", ".weight").replace(".beta", ".bias").split(".")
        ends.update(".".join(words[start:]) for start in range(len(words)))
    prefix = f"{model.base_model_prefix}."
    children: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if name.startswith(prefix):
            children.setdefault(name.removeprefix(prefix).split(".")[0], []).append(name)
    absent = [names for names in children.values() if not any(name.removeprefix(prefix) in ends for name in names)]
    return None if len(absent) == len(children) else [name for names in absent for name in names]
