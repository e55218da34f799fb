"""Section 3 of gsil.py: LOSSES by hand, gsil_loss and sft_loss. What they are good for:
tests/test_theory.py."""

import math

import pytest
import torch
from helpers import made_pairs, naive_logp

import gsil

STEP_0 = {  # h+ = h- = shift, where every run begins: at shift 0 and at the official 2, worked out on paper
    "logistic": (2 * math.log(2), 2.2539),
    "hinge": (2.0, 3.0),
    "brier": (0.5, 0.7900),
    "kliep": (1.0, 5.3891),
    "lsif": (-0.5, 19.9100),
    "spin": (math.log(2), math.log(2)),
}
BY_HAND = {  # h+ = 1.5, h- = -0.5
    "logistic": math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-0.5)),
    "hinge": 0.0 + 0.5,
    "brier": (1 / (1 + math.exp(-1.5)) - 1) ** 2 + (1 / (1 + math.exp(0.5))) ** 2,
    "kliep": -1.5 + math.exp(-0.5),
    "lsif": -math.exp(1.5) + math.exp(-1.0) / 2,
    "spin": math.log(1 + math.exp(-2.0)),
}


@pytest.mark.parametrize("loss", gsil.LOSSES)
def test_losses_by_hand(loss):
    """The sign or a factor wrong, and a run would still train: on another method."""
    for shift, expected in zip((0.0, 2.0), STEP_0[loss]):
        h = torch.tensor(shift)
        assert gsil.LOSSES[loss](h, h).item() == pytest.approx(expected, rel=1e-4)  # 5 digits above
    found = gsil.LOSSES[loss](torch.tensor(1.5), torch.tensor(-0.5)).item()
    assert found == pytest.approx(BY_HAND[loss], rel=1e-5)


@pytest.mark.parametrize("loss", gsil.LOSSES)
def test_every_loss_pulls_both_sides_apart(loss):
    """Demonstrations must become likelier and own responses rarer, for h from small to huge: an exponential
    that overflowed, or a gradient that died for a confused model, would stop the training."""
    values = [-0.9, 0.0, 0.9] if loss == "hinge" else [-30.0, -1.0, 0.0, 1.0, 4.0]
    for value in values:
        real = torch.tensor(value, requires_grad=True)
        generated = torch.tensor(value, requires_grad=True)
        gsil.LOSSES[loss](real, generated).backward()
        assert real.grad <= 0 <= generated.grad and math.isfinite(real.grad) and math.isfinite(generated.grad)
        if value > -30:
            assert real.grad < 0 < generated.grad
    for huge in (1e3, 1e6):
        assert gsil.LOSSES[loss](torch.tensor(-huge), torch.tensor(huge)).isfinite()


def test_the_loss_sees_scale_times_log_ratio_plus_shift(model):
    """Without the scale in h the policy would still learn, to another strength than --scale names; with the
    sides exchanged, or without the reference, it would learn something else."""
    pairs = made_pairs(model, 3)
    for n, pair in enumerate(pairs):  # pretend the policy has moved by d = n + 1 and d = -1
        pair["real_reference"] -= n + 1
        pair["generated_reference"] += 1
    losses, found = gsil.gsil_loss(model, pairs, "logistic", 0.3, torch.tensor(0.5))
    rounding = 1e-4  # of sums of log-probs of about 40 nats
    assert found["log_ratio_real"].tolist() == pytest.approx([1, 2, 3], abs=rounding)
    assert found["log_ratio_generated"].tolist() == pytest.approx([-1, -1, -1], abs=rounding)
    assert found["shift"].tolist() == [0.5] * 3
    for n, loss in enumerate(losses.tolist()):
        h_real = 0.3 * (n + 1) + 0.5
        h_generated = 0.3 * -1 + 0.5
        by_hand = math.log(1 + math.exp(-h_real)) + math.log(1 + math.exp(h_generated))
        assert loss == pytest.approx(by_hand, abs=rounding)


def test_ties_count_half_in_told_apart(model, monkeypatch):
    """At step 0 all pairs tie: 0 % or 100 % told apart, where nothing is known, would be a lie."""
    logps = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0, 2.0])  # of three demonstrations, three own responses
    monkeypatch.setattr(gsil, "response_logps", lambda *_: logps)
    pair = {"prompt_ids": [5], "real_ids": [6], "generated_ids": [7]}
    pair |= {"real_reference": 0.0, "generated_reference": 0.0}
    _, found = gsil.gsil_loss(model, [pair] * 3, "logistic", 0.3, torch.tensor(0.0))
    assert found["told_apart"].tolist() == [0, 0.5, 1]


def test_the_gradient_is_that_of_the_policy(model):
    """pi_t stands still during a round: a reference with a gradient would cancel the policy's, and without
    the policy's nothing would be trained."""
    pairs = made_pairs(model, 3)
    _, found = gsil.gsil_loss(model, pairs, "logistic", 0.3, torch.tensor(0.0))
    logps = gsil.response_logps(model, [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs])
    weight = model.lm_head.weight
    [ours] = torch.autograd.grad(found["log_ratio_real"].sum(), weight, retain_graph=True)
    [expected] = torch.autograd.grad(logps.sum(), weight)
    assert expected.abs().max() > 0
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()  # other batches, other sums


def test_sft_loss_is_cross_entropy(model):
    """Over the mean length it is, on average, the mean over tokens that SFT usually minimises."""
    pairs = made_pairs(model, 4)
    tokens = sum(len(pair["real_ids"]) for pair in pairs)
    nats = -sum(naive_logp(model, pair["prompt_ids"], pair["real_ids"]) for pair in pairs)
    losses, metrics = gsil.sft_loss(model, pairs, tokens / 4)
    assert losses.mean().item() == pytest.approx(nats / tokens, rel=1e-5) and metrics == {}
