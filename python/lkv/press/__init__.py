"""kvpress (0.5 and later) and lkv: our policies as a press, and what any press marks really evicted.

    from lkv.press import CompactPress, LKVPress

    pipeline(context, question=question, press=LKVPress("lava", compression_ratio=0.85))
    pipeline(context, question=question, press=CompactPress(AdaKVPress(SnapKVPress(0.85))))

kvpress needs transformers before 5.3: `pip install 'lkv-ext[kvpress]'`.
"""

from __future__ import annotations

from lkv.extras import need

need("kvpress", "kvpress", "lkv.press")

from lkv.press.compact import CompactPress  # noqa: E402
from lkv.press.pipeline import TASK, CompactPipeline  # noqa: E402
from lkv.press.policy import LKVPress  # noqa: E402

__all__ = ["TASK", "CompactPipeline", "CompactPress", "LKVPress"]
