"""The model's attention: replaced for the length of a forward with a cache of ours, its own for everybody else."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from families import FAMILIES, build, call, selected, tokens
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.hf import routing
from lkv.hf.versions import RecurrentLayer


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(build("llama"))


class Stop(Exception):
    pass


def stop(*args: object) -> None:
    raise Stop


def names_within(model: PreTrainedModel) -> list[str]:
    """The attention by name in every forward of a layer from now on."""
    names = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: names.append(model.config._attn_implementation))
    return names


def test_within_a_forward_and_not_outside(model):
    names, own = names_within(model), model.config._attn_implementation
    with torch.no_grad():
        cache = lkv.Cache(model, retention=0.5)
        assert model.config._attn_implementation == own
        call(model, tokens(1, 20), None, cache)
        call(model, tokens(1, 20), None, DynamicCache(config=model.config))
        model.generate(tokens(1, 20), max_new_tokens=2, past_key_values=lkv.Cache(model.model, retention=0.5))
        model.model(tokens(1, 20), None, None, cache.fork())  # by position
    assert names == [f"lkv_{own}", own, f"lkv_{own}", f"lkv_{own}", f"lkv_{own}"]
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("compiled", [False, True])
def test_after_an_exception(model, compiled):
    own, cache = model.config._attn_implementation, lkv.Cache(model, retention=0.5)
    norm = model.model.layers[-1].input_layernorm
    norm.forward = stop
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad(), pytest.raises(Stop) as caught:
        run(tokens(1, 20), past_key_values=cache)
    assert caught.value.__traceback__ is not None and model.config._attn_implementation == own
    assert cache.get_seq_length() == 0
    del norm.forward
    torch._dynamo.reset()
    with torch.no_grad():
        run(tokens(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20 and model.config._attn_implementation == own


def test_after_a_mask_that_is_refused(model):
    own, cache = model.config._attn_implementation, lkv.Cache(model, retention=0.5)
    with torch.no_grad(), pytest.raises(ValueError, match="expected attention_mask of all tokens") as caught:
        model(tokens(1, 20), attention_mask=torch.ones(1, 19), past_key_values=cache)
    assert caught.value.__traceback__ is not None and model.config._attn_implementation == own


def test_models_of_one_config():
    """Draft and target, or two seeds: what is done with one does not reach the other."""
    config = copy.deepcopy(build("llama").config)
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    for each in (one, other):
        each.generation_config.eos_token_id = None
    ids = tokens(1, 40)
    expected = other.generate(ids, max_new_tokens=4, do_sample=False)
    caches = [lkv.Cache(each, "streaming_llm", retention=1.0) for each in (one, other)]
    with torch.no_grad():
        call(one, ids, None, caches[0])
    caches[0].close()
    del caches[0]
    assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=caches[0]), expected)
    third = transformers.AutoModelForCausalLM.from_config(one.config)
    assert third.config._attn_implementation == one.config._attn_implementation == "sdpa"


def test_copies(model):
    """Copies of the config and of the model, also while a forward runs: a copied model takes caches of ours at once."""
    cache, copies = lkv.Cache(model, retention=0.5), []
    model.model.layers[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model.config)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        outputs = [call(each, tokens(1, 20), None, lkv.Cache(model, retention=0.5)) for each in (model, twin)]
        assert torch.equal(*outputs)
        call(model, tokens(1, 20), None, cache)
    assert twin.config._attn_implementation == "sdpa" == copy.deepcopy(model.config)._attn_implementation
    within = transformers.LlamaForCausalLM(copies[0]).eval()  # has our name, which is its own attention for others
    within.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(within(tokens(1, 20)).logits, outputs[0])


def test_another_attention_is_chosen_between_two_calls(model):
    ids, cache = tokens(1, 30), lkv.Cache(model, retention=1.0)
    names = names_within(model)
    with torch.no_grad():
        call(model, ids, None, cache)
        model.set_attn_implementation("eager")
        ours = call(model, tokens(1, 3), None, cache)
        dense = model(torch.cat([ids, tokens(1, 3)], 1)).logits[:, -3:]
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    assert names == ["lkv_sdpa", "lkv_eager", "eager"] and model.config._attn_implementation == "eager"


def test_an_attention_that_cannot_be_stood_for(model):
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="expected a model with eager, sdpa or flash attention, got 'flex_att"):
        lkv.Cache(model, retention=0.5)
    assert model.config._attn_implementation == "flex_attention"


def test_threads(model):
    """Two caches of ours and one of transformers' own, on one model at once."""
    ids, outputs, errors = tokens(1, 40), {}, []
    own = model.config._attn_implementation

    def dense() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=20, do_sample=False)

    def ours() -> torch.Tensor:
        cache = lkv.Cache(model, "streaming_llm", retention=0.3)
        return model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=cache)

    expected = {"dense": dense(), "a": ours()}
    expected["b"] = expected["a"]

    def run(name: str) -> None:
        try:
            outputs[name] = [(dense if name == "dense" else ours)() for _ in range(3)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and model.config._attn_implementation == own
    assert all(torch.equal(one, expected[name]) for name, all_of in outputs.items() for one in all_of)


def test_one_cache_in_two_threads(model):
    cache, errors = lkv.Cache(model, retention=0.5), []

    def other(*_: object) -> None:
        try:
            call(model, tokens(1, 8), None, cache)
        except ValueError as error:
            errors.append(str(error))

    def meanwhile(*_: object) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(meanwhile)
    with torch.no_grad():
        call(model, tokens(1, 20), None, cache)
    hook.remove()
    assert "expected one call at a time" in errors[0] and cache.get_seq_length() == 20


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", selected(FAMILIES))
def test_other_caches_see_the_models_own_attention(family, attention):
    """Also within a forward of ours, as another thread may."""
    model = copy.deepcopy(build(family))
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} in this transformers")
    ids = tokens(2, 30)
    ids[0, :9] = 0
    mask = (ids != 0).long()

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model(ids, attention_mask=mask, use_cache=False).logits,
                model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits,
                model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
            ]

    before, within = logits(), []
    cache = lkv.Cache(model, retention=0.5)
    layer = model.get_decoder().layers[1]

    def meanwhile(*_: object) -> None:
        hook.remove()
        within.extend(logits())

    hook = layer.register_forward_pre_hook(meanwhile)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert ours.shape == before[2].shape and cache.get_seq_length() == 34
    assert all(map(torch.equal, within, before)) and all(map(torch.equal, logits(), before))


def test_training_beside_a_cache(model):
    lkv.Cache(model, retention=0.5)
    model.train()
    model.gradient_checkpointing_enable()
    model(tokens(1, 8), labels=tokens(1, 8), use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_continuous_batching_beside_a_cache(model):
    if RecurrentLayer is None:
        pytest.skip("continuous batching of this transformers does not run here, with or without a cache of ours")
    ids = tokens(1, 20)
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    cache = lkv.Cache(model, retention=0.5)
    with torch.no_grad():
        call(model, ids, None, cache)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it fills the memory
    out = model.generate_batch(
        inputs=[ids[0].tolist()], generation_config=options, continuous_batching_config=small, progress_bar=False
    )
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 20:].tolist()
    assert [each.generated_tokens for each in out.values()] == [expected]


def test_a_route_may_be_collected_where_another_is_made_or_closed():
    model = build("llama")
    config = model.config
    own, route = config._attn_implementation, routing.Route(model.get_decoder())
    assert config._attn_implementation == f"lkv_{own}"
    with routing._locked():
        route.__del__()  # as the collector does, in the midst of it
    assert config._attn_implementation == own and not routing._routed
