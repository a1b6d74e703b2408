"""Answers many prompts in a small pool, whole and with 25 % of each: python examples/continuous_batching.py MODEL FILE

The prompts are the paragraphs of the file. transformers' continuous batching reads them into one pool of blocks; with
eviction a prompt leaves most of its blocks once it has been read, and more of them are answered at a time.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from lkv.hf import batching

name, path = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
prompts = tokenizer(Path(path).read_text().split("\n\n"))["input_ids"]

page, answer = 16, 64
blocks = 3 * (max(map(len, prompts)) + answer) // page  # three of the longest at once
pool = ContinuousBatchingConfig(
    page_size=page, num_blocks=blocks, max_batch_tokens=512, allow_block_sharing=False, use_async_batching=False
)
for retention in (1.0, 0.25):
    with batching.continuous_batching(
        model,
        "keydiff",
        retention=retention,
        generation_config=GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=None),
        continuous_batching_config=pool,
    ) as manager:
        ids = manager.add_requests(prompts)
        answers = {}
        while len(answers) < len(ids):
            found = manager.get_result()
            answers[found.request_id] = tokenizer.decode(found.generated_tokens, skip_special_tokens=True)
    print(answers[ids[0]])
    print(f"{retention:.0%} of every prompt: {manager.current_batch} forward passes in {blocks} blocks", end="")
    print(f", of which {manager.eviction.freed_blocks} were freed and used again")
