"""A tokenizer of whole words, for models too small to have learned one."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Iterable[str], **special: str) -> PreTrainedTokenizerFast:
    """A token for each special one in the order given (`unk_token` among them), then one for each of `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbered = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_tokenizer(special: Iterable[str], **named: str) -> PreTrainedTokenizerFast:
    """A token for each byte and for each of the `special` texts: any chat template's text goes through it unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast
