"""Every method in plain PyTorch after its paper: one text, float64, full attention matrices. `kept` is the whole of it.

It shares no code with `lkv.policies`; the golden sets in tests/golden are made of it.
"""

from lkv.reference.policies.keep import Kept, Settings, Text, kept, text_of

__all__ = ["Kept", "Settings", "Text", "kept", "text_of"]
