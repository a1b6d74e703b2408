"""Which request is in which row of a worker's batch: the length of its prompt and the retention of its rows.

vLLM tells its logits processors what enters, leaves and moves in the batch; this one changes no logits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from lkv.vllm import backends
from lkv.vllm.settings import OFF, Settings, request_retention

NAME = "lkv.vllm.requests:Requests"

_OF_CONFIG: WeakValueDictionary[int, Requests] = WeakValueDictionary()  # by id of a worker's config


def of(vllm_config: Any) -> Requests | None:
    """The requests of the worker that runs with this config."""
    return _OF_CONFIG.get(id(vllm_config))


class Requests(LogitsProcessor):
    """The batch of a worker, by row.

    Attributes:
        settings: of the engine; None where it does not evict.
        prompts: int64 `[R]`: tokens of the prompt; 0 in free rows.
        retentions: float64 `[R]`: 1 where nothing is evicted.
        builders: how many metadata builders read this.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses what `extra_args["lkv"]` cannot say, where the request comes in.

        A request with a retention of its own reads nothing from the prefix cache: how far hits may reach depends on the
        retention, and the cache is looked up by the prompt alone.
        """
        if request_retention(sampling_params.extra_args) not in (None, OFF):
            sampling_params.skip_reading_prefix_cache = True

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.settings = Settings.of(vllm_config.additional_config)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.prompts = np.zeros(rows, dtype=np.int64)
        self.retentions = np.full(rows, OFF)
        self.builders = 0
        if self.settings is not None:
            backends.install()
            _OF_CONFIG[id(vllm_config)] = self

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any) -> Any:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None or self.settings is None:
            return
        if self.builders == 0:
            raise RuntimeError(
                "lkv.vllm: expected layers of full attention with the backend CPU_ATTN, FLASH_ATTN or FLASHINFER, got "
                "none: set --attention-backend, or start without lkv settings"
            )
        for row in batch_update.removed:
            self._set(row, 0, OFF)
        for row, params, prompt, _ in batch_update.added:
            if prompt is None:
                raise RuntimeError("lkv.vllm: expected prompts of tokens, got embeddings")
            self._set(row, len(prompt), self.settings.effective(len(prompt), params.extra_args))
        for a, b, direction in batch_update.moved:
            kept = self.prompts[b], self.retentions[b]
            self._set(b, self.prompts[a], self.retentions[a])
            self._set(a, *(kept if direction == MoveDirectionality.SWAP else (0, OFF)))

    def _set(self, row: int, prompt: int, retention: float) -> None:
        self.prompts[row], self.retentions[row] = prompt, retention
