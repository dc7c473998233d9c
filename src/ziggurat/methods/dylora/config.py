"""What a user says of a DyLoRA adapter."""

from dataclasses import dataclass, field
from typing import Literal

from ziggurat.errors import ConfigError
from ziggurat.host.config import MethodConfig
from ziggurat.host.values import check_flag, is_whole, shown

CITATION = """@article{valipour2023dylora,
  title     = {{DyLoRA}: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
               Adaptation},
  author    = {Valipour, Mojtaba and Rezagholizadeh, Mehdi and Kobyzev, Ivan and Ghodsi, Ali},
  journal   = {arXiv preprint arXiv:2210.07558},
  year      = {2022}
}"""


@dataclass
class DyLoRAConfig(MethodConfig):
    """Config of DyLoRA (arXiv 2210.07558): one LoRA adapter that can be cut to any of its leading ranks.

    In training every forward draws a rank b, uniform in `min_rank`..r, the same for all linear layers, and uses the
    first b directions: h = W x + (lora_alpha / b) B[:, :b] A[:b] dropout(x). Otherwise b = `inference_rank`.

    Args:
        r: the largest rank.
        min_rank: the smallest rank that is drawn.
        frozen: only direction b learns at a step; those before it take part but stay as they are (the paper's
            "Frozen" variant). Default: all of the first b learn.
        inference_rank: the rank used outside training, in merging and in export. None: r.
        bias: "none", "all", or "dylora_only" (the biases of the adapted linear layers).

    Raises:
        ConfigError: ranks that don't satisfy 1 <= min_rank, inference_rank <= r.
    """

    bias: Literal["none", "all", "dylora_only"] = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'dylora_only'."}
    )
    min_rank: int = field(default=1, metadata={"help": "The smallest rank drawn in training."})
    frozen: bool = field(default=False, metadata={"help": "Only the last of the drawn directions learns at a step."})
    inference_rank: int | None = field(default=None, metadata={"help": "Rank used outside training (default: r)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("frozen", self.frozen)
        for name in ("min_rank", "inference_rank"):
            value = getattr(self, name)
            if not is_whole(value, 1, self.r) and not (value is None and name == "inference_rank"):
                raise ConfigError(f"{name}={shown(value)}: a whole number from 1 to r={self.r} is needed.")

    @property
    def kept_rank(self) -> int:
        """The rank used outside training."""
        return self.r if self.inference_rank is None else self.inference_rank
