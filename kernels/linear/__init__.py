"""Linear layers of a transformer's block, each with what stands behind it as its epilogue: no pass of their own.

What stands between a block's products moves more bytes than the products: with 11 layers of width 512, 32 windows of
2048 and bfloat16, torch's operators move 48.6 GB a forward, 15 ms at 3.35 TB/s; the products themselves take 6 ms. A
library's product cannot end in these operators, so they are the epilogue of one of our own. For the first MLP product,
M = 65,536, N = 1536, K = 512: 103 GFLOP, 0.17 ms at 600 TFLOP/s; a pass over its result would read and write 403 MB,
0.12 ms. A product of our own gains where it reaches 60% of the library's rate. All of this is arithmetic, unmeasured.

All share one tile of a product, `_product.py`: sums in float32, in the order of k, a row's bits whatever the batch.

A normalisation before a layer needs no pass either: norm(x) W^T = (x W^T) / rms(x), a factor of each row. `squares`,
[parts, ...] float32, are the parts of each row's sum of squares, that the kernel before left: one a tile of columns.
"""

from ..spec import KernelSpec
from ._cross_entropy import SPEC as _CROSS_ENTROPY
from ._cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from ._heads import SPEC as _HEADS
from ._heads import linear_heads, linear_heads_ref, turned
from ._logits import SPEC as _LOGITS
from ._logits import linear_logits, linear_logits_ref
from ._product import EPS
from ._residual import SPEC as _RESIDUAL
from ._residual import linear_residual, linear_residual_ref
from ._squared import SPEC as _SQUARED
from ._squared import linear_squared, linear_squared_ref

__all__ = [
    "EPS",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "linear_heads",
    "linear_heads_ref",
    "linear_logits",
    "linear_logits_ref",
    "linear_residual",
    "linear_residual_ref",
    "linear_squared",
    "linear_squared_ref",
    "turned",
]

SPECS: tuple[KernelSpec, ...] = (_CROSS_ENTROPY, _HEADS, _LOGITS, _RESIDUAL, _SQUARED)
