"""The config of LoRA²."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.site import Site
from ziggurat.host.values import MOST_ALPHA, by_target, is_number, is_whole, option, shown, whole
from ziggurat.methods.lora2.schedule import Schedule, steps

CITATION = """@article{zhang2024lora2,
  title   = {{LoRA}$^2$: Multi-Scale Low-Rank Approximations for Fine-Tuning Large Language Models},
  author  = {Zhang, Jia-Chen and Xiong, Yu-Jie and Qiu, He-Xi and Zhu, Dong-Hai and Xia, Chun-Ming},
  journal = {arXiv preprint arXiv:2408.06854},
  year    = {2024}
}"""

#: The paper's k, where the matrix allows it.
DEFAULT_OUTER_RANK = 8


def _check_beta(name: str, value: Any) -> None:
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"{name}={shown(value)}: a number above 0 and below 1 is needed, such as 0.85.")


def _check_weight(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= MOST_ALPHA:
        raise ConfigError(
            f"{name}={shown(value)}: a weight of 0 or more is needed (a finite one, at most {MOST_ALPHA:g})."
        )


@dataclass(repr=False, eq=False)
class LoRA2Config(MethodConfig):
    """Config of LoRA² (arXiv 2408.06854): two nested planes, the inner one pruned by importance while training.

    The update of a linear layer is dW = scale (u v) diag(E) (V U): U (k, d_in) goes down to the outer rank k, V (r, k)
    to the inner rank r, E (r) weighs each of the r directions, v (k, r) goes back to k and u (d_out, k) to d_out;
    scale = lora_alpha / r. At the start E = 0 and the others are N(0, 0.02^2), so a fresh adapter changes nothing.
    Only E has a gradient then, and a small one, because the other four are small: the update stays near zero for the
    first tens of steps. init_weights="orthonormal" starts at zero as well and learns as fast as LoRA.

    Steps (`initial_warmup`, `final_warmup`, `mask_interval`) are optimiser steps if whole numbers, shares of the run if
    fractions. A transformers Trainer prunes automatically; a custom loop calls `model.prune(step, total)`.

    Args:
        r: inner rank: how many directions each linear layer starts with.
        outer_rank: the paper's k. None: 8, or less where a side of the matrix is smaller.
        target_rank: remaining directions per linear layer, on average over all. None: half of r, rounded up.
            Equal to r: nothing is pruned.
        initial_warmup: how long every direction stays.
        final_warmup: how long, at the end of the run, the final mask is trained with.
        mask_interval: steps between two prunings.
        beta1: weight of the past in the average of the sensitivities.
        beta2: weight of the past in the average of their uncertainty.
        orthogonality: weight in the loss of the factors' deviation from orthonormality. 0: none.
        cross_plane: weight in the loss of ||(U^T V^T)(v^T u^T)||_F, the norm of the update with E = 1: it
            shrinks the factors.
        rank_pattern: inner rank of single linear layers, by path; written by `compact()`. 0: no update there.
        init_weights: True or "gaussian": as above, the paper's. "orthonormal": u = 0, E = 1, and U, V and v have
            orthonormal rows or columns, whichever are fewer, where the regulariser is 0: u has the gradient that B has
            in LoRA. False: random with E not zero, for tests.
        bias: "none", "all", or "lora2_only" (the biases of the adapted linear layers).

    Raises:
        ConfigError: values that can't work in any model or run. Values that don't fit a given model are refused when
            the adapter is put into it, values that don't fit a given run before its first step.
    """

    named_inits: ClassVar[tuple[str, ...]] = ("gaussian", "orthonormal")

    outer_rank: int | None = option(None, "Rank of the outer plane, the paper's k.", whole(1))
    target_rank: int | None = option(None, "Remaining directions per linear layer, on average.")
    initial_warmup: int | float = option(0.15, "Steps or share before the first pruning.", steps(0))
    final_warmup: int | float = option(0.5, "Steps or share with the final mask.", steps(0))
    mask_interval: int | float = option(10, "Steps or share between two prunings.", steps(1))
    beta1: float = option(0.85, "Smoothing of the sensitivities.", _check_beta)
    beta2: float = option(0.85, "Smoothing of their uncertainty.", _check_beta)
    orthogonality: float = option(0.1, "Weight of the orthogonality regulariser.", _check_weight)
    cross_plane: float = option(0.0, "Weight of the cross-plane penalty.", _check_weight)
    rank_pattern: dict[str, int] | None = option(None, "Inner rank of single linear layers.", by_target(whole(0)))
    init_weights: bool | Literal["gaussian", "orthonormal"] = option(
        True, "True or 'gaussian': N(0, 0.02^2), E = 0. 'orthonormal': u = 0, E = 1. False: for tests."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank is not None and not is_whole(self.target_rank, 1, self.r):
            raise ConfigError(
                f"target_rank={shown(self.target_rank)} with r={self.r}: a whole number from 1 to r is needed, since "
                "pruning only removes directions. Lower target_rank or raise r."
            )
        shares = [share for share in (self.initial_warmup, self.final_warmup) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ConfigError(
                f"initial_warmup={self.initial_warmup} and final_warmup={self.final_warmup} take the whole run: their "
                "sum must be below 1, to leave steps to prune in."
            )

    @property
    def scale(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; the same for all linear layers, pruned or not."""
        return self.scale_of(self.r)

    @property
    def target(self) -> int:
        """Remaining directions per linear layer, on average, when training is over."""
        return (self.r + 1) // 2 if self.target_rank is None else self.target_rank

    @property
    def prunes(self) -> bool:
        """Whether training removes directions."""
        return self.target < self.r

    def at(self, site: Site) -> Self:
        """The config with the alpha that `alpha_pattern` has for `site`; `rank_at` reads the ranks."""
        return self.with_values(self.r, self.alpha_at(site))

    def rank_at(self, path: str) -> int:
        """The inner rank of the linear layer at `path`: `rank_pattern`'s value for its path or the end of it, or r."""
        pattern = self.rank_pattern or {}
        if path in pattern:
            return pattern[path]
        ends = [key for key in pattern if path.endswith(f".{key}") or key.endswith(f".{path}")]
        return pattern[max(ends, key=len)] if ends else self.r

    def outer_rank_at(self, d_in: int, d_out: int) -> int:
        """The outer rank of a linear layer of this shape."""
        return self.outer_rank if self.outer_rank is not None else min(DEFAULT_OUTER_RANK, d_in, d_out)

    def schedule(self, total: int) -> Schedule:
        """When to prune in a run of `total` optimiser steps.

        Raises:
            ConfigError: the warm-ups are longer than the run.
        """
        return Schedule.of(self.initial_warmup, self.final_warmup, self.mask_interval, total)
