"""Do the look-up and the pool learn? A teacher of known neurons, a student whose look-up starts collapsed, and a
million experts."""

from functools import lru_cache

import pytest
import torch
from cases import build
from torch.nn import functional as F

from sparsemix.api import build_layer, build_optimizer
from sparsemix.evaluate.routing import unevenness, usage
from sparsemix.layers import update
from sparsemix.optim import schedule

pytestmark = pytest.mark.usefixtures("unchecked")

D, GROUPS, EXPERTS, STEPS, LR = 16, 32, 256, 300, 0.01


class Teacher:
    """Tokens of 32 groups; a group's target is a mixture of two neurons of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.centres = self.draw(GROUPS, D) + 1
        self.w_in, self.w_out = self.draw(GROUPS, 2, D) * D**-0.5, self.draw(GROUPS, 2, D)
        self.gates = torch.rand(GROUPS, 2, generator=self.generator)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def batch(self, N):
        group = torch.randint(GROUPS, (N,), generator=self.generator)
        x = self.centres[group] + 0.1 * self.draw(N, D)
        hidden = F.gelu(torch.einsum("nd,ngd->ng", x, self.w_in[group]))
        return x[None], torch.einsum("ng,ng,ngd->nd", self.gates[group], hidden, self.w_out[group])[None]


def judge(student, x, target):
    """(share of the target's variance not explained, usage, unevenness)."""
    student.eval()
    with torch.no_grad():
        y, aux = student(x)
    student.train()
    gate_mass = aux.stats["gate_mass"].numpy()
    return float((y - target).square().mean() / target.var()), usage(gate_mass), unevenness(gate_mass)


@lru_cache
def lesson(kind, query_norm):
    """The student's marks before and after training."""
    teacher, size = Teacher(), "num_experts" if kind == "peer" else "num_values"
    torch.manual_seed(2)
    settings = {"num_heads": 4, "top_k": 4, "d_key": 16, "query_norm": query_norm, "share_keys": True}
    student = build_layer({"kind": kind, size: EXPERTS, **settings}, D).train()
    with torch.no_grad():
        student.sub_keys.zero_()  # every token finds the same four rows
    optimizer, (x_test, wanted) = build_optimizer(student, LR, weight_decay=0.0), teacher.batch(2048)
    update(student, student(x_test)[1].stats)
    before = judge(student, x_test, wanted)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, STEPS, 10, 0.0)
        x, target = teacher.batch(256)
        y, aux = student(x)
        optimizer.zero_grad()
        (y - target).square().mean().backward()
        optimizer.step()
        update(student, aux.stats)
    return before, judge(student, x_test, wanted)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_student_learns_a_mixture_of_known_neurons_and_its_look_up_spreads(kind):
    (error_before, usage_before, _), (error, used, uneven) = lesson(kind, "batch")
    assert error_before > 0.9
    assert error < 0.04
    assert usage_before == 4 / EXPERTS
    assert used > 0.4
    assert uneven < 2


def test_batch_statistics_of_queries_make_use_more_even():
    (_, (error, used, uneven)), (_, (_, used_without, uneven_without)) = (lesson("peer", n) for n in ("batch", "none"))
    assert error < 0.04
    assert uneven < 0.7 * uneven_without
    assert used > used_without


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_a_million_rows_train_and_only_the_picked_ones_move(kind):
    size = {"peer": "num_experts", "pkm": "num_values"}[kind]
    layer = build({"kind": kind, size: 1024**2, "num_heads": 4, "top_k": 8, "d_key": 8}, D).float()
    tables = {name: p for name, p in layer.named_parameters() if p.shape[0] == 1024**2}
    assert len(tables) == (2 if kind == "peer" else 1)
    before = {name: table.detach().clone() for name, table in tables.items()}
    optimizer, x = build_optimizer(layer, lr=0.1), torch.randn(1, 63, D)
    y, aux = layer(x)
    update(layer, aux.stats)
    with torch.no_grad():
        counts = layer.eval()(x)[1].stats["counts"]
    y.square().mean().backward()
    optimizer.step()
    assert counts.sum() == 63 * 4 * 8
    assert counts.nonzero().max() > 2**19
    for name, table in tables.items():
        assert table.grad is None, name
        assert torch.equal(table[counts == 0], before[name][counts == 0]), name
        assert (table != before[name])[counts > 0].any(dim=1).all(), name
