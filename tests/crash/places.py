"""Where a tiny model and its table lie, and recipes that train it."""

from pathlib import Path
from typing import Any

from training_tables import reviews, save_tiny_bert, write_csv

from ziggurat.recipe.recipe import make_recipe
from ziggurat.recipe.schema import Recipe


class Place:
    """A folder with a tiny model and a table to learn from; makes recipes with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny_bert(folder / "tiny-bert")
        # The classes have the names of GLUE's sst2, by which a run can be scored on it.
        names = {"pos": "positive", "neg": "negative"}
        write_csv(folder / "reviews.csv", [{**row, "label": names[row["label"]]} for row in reviews(48)])

    def recipe(self, output: Path, **more: Any) -> Recipe:
        values = {
            "name": "tiny",
            "model": str(self.folder / "tiny-bert"),
            "data.train": str(self.folder / "reviews.csv"),
            "data.validation_rows": 8,
            "method.name": "msplora",
            "method.r": 4,
            "method.lora_dropout": 0.1,
            "train.batch": 8,
            "train.max_steps": 6,
            "train.evaluate": "never",
            "train.save": 2,
            "output": str(output),
        }
        return make_recipe({**values, **{key.replace("__", "."): value for key, value in more.items()}})
