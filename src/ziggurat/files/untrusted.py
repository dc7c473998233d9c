"""Reading an untrusted adapter folder: only its own files, and only with plausible sizes and contents.

Every check comes before the use: the size of a file before it is read, its form before a config is built from it, the
sizes of the tensors in a weights file before a model allocates memory for them.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ziggurat.errors import ConfigError, with_article

#: PEFT's names of an adapter's files, and the pickle that it would read where there are no safetensors.
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
#: The tensors that the adapters of a set have in common, beside their folders.
BANK = "bank.safetensors"
#: Bytes of a JSON file; the config of an adapter on 20,000 linear layers, each with a rank of its own, has 2 MiB.
MOST_JSON = 8 * 2**20
#: Bytes of a run's run.json, with a line every few steps.
MOST_RUN = 64 * 2**20
#: Lists and dicts inside one another. Ours nest three deep.
MOST_LEVELS = 32
#: Bytes of the header of a weights file; one of 20,000 linear layers has 5 MiB.
MOST_HEADER = 16 * 2**20
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Stored(NamedTuple):
    """A tensor by the header of its file: dtype in safetensors' notation, and shape."""

    dtype: str
    shape: tuple[int, ...]


def own_file(folder: str | Path, name: str) -> Path:
    """The path of the file called `name` in `folder`.

    A link is followed if it ends in the folder itself, or in the store of blobs beside the snapshots of the hub's
    cache; any other link could make us read, and copy, a private file.

    Raises:
        ConfigError: there is no such file, it is no regular file, or it is a link out of the folder.
    """
    home = Path(folder).resolve()
    path = home / name
    if not path.is_file():
        raise ConfigError(f"{Path(folder) / name} is no file.")
    real = path.resolve()
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(real.is_relative_to(place) for place in homes):
        raise ConfigError(
            f"{Path(folder) / name} is a link to {real}, outside its folder, so it isn't read. If you made the link, "
            "put the file itself there."
        )
    return path


def read_json(folder: str | Path, name: str, most: int = MOST_JSON) -> Any:
    """The JSON file called `name` in `folder`, of at most `most` bytes.

    Raises:
        ConfigError: as `own_file`; it is too large, nests too deep, or isn't JSON in UTF-8.
    """
    path = own_file(folder, name)
    size = path.stat().st_size
    if size > most:
        raise ConfigError(f"{path} has {size:,} bytes; at most {most:,} are read of such a file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} nests lists and dicts deeper than {MOST_LEVELS} levels.") from error
    check_depth(content, str(path))
    return content


def read_config(folder: str | Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """An adapter's config as it stands in `folder`.

    Raises:
        ConfigError: as `read_json`; or it is no mapping.
    """
    content = read_json(folder, name)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{Path(folder) / name} holds {with_article(type(content).__name__)}; a config is a mapping of its fields."
        )
    return content


def check_depth(content: Any, where: str) -> None:
    """Raise ConfigError if lists and dicts nest too deep in `content` for recursive functions."""
    level, depth = [content], 0
    while level := [v for value in level for v in _inside(value)]:
        depth += 1
        if depth > MOST_LEVELS:
            raise ConfigError(f"{where} nests lists and dicts deeper than {MOST_LEVELS} levels.")


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Name -> dtype and shape of the tensors of the adapter in `folder`, those of its bank too, by the files' headers.

    Raises:
        ConfigError: as `own_file` and `bank_of`; or a file isn't readable as safetensors.
    """
    bank = bank_of(folder)
    return {**(_header(bank) if bank is not None else {}), **_header(own_file(folder, SAFETENSORS_WEIGHTS_NAME))}


def loaded_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of the adapter in `folder`, those of its bank too.

    Raises:
        ConfigError: as `stored_tensors`.
    """
    bank, weights = bank_of(folder), own_file(folder, SAFETENSORS_WEIGHTS_NAME)
    tensors: dict[str, Tensor] = {}
    for path in (weights,) if bank is None else (bank, weights):
        with _reading(path):
            tensors |= load_file(path)
    return tensors


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise ConfigError where reading the weights file `path` fails in the block."""
    try:
        yield
    except (SafetensorError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as safetensors ({error}): was it cut off while copying?") from error


def bank_of(folder: str | Path) -> Path | None:
    """The file of shared tensors that the adapter in `folder` builds on, beside its folder; None where it is whole.

    Raises:
        ConfigError: it isn't there, or isn't the one that the adapter was saved with.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        return None
    bank = read_config(folder).get("bank")
    if bank is None:
        return None
    expected = bank.get("sha256") if isinstance(bank, dict) else None
    if not isinstance(expected, str) or len(expected) != 64:
        raise ConfigError(f"{folder / CONFIG_NAME}: bank holds no sha256 of a {BANK}: the file was changed.")
    home = folder.resolve().parent
    if not (home / BANK).is_file():
        raise ConfigError(
            f"adapter {folder.name!r} builds on a {BANK} (sha256 {expected[:12]}...) beside its folder, and "
            f"{home / BANK} isn't there. Copy the adapter together with the bank of its set."
        )
    path = own_file(home, BANK)
    held = digest(path)
    if held != expected:
        raise ConfigError(
            f"adapter {folder.name!r} builds on a {BANK} with sha256 {expected[:12]}..., and {path} has "
            f"{held[:12]}...: it belongs to another set, or was changed. Put back the bank that it was saved with."
        )
    return path


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int, size: int) -> str:
    # Loading an adapter needs it several times, and so does every adapter of a set.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path) -> dict[str, Stored]:
    with _reading(path):
        with path.open("rb") as file:
            start = file.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (0,)
        if length > MOST_HEADER:
            raise ConfigError(
                f"{path} can't be read as safetensors: its first bytes announce a header of {length:,} bytes, and at "
                f"most {MOST_HEADER:,} are read. Is it a file of another kind, renamed?"
            )
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def check_folder(folder: str | Path) -> None:
    """Check the files of an adapter that PEFT is about to read from `folder`.

    Raises:
        ConfigError: as `read_json` for the config, which must be a mapping; weights that are a pickle.
    """
    folder = Path(folder)
    read_config(folder)
    if (folder / WEIGHTS_NAME).exists() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ConfigError(
            f"{folder} holds its weights as {WEIGHTS_NAME}, a pickle, which can run code when it is read. Only "
            f"{SAFETENSORS_WEIGHTS_NAME} is loaded: ask for the adapter saved with safe_serialization=True."
        )


def check_factors(folder: str | Path, prefix: str, other: frozenset[str]) -> int:
    """The number of parameters in the weights file of `folder` whose names have a method's `prefix`.

    `other`: last parts of names of tensors that are no factors.

    Raises:
        ConfigError: as `stored_tensors`; or a factor isn't of floating-point numbers.
    """
    parameters = 0
    for name, stored in stored_tensors(folder).items():
        if prefix not in name or name.rpartition(".")[2] in other:
            continue
        if stored.dtype not in FLOATING:
            raise ConfigError(
                f"{Path(folder) / SAFETENSORS_WEIGHTS_NAME}: {name!r} is of {stored.dtype}, and factors are "
                "floating-point numbers. The file was changed after it was saved."
            )
        parameters += prod(stored.shape)
    return parameters


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
