"""Tokens as a reader sees them: the smallest pieces of a text that are whole tokens and whole characters."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

Unit = tuple[str, int]  # a piece of a text, and how many tokens it is


def units(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str) -> list[Unit]:
    """The pieces of a text that is known to be these tokens. Joined, they are the text.

    Tokens that are parts of one character share a piece. What no token stands for, such as spaces that a tokenizer of
    words drops, goes with the token behind it.

    Raises:
        ValueError: for a tokenizer that does not say which characters its tokens are, and for other tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"lkv.show: expected a fast tokenizer, which tells the characters of every token, got "
            f"{type(tokenizer).__name__}"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded.input_ids) != list(tokens):
        raise ValueError("lkv.show: expected the tokens of the text, got others")
    return pieces(text, encoded.offset_mapping)


def pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[Unit]:
    """The same from the characters `[begin, end)` of every token: they ascend, and may be none or overlap."""
    found, begin, end, count = [], 0, 0, 0
    for first, last in offsets:
        if end > begin and first >= end and last > end:
            found.append((text[begin:end], count))
            begin, count = end, 0
        end, count = max(end, last), count + 1
    return [*found, (text[begin:], count)] if count else found


def opening_units(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[Unit]:
    """The same for tokens whose text is not known; all in one where they are not what their text is read as."""
    if not tokens:
        return []
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=False))
    try:
        return units(tokenizer, tokens, text)
    except ValueError:
        return [(text, len(tokens))]
