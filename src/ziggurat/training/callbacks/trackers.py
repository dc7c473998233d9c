"""A run's trackers (TensorBoard, W&B, trackio, ...): checks before it begins, and their folders."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ziggurat.errors import RecipeError

#: transformers' name of a tracker -> the modules of which one must be installed, if different from the name.
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def lacking(names: Sequence[str]) -> dict[str, str]:
    """The trackers that aren't installed, with the package that each needs."""
    # kubeflow needs no package: it reads the environment of its cluster.
    modules_of = {name: _MODULES.get(name, (name,)) for name in names if name != "kubeflow"}
    return {
        name: _PACKAGES.get(name, name)
        for name, modules in modules_of.items()
        if not any(find_spec(module) is not None for module in modules)
    }


def check(names: Sequence[str]) -> None:
    """Raises RecipeError if a tracker that the recipe names isn't installed."""
    missing = lacking(names)
    if missing:
        raise RecipeError(
            f"train.report_to: {' and '.join(missing)} not installed here; pip install {' '.join(missing.values())}, "
            "or take the name out"
        )


def write_into(trainer: Any, folder: Path) -> None:
    """Make TensorBoard write into `folder`, unless the environment names another (TENSORBOARD_LOGGING_DIR)."""
    for callback in _tensorboards(trainer):
        callback.logging_dir = callback.logging_dir or str(folder)


def close(trainer: Any) -> None:
    """Flush TensorBoard's writer: scoring after the last step opens a new one."""
    for callback in _tensorboards(trainer):
        callback.on_train_end(trainer.args, trainer.state, trainer.control)


def _tensorboards(trainer: Any) -> list[Any]:
    from transformers.integrations import TensorBoardCallback

    return [each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
