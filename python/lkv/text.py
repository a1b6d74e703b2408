"""Text to tokens, as models expect it."""

from __future__ import annotations

from collections.abc import Sequence

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


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens before a text that is read: those of the chat template if there is one, else the beginning token."""
    before, after = chat_frame(tokenizer)
    return before if before or after else encode(tokenizer, "", begins=True)


def ask(tokenizer: PreTrainedTokenizerBase, question: str, lead: str = "") -> list[int]:
    """Tokens of a question behind a text, up to where its answer begins: after `lead`, its first words.

    With a chat template the question ends the message of the user. Without one it is marked in words, unless the
    tokenizer does not know these.
    """
    after = chat_frame(tokenizer)[1]
    if after:
        return [*encode(tokenizer, f"\n\n{question}"), *after, *encode(tokenizer, lead)]
    if tokenizer.unk_token_id in encode(tokenizer, "Question: Answer:"):
        return encode(tokenizer, f"{question} {lead}".rstrip())
    return encode(tokenizer, f"\n\nQuestion: {question}\nAnswer: {lead}".rstrip())


def most_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens the model reads, if its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_fits(model: PreTrainedModel, tokens: int, command: str, text: str = "one") -> None:
    """
    Args:
        tokens: of a text and what comes after it. text, command: as for `check_known`.

    Raises:
        ValueError: for more than the model reads, where answers would be about places that it does not know.
    """
    most = most_tokens(model)
    if most is not None and tokens > most:
        raise ValueError(
            f"{command}: expected texts of at most the {most} tokens that the model reads, with what is asked about "
            f"them, got {text} of {tokens}; choose a smaller --length, shorter files, or a model that reads more"
        )


def check_known(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str, command: str) -> None:
    """
    Args:
        tokens: of a text. text, command: what it is and who reads it, for the message.

    Raises:
        ValueError: for a text of which the tokenizer does not know a tenth or more.
    """
    unknown = list(tokens).count(tokenizer.unk_token_id) / len(tokens)
    if unknown >= 0.1:
        raise ValueError(
            f"{command}: expected texts that the tokenizer of the model knows, got {text}, of which it "
            f"does not know {unknown:.0%}: is --model the one that was meant?"
        )
