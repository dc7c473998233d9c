"""The config of LoR2C."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.site import Site
from ziggurat.host.values import (
    MOST_ENTRIES,
    MOST_RANK,
    check_above_zero,
    check_flag,
    check_probability,
    check_rank,
    is_whole,
    one_of,
    option,
    shown,
    whole,
)
from ziggurat.methods.lor2c.plan import CRITERIA, KEEP
from ziggurat.methods.lor2c.structure import from_json

EVENTS_FILE = "lor2c_events.json"
PICTURE_FILE = "lor2c_events.svg"
#: The tensor that stores structure and log beside the weights: JSON in bytes.
STRUCTURE_KEY = "lor2c_structure"

CITATION = """@article{zhao2025lor2c,
  title   = {{LoR2C}: Low-Rank Residual Connection Adaptation for Parameter-Efficient Fine-Tuning},
  author  = {Zhao, Jiancheng and Yu, Xingda and Zhang, Yuxiang and Yang, Zhen},
  journal = {arXiv preprint arXiv:2503.00572},
  year    = {2025}
}"""


def _by_stack(value: Any) -> list[Any]:
    """The values of each stack, or the one for all stacks."""
    return list(value.values()) if isinstance(value, dict) else [value]


def _check_spans(name: str, value: Any) -> None:
    if not all(isinstance(spans, list | tuple) and len(spans) <= MOST_ENTRIES for spans in _by_stack(value)):
        raise ConfigError(
            f"{name}={shown(value)}: a list of first and last layers such as [[0, 1], [2, 5]], or one such list a "
            "stack, {stack: [...]}."
        )


def _check_injected(name: str, value: Any) -> None:
    for layers in _by_stack(value):
        numbers = isinstance(layers, list | tuple) and all(is_whole(n, -MOST_RANK, MOST_RANK) for n in layers)
        if not numbers or len(set(layers)) < len(layers):
            raise ConfigError(
                f"{name}={shown(value)}: layers' numbers, each once, such as [3, 5] or {{stack: [3, 5]}}."
            )


def _check_structure(name: str, value: Any) -> None:
    from_json(value)


@dataclass(repr=False, eq=False)
class LoR2CConfig(MethodConfig):
    """Config of LoR2C (arXiv 2503.00572): a low-rank residual path around each transformer layer.

    h_out = Layer(h_in) + lora_alpha / r * B A dropout(h_in), with A (r, d) and B (d, r), B = 0 at the start. The layers
    are found automatically; `layers_to_transform`, `layers_pattern` and `exclude_modules` choose among them.

    Args:
        share: ShareLoR2C: all layers of a stack use one A; B stays each layer's own.
        spans: where paths begin and end, [[first, last], ...] with both layers included, for every stack, or one such
            list a stack: {stack: [...]}. Default: a path around every layer. Layers in no span have none.
        merges: MergeLoR2C: how often, during training, two adjacent paths become one over both spans.
        injections: InjectLoR2C: how often the path of one layer is replaced by plain LoRA on its query and value. With
            `merges` as well: IMLoR2C. All events are spread evenly over the first quarter of training.
        criterion: the score of a path: "mean" of the singular values of B A, "energy" (share of the `criterion_k`
            largest), "sfs" (1 - that share) or "effective_rank". Merged: the adjacent pair with the smallest sum.
            Injected: the path with the largest, by "sfs" the smallest.
        criterion_k: the k of "energy" and "sfs" (default: r / 2).
        keep: the weights of a merged path: the "lower" layer's, or the "richer" ones (larger sum of singular values).
        max_span: the most layers that a merged path may cover (default: no limit).
        target_modules: the linear layers in a layer that get plain LoRA when its path is replaced (default: the
            architecture's query and value, or their fused projection).
        inject_r: rank of that LoRA (default: r / 2).
        inject_alpha: its alpha (default: lora_alpha).
        inject_dropout: its dropout (default: lora_dropout).
        injected_layers: layers that have it from the start, [3, 5] or {stack: [...]}.
        hidden_size: width of the residual stream, if the layers' shapes don't determine it.
        structure: the state of `spans` and `injected_layers` after training's events. Written at each event and saved,
            so that loading builds the same paths; not for the user to set.

    Raises:
        ConfigError: values that can't work in any model. Values that don't fit a given model are refused when the
            adapter is put into it, before the model is changed.
    """

    no_factors = frozenset({STRUCTURE_KEY})
    not_from_lora: ClassVar[dict[str, str]] = dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), "a path goes around a whole layer"
    )

    share: bool = option(False, "One A for all layers of a stack.", check_flag)
    spans: list[list[int]] | dict[str, list[list[int]]] | None = option(
        None, "First and last layer of every path (default: one path a layer).", _check_spans
    )
    merges: int = option(0, "How many times two adjacent paths become one.", whole(0))
    injections: int = option(0, "How many paths are replaced by LoRA on query and value.", whole(0))
    criterion: Literal["mean", "energy", "sfs", "effective_rank"] = option(
        "mean", "How paths are scored: mean, energy, sfs or effective_rank.", one_of(*CRITERIA)
    )
    criterion_k: int | None = option(None, "The k of energy and sfs (default: r / 2).", whole(1))
    keep: Literal["lower", "richer"] = option("lower", "The weights that a merged path keeps.", one_of(*KEEP))
    max_span: int | None = option(None, "The most layers a merged path may cover.", whole(1))
    inject_r: int | None = option(None, "Rank of injected LoRA (default: r / 2).", check_rank)
    inject_alpha: float | None = option(None, "Its alpha (default: lora_alpha).", check_above_zero)
    inject_dropout: float | None = option(None, "Its dropout (default: lora_dropout).", check_probability)
    injected_layers: list[int] | dict[str, list[int]] | None = option(
        None, "Layers that have LoRA instead of a path from the start.", _check_injected
    )
    hidden_size: int | None = option(None, "Width of the residual stream.", whole(1))
    structure: dict[str, Any] | None = option(None, "The paths after training's changes.", _check_structure)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_pattern or self.alpha_pattern:
            raise ConfigError(
                "rank_pattern and alpha_pattern name linear layers, and a path goes around a whole layer: take them "
                "out. All paths have the rank r, and the LoRA in place of a path has inject_r."
            )
        #: The decisions so far, with their scores; written beside the adapter.
        self.log: list[dict[str, Any]] = []
        if self.max_span == 1 and self.merges:
            raise ConfigError(f"max_span=1 with merges={self.merges}: a merged path covers at least 2 layers.")
        if self.criterion_k is not None and self.criterion_k > self.r:
            raise ConfigError(
                f"criterion_k={self.criterion_k}: a path of rank r={self.r} has {self.r} singular values."
            )
        if self.may_inject and self.r == 1 and self.inject_r is None:
            raise ConfigError("r=1: LoRA in place of a path has rank r / 2, a whole number; set inject_r=1, or r=2.")

    @property
    def scale(self) -> float:
        """alpha / r of a path, or alpha / sqrt(r) with rsLoRA."""
        return self.scale_of(self.r)

    def dropout_at(self, site: Site) -> float:
        """The dropout of a path, or of the LoRA in its place."""
        if site.span is None and self.inject_dropout is not None:
            return self.inject_dropout
        return self.lora_dropout

    @property
    def may_inject(self) -> bool:
        """Whether a layer has, or may get, plain LoRA in place of its path."""
        return bool(self.injections or self.injected_layers)

    @property
    def restructures(self) -> bool:
        """Whether training changes the structure."""
        return bool(self.merges or self.injections)

    @property
    def lora_r(self) -> int:
        """The rank of injected LoRA."""
        return self.inject_r or self.r // 2

    @property
    def lora_scale(self) -> float:
        """alpha / rank of injected LoRA, or alpha / sqrt(rank) with rsLoRA."""
        alpha = self.lora_alpha if self.inject_alpha is None else self.inject_alpha
        return alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)

    @property
    def k(self) -> int:
        """The number of singular values that count as large: r / 2 unless `criterion_k` says otherwise."""
        return self.criterion_k or max(1, self.r // 2)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.log:
            from ziggurat.methods.lor2c.draw import draw_events

            folder = Path(save_directory)
            (folder / EVENTS_FILE).write_text(json.dumps(self.log, indent=1), encoding="utf-8")
            (folder / PICTURE_FILE).write_text(draw_events(self.log), encoding="utf-8")
