"""A training step compiles as one graph, whatever the routing does, and equals the eager one."""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from cases import EXPERT_CHOICE, MODE, MOE

KINDS = {
    "moe": MOE | {"z_weight": 0.1, "balance_picks": "first"},
    "moe_capacity_and_bias": MOE | {"capacity_factor": 0.6, "bias_rate": 0.1, "shared_d_ff": 4},
    "expert_choice": EXPERT_CHOICE,
    "expert_choice_batch": EXPERT_CHOICE | {"group": "batch"},
    "mode": MODE,
    "mode_choice": MODE | {"routing": "expert_choice"},
}


@lru_cache
def outcomes():
    program = Path(__file__).with_name("compiled_steps.py")
    done = subprocess.run([sys.executable, program, json.dumps(KINDS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_is_one_graph_and_never_compiles_again(name):
    assert outcomes()[name] is None
