"""Makes records: a model reads every passage once, answers its questions, and says what it attended to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill
from lkv.hf import Cache
from lkv.learn import distill, targets
from lkv.learn.config import TrainConfig
from lkv.learn.dialogue import Exchange, exchange
from lkv.learn.records import Record, Records, agreed, claim, full, made_with
from lkv.passes import Context
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv.fingerprint import fingerprint
from lkv.second_pass import in_words, repeat_scores
from lkv.tasks.documents import Document
from lkv.tasks.facts import TRAINED
from lkv.tasks.passages import Passage, domain_of, passage, synthetic
from lkv.text import check_fits, check_known, pad_and_ends

FORMAT = 1
# What records depend on; how many there are may change.
SETTINGS = ("length", "longest", "facts", "continuation", "replies", "answer_tokens", "seed")


class Recorder:
    """Makes the records of a run that are not there yet.

    Args:
        folder: of the records of all splits.
        process, processes: every process makes each so many-th record.

    Raises:
        ValueError: for texts that are too short for the passages of a run, longer than what the model reads, or unknown
            to the tokenizer, and a folder with records of another model, tokenizer, or other texts or settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        config: TrainConfig,
        folder: Path,
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.model, self.tokenizer, self.documents = model, tokenizer, documents
        self.config, self.folder, self.process, self.processes = config, folder, process, processes
        self.ends = pad_and_ends(model, tokenizer)[1]
        # Records that have a target more than is needed go on having it.
        more = config.target != "attention" or made_with(folder).get("kvzip") is True
        self.kvzip = in_words(KVzip(), tokenizer) if more else None
        manifest = self.manifest()
        agreed(folder, manifest)
        for split, count in (("train", config.texts), ("validation", config.validation)):
            self._check(split, count)
        claim(folder, manifest)

    def manifest(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            **fingerprints(self.model, self.tokenizer),
            "wordings": hashlib.sha256(repr(TRAINED).encode()).hexdigest()[:16],
            "documents": [[x.domain, x.name, x.digest, x.split] for x in self.documents],
            "input": self.config.design.input,
            "kvzip": self.kvzip is not None,
            **{name: getattr(self.config, name) for name in SETTINGS},
            **({"synthetic": self.config.synthetic, "tasks": list(self.config.tasks)} if self.config.synthetic else {}),
        }

    def run(self, split: str, count: int) -> Records:
        """
        Raises:
            ValueError: where the texts of the split are too short.
            OSError: where the disk is full, or would be in the end; the records that were made stay.
        """
        records = Records(self.folder, split, count)
        todo = [i for i in records.missing() if i % self.processes == self.process]
        for done, i in enumerate(tqdm(todo, desc=f"lkv train: {split} texts", disable=not todo or self.process > 0), 1):
            self.record(self.passage(split, i)).write(records.path(i))
            left = (len(todo) - done) * records.path(i).stat().st_size
            if left > shutil.disk_usage(self.folder).free:
                raise full(self.folder, left)
        return records

    def passage(self, split: str, index: int) -> Passage:
        config, length = self.config, self.config.length_of(split, index)
        number, task = self._kind(index)
        if task is not None:
            return synthetic(task, number, length, self.count, split=split)
        return passage(
            self.documents,
            number,
            length,
            self.count,
            split=split,
            facts=config.facts,
            continuation=config.continuation,
            seed=config.seed,
        )

    def _check(self, split: str, count: int) -> None:
        """Makes the longest passage of every domain; another needs a few tokens more at most, as facts differ."""
        longest: dict[str, int] = {}
        for index in sorted(range(count), key=lambda i: self.config.length_of(split, i)):
            number, task = self._kind(index)
            longest[task or domain_of(self.documents, number, split)] = index
        for index in longest.values():
            self._talk(self.passage(split, index))

    def _talk(self, text: Passage) -> Exchange:
        """
        Raises:
            ValueError: for a text that the tokenizer does not know, and one that is longer than what the model reads.
        """
        config = self.config
        talk = exchange(self.tokenizer, text, config.continuation + 1 if config.continuation else 0)
        check_known(self.tokenizer, talk.context, text.document, "lkv train")
        answer = config.answer_tokens if config.replies == "own" else max(map(len, talk.answers))
        behind = max(max(map(len, talk.questions)) + answer, len(talk.continuation))
        check_fits(self.model, len(talk.context) + behind, "lkv train", text.document)
        return talk

    def _kind(self, index: int) -> tuple[int, str | None]:
        """The number of a passage among those of files or of synthetic tasks, and its task."""
        share, tasks = self.config.synthetic, self.config.tasks
        before = int(index * share)  # synthetic ones
        if int((index + 1) * share) > before:
            return before, tasks[before % len(tasks)]
        return index - before, None

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def record(self, text: Passage) -> Record:
        """Reads a passage and asks all that there is to ask.

        Raises:
            ValueError: for a text of which the tokenizer does not know a tenth or more, and one that is longer than
                what the model reads.
        """
        config, model = self.config, self.model
        talk = self._talk(text)
        tokens = torch.tensor([talk.context], device=model.device)
        needs = {"pre_rope_keys" if config.design.input == "kv" else "hidden_states"}
        with prefill(model, tokens, needs=needs) as cache:
            context = Context.of(cache)
            questions, replies = self._answered(talk, context)
            paid = targets.attention(model, context, questions, replies)
            repeated = None
            if self.kvzip is not None:
                repeated = repeat_scores(model, context, tokens, self.kvzip, begin=talk.protected)
            return Record(
                tokens=tokens[0].int().cpu(),
                keys=_stored(context.keys),
                values=_stored(context.values),
                attention=_logarithms(paid),
                kvzip=None if repeated is None else _logarithms(repeated),
                questions=questions,
                replies=replies,
                continues=len(talk.continuation) > 1,
                domain=text.domain,
                document=text.document,
                **_seen(cache, config.design.input),
            )

    def _answered(self, talk: Exchange, context: Context) -> tuple[list[list[int]], list[list[int]]]:
        """Questions with their answers; the continuation is the text's own."""
        replies = talk.answers
        if self.config.replies == "own":
            repeated, limit = context.repeat(len(talk.questions)), self.config.answer_tokens
            replies = distill.answers(self.model, repeated, talk.questions, limit, self.ends, talk.answers)
        if len(talk.continuation) < 2:
            return talk.questions, replies
        return [*talk.questions, talk.continuation[:1]], [*replies, talk.continuation[1:]]


def fingerprints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Of both, for the manifest of what depends on them."""
    return {"model": fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hexadecimal digits, of the vocabulary, the chat template, and how a text with all sorts of signs is split."""
    probe = "The 2nd of\tMay, 1999:\n\n  def f(x): return x**2  # Größe, naïve — 中文 don't"
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer(probe).input_ids]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stored(layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.to(torch.bfloat16).cpu() for x in layers])


def _logarithms(paid: Sequence[Tensor]) -> Tensor:
    return torch.cat([targets.logarithm(x).half().cpu() for x in paid])


def _seen(cache: Cache, input: str) -> dict[str, Any]:
    """What the features of LKV-T are made of beside keys and values."""
    seen = [layer.observations for layer in cache.ragged]
    if input == "hidden":
        return {
            "hidden": _stored([x.hidden_states.read() for x in seen if x.hidden_states is not None]),
            "rotation": [],
        }
    rotations = cache.history.rotations.all
    return {
        "cos": torch.cat([x.cos.read().float().cpu() for x in rotations]),
        "sin": torch.cat([x.sin.read().float().cpu() for x in rotations]),
        "rotation": [rotations.index(x.rotary) for x in seen if x.rotary is not None],
    }
