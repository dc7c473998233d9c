"""A folder of GLUE's eight tasks with the hub's columns and splits, a few rows each, that a tiny model can learn."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ziggurat.recipe.glue import GLUE

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "poor", "dull", "awful"]


def rows_of(name: str, count: int, hidden: bool) -> list[dict[str, Any]]:
    """The last text holds the word that decides the label; `hidden` labels are -1, as in GLUE's test splits."""
    task = GLUE[name]
    rows = []
    for index in range(count):
        label = index % max(len(task.classes), 2)
        word = (GOOD, BAD, ["blue", "green", "sky", "grass"])[label][index // 3 % 4]
        row: dict[str, Any] = dict.fromkeys(task.columns, "the film")
        row[task.columns[-1]] = f"the film is {word}"
        value: Any = label if task.classes else float(5 * label)
        rows.append({**row, "label": (-1 if task.classes else -1.0) if hidden else value, "idx": 100 + index})
    return rows


def write_glue(folder: Path, count: int = 24) -> Path:
    for name, task in GLUE.items():
        (folder / name).mkdir(parents=True)
        tests = list(task.server)
        validation = [task.validation] + (["validation_mismatched"] if name == "mnli" else [])
        for split in ["train", *validation, *tests]:
            table = pa.Table.from_pylist(rows_of(name, count if split == "train" else 6, split in tests))
            # The hub's own files are numbered; a folder may hold either kind of name.
            file = f"{split}-00000-of-00001.parquet" if name == "sst2" else f"{split}.parquet"
            pq.write_table(table, folder / name / file)
    return folder
