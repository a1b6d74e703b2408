"""How RULER (arXiv 2404.06654) and LongBench (arXiv 2308.14508) score an answer.

All scores are 0 to 1. What differs from LongBench's own `metrics.py`, apart from its percent:

- ROUGE-L on the subsequences that `rapidfuzz` finds, in the place of `rouge`, which is no longer kept. As there, a word
  counts once, however often it stands in a text (`rouge-score` counts every one, and so gives more: 0.13 for 0.11 on
  prose). Which of several longest subsequences is taken may differ: 0.076 for 0.076 over 300 pairs of paragraphs.
- Edit distance by `rapidfuzz` in the place of `fuzzywuzzy`: the same ratio as that with python-Levenshtein.
- Classification drops all classes that are part of the expected one; LongBench skips the class after a dropped one.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lkv.extras import need
from lkv.tasks.files import FileSample
from lkv.tasks.longbench import FEW_SHOT

EXTRA = "longbench"


def score(text: str, sample: FileSample) -> float:
    """An answer to a sample of a file, by the metric of its benchmark and task.

    RULER: the share of the expected strings that the answer holds; in its question answering ("qa"), whether it holds
    any. LongBench: the best over the expected answers; of few-shot subsets the first line counts.

    Raises:
        MissingPackage: where the metric needs a package that is not installed.
    """
    if sample.format == "ruler":
        text = re.sub(r"[\x00-\x1f]", "\n", text).strip()
        return (string_match_part if sample.task.startswith("qa") else string_match_all)(text, sample.expected)
    subset = sample.task.removesuffix("_e")
    if subset in FEW_SHOT:
        text = text.lstrip("\n").split("\n")[0]
    if METRICS[subset] is classification:
        return max(classification(text, expected, sample.classes) for expected in sample.expected)
    return max(METRICS[subset](text, expected) for expected in sample.expected)


def check_packages(samples: Iterable[FileSample]) -> None:
    """
    Raises:
        MissingPackage: where a metric of these samples needs a package that is not installed.
    """
    for sample in {s.task: s for s in samples}.values():
        score("text", sample)


def string_match_all(text: str, expected: Sequence[str]) -> float:
    return sum(word.lower() in text.lower() for word in expected) / len(expected)


def string_match_part(text: str, expected: Sequence[str]) -> float:
    return float(any(word.lower() in text.lower() for word in expected))


def qa_f1(text: str, expected: str) -> float:
    """F1 of words as bags, without case, punctuation and articles, as in SQuAD."""
    return _f1(_plain_words(text), _plain_words(expected))


def qa_f1_zh(text: str, expected: str) -> float:
    """F1 of the words that jieba finds, without punctuation."""
    return _f1(*([w for w in map(_plain_zh, _cut(t)) if w] for t in (text, expected)))


def rouge_l(text: str, expected: str) -> float:
    """F of the words in common: in a longest common subsequence of any sentence of the one and any of the other.

    Words stand between blanks, sentences between full stops.
    """
    subsequences = need("rapidfuzz.distance", EXTRA, "ROUGE-L").LCSseq
    ours, theirs = _sentences(text), _sentences(expected)
    common: set[str] = set()
    for wanted in theirs:
        for sentence in ours:
            for block in subsequences.opcodes(wanted, sentence).as_matching_blocks():
                common.update(wanted[block.a : block.a + block.size])
    words = len(set().union(*ours)) + len(set().union(*theirs))
    return 2 * len(common) / words if words else 0.0


def rouge_l_zh(text: str, expected: str) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(expected)))


def classification(text: str, expected: str, classes: Sequence[str]) -> float:
    """1 / n where the answer names the expected class and n - 1 others that are no part of its name, else 0."""
    named = [name for name in classes if name in text]
    named = [name for name in named if name == expected or name not in expected]
    return 1 / len(named) if expected in named else 0.0


def retrieval(text: str, expected: str) -> float:
    """Share of the numbers in the answer that are the one of "Paragraph 7" or "段落7"."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", expected)
    if found is None:
        raise ValueError(f"lkv eval: expected an answer of the form 'Paragraph 7' or '段落7', got {expected!r}")
    return count(text, found[1])


def count(text: str, expected: str) -> float:
    """Share of the numbers in the answer that are the expected one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(expected) / len(numbers) if numbers else 0.0


def code_similarity(text: str, expected: str) -> float:
    """1 - (insertions + deletions) / (length of both), for the first line that is no comment and no fence."""
    fuzz = need("rapidfuzz.fuzz", EXTRA, "the similarity of code")
    lines = text.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, expected)) / 100 if line and expected else 0.0


METRICS: dict[str, Callable[..., float]] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_l_zh,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_zh,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "lsht": classification,
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "passage_retrieval_zh": retrieval,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() for sentence in text.split(".")]


def _f1(words: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Counter(words) & Counter(expected)).values())
    return 2 * same / (len(words) + len(expected)) if same else 0.0


def _plain_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _plain_zh(word: str) -> str:
    return "".join(c for c in "".join(word.lower().split()) if not _punctuation(c))


def _punctuation(c: str) -> bool:
    """Symbols of full width count as well (～, ＋), as in LongBench's list."""
    kind = unicodedata.category(c)
    return c in string.punctuation or kind[0] == "P" or (kind[0] == "S" and "\u3000" <= c <= "\uffef")


def _cut(text: str) -> list[str]:
    return need("jieba", EXTRA, "metrics of Chinese").lcut(text)
