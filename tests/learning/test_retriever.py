"""What comes with the package: the retriever, what LKV learned of it, and the demo that shows both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lkv import retriever, tasks
from lkv.demo import __main__ as demo
from lkv.evaluate.methods import FULL, choose, heuristics, learned
from lkv.evaluate.run import Setting, by_method, evaluate
from lkv.policies.lkv.checkpoint import load


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = retriever.load()
    return model, tokenizer, load("retriever", model)


def test_it_is_what_the_docs_say(shipped) -> None:
    model, tokenizer, lkv = shipped
    assert 1e6 <= model.num_parameters() <= 4e6
    assert model.config.num_hidden_layers >= 4 and model.config.num_key_value_heads >= 4
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    assert model.config.max_position_embeddings >= 2048
    assert sum(f.stat().st_size for f in retriever.PATH.rglob("*") if f.is_file()) <= 8e6
    words = tasks.Words()
    assert tokenizer("set Bala to 41 87 .").input_ids == words.encode("set Bala to 41 87 .")
    assert lkv.budget(0.15).mean().item() == pytest.approx(0.15, rel=1e-4)


def test_lkv_is_near_the_full_cache_and_ahead_of_heuristics(shipped) -> None:
    """A few samples of the validation split; the docs have the numbers of the test split."""
    model, tokenizer, lkv = shipped
    known = heuristics() | learned(lkv)
    samples = [tasks.make(task, 1000 + i, 1024, split="validation") for task in tasks.RETRIEVAL for i in range(8)]
    methods = choose([FULL, "random", "streaming_llm", "snapkv", "adakv", "lkv"], known)
    groups = by_method(evaluate(model, tokenizer, samples, methods, Setting((0.15,), batch=20)))
    means = {name: sum(r.score for r in group) / len(group) for (name, _), group in groups.items()}
    assert means[FULL] >= 0.9
    assert means["lkv"] >= 0.95 * means[FULL]
    assert means["lkv"] >= 0.1 + max(means[name] for name in ("random", "streaming_llm", "snapkv", "adakv"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_demo(device: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert (
        demo.main(["--model=retriever", "--samples=1", "--tokens=256", f"--device={device}", f"--out={tmp_path}"]) == 0
    )
    printed = capsys.readouterr().out
    full, ours = (
        int(re.search(rf"^  {name} +(\d+) KiB of keys and values", printed, re.MULTILINE)[1])
        for name in ("full", "lkv")
    )
    assert full == round(16 * 257 * 2 * 32 * 4 / 1024)
    assert ours == pytest.approx(0.15 * full, rel=0.02)
    assert all((tmp_path / f"{name}.png").exists() for name in ("accuracy", "budgets", "kept"))
