"""transformers' `load_adapter` for registered methods, with current tensor names and a check for missing tensors.

`from_pretrained(adapter)`, `load_adapter` and `pipeline` read the file by the names in it and go on where tensors are
missing. For adapters of registered methods the tensors are handed over under the names that this version and this model
give them, and a missing one is an error.
"""

from functools import wraps
from typing import Any

from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from transformers.integrations.peft import PeftAdapterMixin

from ziggurat.host.base.unwrap import PREFIX
from ziggurat.host.method import method_of
from ziggurat.host.saved.names import check_places, check_tensors, current_names

_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


def load_through_methods() -> None:
    """Wrap `load_adapter` of transformers' models, once."""
    original = PeftAdapterMixin.load_adapter
    if hasattr(original, "ziggurat"):
        return

    @wraps(original)
    def load_adapter(
        self: Any,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        load = kwargs.get("load_config")
        source = peft_model_id or getattr(load, "pretrained_model_name_or_path", None)
        options = {**(getattr(load, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {}), **kwargs}
        hub = {name: options[name] for name in _HUB if options.get(name) is not None}
        config: Any = peft_config
        if config is None and source is not None:
            config = PeftConfig.from_pretrained(str(source), **hub)
        method = method_of(config)
        if method is None or config is None:
            return original(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        state = adapter_state_dict
        if state is None:
            state = load_peft_weights(str(source), device="cpu", **hub)
            if config.bank is not None:  # the method's own reading, which PEFT's and transformers' leave out, checks it
                state = {**load_file(type(config).from_pretrained(str(source), **hub).bank_file), **state}
        named = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in current_names(state, method, self).items()
            if name.rpartition(".")[2] not in config.no_factors
        }
        result = original(self, peft_model_id, adapter_name, config, named, *args, **kwargs)
        adapter = adapter_name or "default"
        check_places(method, self, (adapter,))
        names = (name.replace(f"{method.store}.", f"{method.store}.{adapter}.", 1) for name in named)
        check_tensors(method, self, adapter, dict.fromkeys(names))
        return result

    load_adapter.ziggurat = True  # type: ignore[attr-defined]
    PeftAdapterMixin.load_adapter = load_adapter
