"""Models with something special: what works is right, and what cannot is refused with the reason before any token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from conversation import talk, turn
from families import SMALL, SPECIAL, build, call, places, tokens
from masked import masked_logits, recorded
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.hf.versions import RecurrentLayer, is_recurrent, stage_of_generate
from lkv.policies import AdaKV, SnapKV

ONE, THREE = [41], [41, 29, 9]
# Behind a turn, padding moves what windows and recurrent states see, in transformers' own cache too: none is there.
TURNS = {"one": [turn(ONE, 6), turn([13], 6, seed=1)], "padded": [turn(THREE, 6), turn([13] * 3, 6, seed=1)]}


@pytest.fixture(params=SPECIAL)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    name, config, _ = SPECIAL[request.param]
    if not hasattr(transformers, config):
        pytest.skip(f"no {name} in this transformers")
    if RecurrentLayer is None:  # an older transformers: right, or refused
        try:
            lkv.Cache(build(request.param), retention=0.5)
        except ValueError as error:
            assert "expected a model whose full-attention layers can be evicted" in str(error)
            pytest.skip(str(error))
    return build(request.param)


@pytest.mark.parametrize("shape", TURNS)
def test_all_kept(model, shape):
    dense = talk(model, DynamicCache(config=model.config), TURNS[shape])
    ours = talk(model, lkv.Cache(model, "adakv", retention=1.0), TURNS[shape])
    present = dense.mask.bool()
    assert torch.equal(ours.ids, dense.ids)
    torch.testing.assert_close(ours.logits[present], dense.logits[present], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", ["each", "last"])
@pytest.mark.parametrize("shape", TURNS)
def test_a_third_kept(model, shape, chunks):
    """As the same tokens at once with what was evicted masked."""
    turns, policy = TURNS[shape], AdaKV(SnapKV(window=4))
    if RecurrentLayer is None and model is build("gemma3n"):
        pytest.skip("without a cache this transformers lets layers that share keys make their own")
    recurrent = any(map(is_recurrent, DynamicCache(config=model.config).layers))
    if recurrent:
        turns = turns[:1]  # some of transformers' recurrent layers begin anew where several tokens follow
    length = sum(t.ids.shape[1] + t.steps for t in turns)
    cache = lkv.Cache(model, policy, retention=0.3, chunks=chunks)
    with recorded(cache, len(turns[0].ids), length) as recorder, torch.no_grad():
        outputs = talk(model, cache, turns)
        expected = masked_logits(model, outputs.ids, outputs.mask, recorder.visible)
    present = outputs.mask.bool()
    tolerance = 1e-2 if recurrent else 1e-3  # of scans in pieces and at once, as with transformers' own cache
    torch.testing.assert_close(outputs.logits[present], expected[present], rtol=tolerance, atol=tolerance)
    assert all(layer.rows.lengths.sum() < 0.6 * 2 * outputs.mask.sum() for layer in cache.ragged)


@pytest.mark.parametrize("keep", [1, 2, 7])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_with_the_last_logits_alone(family, keep):
    """Gemma 4 drops the other queries where it shares keys; whole and packed rows."""
    if not hasattr(transformers, SPECIAL[family][1]):
        pytest.skip("not in this transformers")
    model, prompt, more = build(family), tokens(2, 40), tokens(2, 9, seed=1)
    outputs = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), lkv.Cache(model, "adakv", retention=1.0)):
            outputs.append([model(ids, past_key_values=cache, logits_to_keep=keep).logits for ids in (prompt, more)])
    for dense, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_the_last_logits_alone_where_padding_is_between_tokens(family, keep):
    if not hasattr(transformers, SPECIAL[family][1]):
        pytest.skip("not in this transformers")
    model, prompt, more = build(family), tokens(2, 40), tokens(2, 9, seed=1)
    mask = torch.ones(2, 49).long()
    mask[0, 45] = mask[1, 41] = mask[1, 44] = 0
    outputs = []
    with torch.no_grad():
        for last in (0, keep):  # 0: all
            cache = lkv.Cache(model, "adakv", retention=0.5)
            call(model, prompt, mask[:, :40], cache)
            options = dict(attention_mask=mask, position_ids=places(mask)[:, 40:], past_key_values=cache)
            outputs.append(model(more, logits_to_keep=last, **options).logits[:, -keep:])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_a_layer_is_evicted_when_the_last_that_reads_it_has_attended():
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("not in this transformers")
    model = build("gemma4")
    cache, packed = lkv.Cache(model, "streaming_llm", retention=0.3), []
    assert cache.readers == {1: (1, 3)}
    hooks = [
        layer.register_forward_hook(lambda *_: packed.append(cache.ragged[0].rows is not None))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        call(model, tokens(1, 40), None, cache)
    for hook in hooks:
        hook.remove()
    assert packed == [False, False, False, True]


LATENT = dict(
    kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4
)
HALVES = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=32)
HALF_HEADS = dict(encoder_attention_heads=4, decoder_attention_heads=4)
BOTH_WAYS = dict(use_bidirectional_attention=True, layer_types=["sliding_attention", "full_attention"])
OF_BOTH = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4)


@pytest.mark.parametrize(
    "model, config, options, reason",
    [
        ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT, r"caches latents \(MLA\)"),
        ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT, r"caches latents \(MLA\)"),
        ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}, "attends (more than once|by itself)"),
        ("BloomForCausalLM", "BloomConfig", dict(n_layer=2, n_head=4), "ALiBi"),
        ("MptForCausalLM", "MptConfig", dict(d_model=32, n_heads=4, n_layers=2), "ALiBi"),
        ("FalconForCausalLM", "FalconConfig", {}, "attends by itself"),
        ("BartForConditionalGeneration", "BartConfig", {**HALVES, **HALF_HEADS}, "is an encoder-decoder"),
        ("MambaForCausalLM", "MambaConfig", {}, "has (no layers of full attention|recurrent layers)"),
        ("FalconH1ForCausalLM", "FalconH1Config", OF_BOTH, "has (no layers of full attention alone|recurrent layers)"),
        ("MistralForCausalLM", "MistralConfig", dict(sliding_window=16), "has no layers of full attention alone"),
        ("BertLMHeadModel", "BertConfig", {}, "attends (in both directions|by itself)"),
        ("RobertaForCausalLM", "RobertaConfig", {}, "attends (in both directions|by itself)"),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", BOTH_WAYS, "attends in both directions"),
        ("MllamaForCausalLM", "MllamaTextConfig", dict(cross_attention_layers=[1]), "reads the tensors of the cache"),
    ],
)
def test_what_cannot_be_evicted(model, config, options, reason):
    if not hasattr(transformers, config):
        pytest.skip("not in this transformers")
    if any(not hasattr(getattr(transformers, config)(), name) for name in options):
        pytest.skip("without such a setting in this transformers")
    made = getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **options})).eval()
    own = made.config._attn_implementation
    with pytest.raises(
        ValueError, match=f"lkv.Cache: expected a model whose full-attention layers .*{model}.*{reason}"
    ):
        lkv.Cache(made, retention=0.5)
    assert made.config._attn_implementation == own and not made._forward_pre_hooks


def test_a_decoder_of_a_kind_that_can_attend_in_both_directions():
    """BERT as a decoder: only its other setting is refused."""
    made = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)).eval()
    try:
        cache = lkv.Cache(made, "streaming_llm", retention=1.0)
    except ValueError as error:
        pytest.skip(str(error))  # before transformers 5 it attends by itself
    prompt = tokens(1, 24)
    with torch.no_grad():
        ours = made(prompt, past_key_values=cache).logits
        torch.testing.assert_close(ours, made(prompt).logits, rtol=1e-4, atol=1e-4)


def twice(attention: Callable[..., tuple[Tensor, object]], *arguments: object, **options: object):
    attention(*arguments, **options)
    return attention(*arguments, **options)


def by_itself(
    attention: object, module: object, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: object
):
    return torch.zeros_like(query).transpose(1, 2), None


def on_a_copy(attention: Callable[..., tuple[Tensor, object]], module, query, key, value, mask, **options: object):
    return attention(module, query, key.clone(), value, mask, **options)


@pytest.mark.parametrize("broken", [twice, by_itself, on_a_copy])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pairing_that_is_broken_as_it_runs(broken, packed, monkeypatch):
    """An error, and a cache that is as it was, never a result."""
    model = build("llama")
    cache, length = lkv.Cache(model, "streaming_llm", retention=0.5, chunks="last"), 0
    with torch.no_grad():
        if packed:
            call(model, tokens(1, 20), None, cache)
            cache.evict()
            length = 20
        functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        right = functions["lkv_sdpa"]
        monkeypatch.setitem(functions, "lkv_sdpa", lambda *a, **k: broken(right, *a, **k))
        monkeypatch.setitem(functions._global_mapping, "lkv_sdpa", lambda *a, **k: broken(right, *a, **k))
        with pytest.raises(ValueError, match="lkv.Cache: expected layer"):
            call(model, tokens(1, 8), None, cache)
        monkeypatch.undo()
        assert cache.get_seq_length() == length
        call(model, tokens(1, 8), None, cache)
    assert cache.get_seq_length() == length + 8


def test_a_recurrent_state_cannot_go_back():
    if RecurrentLayer is None:
        pytest.skip("refused in this transformers")
    model = build("jamba")
    cache = lkv.Cache(model, "streaming_llm", retention=0.5)
    with torch.no_grad():
        call(model, tokens(2, 20), None, cache)
        twin = cache.fork()
        call(model, tokens(2, 1), None, cache)
        with pytest.raises(ValueError, match="lkv.Cache.crop: expected layers that can go back"):
            cache.crop(-1)
        assert cache.get_seq_length() == 21
        outputs = call(model, tokens(2, 2, seed=1), None, twin.fork())
        twin.batch_select_indices(torch.tensor([1]))
        alone = call(model, tokens(2, 2, seed=1)[1:], None, twin)
        torch.testing.assert_close(alone, outputs[1:], rtol=1e-4, atol=1e-4)  # sums in another order


def test_generate_is_seen_through():
    """Where `generate` is, which only its stack tells: see `lkv.hf.versions.stage_of_generate`."""
    model, stages = build("llama"), []
    hook = model.register_forward_pre_hook(lambda *_: stages.append(stage_of_generate()))
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    call(model, ids, None, None)
    model.generate(
        ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=7, past_key_values=lkv.Cache(model, retention=1.0)
    )
    chunked = stages[1:]
    model.generate(ids, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2, eos_token_id=99)
    hook.remove()
    assert stages[0] is None and set(chunked[2:]) == {"answer"}
    if not transformers.__version__.startswith("4."):  # which feeds the last chunk as if it were generated
        assert chunked[:2] == ["prompt"] * 2
    first, *later = stages[1 + len(chunked) :]
    assert first == "first draft" and set(later) == {"draft"}
