"""ASLoRA (arXiv 2412.10135): one A for all layers, and B's that merge during training by similarity.

dW_n = scale B_g(n) A,  scale = lora_alpha / r.  Every layer begins as a group g(n) of its own; then the two groups with
the nearest B's, by ||B_i - B_j||_F, merge, one merge after the other, until `groups` remain.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ziggurat.errors import ConfigError
from ziggurat.kit import (
    Card,
    Context,
    FactorPair,
    MergingConfig,
    Method,
    Site,
    Stored,
    TensorSpec,
    acting_parameters,
    low_rank,
    option,
    register,
    shared_tensors,
    shown,
    whole,
)

CITATION = """@article{hu2024aslora,
  title   = {{ASLoRA}: Adaptive Sharing Low-Rank Adaptation Across Layers},
  author  = {Hu, Junyan and Xiao, Xue and Zhang, Mengqi and Chen, Yao and Ren, Zhaochun and Chen, Zhumin and
             Ren, Pengjie},
  journal = {arXiv preprint arXiv:2412.10135},
  year    = {2024}
}"""


@dataclass(repr=False, eq=False)
class ASLoRAConfig(MergingConfig):
    """Config of ASLoRA (arXiv 2412.10135).

    The paper's abstract says that A is shared and B's merge during training by similarity. The distance, the merged B
    (the mean of the two, weighted by their layers) and the even schedule are choices made here. B's that were merged
    away stay in the optimiser and the file, unused.

    Args:
        groups: how many B's of each role and shape remain.
        merge_from: the point of training, from 0 to 1, from which B's merge; merges are spread evenly.
        merge_until: the point at which the last merge is done.

    Raises:
        ConfigError: values outside these bounds.
    """

    groups: int = option(4, "B's that remain for each role.", whole(1))
    merge_from: float = option(0.1, "Share of training after which B's merge.")
    merge_until: float = option(0.5, "Share of training at which all merges are done.")

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (self.merge_from, self.merge_until)
        numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
        if not numbers or not 0 <= self.merge_from < self.merge_until <= 1:
            raise ConfigError(
                f"merge_from={shown(self.merge_from)}, merge_until={shown(self.merge_until)}: shares of training, the "
                "first below the second, from 0 to 1."
            )


def tensors(config: ASLoRAConfig, site: Site) -> dict[str, TensorSpec]:
    """A (r, d_in) of all layers of one role and shape, and B (d_out, r) of each."""
    specs = low_rank(config.r, site.d_in, site.d_out, config.init_weights)
    return {"A": replace(specs["A"], shared=site.kind), "B": replace(specs["B"], shared=f"{site.kind}:{site.layer}")}


def reads(config: ASLoRAConfig, site: Site) -> dict[str, str]:
    """B is that of the first layer of the site's group."""
    return {"B": f"{site.kind}:{config.owner(site)}"}


def pair(config: ASLoRAConfig, site: Site, t: Stored, context: Context) -> FactorPair:
    """A, scale B."""
    return FactorPair(t["A"], config.scale_of(config.r) * t["B"])


@torch.no_grad()
def step(
    root: nn.Module, adapter: str, config: ASLoRAConfig, step: int, total: int, optimizer: Optimizer | None
) -> None:
    """Make the merges that are due when `step` of `total` steps are done."""
    sites, factors = shared_tensors(root, METHOD, adapter)
    progress = (step / total - config.merge_from) / (config.merge_until - config.merge_from)
    assert config.structure is not None
    for kind in {site.kind for site in sites}:
        layers = sorted(site.layer for site in sites if site.kind == kind)
        groups = config.structure.setdefault(kind, [[layer] for layer in layers])
        due = int(min(max(progress, 0.0), 1.0) * max(len(layers) - config.groups, 0) + 1e-9)
        while len(layers) - len(groups) < due:
            upper, lower = _nearest([factors[f"{kind}:{group[0]}:B"] for group in groups])
            kept, dropped = groups[upper], groups[lower]
            B, gone = factors[f"{kind}:{kept[0]}:B"], factors[f"{kind}:{dropped[0]}:B"]
            B.lerp_(gone, len(dropped) / (len(kept) + len(dropped)))
            gone.grad = None
            if optimizer is not None:
                optimizer.state.pop(gone, None)
            groups[upper] = sorted(kept + dropped)
            del groups[lower]


def _nearest(Bs: list[Tensor]) -> tuple[int, int]:
    """The numbers, in order, of the two matrices with the smallest ||B_i - B_j||_F."""
    return min(combinations(range(len(Bs)), 2), key=lambda two: float((Bs[two[0]] - Bs[two[1]]).norm()))


METHOD = Method(
    "aslora",
    ASLoRAConfig,
    tensors,
    pair,
    Card("ASLoRA", "2412.10135", "one A for all layers, and B's that merge in training where they are alike", CITATION),
    reads=reads,
    needs_steps=lambda config: True,
    step=step,
    step_does="compares and merges factors during training",
    finish=lambda model: {"active": acting_parameters(model, METHOD)},
)
register(METHOD)
