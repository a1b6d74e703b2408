"""Models and modules that could be trained are read, judged and recorded: nothing is kept for gradients of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_texts import files, model, tokenizer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from lkv import tasks
from lkv.compression import compress, prefill, second_pass_scores
from lkv.evaluate.decode import answer
from lkv.evaluate.forced import foretold
from lkv.evaluate.kept import kept_positions
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.oracle import Oracle
from lkv.evaluate.soft import soft_accuracy
from lkv.evaluate.texts import Judge
from lkv.hf.observation import observe
from lkv.learn import distill, forecast, targets
from lkv.learn.config import TrainConfig
from lkv.learn.dialogue import exchange
from lkv.learn.lessons import Recorded
from lkv.learn.recording import Recorder
from lkv.learn.records import Record
from lkv.learn.validation import fidelity
from lkv.offline import budget_curves, query_statistics
from lkv.passes import Context
from lkv.policies import KNorm, KVzip, SnapKV
from lkv.policies.kvzap import Gate
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.policy import LKV, Learned, LKVThreshold
from lkv.tasks.documents import Document, documents

MODEL, TOKENIZER = model().requires_grad_(True), tokenizer()
CONFIG = TrainConfig(
    design=Design(hidden=4), length=300, facts=1, continuation=6, answer_tokens=3, target="both", replies="own",
    validation_retentions=(0.5,),
)  # fmt: skip
LKVS = {budget: Design(hidden=4, budget=budget).build(Shape.of(MODEL)) for budget in ("capped", "threshold")}
IDS = torch.arange(40)[None] + 5
QUESTIONS, REPLIES = [[5, 6, 7], [8, 9]], [[10, 11], [12]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    return documents(files(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def context() -> Context:
    with torch.no_grad():
        layers = MODEL(IDS, use_cache=True).past_key_values.layers
    return Context(tuple(x.keys for x in layers), tuple(x.values for x in layers), torch.tensor([40]))


@pytest.fixture
def outputs() -> Iterator[list[bool]]:
    """Of whatever module runs, whether what comes out has a gradient."""
    seen: list[bool] = []

    def note(module: nn.Module, given: object, out: object) -> None:
        seen.extend(x.requires_grad for x in pytree.tree_leaves(out) if isinstance(x, Tensor))

    hook = register_module_forward_hook(note)
    yield seen
    hook.remove()


def scored(policy: Learned) -> list[Tensor]:
    """What a policy that was learned makes of a text, and budgets."""
    with prefill(MODEL, IDS, needs=policy.needs) as cache:
        scores = [policy.score(x.index, observe(x, policy.needs, policy.window)) for x in cache.ragged]
    if isinstance(policy, LKVThreshold):
        return [*scores, policy.budgets(scores, torch.tensor([40]), torch.tensor([40 * 6]))]
    assert isinstance(policy, LKV)
    return [*scores, policy.table(20, 40), policy.ahead(0, torch.tensor([20]), torch.tensor([40]))]


def answered() -> object:
    with compress(MODEL, IDS, SnapKV(window=4), retention=0.5) as cache:
        return answer(MODEL, cache, torch.ones_like(IDS), QUESTIONS[:1], 3, 0, ())


def repeated() -> list[Tensor]:
    with prefill(MODEL, IDS) as cache:
        return second_pass_scores(MODEL, cache, IDS, KVzip())


def forced() -> list[Tensor]:
    with compress(MODEL, IDS, SnapKV(window=4), retention=0.5) as cache:
        return foretold(MODEL, cache, 40, QUESTIONS, REPLIES)


def judged(found: list[Document], folder: Path, see_question: bool = False) -> object:
    text = Recorder(MODEL, TOKENIZER, found, CONFIG, folder).passage("validation", 0)
    talk = exchange(TOKENIZER, text, 0 if see_question else 6)
    methods = [Method(FULL, None), Method("lkv", LKVS["capped"]), Method("oracle", Oracle())]
    judge = Judge(MODEL, TOKENIZER, methods, see_question=see_question, greedy=True)
    return list(judge.cells(0, text, talk, [(method, 0.5) for method in methods]))


def validated(found: list[Document], folder: Path) -> object:
    records = Recorder(MODEL, TOKENIZER, found, CONFIG, folder).run("validation", 1)
    lessons = Recorded(MODEL, LKVS["capped"], records, CONFIG)
    return [fidelity(lessons)(policy) for policy in LKVS.values()]


SAMPLE = tasks.make("single", 0, 100)
CASES: dict[str, Callable[[Context, list[Document], Path], object]] = {
    "compress": lambda *_: compress(MODEL, IDS, LKVS["threshold"], retention=0.5).ragged[0].rows.k,
    "prefill": lambda *_: [x.keys for x in prefill(MODEL, IDS).ragged],
    "second pass": lambda *_: repeated(),
    "answers": lambda *_: answered(),
    "forced answers": lambda *_: forced(),
    "positions": lambda *_: kept_positions(MODEL, TOKENIZER, LKVS["capped"], SAMPLE, 0.5),
    "relaxed": lambda *_: soft_accuracy(MODEL, TOKENIZER, [SAMPLE], LKVS["capped"], 0.5, limit=2),
    "a passage": lambda _, found, folder: judged(found, folder),
    "a passage with its question": lambda _, found, folder: judged(found, folder, see_question=True),
    "capped budgets": lambda *_: scored(LKVS["capped"]),
    "threshold": lambda *_: scored(LKVS["threshold"]),
    "target": lambda context, *_: targets.attention(MODEL, context, QUESTIONS, REPLIES),
    "reading": lambda *_: distill.read(MODEL, LKVS["capped"], [[5, 6, 7], [8, 9]]),
    "the teacher's answers": lambda context, *_: distill.answers(MODEL, context.repeat(2), QUESTIONS, 3, [2]),
    "record": lambda _, *given: Recorder(MODEL, TOKENIZER, given[0], CONFIG, given[1]).run("validation", 1)[0],
    "validation": lambda _, *given: validated(*given),
    "statistics of queries": lambda *_: [(x := query_statistics(MODEL, [IDS])).mean, x.covariance],
    "curves of budgets": lambda *_: budget_curves(MODEL, [IDS], KNorm()).lost,
    "a gate": lambda *_: Gate(((tuple(nn.Linear(6, 2).parameters()),),))(0, nn.Identity()(torch.rand(1, 9, 6))),
    "a timed prefill": lambda *_: forecast.prefill_seconds(MODEL, 20),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_kept_for_gradients(
    name: str, context: Context, found: list[Document], tmp_path: Path, outputs: list[bool]
) -> None:
    result = CASES[name](context, found, tmp_path)
    result = vars(result) if isinstance(result, (distill.Reading, Record)) else result
    tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    assert not any(x.requires_grad for x in tensors) and not any(outputs)
    assert outputs
