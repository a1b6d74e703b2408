"""Text to tokens, the tokens of padding and ends, and packages that are missing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import tiny_texts
from transformers import PreTrainedTokenizerBase

from lkv.extras import MissingPackage, need
from lkv.tasks import Words
from lkv.text import ask, chat_frame, encode, opening, pad_and_ends


def ends_of(model: object, tokenizer: object, pad: object) -> tuple[int, list[int]]:
    return pad_and_ends(
        SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=model)),
        SimpleNamespace(eos_token_id=tokenizer, pad_token_id=pad),
    )


def test_only_the_first_text_begins(tokenizer: PreTrainedTokenizerBase, words: Words) -> None:
    text = "set Bala to 41 87 ."
    assert encode(tokenizer, text) == words.encode(text)
    assert encode(tokenizer, text, begins=True) == [tokenizer.bos_token_id, *words.encode(text)]
    assert encode(tokenizer, "", begins=True) == [tokenizer.bos_token_id] and encode(tokenizer, "") == []


@pytest.mark.parametrize(("template", "own", "begins"), [(None, [], True), ("any", [], False), ("any", [1], True)])
def test_a_token_that_opens_messages_does_not_begin_a_text(template: str | None, own: list[int], begins: bool) -> None:
    """A chat model whose tokenizer puts its `bos_token` before no text has it for the roles of a chat."""

    class Tokenizer:
        bos_token_id, chat_template = 1, template

        def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[*(own if add_special_tokens else []), *map(ord, text)])

    assert encode(Tokenizer(), "ab", begins=True) == ([1, 97, 98] if begins else [97, 98])
    assert encode(Tokenizer(), "ab") == [97, 98]


def test_the_frame_of_a_chat() -> None:
    class Tokenizer:
        chat_template: str | None = "any"
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
            assert not add_special_tokens
            return SimpleNamespace(input_ids=[*map(ord, text)])

        def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
            assert options["add_generation_prompt"] and not options["tokenize"] and not options["enable_thinking"]
            return f"<s>{messages[0]['content']}</s><a>"

    before, after = chat_frame(Tokenizer())
    assert ("".join(map(chr, before)), "".join(map(chr, after))) == ("<s>", "</s><a>")
    Tokenizer.apply_chat_template = lambda self, messages, **options: "<s>HELLO</s>"
    with pytest.raises(ValueError, match="a chat template that hands on what a user writes"):
        chat_frame(Tokenizer())
    Tokenizer.chat_template = None
    assert chat_frame(Tokenizer()) == ([], [])


def test_special_tokens_of_the_tokenizer_stay_out() -> None:
    """Some put tokens around every text unless an option forbids it."""

    class Tokenizer:
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
            inner = list(map(ord, text))
            return SimpleNamespace(input_ids=[1, *inner, 2] if add_special_tokens else inner)

    assert encode(Tokenizer(), "ab") == encode(Tokenizer(), "ab", begins=True) == [97, 98]
    Tokenizer.bos_token_id = 0  # a number like any other
    assert encode(Tokenizer(), "ab", begins=True) == [0, 97, 98]


@pytest.mark.parametrize(
    ("model", "tokenizer", "pad", "expected"),
    [
        ([7, 8], 9, 5, (5, [7, 8])),  # the model knows better than its tokenizer
        (7, 9, 5, (5, [7])),
        (None, 9, 5, (5, [9])),
        (0, 9, 5, (5, [0])),
        ([7, 8], 9, None, (7, [7, 8])),  # without one for padding, an end token
        (None, None, None, (0, [])),
        (None, None, 0, (0, [])),
        ([7, 8], 9, 0, (0, [7, 8])),
    ],
)
def test_pad_and_ends(model: object, tokenizer: object, pad: object, expected: tuple[int, list[int]]) -> None:
    assert ends_of(model, tokenizer, pad) == expected


def test_a_package_that_is_there_is_returned() -> None:
    assert need("json", "lkv", "anything").dumps([1]) == "[1]"
    assert need("os.path", "lkv", "anything") is sys.modules["os.path"]


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^lkv: expected the package 'no_such' for its tasks, got none; pip install 'lkv-ext\[lm-eval\]'$"
    with pytest.raises(MissingPackage, match=message) as raised:
        need("no_such", "lm-eval", "its tasks")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    with pytest.raises(MissingPackage, match=message):
        need("no_such.inner", "lm-eval", "its tasks")
    # A package that is there, and needs one that is not: the latter is what to install.
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)

    class Finder:
        @staticmethod
        def find_spec(name: str, *rest: object) -> None:
            if name == "colorsys":
                raise ModuleNotFoundError("no module named 'no_such'", name="no_such")

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(MissingPackage, match=message):
        need("colorsys", "lm-eval", "its tasks")


def test_a_text_and_a_question_behind_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """In a chat template; without one; and for a tokenizer that knows no words of ours."""
    chat, plain = tiny_texts.tokenizer(), tiny_texts.tokenizer(chat=False)
    assert chat.decode(opening(chat)) == "<s>user\n" and plain.decode(opening(plain)) == "<s>"
    plain.bos_token = None
    assert opening(plain) == []
    assert chat.decode(ask(chat, "Why?")) == "\n\nWhy?</s>\n<s>assistant\n"
    assert chat.decode(ask(chat, "Why?", "Because")) == "\n\nWhy?</s>\n<s>assistant\nBecause"
    assert plain.decode(ask(plain, "Why?")) == "\n\nQuestion: Why?\nAnswer:"
    assert plain.decode(ask(plain, "Why?", "Because")) == "\n\nQuestion: Why?\nAnswer: Because"
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    assert ask(tokenizer, "set Bala", "to") == encode(tokenizer, "set Bala to") != encode(tokenizer, "set Bala")
