"""Training of LKV: a warm start on a target of scores, then distillation end to end."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn import distill
from lkv.learn.config import TrainConfig
from lkv.learn.lessons import Lessons, Live
from lkv.learn.metrics import Metrics
from lkv.learn.source import Source
from lkv.policies.lkv import Learned, checkpoint
from lkv.policies.lkv.checkpoint import Shape
from lkv.policies.lkv.fingerprint import fingerprint
from lkv.policies.lkv.token_scorer import TokenScorer, moments
from lkv.tasks import Language
from lkv.text import check_fits, pad_and_ends

STATE, LAST, BEST = "state.pt", "last", "best"
SAVE_EVERY = 20  # steps; what is done after the last save is done again by a run that was interrupted
Validate = Callable[[Learned], dict[str, float]]


class Trainer:
    """A run in a folder. `run` begins it, or goes on with what lies there.

    Whatever is random depends on the seed and the step alone, so that an interrupted run goes on as if nothing had
    happened, and processes that share a step need not talk about it.

    Args:
        model: frozen; its parameters get no gradient.
        validate: how good a policy is on validation texts, more is better; the mean decides which checkpoint is kept as
            the best.
        scorer: LKV-T of another run, of the same design, which a new run begins with in place of a random one.

    Attributes:
        lessons: what is learned from; at first texts of the tasks, others in every step.

    Raises:
        ValueError: for texts that are longer than what the model reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        language: Language,
        config: TrainConfig,
        folder: str | os.PathLike[str],
        *,
        accelerator: Accelerator | None = None,
        validate: Validate | None = None,
        scorer: TokenScorer | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
        self.model = model.eval().requires_grad_(False).to(self.accelerator.device)
        self.config, self.folder, self.validate = config, Path(folder), validate
        check_fits(model, max(config.length, config.longest), "lkv train")
        self.source = Source(config, tokenizer, language)
        self.ends = pad_and_ends(model, tokenizer)[1]
        self.shape, self.fingerprint = Shape.of(model), fingerprint(model)
        torch.manual_seed(config.seed)
        self.lkv = config.design.build(self.shape)
        self.begun = scorer is not None
        if scorer is not None:
            self._begin_with(scorer)
        self.lessons: Lessons = Live(self.model, self.lkv, self.source, self.ends)
        modules: dict[str, nn.Module] = {"scorer": self.lkv.token_scorer, "budget": self.lkv.budget}
        for module in modules.values():
            module.to(self.accelerator.device)
        rates = {"scorer": config.lr_scorer, "budget": config.lr_budget}
        groups: list[dict[str, Any]] = [
            {"params": list(m.parameters()), "lr": rates[n], "peak": rates[n]} for n, m in modules.items()
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.best = -config.warm_steps, -math.inf
        self.metrics = Metrics(self.folder)

    def run(self, until: int | None = None) -> Learned:
        """Trains to the last step (or to step `until`); returns the policy."""
        if not self._resume():
            if not self.begun:
                self._fit_inputs()
            self._fit_outputs()
        last = self.config.steps if until is None else min(until, self.config.steps)
        main = self.accelerator.is_main_process
        warm = self.config.warm_steps
        with tqdm(total=last + warm, initial=self.step + warm, desc="lkv train", disable=not main) as bar:
            while self.step < last:
                begin = time.perf_counter()
                numbers = self._warm() if self.step < 0 else self._distil()
                self.step += 1
                numbers["seconds"] = time.perf_counter() - begin
                if self.step > 0 and (self.step % self.config.validate_every == 0 or self.step == self.config.steps):
                    numbers |= self._validated()
                elif main and self.step % SAVE_EVERY == 0:
                    self._save_state()
                if self.step % SAVE_EVERY == 0:
                    _return_freed_memory()
                if main:
                    self.metrics.add(self.step, numbers)
                    bar.update()
                    bar.set_postfix({name: f"{x:.3g}" for name, x in numbers.items() if name != "seconds"})
        return self.lkv

    def _begin_with(self, scorer: TokenScorer) -> None:
        """
        Raises:
            ValueError: for a scorer of another design, or for other heads.
        """
        ours = self.lkv.token_scorer
        for name in ("layers", "heads", "features", "input", "scale"):
            if getattr(ours, name) != getattr(scorer, name):
                raise ValueError(
                    f"lkv train: expected a scorer of {name} {getattr(ours, name)}, got {getattr(scorer, name)}"
                )
        if ours.up.shape != scorer.up.shape:
            raise ValueError(f"lkv train: expected a scorer of hidden {ours.up.shape[-1]}, got {scorer.up.shape[-1]}")
        ours.load_state_dict(scorer.state_dict())

    def _rows(self) -> list[list[int]]:
        """Texts of this process, for every part of a step."""
        config, world = self.config, self.accelerator.num_processes
        parts = config.accumulate * world
        if config.batch % parts:
            raise ValueError(f"lkv train: expected a batch that {parts} parts divide, got {config.batch}")
        size = config.batch // parts
        mine = range(self.accelerator.process_index, parts, world)
        return [list(range(part * size, (part + 1) * size)) for part in mine]

    def _warm(self) -> dict[str, float]:
        """LKV-T learns the logarithm of the target, on the scale of its scores."""
        loss, tokens = torch.zeros((), device=self.accelerator.device), 0
        step, scorer = self.step + self.config.warm_steps, self.lkv.token_scorer
        for rows in self._rows():
            reading, wanted = self.lessons.regression(step, rows)
            valid = reading.valid.expand(-1, self.shape.heads, -1)
            part = torch.zeros_like(loss)
            for layer, x in enumerate(reading.features):
                target = scorer.scaled(wanted[layer], valid)
                part = part + ((scorer(layer, x, valid) - target) ** 2).sum()  # both are 0 in padding
            part.backward()
            loss += part.detach()
            tokens += int(valid.sum()) * self.shape.layers
        return {"warm": self._update(loss, tokens, step, self.config.warm_steps)}

    def _fit_inputs(self) -> None:
        """Mean and deviation of what LKV-T reads, from the texts of the first step."""
        total = torch.zeros((), device=self.accelerator.device)
        for rows in self._rows():
            reading = self.lessons.inputs(rows)
            valid = reading.valid.expand(-1, self.shape.heads, -1)
            total = total + torch.stack([moments(x, valid) for x in reading.features])
        self.lkv.token_scorer.fit_input(self.accelerator.reduce(total, "sum"))

    def _fit_outputs(self) -> None:
        """Where absolute scores and budgets begin: at the mean of the target for every head, at the shares it gives."""
        offset = self.lkv.token_scorer.offset
        if offset is not None and not self.begun:
            total = torch.zeros((), device=self.accelerator.device)
            for rows in self._rows():
                reading, wanted = self.lessons.regression(0, rows)
                valid = reading.valid.expand(-1, self.shape.heads, -1)
                total = total + torch.stack([moments(x[..., None], valid)[:, :2] for x in wanted])
            counts, sums = self.accelerator.reduce(total, "sum").unbind(-1)
            with torch.no_grad():
                offset.copy_(sums / counts)
        if self.config.start == "joint" and self.config.design.budget in ("capped", "softmax"):
            low, high = self.config.retention
            shares = [self.lessons.shares(rows, (low * high) ** 0.5) for rows in self._rows()]
            mean = torch.stack(shares).mean(0).to(self.accelerator.device)
            self.lkv.budget.fit(self.accelerator.reduce(mean, "mean"))

    def _distil(self) -> dict[str, float]:
        config, step = self.config, self.step
        hard = step >= config.soft_steps
        temperature, retention = config.temperature_at(step), self.source.retention(step)
        loss, count = torch.zeros((), device=self.accelerator.device), 0
        same = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        for rows in self._rows():
            reading, questions, replies = self.lessons.distillation(step, rows)
            context = reading.context.repeat(config.questions)
            rates = torch.full((len(rows),), retention, device=self.accelerator.device)
            masks = distill.log_masks(self.lkv, reading, rates, temperature, hard)
            masks = masks.repeat_interleave(config.questions, 1)
            with self.accelerator.autocast():
                part, tokens, agreed = distill.divergence(self.model, context, masks, questions, replies)
            part.backward()
            loss, count, same = loss + part.detach(), count + tokens, same + agreed
        fidelity = self.accelerator.reduce(torch.stack([same.float(), same.new_tensor(count).float()]), "sum")
        return {
            "loss": self._update(loss, count, step, config.steps),
            "retention": retention,
            "fidelity": float(fidelity[0] / fidelity[1]),
            "temperature": temperature,
            "hard": float(hard),
        }

    def _update(self, loss: Tensor, count: int, step: int, steps: int) -> float:
        """One step of the optimizer with the gradients of all processes, per token of all of them."""
        totals = self.accelerator.reduce(torch.stack([loss.float(), loss.new_tensor(float(count))]), "sum")
        for parameter in self.parameters:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(gradient, "sum") / totals[1]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.rate_at(step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(totals[0] / totals[1])

    def _validated(self) -> dict[str, float]:
        """Saves where the run is, and the best checkpoint if this is it."""
        numbers: dict[str, float] = {}
        if self.validate is not None:
            numbers = {f"validation/{name}": x for name, x in self.validate(self.lkv).items()}
        mean = sum(numbers.values()) / max(len(numbers), 1)
        if self.accelerator.is_main_process:
            if mean > self.best or self.validate is None:
                self.best = mean
                self._save(BEST, mean)
            self._save(LAST, mean)
            self._save_state()
        self.accelerator.wait_for_everyone()
        return numbers

    def _save(self, name: str, validation: float) -> None:
        facts = {"step": self.step, "train": asdict(self.config), "validation": validation}
        checkpoint.save(self.folder / name, self.lkv, self.config.design, self.shape, facts, self.fingerprint)

    def _save_state(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "best": self.best,
            "weights": checkpoint.weights(self.lkv),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / (STATE + ".part")
        torch.save(state, temporary)
        os.replace(temporary, self.folder / STATE)

    def _resume(self) -> bool:
        """Whether there was a run to go on with.

        Raises:
            ValueError: where the folder holds a run with another configuration.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / STATE
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        ours, theirs = asdict(self.config), state["config"]
        other = [name for name in ours if _plain(ours[name]) != _plain(theirs.get(name))]
        if other:
            raise ValueError(f"lkv train: expected the configuration of the run in {self.folder}, got another {other}")
        checkpoint.put(self.lkv, state["weights"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        if self.accelerator.is_main_process:
            self.metrics.take_back(self.step)
        return True


def _plain(x: object) -> object:
    return json.loads(json.dumps(x))


def _return_freed_memory() -> None:
    """Texts of many lengths leave the heap full of holes, which the C library keeps: glibc is told to return them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
