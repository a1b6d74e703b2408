"""The small model that comes with the package, so that every number of the docs can be made on a laptop."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PATH = Path(__file__).parent / "weights"


def load(path: Path = PATH) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The retriever and its tokenizer, float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval(), AutoTokenizer.from_pretrained(path)
