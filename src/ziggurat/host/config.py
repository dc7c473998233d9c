"""The fields that every method shares, with PEFT's names and meanings."""

import copy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from peft import LoraConfig, PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ziggurat._distribution import VERSION
from ziggurat.errors import ConfigError
from ziggurat.files.staging import open_weights
from ziggurat.files.untrusted import BANK, bank_of, check_factors, check_folder, read_config
from ziggurat.host.method import Method
from ziggurat.host.peft_type import peft_type
from ziggurat.host.saved.card import write_card
from ziggurat.host.saved.names import FORMAT
from ziggurat.host.site import Site
from ziggurat.host.tensors import is_named
from ziggurat.host.values import (
    Check,
    by_target,
    check_above_zero,
    check_flag,
    check_layers,
    check_mapping,
    check_names,
    check_pattern,
    check_probability,
    check_rank,
    check_rows,
    check_text,
    is_whole,
    one_of,
    option,
    shown,
    whole,
)

#: Fields of LoRA's config that don't concern the update, and so are copied unchanged.
_OF_EVERY_ADAPTER = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
#: Checks of the fields that PEFT and `save_pretrained` write into a folder, and a stranger may have changed.
_OF_PEFT: dict[str, Check] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), check_text),
    "auto_mapping": check_mapping,
    "inference_mode": check_flag,
}


@dataclass(repr=False, eq=False)
class MethodConfig(PeftConfig):
    """The config of a method: fields as in PEFT's LoraConfig, saved with a model card, loaded beside safetensors only.

    `rank_pattern` and `alpha_pattern` map target modules, or the ends of their paths, to a rank and an alpha of their
    own. `trainable_token_indices`: rows of the embedding that train, as in PEFT.

    `freeze_tiers` names frozen tiers ("global", "mid") or frozen tensors by their keys ("A"). `from_adapter` is the
    folder of a trained adapter: the tensors that `freeze_tiers` names (default: those that several linear layers share)
    are copied from it and stay frozen, and fields that decide the update take its values unless they are set.
    """

    #: Set by `register`.
    method: ClassVar[Method]
    #: Last parts of the names of tensors in the adapter's file that aren't factors.
    no_factors: ClassVar[frozenset[str]] = frozenset()
    #: Values of `init_weights` besides True and False.
    named_inits: ClassVar[tuple[str, ...]] = ("gaussian",)
    #: Fields of LoRA's config with another meaning here, or none -> the reason.
    not_from_lora: ClassVar[dict[str, str]] = {}

    r: int = option(8, "Rank.", check_rank)
    target_modules: list[str] | str | None = option(
        None,
        "Names of the linear layers to adapt, a regular expression over their paths, or 'all-linear'.",
        check_pattern,
    )
    target_parameters: list[str] | None = option(
        None, "Names of the parameters with all experts of a layer to adapt: 'experts.gate_up_proj', say.", check_names
    )
    exclude_modules: list[str] | str | None = option(
        None, "Names, or a regular expression, of linear layers to leave out.", check_pattern
    )
    lora_alpha: float = option(16, "The update is scaled by lora_alpha / rank.", check_above_zero)
    lora_dropout: float = option(0.0, "Dropout on the input of the update, in training.", check_probability)
    fan_in_fan_out: bool = option(False, "Kept for PEFT: the layer tells the layout of its weight.", check_flag)
    bias: str = option("none", "Biases to train: 'none', 'all' or '<method>_only', those of the adapted linear layers.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(rank) instead.", check_flag)
    modules_to_save: list[str] | None = option(
        None, "Modules trained and saved whole, such as a classification head.", check_names
    )
    init_weights: bool | Literal["gaussian"] = option(
        True, "True: A uniform, B zero. 'gaussian': A normal, B zero. False: both random, for tests."
    )
    layers_to_transform: list[int] | int | None = option(
        None, "Numbers of the layers to adapt (default: all).", check_layers
    )
    layers_pattern: list[str] | str | None = option(
        None, "Name of the list that holds the layers, where it can't be found by itself.", check_pattern
    )
    rank_pattern: dict[str, Any] | None = option(None, "Ranks of single target modules.", by_target(whole(1)))
    alpha_pattern: dict[str, float] | None = option(
        None, "Alphas of single target modules.", by_target(check_above_zero)
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Rows of the embedding that train.", check_rows
    )
    blended: dict[str, int] | None = option(
        None, "Ranks of a sum of adapters, by path; not for the user to set.", by_target(whole(1))
    )
    sites: dict[str, Any] | None = option(None, "Where the adapter acts; not for the user to set.")
    freeze_tiers: list[str] | None = option(
        None, "Tiers, or single tensors by their keys, that don't train.", check_names
    )
    from_adapter: str | None = option(None, "Folder of an adapter whose shared tensors are taken over, frozen.")
    bank: dict[str, Any] | None = option(None, "The shared tensors of a set; not for the user to set.")
    ziggurat_version: str | None = option(None, "The version that wrote this config.")
    ziggurat_format: int = option(1, "The version of the saved form; see host/saved/names.py.")

    def __repr__(self) -> str:
        # Here for all methods: a dataclass would compile this and __eq__ for each of them.
        values = (f"{item.name}={getattr(self, item.name)!r}" for item in fields(self) if item.repr)
        return f"{type(self).__qualname__}({', '.join(values)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = [item.name for item in fields(self) if item.compare]
        return tuple(getattr(self, name) for name in names) == tuple(getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]  # as of every dataclass that can change

    @property
    def citation(self) -> str:
        """BibTeX of the method's paper."""
        return self.method.card.citation

    @property
    def largest_rank(self) -> int:
        """The rank of the LoRA that it is compared with."""
        return self.r

    @property
    def needs_stack(self) -> bool:
        """Whether the user has set a field that only makes sense in a stack of layers."""
        return False

    def at(self, site: Site) -> Self:
        """The config at `site`: with the rank and the alpha that the patterns have for it."""
        return self.with_values(self.at_path(self.rank_pattern, site, self.r), self.alpha_at(site))

    def alpha_at(self, site: Site) -> float:
        """The alpha that `alpha_pattern` has for `site`, or lora_alpha."""
        return self.at_path(self.alpha_pattern, site, self.lora_alpha)

    @staticmethod
    def at_path(pattern: dict[str, Any] | None, site: Site, default: Any) -> Any:
        """The value of a pattern for the site's path, by PEFT's rule, or `default`."""
        return pattern.get(get_pattern_key(list(pattern), site.path), default) if pattern else default

    def with_values(self, r: int, lora_alpha: float) -> Self:
        """The config with this rank and this alpha; `self` if it has them."""
        if (r, lora_alpha) == (self.r, self.lora_alpha):
            return self
        config = copy.copy(self)
        config.r, config.lora_alpha = r, lora_alpha
        return config

    def scale_of(self, rank: int) -> float:
        """lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)

    def thawed(self) -> Self:
        """The config with nothing frozen, for readers of values; `self` where nothing is frozen."""
        if self.freeze_tiers is None:
            return self
        config = copy.copy(self)
        config.freeze_tiers = None
        return config

    def freezes(self, key: str) -> bool:
        """Whether `freeze_tiers` names the tensor called `key`, or its tier."""
        return is_named(key, self.freeze_tiers or ())

    def dropout_at(self, site: Site) -> float:
        """The dropout on the input of the update at `site`."""
        return self.lora_dropout

    def check_sites(self, sites: Any) -> None:
        """Raise ConfigError if the config doesn't fit the model whose sites (path -> site) these are."""

    @classmethod
    def from_lora(cls, lora: LoraConfig, **more: Any) -> Self:
        """The config of this method with the fields of `lora`, and of `more`, which override them.

        Raises:
            ConfigError: `lora` sets fields that this method can't follow; all of them, by name.
        """
        field_names = {item.name for item in fields(cls)} - {"peft_type", "peft_version"}
        taken: dict[str, Any] = {}
        refused: list[str] = []
        for item in fields(LoraConfig):
            value = getattr(lora, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name in _OF_EVERY_ADAPTER:
                taken[item.name] = value
            elif item.name in ("peft_type", "peft_version") or not item.init or item.name in more:
                continue
            elif item.name == "init_lora_weights" and value in (True, False, "gaussian"):
                taken["init_weights"] = value
            elif item.name == "bias":
                taken["bias"] = f"{cls.method.name}_only" if value == "lora_only" else value
            elif item.name in field_names and item.name not in cls.not_from_lora:
                taken[item.name] = value if value or isinstance(value, bool | int | float) else None
            elif value not in (default, None, {}, []) and item.name != "runtime_config":
                why = cls.not_from_lora.get(item.name)
                refused.append(f"{item.name}={shown(value)}{f' ({why})' if why else ''}")
        if refused:
            raise ConfigError(
                f"{cls.__name__} can't follow LoRA's {', '.join(refused)}: take these fields out, or set the "
                "fields of this method instead."
            )
        return cls(**{**taken, **more})

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in alphabetical order, so that equal adapters have equal files, and with ziggurat's
        version."""
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}
        # Tensors taken over from another adapter are in the weights; the folder of a set writes its `bank` itself.
        left_out = {"from_adapter", "bank", *(["freeze_tiers"] if self.freeze_tiers is None else [])}
        saved = {name: value for name, value in plain.items() if name not in left_out}
        return {**saved, "ziggurat_version": VERSION, "ziggurat_format": FORMAT}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, with a section for the model card. Weights that were written as a pickle are refused."""
        folder = Path(save_directory)
        if (folder / WEIGHTS_NAME).exists() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            raise ConfigError(
                f"{folder / WEIGHTS_NAME} is a pickle, which can run code when it is read, and which ziggurat never "
                "loads: save the adapter with safe_serialization=True, PEFT's default, and remove that file."
            )
        super().save_pretrained(save_directory, **kwargs)
        open_weights(folder)
        # PEFT gives the base's class along only while it saves.
        base_class = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        write_card(folder, self, base_class.get("parent_library") or "", self.citation)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. In a local folder config and weights are checked before anything is built from them.

        Raises:
            ConfigError: an invalid value; weights that are a pickle, or not safetensors; files that are links out of
                the folder, or too large.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        is_local = (folder / CONFIG_NAME).exists()
        if is_local:
            check_folder(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if is_local and isinstance(config, MethodConfig) and (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            config.stored_numbers = check_factors(folder, config.method.prefix, config.no_factors)
            config.bank_file = bank_of(folder)
        elif isinstance(config, MethodConfig) and config.bank is not None:
            raise ConfigError(
                f"{pretrained_model_name_or_path} builds on the {BANK} of its set, which lies beside its folder: "
                "download the whole set, and load the adapter from there."
            )
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, of a file whose size and depth are sane.

        Raises:
            ConfigError: they aren't, or the file holds no mapping.
        """
        path = Path(path_json_file)
        content = read_config(path.parent, path.name)
        content.pop("runtime_config", None)
        return content

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method.peft_type)
        #: The number of parameters in the file beside this config, if it was read from a local folder.
        self.stored_numbers: int | None = None
        #: The bank that it builds on, if it was read from the folder of a set.
        self.bank_file: Path | None = None
        #: The table of sites that a folder had, beside which `sites` is that of the model.
        self.read_sites: dict[str, Any] | None = None
        #: True for a sum of adapters, whose rank may be above the matrix.
        self.any_rank = False
        for item in fields(self):
            check, value = item.metadata.get("check", _OF_PEFT.get(item.name)), getattr(self, item.name)
            if check is not None and not (value is None and item.default is None):
                check(item.name, value)
        one_of(True, False, *self.named_inits)("init_weights", self.init_weights)
        one_of("none", "all", f"{self.method.name}_only")("bias", self.bias)
        if not is_whole(self.ziggurat_format, 1, FORMAT):
            raise ConfigError(
                f"ziggurat_format={shown(self.ziggurat_format)}, written by ziggurat {shown(self.ziggurat_version)}: "
                f"this version ({VERSION}) reads the formats 1 to {FORMAT}. Install a newer ziggurat."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.from_adapter is not None:
            from ziggurat.host.sets.inherit import inherit

            inherit(self)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str: put the layers into the regular "
                        "expression, or give target_modules as a list."
                    )
