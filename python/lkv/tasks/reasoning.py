"""Variable tracking and word counting after RULER (arXiv 2404.06654): many places of a text have to be read."""

from __future__ import annotations

import random
from collections import Counter

from lkv.tasks.language import Language
from lkv.tasks.scene import Count, Question, Scene, weave


def variable_tracking(
    rng: random.Random, language: Language, length: int, count: Count, chains: int = 3, hops: int = 2
) -> Scene:
    """Which variables have a value: each chain hands its own on from variable to variable."""
    names, values = language.names(rng, chains * (hops + 1)), language.values(rng, chains)
    links: list[list[str]] = []
    questions = []
    for value in values:
        chain = [names.pop() for _ in range(hops + 1)]
        links.append([language.assign(name, given) for name, given in zip(chain, [value, *chain], strict=False)])
        questions.append(Question(language.ask_variables(value), language.listing(chain), tuple(chain)))
    order = [i for i, chain in enumerate(links) for _ in chain]
    rng.shuffle(order)
    left = [iter(chain) for chain in links]
    sentences = [next(left[i]) for i in order]
    text = weave(rng, sentences, lambda: language.filler(rng), length, count)
    return Scene(text, tuple(questions), tuple(sentences))


def common_words(rng: random.Random, language: Language, length: int, count: Count, common: int = 3) -> Scene:
    """The words that stand far more often than all others."""
    return _counting(rng, language, length, count, [0.5] * common)


def frequent_words(rng: random.Random, language: Language, length: int, count: Count, common: int = 3) -> Scene:
    """The most frequent words of a text whose words fall off as Zipf's law has it, 1 / rank^2."""
    return _counting(rng, language, length, count, [1 / rank**2 for rank in range(1, common + 1)])


def _counting(rng: random.Random, language: Language, length: int, count: Count, shares: list[float]) -> Scene:
    """Names in shuffled order: the most frequent have shares of 0.6 of the words in these proportions, the rest few.

    Raises:
        ValueError: for a text so short that words of the rest are as frequent.
    """
    rest = 24
    names = language.names(rng, len(shares) + rest)
    words: list[str] = []
    draws = [0.6 * share / sum(shares) for share in shares]
    size = length // max(map(count, names))
    for name, share in zip(names, draws, strict=False):
        words += [name] * round(share * size)
    for i in range(size - len(words)):
        words.append(names[len(shares) + i % rest])
    rng.shuffle(words)
    counts = Counter(words)
    top = tuple(word for word, _ in counts.most_common(len(shares)))
    if len(counts) <= len(top) or counts[top[-1]] == counts.most_common(len(top) + 1)[-1][1]:
        raise ValueError(
            f"lkv.tasks: expected a context long enough for its {len(shares)} most frequent words to stand out, "
            f"got {length} tokens"
        )
    question = Question(language.ask_words(len(shares)), language.listing(top), top)
    return Scene(" ".join(words), (question,), ())
