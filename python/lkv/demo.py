"""The main job on real input: prefill, evict for real, go on decoding. Run `python -m lkv.demo --help`.

A Llama with random weights reads source code of Python's library. What the last tokens attend to gives scores, all
heads of all layers compete for one budget, `lkv_ext.evict_layers` keeps the winners, and one more token is decoded from
the rows that are left. Its logits are compared with those of the whole cache in which the evicted positions are masked.
Then `generate` does the same through `lkv.Cache`, layer by layer, beside the dense cache.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import lkv
import lkv_ext
from lkv_ext import RaggedKV

try:
    import transformers
    from tqdm import tqdm
    from transformers import DynamicCache, LlamaForCausalLM

    from lkv.demo_model import MASKED, RAGGED, build_model
except ModuleNotFoundError as error:
    raise SystemExit(f"lkv.demo: {error}; the demo needs: pip install 'transformers>=4.56' tqdm") from error

SINK, WINDOW = 4, 32  # tokens that every head keeps: the first, and those whose attention gives the scores
CHUNK = 512  # tokens of one prefill step
WARM_UP, ROUNDS = 3, 15
NEW_TOKENS = 32  # that generate makes
TOLERANCE = 2e-5  # of float32 logits of about 2, after sums in another order


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # The newest transformers calls it `cache`, which older ones do not know.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    device = torch.device(options.device)
    text, name = prompt(options.tokens)
    model = build_model(options.layers, options.tokens + NEW_TOKENS, options.seed, device)
    print(describe(model, options.tokens, name))
    with torch.inference_mode():
        cache, scores, token = prefill(model, text.to(device))
        total = round(options.retention * sum(s[0].numel() for s in scores))
        budgets = compete(scores, total)
        kept = evict(cache, scores, budgets, total)
        print(table(cache, kept))
        print(race(cache, scores, budgets, total))
        difference, largest = compare(model, token, cache, kept)
    print(generation(model, text.to(device), options.retention))
    print(f"next token: ragged rows and masked dense cache differ by {difference:.1e} (largest logit {largest:.1f})")
    if not difference <= TOLERANCE:
        print(f"lkv.demo: expected logits that differ by at most {TOLERANCE}, got {difference:.2e}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available() and lkv_ext.build_info()["cuda_archs"] is not None
    parser = argparse.ArgumentParser("python -m lkv.demo", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="where to run; here: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="bytes of the prompt, default %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, default %(default)s")
    parser.add_argument("--retention", type=float, default=0.15, help="share of the cache to keep, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, default %(default)s")
    options = parser.parse_args(argv)
    if options.tokens < SINK + WINDOW:
        parser.error(f"expected at least {SINK + WINDOW} tokens, got {options.tokens}")
    if options.layers < 1:
        parser.error(f"expected at least 1 layer, got {options.layers}")
    if not 0 <= options.retention <= 1:
        parser.error(f"expected a retention in [0, 1], got {options.retention}")
    return options


def prompt(tokens: int) -> tuple[Tensor, str]:
    """`[1, tokens]` bytes of Python's library sources, and where they come from."""
    text, names = b"", []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        if len(text) >= tokens:
            break
        text += path.read_bytes()
        names.append(path.name)
    if len(text) < tokens:
        raise SystemExit(f"lkv.demo: expected at least {tokens} bytes of library sources, found {len(text)}")
    name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return torch.tensor([list(text[:tokens])]), name


def prefill(model: LlamaForCausalLM, text: Tensor) -> tuple[DynamicCache, list[Tensor], Tensor]:
    """Fills the model's own cache in chunks: the cache, scores `[B, H, L]` per layer, and the next token `[B, 1]`."""
    cache = DynamicCache()
    scores: list[Tensor] = []
    length = text.shape[1]
    # Counted from the end, so that the last chunk is whole and holds the window.
    ends = [*range(length, 0, -CHUNK)][::-1]
    with tqdm(total=length, desc="prefill", unit="token") as bar:
        for begin, end in pairwise([0, *ends]):
            watch = dict(observed=scores, window=WINDOW) if end == length else {}
            output = model(text[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1, **watch)
            bar.update(end - begin)
    return cache, scores, output.logits[:, -1].argmax(-1, keepdim=True)


def compete(scores: list[Tensor], total: int) -> Tensor:
    """Budgets `[N, B, H]`: the best tokens of all heads of all layers share `total` rows per sequence."""
    floor = lkv_ext.Blend(0.2)
    return lkv_ext.budgets_from_scores(scores, total, across="layers", floor=floor, sink=SINK, window=WINDOW)


def evict(cache: DynamicCache, scores: list[Tensor], budgets: Tensor, total: int) -> RaggedKV:
    """All layers in one call, with room for one more token behind every head.

    The budgets may stay on the device: `capacity` says how many rows they come to, so nobody waits to read them.
    """
    ks, vs = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    capacity = len(ks[0]) * total + budgets.numel()
    return lkv_ext.evict_layers(ks, vs, scores, budgets, sink=SINK, window=WINDOW, reserve=1, capacity=capacity)


def evict_in_torch(cache: DynamicCache, scores: list[Tensor], budgets: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The same rows of a batch of one by PyTorch alone, as fast as we could write it.

    One topk per head, as budgets differ, then one index_select per layer straight into the joint buffers.
    """
    ks, vs = (
        [t.flatten(0, 2) for t in tensors] for tensors in zip(*((x.keys, x.values) for x in cache.layers), strict=True)
    )
    total = sum(map(sum, budgets))
    k, v = (x[0].new_empty(total, x[0].shape[1]) for x in (ks, vs))
    end = 0
    for layer, s in enumerate(scores):
        length = s.shape[2]
        protected = s.flatten(0, 1).clone()
        protected[:, :SINK] = protected[:, length - WINDOW :] = torch.inf
        picked = [
            row.topk(budget, sorted=False).indices.sort().values.add_(i * length)
            for i, (row, budget) in enumerate(zip(protected, budgets[layer], strict=True))
        ]
        index = torch.cat(picked)
        begin, end = end, end + index.numel()
        torch.index_select(ks[layer], 0, index, out=k[begin:end])
        torch.index_select(vs[layer], 0, index, out=v[begin:end])
    return k, v


def compare(model: LlamaForCausalLM, token: Tensor, cache: DynamicCache, kept: RaggedKV) -> tuple[float, float]:
    """Decodes `token` from either cache, which both grow by it: how far the logits differ, and the largest logit."""
    position = cache.get_seq_length()
    at = torch.full_like(token, position)  # RoPE goes by the place in the text, not in the cache
    mask = kept_mask(kept, position)
    model.set_attn_implementation(RAGGED)
    ragged = model(token, position_ids=at, use_cache=False, ragged=kept, position=position).logits
    kept.max_length += 1
    model.set_attn_implementation(MASKED)
    dense = model(token, position_ids=at, past_key_values=cache, use_cache=True, kept=mask).logits
    return float((ragged - dense).abs().max()), float(dense.abs().max())


def kept_mask(kept: RaggedKV, length: int) -> Tensor:
    """bool `[N, B, H, L]`: which positions of every head are still there."""
    rooms = kept.cu_seqlens.diff()
    owner = torch.arange(rooms.numel(), device=rooms.device).repeat_interleave(rooms)
    used = kept.positions >= 0
    mask = torch.zeros(rooms.numel(), length, dtype=torch.bool, device=rooms.device)
    mask[owner[used], kept.positions[used]] = True
    return mask.view(*kept.lengths.shape, length)


def race(cache: DynamicCache, scores: list[Tensor], budgets: Tensor, total: int) -> str:
    """Both evictions in turns; the medians."""

    def seconds(call: Callable[[], object]) -> float:
        begin = perf_counter()
        result = call()
        if budgets.is_cuda:
            torch.cuda.synchronize(budgets.device)
        elapsed = perf_counter() - begin
        del result  # freed off the clock
        return elapsed

    on_host = budgets.flatten(1).tolist()
    calls = (lambda: evict(cache, scores, budgets, total)), (lambda: evict_in_torch(cache, scores, on_host))
    rounds = [[seconds(call) for call in calls] for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    ours, theirs = (1e3 * median(times) for times in zip(*rounds, strict=True))
    ratio = median(b / a for a, b in rounds)
    return f"eviction of all layers: lkv_ext {ours:.2f} ms, best PyTorch composition {theirs:.2f} ms, {ratio:.1f}x"


class Clock:
    """A streamer that notes when tokens come: first the prompt, then one at a time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass

    def step(self) -> float:
        """Seconds per token, those of the prompt not counted."""
        return median(b - a for a, b in pairwise(self.times[1:]))


def generation(model: LlamaForCausalLM, text: Tensor, retention: float) -> str:
    """`generate` with the dense cache and with one that evicts: bytes of the cache, seconds per token."""
    model.set_attn_implementation("sdpa")
    lines = []
    for name, cache in (
        ("dense cache", DynamicCache()),
        ("lkv.Cache", lkv.Cache(model, "adakv", retention=retention)),
    ):
        clock = Clock()
        model.generate(
            text,
            attention_mask=torch.ones_like(text),
            past_key_values=cache,
            streamer=clock,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        size = (
            cache.nbytes if isinstance(cache, lkv.Cache) else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        )
        lines.append(
            f"generate, {name}: {size / 2**20:.1f} MiB of keys and values, {1e3 * clock.step():.1f} ms a token"
        )
    return "\n".join(lines)


def describe(model: LlamaForCausalLM, tokens: int, name: str) -> str:
    config, build = model.config, lkv_ext.build_info()
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"cpu, {build['cpu_isa']}"
    return (
        f"lkv_ext {build['version']} on {where}; torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"Llama with random weights: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads on "
        f"{config.num_key_value_heads} KV heads of {config.head_dim}, {model.dtype}\n"
        f"prompt: {tokens} bytes of {name} from Python's library"
    )


def table(cache: DynamicCache, kept: RaggedKV) -> str:
    """Rows and bytes of K and V of every layer before and after; room for later tokens counts as bytes."""
    head = ("layer", "rows before", "after", "per head", "bytes before", "after", "kept")
    lines, sums = [], [0, 0, 0, 0]
    for i, layer in enumerate(cache.layers):
        part = kept.layer(i)
        per_head = part.lengths.flatten().tolist()
        room = int(part.cu_seqlens[-1] - part.cu_seqlens[0])
        row_bytes = sum(t.shape[1] * t.element_size() for t in (part.k, part.v))
        before = layer.keys[..., 0].numel()
        counts = [before, sum(per_head), layer.keys.nbytes + layer.values.nbytes, room * row_bytes]
        lines.append(line(str(i), counts, f"{min(per_head)} to {max(per_head)}"))
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
    lines.append(line("all", sums, ""))
    return "\n".join([FORM.format(*head), *lines])


FORM = "{:>5}  {:>11}  {:>9}  {:>12}  {:>14}  {:>13}  {:>6}"


def line(name: str, counts: list[int], per_head: str) -> str:
    rows, rows_after, size, size_after = (f"{count:,}" for count in counts)
    return FORM.format(name, rows, rows_after, per_head, size, size_after, f"{counts[1] / counts[0]:.1%}")


if __name__ == "__main__":
    sys.exit(main())
