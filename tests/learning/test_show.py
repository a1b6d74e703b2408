"""What `lkv show` puts on its page: pieces of the text, kept rows, sizes, answers; and what it refuses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_texts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv
from lkv import policies
from lkv.evaluate.kept import kept_rows
from lkv.policies import AdaKV, KVzip, Policy, SnapKV, StreamingLLM
from lkv.show import Method, Shown, collect, page, write
from lkv.show.html import bits, render
from lkv.show.units import opening_units, pieces, units
from lkv.text import chat_frame, encode

HOSTILE = "<b>a</b> </script><!--<script> & &amp; \"x\" 'y' \\n \u2028 \u2029\r\n\tnaïve 日本 🙂\x00\x7f end"
TEXT = "The size is 41. " * 5 + HOSTILE
QUESTIONS = ["What is the size?", "Why?"]
POLICIES: dict[str, Policy] = {"ada": AdaKV(SnapKV(window=8, sink=1)), "kvzip": KVzip()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A token is a byte."""
    return tiny_texts.tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_texts.model()


@pytest.fixture(scope="module")
def shown(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Shown:
    return collect(model, tokenizer, TEXT, POLICIES, retention=0.3, questions=QUESTIONS, limit=5, title="<i>")


def test_a_character_of_several_tokens_is_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    found = units(tokenizer, encode(tokenizer, "aé🙂 b\n"), "aé🙂 b\n")
    assert found == [("a", 1), ("é", 2), ("🙂", 4), (" ", 1), ("b", 1), ("\n", 1)]
    assert units(tokenizer, [], "") == []


@pytest.mark.parametrize(
    ("text", "offsets", "expected"),
    [
        ("two words", [(0, 3), (4, 9)], [("two", 1), (" words", 1)]),  # the space belongs to no token
        (" a  ", [(1, 2)], [(" a  ", 1)]),
        ("a\n\nb", [(0, 1), (3, 3), (3, 4)], [("a", 1), ("\n\n", 1), ("b", 1)]),  # spaces cut off a token
        ("ab", [(0, 0), (0, 1), (1, 2)], [("a", 2), ("b", 1)]),  # one that stands for nothing
        ("ab", [(0, 1), (1, 1), (1, 2)], [("a", 2), ("b", 1)]),
        (" 日b", [(0, 2), (1, 2), (1, 3)], [(" 日b", 3)]),  # parts of a character on both sides
        ("x", [], []),
    ],
)
def test_pieces_of_a_text(text: str, offsets: list[tuple[int, int]], expected: list[tuple[str, int]]) -> None:
    assert pieces(text, offsets) == expected


@settings(max_examples=50)
@given(st.text(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1))
def test_pieces_lose_nothing(text: str, found: list[tuple[int, int]]) -> None:
    offsets = [(min(a, len(text)), min(a + n, len(text))) for a, n in sorted(found)]
    made = pieces(text, offsets)
    assert "".join(piece for piece, _ in made) == text
    assert sum(count for _, count in made) == len(offsets) and all(count for _, count in made)


def test_pieces_are_of_the_tokens_that_were_read(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="expected the tokens of the text, got others"):
        units(tokenizer, encode(tokenizer, "ab"), "ac")
    before = chat_frame(tokenizer)[0]
    assert opening_units(tokenizer, before) == [("<s>", 1), *((x, 1) for x in "user\n")]
    assert opening_units(tokenizer, []) == []
    part = tokenizer("é", add_special_tokens=False).input_ids[:1]  # read again, what it is shown as is another token
    assert opening_units(tokenizer, part) == [("\ufffd", 1)]


def test_what_is_shown_is_what_the_cache_keeps(
    shown: Shown, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = chat_frame(tokenizer)[0]
    ids = torch.tensor([[*before, *encode(tokenizer, TEXT)]])
    assert "".join(text for text, _ in shown.units) == f"<s>user\n{TEXT}"
    assert shown.tokens == ids.shape[1] and sum(n for _, n in shown.units[: shown.opening]) == len(before)
    assert (shown.title, shown.model, shown.dtype) == ("<i>", "LlamaForCausalLM", "float32")
    assert (shown.layers, shown.heads, shown.rows) == ([0, 1, 2], [2, 2, 2], 6 * ids.shape[1])
    assert shown.nbytes == shown.rows * 2 * 8 * 4
    for method, (name, policy) in zip(shown.methods, POLICIES.items(), strict=True):
        protect = len(before) if name == "kvzip" else 0
        with lkv.compress(model, ids, policy, retention=0.3, protect=protect, tokenizer=tokenizer) as cache:
            expected = kept_rows(cache)
            assert method.nbytes == cache.retained_bytes == method.kept * 2 * 8 * 4
        assert [[head.tolist() for head in layer] for layer in method.rows] == [
            [head.tolist() for head in layer] for layer in expected
        ]
        assert method.name == name and method.kept == 6 * round(0.3 * ids.shape[1])
    assert len({len(head) for layer in shown.methods[1].rows for head in layer}) > 1


def test_answers_are_what_the_model_writes(
    shown: Shown, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The full cache's as `generate` writes without a cache of ours; the others from the rows that are left."""
    before, after = chat_frame(tokenizer)
    text = [*before, *encode(tokenizer, TEXT)]
    prompts = [torch.tensor([[*text, *encode(tokenizer, f"\n\n{x}"), *after]]) for x in QUESTIONS]
    plain = dict(max_new_tokens=5, do_sample=False)

    def written(prompt: torch.Tensor, **options: object) -> str:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **plain, **options)
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    assert shown.answers == [written(prompt) for prompt in prompts]
    with lkv.compress(model, torch.tensor([text]), POLICIES["ada"], retention=0.3) as cache:
        assert shown.methods[0].answers == [written(prompt, past_key_values=cache.fork()) for prompt in prompts]
    assert shown.methods[0].answers != shown.answers


def test_a_text_without_a_question_or_a_template(model: PreTrainedModel) -> None:
    plain = tiny_texts.tokenizer(chat=False)
    shown = collect(model, plain, "The size is 41. " * 4, ["streaming_llm"], retention=0.5, name="mine")
    assert shown.model == "mine" and shown.units[0] == ("<s>", 1) and shown.opening == 1 and shown.tokens == 65
    assert shown.questions == shown.answers == shown.methods[0].answers == []
    expected = [*range(4), *range(65 - 28, 65)]
    assert all(head.tolist() == expected for layer in shown.methods[0].rows for head in layer)
    everything = collect(model, plain, "abc", ["snapkv"], retention=1.0)
    assert everything.methods[0].kept == everything.rows == 24 and everything.methods[0].nbytes == everything.nbytes


def data_of(html: str) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def test_the_page_has_all_of_it(shown: Shown) -> None:
    data = data_of(render(shown))
    assert "".join(data["units"]) == f"<s>user\n{TEXT}" and data["title"] == "<i>"
    counts = [data["merged"].get(str(i), 1) for i in range(len(data["units"]))]
    assert counts == [count for _, count in shown.units] and max(counts) == 4
    for method, found in zip(shown.methods, data["methods"], strict=True):
        raw, stride = base64.b64decode(found["kept"]), -(-shown.tokens // 8)
        heads = [head.tolist() for layer in method.rows for head in layer]
        assert len(raw) == stride * len(heads)
        for h, positions in enumerate(heads):
            kept = [t for t in range(8 * stride) if raw[h * stride + t // 8] >> (t % 8) & 1]
            assert kept == positions
        assert (found["name"], found["rows"], found["nbytes"]) == (method.name, method.kept, method.nbytes)
        assert found["answers"] == method.answers
    for name in (
        "questions",
        "answers",
        "layers",
        "heads",
        "tokens",
        "rows",
        "nbytes",
        "opening",
        "retention",
        "dtype",
    ):
        assert data[name] == getattr(shown, name)


def test_no_text_ends_the_script(shown: Shown) -> None:
    """Nothing of a text, a question or an answer is markup, and no character of it depends on how a page is read."""
    plain = render(replace(shown, units=[], methods=[], questions=[], answers=[], title="", model=""))
    hostile = render(replace(shown, questions=[HOSTILE], answers=[HOSTILE], model=HOSTILE))
    assert data_of(hostile)["questions"] == data_of(hostile)["answers"] == [HOSTILE]
    for mark in ("<", ">", "&", "\u2028", "\u2029", "\r", "\x00"):
        assert hostile.count(mark) == plain.count(mark)


def test_the_page_loads_nothing(shown: Shown) -> None:
    plain = render(replace(shown, units=[], methods=[], questions=[], answers=[]))
    assert "default-src 'none'" in plain
    assert not re.search(r"https?:|\bsrc=|href=|url\(|@import|fetch\(|XMLHttp", plain)


@pytest.mark.parametrize(("tokens", "heads"), [(4000, 90), (8192, 256)])
def test_a_bit_for_every_row(tokens: int, heads: int) -> None:
    method = Method("x", [[torch.arange(tokens // 7)] for _ in range(heads)], 0, [])
    assert len(bits(method, tokens)) == -(-heads * tokens // 8 // 3) * 4  # 60 and 350 kilobytes


def test_a_page_is_written_whole_or_not_at_all(
    shown: Shown, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "page.html"
    options = dict(retention=0.3, questions=QUESTIONS, limit=5, title="<i>")
    again = page(model, tokenizer, TEXT, POLICIES, path, **options)
    assert path.read_bytes().decode() == render(again) == render(shown)
    assert [x.name for x in path.parent.iterdir()] == ["page.html"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write(shown, tmp_path / "folder")


@pytest.fixture
def unread(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model that must not run."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model runs")

    hook = model.model.register_forward_pre_hook(fail)
    yield model
    hook.remove()


LONG = "x" * 400
REFUSED = {
    "no text": (dict(text=""), "expected a text of one or more tokens, got none"),
    "no policy": (dict(policies=[]), "expected one policy or more, none of them twice, got none"),
    "twice": (dict(policies=["snapkv", "snapkv"]), "none of them twice, got snapkv, snapkv"),
    "three": (dict(policies=["snapkv", "random", "adakv"]), "expected one or two policies on a page, got 3"),
    "unknown": (dict(policies=["h2o?"]), "expected one of adakv, .*, got 'h2o[?]'"),
    "nothing kept": (dict(retention=0), "expected a retention in [(]0, 1[]], got 0"),
    "too much kept": (dict(retention=1.1), "expected a retention in [(]0, 1[]], got 1.1"),
    "one string": (dict(questions="Why?"), "expected questions that are not empty, got 'Why[?]'"),
    "no question": (dict(questions=["Why?", " "]), r"expected questions that are not empty, got \['Why[?]', ' '\]"),
    "no answer": (dict(limit=0), "expected answers of at least one token, got 0"),
    "too long": (
        dict(text="x" * 4091),
        "a text of at most 4090 tokens, as the model reads 4096, .* take 6, got 4091",
    ),
    "too long to ask": (
        dict(text="x" * 4050, questions=["y" * 30]),
        "of at most 3981 tokens, as the model reads 4096, of which .* a question and its answer may take 115, got 4050",
    ),
    "short": (
        dict(text="x" * 100),
        "the last 32 rows, which snapkv protects, got 106 tokens, of which 30",
    ),
    "protected": (
        dict(policies=["kvzip"], protect=130),
        "the first 130 and the last 0 rows, which kvzip prot",
    ),
    "negative": (dict(protect=-1), "expected protect >= 0, got -1"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_runs(
    changes: dict, message: str, unread: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given = dict(text=LONG, policies=["snapkv"], out=tmp_path / "page.html", retention=0.3) | changes
    with pytest.raises(ValueError, match=message):
        page(unread, tokenizer, **given)
    assert not any(tmp_path.iterdir())


def test_tokenizers_that_do_not_fit_are_refused(unread: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="expected a fast tokenizer, .* got Slow"):
        units(Slow(), [1], "a")  # type: ignore[arg-type]
    unknown = tokenizer.unk_token
    tokenizer.unk_token = "x"
    try:
        with pytest.raises(ValueError, match="of which it does not know 99%: is --model the one that was meant"):
            collect(unread, tokenizer, LONG, ["snapkv"], retention=0.3)
    finally:
        tokenizer.unk_token = unknown


def test_policies_under_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A policy object, a name, and more methods than a page shows."""
    named = {"mine": StreamingLLM(2), "theirs": "streaming_llm", "third": "random"}
    shown = collect(model, tokenizer, LONG, named, retention=0.3)
    assert [x.name for x in shown.methods] == list(named)
    assert [x.rows[0][0][:5].tolist() for x in shown.methods[:2]] == [[0, 1, 286, 287, 288], [0, 1, 2, 3, 288]]
    with pytest.raises(ValueError, match="expected one or two policies on a page, got 3"):
        write(shown, "never.html")


@pytest.mark.parametrize("name", policies.names())
def test_every_method_with_a_name_can_be_shown(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    shown = collect(model, tokenizer, TEXT, [name], retention=0.4)
    (method,) = shown.methods
    assert method.kept <= 6 * round(0.4 * shown.tokens) < shown.rows
    assert all(head.min() >= 0 and head.max() < shown.tokens for layer in method.rows for head in layer if len(head))
