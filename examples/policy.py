"""A policy of your own, on a model of transformers: python examples/policy.py MODEL [FILE]"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import lkv
from lkv.policies.uniform import uniform_budgets


@dataclass(frozen=True)
class KeyNorm:
    """Keys of a small norm are attended to the most (arXiv 2406.11430)."""

    needs = frozenset()  # of "queries", "hidden_states", "pre_rope_keys"
    scope = "layer"  # a layer can be evicted as soon as it has attended
    sink, window = 4, 32  # rows at both ends that stay, inside the budget

    def score(self, layer, observation):
        return -observation.keys.float().norm(dim=-1)

    def budgets(self, scores, lengths, total, *, starts=None):
        return uniform_budgets(lengths, total)


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
text = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else sys.stdin.read()
inputs = tokenizer(text, return_tensors="pt").to(model.device)
cache = lkv.Cache(model, KeyNorm(), retention=0.25)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"[{cache.get_seq_length()} tokens, {cache.retained_bytes:,} bytes]", file=sys.stderr)
