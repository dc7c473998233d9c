"""`ziggurat chat`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ziggurat.errors import DataError, RecipeError
from ziggurat.terminal import clean, say

from . import options

if TYPE_CHECKING:
    from ziggurat.training.answers.load import Loaded
    from ziggurat.training.model.generate import Sampling


def chat(
    adapter: options.Adapter,
    system: options.System = None,
    tokens: options.Tokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
) -> None:
    """Talk to a trained adapter in the terminal; its answers come word by word."""
    from ziggurat.training.answers.load import load_adapter_model
    from ziggurat.training.answers.predict import WRITES
    from ziggurat.training.model.generate import Sampling

    loaded = load_adapter_model(adapter)
    if loaded.head.task not in WRITES:
        raise RecipeError(f"'{adapter}' was trained for {loaded.head.task} and writes no texts: use `ziggurat predict`")
    remembers = loaded.run.get("shape") == "messages"
    if system is not None and not remembers:
        raise DataError("this adapter was not trained on conversations: it takes no system prompt")
    note = "/new begins a new conversation" if remembers else "each line is a question of its own, as in training"
    say(f"{adapter}: {note}; /quit or Ctrl-D ends.")
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            say("")
            return
        if line == "/quit":
            return
        if line == "/new":
            messages = []
        elif line:
            messages = messages if remembers else []
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(loaded, messages, system, Sampling(tokens, temperature, top_p, top_k, seed))
            except DataError as error:
                say(f"{error}; /new begins anew", err=True)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _answer(loaded: Loaded, messages: list[dict[str, Any]], system: str | None, sampling: Sampling) -> str:
    """The answer to the last message, printed as it is generated. Raises DataError if the conversation is too long."""
    from transformers import TextStreamer

    from ziggurat.training.answers.predict import asked_of
    from ziggurat.training.model.generate import generate

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(clean(text) + ("\n" if stream_end else ""))
            sys.stdout.flush()

    tokenizer: Any = loaded.tokenizer
    streamer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = asked_of(loaded, messages, system)
    answers = generate(loaded.model, loaded.writer, [ids], sampling, name=loaded.recipe.model, streamer=streamer)
    return next(answers)
