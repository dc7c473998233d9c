"""Methods and rewards from outside the package: of installed packages, and of a file or module that the user names.

Nothing else brings code in: a recipe, a run or an adapter's folder only names a method or a reward.
"""

import importlib
import sys
import traceback
import warnings
from collections.abc import Iterable
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ziggurat.errors import ConfigError

#: The entry point group whose modules register methods.
GROUP = "ziggurat.methods"

_loaded: dict[str, None] = {}
#: The module of each file that has run, by the file's whole path.
_files: dict[str, ModuleType] = {}


def load_installed() -> None:
    """Import the modules that installed packages name in `GROUP`; those that can't be imported are skipped with a
    warning."""
    # To parse the entry points of all packages would take a tenth of `import ziggurat`.
    if not any(GROUP in (package.read_text("entry_points.txt") or "") for package in distributions()):
        return
    for entry in entry_points(group=GROUP):
        if entry.module in sys.modules:
            continue  # it is what imports ziggurat just now
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else entry.module
            warnings.warn(
                f"the methods of the package {package!r} are not there: {entry.value} can't be imported "
                f"({type(error).__name__}: {error}).",
                stacklevel=2,
            )


def load(plugins: Iterable[str]) -> None:
    """Run each of `plugins`, a Python file or the name of a module, once.

    Raises:
        ConfigError: there is no such file or module, or it ends in an error; with its line.
    """
    for plugin in plugins:
        module = module_of(plugin, "--plugin")
        name = str(Path(str(module.__file__)).resolve()) if _is_file(plugin) else plugin
        _loaded.setdefault(name)


def module_of(named: str, flag: str) -> ModuleType:
    """The module that `named`, a Python file or the name of a module, stands for; its code runs once.

    Raises:
        ConfigError: there is no such file or module, or it ends in an error; with its line. `flag` named it.
    """
    path, is_file = Path(named).expanduser(), _is_file(named)
    if is_file and not path.is_file():
        raise ConfigError(f"{flag} {named}: there is no such file.")
    if path.is_dir() and (not named.isidentifier() or _is_without_code(named)):
        raise ConfigError(f"{flag} {named}: that is a folder; name a Python file in it, or a module.")
    name = str(path.resolve()) if is_file else named
    try:
        if not is_file:
            return importlib.import_module(named)
        if name not in _files:
            _files[name] = _run(path.resolve())
        return _files[name]
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_file and frame.filename == name]
        line = f" in line {frames[-1].lineno}" if frames else ""
        raise ConfigError(f"{flag} {named}: {type(error).__name__}{line}: {error}") from error


def _is_file(named: str) -> bool:
    path = Path(named).expanduser()
    return path.suffix == ".py" or path.is_file()


def _is_without_code(module: str) -> bool:
    """Whether no module of this name can be imported, or only a folder without `__init__.py`."""
    spec = find_spec(module)
    return spec is None or spec.origin is None


def loaded() -> tuple[str, ...]:
    """The loaded plugins, for a child process that has to load them too."""
    return tuple(_loaded)


def _run(path: Path) -> ModuleType:
    """Run `path` as a module that can be imported by its name, so that its classes can be pickled."""
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"ziggurat_plugin_{len(_files)}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no Python file: its name doesn't end in .py")
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
