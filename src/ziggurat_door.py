"""Lets PEFT and transformers find the methods without `import ziggurat`: torch calls `enter` at the end of its import.

Installing the package is enough. PEFT's table of configs imports ziggurat the first time that somebody asks it for one
of our methods, or for one of an installed package (entry points `ziggurat.methods`). Nothing else is imported. This
module stands beside the package, as nothing inside it can be imported before the package is, and with it PEFT and
transformers. It needs the standard library alone, and no error in it stops `import torch`.

ZIGGURAT_AUTOLOAD=0 keeps the door shut. `ziggurat with METHOD ... -- PROGRAM` sets ZIGGURAT_WITH, under which each
LoraConfig that a program makes becomes the config of that method.
"""

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: The methods' names in PEFT's table.
METHODS = frozenset({"ADAPTERDROP", "ASLORA", "DYLORA", "LOR2C", "LORA2", "LORAXS", "MSPLORA", "SHARELORA", "TIEDLORA"})
#: The variable that keeps the door shut when it is 0.
SWITCH = "ZIGGURAT_AUTOLOAD"
#: The variable that says which method LoRA's config is turned into; `ziggurat.integrations.with_method` reads it.
WITH = "ZIGGURAT_WITH"

_thread = threading.local()


def enter() -> None:
    """Wait for the modules of PEFT and transformers that are to know the methods. Never raises."""
    with suppress(Exception):
        if os.environ.get(SWITCH, "") != "0":
            # In `import peft` torch is imported before peft.mapping is, so PEFT may be in sys.modules by now.
            acts = {**_ACTS, "peft.tuners.lora.config": _turn_lora} if WITH in os.environ else _ACTS
            waiting = {name: act for name, act in acts.items() if name not in sys.modules}
            sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Finds the awaited modules by the other finders, and acts on each once it has been executed.

    Looking for a module (`importlib.util.find_spec`) is not executing it: it changes nothing here.
    """

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def executed(self, module: Any) -> None:
        act = self.waiting.pop(module.__name__, None)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        if act is not None:
            with suppress(Exception):
                act(module)


class _Loader:
    """A module's own loader, which tells the finder when the module has been executed, and then removes itself."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.executed(module)


class _Table(dict[Any, Any]):
    """PEFT's table of configs, which imports ziggurat when one of `METHODS` is asked for and isn't there."""

    def __missing__(self, key: Any) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or (_import_for(key) and super().__contains__(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  else it would call itself


class _Again(BaseException):
    """Ziggurat has been imported within transformers' `load_adapter`: that is to begin again, through ziggurat's."""


def _import_for(key: Any) -> bool:
    """Import ziggurat if `key` names one of its methods; returns whether it does."""
    if not isinstance(key, str) or not (key in METHODS or key in _installed()):
        return False
    new = "ziggurat" not in sys.modules
    importlib.import_module("ziggurat")
    if new and getattr(_thread, "loading", False):
        raise _Again
    return True


@functools.cache
def _installed() -> frozenset[str]:
    """The names in PEFT's table of the methods of installed packages: those of their entry points."""
    from importlib.metadata import entry_points

    return frozenset(entry.name.upper() for entry in entry_points(group="ziggurat.methods"))


def _lazy_table(mapping: Any) -> None:
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING = _Table(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)


def _loading_begins_again(_: Any) -> None:
    """Make transformers' `load_adapter` start again if ziggurat, which wraps it, is imported in the middle of a
    call."""
    mixin = sys.modules["transformers.integrations.peft"].PeftAdapterMixin
    original = mixin.load_adapter
    if hasattr(original, "begins_again"):
        return

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "ziggurat" in sys.modules:
            return original(self, *args, **kwargs)
        _thread.loading = True
        try:
            return original(self, *args, **kwargs)
        except _Again:
            pass
        finally:
            _thread.loading = False
        return mixin.load_adapter(self, *args, **kwargs)

    load_adapter.begins_again = True  # type: ignore[attr-defined]
    mixin.load_adapter = load_adapter


def _turn_lora(lora: Any) -> None:
    """Make LoraConfig, called outside of PEFT and ziggurat, return the config of the method that `ziggurat with` names.

    The class stays as it is, for `isinstance`, subclasses, copies and saved adapters (whose configs name their type).
    """
    original = lora.LoraConfig

    @functools.wraps(original.__init__)  # so that the class keeps its signature
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = object.__new__(cls)
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if cls is not original or "peft_type" in kwargs or caller in ("peft", "ziggurat"):
            return made
        made.__init__(*args, **kwargs)
        return importlib.import_module("ziggurat.integrations.with_method").turned(made)

    original.__new__ = staticmethod(new)
    # Copies and pickles would call __new__ as a program does, without arguments.
    original.__reduce_ex__ = lambda self, protocol: (_restored, (type(self), self.__dict__))


def _restored(cls: Any, state: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    made.__dict__.update(state)
    return made


#: Modules by which tools send an adapter alone to a server -> the file of `ziggurat.integrations` that is asked before
#: their functions (or `Class.method`), once ziggurat is loaded.
_SENDING: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "trl.experimental.async_grpo.async_grpo_trainer",
            "trl.experimental.async_distillation.async_distillation_trainer",
        ),
        ("trl_sync", ("validate_lora_for_vllm_sync", "save_lora_adapter")),
    ),
    "verl.utils.fsdp_utils": ("verl_sync", ("collect_lora_params", "fsdp_merge_unmerge")),
    "verl.workers.engine.fsdp.transformer_impl": ("verl_sync", ("FSDPEngine.get_per_tensor_param",)),
    "swift.rlhf_trainers.rollout_mixin": ("swift_sync", ("RolloutTrainerMixin._move_adapter_to_vllm",)),
}


def _collect_plainly(module: Any) -> None:
    """Make the functions of `module` that look for LoRA's tensors call ziggurat first."""
    file, names = _SENDING[module.__name__]
    for name in names:
        *holders, last = name.split(".")
        holder = functools.reduce(getattr, holders, module)
        setattr(holder, last, _asking_first(getattr(holder, last), file, last))


def _keep_configs(loaders: Any) -> None:
    """Make diffusers build the right config from an adapter's file; it builds a LoraConfig from any."""
    original = loaders._create_lora_config

    @functools.wraps(original)
    def create(state_dict: Any, network_alphas: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if not (metadata and _import_for(metadata.get("peft_type"))):
            return original(state_dict, network_alphas, metadata, *args, **kwargs)
        config = importlib.import_module("peft").PeftConfig.from_peft_type(**metadata)
        config.stored_numbers = sum(tensor.numel() for tensor in state_dict.values())
        return config

    loaders._create_lora_config = create


def _asking_first(original: Any, file: str, name: str) -> Any:
    @functools.wraps(original)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if "ziggurat" not in sys.modules:
            return original(*args, **kwargs)
        return getattr(importlib.import_module(f"ziggurat.integrations.{file}"), name)(original, *args, **kwargs)

    return ask


#: Awaited module -> the function that is called once it has been executed.
_ACTS: dict[str, Callable[[Any], None]] = {
    "peft.mapping": _lazy_table,
    "transformers.integrations.peft": _loading_begins_again,
    # Every model class needs it. It comes later where the module above is the first of all to import torch.
    "transformers.modeling_utils": _loading_begins_again,
    **dict.fromkeys(_SENDING, _collect_plainly),
    "diffusers.loaders.peft": _keep_configs,
}
