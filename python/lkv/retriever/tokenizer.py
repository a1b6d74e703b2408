"""The tokenizer of the language of `lkv.tasks.Words`: a word is a token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lkv.tasks import Words


def build_tokenizer(words: Words) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(words.vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
