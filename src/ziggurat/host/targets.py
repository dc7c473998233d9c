"""Which linear layers to adapt where the user names none, and which names were nearly right."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ziggurat.host.linear import is_adaptable

from .unwrap import bare_tree, unwrap

_BERT_LIKE = ("albert", "camembert", "data2vec-text", "ernie", "megatron-bert", "rembert", "xlm-roberta-xl")
_LLAMA_LIKE = (
    *("cohere", "eurobert", "glm4", "gpt_oss", "granite", "helium", "olmo", "olmo2", "smollm3", "starcoder2"),
    *("qwen2_moe", "qwen3_moe", "jamba", "zamba"),
    *("m2m_100", "marian", "mbart", "pegasus", "whisper"),
    *("clip", "siglip"),
)
#: Their queries and values have the first two names in older versions of transformers, and the other two in newer ones.
_VISION = ["query", "value", "q_proj", "v_proj"]

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model_type: ["query", "value"] for model_type in _BERT_LIKE},
    **{model_type: ["q_proj", "v_proj"] for model_type in _LLAMA_LIKE},
    "distilbert": ["q_lin", "v_lin"],
    "gemma3": r".*language_model\..*\.(q_proj|v_proj)",  # the vision tower has linear layers of the same names
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
    "persimmon": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "swin": _VISION,
    "umt5": ["q", "v"],
    "vit": _VISION,
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}
"""model_type -> target_modules. PEFT's own table decides, so that methods and LoRA adapt the same
linear layers; what it lacks is filled in by its rule, queries and values or the projection that holds both."""


def targets(config: Any, path: str) -> Any:
    """Whether a PEFT config means the module at `path`, and in that layer; as PEFT's own check."""
    # PEFT looks for a layer's number behind a dot, which the paths of a body without a head lack.
    within = f".{path}" if getattr(config, "layers_to_transform", None) is not None else path
    return check_target_module_exists(config, within)


def near_misses(wanted: str | Iterable[str], model: nn.Module, limit: int = 6) -> list[str]:
    """The module names of `model` nearest to target names that matched nothing, best first.

    `wanted` is PEFT's `target_modules`: names, or one regular expression, of which the words are
    compared. A name of n components is compared with the last n components of each path, linear layers
    first and other modules where no linear is near. Where nothing is near either, the names of the
    linear layers are given, the most alike first: they are what can be adapted.
    """
    names = re.findall(r"\w+(?:\.\w+)*", wanted) if isinstance(wanted, str) else sorted(wanted)
    nodes = [node for node in bare_tree(unwrap(model)[0]).walk() if node.path]
    linears = [node.path for node in nodes if is_adaptable(node.module)]
    for paths, cutoff in ((linears, 0.6), ([node.path for node in nodes], 0.6), (linears, 0.0)):
        near = [(score, name) for asked in names for score, name in _alike(asked, paths) if score >= cutoff]
        if near:
            return list(dict.fromkeys(name for _, name in sorted(near, key=lambda pair: -pair[0])))[:limit]
    return []


def _alike(asked: str, paths: Iterable[str]) -> list[tuple[float, str]]:
    """(similarity, ending) for each distinct ending of `paths` that is as long as `asked`."""
    length = asked.count(".") + 1
    endings = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
    matcher = difflib.SequenceMatcher(b=asked.lower())
    scores = []
    for ending in endings:
        matcher.set_seq1(ending.lower())
        scores.append((matcher.ratio(), ending))
    return scores
