"""`python -m lkv.golden`: writes tests/golden, the rows that every method keeps of small models and fixed texts.

They are made of `lkv.reference.policies`, and of no kernel, so that another implementation can check itself; the README
there says how the files are laid out. Models are rebuilt from a seed, texts are drawn from one. A text is taken for a
method only if nothing that it keeps depends on rounding: the same rows have to be kept when every weight of the model
is moved by 1e-5 of itself, and every score by 1e-4. Equal scores stay equal: where a tie decides, the file says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lkv.reference.policies import Kept, Settings, Text, kept, text_of

FOLDER = Path("tests/golden")
LENGTH, RETENTIONS = 128, (0.125, 0.25, 0.5)
MOVED, SCORES, TIMES = 1e-5, 1e-4, 4  # by how much weights and scores are moved, and how often
TEXTS = 60  # that are tried

_SIZES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=8, vocab_size=160,
    rms_norm_eps=1e-6, max_position_embeddings=1024, hidden_act="silu", attention_bias=False, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "four-on-one": dict(model_type="llama", num_key_value_heads=1, rope_theta=10000.0, **_SIZES),
    "norm-of-keys": dict(model_type="qwen3", num_key_value_heads=2, rope_theta=1000000.0, **_SIZES),
    "no-groups": dict(
        model_type="llama", num_key_value_heads=4, rope_theta=50000.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0}, **_SIZES,
    ),
}  # fmt: skip

_SNAP = dict(policy="SnapKV", window=8, kernel_size=5, pooling="avg", sink=0, group="mean", group_first=False)
_ADA_SCORE = _SNAP | dict(kernel_size=7, pooling="max", group_first=True)
_ADA = dict(policy="AdaKV", scorer=_ADA_SCORE, alpha=0.2, floor="blend")
_LAVA = dict(policy="LAVaScore", scorer=_ADA_SCORE | dict(group="max"), before=False)
_H2O = dict(policy="H2O", recent=0.5, average=False, sink=0, window=0)
_TOVA = dict(policy="TOVA", sink=0, window=1)
_CAKE = dict(policy="CAKEScore", window=8, gamma=200.0, kernel_size=5, sink=0)
_DEFENSIVE = dict(policy="DefensiveScore", window=8, kernel_size=5, sink=0, sure=True)
_CRITICAL = dict(policy="CriticalKV", scorer=_SNAP, epsilon=1e-4, first=0.5)
_LAG = dict(policy="LagKV", sink=4, lag=16, cross=False)
_EXPECTED = dict(policy="ExpectedAttention", future=64, sink=4, covariance=True, norms=True, epsilon=0.0)
_LEVERAGE = dict(policy="Leverage", sink=4, window=4, ridge=0.01)
_SAGE = dict(policy="SAGEKV", group="union", ends=0.25)
_KVZIP = dict(policy="KVzip", sink=4, across="layers", chunk=64, lead=8, repeated_sink=4)
_STREAMING = dict(policy="StreamingLLM", sink=4)
_TABLE = [[0.9, 0.2, 0.4, 0.1], [0.3, 0.8, 0.6, 0.05], [0.15, 0.5, 0.7, 0.35]]  # of heads, the first ones of each layer

CASES: dict[str, dict[str, Any]] = {
    "random": dict(policy="Random", seed=0, sink=4, window=8),
    "streaming_llm": _STREAMING,
    "snapkv": _SNAP,
    "snapkv, maximum": _SNAP | dict(kernel_size=7, pooling="max"),
    "snapkv, without pooling": _SNAP | dict(kernel_size=1),
    "adakv": _ADA,
    "adakv, minimum": _ADA | dict(scorer=_SNAP, floor="minimum"),
    "kvzip": _KVZIP,
    "kvzip, heads of a layer": _KVZIP | dict(across="heads"),
    "kvzip, equal": _KVZIP | dict(across=None),
    "lava": dict(policy="LAVa", scorer=_ADA | dict(scorer=_LAVA, alpha=0.0), code=False),
    "lava_code": dict(policy="LAVa", scorer=_ADA | dict(scorer=_LAVA | dict(before=True), alpha=0.0), code=True),
    "caote": dict(policy="CAOTE", scorer=_SNAP),
    "caote of h2o": dict(policy="CAOTE", scorer=_H2O),
    "caote of tova": dict(policy="CAOTE", scorer=_TOVA),
    "fast_caote": dict(policy="FastCAOTE", scorer=_SNAP),
    "squeeze": dict(policy="SqueezeAttention", scorer=_STREAMING, p=0.38),
    "squeeze of h2o": dict(policy="SqueezeAttention", scorer=_H2O, p=0.38),
    "h2o": _H2O,
    "h2o, average": _H2O | dict(recent=0.0, average=True),
    "criticalkv": _CRITICAL,
    "criticalkv and adakv": _ADA | dict(scorer=_CRITICAL, floor="minimum"),
    "sagekv": _SAGE,
    "sagekv, maximum": _SAGE | dict(group="max"),
    "sagekv, sum": _SAGE | dict(group="sum"),
    "tova": _TOVA,
    "rkv": dict(policy="RKV", window=8, kernel_size=7, mix=0.07, threshold=0.5, sink=0),
    "pyramidkv": dict(policy="PyramidKV", scorer=_SNAP | dict(kernel_size=7, pooling="max"), beta=20),
    "pyramidkv and adakv": dict(policy="PyramidKV", scorer=_ADA, beta=20),
    "cake": dict(policy="CAKE", scorer=_CAKE, tau1=1.0, tau2=1.0),
    "defensivekv": _ADA | dict(scorer=_DEFENSIVE, alpha=0.0),
    "layer_defensivekv": dict(policy="AcrossLayers", scorer=_DEFENSIVE | dict(sure=False)),
    "across layers": dict(policy="AcrossLayers", scorer=_SNAP),
    "expected_attention": _EXPECTED,
    "expected_attention, mean": _EXPECTED | dict(covariance=False, norms=False),
    "expected_attention, epsilon": _EXPECTED | dict(epsilon=0.02),
    "leverage": _LEVERAGE,
    "compactor": _LEVERAGE | dict(policy="Compactor", blending=None, piece=32),
    "knorm": dict(policy="KNorm", sink=0, window=0),
    "knorm, protected": dict(policy="Protect", scorer=dict(policy="KNorm", sink=0, window=0), sink=4, window=8),
    "keydiff": dict(policy="KeyDiff", sink=0, window=0),
    "lagkv": _LAG,
    "lagkv, across pieces": _LAG | dict(cross=True),
    "headkv": dict(policy="HeadKV", scorer=_SNAP | dict(kernel_size=7, pooling="max"), table=_TABLE, beta=1.2),
    "duo_attention": dict(policy="DuoAttention", table=_TABLE, sink=4, recent=8),
}


def drawn(seed: int) -> Iterator[int]:
    """32-bit numbers, the same in every language: the upper half of splitmix64."""
    state, mask = seed, 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        yield (x ^ (x >> 31)) >> 32


def built(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model, float16: multiples of 1/128 in [-0.5, 0.5), one more for norms, drawn in this order."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for n in range(config["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        own |= {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (groups, hidden)}
        own |= {"self_attn.v_proj": (groups, hidden), "self_attn.o_proj": (hidden, heads)}
        if config["model_type"] == "qwen3":
            own |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        own |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = (hidden,)
    numbers, weights = drawn(list(MODELS).index(_name(config))), {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        values = torch.tensor([(next(numbers) % 128 - 64) / 128 for _ in range(count)])
        weights[name] = (1 + values if len(shape) == 1 else values).view(shape).half()
    return weights


def _name(config: Mapping[str, Any]) -> str:
    return next(name for name, known in MODELS.items() if known == dict(config))


def tokens(number: int) -> list[int]:
    """Text `number`: 128 different tokens of 3 to 159, as in the first layer equal ones have keys of equal norms."""
    numbers, left = drawn(1000 + number), list(range(3, 160))
    return [left.pop(next(numbers) % len(left)) for _ in range(LENGTH)]


def for_model(policy: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a table of the heads that the model has."""
    found = dict(policy)
    if "table" in found:
        found["table"] = [row[: config["num_key_value_heads"]] for row in found["table"]]
    if "scorer" in found:
        found["scorer"] = for_model(found["scorer"], config)
    return found


def sure(policy: Settings, texts: list[Text]) -> dict[str, Any] | None:
    """What is kept of the first text at all retentions, if as much is kept of the others, which are the same moved."""
    found: dict[str, Kept] = {}
    tied = False
    for retention in RETENTIONS:
        rows = round(retention * LENGTH)
        first = kept(policy, texts[0], rows)
        for seed, text in enumerate(texts[1:]):
            if kept(policy, text, rows) != first or kept(policy, texts[0], rows, noisy(seed)) != first:
                return None
        found[f"{retention:g}"] = first
        tied = tied or kept(policy, texts[0], rows, later) != first
    return {"tied": tied, "kept": found}


def later(scores: Tensor) -> Tensor:
    """The same but for a trace, by which the later of equal scores is the better one."""
    return scores + (scores.abs() + 1e-280) * 1e-14 * torch.arange(scores.shape[1])


def noisy(seed: int) -> Callable[[Tensor], Tensor]:
    """Other scores, of which those are equal that were."""
    generator = torch.Generator().manual_seed(seed)

    def change(scores: Tensor) -> Tensor:
        values, place = scores.unique(return_inverse=True)
        return (values * (1 + SCORES * torch.randn(len(values), generator=generator, dtype=torch.float64)))[place]

    return change


def moved(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(w.shape, generator=generator, dtype=torch.float64) for name, w in weights.items()}
    return {name: w.double() * (1 + MOVED * noise[name]) for name, w in weights.items()}


def case(policy: Settings, config: Mapping[str, Any], readings: Iterator[list[Text]]) -> dict[str, Any]:
    """The first text of which the policy keeps what does not depend on rounding, and what it keeps.

    Raises:
        ValueError: where there is none.
    """
    own = for_model(policy, config)
    for number, texts in enumerate(readings):
        if (found := sure(own, texts)) is not None:
            return {"policy": own, "text": number, **found}
    raise ValueError(f"lkv.golden: expected a text of which rounding decides nothing, got none in {TEXTS}: {policy}")


def write(folder: Path, models: list[str]) -> None:
    texts = {str(n): tokens(n) for n in range(TEXTS)}
    used: set[int] = set()
    for name in models:
        config = MODELS[name]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(built(config), folder / name / "model.safetensors", {"format": "pt"})
        weights = load_file(folder / name / "model.safetensors")
        variants = [weights, *(moved(weights, seed) for seed in range(TIMES))]
        known: list[list[Text]] = []

        def readings(
            config: Mapping[str, Any] = config,
            variants: list = variants,
            known: list[list[Text]] = known,  # the readings of a model are shared by all methods
        ) -> Iterator[list[Text]]:
            for n in range(TEXTS):
                if n == len(known):
                    known.append([text_of(config, w, texts[str(n)]) for w in variants])
                yield known[n]

        cases = {}
        for label, policy in CASES.items():
            cases[label] = case(policy, config, readings())
            used.add(cases[label]["text"])
            print(f"{name}: {label}, text {cases[label]['text']}", flush=True)
        (folder / f"{name}.json").write_text(_json(cases))
    (folder / "texts.json").write_text(
        "{\n" + ",\n".join(f'"{n}": {_line(texts[str(n)])}' for n in sorted(used)) + "\n}\n"
    )


def _json(cases: Mapping[str, Any]) -> str:
    """Cases and retentions on lines of their own."""
    parts = []
    for label, found in cases.items():
        rows = ",\n".join(f'"{r}": {_line(table)}' for r, table in found["kept"].items())
        facts = ", ".join(f'"{name}": {_line(found[name])}' for name in ("policy", "text", "tied"))
        parts.append(f'"{label}": {{{facts}, "kept": {{\n{rows}}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _line(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="default: all")
    args = parser.parse_args()
    write(args.out, args.models)


if __name__ == "__main__":
    main()
