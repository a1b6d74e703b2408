"""The demo on a small model: it ends well, what it prints is so, and what it times and compares is the same work."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from lkv import demo, demo_model

TOKENS, LAYERS, RETENTION = 700, 2, 0.25
OPTIONS = [f"--tokens={TOKENS}", f"--layers={LAYERS}", f"--retention={RETENTION}", "--seed=3"]


def small_job(device: str = "cpu"):
    """The first steps of the demo with OPTIONS: model, cache, scores, next token, total and budgets."""
    model = demo_model.build_model(LAYERS, TOKENS + 1, 3, torch.device(device))
    text, _ = demo.prompt(TOKENS)
    with torch.inference_mode():
        cache, scores, token = demo.prefill(model, text.to(device))
        total = round(RETENTION * sum(s[0].numel() for s in scores))
        return model, cache, scores, token, total, demo.compete(scores, total)


def table_rows(printed: str) -> list[list[int]]:
    """Rows before and after, fewest and most of a head, bytes before and after; without heads in the last line."""
    lines = [line for line in printed.splitlines() if re.match(r" +(\d+|all) ", line)]
    return [[int(x) for x in re.findall(r"\b\d+\b(?!\.|%)", line.replace(",", ""))] for line in lines]


def test_demo_prints_what_it_kept(capsys, device):
    assert demo.main([*OPTIONS, f"--device={device}"]) == 0
    printed = capsys.readouterr().out
    _, cache, scores, _, total, budgets = small_job(device)
    kept = demo.evict(cache, scores, budgets, total)

    *layers, everything = table_rows(printed)
    assert len(layers) == LAYERS
    row_bytes = 2 * 64 * 4
    for i, (_, before, after, fewest, most, size, size_after) in enumerate(layers):
        lengths = kept.lengths[i]
        assert (before, after) == (8 * TOKENS, int(lengths.sum()))
        assert (fewest, most) == (int(lengths.min()), int(lengths.max()))
        assert (size, size_after) == (before * row_bytes, (after + 8) * row_bytes)
    assert everything == [sum(row[c] for row in layers) for c in (1, 2, 5, 6)]
    assert everything[1] == total == int(kept.lengths.sum())
    assert float(re.search(r"differ by (\S+)", printed)[1]) <= demo.TOLERANCE

    dense, evicted = (
        float(re.search(rf"generate, {name}: (\S+) MiB", printed)[1]) for name in ("dense cache", "lkv.Cache")
    )
    rows = TOKENS + demo.NEW_TOKENS - 1
    assert dense == pytest.approx(LAYERS * 8 * rows * row_bytes / 2**20, abs=0.05)
    slack = LAYERS * 8 * 64 * row_bytes / 2**20
    assert evicted <= RETENTION * dense + slack + 0.05


def test_demo_says_when_the_logits_differ(capsys, monkeypatch):
    evict = demo.evict

    def evict_and_lose_a_head(*arguments):
        kept = evict(*arguments)
        kept.v[: kept.cu_seqlens[1]] = 0
        return kept

    monkeypatch.setattr(demo, "evict", evict_and_lose_a_head)
    assert demo.main([*OPTIONS, "--device=cpu"]) == 1
    assert "expected logits that differ by at most" in capsys.readouterr().err


def test_decoding_appends_behind_every_head():
    model, cache, scores, token, total, budgets = small_job()
    with torch.inference_mode():
        kept = demo.evict(cache, scores, budgets, total)
        demo.compare(model, token, cache, kept)
    assert torch.equal(kept.lengths, budgets + 1)
    last = kept.cu_seqlens[1:] - 1
    assert (kept.positions[last] == TOKENS).all() and (kept.positions >= 0).all()
    first = kept.cu_seqlens[:-1]
    assert (kept.positions[first] == 0).all()
    # Keys of layer 0 depend on the token and its position alone, so both caches hold the same.
    assert torch.equal(kept.k[last[:8]], cache.layers[0].keys[0, :, -1])


def test_composition_keeps_the_same_rows():
    _, cache, scores, _, total, budgets = small_job()
    kept = demo.evict(cache, scores, budgets, total)
    used = kept.positions >= 0
    k, v = demo.evict_in_torch(cache, scores, budgets.flatten(1).tolist())
    assert torch.equal(kept.k[used], k) and torch.equal(kept.v[used], v)


def test_prefill_in_chunks_fills_the_cache_of_plain_attention():
    model, cache, _, token, _, _ = small_job()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        plain = model(demo.prompt(TOKENS)[0], use_cache=True)
    for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(token[0], plain.logits[0, -1:].argmax(-1))


def test_window_scores_are_causal_attention_of_the_group():
    queries, keys = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 20, 8)
    logits = torch.einsum("bhqd,bhkd->bhqk", queries, keys.repeat_interleave(2, 1)) * 0.3
    for q in range(5):
        logits[:, :, q, 16 + q :] = -torch.inf
    expected = logits.softmax(-1).sum(2).view(2, 3, 2, 20).sum(2)
    torch.testing.assert_close(demo_model.window_scores(queries, keys, 0.3, pool=1), expected)


@pytest.mark.parametrize("options", [["--tokens", "3"], ["--layers", "0"], ["--retention", "2"]])
def test_demo_refuses(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(options)
    assert "expected" in capsys.readouterr().err
