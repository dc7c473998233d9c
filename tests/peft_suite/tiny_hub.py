"""A Hugging Face cache of tiny random models under the names that PEFT's tests ask the hub for."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers as T
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 1100
PROMPT_WORDS = "this is a test prompt be yourself everyone else already taken the quick brown fox"
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128}
GPT |= {"bos_token_id": 0, "eos_token_id": 0}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 5, "n_head": 4}
NEOX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 100,
}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}

#: A class of transformers, the class of its config, and the config's fields.
Model = tuple[str, str, dict[str, Any]]

_OPT = ("OPTForCausalLM", "OPTConfig", OPT)
_GPT2 = ("GPT2LMHeadModel", "GPT2Config", GPT)
_LLAMA = ("LlamaForCausalLM", "LlamaConfig", LLAMA)
_T5 = ("T5ForConditionalGeneration", "T5Config", T5)

#: What each name on the hub stands for.
MODELS: dict[str, Model] = {
    "google/flan-t5-small": _T5,
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/opt-125m": _OPT,
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-t5": _T5,
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**LLAMA, "pad_token_id": 0, "num_labels": 2},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
}


def spread(name: str) -> float:
    """Standard deviation of the weights.

    An untrained tiny model's output is nearly constant, and an adapter can't be seen in it; larger weights help.
    """
    return 0.1 if "calibrated" in name else 0.25


def build(name: str, model_class: str, config_class: str, fields: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(T, model_class)(getattr(T, config_class)(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread(name))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(200)), *PROMPT_WORDS.split()]
    numbered = {word: i for i, word in enumerate(dict.fromkeys(words))}
    fast = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def furnish(cache: Path, models: dict[str, Model] = MODELS) -> int:
    """Put what is missing into the hub cache `cache`, laid out as huggingface_hub does; how many were made."""
    made = 0
    for name, model in models.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        revision = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        snapshot = repository / "snapshots" / revision
        if (repository / "refs" / "main").is_file():
            continue
        snapshot.mkdir(parents=True, exist_ok=True)
        build(name, *model).save_pretrained(snapshot)
        tokenizer().save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)
        made += 1
    return made
