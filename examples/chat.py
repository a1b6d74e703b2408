"""A conversation over one cache, line by line from standard input: python examples/chat.py MODEL

After every turn the cache is brought back to a quarter of the conversation so far, out of old and new rows.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lkv

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
chat = torch.zeros(1, 0, dtype=torch.long, device=model.device)

with lkv.Cache(model, "snapkv", retention=0.25) as cache:
    for line in sys.stdin:
        new = tokenizer(f"User: {line.strip()}\nAssistant:", return_tensors="pt").to(model.device)["input_ids"]
        chat = torch.cat([chat, new], 1)  # the cache knows how many of these it has seen
        length = chat.shape[1]
        chat = model.generate(chat, attention_mask=chat.new_ones(chat.shape), past_key_values=cache, max_new_tokens=64)
        print(tokenizer.decode(chat[0, length:], skip_special_tokens=True))
        print(f"[{cache.get_seq_length()} tokens, {cache.retained_bytes:,} bytes]", file=sys.stderr)
