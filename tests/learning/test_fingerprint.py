"""A checkpoint knows the weights that it was trained for, and is refused beside others."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lkv
from lkv import retriever
from lkv.policies.lkv import checkpoint
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.fingerprint import fingerprint

DESIGN = Design(hidden=4)


@torch.no_grad()
def tuned(model: PreTrainedModel, name: str = "layers.1.self_attn.v_proj.weight", by: float = 1.05) -> PreTrainedModel:
    other = copy.deepcopy(model)
    other.get_decoder().get_parameter(name).mul_(by)
    return other


def saved(folder: Path, model: PreTrainedModel, mark: str | None) -> None:
    checkpoint.save(folder, DESIGN.build(Shape.of(model)), DESIGN, Shape.of(model), {}, mark)


def test_every_parameter_counts_and_nothing_else(model: PreTrainedModel) -> None:
    mark = fingerprint(model)
    assert len(mark) == 32 and int(mark, 16) >= 0
    names = [name for name, _ in model.get_decoder().named_parameters()]
    marks = {fingerprint(tuned(model, name)) for name in names}
    assert len(marks | {mark}) == len(names) + 1
    same = copy.deepcopy(model)
    same.config._attn_implementation = "eager"
    same.lm_head.weight.data = same.lm_head.weight.data * 2  # changes no key and no value
    assert fingerprint(same) == mark == fingerprint(model.requires_grad_(False))


def test_the_shape_counts_where_the_values_are_the_same(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    layer = other.model.layers[0].self_attn
    layer.q_proj.weight.data = layer.q_proj.weight.data.reshape(-1, 64)
    assert fingerprint(other) != fingerprint(model)


def test_bfloat16_is_the_same_model_and_float16_another(model: PreTrainedModel) -> None:
    mark = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == mark
    assert fingerprint(copy.deepcopy(model).bfloat16().float()) == mark
    assert fingerprint(copy.deepcopy(model).half()) != mark


def test_it_takes_no_time() -> None:
    """30 million parameters in 40 layers: nothing is read but a few values of each."""
    sizes = dict(vocab_size=30000, hidden_size=256, intermediate_size=700, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=40))
    begin = time.process_time()
    fingerprint(model)
    assert time.process_time() - begin < 1


def test_another_fine_tune_is_refused_unless_it_is_wanted(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model, fingerprint(model))
    lkv.load(tmp_path, model)
    lkv.load(tmp_path)  # no model to compare with
    other = tuned(model)
    ours, theirs = fingerprint(other), fingerprint(model)
    with pytest.raises(ValueError, match=f"^lkv.load: expected .* fingerprint {theirs}, .* got {ours}: another fine"):
        lkv.load(tmp_path, other)
    policy = lkv.load(tmp_path, other, any_weights=True)
    assert torch.equal(policy.scorer.up, lkv.load(tmp_path, model).scorer.up)


def test_another_shape_is_refused_even_then(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model, fingerprint(model))
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    config["model"]["vocab_size"] += 1
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a model of vocab_size"):
        lkv.load(tmp_path, model, any_weights=True)


def test_checkpoints_without_a_fingerprint_fit_any_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model, None)
    assert "fingerprint" not in json.loads((tmp_path / checkpoint.CONFIG).read_text())
    lkv.load(tmp_path, tuned(model))
    shipped, _ = retriever.load()
    lkv.load("retriever", tuned(shipped))


def test_weights_that_are_not_there(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model, fingerprint(model))
    nowhere = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="expected a model whose weights are in memory, .* got .* any_weights=True"):
        lkv.load(tmp_path, nowhere)
    lkv.load(tmp_path, nowhere, any_weights=True)
