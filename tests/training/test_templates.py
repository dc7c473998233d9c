"""Which tokens of a conversation are learned, on the chat templates of published models that TRL brings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from word_tokenizer import byte_tokenizer
from ziggurat.errors import DataError
from ziggurat.training.data.template import answer_tokens

FOLDER = Path(trl.__file__).parent / "chat_templates"
#: Special tokens of the models whose templates these are.
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|start|>", "<|channel|>", "<|message|>"),
    *("<|return|>", "<|call|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<s>", "</s>"),
]
TURNS = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi! How are you?"},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
ASKED = [
    TURNS[2],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "2"},
    TURNS[3],
]
#: The system prompt joins the last question, so that what comes before the first answer changes once more follows.
MOVING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.revindex <= 2 %}"
    "Be brief. {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(SPECIAL, bos_token="<bos>", eos_token="<eos>")


def template(name: str) -> str:
    path = FOLDER / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"the installed TRL has no template {name}")
    return path.read_text(encoding="utf-8")


def learned(tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: Any = None, **how: Any) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    _, ids, mask = answer_tokens(tokenizer, messages, tools, **how)
    return list(runs(tokenizer, ids, mask))


def runs(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[int]) -> Iterator[str]:
    run: list[int] = []
    for token, answer in zip([*ids, 0], [*mask, 0], strict=True):
        if answer:
            run.append(token)
        elif run:
            yield tokenizer.decode(run)
            run = []


PLAIN = {
    "qwen2_5": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("name", PLAIN)
def test_all_answers_with_the_end_of_their_turn_and_nothing_else(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template(name)
    end = PLAIN[name]
    answers = ["Hi! How are you?" + end, "It is 2." + end]
    for messages in (TURNS, [SYSTEM, *TURNS]) if name != "gemma" else (TURNS,):
        assert learned(tokenizer, messages) == answers
        assert learned(tokenizer, messages, last=True) == answers[1:]
        assert learned(tokenizer, messages, since=len(messages) - 1) == answers[1:]
        text, ids, _ = answer_tokens(tokenizer, messages)
        assert ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5_vl", "qwen3_vl"])
def test_token_for_token_what_trls_marked_templates_say(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template(name)
    _, ids, mask = answer_tokens(tokenizer, TURNS)
    # TRL's twin of the template has generation marks, by which it is read; its marks take in the line break behind.
    tokenizer.chat_template = template(f"{name}_training")
    _, same, marked = answer_tokens(tokenizer, TURNS)
    assert same == ids
    behind = [place for place in range(len(ids)) if mask[place] != marked[place]]
    assert {tokenizer.decode([ids[place]]) for place in behind} <= {"\n"}
    assert all(marked[place] and mask[place - 1] for place in behind)


def test_templates_that_write_the_last_answer_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template("qwen3")
    thoughts = "<think>\n\n</think>\n\n"
    assert learned(tokenizer, TURNS) == ["Hi! How are you?<|im_end|>", f"{thoughts}It is 2.<|im_end|>"]
    thinking = [*TURNS[:3], {**TURNS[3], "reasoning_content": "1+1 is 2"}]
    assert learned(tokenizer, thinking)[1] == "<think>\n1+1 is 2\n</think>\n\nIt is 2.<|im_end|>"
    tokenizer.chat_template = template("gptoss")
    start = "<|channel|>final<|message|>"
    assert learned(tokenizer, TURNS) == [f"{start}Hi! How are you?<|end|>", f"{start}It is 2.<|return|>"]
    tokenizer.chat_template = template("phi3")  # ends the whole text with another token than a turn
    assert learned(tokenizer, TURNS) == ["Hi! How are you?<|end|>", "It is 2.<|end|>\n<eos>"]


def test_a_template_that_moves_what_comes_before_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MOVING
    assert learned(tokenizer, TURNS) == ["Hi! How are you?</s>", " It is 2.</s>"]


def test_calls_of_tools_are_learned_and_what_tools_return_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template("qwen2_5")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call><|im_end|>'
    assert learned(tokenizer, ASKED, TOOLS) == [call, "It is 2.<|im_end|>"]
    tokenizer.chat_template = template("llama3_1")
    call, answer = learned(tokenizer, ASKED, TOOLS)
    assert '"add"' in call and call.endswith(("<|eot_id|>", "<|eom_id|>")) and answer == "It is 2.<|eot_id|>"


def test_answers_that_a_template_leaves_out_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = template("smolvlm")  # takes parts of messages, no texts
    with pytest.raises(DataError, match="the chat template leaves out the content of message 2"):
        learned(tokenizer, TURNS)
    tokenizer.chat_template = template("gemma")
    with pytest.raises(DataError, match="System role not supported; put the system prompt into the user's first"):
        learned(tokenizer, [SYSTEM, *TURNS])
