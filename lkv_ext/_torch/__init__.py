"""The torch ops: importing any module of this package loads the op library and registers fakes and derivatives.

One file per op holds its public function, fake kernel and derivatives. An op imports `library`, `request` and the other
shared modules, never the package's users (`lkv_ext.cache`).
"""

import lkv_ext._torch.library  # noqa: F401  (first: the others register what it has loaded)
from lkv_ext._torch import append, attend, evict, gather, paged, select, soft_topk  # noqa: F401  (each registers ops)
