"""lkv.hf.batching: transformers' continuous batching with eviction, against dense forwards with what left masked."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from families import HEADS, build, tokens, variant
from masked import masked_logits
from transformers import GenerationConfig

import lkv_ext
from lkv import policies

DOCS = Path(__file__).parents[2] / "docs"
HAS_POOL = find_spec("transformers.generation.continuous_batching.cache_allocators") is not None
if HAS_POOL:
    from transformers import ContinuousBatchingConfig

    from lkv.hf import batching
needs_pool = pytest.mark.skipif(not HAS_POOL, reason="this transformers has no pool that can be followed")
PAGE = 4
POOL = dict(page_size=PAGE, num_blocks=64, max_batch_tokens=128)
OFF = dict(allow_block_sharing=False, use_async_batching=False, cpu_offload_space=0.0)
GREEDY = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


def prompts(*counts: int) -> list[list[int]]:
    return [tokens(1, count, seed=count)[0].tolist() for count in counts]


def config(**changes: object) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**(POOL | OFF | changes))


def generate(model, inputs, policy="knorm", *, options=(), **amount):
    return batching.generate_batch(
        model,
        inputs,
        policy,
        generation_config=GenerationConfig(**GREEDY),
        continuous_batching_config=config(**dict(options)),
        **amount,
    )


def masked(model, prompt: list[int], answer: list[int], policy: policies.Policy, keep: int) -> torch.Tensor:
    """Logits behind which the tokens of an answer came: a dense forward in which it does not see what left."""
    length, total = len(prompt), len(prompt) + len(answer)
    kept = length - (length - keep) // PAGE * PAGE
    cache = transformers.DynamicCache(config=model.config)
    model(torch.tensor([prompt]), past_key_values=cache)
    counts = torch.full((1, HEADS), length)
    places = torch.arange(length).expand(1, HEADS, length)
    visible = {}
    for layer, rows in enumerate(cache.layers):
        seen = policies.Observation(rows.keys, rows.values, places, counts, torch.zeros_like(counts))
        scores = policy.score(layer, seen)
        index = lkv_ext.select(scores, kept, sink=policy.sink, window=policy.window)
        stays = torch.zeros(1, HEADS, length, dtype=torch.bool)
        stays.scatter_(2, index.positions.view(1, HEADS, kept).long(), True)
        shown = torch.ones(total, total, dtype=torch.bool).tril().repeat(1, HEADS, 1, 1)
        shown[:, :, length:, :length] &= stays[:, :, None]
        visible[layer] = shown
    ids = torch.tensor([prompt + answer])
    return masked_logits(model, ids, torch.ones_like(ids), visible)[0, length - 1 : -1]


@needs_pool
@torch.no_grad()
@pytest.mark.parametrize("pieces", [128, 20], ids=["whole", "pieces"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mixtral"])
def test_answers_are_those_of_a_dense_model_that_does_not_see_what_left(family, pieces):
    """Sequences of any length, also at the end of a page; prompts in pieces together with answers of others."""
    model, inputs = build(family), prompts(30, 17, 41, 24, 3)
    options = dict(max_batch_tokens=pieces, return_logprobs=True)
    answers = generate(model, inputs, policies.KeyDiff(), retention=0.4, options=options)
    changed = 0
    for prompt, answer in zip(inputs, answers, strict=True):
        expected = masked(model, prompt, answer.generated_tokens, policies.KeyDiff(), max(1, round(0.4 * len(prompt))))
        assert answer.generated_tokens == expected.argmax(-1).tolist()
        chances = expected.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(answer.logprobs), chances, rtol=1e-4, atol=1e-4)
        whole = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        changed += whole != answer.generated_tokens
    assert changed > 0  # or it would not matter what left


@needs_pool
@torch.no_grad()
@pytest.mark.parametrize(("policy", "budget"), [(policies.StreamingLLM(sink=2), 9), (policies.KNorm(), 1)], ids=str)
def test_sinks_windows_and_absolute_budgets(policy, budget):
    model, inputs = build("llama"), prompts(40, 25)
    for prompt, answer in zip(inputs, generate(model, inputs, policy, budget=budget), strict=True):
        expected = masked(model, prompt, answer.generated_tokens, policy, budget)
        assert answer.generated_tokens == expected.argmax(-1).tolist()


@needs_pool
@torch.no_grad()
def test_a_retention_of_one_evicts_nothing():
    model, inputs = build("llama"), prompts(30, 17)
    for prompt, answer in zip(inputs, generate(model, inputs, retention=1.0), strict=True):
        assert answer.generated_tokens == model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()


@needs_pool
@torch.no_grad()
def test_blocks_go_back_to_the_pool_and_are_used_by_others():
    """A pool for seven prompts and their answers, or for twelve of which the prompts are evicted."""
    model, inputs = build("llama"), [tokens(1, 40, seed=i)[0].tolist() for i in range(12)]
    answer_to = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
    steps, answers, read = {}, {}, {}
    for retention in (1.0, 0.25):
        with batching.continuous_batching(
            model,
            retention=retention,
            generation_config=GenerationConfig(**answer_to),
            continuous_batching_config=config(num_blocks=120, max_batch_tokens=96),
        ) as manager:
            ids = manager.add_requests(inputs)
            found = {}
            while len(found) < len(ids):
                answer = manager.get_result(timeout=60)
                assert answer is not None and answer.error is None
                found[answer.request_id] = answer.generated_tokens
            steps[retention], answers[retention] = manager.current_batch, [found[i] for i in ids]
            cache, read[retention] = manager.batch_processor.cache, manager.eviction.prompts
            (allocator,) = cache.cache_allocators.values()
            assert not allocator.block_table and cache.compute_free_capacity() == 1
            assert manager.eviction.freed_blocks == (0 if retention == 1 else 12 * 7)  # 30 of 40 rows leave
    assert steps[0.25] < steps[1.0] and read[0.25] == 12 < read[1.0]  # without eviction, some are interrupted
    for prompt, answer in zip(inputs, answers[0.25], strict=True):
        assert answer == masked(model, prompt, answer, policies.KNorm(), 10).argmax(-1).tolist()


@needs_pool
def test_a_request_that_a_full_pool_interrupts_is_read_again_and_ends():
    model, inputs = build("llama"), [tokens(1, 16, seed=i)[0].tolist() for i in range(4)]
    with batching.continuous_batching(
        model,
        retention=0.5,
        generation_config=GenerationConfig(**GREEDY | dict(max_new_tokens=40)),
        continuous_batching_config=config(num_blocks=20, safety_margin=0.0),
    ) as manager:
        ids = manager.add_requests(inputs)
        found = {}
        while len(found) < len(ids):
            answer = manager.get_result(timeout=60)
            assert answer is not None and answer.error is None
            found[answer.request_id] = answer
        assert manager.eviction.prompts > len(ids)  # or none was interrupted
        assert manager.batch_processor.cache.compute_free_capacity() == 1
    assert [len(found[i].generated_tokens) for i in ids] == [40] * 4
    assert [found[i].prompt_ids for i in ids] == inputs


@needs_pool
def test_a_request_that_is_cancelled_gives_back_what_it_still_has():
    with batching.continuous_batching(
        build("llama"),
        retention=0.5,
        generation_config=GenerationConfig(**GREEDY | dict(max_new_tokens=None)),
        continuous_batching_config=config(),
    ) as manager:
        request = manager.add_request(prompts(30)[0], max_new_tokens=180, streaming=True)
        for answer in manager.request_id_iter(request):
            if len(answer.generated_tokens) == 3:
                manager.cancel_request(request)
                break
        last = manager.add_request(prompts(9)[0], max_new_tokens=2)
        while manager.get_result(last, timeout=60) is None:
            pass
        assert manager.eviction.freed_blocks > 0
        assert manager.batch_processor.cache.compute_free_capacity() == 1


@needs_pool
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(allow_block_sharing=True), "allow_block_sharing=False"),
        (dict(use_async_batching=True), "use_async_batching=False"),
        (dict(use_async_batching=None), "use_async_batching=False"),
        (dict(cpu_offload_space=1.0), "cpu_offload_space=0"),
        (dict(cpu_offload_space=None), "cpu_offload_space=0"),
        (dict(page_size=12), "page_size as a power of two"),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=f"lkv.hf.batching: expected {named}"):
        generate(build("llama"), prompts(9), retention=0.5, options=changes)


@needs_pool
def test_what_else_is_refused():
    model, inputs = build("llama"), prompts(9)
    own = model.config._attn_implementation
    forks = GenerationConfig(do_sample=True, num_return_sequences=2)
    refused = [
        (dict(policy="snapkv", retention=0.5), "keys and values alone, got one that needs queries"),
        (dict(), "one of retention and budget, got none"),
        (dict(retention=0.5, budget=3), "one of retention and budget, got both"),
        (dict(retention=0.0), "retention in"),
        (dict(budget=0), "budget >= 1"),
        (dict(retention=0.5, generation_config=forks), "num_return_sequences=1"),
    ]
    for arguments, named in refused:
        with pytest.raises(ValueError, match=named):
            batching.generate_batch(model, inputs, **arguments)
    with pytest.raises(ValueError, match="got sliding_attention"):
        generate(build("gemma3"), inputs, retention=0.5)
    with pytest.raises(ValueError, match="got sliding_attention"):
        generate(variant("mistral", sliding_window=8), inputs, retention=0.5)
    with pytest.raises(ValueError, match="layers that all hold keys of their own, got Gemma4"):
        generate(variant("gemma4", layer_types=["full_attention"] * 4), inputs, retention=0.5)
    assert model.config._attn_implementation == own


class Trainable(policies.KNorm):
    """Scores that depend on a parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.scores = torch.nn.Parameter(torch.ones(())), []

    def score(self, layer, observation):
        self.scores.append(super().score(layer, observation) * self.weight)
        return self.scores[-1]


@needs_pool
def test_scores_of_a_policy_that_could_be_trained_keep_nothing_for_gradients():
    policy = Trainable()
    (answer,) = generate(build("llama"), prompts(30), policy, retention=0.5)
    assert policy.scores and len(answer.generated_tokens) == 8
    assert not any(scores.requires_grad for scores in policy.scores)


class Failing(policies.KNorm):
    def score(self, layer, observation):
        raise ArithmeticError("no score")


@needs_pool
def test_a_policy_that_fails_fails_its_requests_with_the_reason():
    with pytest.raises(RuntimeError, match=r"1 of 1 requests failed, req_0: no score"):
        generate(build("llama"), prompts(30), Failing(), retention=0.5)


@needs_pool
def test_the_code_of_the_page_runs(monkeypatch):
    """In a pool of a machine with 1 GB, as transformers takes 60 to 90 % of the memory by default."""
    small = torch.device("cpu"), 1 << 30, 0, 0
    pools = import_module("transformers.generation.continuous_batching.cache")
    monkeypatch.setattr(pools, "get_device_and_memory_breakdown", lambda: small)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "cache.md").read_text(), re.DOTALL)
    names = {"model": build("llama"), "prompts": prompts(30, 9)}
    exec(block, names)
    assert [len(answer.generated_tokens) for answer in names["answers"]] == [64, 64]


@needs_pool
def test_no_prompts():
    assert generate(build("llama"), [], retention=0.5) == []


def test_a_transformers_without_the_pool_is_refused(monkeypatch):
    module = "transformers.generation.continuous_batching.requests"
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "lkv.hf.batching", raising=False)
    with pytest.raises(ImportError, match=r"expected transformers 5\.19 or later, .* got \d"):
        import_module("lkv.hf.batching")
