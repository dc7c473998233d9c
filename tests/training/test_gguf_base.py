"""A base model in llama.cpp's format: read, trained beside, loaded again."""

import string
from pathlib import Path

import gguf
import pytest
import torch
from training_tables import write_jsonl
from transformers import AutoTokenizer, LlamaForCausalLM

from ziggurat.doctor import checks
from ziggurat.errors import ConfigError, RecipeError
from ziggurat.evaluation.subject import check_tasks, find_subject, load_subject
from ziggurat.plan import plan_recipe
from ziggurat.recipe.recipe import make_recipe
from ziggurat.training.answers.load import load_adapter_model
from ziggurat.training.loop.run import train
from ziggurat.training.model.meta import bare_config

#: Ours -> llama.cpp's names of a Llama's tensors.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.layers.": "blk.",
    "model.norm": "output_norm",
    "lm_head": "output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{role}_proj": f"attn_{role}" for role in "qkv"},
    **{f"mlp.{role}_proj": f"ffn_{role}" for role in ("gate", "up", "down")},
}


def write_gguf(source: Path, target: Path) -> None:
    """The weights of the tiny Llama in `source` as floats, with a vocabulary of letters."""
    model = LlamaForCausalLM.from_pretrained(source)
    config = model.config
    special = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(range(5))
    tokens = [*special, *string.ascii_lowercase, "Ġ", "th"]
    tokens += [f"<{index}>" for index in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_from_llama_cpp_trains_and_is_no_longer_called_quantised(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_gguf(tiny_llama, tmp_path / "base" / "tiny.gguf")
    rows = [{"prompt": "the", "completion": "fine"}, {"prompt": "a", "completion": "bad"}] * 6
    made = make_recipe(
        {
            "model": str(tmp_path / "base"),
            "task": "instruct",
            "data.train": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
            "data.validation": str(tmp_path / "rows.jsonl"),
            "method.name": "msplora",
            "method.r": 2,
            "train.max_steps": 2,
            "train.evaluate": "never",
            "train.save": "never",
            "output": str(tmp_path / "out"),
        }
    )
    result = train(made)
    assert result.after["loss"] < result.before["loss"]
    loaded = load_adapter_model(result.folder)
    assert getattr(loaded.model.config, "quantization_config", None) is None
    weights = LlamaForCausalLM.from_pretrained(tiny_llama).model.embed_tokens.weight
    torch.testing.assert_close(loaded.model.get_input_embeddings().weight, weights, rtol=0, atol=0)


def test_eval_takes_it_by_its_folder_or_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, file)
    weights = LlamaForCausalLM.from_pretrained(tiny_llama).model.embed_tokens.weight
    for place in (tmp_path, file):
        subject = find_subject(place)
        check_tasks(subject, ["mmlu"])
        model, tokenizer, run = load_subject(subject)
        assert run is None and model.can_generate() and not model.training and tokenizer.convert_ids_to_tokens(5) == "a"
        torch.testing.assert_close(model.get_input_embeddings().weight.float(), weights, rtol=0, atol=0)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match=r"holds several, name one: other\.gguf, tiny\.gguf"):
        load_subject(find_subject(tmp_path))


def test_plans_and_the_doctor_read_its_config(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_gguf(tiny_llama, tmp_path / "base" / "tiny.gguf")
    method = {"name": "msplora", "target_modules": ["q_proj"], "ranks": [4, 2, 1]}
    values = {"model": str(tmp_path / "base"), "task": "instruct", "data": {"train": "demo"}}
    for more in ({}, {"gguf_file": "tiny.gguf"}):
        recipe = make_recipe({**values, **more, "method": method})
        assert not [item for item in checks.recipe(recipe, {}) if item.level != "note"]
        # 32 inputs and outputs, three mid groups, four layers.
        assert plan_recipe(recipe.model, recipe, measure_memory=False).adapter == 64 * (4 + 3 * 2 + 4)
    assert bare_config(tmp_path / "base").hidden_size == 32
    with pytest.raises(ConfigError, match=r"bose' does not exist; nearest in .*: base"):
        bare_config(tmp_path / "bose")
