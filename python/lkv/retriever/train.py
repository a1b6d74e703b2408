"""Trains the retriever from nothing: `python -m lkv.retriever.train --out folder`.

First it learns to go on with sequences that it has seen, then to look values up in texts that grow from 32 to 2048
tokens (without the first part, looking up stays at chance for long).
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
from lkv.retriever.data import IGNORE, Stage, repeated, texts
from lkv.retriever.model import ATTENTION, build
from lkv.tasks import Words

CURRICULUM = (
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
    Stage(128, 9, 40, 400, 1.1),
    Stage(256, 9, 28, 200, 1.1),
    Stage(512, 9, 16, 150, 1.1),
    Stage(1024, 9, 10, 150, 1.1),
)
LAST = 250  # steps over which the learning rate falls to a tenth
REPEATS = 0.1  # share of steps that go on with repeated sequences
SMOOTH = 24  # steps that an accuracy is averaged over


def loss_of(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the labels, and which of them were right."""
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
    parser.add_argument("--begin", type=int, default=0)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    words = Words()
    model = build(words, options.seed).to(options.device)
    if options.load:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.load).state_dict())
    model.config._attn_implementation = ATTENTION
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    begin, step, seen = time.time(), 0, 0
    log = (options.out / "log.jsonl").open("a")
    for number, stage in enumerate(CURRICULUM):
        if number < options.begin:
            continue
        recent: list[float] = []
        for i in range(stage.steps):
            copying = stage.length == 0 or rng.random() < REPEATS
            if copying:
                tokens, labels = repeated(generator, stage.batch, len(words.vocabulary), max(32, stage.length // 3))
            else:
                tokens, labels = texts(rng, words, stage)
            left = sum(s.steps for s in CURRICULUM[number:]) - i
            rate = min(1.0, (step + 1) / 50) * (1 if left >= LAST else 0.1 + 0.9 * left / LAST)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate
            loss, right = loss_of(model, tokens.to(options.device), labels.to(options.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, seen = step + 1, seen + tokens.numel()
            if stage.length == 0 or not copying:
                recent.append(float(right.float().mean()))
            mean = sum(recent[-SMOOTH:]) / max(len(recent[-SMOOTH:]), 1)
            if step % 20 == 0:
                line = dict(
                    stage=stage.length,
                    step=step,
                    i=i,
                    loss=round(loss.item(), 4),
                    accuracy=round(mean, 4),
                    tokens=seen,
                    seconds=round(time.time() - begin),
                )
                print(json.dumps(line), file=log, flush=True)
            if len(recent) >= SMOOTH and mean >= stage.accuracy:
                break
        if stage.length >= 64:
            print(json.dumps(dict(stage=stage.length, probe=probe(model, words, stage))), file=log, flush=True)
        model.save_pretrained(options.out)


@torch.no_grad()
def probe(model: LlamaForCausalLM, words: Words, stage: Stage) -> dict[str, float]:
    """Share of answer tokens foretold, per task."""
    from lkv.retriever.data import _size

    out: dict[str, list[float]] = defaultdict(list)
    for task in tasks.TASKS:
        for index in range(12):
            s = tasks.make(task, index, stage.length, split="validation", **_size(task, stage))
            head, answer = words.encode("<s> " + s.context + " " + s.question), words.encode(s.answer)
            tokens = torch.tensor([head + answer], device=model.device)
            labels = torch.tensor([[IGNORE] * len(head) + answer], device=model.device)
            out[task].append(float(loss_of(model, tokens, labels)[1].float().mean()))
    return {task: round(sum(values) / len(values), 3) for task, values in out.items()}


if __name__ == "__main__":
    main()
