"""Text to tokens, as models expect it."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = False) -> list[int]:
    """Tokens of a text; before the first one of all comes the model's beginning token, if it has one.

    The beginning token of some chat models opens a message of their template. Their tokenizers put none before a text.
    """
    tokens, first = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.bos_token_id
    if begins and first is not None and getattr(tokenizer, "chat_template", None) is not None:
        begins = first in tokenizer("").input_ids
    return [first, *tokens] if begins and first is not None else tokens


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


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens before what a user writes, and after it up to the answer; two empty lists without a chat template.

    Raises:
        ValueError: for a template that changes what a user writes.
    """
    if tokenizer.chat_template is None:
        return [], []
    content = "x\n~~~~\nx"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    before, found, after = str(text).partition(content)
    if not found:
        raise ValueError("lkv: expected a chat template that hands on what a user writes, got one that changes it")
    return encode(tokenizer, before), encode(tokenizer, after)
