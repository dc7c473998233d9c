"""Tiny untrained models that see images, with their processors, as they are published."""

from pathlib import Path
from typing import Any

import torch
import trl
from transformers import PreTrainedTokenizerFast

from word_tokenizer import byte_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
#: Sides of the pieces that both models see: 16 pixels are 2 x 2 places in a text.
_PATCH, _SIDE = 4, 16
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    return byte_tokenizer(special, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def save_tiny_smolvlm(folder: Path) -> None:
    """SmolVLM's first version, an Idefics3: images are cut into pieces, each behind its row and column."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer = _tokenizer([*special, *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    template = (TEMPLATES / "smolvlm.jinja").read_text(encoding="utf-8")
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(str(folder))
    pad = tokenizer.pad_token_id
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            **_TEXT,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": _SIDE,
            "patch_size": _PATCH,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=pad,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(str(folder))


def save_tiny_qwen_vl(folder: Path) -> None:
    """Qwen3-VL: an image has as many places as its sides say. Needs torchvision, as its processor does."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special)
    sizes = {"patch_size": _PATCH, "merge_size": 2, "temporal_patch_size": 2}
    pixels: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    template = (TEMPLATES / "qwen3_vl.jinja").read_text(encoding="utf-8")
    Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**sizes, **pixels), tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=template
    ).save_pretrained(str(folder))
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen3VLConfig(
        text_config={
            **_TEXT,
            "head_dim": 16,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "spatial_merge_size": 2,
            "patch_size": _PATCH,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(str(folder))
