"""Tiny, randomly initialised models of every architecture the tests run on. Nothing is downloaded.

`ZOO["bert"].build()` makes the model (the same weights each time, in eval mode) and `.inputs()` what its
forward takes. transformers is imported, and a model built, only when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from plain_models import LAYERS, WIDTH, Block, NoStack, PlainList, PlainSequential, RoutedBlock

VOCABULARY = 100


@dataclass(frozen=True)
class Zoo:
    """One architecture.

    `targets`: the default target modules; `stacks`: path -> number of layers; `task_type`: of PEFT.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str]
    stacks: dict[str, int]
    task_type: str | None = None


# --- what goes in ---------------------------------------------------------------------------------


def _random_ids(length: int, seed: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def text_inputs() -> dict[str, Tensor]:
    """Two texts, the second shorter and padded."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _random_ids(7, seed=1) * mask, "attention_mask": mask}


def pair_inputs() -> dict[str, Tensor]:
    return text_inputs() | {"decoder_input_ids": _random_ids(5, seed=2)}


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def speech_inputs() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "decoder_input_ids": _random_ids(5, seed=2)}


def plain_inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(5))}


# --- models of transformers -----------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_KEY: dict[str, Any] = {"num_key_value_heads": 1}  # values are narrower than queries
_HEADS: dict[str, Any] = {**_ONE_KEY, "head_dim": 8}
_LOCAL: dict[str, Any] = {**_HEADS, "sliding_window": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
#: Between transformers 5.6 and 5.16 vision models lost their old names of stacks, queries and values.
_OLD_VISION = Version(version("transformers")) < Version("5.16")
_VISION_TARGETS = ["query", "value"] if _OLD_VISION else ["q_proj", "v_proj"]
_DISENTANGLED: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS + 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS + 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    # Its scores aren't divided by the root of their width: with larger weights a softmax turns rounding into signal.
    "initializer_factor": 0.5,
}
_VIT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
_SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 3],
    "num_heads": [1, 2],
    "window_size": 2,
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with the same random weights each time, in eval mode; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _transformers(head: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        return seeded(lambda: getattr(transformers, head).from_config(made))

    return build


def _encoder(config: str, stack: str, targets: list[str], layers: int = LAYERS, **settings: Any) -> Zoo:
    settings = {**_TEXT, "num_labels": 3, **settings}
    build = _transformers("AutoModelForSequenceClassification", config, settings)
    return Zoo(build, text_inputs, targets, {stack: layers}, "SEQ_CLS")


def _decoder(config: str, stack: str, targets: list[str], layers: int = LAYERS, **settings: Any) -> Zoo:
    settings = {**_TEXT, "num_hidden_layers": layers, **settings}
    return Zoo(
        _transformers("AutoModelForCausalLM", config, settings), text_inputs, targets, {stack: layers}, "CAUSAL_LM"
    )


def _two_stacks(
    head: str,
    config: str,
    stacks: tuple[str, str],
    targets: list[str],
    inputs: Callable[[], dict[str, Tensor]] = pair_inputs,
    task_type: str | None = "SEQ_2_SEQ_LM",
    **settings: Any,
) -> Zoo:
    encoder, decoder = stacks
    build = _transformers(head, config, settings)
    return Zoo(build, inputs, targets, {encoder: LAYERS, decoder: LAYERS + 1}, task_type)


def _plain(build: Callable[[], nn.Module], targets: list[str], stacks: dict[str, int]) -> Zoo:
    return Zoo(lambda: seeded(build), plain_inputs, targets, stacks)


# --- the table ------------------------------------------------------------------------------------

ZOO: dict[str, Zoo] = {
    "bert": _encoder("BertConfig", "bert.encoder.layer", ["query", "value"]),
    "roberta": _encoder("RobertaConfig", "roberta.encoder.layer", ["query", "value"]),
    "electra": _encoder("ElectraConfig", "electra.encoder.layer", ["query", "value"], embedding_size=8),
    "distilbert": _encoder("DistilBertConfig", "distilbert.transformer.layer", ["q_lin", "v_lin"], hidden_dim=32),
    "mpnet": _encoder("MPNetConfig", "mpnet.encoder.layer", ["q", "v"]),
    "deberta": _encoder("DebertaConfig", "deberta.encoder.layer", ["in_proj"], **_DISENTANGLED),
    "deberta-v2": _encoder(
        "DebertaV2Config",
        "deberta.encoder.layer",
        ["query_proj", "value_proj"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        **_DISENTANGLED,
    ),
    "modernbert": _encoder(
        "ModernBertConfig", "model.layers", ["Wqkv"], global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    # One layer, run LAYERS times.
    "albert": _encoder(
        "AlbertConfig", "albert.encoder.albert_layer_groups", ["query", "value"], layers=1, embedding_size=8
    ),
    "gpt2": _decoder("GPT2Config", "transformer.h", ["c_attn"]),
    "gptj": _decoder("GPTJConfig", "transformer.h", ["q_proj", "v_proj"], rotary_dim=4),
    "gpt_neox": _decoder("GPTNeoXConfig", "gpt_neox.layers", ["query_key_value"]),
    "bloom": _decoder("BloomConfig", "transformer.h", ["query_key_value"]),
    "opt": _decoder("OPTConfig", "model.decoder.layers", ["q_proj", "v_proj"], ffn_dim=32, word_embed_proj_dim=WIDTH),
    "llama": _decoder("LlamaConfig", "model.layers", ["q_proj", "v_proj"], **_HEADS),
    "mistral": _decoder("MistralConfig", "model.layers", ["q_proj", "v_proj"], **_HEADS),
    "qwen2": _decoder("Qwen2Config", "model.layers", ["q_proj", "v_proj"], **_ONE_KEY),
    "qwen3": _decoder("Qwen3Config", "model.layers", ["q_proj", "v_proj"], **_HEADS),
    "gemma2": _decoder("Gemma2Config", "model.layers", ["q_proj", "v_proj"], **_LOCAL),
    "gemma3_text": _decoder("Gemma3TextConfig", "model.layers", ["q_proj", "v_proj"], **_LOCAL),
    "phi3": _decoder("Phi3Config", "model.layers", ["qkv_proj"], **_ONE_KEY),
    "mixtral": _decoder("MixtralConfig", "model.layers", ["q_proj", "v_proj"], num_local_experts=4, **_HEADS),
    "qwen2_moe": _decoder(
        "Qwen2MoeConfig",
        "model.layers",
        ["q_proj", "v_proj"],
        shared_expert_intermediate_size=16,
        **_ONE_KEY,
        **_EXPERTS,
    ),
    "qwen3_moe": _decoder("Qwen3MoeConfig", "model.layers", ["q_proj", "v_proj"], **_HEADS, **_EXPERTS),
    # Attention in every second layer only, Mamba in the others.
    "jamba": _decoder(
        "JambaConfig",
        "model.layers",
        ["q_proj", "v_proj"],
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        **_ONE_KEY,
        **_MAMBA,
    ),
    # One attention block, shared by the layers that have attention.
    "zamba": _decoder(
        "ZambaConfig",
        "model.layers",
        ["q_proj", "v_proj"],
        layers=6,
        num_key_value_heads=2,
        n_mamba_heads=2,
        **_MAMBA,
    ),
    "t5": _two_stacks("AutoModelForSeq2SeqLM", "T5Config", ("encoder.block", "decoder.block"), ["q", "v"], **_T5),
    "bart": _two_stacks(
        "AutoModelForSeq2SeqLM",
        "BartConfig",
        ("model.encoder.layers", "model.decoder.layers"),
        ["q_proj", "v_proj"],
        **_BART,
    ),
    "whisper": _two_stacks(
        "AutoModelForSpeechSeq2Seq",
        "WhisperConfig",
        ("model.encoder.layers", "model.decoder.layers"),
        ["q_proj", "v_proj"],
        speech_inputs,
        task_type=None,  # PEFT's class for sequence-to-sequence passes input_ids, which speech has not
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        **_BART,
    ),
    "vit": Zoo(
        _transformers("AutoModelForImageClassification", "ViTConfig", {"num_labels": 3, **_VIT}),
        image_inputs,
        _VISION_TARGETS,
        {"vit.encoder.layer" if _OLD_VISION else "vit.layers": LAYERS},
    ),
    "swin": Zoo(
        _transformers("AutoModelForImageClassification", "SwinConfig", {"num_labels": 3, **_SWIN}),
        image_inputs,
        _VISION_TARGETS,
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 3},
    ),
    "clip": Zoo(
        _transformers("AutoModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": _VIT, "projection_dim": 8}),
        lambda: text_inputs() | image_inputs(),
        ["q_proj", "v_proj"],
        {"text_model.encoder.layers": LAYERS, "vision_model.encoder.layers": LAYERS},
    ),
    "plain_list": _plain(lambda: PlainList([Block() for _ in range(LAYERS)]), ["query", "value"], {"blocks": LAYERS}),
    "plain_experts": _plain(
        lambda: PlainList([RoutedBlock() for _ in range(LAYERS)]), ["query", "value"], {"blocks": LAYERS}
    ),
    "plain_sequential": _plain(PlainSequential, ["query", "value"], {"net": LAYERS}),
    "no_stack": _plain(NoStack, ["lin0", "lin1"], {}),
}


def shallow(name: str) -> nn.Module:
    """`ZOO[name]` with the first two layers of each stack alone, for compiling, which takes its time by the layer."""
    model = ZOO[name].build()
    for stack in ZOO[name].stacks:
        parent, _, leaf = stack.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(stack)[:2])
    model.config.num_hidden_layers = 2
    return model
