"""Digests of the local files that a recipe names: a path alone doesn't tell whether they have changed."""

import hashlib
from functools import cache
from pathlib import Path

from ziggurat.recipe.embedded import EMBEDDED
from ziggurat.recipe.glue import glue_name
from ziggurat.recipe.schema import Recipe

from .glue import glue_home

#: Beginnings of files that loading never reads: hidden files, and the cache of `datasets` beside a saved data set.
_BESIDE = (".", "cache-")
#: Endings of further unread files in a model's folder.
_NOT_OF_A_MODEL = (".md", ".py", ".png", ".log")


def contents(recipe: Recipe) -> dict[str, str]:
    """Recipe key -> digest of the files that its value names, for keys that name local files."""
    data, digests = recipe.data, {}
    task = glue_name(data.train, data.subset)
    for key, name in (("adapter", recipe.adapter), ("model", recipe.model), ("teacher.model", recipe.teacher.model)):
        if name is not None and (key == "adapter" or name != EMBEDDED) and (folder := Path(name).expanduser()).is_dir():
            digests[key] = digest(folder, "*", _NOT_OF_A_MODEL)
    if task is not None and data.folder is not None:
        digests["data.folder"] = digest(glue_home(task, data.folder))
    further = [(f"data.more, {source}", source) for source in data.more or []]
    for key, source in (("data.train", data.train), *further, ("data.validation", data.validation)):
        if data.streaming and source != data.validation:  # too large to be read once more
            continue
        if source is not None and source != "demo" and glue_name(source) is None and Path(source).expanduser().exists():
            digests[key] = digest(Path(source).expanduser())
    return digests


def digest(place: Path, pattern: str = "**/*", without: tuple[str, ...] = ()) -> str:
    """The digest of a file, or of the names and contents of the files in a folder, independent of its path.

    Files whose names end in one of `without` don't count.
    """
    whole = hashlib.blake2b(digest_size=16)
    for path in sorted(place.glob(pattern)) if place.is_dir() else [place]:
        if path.is_file() and not path.name.startswith(_BESIDE) and path.suffix not in without:
            state = path.stat()
            # A single file counts by its ending alone, which decides how it is read.
            name = path.relative_to(place).as_posix() + path.suffix
            whole.update(f"{name}\0{_of_file(path, state.st_size, state.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@cache
def _of_file(path: Path, size: int, changed: int) -> str:
    """The digest of a file's content, cached while its size and its time stay the same."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:  # reading the file will raise the error
        return "not readable"
