"""Goes on from a long text with 15 % of its cache: python examples/generate.py MODEL FILE"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import lkv

name, path = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
inputs = tokenizer(Path(path).read_text(), return_tensors="pt").to(model.device)

with lkv.Cache(model, "adakv", retention=0.15) as cache:
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{cache.get_seq_length():,} tokens, {cache.retained_bytes:,} bytes of keys and values")
