"""Files of three domains, and a tokenizer whose tokens are bytes, with a chat template or without."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = (
    "river", "stone", "window", "garden", "machine", "letter", "winter", "music", "engine", "market", "paper",
    "morning", "shadow", "forest",
)  # fmt: skip


def prose(rng: random.Random, sentences: int) -> str:
    made = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 9))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[i : i + 5]) for i in range(0, sentences, 5)) + "\n"


def code(rng: random.Random, functions: int) -> str:
    names = [f"{rng.choice(WORDS)}_{i}" for i in range(functions)]
    return "\n\n".join(f"def {x}(a, b):\n    c = a + b\n    return [c, {rng.randrange(99)}]" for x in names) + "\n"


def files(folder: Path, count: int = 6) -> list[Path]:
    """Folders of essays and of sources."""
    rng = random.Random(1)
    for i in range(count):
        for name, text in ((f"essays/{i}.txt", prose(rng, 90)), (f"sources/{i}.py", code(rng, 60))):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return [folder / "essays", folder / "sources"]


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def model(seed: int = 0, **changes: object) -> PreTrainedModel:
    """3 layers, 4 query heads on 2 KV heads of 8, for the tokenizer."""
    import torch

    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    options = dict(vocab_size=259, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=4096)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options, **special, **changes})).eval().requires_grad_(False)
