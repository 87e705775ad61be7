"""Is what is told of a token what the layers did with it?"""

import pytest
import torch

from sparsemix.evaluate.token_routing import TOLD_EXPERTS, routed_layers, token_routing
from sparsemix.generation import Sampling, generate
from sparsemix.layers import Ctx
from test_generation import model_of, prompt
from tiny import BLOCKS, DENSE, EXPERT_CHOICE, MH_MOE, MOE, PEER, block, mod

DEEP = [
    block(DENSE),
    mod(mod(block(MH_MOE), capacity=0.6), capacity=0.5),
    mod(block(EXPERT_CHOICE), sampling="router_bce"),
    block(mod(DENSE, sampling="router_bce")),
]


def told(model, tokens, row=0):
    return token_routing(model, tokens, model(tokens, Ctx(causal=True, picks=True)).aux.stats, row)


def test_the_routed_layers_are_named_with_their_block_and_experts():
    layers = [(x["path"], x["kind"], x["block"], x["experts"]) for x in routed_layers(model_of(DEEP))]
    assert layers == [
        ("blocks.1", "mod", 1, None),
        ("blocks.1.inner", "mod", 1, None),
        ("blocks.1.inner.inner.ffn.inner", "moe", 1, 4),
        ("blocks.2", "mod", 2, None),
        ("blocks.2.inner.ffn", "expert_choice", 2, 4),
        ("blocks.3.ffn", "mod", 3, None),
    ]


def test_a_block_counts_unless_mixture_of_depths_took_the_token_past_it():
    model, tokens = model_of(DEEP), prompt(40, 2)
    for row in (0, 1):
        tokens_told = told(model, tokens, row)
        for token in tokens_told:
            layers = token["layers"]
            through = layers["blocks.1"]["routed"] and layers["blocks.1.inner"]["routed"]
            # Blocks 0 and 3 see every token: in block 3 only the feed-forward is routed.
            assert token["blocks"] == 2 + through + layers["blocks.2"]["routed"]
            assert ("blocks.1.inner" in layers) == layers["blocks.1"]["routed"]
            assert ("blocks.1.inner.inner.ffn.inner" in layers) == through
            assert ("blocks.2.inner.ffn" in layers) == layers["blocks.2"]["routed"]
        assert len({token["blocks"] for token in tokens_told}) == 3


def test_without_routing_every_block_processes_every_token():
    assert told(model_of(BLOCKS["dense"]), prompt(5)) == [{"blocks": 2, "layers": {}}] * 5


@pytest.mark.parametrize("name", ["moe", "peer", "pkm", "mh_moe", "expert_choice", "mode"])
def test_the_told_experts_are_the_largest_gates_of_each_sub_token(name):
    model, tokens = model_of(BLOCKS[name]), prompt(9)
    stats = model(tokens, Ctx(causal=True, picks=True)).aux.stats
    (path,) = (x["path"] for x in routed_layers(model) if x["block"] == 1)
    ids, gates = stats[f"{path}.expert_ids"], stats[f"{path}.gates"].float()
    parts = len(ids) // 9
    for t, token in enumerate(token_routing(model, tokens, stats)):
        said = token["layers"][path]
        assert len(said["experts"]) == len(said["others"]) == parts
        for j, shown in enumerate(said["experts"]):
            total = {}
            for e, gate in zip(ids[t * parts + j].tolist(), gates[t * parts + j].tolist(), strict=True):
                if e >= 0:
                    total[e] = total.get(e, 0.0) + gate
            best = sorted(total, key=lambda e: -total[e])[:TOLD_EXPERTS]
            assert [e for e, _ in shown] == best
            assert [gate for _, gate in shown] == pytest.approx([total[e] for e in best])
            assert said["others"][j] == len(total) - len(best)


def test_decoding_tells_of_every_token_what_the_full_forward_tells():
    model, tokens = model_of([block(DENSE), mod(block(PEER)), block(MOE)]), prompt(7)
    steps = list(generate(model, tokens, 8, Sampling(), chunk=3, picks=True))
    reads = [read for step in steps for read in step.read]
    got = [token for read in reads for token in token_routing(model, read.tokens, read.stats)]
    wanted = told(model, torch.cat([read.tokens for read in reads], 1))
    assert len(got) == len(wanted) == 14
    for mine, full in zip(got, wanted, strict=True):
        assert mine["blocks"] == full["blocks"] and set(mine["layers"]) == set(full["layers"])
        for path, said in full["layers"].items():
            if "experts" in said:
                assert [[e for e, _ in part] for part in mine["layers"][path]["experts"]] == [
                    [e for e, _ in part] for part in said["experts"]
                ]
            else:
                assert mine["layers"][path] == pytest.approx(said)


def test_the_gate_is_that_of_the_settings():
    model, tokens = model_of([block(DENSE), mod(block(DENSE), gate="two_sigmoid")]), prompt(6)
    for token in told(model, tokens):
        said = token["layers"]["blocks.1"]
        assert said["gate"] == pytest.approx(2 / (1 + 2.718281828 ** -said["score"]), rel=1e-5)
        assert said["routed"] == (said["guess"] > 0)
