"""Every op's Triton kernels, forward and backward, built for a Hopper GPU and not run (test_triton_builds.py).

The interpreter accepts what the compiler refuses. Results are whatever lay in memory."""

import os
from importlib import import_module
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read where a kernel is decorated

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsemix import ops
from sparsemix.ops.cross_entropy import cross_entropy
from sparsemix.ops.expert_mlp import expert_mlp
from sparsemix.ops.grouped_mm import grouped_mm
from sparsemix.ops.impl import Kernels
from sparsemix.ops.peer_experts import peer_experts
from sparsemix.ops.product_key_topk import product_key_topk
from sparsemix.ops.row_adam import Moments, Rates, all_rows_, some_rows_
from sparsemix.ops.row_dot import row_dot
from sparsemix.ops.row_grad import RowGrad, row_norm, sort_rows
from sparsemix.ops.row_mix import row_mix
from sparsemix.ops.ternary_mm import ternary_grouped_mm, ternary_mm

for path in Path(ops.__file__).parent.glob("*/triton.py"):
    import_module(f"sparsemix.ops.{path.parent.name}.triton")
built: set[str] = set()


class Hopper:
    """The answers of a GPU's driver that a build asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def build(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.metadata.shared <= 232448, f"{self.__name__}: more shared memory than a Hopper has"
    built.add(f"{self.fn.__module__.split('.')[-2]}.{self.__name__}")


run, JITFunction.run = JITFunction.run, build
driver.set_active(Hopper())
Kernels.refuses = lambda *_: None  # Triton for tensors on the CPU
os.environ["SPARSEMIX_IMPL"] = "triton"


def backward(y: torch.Tensor) -> None:
    y.float().sum().backward()


def rand(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def experts(dtype: torch.dtype, E: int, R: int, M: int, F: int, D: int, act: str) -> None:
    counts, ids = torch.full((E,), R // E), torch.randint(100, (R,))
    weights = rand(dtype, E, M, D), rand(dtype, E, D, F)
    backward(expert_mlp(rand(dtype, 100, D), ids, torch.rand(R), counts, *weights, act))


def look_ups(dtype: torch.dtype, R: int, D: int, act: str) -> None:
    ids, tables = torch.randint(40, (7, R)), (rand(dtype, 40, D), rand(dtype, 40, D))
    backward(peer_experts(rand(dtype, 7, D), ids, torch.rand(7, R), *tables, act))
    backward(row_mix(row_dot(rand(dtype, 7, D), ids, tables[0]), ids, tables[1]))


def adam(dtype: torch.dtype, second: tuple[int, ...]) -> None:
    ids, table = torch.randint(40, (70, 3)), rand(dtype, 40, 64).detach()
    ids[:, 0] = 0  # a row of many picks is summed in pieces
    moments, grad = (
        Moments(torch.zeros(40, 64), torch.zeros(second)),
        RowGrad(ids, torch.rand(70, 3), torch.rand(70, 64)),
    )
    order, rates = sort_rows(ids, 40, "torch"), Rates(0.1, (0.9, 0.95), 1e-8, 3)
    some_rows_(table, moments, grad, order, rates, torch.zeros(40, dtype=torch.double), -0.1)
    all_rows_(table, moments, grad, order, rates, seen=torch.ones(40, dtype=torch.uint8))
    row_norm(order, grad.coef, grad.vec)


bf16, fp32 = torch.bfloat16, torch.float32
experts(bf16, 4, 2048, 1024, 512, 256, "silu")
experts(bf16, 64, 512, 40, 40, 640, "gelu")
experts(fp32, 8, 512, 66, 33, 100, "relu")
backward(grouped_mm(rand(bf16, 512, 96), rand(bf16, 4, 80, 96), torch.full((4,), 128)))
look_ups(bf16, 128, 256, "gelu")
look_ups(fp32, 9, 16384, "silu")
adam(bf16, (40,))
adam(fp32, (40, 64))
backward(cross_entropy(rand(bf16, 9, 64), rand(bf16, 5000, 64), torch.randint(5000, (9,)))[0])
product_key_topk(rand(fp32, 9, 2, 2, 48), rand(fp32, 2, 2, 128, 48), 16)
codes, packed = torch.zeros(9, 64, dtype=torch.int8), torch.zeros(3, 32, 16, dtype=torch.uint8)
ternary_mm(codes, packed[0])
ternary_grouped_mm(codes, packed, torch.tensor([4, 0, 5]))
print(*built)
