"""The fields that every method on linears shares, with PEFT's names and meanings."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ziggurat.errors import ConfigError
from ziggurat.host.card import write_card
from ziggurat.host.untrusted import check_factors, check_folder, read_json
from ziggurat.host.values import (
    check_above_zero,
    check_flag,
    check_layers,
    check_names,
    check_pattern,
    check_probability,
    check_rank,
    shown,
)


@dataclass
class MethodConfig(PeftConfig):
    """A method's config: saved with a model card, loaded only beside safetensors."""

    #: Last parts of the names of tensors in the adapter's file that are no factors.
    no_factors: ClassVar[frozenset[str]] = frozenset()

    @property
    def citation(self) -> str:
        """BibTeX of the method's paper."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in alphabetical order, so that equal adapters have equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        # PEFT gives the base's class along only while it saves.
        base_class = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        write_card(Path(save_directory), self, base_class.get("parent_library") or "", self.citation)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. In a folder on this machine config and weights are looked at before anything is built from them.

        Raises:
            ConfigError: a value that can't be; weights that are a pickle, or no safetensors; files that are links out
                of the folder, or too large to be what they are called.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        here = (folder / CONFIG_NAME).exists()
        if here:
            check_folder(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if here and isinstance(config, MethodConfig) and (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            config.stored_numbers = check_factors(folder, f"{kind.lower()}_", config.no_factors)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, of a file whose size and depth are sane.

        Raises:
            ConfigError: they aren't, or the file holds no mapping.
        """
        path = Path(path_json_file)
        said = read_json(path.parent, path.name)
        if not isinstance(said, dict):
            raise ConfigError(f"{path} holds a {type(said).__name__}; a config is a mapping of its fields.")
        said.pop("runtime_config", None)
        return said

    def __post_init__(self) -> None:
        super().__post_init__()
        #: How many numbers the file beside this config holds, where it was read from a folder on this machine.
        self.stored_numbers: int | None = None
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise ConfigError(f"{name}={shown(value)}: text, or nothing, is needed.")
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise ConfigError(f"auto_mapping={shown(self.auto_mapping)}: a mapping, or nothing, is needed.")
        check_flag("inference_mode", self.inference_mode)


@dataclass
class LinearMethodConfig(MethodConfig):
    """Fields of a method that adapts linears, as in PEFT's LoraConfig."""

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the linears to adapt, a regular expression over their paths, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of linears to leave out."}
    )
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update, in training."})
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "Kept for PEFT's sake: how a weight is laid out is seen from its layer."},
    )
    bias: str = field(default="none", metadata={"help": "Biases to train."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(rank) instead."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, such as a classification head."}
    )
    init_weights: bool | Literal["gaussian"] = field(
        default=True,
        metadata={"help": "True: A uniform, B zero. 'gaussian': A normal, B zero. False: both random, for tests."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to adapt (default: all)."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that holds the layers, where it can't be found by itself."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_pattern(name, getattr(self, name))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str: put the layers into the regular "
                        "expression, or give target_modules as a list."
                    )
        check_rank("r", self.r)
        check_above_zero("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_flag("use_rslora", self.use_rslora)
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        check_names("modules_to_save", self.modules_to_save)
        check_layers("layers_to_transform", self.layers_to_transform)
        if not (isinstance(self.init_weights, bool) or self.init_weights == "gaussian"):
            raise ConfigError(f"init_weights={shown(self.init_weights)}: True, False or 'gaussian'.")

    def _check_bias(self) -> None:
        """Raise ConfigError unless `bias` is one of the three values that this method knows."""
        allowed = ("none", "all", f"{self.peft_type.value.lower()}_only")  # type: ignore[union-attr]
        if self.bias not in allowed:
            raise ConfigError(
                f"bias={shown(self.bias)}: 'none', 'all' or '{allowed[2]}' (the biases of the adapted linears)."
            )
