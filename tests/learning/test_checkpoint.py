"""What was learned, on disk: a checkpoint records all that it was trained with, and the loader checks it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedModel

import lkv
from lkv.hf import Cache
from lkv.policies.lkv import LKV, Learned, LKVThreshold, checkpoint, packaged
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.head_budget import KINDS

# Nothing in it is a default, and no two numbers are the same.
OTHER = Design(budget="softmax", floor=0.0625, input="hidden", hidden=9, sink=3, window=5, scale="absolute")


def built(design: Design, model: PreTrainedModel) -> Learned:
    """As if trained."""
    torch.manual_seed(7)
    policy = design.build(Shape.of(model))
    for module in (policy.scorer, policy.budget):
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return policy


def saved(folder: Path, model: PreTrainedModel, design: Design = OTHER) -> Learned:
    policy = built(design, model)
    checkpoint.save(folder, policy, design, Shape.of(model), {"step": 7})
    return policy


def edit(folder: Path, change: object) -> None:
    path = folder / checkpoint.CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "design", [OTHER, Design(), *(replace(OTHER, budget=kind, input="kv") for kind in KINDS)], ids=lambda d: d.budget
)
def test_what_is_loaded_is_what_was_saved(model: PreTrainedModel, tmp_path: Path, design: Design) -> None:
    policy = saved(tmp_path, model, design)
    again = lkv.load(tmp_path, model)
    assert type(again) is (LKVThreshold if design.budget == "threshold" else LKV)
    assert (again.sink, again.window) == (design.sink, design.window)
    assert (again.budget.kind, again.budget.floor) == (design.budget, design.floor)
    assert (again.budget.layers, again.budget.heads) == (again.scorer.layers, again.scorer.heads) == (3, 2)
    assert again.budget.temperature == 1.0
    assert (again.scorer.input, again.scorer.up.shape[-1]) == (design.input, design.hidden)
    assert again.scorer.features == 32  # two of 16 numbers, or the model's width
    assert again.scorer.scale == design.scale
    a, b = checkpoint.weights(policy), checkpoint.weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    if design.budget != "threshold":
        assert torch.equal(again.table(30, 100), policy.table(30, 100))


@torch.no_grad()
@pytest.mark.parametrize(("sink", "window"), [(6, 1), (1, 6), (0, 3), (3, 0)])
def test_rows_that_were_protected_in_training_are_protected(
    model: PreTrainedModel, tmp_path: Path, sink: int, window: int
) -> None:
    """Where nothing else fits, what is left is the first and the last rows of every head."""
    saved(tmp_path, model, replace(OTHER, budget="uniform", sink=sink, window=window))
    with Cache(model, lkv.load(tmp_path, model), budget=sink + window) as cache:
        model.model(torch.randint(4, 400, (1, 50)), past_key_values=cache, use_cache=True)
        for layer in cache.ragged:
            assert layer.rows.lengths.tolist() == [[sink + window] * 2]
            kept = layer.rows.padded(layer.rows.positions)[..., : sink + window]
            assert kept.tolist() == [[[*range(sink), *range(50 - window, 50)]] * 2]


def test_the_shipped_checkpoint_protects_what_the_docs_say() -> None:
    """One row at either end, as little as 0.1 % for a head; so the file records, and so does its training."""
    policy = lkv.load("retriever")
    config = json.loads((packaged.FOLDER / "retriever" / checkpoint.CONFIG).read_text())
    assert (policy.sink, policy.window, policy.budget.floor) == (1, 1, 0.001)
    assert config["design"] == config["facts"]["train"]["design"]
    assert config["design"] | {"scale": "standard"} == asdict(Design(sink=1, window=1, floor=0.001))
    assert config["facts"]["train"]["retention"] == [0.01, 0.5]
    assert int(policy.table(2, 1000).min()) >= 2 and int(policy.table(2, 1000).sum()) == 2 * 16


@pytest.mark.parametrize("name", packaged.names())
def test_what_is_shipped_protects_the_rows_that_its_training_did(name: str) -> None:
    config = json.loads((packaged.FOLDER / name / checkpoint.CONFIG).read_text())
    policy, trained = lkv.load(name), config["facts"]["train"]["design"]
    assert config["design"] == trained and policy.budget.kind == trained["budget"]
    assert (policy.sink, policy.window) == (trained["sink"], trained["window"])
    assert (policy.sink, policy.window) == ((1, 1) if name == "retriever" else (4, 8))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        *(("design", field.name) for field in fields(Design) if field.name not in checkpoint.LATER),
        *(("model", field.name) for field in fields(Shape)),
    ],
)
def test_a_checkpoint_that_does_not_say_something_is_refused(
    model: PreTrainedModel, tmp_path: Path, part: str, name: str
) -> None:
    """The default of today need not be what it was trained with."""
    saved(tmp_path, model, Design())
    edit(tmp_path, lambda config: config[part].pop(name))
    with pytest.raises(ValueError, match=f"^lkv.load: expected the configuration of a checkpoint .* value of {name}"):
        lkv.load(tmp_path)


def test_a_setting_that_came_later_is_what_it_was_before(model: PreTrainedModel, tmp_path: Path) -> None:
    """Checkpoints that do not name a scale have standardised scores, whatever the default of today; the shipped one."""
    assert checkpoint.LATER == {"scale": "standard"}
    policy = saved(tmp_path, model, replace(OTHER, scale="standard"))
    edit(tmp_path, lambda config: config["design"].pop("scale"))
    again = lkv.load(tmp_path, model)
    assert again.scorer.scale == "standard" and again.scorer.offset is None
    assert torch.equal(again.scorer.up, policy.scorer.up)
    assert "scale" not in json.loads((packaged.FOLDER / "retriever" / checkpoint.CONFIG).read_text())["design"]
    assert lkv.load("retriever").scorer.scale == "standard"
    saved(tmp_path, model, OTHER)  # absolute: it has weights that a standardised one has no place for
    edit(tmp_path, lambda config: config["design"].pop("scale"))
    with pytest.raises(ValueError, match="expected weights of the design .*scorer.offset"):
        lkv.load(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sink", -1), ("sink", 1.5), ("window", "8"), ("window", None), ("hidden", 0), ("more", 1), ("floor", "x")],
)
def test_a_design_that_cannot_be_is_refused(model: PreTrainedModel, tmp_path: Path, name: str, value: object) -> None:
    saved(tmp_path, model, Design())
    edit(tmp_path, lambda config: config["design"].update({name: value}))
    with pytest.raises(ValueError, match=f"^lkv.load: expected the configuration of a checkpoint .*{name}"):
        lkv.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model": {"layers": 1}, "design": {}}'])
def test_something_else_is_refused(model: PreTrainedModel, tmp_path: Path, text: str) -> None:
    saved(tmp_path, model)
    (tmp_path / checkpoint.CONFIG).write_text(text)
    with pytest.raises(ValueError, match="^lkv.load: expected the configuration of a checkpoint"):
        lkv.load(tmp_path, model)


@pytest.mark.parametrize("field", [field.name for field in fields(Shape)])
def test_another_model_is_refused(model: PreTrainedModel, tmp_path: Path, field: str) -> None:
    shape = Shape.of(model)
    other = "mistral" if field == "model_type" else getattr(shape, field) + 1
    checkpoint.save(tmp_path, built(OTHER, model), OTHER, replace(shape, **{field: other}), {})
    with pytest.raises(
        ValueError, match=f"^lkv.load: expected a model of {field} {other}, got {getattr(shape, field)}"
    ):
        lkv.load(tmp_path, model)


def test_all_that_differs_is_named(model: PreTrainedModel) -> None:
    shape = Shape.of(model)
    with pytest.raises(ValueError, match=r"expected a model of layers 5, got 3; vocab_size 7, got 499$"):
        checkpoint.check(replace(shape, layers=5, vocab_size=7), shape)
    checkpoint.check(shape, shape)


@pytest.mark.parametrize("gone", [(checkpoint.CONFIG,), (checkpoint.WEIGHTS,), (checkpoint.CONFIG, checkpoint.WEIGHTS)])
def test_a_part_that_is_not_there(model: PreTrainedModel, tmp_path: Path, gone: tuple[str, ...]) -> None:
    saved(tmp_path, model)
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"^lkv.load: expected lkv.json and lkv.safetensors in .*"):
        lkv.load(tmp_path)


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_a_damaged_file_of_weights_is_refused(model: PreTrainedModel, tmp_path: Path, how: str) -> None:
    saved(tmp_path, model)
    path = tmp_path / checkpoint.WEIGHTS
    path.write_bytes({"cut": path.read_bytes()[:-9], "empty": b"", "text": b"weights of another kind"}[how])
    with pytest.raises(ValueError, match=r"^lkv.load: expected the weights of a checkpoint in .*lkv.safetensors: "):
        lkv.load(tmp_path, model)


@pytest.mark.parametrize("how", ["missing", "more", "shape", "int8", "nan", "inf"])
def test_weights_of_another_design_and_no_finite_numbers_are_refused(
    model: PreTrainedModel, tmp_path: Path, how: str
) -> None:
    saved(tmp_path, model)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    if how == "missing":
        del tensors["scorer.up"]
    elif how == "more":
        tensors["scorer.up.other"] = tensors["scorer.up"].clone()
    elif how == "shape":
        tensors["scorer.up"] = tensors["scorer.up"][..., :1].contiguous()  # would broadcast
    elif how == "int8":
        tensors["scorer.up"] = tensors["scorer.up"].to(torch.int8)
    else:
        tensors["scorer.up"] *= float(how)
    save_file(tensors, tmp_path / checkpoint.WEIGHTS)
    what = "weights of the design" if how in ("missing", "more", "shape") else "finite floating-point weights"
    with pytest.raises(ValueError, match=f"^lkv.load: expected {what} .*scorer.up"):
        lkv.load(tmp_path, model)


def test_a_save_that_fails_leaves_the_old_one(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = saved(tmp_path, model)

    def torn(tensors: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"torn")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path, model, Design())
    monkeypatch.undo()
    again = lkv.load(tmp_path, model)
    assert torch.equal(again.scorer.up, policy.scorer.up) and again.sink == OTHER.sink


def test_folders_are_made(model: PreTrainedModel, tmp_path: Path) -> None:
    shape = Shape.of(model)
    checkpoint.save(tmp_path / "a" / "b", Design().build(shape), Design(), shape, {})
    checkpoint.load(tmp_path / "a" / "b", model)


def test_facts_are_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model)
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    assert config == {"model": asdict(Shape.of(model)), "design": asdict(OTHER), "facts": {"step": 7}}


def test_it_is_float32_beside_any_model_and_where_that_is(model: PreTrainedModel, tmp_path: Path) -> None:
    saved(tmp_path, model)
    policy = lkv.load(tmp_path, model.bfloat16().to("meta"))
    tensors = checkpoint.weights(policy).values()
    assert {t.dtype for t in tensors} == {torch.float32} and {t.device.type for t in tensors} == {"meta"}


def test_shapes_of_models() -> None:
    """KV heads and their width, whether a configuration names them or not, within a wrapper or not."""

    def of(config: object) -> Shape:
        return Shape.of(type("Model", (), dict(config=config)))

    sizes = dict(vocab_size=50, hidden_size=48, num_hidden_layers=5, num_attention_heads=6)
    assert of(LlamaConfig(**sizes, num_key_value_heads=2)) == Shape("llama", 5, 2, 8, 48, 50)
    assert of(LlamaConfig(**sizes, num_key_value_heads=3, head_dim=20)) == Shape("llama", 5, 3, 20, 48, 50)
    assert of(GPT2Config(vocab_size=50, n_embd=48, n_layer=5, n_head=6)) == Shape("gpt2", 5, 6, 8, 48, 50)
    inner = Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=20)
    wrapper = type("Wrapper", (), dict(get_text_config=lambda self: inner))()
    assert of(wrapper) == of(inner) == Shape("gemma3_text", 5, 2, 20, 48, 50)
