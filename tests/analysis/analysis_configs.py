"""A config of every readable method, for a tiny BERT; each gives an update that isn't zero."""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from methods_table import METHODS
from zoo import ZOO

#: Name -> config.
CONFIGS: dict[str, Callable[[], Any]] = {
    "msplora": lambda: METHODS["msplora"].config(ZOO["bert"], init_weights=False, lora_alpha=5),
    "lora2": lambda: METHODS["lora2"].config(ZOO["bert"], init_weights=False, outer_rank=6, lora_alpha=5),
    "lor2c": lambda: METHODS["lor2c"].config(ZOO["bert"], init_weights=False, lora_alpha=5),
    "lora": lambda: LoraConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["query", "value"],
        rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"layer.2.attention.self.value": 3},
        init_lora_weights=False,
    ),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["query", "value"], init_lora_weights=False),
    "pissa": lambda: LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="pissa"),
    **{
        name: partial(METHODS[name].config, ZOO["bert"], init_weights=False, lora_alpha=5)
        for name in ("sharelora", "tiedlora", "loraxs", "aslora")
    },
    "dylora": lambda: METHODS["dylora"].config(ZOO["bert"], init_weights=False, lora_alpha=5, inference_rank=3),
    "adalora": lambda: AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, lora_alpha=5, target_modules=["query", "value"], init_lora_weights=False
    ),
}
