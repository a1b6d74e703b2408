"""Writes on and on in the same memory: python examples/endless.py MODEL TOKENS

The first tokens and the latest ones stay, 512 rows per head at most (StreamingLLM). Positions count on: a model goes as
far as its rotary embeddings do.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import lkv

name, count = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)

with lkv.Cache(model, "streaming_llm", cap=512) as cache:
    model.generate(
        **inputs, past_key_values=cache, max_new_tokens=count, do_sample=True, streamer=TextStreamer(tokenizer)
    )

print(f"{cache.get_seq_length():,} tokens, {cache.retained_bytes:,} bytes of keys and values")
