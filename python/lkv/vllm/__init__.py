"""A plug-in for vLLM: prompts are evicted when they end, per head, and their blocks go back to vLLM's pool."""

from __future__ import annotations


def register() -> None:
    """The entry point in `vllm.general_plugins`."""
    from lkv.vllm.install import register as enter

    enter()
