"""Trains the retriever from nothing: `python -m lkv.retriever.train --out folder`.

First it learns to go on with sequences that it has seen, then to look values up in texts that grow from 32 to 2048
tokens (without the first part, looking up stays at chance for long), and at last it reads texts of all lengths while
the learning rate falls.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from lkv import tasks
from lkv.retriever.data import IGNORE, Stage, repeated, size, texts
from lkv.retriever.model import ATTENTION, build
from lkv.tasks import Words

GROW = (
    Stage(0, 0, 128, 1500, 0.96),
    Stage(32, 2, 128, 500),
    Stage(40, 2, 96, 300),
    Stage(64, 4, 80, 400),
    Stage(96, 6, 56, 300),
    Stage(128, 9, 40, 800),
    Stage(192, 9, 32, 300),
    Stage(256, 9, 28, 300),
    Stage(512, 9, 16, 200),
    Stage(1024, 9, 10, 200),
    Stage(2048, 9, 5, 40, 1.1),
)
SETTLE = (Stage(128, 9, 40, 700), Stage(256, 9, 28, 500), Stage(512, 9, 16, 500), Stage(1024, 9, 10, 700))
REPEATS = 0.1  # share of steps that go on with repeated sequences
SMOOTH = 24  # steps that an accuracy is averaged over


class Run:
    """A model in training, and its log."""

    def __init__(self, out: Path, device: str, lr: float, seed: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.lr, self.words = out, lr, Words()
        self.model = build(self.words, seed).to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
        self.model.config._attn_implementation = ATTENTION
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.begin, self.steps, self.tokens = time.time(), 0, 0
        self.recent: list[float] = []

    def step(self, stage: Stage, rate: float = 1.0) -> None:
        """Reads one batch. `recent` has the share of right answers of those that the stage is about."""
        copying = stage.length == 0 or self.rng.random() < REPEATS
        if copying:
            longest = max(32, stage.length // 3)
            tokens, labels = repeated(self.generator, stage.batch, len(self.words.vocabulary), longest)
        else:
            tokens, labels = texts(self.rng, self.words, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate * min(1.0, (self.steps + 1) / 50)
        loss, right = loss_of(self.model, tokens, labels)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens.numel()
        if stage.length == 0 or not copying:
            self.recent = [*self.recent, float(right.float().mean())][-SMOOTH:]
        if self.steps % 20 == 0:
            self.write(stage=stage.length, loss=round(loss.item(), 4), accuracy=round(self.accuracy, 4))

    @property
    def accuracy(self) -> float:
        return sum(self.recent) / max(len(self.recent), 1)

    def write(self, **entry: object) -> None:
        entry |= {"step": self.steps, "tokens": self.tokens, "seconds": round(time.time() - self.begin)}
        with (self.out / "log.jsonl").open("a") as log:
            print(json.dumps(entry), file=log)

    def save(self, stage: Stage) -> None:
        if stage.length >= 64:
            self.write(stage=stage.length, probe=probe(self.model, self.words, stage))
        self.model.save_pretrained(self.out)


def loss_of(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the labels, and which of them were right."""
    tokens, labels = tokens.to(model.device), labels.to(model.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        at = labels[:, 1:] != IGNORE
        logits = F.linear(hidden[:, :-1][at], model.lm_head.weight).float()
    wanted = labels[:, 1:][at]
    return F.cross_entropy(logits, wanted), logits.argmax(-1) == wanted


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m lkv.retriever.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    run = Run(options.out, options.device, options.lr, options.seed)
    for stage in GROW:
        run.recent = []
        for _ in range(stage.steps):
            run.step(stage)
            if len(run.recent) == SMOOTH and run.accuracy >= stage.accuracy:
                break
        run.save(stage)
    order = [stage for stage in SETTLE for _ in range(stage.steps)]
    run.rng.shuffle(order)
    for i, stage in enumerate(order):
        run.step(stage, rate=1 - 0.98 * i / len(order))
        if (i + 1) % 300 == 0:
            run.save(SETTLE[-1])


@torch.no_grad()
def probe(model: LlamaForCausalLM, words: Words, stage: Stage) -> dict[str, float]:
    """Share of answer tokens foretold, per task."""
    out: dict[str, list[float]] = defaultdict(list)
    for task in tasks.TASKS:
        for index in range(12):
            s = tasks.make(task, index, stage.length, split="validation", **size(task, stage))
            head, answer = words.encode("<s> " + s.context + " " + s.question), words.encode(s.answer)
            labels = torch.tensor([[IGNORE] * len(head) + answer], device="cpu")
            tokens = torch.tensor([head + answer], device="cpu")
            out[task].append(float(loss_of(model, tokens, labels)[1].float().mean()))
    return {task: round(sum(values) / len(values), 3) for task, values in out.items()}


if __name__ == "__main__":
    main()
