"""The losses that keep experts in use, by hand-made numbers."""

import pytest
import torch
from torch.nn import functional as F

from sparsemix.layers.router import Route, balance_loss, route, z_loss

# Four tokens, three experts: probabilities, and what each token picks, best first.
PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.5, 0.3, 0.2]], dtype=torch.float64)
PICKS = [[0, 1], [0, 2], [1, 2], [0, 1]]
MEAN = [0.5, 0.275, 0.225]


def routed(top_k=2, normalize=False, bias=None):
    return route(PROBS.log().requires_grad_(), top_k, normalize, bias)


def test_the_picks_are_the_largest_probabilities_best_first():
    assert routed().expert_ids.tolist() == PICKS
    torch.testing.assert_close(routed().gates, PROBS.gather(1, torch.tensor(PICKS)), rtol=0, atol=1e-15)


def test_balance_over_all_picks():
    # Expert 0 has 3 of 8 picks, expert 1 has 3, expert 2 has 2.
    wanted = 3 * (3 / 8 * MEAN[0] + 3 / 8 * MEAN[1] + 2 / 8 * MEAN[2])
    assert float(balance_loss(routed(), None).detach()) == pytest.approx(wanted, abs=1e-14)


def test_balance_over_first_picks():
    # First choices: three tokens on expert 0, one on expert 1.
    wanted = 3 * (3 / 4 * MEAN[0] + 1 / 4 * MEAN[1])
    assert float(balance_loss(routed(), None, "first").detach()) == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("picks", ["all", "first"])
def test_padding_is_no_token_of_the_balance_loss(picks):
    valid = torch.tensor([True, False, True, True])
    kept = Route(*(field[valid] for field in routed()))
    torch.testing.assert_close(
        balance_loss(routed(), valid, picks), balance_loss(kept, None, picks), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(z_loss(routed(), valid), z_loss(kept, None), rtol=0, atol=1e-14)


@pytest.mark.parametrize("picks", ["all", "first"])
def test_the_balance_loss_takes_one_softmax_of_the_logits(picks):
    r = routed()
    once = balance_loss(r, None, picks)
    twice = balance_loss(r._replace(probs=r.probs.softmax(-1)), None, picks)
    torch.testing.assert_close(r.probs, PROBS, rtol=0, atol=1e-15)
    assert abs(float((once - twice).detach())) > 1e-2


@pytest.mark.parametrize("picks", ["all", "first"])
def test_the_balance_gradient_flows_through_the_mean_probability_alone(picks):
    logits = PROBS.log().requires_grad_()
    (grad,) = torch.autograd.grad(balance_loss(route(logits, 2, True), None, picks), logits)
    f = torch.tensor([3, 3, 2] if picks == "all" else [3, 1, 0]).double()
    f = f / f.sum()
    # d/dz_e of E sum f_j p_j / N is E p_e (f_e - sum_j f_j p_j) / N.
    wanted = 3 * PROBS * (f - PROBS @ f[:, None]) / 4
    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("picks", ["all", "first"])
def test_counts_that_are_known_already_change_nothing(picks):
    counts = torch.bincount(routed().expert_ids.flatten(), minlength=routed().probs.shape[1]).double()
    assert torch.equal(balance_loss(routed(), None, picks, counts), balance_loss(routed(), None, picks))


@pytest.mark.parametrize("loss", [balance_loss, lambda r, valid: balance_loss(r, valid, "first"), z_loss])
def test_the_losses_gradients_are_their_finite_differences(loss):
    valid = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda z: loss(route(z, 2, False), valid), PROBS.log().requires_grad_())


def test_the_balance_loss_does_not_care_how_tokens_lie_in_rows():
    logits = torch.randn(6, 5, 4, dtype=torch.float64)
    shuffled = logits.flatten(0, 1)[torch.randperm(30)]
    a, b = (balance_loss(route(z, 2, False), None) for z in (logits.flatten(0, 1), shuffled))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_the_z_loss_is_the_mean_squared_log_sum_exp():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    wanted = (torch.tensor(2.0, dtype=torch.float64).log() ** 2 + (3 + torch.tensor(2.0).double().log()) ** 2) / 2
    torch.testing.assert_close(z_loss(route(logits, 1, False), None), wanted, rtol=0, atol=1e-14)


def test_a_bias_moves_the_choice_and_its_order_but_no_gate_and_no_loss_probability():
    r = routed(bias=torch.tensor([0.0, 0.0, 0.45]))
    assert r.expert_ids.tolist() == [[0, 2], [2, 0], [2, 1], [2, 0]]
    torch.testing.assert_close(r.gates, PROBS.gather(1, r.expert_ids), rtol=0, atol=1e-15)
    torch.testing.assert_close(r.probs, PROBS, rtol=0, atol=1e-15)
    assert torch.autograd.grad(r.gates.sum(), r.logits)[0].abs().max() > 0


def test_even_routing_has_balance_loss_one_and_collapse_has_its_maximum():
    E = 6
    even = route(5 * torch.eye(E, dtype=torch.float64), 1, False)
    assert float(balance_loss(even, None)) == pytest.approx(1, abs=1e-12)
    collapsed = 5 * torch.eye(E, dtype=torch.float64)[3:4].expand(7, E)
    wanted = E * float(F.softmax(collapsed[0], 0)[3])
    assert float(balance_loss(route(collapsed, 1, False), None)) == pytest.approx(wanted, abs=1e-11)
