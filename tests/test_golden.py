"""Policies keep the rows of the golden sets, which are made of the readable definitions alone."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lkv
from lkv import golden, policies
from lkv.policies import Policy, Repetition

FOLDER = Path(__file__).parent / "golden"


@cache
def model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()


@cache
def cases(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def texts() -> dict[str, list[int]]:
    return json.loads((FOLDER / "texts.json").read_text())


def policy(settings: dict[str, Any]) -> Policy:
    """From what a file says of it."""
    given = {name: value for name, value in settings.items() if name != "policy"}
    if "scorer" in given:
        given["scorer"] = policy(given["scorer"])
    if "table" in given:
        given["table"] = tuple(map(tuple, given["table"]))
    if settings["policy"] == "KVzip":
        names = {"chunk": "chunk", "lead": "lead", "repeated_sink": "sink"}
        given["repetition"] = Repetition(**{new: given.pop(old) for old, new in names.items()})
    return getattr(policies, settings["policy"])(**given)


def kept(cache: lkv.Cache) -> golden.Kept:
    """Positions of every head of every layer, counted in the cache."""
    out = []
    for layer in cache.ragged:
        padded = layer.rows.padded(layer.rows.positions)[0].tolist()
        out.append([row[:n] for row, n in zip(padded, layer.rows.lengths[0].tolist(), strict=True)])
    return out


@pytest.mark.parametrize("name", golden.MODELS)
@pytest.mark.parametrize("label", golden.CASES)
def test_a_cache_keeps_the_golden_rows(name: str, label: str) -> None:
    case = cases(name)[label]
    ids = torch.tensor([texts()[str(case["text"])]])
    for retention, expected in case["kept"].items():
        cache = lkv.compress(model(name), ids, policy(case["policy"]), retention=float(retention))
        assert kept(cache) == expected, retention


def test_all_methods_have_a_case() -> None:
    """With the policies that the registry has, or with these of other sizes."""
    known = {type(policies.get(name)).__name__ for name in policies.POLICIES}
    for name in golden.MODELS:
        assert list(cases(name)) == list(golden.CASES) and {*policies.POLICIES} <= {*golden.CASES}
        assert known <= {case["policy"]["policy"] for case in cases(name).values()}


@pytest.mark.parametrize("name", [name for name in policies.POLICIES])
def test_a_case_is_the_method_of_its_name(name: str) -> None:
    """But for sizes: windows, sinks, pieces, and how a text is repeated."""
    sizes = {"window", "sink", "lag", "piece", "future", "repetition"}

    def facts(of: Any) -> dict[str, Any]:
        found = {field.name: getattr(of, field.name) for field in fields(of) if field.name not in sizes}
        return {k: (type(v).__name__, facts(v)) if k == "scorer" else v for k, v in found.items()}

    ours, theirs = policy(golden.CASES[name]), policies.get(name)
    assert (type(ours), facts(ours)) == (type(theirs), facts(theirs))


def test_settings_are_complete() -> None:
    """What a file does not say would be a default of ours. Not said: what is off, or of an object of its own."""
    unsaid = {"repetition", "statistics", "temperature", "whole", "fast"}

    def check(settings: dict[str, Any]) -> None:
        made = policy(settings)
        assert {field.name for field in fields(made)} - unsaid <= {*settings}, settings
        if "scorer" in settings:
            check(settings["scorer"])

    for case in golden.CASES.values():
        check(case)


def test_writing_again_gives_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    golden.write(tmp_path, ["four-on-one"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(", text ")[0] for line in said] == [f"four-on-one: {label}" for label in golden.CASES]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    for path in written:
        ours = FOLDER / path.relative_to(tmp_path)
        if path.suffix == ".safetensors":
            first, second = load_file(path), load_file(ours)
            assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        elif path.name == "texts.json":
            assert json.loads(path.read_text()).items() <= texts().items()
        else:
            assert path.read_text() == ours.read_text()


@pytest.mark.parametrize("name", golden.MODELS)
def test_models_are_those_of_their_seeds(name: str) -> None:
    built, saved = golden.built(golden.MODELS[name]), load_file(FOLDER / name / "model.safetensors")
    assert built.keys() == saved.keys() and all(torch.equal(built[k], saved[k]) for k in built)
    assert all(torch.equal(saved[k], w.half()) for k, w in model(name).state_dict().items() if k != "lm_head.weight")


def test_numbers_of_a_seed_are_those_of_splitmix64() -> None:
    """The generator is that of Steele, Lea and Flood (2014): its first numbers of seed 1234567, upper halves."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    numbers = golden.drawn(1234567)
    assert [next(numbers) for _ in known] == [x >> 32 for x in known]


def test_a_text_in_which_rounding_decides_is_refused() -> None:
    """In the first layer the keys of equal tokens have equal norms, but for rounding."""
    config, knorm = golden.MODELS["no-groups"], golden.CASES["knorm"]
    weights = golden.built(config)
    variants = [weights, *(golden.moved(weights, seed) for seed in range(golden.TIMES))]
    saved = cases("no-groups")["knorm"]
    good = [golden.text_of(config, w, golden.tokens(saved["text"])) for w in variants]
    bad = [golden.text_of(config, w, [5, 6, 7, 8] * 32) for w in variants]
    assert golden.sure(knorm, bad) is None
    assert golden.case(knorm, config, iter([bad, bad, good])) == saved | {"text": 2}
    with pytest.raises(ValueError, match="expected a text of which rounding decides nothing, got none"):
        golden.case(knorm, config, iter([bad]))


def test_ties_are_told() -> None:
    """Equal scores of neighbours, by a maximum of them, at the end of a budget."""
    tied = [case["tied"] for name in golden.MODELS for case in cases(name).values()]
    assert any(tied) and not all(tied)
    assert not any(
        cases(name)[label]["tied"] for name in golden.MODELS for label in ("knorm", "keydiff", "h2o, average")
    )
