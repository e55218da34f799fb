"""Section 2 of gsil.py: response_logps and score, and the batches they and training make."""

import copy

import pytest
import torch
from conftest import tiny_model
from helpers import PAIRS, gradient, naive_logp, relative

import gsil


def test_logps_equal_a_naive_loop_for_any_batch(model):
    """Off-by-one targets, a lost EOS, or pads that leak into a row would all change these sums, and so would
    a list of ids that is extended in place; a sum in bf16 would be off by whole nats. Rounding: 1e-6 of a few
    log-softmaxes of about 5 nats, and room."""
    before = copy.deepcopy(PAIRS)
    expected = pytest.approx([naive_logp(model, prompt, response) for prompt, response in PAIRS], abs=1e-4)
    assert gsil.response_logps(model, PAIRS).tolist() == expected
    assert gsil.response_logps(model, PAIRS[::-1]).tolist()[::-1] == expected
    assert [gsil.response_logps(model, [pair]).item() for pair in PAIRS] == expected  # without neighbours
    for max_tokens in (1, 12, 1000):  # one text at a time, two, all
        assert gsil.score(model, PAIRS, max_tokens) == expected
    assert PAIRS == before
    assert gsil.response_logps(tiny_model().bfloat16(), PAIRS).dtype == torch.float32


def test_batches_and_pad_do_what_their_docstrings_show():
    """Readers rely on the examples; a batch that grew beyond its limits would run out of memory."""
    assert gsil.batches([3, 9, 2], 2) == [[2, 0], [1]]
    found = gsil.batches([4, 9, 1, 4, 30, 2, 7], max_tokens=12)
    assert found == [[2, 5, 0], [3], [6], [1], [4]]  # 3 texts of at most 4, ..., one that is too long alone
    assert gsil.pad([[5, 6], [7]], "right", "cpu").tolist() == [[5, 6], [7, 0]]
    assert gsil.pad([[5, 6], [7]], "left", "cpu").tolist() == [[5, 6], [0, 7]]


def test_checkpointed_activations_change_no_gradient():
    """They are computed a second time, by the same layers, or the gradient is another model's. transformers'
    own switch does nothing in evaluation mode: the count shows that ours does."""
    gradients = []
    calls = []
    for flags in ([], ["--checkpoint-activations"]):
        model = tiny_model()
        gsil.prepare(model, gsil.parse_args(flags))
        calls.clear()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        gsil.response_logps(model, PAIRS).sum().backward()
        assert len(calls) == (2 if flags else 1)
        gradients.append(gradient(model))
    assert relative(*gradients) < 1e-5  # the same sums, perhaps by other threads
