"""A plugin of pytest by which kvpress's own tests run over `LKVPress` and `CompactPress`; `make test-kvpress` does so.

Their tests come from kvpress's source archive and load a small model from the hub. `python lkv_in_kvpress.py FOLDER`
makes a stand-in for it, in a folder laid out as the hub's cache: a random Llama, and a tokenizer that counts as Llama's
does on their text. With it HF_HOME=FOLDER HF_HUB_OFFLINE=1 is all that they need.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

NAMES = ("MaxJeblick/llama2-0b-unit-test", "maxjeblick/llama2-0b-unit-test")
COMMIT = "0" * 40
PIECES = r" ?[A-Za-z]+|\d|[^\w\s]|\s"
TEXTS = "This is a test article. It was written on 2022-01-01. When was this article written?\n 0123456789"
# Their tests that make presses of their own, the names of these there, and our policies in their place.
OWN = {"KnormPress": "knorm", "ExpectedAttentionPress": "expected_attention"}
FROM_HUB = ("ExpectedAttentionStatsPress", "QFilterPress")  # of the model's name, and not mocked in their tests
MODULES = ("tests.test_press_call", "tests.test_generate", "tests.test_pipeline")


def stand_in(folder: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = dict.fromkeys(["<unk>", "<s>", "</s>", *re.findall(PIECES, TEXTS), *(f" w{i}" for i in range(4000))])
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name in NAMES:
        place = folder / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(COMMIT)
        for part in (model, tokenizer):
            part.save_pretrained(place / "snapshots" / COMMIT)


def pytest_configure() -> None:
    """Our presses beside theirs, in the list that their tests run over, and `CompactPress` around each of them."""
    from tests.default_presses import default_presses  # of kvpress

    from lkv import policies
    from lkv.press import CompactPress, LKVPress

    default_presses[:] = [each for each in default_presses if each["cls"].__name__ not in FROM_HUB]
    ratios = [{"compression_ratio": ratio} for ratio in (0.2, 0.8)]
    names = [name for name in policies.POLICIES if "second_pass" not in policies.get(name).needs]
    default_presses += [{"cls": partial(LKVPress, name), "kwargs": ratios} for name in names]
    default_presses += [
        {"cls": Around(each["cls"], CompactPress), "kwargs": each["kwargs"]} for each in default_presses
    ]


class Around:
    """A press in another one, made with the arguments of the inner one."""

    def __init__(self, inner: Callable[..., Any], outer: Callable[..., Any]) -> None:
        self.inner, self.outer = inner, outer

    def __call__(self, **settings: Any) -> Any:
        return self.outer(self.inner(**settings))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Their test leaves out what cannot be composed by its class, which around it is another one.

    Nor can be what measures the residual stream, and says so.
    """
    from kvpress import ComposedPress, FastKVzipPress, KVComposePress, KVzipPress

    from lkv import policies

    left = []
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        made = given.get("press_dict", {}).get("cls")
        made = made.inner if isinstance(made, Around) else made
        alone = isinstance(made, type) and issubclass(made, (KVzipPress, FastKVzipPress, KVComposePress))
        if isinstance(made, partial):
            alone = "attention_cosine" in policies.get(made.args[0]).needs
        if alone and given.get("wrapper_press") is ComposedPress:
            left.append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ in MODULES:
        metafunc.parametrize("whose_press", ["kvpress", "LKVPress", "CompactPress"], indirect=True)


@pytest.fixture(autouse=True)
def whose_press(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests that make presses of their own get ours by these names, or theirs in ours."""
    from lkv.press import CompactPress, LKVPress

    kind = getattr(request, "param", "kvpress")
    for name, policy in OWN.items() if kind != "kvpress" else ():
        theirs = getattr(request.module, name, None)
        if theirs is not None:
            ours = partial(LKVPress, policy) if kind == "LKVPress" else Around(theirs, CompactPress)
            monkeypatch.setattr(request.module, name, ours)
    yield


if __name__ == "__main__":
    stand_in(Path(sys.argv[1]))
