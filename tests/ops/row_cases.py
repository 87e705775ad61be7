"""Look-ups of table rows in which kernels could go wrong, and the implementations that this machine has."""

import pytest
import torch

from sparsemix.ops import build
from sparsemix.ops.row_grad import KERNELS, RowGrad

NO_COMPILER = build.unusable(KERNELS.source)
IMPLS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))),
    "triton",
]
# (N, R, M, D)
CASES = {
    "odd": (63, 5, 40, 10),
    "one_row_for_all": (101, 3, 7, 63),
    "zipf": (60, 4, 150, 65),
    "one_column": (40, 3, 9, 1),
    "one_of_all": (1, 1, 1, 1),
    "no_token": (0, 3, 4, 8),
    "wide": (5, 2, 4, 640),
}


def lookup(case, dtype=torch.float32):
    """The factors of a table's gradient, and the table's shape."""
    N, R, M, D = CASES[case]
    ids = torch.randint(M, (N, R))
    if case == "one_row_for_all":
        ids = torch.full((N, R), M - 1)
    if case == "zipf":
        ids = (M ** torch.rand(N, R) - 1).long()
    return RowGrad(ids, torch.randn(N, R).to(dtype), torch.randn(N, D).to(dtype)), (M, D)
