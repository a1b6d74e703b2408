"""lm-eval's tasks on evicted caches: the full cache gives the harness' own numbers, and compression is reported."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

import tiny_folder
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkv.evaluate import harness
from lkv.evaluate.decode import answer
from lkv.evaluate.harness import Compression, HarnessModel, Totals
from lkv.hf import Cache
from lkv.policies.adakv import AdaKV
from lkv.policies.kvzip import KVzip
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM

TEXT = "The grass is green, the sky is blue, and the sun is yellow, as everyone knows who ever looked out of a window."
QUESTION = "\nQuestion: what is blue?\nAnswer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def judged(loaded):
    """Makes a model for the harness, which is closed at the end."""
    made = []

    def make(policy, retention=1.0, max_length=None, **options):
        made.append(HarnessModel(*loaded, Compression(policy, retention, **options), max_length))
        return made[-1]

    yield make
    for model in made:
        model.close()


def likelihoods(*continuations):
    return [Instance("loglikelihood", {}, (TEXT + QUESTION, c), i) for i, c in enumerate(continuations)]


def generation(**options):
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, **options}
    return [Instance("generate_until", {}, (text + QUESTION, options), i) for i, text in enumerate([TEXT, TEXT[:50]])]


def test_the_tokenizer_is_the_one_given_and_none_by_the_name_of_the_model(loaded, judged):
    assert judged(None).tokenizer is loaded[1]


@pytest.mark.parametrize("policy", [None, SnapKV(), StreamingLLM()], ids=str)
def test_nothing_evicted_gives_what_the_harness_itself_does(loaded, judged, policy):
    plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1)
    ours = judged(policy, question_tokens=12)
    requests = likelihoods(" sky", " the sun", " sky and grass")
    for (value, likeliest), (wanted, greedy) in zip(
        ours.loglikelihood(requests, disable_tqdm=True), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-4) and likeliest == greedy
    assert (ours.totals.prompts, ours.totals.short) == (1, 0)  # its continuations share what was read
    assert ours.totals.kept == ours.totals.rows
    wanted = plain.generate_until(generation(), disable_tqdm=True)
    assert ours.generate_until(generation(), disable_tqdm=True) == wanted


@pytest.mark.parametrize("length", [30, 40, 43, 44, 45, 100])
def test_what_is_too_long_is_cut_in_front_as_the_harness_cuts(loaded, judged, length):
    """Prompt and continuation are 43 tokens, the last of which is not read."""
    requests = [Instance("loglikelihood", {}, (TEXT[:36], c), i) for i, c in enumerate([" green.", " is red"])]
    plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1, max_length=length)
    for options in ({"question_tokens": 5}, {"see_question": True}):
        ours = judged(None, max_length=length, **options)
        for (value, _), (wanted, _) in zip(
            ours.loglikelihood(requests, disable_tqdm=True),
            plain.loglikelihood(requests, disable_tqdm=True),
            strict=True,
        ):
            assert value == pytest.approx(wanted, rel=1e-4)
    shorter = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1, max_length=29)
    values = [model.loglikelihood(requests, disable_tqdm=True) for model in (plain, shorter)]
    assert values[0][0][0] != pytest.approx(values[1][0][0], rel=1e-4)  # what is cut off matters


def test_continuation_longer_than_the_model_reads_is_refused(judged):
    requests = [Instance("loglikelihood", {}, (TEXT, " green grass"), 0)]
    message = "expected continuations of at most 11 tokens, as many as the model reads, got one of 12"
    with pytest.raises(ValueError, match=message):
        judged(None, max_length=11, see_question=True).loglikelihood(requests, disable_tqdm=True)
    (value,) = judged(None, max_length=12, see_question=True).loglikelihood(requests, disable_tqdm=True)
    assert value[0] < 0


@pytest.mark.parametrize(
    "policy", [SnapKV(window=8), StreamingLLM(), AdaKV(SnapKV(window=8))], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("options", [{"question_tokens": 25}, {"see_question": True}, {"marker": "\nQ"}], ids=str)
def test_answers_are_those_of_a_cache_that_was_evicted(loaded, judged, policy, options):
    """What is in front of the cut is read and evicted; the rest, and what is answered or scored, come after."""
    model, tokenizer = loaded
    tokens = tokenizer(TEXT + QUESTION).input_ids
    ours = judged(policy, 0.3, **options)
    cut = {"question_tokens": len(tokens) - 25, "see_question": len(tokens) - 1, "marker": len(TEXT)}[
        next(iter(options))
    ]

    def evicted():
        cache = Cache(model, policy, retention=1.0, chunks="last")
        with torch.no_grad():
            model.get_decoder()(torch.tensor([tokens[:cut]]), past_key_values=cache, use_cache=True)
        cache.evict(policy, retention=0.3)
        return cache

    seen = torch.ones(1, cut, dtype=torch.int64)
    (results,) = answer(model, evicted(), seen, [tokens[cut:]], 8, 0, [2])
    (text, _) = ours.generate_until(generation(until=[]), disable_tqdm=True)
    assert text == tokenizer.decode(results, skip_special_tokens=True)

    continuation = tokenizer(" sky").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([tokens[cut:] + continuation[:-1]]), past_key_values=evicted()).logits[0, -4:]
    wanted = logits.log_softmax(-1)[range(4), continuation].sum()
    ((value, likeliest),) = ours.loglikelihood(likelihoods(" sky"), disable_tqdm=True)
    assert value == pytest.approx(float(wanted), rel=1e-4) and not likeliest


def test_likeliest_is_what_all_tokens_are(judged, loaded):
    """The first two tokens that are generated are the likeliest; with another one behind or in front, no more."""
    model, tokenizer = loaded
    tokens = tokenizer(TEXT + QUESTION).input_ids
    best = model.generate(torch.tensor([tokens]), max_new_tokens=2, do_sample=False)[0, -2:].tolist()
    other = next(token for token in range(10, 20) if token not in best)
    requests = [
        ((TEXT + QUESTION, str(i)), tokens, c) for i, c in enumerate((best, best[:1], [best[0], other], [other]))
    ]
    ours = judged(None, question_tokens=12)
    answers = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [likeliest for _, likeliest in answers] == [True, True, False, False]
    assert answers[0][0] < answers[1][0] and answers[3][0] < answers[1][0]


def test_logits_of_less_precision_are_normalized_in_float32(loaded, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = HarnessModel(model, loaded[1], Compression(None, see_question=True))
    ids, continuation = (loaded[1](x, return_tensors="pt").input_ids for x in (TEXT + QUESTION, " sky"))
    with torch.no_grad():
        logits = model(torch.cat([ids, continuation], 1)).logits[0, ids.shape[1] - 1 : -1]
    wanted = logits.double().log_softmax(-1).gather(1, continuation.T).sum().item()
    ((value, _),) = ours.loglikelihood(likelihoods(" sky"), disable_tqdm=True)
    ours.close()
    assert value == pytest.approx(wanted, rel=1e-4)


def test_answers_go_to_the_cache_of_the_harness(judged):
    results = []

    class Hook:
        def add_partial(self, kind, key, value):
            results.append((kind, key, value))

    ours = judged(None, question_tokens=12)
    ours.set_cache_hook(Hook())
    requests = likelihoods(" sky", " sun")
    values = ours.loglikelihood(requests, disable_tqdm=True)
    assert results == [("loglikelihood", r.args, value) for r, value in zip(requests, values, strict=True)]
    results.clear()
    ours._loglikelihood_tokens([(None, [5, 6, 7], [8])], disable_tqdm=True)  # what has no key is not kept
    assert results == []


def test_cache_of_a_prompt_is_of_that_prompt_and_stays_as_it_was(judged, loaded):
    """Two prompts of one length, in turns: what one's answer appended is not there for the next."""
    ours = judged(StreamingLLM(), 0.5, question_tokens=12)
    prompts = [Instance("loglikelihood", {}, (text + QUESTION, " sky"), 0) for text in (TEXT, TEXT.swapcase())]
    apart = [judged(StreamingLLM(), 0.5, question_tokens=12).loglikelihood([x], disable_tqdm=True) for x in prompts]
    assert apart[0] != apart[1]
    for i in (0, 1, 1, 0, 0):
        assert ours.loglikelihood([prompts[i]], disable_tqdm=True) == apart[i]
    assert ours.totals.prompts == 3
    tokens = list(range(10, 60))
    with ours.evicted(tokens) as cache, torch.no_grad():
        assert all(layer.row_counts == [25 * 2] for layer in cache.ragged)
        loaded[0](torch.tensor([[7, 8, 9]]), past_key_values=cache)
    with ours.evicted(tokens) as cache:
        assert all(layer.row_counts == [25 * 2] for layer in cache.ragged)


@pytest.mark.parametrize("policy", [SnapKV(), StreamingLLM(), KVzip()], ids=lambda policy: type(policy).__name__)
def test_rows_are_gone(judged, policy):
    full, ours = judged(None, question_tokens=20), judged(policy, 0.25, question_tokens=20)
    requests = likelihoods(" sky", " sun")
    values = ours.loglikelihood(requests, disable_tqdm=True)
    assert values != full.loglikelihood(requests, disable_tqdm=True)
    assert ours.totals.kept / ours.totals.rows == pytest.approx(0.25, abs=0.02)
    assert values == ours.loglikelihood(requests, disable_tqdm=True)
    assert len(ours.generate_until(generation(), disable_tqdm=True)) == 2
    assert ours.totals.prompts == 2  # the first text of the two was read before


def test_a_second_pass_asks_in_words(judged, monkeypatch: pytest.MonkeyPatch):
    """Those of the tokenizer, which the policy does not know."""
    given = []
    own = harness.compress
    monkeypatch.setattr(harness, "compress", lambda *args, **options: given.append(options) or own(*args, **options))
    ours = judged(KVzip(), 0.25, question_tokens=20)
    ours.loglikelihood(likelihoods(" sky"), disable_tqdm=True)
    assert [x["tokenizer"] for x in given] == [ours.tokenizer]


def test_continuation_is_scored_from_the_rows_that_are_left(judged, loaded):
    """Beside the sink, only the last rows of a text are kept: what stood between may be anything."""
    _, tokenizer = loaded
    ours = judged(StreamingLLM(sink=1), 0.2, question_tokens=len(QUESTION))
    tokens = tokenizer(TEXT + QUESTION).input_ids
    cut = ours.cut(tokens)
    with ours.evicted(tokens[:cut]) as cache:
        kept = round(0.2 * cut)
        for layer in cache.ragged:
            expected = torch.tensor([0, *range(cut - kept + 1, cut)])
            for begin, count in zip(
                layer.rows.cu_seqlens.tolist(), layer.rows.lengths.flatten().tolist(), strict=False
            ):
                assert torch.equal(layer.rows.positions[begin : begin + count].long(), expected)


def test_what_is_compressed(judged, loaded):
    _, tokenizer = loaded
    tokens = tokenizer(TEXT + QUESTION).input_ids
    assert judged(None, question_tokens=9).cut(tokens) == len(tokens) - 9
    assert judged(None, question_tokens=900).cut(tokens) == 0
    assert judged(None, see_question=True).cut(tokens) == len(tokens) - 1
    assert judged(None, marker="\nQuestion:").cut(tokens) == len(TEXT)  # a token is a byte
    assert judged(None, marker="the").cut(tokens) == TEXT.rindex("the")
    assert judged(None, marker=":").cut(tokens) == len(tokens) - 1
    with pytest.raises(ValueError, match=r"lkv lm-eval: expected 'no' in every prompt, got one that ends with '.*Ans"):
        judged(None, marker="no").cut(tokens[-10:])
    assert (Compression(None).question_tokens, Compression(None).see_question) == (64, False)


@settings(max_examples=40)
@given(text=st.text("ab?\n", min_size=1, max_size=30), marker=st.text("ab?\n", min_size=1, max_size=3))
def test_question_begins_with_the_last_marker(loaded, text, marker):
    tokens = loaded[1](text).input_ids
    model = HarnessModel(*loaded, Compression(None, marker=marker))
    if marker in text:
        assert model.cut(tokens) == min(text.rindex(marker), len(tokens) - 1)
    else:
        with pytest.raises(ValueError, match="expected .* in every prompt"):
            model.cut(tokens)


def test_what_was_done_is_reported():
    assert str(Compression(None, see_question=True)) == (
        "question seen by the compression: all of a prompt is compressed but its last token"
    )
    hidden = "question not seen by the compression: all of a prompt is compressed but "
    assert str(Compression(None, question_tokens=7)) == hidden + "its last 7 tokens"
    assert str(Compression(None, marker="Q:")) == hidden + "what begins with the last 'Q:'"
    assert str(Totals(5, 2, 30, 120)) == "5 prompts, 2 too short to be compressed; of the others 25.0% of the rows kept"


def test_rows_are_those_of_all_heads_and_layers(judged, loaded):
    ours = judged(StreamingLLM(), 0.25, question_tokens=20)
    ours.loglikelihood(likelihoods(" sky", " sun"), disable_tqdm=True)
    read = len(loaded[1](TEXT + QUESTION).input_ids) - 20
    assert (ours.totals.rows, ours.totals.kept) == (2 * 2 * read, 2 * 2 * round(0.25 * read))
    assert get_model("lkv") is HarnessModel


def test_short_prompts_are_counted_and_rolling_ones_refused(judged):
    ours = judged(SnapKV(), 0.25, question_tokens=500)
    ours.generate_until(generation(), disable_tqdm=True)
    assert (ours.totals.short, ours.totals.rows) == (1, 0)
    assert "too short to be compressed; of the others no rows kept" in str(ours.totals)
    with pytest.raises(ValueError, match="expected tasks with a prompt, got one of rolling loglikelihood"):
        ours.loglikelihood_rolling([])
