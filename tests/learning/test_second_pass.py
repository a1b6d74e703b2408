"""KVzip's second pass: what every model itself attends to while it repeats a text, one text at a time or several."""

from __future__ import annotations

import pytest
import torch
import transformers
from own_settings import MODELS, SMALL, build, tokens
from torch import Tensor
from transformers import PreTrainedModel

from lkv import second_pass
from lkv.hf.attention import Logits
from lkv.passes import Context, follow
from lkv.policies import AdaKV, KVzip, Observation, SnapKV
from lkv.policies.kvzip import Repetition
from lkv.second_pass import Received, in_words, repeat_scores, repetition_of

SHORT = Repetition(chunk=16, lead=5, sink=3)
WORDS = Repetition(chunk=16, lead=5, first=(9, 4, 4), later=(8,), suffix=(7, 3), sink=3)
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few queries, so that a chunk has several."""
    monkeypatch.setattr(second_pass, "BLOCK", 700)


def context_of(model: PreTrainedModel, texts: list[Tensor], filled: float = 0.0) -> Context:
    """What was read of texts `[n]` of several lengths, what pads the shorter ones being `filled`."""
    lengths = torch.tensor([len(text) for text in texts])
    parts: dict[str, list[list[Tensor]]] = {"keys": [], "values": []}
    for text in texts:
        layers = model(text[None], use_cache=True).past_key_values.layers
        for name, rows in parts.items():
            missing = (0, 0, 0, int(lengths.max()) - len(text))
            rows.append([torch.nn.functional.pad(getattr(x, name), missing, value=filled) for x in layers])
    keys, values = (tuple(map(torch.cat, zip(*rows, strict=True))) for rows in parts.values())
    return Context(keys, values, lengths)


def padded(texts: list[Tensor], token: int = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=token)


def plain(model: PreTrainedModel, text: Tensor, how: Repetition, begin: int = 0) -> list[Tensor]:
    """Scores `[H, n]` of one text: of the weights of the model's own attention over the text and a chunk of it."""
    heads, size = model.config.num_key_value_heads, len(text)
    best = [torch.zeros(heads, size) for _ in range(2)]
    for first in range(begin, size, how.chunk):
        words, lead = (how.first, begin) if first == begin else (how.later, max(first - how.lead, begin))
        request = torch.tensor([*words, *text[lead:first].tolist(), *how.suffix], dtype=text.dtype)
        rows = torch.arange(first, min(first + how.chunk, size))
        whole = torch.cat([text, request, text[rows]])
        sink = torch.arange(min(how.sink, first))
        for layer, weights in enumerate(model(whole[None], output_attentions=True, use_cache=False).attentions):
            paid = weights[0, :, size:]
            read = torch.cat([sink, rows, torch.arange(size, len(whole))])
            total = paid[..., read].sum(-1)
            received = (paid[..., rows] / total[..., None]).unflatten(0, (heads, -1)).amax((1, 2))
            best[layer][:, rows] = best[layer][:, rows].maximum(received)
    return best


@pytest.mark.parametrize("how", [SHORT, WORDS], ids=["bare", "request"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sinks"])  # whose part the weights lack
def test_scores_are_the_attention_of_the_model_itself(name: str, how: Repetition, blocks: None) -> None:
    model, text = build(name), tokens(1, 39)[0]
    for begin in (0, 6):
        scores = repeat_scores(model, context_of(model, [text]), text[None], KVzip(repetition=how), begin=begin)
        for got, expected in zip(scores, plain(model, text, how, begin), strict=True):
            torch.testing.assert_close(got[0], expected, **CLOSE)
            assert (got[0, :, :begin] == 0).all() and (got[0, :, begin:] > 0).all()


def test_a_text_of_one_chunk_is_repeated_in_one_go() -> None:
    model, text = build("norm of keys"), tokens(1, 60)[0]
    scores = repeat_scores(model, context_of(model, [text]), text[None], KVzip())
    weights = model(torch.cat([text, text])[None], output_attentions=True, use_cache=False).attentions
    for got, paid in zip(scores, weights, strict=True):
        expected = paid[0, :, 60:, :60].unflatten(0, (2, 2)).amax((1, 2))
        torch.testing.assert_close(got[0], expected, **CLOSE)


@pytest.mark.parametrize("rows", [None, (0, 0, 30), (3, 10, 24), (0, 10, 30), (5, 5, 30)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_pass_is_what_the_policy_makes_of_its_queries(
    name: str, rows: tuple[int, int, int] | None, blocks: None
) -> None:
    """`KVzip.score` is the definition; and what the model goes on with is what its own attention gives."""
    model, text, more = build(name), tokens(1, 30)[0], tokens(1, 17, seed=2)[0]
    context = context_of(model, [text])
    sink, first, end = rows or (0, 0, 30)
    read = torch.tensor([*range(sink), *range(first, end), *range(30, 47)])
    expected: list[Tensor] = []

    def watch(layer: int, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        scaling, softcap, sinks = logits
        lengths = torch.full(key.shape[:2], len(read))
        queries = query, torch.arange(30, 47)[None], torch.ones(1, 17, dtype=torch.bool)
        parts = key[:, :, read], value[:, :, read], read.expand(1, key.shape[1], -1), lengths, torch.zeros_like(lengths)
        observation = Observation(*parts, *queries, scaling, softcap, sinks=sinks)
        expected.append(KVzip().score(layer, observation)[..., sink : sink + end - first])
        return received(layer, query, key, value, logits)

    most = [torch.zeros_like(k[..., 0]) for k in context.keys]
    received = Received(context, torch.tensor([17]), rows, most)
    hidden = follow(model, context, more[None], attend=watch)
    torch.testing.assert_close(hidden, follow(model, context, more[None]), rtol=1e-4, atol=1e-4)
    for got, wanted in zip(most, expected, strict=True):
        torch.testing.assert_close(got[..., first:end], wanted, **CLOSE)
        assert (got[..., :first] == 0).all() and (got[..., end:] == 0).all()


@pytest.mark.parametrize("how", [SHORT, WORDS], ids=["bare", "request"])
@pytest.mark.parametrize("name", ["scale and soft cap", "sinks", "scaled rotations"])
def test_a_text_beside_longer_ones_is_scored_as_it_is_alone(name: str, how: Repetition, blocks: None) -> None:
    """Whatever pads it: texts that end in the first chunk, on its edge, where the second one begins, and behind."""
    model, policy = build(name), KVzip(repetition=how)
    texts = [tokens(1, n, seed=n)[0] for n in (39, 33, how.chunk + 1, how.chunk, how.chunk - 2, 3, 1)]
    for begin in (0, 2):
        alone = [repeat_scores(model, context_of(model, [t]), t[None], policy, begin=begin) for t in texts]
        for filled, token in ((0.0, 0), (2.0, 11)):
            context = context_of(model, texts, filled)
            together = repeat_scores(model, context, padded(texts, token), policy, begin=begin)
            for layer, scores in enumerate(together):
                for b, text in enumerate(texts):
                    torch.testing.assert_close(scores[b, :, : len(text)], alone[b][layer][0], **CLOSE)
                    assert (scores[b, :, len(text) :] == 0).all()


def test_how_a_text_is_repeated_is_found_in_a_scorer() -> None:
    inner = KVzip(across=None, repetition=WORDS)
    assert repetition_of(inner) == repetition_of(AdaKV(inner)) == WORDS
    with pytest.raises(
        ValueError, match="expected a policy with a second pass, and a repetition .*, got AdaKV.*SnapKV"
    ):
        repetition_of(AdaKV(SnapKV()))


class Letters:
    """A tokenizer with a chat template whose tokens are letters."""

    unk_token_id, bos_token_id = 0, None

    def __init__(self, template: str | None = None, known: bool = True) -> None:
        self.chat_template, self.known = template, known

    def __call__(self, text: str, add_special_tokens: bool) -> object:
        assert not add_special_tokens
        return transformers.BatchEncoding({"input_ids": [ord(x) if self.known else 0 for x in text]})

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool, tokenize: bool, **_: object
    ) -> str:
        assert add_generation_prompt and not tokenize
        return f"[user]{messages[0]['content']}[end][model]"


def test_the_request_is_in_the_words_of_the_authors_and_in_the_chat_template() -> None:
    def read(ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))

    for template, suffix in ((None, ""), ("any", "[end][model]")):
        policy = in_words(AdaKV(KVzip(across=None, sink=7)), Letters(template))
        how = repetition_of(policy)
        assert read(how.first) == "\n\nRepeat the previous context exactly."
        assert read(how.later) == "\n\nRepeat the part of the previous context exactly, starting with "
        assert read(how.suffix) == suffix and policy.sink == 7
        assert (how.chunk, how.lead, how.sink) == (2000, 8, 4)
    for policy in (KVzip(repetition=WORDS), SnapKV(), AdaKV()):
        assert in_words(policy, Letters()) == policy
    assert in_words(KVzip(), Letters(known=False)) == KVzip()


def test_bounds_of_a_repetition() -> None:
    for name, bad in (("chunk", 0), ("lead", -1), ("sink", -1)):
        with pytest.raises(ValueError, match=rf"lkv.KVzip: expected {name} >= {bad + 1}, got {bad}"):
            Repetition(**{name: bad})
    Repetition(chunk=1, lead=0, sink=0)


def test_what_cannot_be_repeated() -> None:
    text = tokens(1, 20)
    layers = dict(layer_types=["sliding_attention", "full_attention"], head_dim=8, sliding_window=8)
    sliding = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, **layers)).eval()
    rows = context_of(build("scale"), [text[0]])
    with pytest.raises(ValueError, match="lkv: expected full attention in layer 0, got a window of 8"):
        repeat_scores(sliding, rows, text, KVzip())
    one = Context(rows.keys[:1], rows.values[:1], rows.lengths)
    with pytest.raises(ValueError, match="a model of full attention in all 2 layers, got keys and values of 1"):
        repeat_scores(sliding, one, text, KVzip())
    with pytest.raises(ValueError, match=r"expected tokens of shape \[B, n\] = \[1, 20\], got \[1, 19\]"):
        repeat_scores(build("scale"), rows, text[:, 1:], KVzip())
    assert sliding.config._attn_implementation != "lkv_passes"


def test_scores_have_no_gradients() -> None:
    """For a model that is being trained: nothing of the pass is kept for a backward that never comes."""
    model, text = build("norm of keys").requires_grad_(), tokens(1, 20)[0]
    with torch.enable_grad():
        scores = repeat_scores(model, context_of(model, [text]), text[None], KVzip())
    assert not any(x.requires_grad for x in scores)
