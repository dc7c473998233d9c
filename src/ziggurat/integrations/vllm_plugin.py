"""vLLM takes adapters as they were saved: `vllm serve BASE --enable-lora --lora-modules a=FOLDER`.

vLLM calls `register` in each of its processes (entry points `vllm.general_plugins`). A folder of one of our methods is
exported once, into a cache by its content, and vLLM reads that. An adapter that can't be served is refused when a
request arrives: an error during computation would end the engine.
"""

import hashlib
import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

from ziggurat._distribution import VERSION
from ziggurat.errors import ExportError
from ziggurat.files.untrusted import own_file, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The variable for the folder of exports; default: ziggurat/served in the user's cache.
CACHE = "ZIGGURAT_CACHE"


def register() -> None:
    """Wrap vLLM's two functions that read a LoRA request's folder: they call `served` first."""
    from vllm.lora import worker_manager  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine import input_processor  # pyright: ignore[reportMissingImports]

    manager: Any = worker_manager.WorkerLoRAManager
    processor: Any = input_processor.InputProcessor
    if hasattr(manager, "ziggurat"):
        return
    load, check = manager._load_adapter, processor._validate_lora

    @wraps(load)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        import msgspec  # pyright: ignore[reportMissingImports]  vLLM's own

        base = getattr(getattr(self._adapter_manager.model, "config", None), "_name_or_path", None)
        path = served(lora_request.lora_path, self.lora_config.max_lora_rank, base)
        return load(self, msgspec.structs.replace(lora_request, lora_path=path))

    @wraps(check)
    def _validate_lora(self: Any, lora_request: Any) -> None:
        check(self, lora_request)
        if lora_request is not None:
            served(lora_request.lora_path, self.lora_config.max_lora_rank, self.model_config.model)

    manager._load_adapter, processor._validate_lora, manager.ziggurat = _load_adapter, _validate_lora, True


def served(folder: str, max_lora_rank: int, base_model: str | None = None) -> str:
    """The folder that vLLM has to read for `folder`: itself, or for one of our methods its serving export.

    Raises:
        ExportError: the export's rank is above `max_lora_rank`, with the rank; the method, or another part that the
            adapter trains, can't be served.
        ConfigError: the folder is damaged.
    """
    place = Path(folder).expanduser()
    if not (place / CONFIG).is_file():
        return folder  # a name on the hub, or nothing: vLLM says which
    content = read_json(place, CONFIG)
    if not isinstance(content, dict) or not _is_ours(content.get("peft_type")):
        return folder
    from ziggurat.export import export

    out = _cache() / _key(place)
    if not (out / CONFIG).is_file():
        try:
            export(place, out, serving=True, base_model=base_model)
        except ExportError:
            if not (out / CONFIG).is_file():  # else another process has written it meanwhile
                raise
    rank = json.loads((out / CONFIG).read_text(encoding="utf-8"))["r"]
    if rank > max_lora_rank:
        raise ExportError(
            f"{folder} needs rank {rank}, and this server allows {max_lora_rank}: start it with --max-lora-rank {rank}."
        )
    return str(out)


def _is_ours(kind: Any) -> bool:
    import ziggurat  # noqa: F401  registers the methods
    from ziggurat.host.method import METHODS

    return isinstance(kind, str) and kind in METHODS


def _cache() -> Path:
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ziggurat" / "served"


def _key(folder: Path) -> str:
    """A hash of an export's sources: config, weights, and ziggurat's version."""
    total = hashlib.sha256(VERSION.encode())
    for name in (CONFIG, WEIGHTS):
        with own_file(folder, name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:32]
