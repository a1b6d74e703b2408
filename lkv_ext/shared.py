"""What packages built on lkv_ext, such as lkv, share with it: no part of its stable API."""

from lkv_ext._torch.budgets import apportion
from lkv_ext._torch.modes import keeps_tensors

__all__ = ["apportion", "keeps_tensors"]
