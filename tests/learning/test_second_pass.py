"""KVzip's second pass: what every model itself attends to while it repeats a text, one text at a time or several."""

from __future__ import annotations

import pytest
import torch
import transformers
from own_settings import MODELS, SMALL, build, tokens
from torch import Tensor
from transformers import PreTrainedModel

from lkv.learn import second_pass
from lkv.learn.passes import Context
from lkv.learn.second_pass import repeat_scores
from lkv.policies import KVzip, SnapKV

CHUNK, LEAD = 16, 5


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones, so that short texts have several."""
    monkeypatch.setattr(second_pass, "CHUNK", CHUNK)
    monkeypatch.setattr(second_pass, "LEAD", LEAD)


def context_of(model: PreTrainedModel, texts: list[Tensor], filled: float = 0.0) -> Context:
    """The scores of texts `[n]` of several lengths, what pads the shorter ones being `filled`."""
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


def plain(model: PreTrainedModel, text: Tensor, prompt: list[int]) -> list[Tensor]:
    """Scores `[H, n]` of one text: of the weights of the model's own attention over the text and a chunk of it."""
    best = [torch.zeros(model.config.num_key_value_heads, len(text)) for _ in range(2)]
    for begin in range(0, len(text), second_pass.CHUNK):
        chunk = text[max(begin - second_pass.LEAD, 0) : begin + second_pass.CHUNK]
        whole = torch.cat([text, torch.tensor(prompt, dtype=text.dtype), chunk])
        for layer, weights in enumerate(model(whole[None], output_attentions=True, use_cache=False).attentions):
            paid = weights[0, :, len(text) :, : len(text)]
            groups = paid.unflatten(0, (model.config.num_key_value_heads, -1))
            best[layer] = best[layer].maximum(groups.amax((1, 2)))
    return best


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_attention_of_the_model_itself(name: str, chunks: None) -> None:
    model, text, prompt = build(name), tokens(1, 39)[0], [7, 3]
    scores = repeat_scores(model, context_of(model, [text]), text[None], KVzip(), prompt=prompt)
    for got, expected in zip(scores, plain(model, text, prompt), strict=True):
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)


def test_a_text_of_one_chunk_is_repeated_in_one_go() -> None:
    model, text = build("norm of keys"), tokens(1, 60)[0]
    scores = repeat_scores(model, context_of(model, [text]), text[None], KVzip())
    weights = model(torch.cat([text, text])[None], output_attentions=True, use_cache=False).attentions
    for got, paid in zip(scores, weights, strict=True):
        expected = paid[0, :, 60:, :60].unflatten(0, (2, 2)).amax((1, 2))
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [[], [9, 4, 4]], ids=["bare", "requests"])
@pytest.mark.parametrize("name", ["scale and soft cap", "sinks", "scaled rotations"])
def test_a_text_beside_longer_ones_is_scored_as_it_is_alone(name: str, prompt: list[int], chunks: None) -> None:
    """Whatever pads it: texts that end in the first chunk, on its edge, where the second one begins, and behind."""
    model = build(name)
    texts = [tokens(1, n, seed=n)[0] for n in (39, 33, CHUNK + 1, CHUNK, CHUNK - 2, 3, 1)]
    alone = [repeat_scores(model, context_of(model, [t]), t[None], KVzip(), prompt=prompt) for t in texts]
    for filled, token in ((0.0, 0), (2.0, 11)):
        together = repeat_scores(model, context_of(model, texts, filled), padded(texts, token), KVzip(), prompt=prompt)
        for layer, scores in enumerate(together):
            for b, text in enumerate(texts):
                expected = alone[b][layer][0]
                torch.testing.assert_close(scores[b, :, : len(text)], expected, rtol=1e-4, atol=1e-5)
                assert (scores[b, :, len(text) :] == 0).all()


def test_the_best_of_all_chunks_counts(chunks: None) -> None:
    """Any policy that scores by queries is called once per chunk, and gets the queries of the text alone."""
    requests = []

    class Noted(SnapKV):
        def score(self, layer, observation):
            requests.append((layer, observation.query_mask.sum(1).tolist()))
            return torch.full(observation.keys.shape[:3], float(-len(requests) if len(requests) > 2 else len(requests)))

    model, texts = build("scale"), [tokens(1, n)[0] for n in (40, 19)]
    scores = repeat_scores(model, context_of(model, texts), padded(texts), Noted(), prompt=[5])
    assert requests == [(0, [17, 17]), (1, [17, 17]), (0, [22, 9]), (1, [22, 9]), (0, [14, 0]), (1, [14, 0])]
    assert [s.unique().tolist() for s in scores] == [[1.0], [2.0]]


def test_what_cannot_be_repeated() -> None:
    text = tokens(1, 20)
    layers = dict(layer_types=["sliding_attention", "full_attention"], head_dim=8, sliding_window=8)
    sliding = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, **layers)).eval()
    rows = context_of(build("scale"), [text[0]])
    with pytest.raises(ValueError, match="lkv.learn: expected full attention in layer 0, got a window of 8"):
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
