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
