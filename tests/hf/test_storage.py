"""A cache on disk, in a pickle, in another process: it goes on where it was, or the error names what is wrong."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conversation import turn
from families import FAMILIES, SPECIAL, build, call, tokens, variant
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.hf.versions import RecurrentLayer
from lkv.policies import AdaKV, SnapKV, StreamingLLM

NEEDS = {"queries", "hidden_states", "pre_rope_keys"}
PROMPT, MORE = turn([30, 17], 0), tokens(2, 3, seed=1)
GAPS = torch.cat([PROMPT.mask[:, :-6], torch.tensor([[1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]])], 1)


def filled(
    model: PreTrainedModel, prompt: torch.Tensor = PROMPT.mask, **options: object
) -> tuple[lkv.Cache, torch.Tensor]:
    """A cache with a padded prompt and a token, and the mask so far."""
    options = dict(policy=AdaKV(SnapKV(window=4)), retention=0.4) | options
    cache, mask = lkv.Cache(model, **options), torch.cat([prompt, torch.ones(2, 1).long()], 1)
    with torch.no_grad():
        call(model, PROMPT.ids, prompt, cache)
        call(model, tokens(2, 1), mask, cache)
    return cache, mask


def go_on(model: PreTrainedModel, cache: lkv.Cache, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        first = call(model, MORE, torch.cat([mask, torch.ones(2, 3).long()], 1), cache)
        return torch.cat([first, call(model, MORE[:, :1], torch.cat([mask, torch.ones(2, 4).long()], 1), cache)], 1)


def by_file(cache: lkv.Cache, model: PreTrainedModel, folder: Path) -> lkv.Cache:
    cache.save(folder / "cache")
    return lkv.Cache.load(folder / "cache", model)


def by_pickle(cache: lkv.Cache, model: PreTrainedModel, folder: Path) -> lkv.Cache:
    return pickle.loads(pickle.dumps(cache))


def by_torch(cache: lkv.Cache, model: PreTrainedModel, folder: Path) -> lkv.Cache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [by_file, by_pickle, by_torch])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "nondefault", "gemma4", "gpt_oss", "qwen3_next", "jamba", "mixtral"]
)
def test_there_and_back(family, whole, way, tmp_path):
    if not hasattr(__import__("transformers"), {**FAMILIES, **SPECIAL}[family][1]):
        pytest.skip("not in this transformers")
    if family in ("qwen3_next", "jamba") and RecurrentLayer is None:
        pytest.skip("refused in this transformers")
    model = build(family)
    needs = NEEDS if family in FAMILIES else {"queries"}
    options = dict(retention=1.0, chunks="last") if whole else {}
    cache, mask = filled(model, observe=needs, **options)
    if whole:
        cache.reset()
        with torch.no_grad():
            call(model, PROMPT.ids, PROMPT.mask, cache)
        mask = PROMPT.mask
    again = way(cache, model, tmp_path)
    assert again.settings == cache.settings and again.nbytes == cache.nbytes
    outputs = go_on(model, again, mask)
    assert torch.equal(outputs, go_on(model, cache, mask))
    for each in (cache, again):
        each.evict(budget=5)
    for one, other in zip(cache.ragged, again.ragged, strict=True):
        assert (one.token_counts, one.row_counts, one.evicted, one.due) == (
            other.token_counts,
            other.row_counts,
            other.evicted,
            other.due,
        )
        assert torch.equal(one.rows.padded(one.rows.positions), other.rows.padded(other.rows.positions))


def test_forks_of_what_was_loaded(tmp_path):
    """Nothing is shared with the file, nor what is written to with a fork or a shallow copy."""
    model = build("llama")
    cache, mask = filled(model)
    again = by_file(cache, model, tmp_path)
    (tmp_path / "cache").write_bytes(b"")
    expected = go_on(model, cache, mask)
    for twin in (again.fork(), copy.copy(again), copy.deepcopy(again), again):
        assert torch.equal(go_on(model, twin, mask), expected)


def test_policies_in_files(tmp_path):
    class Mine(StreamingLLM):
        pass

    model = build("llama")
    for policy in (StreamingLLM(sink=3), SnapKV(window=6, pooling="max"), AdaKV(SnapKV(window=5), alpha=0.4)):
        cache, _ = filled(model, policy=policy)
        assert by_file(cache, model, tmp_path).settings.policy == policy
    cache, _ = filled(model, policy=Mine())
    with pytest.raises(
        ValueError, match="lkv.Cache.load: expected policy=, as files cannot hold the one that was used"
    ):
        by_file(cache, model, tmp_path)
    assert lkv.Cache.load(tmp_path / "cache", model, policy="streaming_llm").settings.policy == StreamingLLM()


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_files(tmp_path, keep):
    model = build("llama")
    filled(model)[0].save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    (tmp_path / "cache").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="lkv.Cache.load: expected a cache that lkv.Cache.save wrote"):
        lkv.Cache.load(tmp_path / "cache", model)


def test_foreign_files(tmp_path):
    model = build("llama")
    with pytest.raises(FileNotFoundError):
        lkv.Cache.load(tmp_path / "none", model)
    save_file({"k": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="lkv.Cache.load: expected a cache that lkv.Cache.save wrote"):
        lkv.Cache.load(tmp_path / "foreign", model)
    cache, _ = filled(model)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="lkv.Cache.load: expected a model of model_type llama, got qwen3"):
        lkv.Cache.load(tmp_path / "cache", build("qwen3"))


def changed(cache: lkv.Cache, path: Path, change: Callable[[dict, dict], object]) -> Path:
    """A file of this cache in which tensors and the state beside them were changed."""
    cache.save(path)
    with safe_open(path, "pt") as file:
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["lkv"])
    change(named, record["state"])
    save_file(named, path, {"lkv": json.dumps(record)})
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda t, s: s["layers"][0].update(real=[31]),
        lambda t, s: s["layers"][0].update(held=[1, 1]),
        lambda t, s: s["layers"][0].update(evicted=99),
        lambda t, s: s["layers"][0].update(real=[3.0, 4.0]),
        lambda t, s: s["layers"][0]["rows"].update(seen=10**6),
        lambda t, s: s["layers"][0]["rows"].update(max_length=1),
        lambda t, s: s["layers"][0]["queries"].update(oldest=50),
        lambda t, s: s["layers"].pop(),
        lambda t, s: s.pop("hidden"),
        lambda t, s: t.update({".layers.0.rows.lengths": t[".layers.0.rows.lengths"] + 1000}),
        lambda t, s: t.update({".layers.0.rows.cu_seqlens": t[".layers.0.rows.cu_seqlens"] * 7}),
        lambda t, s: t.update({".layers.0.rows.positions": t[".layers.0.rows.positions"] + 1000}),
        lambda t, s: t.update({".layers.0.queries.places": t[".layers.0.queries.places"][:1].clone()}),
        lambda t, s: t.update({".hidden": t[".hidden"][:, 1:].clone()}),
        lambda t, s: t.pop(".layers.1.rows.k"),
    ],
)
def test_files_that_are_not_consistent(tmp_path, change):
    model = build("llama")
    path = changed(filled(model)[0], tmp_path / "cache", change)
    with pytest.raises((ValueError, TypeError), match=r"lkv(_ext)?\.(Ragged)?Cache"):
        lkv.Cache.load(path, model)


@pytest.mark.parametrize("way", [by_file, by_pickle, by_torch])
def test_a_prompt_with_gaps_comes_back(way, tmp_path):
    model = build("llama")
    cache, mask = filled(model, GAPS)
    again = way(cache, model, tmp_path)
    assert torch.equal(go_on(model, again, mask), go_on(model, cache, mask))


@pytest.mark.parametrize("shift", [-1, 1])
def test_places_outside_of_the_prompt_are_refused(tmp_path, shift):
    model = build("llama")
    path = changed(filled(model, GAPS)[0], tmp_path / "cache", lambda t, s: t[".places"].add_(shift))
    with pytest.raises(ValueError, match=r"places in \[0, 31\)"):
        lkv.Cache.load(path, model)


def test_in_another_process(tmp_path):
    """A pickle needs `attach`, as no cache was made for the model there; a file is loaded for a model."""
    model = build("llama")
    cache, mask = filled(model)
    model.save_pretrained(tmp_path / "model")
    cache.save(tmp_path / "cache")
    torch.save({"cache": cache, "mask": mask}, tmp_path / "pickle")
    expected = go_on(model, cache, mask)
    torch.save(expected, tmp_path / "expected")
    code = f"""
import sys, torch, transformers
sys.path.insert(0, {str(Path(__file__).parent)!r})
import lkv
from test_storage import go_on
model = transformers.LlamaForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
stored = torch.load({str(tmp_path / "pickle")!r}, weights_only=False)
pickled, mask = stored["cache"], stored["mask"]
try: go_on(model, pickled.fork(), mask)
except ValueError as error: assert "cache.attach(model) prepares a model" in str(error), error
else: raise SystemExit("no error")
pickled.attach(model)
loaded = lkv.Cache.load({str(tmp_path / "cache")!r}, model)
for cache in (pickled, loaded):
    torch.testing.assert_close(go_on(model, cache, mask), torch.load({str(tmp_path / "expected")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attach_refuses_other_models():
    cache, _ = filled(build("llama"))
    longer = variant("gemma3", layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2)
    if hasattr(transformers, "Gemma4TextConfig"):  # of the layers of a cache, but read by others
        shorter = variant("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
        with pytest.raises(ValueError, match="expected a model with 4 cache layers like those of Gemma4"):
            lkv.Cache(build("gemma4"), retention=0.5).attach(shorter)
    for other in (build("gemma3"), longer):
        with pytest.raises(ValueError, match="lkv.Cache.attach: expected a model with 2 cache layers like those of Ll"):
            cache.attach(other)


def test_what_other_code_asks_of_a_cache():
    """Iterating, device, dtype, offloading, like transformers' own."""
    model = build("gemma3")
    dense = DynamicCache(config=model.config)
    cache = lkv.Cache(model, "streaming_llm", retention=1.0)
    assert [layer.device for layer in cache.ragged] == [None, None] and cache.ragged[0].dtype is None
    with torch.no_grad():
        for each in (dense, cache):
            call(model, tokens(2, 20), None, each)
    for index, ((keys, values, *_), layer) in enumerate(zip(cache, dense.layers, strict=True)):
        torch.testing.assert_close(keys, layer.keys)
        torch.testing.assert_close(values, layer.values)
        assert cache.layers[index].get_seq_length() == 20
    assert {layer.device for layer in cache.ragged} == {torch.device("cpu")} and cache.ragged[0].dtype == torch.float32
    for index in range(len(cache)):
        cache.layers[index].offload()
    for index in range(len(cache)):
        getattr(cache.layers[index], "prefetch", lambda: None)()
    with torch.no_grad():
        torch.testing.assert_close(*(call(model, tokens(2, 2), None, each) for each in (dense, cache)))
