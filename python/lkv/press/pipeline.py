"""kvpress's pipeline for caches that `CompactPress` has made."""

from __future__ import annotations

from typing import Any

from kvpress.pipeline import KVPressTextGenerationPipeline
from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from lkv.hf import Cache

TASK = "lkv-press-text-generation"


class CompactPipeline(KVPressTextGenerationPipeline):
    """kvpress's, with the same arguments; behind an answer it takes its tokens out of a `lkv.Cache`, too.

    kvpress's own slices the keys of every layer, which rows of heads that differ do not have: it fails behind the first
    answer where a press masks.
    """

    def _remove_answer_from_cache(self, cache: Any, cache_seq_lengths: list[int]) -> None:
        if isinstance(cache, Cache):
            cache.crop(cache_seq_lengths[0])
        else:
            super()._remove_answer_from_cache(cache, cache_seq_lengths)


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=CompactPipeline, pt_model=AutoModelForCausalLM)
