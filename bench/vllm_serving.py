"""vLLM with the plug-in beside stock vLLM, in one process: requests served with a fixed KV memory, eviction, decoding.

    PYTHONPATH=.:python VLLM_ENABLE_V1_MULTIPROCESSING=0 python bench/vllm_serving.py --out bench/results/vllm-cpu.json

Runs in the environment of `make test-vllm`, on one thread. The model is a random Llama, or that of `--model`. Engines
are timed in turn, round by round; numbers are medians, ratios are medians of the ratios of a round. Times are those
that the process took, which works on one thread: what else runs on the machine counts for little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
)  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm import LLM, SamplingParams

import lkv.vllm

BLOCK = 32
DESIGNS = ("equal", "layer", "head")


def random_model(folder: Path, layers: int, hidden: int) -> Path:
    heads = hidden // 32
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def shares(counts: str, config: Any) -> dict[str, Any]:
    """Half of what is kept on average in every second layer, or head, and half as much again in the others."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    if counts == "layer":
        return {"counts": counts, "shares": [[0.5 + i % 2] for i in range(layers)]}
    if counts == "head":
        return {"counts": counts, "shares": [[0.5 + i % 2 if heads % 2 == 0 else 1.0 for i in range(heads)]] * layers}
    return {}


class Engine:
    """An engine in this process, and the times of its steps."""

    def __init__(self, model: str, settings: dict[str, Any] | None, blocks: int, arguments: argparse.Namespace) -> None:
        self.llm = LLM(
            model, skip_tokenizer_init=True, dtype=arguments.dtype, enforce_eager=True, block_size=BLOCK, seed=0,
            num_gpu_blocks_override=blocks, disable_log_stats=True, enable_prefix_caching=False,
            max_model_len=arguments.prompt + max(arguments.tokens, arguments.steps) + BLOCK,
            max_num_batched_tokens=arguments.prompt, max_num_seqs=arguments.requests,
            additional_config={} if settings is None else {"lkv": settings},
        )  # fmt: skip
        self.core = self.llm.llm_engine
        self.scheduler = self.core.engine_core.engine_core.scheduler
        self.ids = 0

    def add(self, prompts: list[list[int]], tokens: int, own: Any = None) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=None if own is None else {"lkv": own},
        )  # fmt: skip
        for prompt in prompts:
            self.ids += 1
            self.core.add_request(str(self.ids), {"prompt_token_ids": prompt}, params)

    def serve(self, prompts: list[list[int]], tokens: int, own: Any = None) -> dict[str, float]:
        """Requests that come at once, served with what the pool holds."""
        self.add(prompts, tokens, own)
        steps = most = 0
        start = time.process_time()
        while self.core.has_unfinished_requests():
            self.core.step()
            steps += 1
            most = max(most, len(self.scheduler.running))
        seconds = time.process_time() - start
        return {
            "seconds": seconds, "tokens_per_second": len(prompts) * tokens / seconds, "steps": steps, "at_once": most,
        }  # fmt: skip

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Median seconds of a step that decodes all of these."""
        self.add(prompts, steps + 2 * len(prompts))
        while any(request.num_output_tokens == 0 for request in self.scheduler.requests.values()):
            self.core.step()
        times = []
        for _ in range(steps):
            start = time.process_time()
            self.core.step()
            times.append(time.process_time() - start)
        self.core.abort_request([str(self.ids - i) for i in range(len(prompts))], internal=False)
        while self.core.has_unfinished_requests():
            self.core.step()
        return statistics.median(times)


def evictions() -> list[float]:
    """Times of the evictions of layers from here on."""
    from lkv.vllm.cpu import Attention

    times, move = [], Attention._move

    def timed(*args: Any) -> None:
        start = time.process_time()
        move(*args)
        times.append(time.process_time() - start)

    Attention._move = timed
    return times


def measure(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    per_request = -(-(arguments.prompt + arguments.tokens) // BLOCK)
    blocks = arguments.dense * per_request + 1
    settings = {"policy": arguments.policy, "retention": 0.15}
    config = LlamaConfig.from_pretrained(model)
    engines = {"stock": Engine(model, None, blocks, arguments)}
    lkv.vllm.register()
    engines["off"] = Engine(model, None, blocks, arguments)
    designs = {name: settings | shares(name, config) for name in arguments.designs}
    for name, given in designs.items():
        groups = {"equal": 1, "layer": 2, "head": config.num_key_value_heads}[name]
        engines[name] = Engine(model, given, blocks * groups, arguments)
    served = {"stock": ("stock", None), "off": ("off", None), "15 %": ("equal", None)}
    served["25 %"] = ("equal", {"retention": 0.25})
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, config.vocab_size, (arguments.requests, arguments.prompt), generator=generator).tolist()
    for engine in engines.values():
        engine.serve(texts[:2], 2)
    times = evictions()
    found: dict[str, Any] = {"serving": {name: [] for name in served}, "decoding": {name: [] for name in engines}}
    found["eviction"], found["prefill"] = [], []
    for index in range(arguments.rounds):
        order = list(served)[index % len(served) :] + list(served)[: index % len(served)]
        for name in order:
            engine, own = served[name]
            found["serving"][name].append(engines[engine].serve(texts, arguments.tokens, own))
        found["prefill"].append(engines["stock"].serve(texts, 1)["seconds"])
        for name in list(engines)[:: 1 if index % 2 else -1]:
            found["decoding"][name].append(engines[name].decode(texts[: arguments.dense], arguments.steps))
        for text in texts[:3]:
            times.clear()
            whole = engines["equal"].serve([text], 1)["seconds"]
            found["eviction"].append(sum(times) / (whole - sum(times)))
    return found


def ratios(found: dict[str, list[float]], name: str, to: str = "stock") -> float:
    return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in found["serving"].items()}
    lines = ["| | tokens/s | to stock | steps | at once |", "|---|---|---|---|---|"]
    for name, runs in found["serving"].items():
        rate, ratio, at = statistics.median(rates[name]), ratios(rates, name), runs[0]
        lines.append(f"| {name} | {rate:.0f} | {ratio:.2f} | {at['steps']} | {at['at_once']} |")
    lines += ["", "| decoding step | ms | to stock |", "|---|---|---|"]
    for name, times in found["decoding"].items():
        lines.append(f"| {name} | {1e3 * statistics.median(times):.1f} | {ratios(found['decoding'], name):.2f} |")
    bounds = [
        run["seconds"] / prefill for run, prefill in zip(found["serving"]["stock"], found["prefill"], strict=True)
    ]
    lines += ["", f"Reading the prompts alone would be {statistics.median(bounds):.2f} times as fast as stock vLLM."]
    lines += ["", f"Eviction takes {statistics.median(found['eviction']):.1%} of the time of the prefill."]
    return "\n".join(lines)


def cpu() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    name = facts.get("model name", platform.processor())
    return f"{name}, family {facts.get('cpu family')} model {facts.get('model')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: a random Llama of --layers and --hidden")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="keydiff")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each request")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--dense", type=int, default=4, help="requests without eviction that the pool holds")
    parser.add_argument("--steps", type=int, default=40, help="decoding steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--note", default="", help="goes into the file")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        model = arguments.model
        if model is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = str(random_model(folder, arguments.layers, arguments.hidden))
        found = measure(arguments, model)
    print(table(found))
    if arguments.out is not None:
        given = {name: value for name, value in vars(arguments).items() if name != "out"}
        given["model"] = Path(arguments.model).name if arguments.model else "random Llama"
        facts = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__, "arguments": given}
        arguments.out.write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
