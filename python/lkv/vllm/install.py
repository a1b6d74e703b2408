"""Where the plug-in enters vLLM: the config of an engine, before it starts."""

from __future__ import annotations

import functools
from typing import Any

from lkv.vllm.settings import KEY, Settings, from_environment


def register() -> None:
    """The entry point in `vllm.general_plugins`, called in every process of vLLM.

    Engines that are configured from here on read their lkv settings. One without settings is as without this package.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if hasattr(create, "__lkv__"):
        return

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = from_environment()
        if given is not None and KEY not in self.additional_config:
            self.additional_config = {**self.additional_config, KEY: given}
        config = create(self, *args, **kwargs)
        engine(config)
        return config

    create_engine_config.__lkv__ = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def engine(vllm_config: Any) -> None:
    """Prepares the config of an engine that evicts; raises ValueError where it cannot."""
    settings = Settings.of(vllm_config.additional_config)
    if settings is None:
        return
    from lkv.vllm import requests
    from lkv.vllm.refusals import check
    from lkv.vllm.scores import scorer
    from lkv.vllm.shares import of_model

    check(vllm_config, settings)
    model = vllm_config.model_config
    try:
        scorer(settings.policy, model)
    except FileNotFoundError:
        raise ValueError(
            f"lkv.vllm: expected policy to be of those of `lkv policies` or the folder of a checkpoint of LKV, got "
            f"{settings.policy!r}"
        ) from None
    layers, ranks = model.hf_text_config.num_hidden_layers, vllm_config.parallel_config.tensor_parallel_size
    of_model(settings, model.hf_text_config, layers, model.get_total_num_kv_heads(), ranks)
    if requests.NAME not in (model.logits_processors or ()):
        model.logits_processors = [*(model.logits_processors or ()), requests.NAME]
