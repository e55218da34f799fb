"""Section 2 of gsil.py: response_logps and score, and the batches they and training make."""

import copy
import re

import pytest
import torch
from conftest import tiny_model
from helpers import PAIRS, gradient, naive_logp, relative

import gsil

ROUNDING = 1e-4  # of a sum of a few float32 log-softmaxes of about 5 nats: 1e-6 relative, and room


def test_logps_equal_a_naive_loop_for_any_batch(model):
    """Off-by-one targets, a lost EOS, or pads that leak into a row would all change these sums."""
    expected = [naive_logp(model, prompt, response) for prompt, response in PAIRS]
    assert gsil.response_logps(model, PAIRS).tolist() == pytest.approx(expected, abs=ROUNDING)
    assert gsil.response_logps(model, PAIRS[::-1]).tolist() == pytest.approx(expected[::-1], abs=ROUNDING)
    for pair, value in zip(PAIRS, expected):  # without another prompt beside it
        assert gsil.response_logps(model, [pair]).item() == pytest.approx(value, abs=ROUNDING)
    for max_tokens in (1, 12, 1000):  # one text at a time, two, all
        assert gsil.score(model, PAIRS, max_tokens) == pytest.approx(expected, abs=ROUNDING)


def test_logps_leave_their_inputs_alone(model):
    """A list extended in place would change the next epoch's data."""
    pairs = copy.deepcopy(PAIRS)
    gsil.response_logps(model, pairs)
    assert pairs == PAIRS


def test_no_gradient_into_prompt_positions_or_pads():
    """Only logits that predict a response token may be trained; else the model also learns to write
    prompts."""

    class Fake(torch.nn.Module):
        device = torch.device("cpu")
        logits = torch.randn(3, 11, 30, requires_grad=True)

        def forward(self, input_ids, use_cache, logits_to_keep):
            return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})

    fake = Fake()
    gsil.response_logps(fake, PAIRS).sum().backward()
    touched = fake.logits.grad.abs().sum(-1) > 0  # (B, T): position t predicts token t + 1
    for row, (prompt, response) in zip(touched.tolist(), PAIRS):
        first = len(prompt) - 1
        last = len(prompt) + len(response) - 2
        assert [t for t, is_touched in enumerate(row) if is_touched] == list(range(first, last + 1))


def test_logps_are_computed_in_float32():
    """A sum of bf16 log-probs would be off by whole nats, and with it every log-ratio."""
    assert gsil.response_logps(tiny_model().bfloat16(), PAIRS).dtype == torch.float32


def test_batches_do_what_the_docstring_shows():
    """The literal example is what readers rely on; a batch that grew beyond its limits would run out of
    memory."""
    shown = re.search(r"(\[\d.*?\]), (\d) items -> their indices (\[\[.*?\]\])", gsil.batches.__doc__)
    lengths, items, expected = (eval(part) for part in shown.groups())
    assert gsil.batches(lengths, items) == expected == [[2, 0], [1]]
    found = gsil.batches([4, 9, 1, 4, 30, 2, 7], max_tokens=12)
    assert found == [[2, 5, 0], [3], [6], [1], [4]]  # 3 texts of at most 4, ..., one that is too long alone


def test_pad_does_what_its_docstring_shows():
    """Left for sampling, where the last column is the next token's; right for scoring."""
    assert gsil.pad([[5, 6], [7]], "right", "cpu").tolist() == [[5, 6], [7, 0]]
    assert gsil.pad([[5, 6], [7]], "left", "cpu").tolist() == [[5, 6], [0, 7]]


def test_checkpointed_activations_change_no_gradient():
    """They are computed a second time, by the same layers, or the gradient is another model's. transformers'
    own switch does nothing in evaluation mode: the count shows that ours does."""
    gradients = []
    for flags in ([], ["--checkpoint-activations"]):
        model = tiny_model()
        gsil.prepare(model, gsil.parse_args(flags))
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        gsil.response_logps(model, PAIRS).sum().backward()
        assert len(calls) == (2 if flags else 1)
        gradients.append(gradient(model))
    assert relative(*gradients) < 1e-5  # the same sums, perhaps by other threads
