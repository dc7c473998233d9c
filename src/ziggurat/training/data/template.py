"""Conversations through a chat template: their tokens, and the mask of the answers' tokens."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from ziggurat.errors import DataError, first_line

from .chat import Message

#: A template's own mark of the text that the assistant generates.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: A probe that marks an answer's place in the template's output: no template removes these characters.
_PROBE = "\u2603\u2602"


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Any = None,
    *,
    last: bool = False,
    since: int = 0,
) -> tuple[str, list[int], list[int]]:
    """The text of a conversation, its token ids, and a mask that is 1 for the tokens of its answers.

    With `last` for the last answer alone, else for those from message `since` on; by the template's own generation
    marks if it has them, else by `Rendered`. Raises DataError as that does.
    """
    template = tokenizer.get_chat_template(tools=tools or None)
    if _GENERATION.search(template) and tokenizer.is_fast and not last and not since:
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        marked = _apply(tokenizer, messages, tools, **how)
        return rendered(tokenizer, messages, tools), list(marked["input_ids"]), list(marked["assistant_masks"])
    whole = Rendered(tokenizer, messages, tools)
    places = [place for place in range(since, len(messages)) if messages[place]["role"] == "assistant"]
    spans = [whole.answer(place) for place in (places[-1:] if last else places)]
    return whole.text, *_masked(tokenizer, whole.text, spans)


class Rendered:
    """A conversation through a chat template, and where its answers are in the text.

    An answer starts where the preceding conversation, opened for an answer, ends or differs from the whole, and ends
    with the conversation up to it, by the special token that ends its turn. For templates that write a turn differently
    once more turns follow (without its thoughts, say), a probe in the answer's content finds it.

    Raises DataError if the template refuses the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any) -> None:
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools
        self.text = rendered(tokenizer, messages, tools)
        specials = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special})
        self._ends = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def answer(self, place: int) -> tuple[int, int]:
        """The start and end of an answer. Raises DataError if the template leaves it out, or it can't be located."""
        start, end = self._start(place), self._end(place)
        ending = self.messages[place]["content"].strip()[-20:]
        if start > end or ending not in self.text[start:end]:
            raise DataError(f"the chat template leaves out the content of message {place + 1}, or changes it")
        return start, end

    def _start(self, place: int) -> int:
        if place:
            opened = self._first(place, add_generation_prompt=True)
            # Some templates end a text without generation prompt: both texts share the part before the answer.
            before = common_start(opened, self._first(place))
            if (start := common_start(opened, self.text)) >= before:
                return start
        return self._content_at(place, before=True)

    def _end(self, place: int) -> int:
        upto = self.text if place + 1 == len(self.messages) else self._first(place + 1)
        if self.text.startswith(upto):
            bare = upto.rstrip()
            by_token = any(mark.end() == len(bare) for mark in self._ends.finditer(bare))
            return len(bare) if by_token else len(upto)
        behind = self._content_at(place, before=False)
        mark = self._ends.search(self.text, behind)
        return mark.end() if mark else behind

    def _first(self, count: int, **how: Any) -> str:
        """The text of the first messages."""
        return rendered(self.tokenizer, self.messages[:count], self.tools, **how)

    def _content_at(self, place: int, *, before: bool) -> int:
        """The position where a message's content starts (`before`) or ends in the text, found by a probe."""
        content, probed = self.messages[place]["content"], [*self.messages]
        probed[place] = {**self.messages[place], "content": _PROBE + content if before else content + _PROBE}
        front, mark, behind = rendered(self.tokenizer, probed, self.tools).partition(_PROBE)
        if not mark or not content or front + behind != self.text:
            raise DataError(f"message {place + 1} can't be located in the chat template's output")
        return len(front)


def _masked(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Token ids of a text, and a mask of those that overlap a span."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        places: Any = encoded["offset_mapping"]
        return ids, [int(any(start < b and end > a for a, b in spans)) for start, end in places]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    mask = [0] * len(ids)
    for span in spans:
        a, b = (common_start(tokenizer(text[:at], add_special_tokens=False)["input_ids"], ids) for at in span)
        mask[a:b] = [1] * (b - a)
    return ids, mask


def asked_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None) -> list[int]:
    """Token ids of messages to be answered, opened as `answer_tokens` learned them.

    That is the common start of the generation prompt and of an answered conversation: some templates open a thought in
    the generation prompt only.
    """
    answered = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": "Yes"}], tools)
    opened = chat_ids(tokenizer, messages, tools, add_generation_prompt=True)
    return opened[: common_start(opened, answered)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which the chat template ends an answer; None if it uses no special token."""
    turns = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes"}]
    tail = rendered(tokenizer, turns).rpartition("Yes")[2]
    ids: Any = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def stop_at_turns(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model` stop at the end of a turn of its chat template, too: a base model may end texts by another token."""
    generation: Any = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ends = [*ends, end_of_turn(tokenizer)]
    generation.eos_token_id = [*dict.fromkeys(token for token in ends if token is not None)] or None


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None, **how: Any) -> list[int]:
    """Token ids of messages formatted by the tokenizer's chat template. Raises DataError if it refuses them."""
    return list(_apply(tokenizer, messages, tools, tokenize=True, return_dict=True, **how)["input_ids"])


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None, **how: Any) -> str:
    """The text of messages formatted by the tokenizer's chat template. Raises DataError if it refuses them."""
    return str(_apply(tokenizer, messages, tools, tokenize=False, **how))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tools=tools or None, **how)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        do = "; put the system prompt into the user's first message" if messages[0]["role"] == "system" else ""
        raise DataError(f"the chat template refuses messages of {roles}: {first_line(error)}{do}") from error


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common start of two sequences of ids or characters."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
