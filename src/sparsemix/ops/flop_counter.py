"""Counting FLOPs as they run, with the formulas that torch's counter lacks."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count

import sparsemix.ops.cross_entropy
import sparsemix.ops.expert_mlp
import sparsemix.ops.grouped_mm
import sparsemix.ops.peer_experts
import sparsemix.ops.product_key_topk
import sparsemix.ops.row_adam
import sparsemix.ops.row_dot
import sparsemix.ops.row_grad
import sparsemix.ops.row_mix
import sparsemix.ops.ternary_mm  # noqa: F401  (each registers its own formula)

CPU_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _cpu_sdpa(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    """The full square, as everywhere in this library."""
    heads = query_shape[1]
    spread = [(s[0], heads, *s[2:]) for s in (key_shape, value_shape)]
    return sdpa_flop_count(query_shape, *spread)


# torch before 2.15 counts 0 for its CPU kernel.
if CPU_SDPA not in flop_registry:
    register_flop_formula(CPU_SDPA)(_cpu_sdpa)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix multiplies, attention and table look-ups that `work()` runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
