"""Sections 2 and 3 of gsil.py: log-probabilities, gsil_loss, sft_loss. LOSSES themselves: test_theory.py."""

import math

import pytest
import torch
from conftest import tiny_model
from helpers import PAIRS, gradient, made_pairs, naive_logp, relative

import gsil


def test_logps_equal_a_naive_loop_for_any_batch(model):
    """A shifted target, a lost EOS, pads or prompts in the sum would spoil every log-ratio."""
    # float32 rounds sums of up to 40 nats to about 1e-5
    expected = pytest.approx([naive_logp(model, prompt, response) for prompt, response in PAIRS], abs=1e-4)
    assert gsil.response_logps(model, PAIRS).tolist() == expected
    assert gsil.response_logps(model, PAIRS[::-1]).tolist()[::-1] == expected
    assert [gsil.response_logps(model, [pair]).item() for pair in PAIRS] == expected  # without neighbours
    for max_tokens in (1, 12, 1000):  # one text at a time, two, all
        assert gsil.score(model, PAIRS, max_tokens) == expected
    assert gsil.response_logps(tiny_model().bfloat16(), PAIRS).dtype == torch.float32


def test_batches_and_pad_do_what_their_docstrings_show():
    """A reader would be misled by the examples, or a batch run out of memory."""
    assert gsil.batches([3, 9, 2], 2) == [[2, 0], [1]]
    found = gsil.batches([4, 9, 1, 4, 30, 2, 7], max_tokens=12)
    assert found == [[2, 5, 0], [3], [6], [1], [4]]  # 3 texts of at most 4, ..., one that is too long alone
    assert gsil.pad([[5, 6], [7]], "right", "cpu").tolist() == [[5, 6], [7, 0]]
    assert gsil.pad([[5, 6], [7]], "left", "cpu").tolist() == [[5, 6], [0, 7]]


def test_checkpointed_activations_change_no_gradient(inputs):
    """The flag would save no memory, as transformers' own switch, or train another model."""
    gradients, calls = [], []
    for flags, passes in (("", 1), ("--checkpoint-activations", 2)):  # the second time for the gradient
        args = gsil.parse_args((inputs + flags).split())
        model = gsil.load_model(args.model, args)
        calls.clear()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        gsil.response_logps(model, PAIRS).sum().backward()
        assert len(calls) == passes
        gradients.append(gradient(model))
    assert relative(*gradients) < 1e-5  # the same sums, perhaps in another order


def test_gsil_loss_by_hand(model):
    """Exchanged sides, a missing reference or scale, or a tie that is told apart would train."""
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
    pairs[0] |= {
        "generated_ids": [6],
        "generated_reference": pairs[0]["real_reference"],
    }  # two equal responses
    assert gsil.gsil_loss(model, pairs[:1], "hinge", 1, torch.tensor(0.0))[1]["told_apart"].tolist() == [0.5]


def test_sft_loss_is_cross_entropy(model):
    """Another divisor than the mean length would make it another mean than the one over tokens."""
    pairs = made_pairs(model, 4)
    tokens = sum(len(pair["real_ids"]) for pair in pairs)
    nats = -sum(naive_logp(model, pair["prompt_ids"], pair["real_ids"]) for pair in pairs)
    losses, metrics = gsil.sft_loss(model, pairs, tokens / 4)
    assert losses.mean().item() == pytest.approx(nats / tokens, rel=1e-5) and metrics == {}
