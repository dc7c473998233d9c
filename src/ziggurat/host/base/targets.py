"""The sites that a config names in a model, the defaults where it names none, and hints for misspelt names."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ziggurat.errors import ConfigError, with_article
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.base.offload import check_in_place
from ziggurat.host.base.unwrap import bare_tree, look_through, unwrap
from ziggurat.host.linear import features, is_adaptable, is_router
from ziggurat.host.method import Method, unique_specs
from ziggurat.host.older import check_finds_parameters
from ziggurat.host.site import Site, body_name, with_experts
from ziggurat.host.tensors import TensorSpec

_BERT_LIKE = ("albert", "camembert", "data2vec-text", "ernie", "megatron-bert", "rembert", "xlm-roberta-xl")
_LLAMA_LIKE = (
    *("cohere", "eurobert", "glm4", "gpt_oss", "granite", "helium", "olmo", "olmo2", "smollm3", "starcoder2"),
    *("qwen2_moe", "qwen3_moe", "jamba", "zamba"),
    *("m2m_100", "marian", "mbart", "pegasus", "whisper"),
    *("clip", "siglip"),
    *("idefics3", "smolvlm"),
)
#: Names of queries and values in older versions of transformers (the first two) and in newer ones (the others).
_VISION = ["query", "value", "q_proj", "v_proj"]
#: The last one is that of the vision tower.
_SEEING_QWEN = ["q_proj", "v_proj", "qkv"]

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model_type: ["query", "value"] for model_type in _BERT_LIKE},
    **{model_type: ["q_proj", "v_proj"] for model_type in _LLAMA_LIKE},
    "distilbert": ["q_lin", "v_lin"],
    "gemma3": r".*language_model\..*\.(q_proj|v_proj)",  # the vision tower has linear layers of the same names
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
    "persimmon": ["query_key_value"],
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _SEEING_QWEN),
    "phi3": ["qkv_proj"],
    "swin": _VISION,
    "umt5": ["q", "v"],
    "vit": _VISION,
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}
"""model_type -> target_modules. PEFT's own table decides, so that methods and LoRA adapt the same linear layers;
missing model types are added by its rule, queries and values or the projection that holds both."""


def targets(config: Any, path: str) -> Any:
    """Whether a PEFT config means the module at `path`, and in that layer; as PEFT's own check."""
    # PEFT looks for a layer's number behind a dot, which the paths of a body without a head lack.
    within = f".{path}" if getattr(config, "layers_to_transform", None) is not None else path
    return check_target_module_exists(config, within)


def sites_of(method: Method, config: Any, model: nn.Module) -> dict[str, Site]:
    """Path -> site of every place in `model` that `config` adapts, in the model's order. Changes nothing.

    Raises:
        ConfigError: a target module is no linear layer, or split by tensor parallelism; the method finds no place.
    """
    check_takes_parameters(method, config)
    sites = _sites_of(method, config, model)
    for path in sites:
        _check_whole(model, path)
    return sites


def _sites_of(method: Method, config: Any, model: nn.Module) -> dict[str, Site]:
    if method.sites is not None:
        return method.sites(config, model, Anatomy(model, layers_pattern=config.layers_pattern))
    sites = target_sites(config, model) if config.target_modules else {}
    if config.target_parameters:
        from ziggurat.host.experts.sites import parameter_sites

        sites |= parameter_sites(config, model)
    if config.needs_stack and sites and all(not site.role for site in sites.values()):
        anatomy = Anatomy(model, layers_pattern=config.layers_pattern)
        if not anatomy.stacks:
            anatomy.place(next(iter(sites)))  # raises: the config has fields about layers, and there are none
    return sites


def checked_specs(method: Method, config: Any, sites: Mapping[str, Site]) -> dict[str, TensorSpec]:
    """Every tensor of an adapter of `config` once, as `unique_specs` gives them.

    Raises:
        ConfigError: the config doesn't fit the model whose sites these are.
    """
    for site in sites.values():
        if method.check is not None and config.blended is None:
            method.check(config.at(site), site)
    config.check_sites(sites)
    specs = unique_specs(method, config.at, sites, fresh=config.ziggurat_version is None)
    if config.freeze_tiers is not None:
        from ziggurat.host.sets.inherit import check_frozen

        check_frozen(method, config, sites, specs)
    return specs


def _check_whole(model: nn.Module, path: str) -> None:
    """Raise ConfigError if tensor parallelism has split the weight at `path`: each process's factors would differ."""
    module: Any = model
    for name in path.split("."):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):  # the last name may be a parameter's, of fused experts
            module = look_through(inner) or inner
    # transformers marks the module, in newer versions by its forward alone.
    forward = vars(module).get("forward")
    marked = getattr(module, "_hf_tp_plan", None) is not None
    if marked or getattr(forward, "__module__", "").endswith(".tensor_parallel"):
        raise ConfigError(
            f"{path!r} is split over processes by tensor parallelism (tp_plan), so each process would adapt "
            "a part of its own. Load the model without tp_plan and use DDP or FSDP2 (docs/distributed.md); LoR2C's "
            "paths, which stand around whole layers, work as it is."
        )


def check_takes_parameters(method: Method, config: Any) -> None:
    """Raise ConfigError if `config` names parameters of experts and the method doesn't update weights."""
    if config.target_parameters and (method.sites is not None or method.pair is None):
        raise ConfigError(
            f"target_parameters={sorted(config.target_parameters)}: {method.card.shown} makes no low-rank update of "
            "weights, and can't adapt parameters of experts. Take target_parameters out, or use another method."
        )
    if config.target_parameters:
        check_finds_parameters()


def target_sites(config: Any, model: nn.Module) -> dict[str, Site]:
    """Path -> site of the target modules of any PEFT config.

    Raises:
        ConfigError: a target module is no linear layer.
    """
    config = _maybe_include_all_linear_layers(config, model)
    anatomy = Anatomy(model, layers_pattern=getattr(config, "layers_pattern", None))
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        if not path or path.startswith(inside) or not targets(config, path):
            continue
        if is_router(module):
            check_router(config, path, module)
        elif not is_adaptable(module):
            raise ConfigError(
                f"Target module {path!r} is {with_article(type(module).__name__)}, which is not supported: only "
                "linear layers (torch.nn.Linear, Conv1D, quantised linear layers) and routers are. Name linear layers "
                "in target_modules, or leave this module out by exclude_modules."
            )
        sites[path] = linear_site(model, anatomy, path, module)
    return with_experts(sites)


def check_router(config: Any, path: str, router: nn.Module) -> None:
    """Raise ConfigError if `config` asks for something that no adapter of a router can do."""
    if getattr(config, "lora_dropout", 0):
        raise ConfigError(
            f"lora_dropout={config.lora_dropout}, and {path!r} is a router: its update is added to its weight, so that "
            "no input can be dropped. Leave the router out, or train without dropout."
        )
    check_in_place(router, path)


def linear_site(model: nn.Module, anatomy: Anatomy, path: str, module: nn.Module) -> Site:
    """The site of the linear layer at `path`; outside every stack it is a stack of its own, with one layer."""
    return site_at(model, anatomy, path, *features(module))


def site_at(
    model: nn.Module, anatomy: Anatomy, path: str, d_in: int, d_out: int, num_experts: int | None = None
) -> Site:
    """The site at `path`, which maps d_in to d_out."""
    place = anatomy.position(path)
    stack = body_name(model, place.stack)
    return Site(path, stack, place.layer, place.num_layers, place.role, d_in, d_out, num_experts=num_experts)


def called(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` that are modules of `model`, or the ends of their paths."""
    names = set(names)
    lengths = {name.count(".") + 1 for name in names}
    paths = (node.path.split(".") for node in bare_tree(unwrap(model)[0]).walk())
    return names & {".".join(path[-length:]) for path in paths for length in lengths}


def no_match_hint(target_modules: str | Iterable[str], model: nn.Module) -> str:
    """What to do about target modules that matched nothing, after an error's text."""
    if isinstance(target_modules, str):
        names = re.findall(r"\w+(?:\.\w+)*", target_modules)
        if names and called(model, names) == {*names}:
            return f" Text is a regular expression for whole paths: give a list, target_modules={names}."
    elif (names := sorted(target_modules)) and called(model, names) == {*names}:
        return " The model has modules of these names: layers_to_transform, layers_pattern or exclude_modules bar them."
    near = near_misses(target_modules, model)
    return f" Nearest names in this model: {', '.join(near)}." if near else ""


def near_misses(target_modules: str | Iterable[str], model: nn.Module, limit: int = 6) -> list[str]:
    """The module names of `model` nearest to target names that matched nothing, best first.

    `target_modules`, as in PEFT: names, or one regular expression, of which the words are compared. A name of n
    components is compared with the last n components of each path, linear layers first and other modules where no
    linear layer is near. Where nothing is near either, the names of the linear layers, which can be adapted, are given,
    the most alike first.
    """
    names = re.findall(r"\w+(?:\.\w+)*", target_modules) if isinstance(target_modules, str) else sorted(target_modules)
    nodes = [node for node in bare_tree(unwrap(model)[0]).walk() if node.path]
    linear = [node.path for node in nodes if is_adaptable(node.module)]
    for paths, cutoff in ((linear, 0.6), ([node.path for node in nodes], 0.6), (linear, 0.0)):
        near = [(score, name) for target in names for score, name in _alike(target, paths) if score >= cutoff]
        if near:
            return list(dict.fromkeys(name for _, name in sorted(near, key=lambda pair: -pair[0])))[:limit]
    return []


def _alike(target: str, paths: Iterable[str]) -> list[tuple[float, str]]:
    """(similarity, ending) for each distinct ending of `paths` that is as long as `target`."""
    length = target.count(".") + 1
    endings = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
    matcher = difflib.SequenceMatcher(b=target.lower())
    scores = []
    for ending in endings:
        matcher.set_seq1(ending.lower())
        scores.append((matcher.ratio(), ending))
    return scores
