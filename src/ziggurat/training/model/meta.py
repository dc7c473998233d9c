"""A model without weights: built on the meta device from its config alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ziggurat.errors import ConfigError, first_line
from ziggurat.extras import require
from ziggurat.nearest import is_path, missing_path
from ziggurat.recipe.tasks import TASKS

from .base import find_gguf, sees_images


def bare_model(
    model: str | Path,
    task: str | None = None,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    **changes: Any,
) -> nn.Module:
    """The architecture of `model` (a folder, a config.json, a hub name, or "embedded") on the meta device.

    `task`: one of a recipe, or "encoder" (no head), chooses the class; without one the config names it.
    `changes` replace fields of the config.

    Raises:
        ConfigError: there is no such model, or transformers can't build it from a config.
    """
    import transformers

    config = bare_config(model, revision=revision, gguf_file=gguf_file)
    for name, value in changes.items():
        setattr(config, name, value)
    model_dtype = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    auto: Any = transformers.AutoModel if task == "encoder" else None
    if task in TASKS:
        kind = "ImageTextToText" if TASKS[task].writes and sees_images(config) else TASKS[task].model
        auto = getattr(transformers, f"AutoModelFor{kind}")
    cls = getattr(transformers, next(iter(config.architectures or []), ""), None)
    try:
        with torch.device("meta"):
            if auto is not None:
                return auto.from_config(config, dtype=model_dtype)
            return cls._from_config(config, dtype=model_dtype) if cls else transformers.AutoModel.from_config(config)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{model} can't be built from its config: {error}") from error


def bare_config(model: str | Path, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The config of `model`; of a folder without config.json, that of its only GGUF file.

    Raises ConfigError if there is none, RecipeError if the GGUF file isn't there or there are several,
    MissingExtraError if the embedded model or `gguf` isn't installed.
    """
    from transformers import AutoConfig

    from ziggurat.recipe.embedded import model_path

    path = model_path(str(model))
    if is_path(str(model)) and not Path(path).expanduser().exists():
        raise ConfigError(missing_path(model))
    gguf = find_gguf(path, gguf_file)
    if gguf is not None:
        require(f"reading {gguf}", "gguf")
    where: dict[str, Any] = {"gguf_file": gguf} if gguf is not None else {}
    try:
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"no config of a model in {str(model)!r}: {first_line(error)} Give a folder that holds a config.json, the "
            "file itself, or the name of a model on the hub that is in the cache."
        ) from error
