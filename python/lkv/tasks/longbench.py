"""The prompts of the subsets of LongBench (arXiv 2308.14508), and how long an answer may be; see `longbench.json`.

The lengths are LongBench's (config/dataset2maxlen.json), and so is the order of instruction, context, repeated
instruction and input, and what an answer must look like for the metrics to see it ("unanswerable", "Paragraph 3"). The
wording is our own: for numbers to lay beside published ones, give LongBench's own `dataset2prompt.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

_SUBSETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PROMPTS: dict[str, str] = {name: subset["prompt"] for name, subset in _SUBSETS.items()}
LIMITS: dict[str, int] = {name: subset["limit"] for name, subset in _SUBSETS.items()}  # tokens
CLASSIFIED = ("trec", "lsht")
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # examples in the context; what counts is the answer's first line
