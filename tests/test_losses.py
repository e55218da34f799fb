"""Section 3 of gsil.py: gsil_loss and sft_loss. LOSSES themselves: tests/test_theory.py."""

import math

import pytest
import torch
from helpers import made_pairs, naive_logp

import gsil


def test_gsil_loss_by_hand(model):
    """Exchanged sides, a missing reference or scale, or a tie that is counted as told apart would all train."""
    d_real, d_generated = [3.0, 1.0, -2.0], [1.0, 1.0, 1.5]
    sides = {"real": ([6], d_real), "generated": ([8], d_generated)}
    pairs = [{"prompt_ids": [5], "real_ids": [6], "generated_ids": [8]} for _ in d_real]
    for side, (response, log_ratios) in sides.items():
        logp = gsil.score(model, [([5], response)] * 6, 4096)[0]  # (as in the loss, so that a tie is one)
        assert logp == pytest.approx(naive_logp(model, [5], response), abs=1e-4)
        for pair, log_ratio in zip(pairs, log_ratios):
            pair[f"{side}_reference"] = logp - log_ratio
    losses, found = gsil.gsil_loss(model, pairs, "logistic", 0.3, torch.tensor(0.5))
    close = {"rel": 1e-5, "abs": 1e-5}  # float32 rounds log-probs of about 10 nats to 1e-6
    assert found["d_real"].tolist() == pytest.approx(d_real, **close)
    assert found["d_generated"].tolist() == pytest.approx(d_generated, **close)
    assert found["shift"].tolist() == [0.5] * 3
    assert found["told_apart"].tolist()[::2] == [1, 0]
    for loss, real, generated in zip(losses.tolist(), d_real, d_generated):
        h_real = 0.3 * real + 0.5
        h_generated = 0.3 * generated + 0.5
        by_hand = math.log(1 + math.exp(-h_real)) + math.log(1 + math.exp(h_generated))
        assert loss == pytest.approx(by_hand, **close)


def test_equal_responses_tie(model):
    """Told apart would count 0 or 1 where nothing differs, as in a model that copies its demonstrations."""
    [pair] = made_pairs(model, 1)
    pair |= {"generated_ids": pair["real_ids"], "generated_reference": pair["real_reference"]}
    _, found = gsil.gsil_loss(model, [pair], "logistic", 1.0, torch.tensor(0.0))
    assert found["told_apart"].tolist() == [0.5]


def test_sft_loss_is_cross_entropy(model):
    """Another divisor than the mean length would make it another mean than the one over tokens."""
    pairs = made_pairs(model, 4)
    tokens = sum(len(pair["real_ids"]) for pair in pairs)
    nats = -sum(naive_logp(model, pair["prompt_ids"], pair["real_ids"]) for pair in pairs)
    losses, metrics = gsil.sft_loss(model, pairs, tokens / 4)
    assert losses.mean().item() == pytest.approx(nats / tokens, rel=1e-5) and metrics == {}
