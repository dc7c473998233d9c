"""The rows of GLUE's tasks, from the hub or from a folder of parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ziggurat.errors import DataError
from ziggurat.nearest import missing_path
from ziggurat.recipe.glue import GLUE, HUB, brings_validation, glue_name

from .tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset

    from ziggurat.recipe.schema import DataPart


def glue_splits(data: DataPart) -> tuple[Dataset, Dataset | None] | None:
    """The training and validation rows of a GLUE task; None for other data, or if a plain read of the hub suffices.

    `data.validation_rows` asks for a part of the training rows instead (to tune on): then the second is None.
    """
    name = glue_name(data.train, data.subset)
    if name is None or not brings_validation(data.train, data.folder):
        return None
    train = read_glue(name, data.train_split, data.folder)
    if data.validation is not None or data.validation_rows is not None:
        return train, None
    return train, read_glue(name, data.validation_split or GLUE[name].validation, data.folder)


def glue_home(name: str, folder: str) -> Path:
    """The folder of a task's files in `folder`, or `folder` itself if it has the task's name."""
    root = Path(folder).expanduser()
    return root if root.name == name and not (root / name).is_dir() else root / name


def read_glue(name: str, split: str, folder: str | None = None) -> Dataset:
    """The rows of one split, from the hub or from `folder`: `<folder>/<task>/<split>.parquet`, or the hub's file names.

    Raises DataError that names the expected files.
    """
    if folder is None:
        return read_table(HUB, subset=name, split=split)
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"data.folder: {missing_path(root)}")
    home = glue_home(name, folder)
    parts = sorted([*home.glob(f"{split}.parquet"), *home.glob(f"{split}-*-of-*.parquet")])
    if not parts:
        files = sorted(file.name for file in home.glob("*.parquet")) if home.is_dir() else []
        held = f"it holds {', '.join(files)}" if files else "there is no parquet file"
        raise DataError(f"data.folder: '{home}' has no {split}.parquet (or {split}-00000-of-00001.parquet): {held}")
    if len(parts) == 1:
        return read_table(str(parts[0]))
    import datasets

    return datasets.concatenate_datasets([read_table(str(file)) for file in parts])
