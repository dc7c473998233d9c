"""Files beside a written model or adapter: the tokenizer's files, and the names of the labels."""

import logging
import shutil
from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError
from ziggurat.files.untrusted import MOST_RUN, own_file, read_json

logger = logging.getLogger(__name__)

#: Files of a tokenizer that belong beside an adapter.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
TOKENIZER_FILES += ("chat_template*", "*processor_config.json")


def save_tokenizer(name: str, folder: Path) -> None:
    """The base model's tokenizer, if it has one: models of images have none."""
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        copy_tokenizer(Path(name), folder)
        return
    try:
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("no tokenizer was found beside the adapter nor for %s: %s", name, error)


def put_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer into `folder`: an object's files, or those in a folder, which may have none."""
    if isinstance(tokenizer, Path):
        copy_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files that `target` lacks. Raises ConfigError for one that is a link out of `source`."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                # Copies are passed on: a link out of the folder must not publish a private file.
                shutil.copyfile(own_file(source, file.name), target / file.name)


def name_labels(adapter: Path, config: Any) -> None:
    """Give a classifier's config the label names that a training run noted beside its adapter."""
    try:
        names = read_json(adapter, "run.json", MOST_RUN)["head"]["label_names"]
    except (ConfigError, KeyError, TypeError):
        return
    if isinstance(names, list) and len(names) == config.num_labels:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
