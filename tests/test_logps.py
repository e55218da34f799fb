"""Section 2 of gsil.py: response_logps and score, and the batches they and training make."""

import copy

import pytest
import torch
from conftest import tiny_model
from helpers import PAIRS, gradient, naive_logp, relative

import gsil


def test_logps_equal_a_naive_loop_for_any_batch(model):
    """A shifted target, a lost EOS, pads or prompts in the sum, or a sum in bf16 would spoil every log-ratio."""
    before = copy.deepcopy(PAIRS)
    # float32 rounds sums of up to 40 nats to about 1e-5
    expected = pytest.approx([naive_logp(model, prompt, response) for prompt, response in PAIRS], abs=1e-4)
    assert gsil.response_logps(model, PAIRS).tolist() == expected
    assert gsil.response_logps(model, PAIRS[::-1]).tolist()[::-1] == expected
    assert [gsil.response_logps(model, [pair]).item() for pair in PAIRS] == expected  # without neighbours
    for max_tokens in (1, 12, 1000):  # one text at a time, two, all
        assert gsil.score(model, PAIRS, max_tokens) == expected
    assert PAIRS == before
    assert gsil.response_logps(tiny_model().bfloat16(), PAIRS).dtype == torch.float32


def test_batches_and_pad_do_what_their_docstrings_show():
    """A reader would be misled by the examples, and a batch beyond its limits would run out of memory."""
    assert gsil.batches([3, 9, 2], 2) == [[2, 0], [1]]
    found = gsil.batches([4, 9, 1, 4, 30, 2, 7], max_tokens=12)
    assert found == [[2, 5, 0], [3], [6], [1], [4]]  # 3 texts of at most 4, ..., one that is too long alone
    assert gsil.pad([[5, 6], [7]], "right", "cpu").tolist() == [[5, 6], [7, 0]]
    assert gsil.pad([[5, 6], [7]], "left", "cpu").tolist() == [[5, 6], [0, 7]]


def test_checkpointed_activations_change_no_gradient(inputs):
    """The flag would save no memory, as transformers' own switch in evaluation mode, or train another model."""
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
