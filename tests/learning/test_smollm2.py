"""The real model, where its package is installed: it answers, its checkpoint fits it, and the demo shows both."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv
from lkv import models
from lkv.demo import __main__ as demo
from lkv.extras import MissingPackage
from lkv.policies.lkv import packaged

NAME = "smollm2"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            yield models.load(NAME, dtype="float32")
        except MissingPackage as error:
            pytest.skip(str(error))


def test_it_answers(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    said = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_its_checkpoint_fits_in_float32_and_bfloat16(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    if packaged.find(NAME) is None:
        pytest.skip("no checkpoint in this package")
    model, _ = loaded
    for each in (model, copy.deepcopy(model).bfloat16()):
        lkv.load(NAME, each)


def test_the_demo_shows_it(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A short text, from which the full cache knows the answers."""
    assert demo.main(["--tokens=300", "--device=cpu", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w+) +\d+% .* (\d) of 4$", printed, re.MULTILINE))
    assert {"full", "kvzip", "snapkv"} <= rows.keys() and ("lkv" in rows) == (packaged.find(NAME) is not None)
    assert int(rows["full"]) >= 2
