"""Text to tokens, as models expect it."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = False) -> list[int]:
    """Tokens of a text; before the first one of all comes the model's beginning token, if it has one."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return [tokenizer.bos_token_id, *tokens] if begins and tokenizer.bos_token_id is not None else tokens


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens, without special ones."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)  # a list of texts belongs to a list of lists
    return text


def pad_and_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[int]]:
    """A token for padding, and those that end a text."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = tokenizer.pad_token_id
    return (ends[0] if ends else 0) if pad is None else pad, ends
