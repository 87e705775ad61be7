"""The k best of all n * n product keys, by looking at every one of them."""

from jaxtyping import Float, Int
from torch import Tensor


def product_key_topk(
    query: Float[Tensor, "N H 2 C"], keys: Float[Tensor, "*H 2 n C"], k: int
) -> tuple[Float[Tensor, "N H K"], Float[Tensor, "N H K"], Int[Tensor, "N H K"], Int[Tensor, "N H K"]]:
    """(left, right, i, j) of the k largest <query_0, keys_0i> + <query_1, keys_1j>, largest first."""
    keys = keys if keys.ndim == 4 else keys[None]
    left, right = ((query[:, :, side, None] * keys[:, side]).sum(-1) for side in (0, 1))  # (N, H, n)
    i, j = best_pairs(left.detach(), right.detach(), k)
    return left.gather(-1, i), right.gather(-1, j), i, j


def best_pairs(
    left: Float[Tensor, "*B n"], right: Float[Tensor, "*B n"], k: int
) -> tuple[Int[Tensor, "*B k"], Int[Tensor, "*B k"]]:
    """(i, j) of the k largest left_i + right_j, largest first; ties go to the better left rank, then right rank."""
    n = left.shape[-1]
    left_sorted, i = left.sort(dim=-1, descending=True, stable=True)
    right_sorted, j = right.sort(dim=-1, descending=True, stable=True)
    sums = left_sorted[..., :, None] + right_sorted[..., None, :]  # (*B, n, n), ranks on both axes
    best = sums.flatten(-2).sort(dim=-1, descending=True, stable=True)[1][..., :k]
    return i.gather(-1, best // n), j.gather(-1, best % n)
