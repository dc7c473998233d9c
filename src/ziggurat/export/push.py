"""Folders to the Hugging Face hub: an adapter, an exported one, a merged model."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import yaml

from ziggurat.errors import ExportError, first_line
from ziggurat.nearest import is_path
from ziggurat.recipe.embedded import EMBEDDED, HUB_NAME

#: Not uploaded: logs, and the files of a run's folder that show its validation rows.
_LEFT, _OF_ROWS = ("logs", ".cache"), ("by_class", "answers", "content")
#: Keys of a recipe that hold paths of this machine.
_PATHS = ("model", "output", "data.train", "data.validation", "data.folder")


#: Ollama's names of models may begin with a host: hf.co/OWNER/NAME.
_REGISTRY = re.compile(r"[\w-]+(\.[\w-]+)+(:\d+)?/")


def check(repo: str) -> None:
    """Check that the hub knows this user, before hours of work. Raises ExportError."""
    if repo.count("/") > 1 or not repo.strip("/"):
        raise ExportError(f"--push-to-hub '{repo}': a repository is called OWNER/NAME, or NAME")
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, errors = _hub()
    try:
        api.whoami()
    except errors as error:
        if isinstance(error, HfHubHTTPError | LocalTokenNotFoundError):
            raise ExportError(
                f"--push-to-hub: not logged in: {first_line(error)}; `hf auth login`, or set HF_TOKEN"
            ) from error
        raise ExportError(
            f"--push-to-hub: the hub can't be reached: {first_line(error)}. Connect this machine, see to HF_ENDPOINT "
            "and HF_HUB_OFFLINE, or leave --push-to-hub out"
        ) from error


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload `folder` in one commit, and return the repository's address; it is made where there is none.

    Paths of this machine and texts of the validation rows are taken out of run.json and recipe.yaml.
    Raises ExportError; the folder stays as it is.
    """
    from huggingface_hub import CommitOperationAdd

    folder = Path(folder)
    api, errors = _hub()
    operations = [CommitOperationAdd(name, content) for name, content in _contents(folder)]
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(made.repo_id, operations, commit_message=f"Upload {folder.name}")
    except errors as error:
        # `hf upload` would take the paths and the texts of validation rows along.
        again = f"from ziggurat.export.push import push; push({str(folder)!r}, {repo!r}, private={private})"
        raise ExportError(
            f"--push-to-hub: {first_line(error)}. '{folder}' is whole; push it again with `python -c "
            f"{shlex.quote(again)}`"
        ) from error
    return str(made)


def _contents(folder: Path) -> Iterator[tuple[str, Any]]:
    base, name = _base(folder)
    short = _short_names(folder)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).as_posix()
        if not file.is_file() or inside.partition("/")[0] in _LEFT:
            continue
        if inside == "run.json":
            values = json.loads(file.read_text(encoding="utf-8"))
            public = {key: _renamed(value, short) for key, value in values.items() if key not in _OF_ROWS}
            yield inside, json.dumps(public, indent=2).encode()
        elif inside == "recipe.yaml":
            yield inside, yaml.safe_dump(_renamed(_recipe(folder), short), sort_keys=False, allow_unicode=True).encode()
        elif inside in ("adapter_config.json", "config.json", "README.md") and base:
            yield inside, file.read_text(encoding="utf-8").replace(json.dumps(base)[1:-1], name).encode()
        elif inside == "Modelfile":
            yield inside, re.sub(r"(?<=^FROM ).+", _last_part, file.read_text(encoding="utf-8"), flags=re.M).encode()
        else:
            yield inside, str(file)


def _last_part(path: re.Match[str]) -> str:
    """The last part of a path; a model's name as it is, also with a registry in front."""
    if _REGISTRY.match(path[0]) or not is_path(path[0]):
        return path[0]
    return _pure(path[0]).name or path[0]


def _base(folder: Path) -> tuple[str | None, str]:
    """The path of the base model that an adapter names, None if it is no path; and the name that replaces it."""
    config = folder / "adapter_config.json"
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") if config.is_file() else None
    if not isinstance(base, str) or not is_path(base) or not _pure(base).name:
        return None, ""
    return base, HUB_NAME if _recipe(folder).get("model") == EMBEDDED else _pure(base).name


def _short_names(folder: Path) -> dict[str, str]:
    """Each path of this machine that the run's recipe names -> its last part; the longest paths come first."""
    values = _recipe(folder)
    named = [str(values[key]) for key in _PATHS if values.get(key)] + [str(v) for v in values.get("data.more") or ()]
    written = {name: os.path.expanduser(name) for name in named}
    paths = {text for both in written.items() if _pure(both[1]).is_absolute() for text in both}
    return {path: _pure(path).name for path in sorted(paths, key=len, reverse=True)}


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _pure(text: str) -> PurePath:
    """A path in the form of the machine that wrote the folder, which may be another one."""
    windows = PureWindowsPath(text)
    return windows if windows.drive or "\\" in text else PurePath(text)


def _renamed(value: Any, short: dict[str, str]) -> Any:
    """`value` with these paths shortened in all its texts: notes name them, too."""
    if isinstance(value, str):
        for path, name in short.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {key: _renamed(inner, short) for key, inner in value.items()}
    return [_renamed(inner, short) for inner in value] if isinstance(value, list) else value


def _hub() -> tuple[Any, tuple[type[Exception], ...]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Its first base is the HTTP client's error, which a hub that can't be reached raises.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT")), (*HfHubHTTPError.__bases__, OSError, ValueError)
