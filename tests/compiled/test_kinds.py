"""Every registered kind trains as one graph and equals the eager layer."""

import pytest
import torch
from cases import BASES, EXPERT_CHOICE, MODE, MOE, build
from mod_steps import step, train_steps
from torch._dynamo.testing import CompileCounter

CASES = BASES | {
    "moe_first_picks": MOE | {"z_weight": 0.1, "balance_picks": "first"},
    "moe_capacity_and_bias": MOE | {"capacity_factor": 0.6, "bias_rate": 0.1, "shared_d_ff": 4},
    "expert_choice_batch": EXPERT_CHOICE | {"group": "batch"},
    "mode_choice": MODE | {"routing": "expert_choice"},
    "mh_moe_ternary": BASES["mh_moe"] | {"precision": "ternary", "inner": MOE | {"precision": "ternary"}},
    **{f"{kind}_ternary": BASES[kind] | {"precision": "ternary"} for kind in ("attention", "dense", "moe", "mode")},
    "dense_warming_up": BASES["dense"] | {"precision": {"weights": "ternary", "warmup_steps": 4}},
}


@pytest.mark.parametrize("name", CASES)
def test_one_full_graph_trains_a_layer_of_every_kind(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    mine, wanted = (train_steps(build(CASES[name]), run, steps=3) for run in (compiled, step))
    assert counter.frame_count == 1
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
