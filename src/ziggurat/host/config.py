"""The fields that every method on linears shares, with PEFT's names and meanings."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ziggurat.errors import ConfigError
from ziggurat.host.card import write_card


@dataclass
class MethodConfig(PeftConfig):
    """A method's config: saved with a model card, loaded only beside safetensors."""

    @property
    def citation(self) -> str:
        """BibTeX of the method's paper."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in alphabetical order, so that equal adapters have equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), type(self).__name__, str(self.base_model_name_or_path or ""), self.citation)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ConfigError(
                f"{folder} holds its weights as {WEIGHTS_NAME}, a pickle, which can run code when it is read. Only "
                f"{SAFETENSORS_WEIGHTS_NAME} is loaded: ask for the adapter saved with safe_serialization=True."
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


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
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        for name in ("target_modules", "exclude_modules"):
            self._check_pattern(name)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str: put the layers into the regular "
                        "expression, or give target_modules as a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None and isinstance(self.target_modules, str):
            raise ConfigError("layers_pattern needs target_modules as a list.")
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError(f"r={self.r!r}: the rank must be a whole number of at least 1.")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r}: a probability from 0 up to, not including, 1.")
        layers = self.layers_to_transform
        numbers = [] if layers is None else [layers] if isinstance(layers, int) else layers
        if isinstance(numbers, str) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise ConfigError(f"layers_to_transform={layers!r}: a layer's number, counted from 0, or a list of such.")
        if self.init_weights not in (True, False, "gaussian"):
            raise ConfigError(f"init_weights={self.init_weights!r}: True, False or 'gaussian'.")

    def _check_above_zero(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r}: a finite number above 0 is needed.")

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{name}={pattern!r} is not a regular expression: {error}.") from error
