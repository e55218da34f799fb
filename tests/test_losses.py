"""Section 3 of gsil.py: gsil_loss and sft_loss. LOSSES themselves: tests/test_theory.py."""

import math

import pytest
import torch
from helpers import made_pairs, naive_logp

import gsil


def test_gsil_loss_by_hand(monkeypatch):
    """h = scale * d + shift: without the scale the policy would still learn, to another strength than --scale
    names; with the sides exchanged, or without the reference, something else. Ties count half: at step 0 all
    pairs tie, and 0 % or 100 % told apart, where nothing is known, would be a lie."""
    logps = {6: -13.0, 8: -8.0}  # of the responses [6] and [8]
    fake = lambda model, texts: torch.tensor([logps[response[0]] for _, response in texts])
    monkeypatch.setattr(gsil, "response_logps", fake)
    d_real = [3.0, 1.0, -2.0]
    d_generated = [1.0, 1.0, 1.5]
    pairs = [{"prompt_ids": [5], "real_ids": [6], "generated_ids": [8]} for _ in d_real]
    for pair, real, generated in zip(pairs, d_real, d_generated):
        pair |= {"real_reference": -13.0 - real, "generated_reference": -8.0 - generated}
    losses, found = gsil.gsil_loss(None, pairs, "logistic", 0.3, torch.tensor(0.5))
    metrics = {name: values.tolist() for name, values in found.items()}
    expected = {"log_ratio_real": d_real, "log_ratio_generated": d_generated}
    assert metrics == expected | {"told_apart": [1, 0.5, 0], "shift": [0.5] * 3}
    for loss, real, generated in zip(losses.tolist(), d_real, d_generated):
        h_real = 0.3 * real + 0.5
        h_generated = 0.3 * generated + 0.5
        by_hand = math.log(1 + math.exp(-h_real)) + math.log(1 + math.exp(h_generated))
        assert loss == pytest.approx(by_hand, rel=1e-5)


def test_sft_loss_is_cross_entropy(model):
    """Over the mean length it is, on average, the mean over tokens that SFT usually minimises."""
    pairs = made_pairs(model, 4)
    tokens = sum(len(pair["real_ids"]) for pair in pairs)
    nats = -sum(naive_logp(model, pair["prompt_ids"], pair["real_ids"]) for pair in pairs)
    losses, metrics = gsil.sft_loss(model, pairs, tokens / 4)
    assert losses.mean().item() == pytest.approx(nats / tokens, rel=1e-5) and metrics == {}
