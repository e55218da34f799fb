"""Section 1 of gsil.py: sample. A response is the model's own, whatever shares the batch with it."""

import pytest
import torch
from conftest import tiny_model
from helpers import EOS, PROMPTS, greedy, random_model

import gsil

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
MODELS = {  # what the layers of a model type keep of a text differs
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 7},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_rms_norm": True, "mamba_chunk_size": 8} | MAMBA,
    "qwen3_5_text": {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    | LINEAR,
}


@pytest.mark.parametrize("kind", MODELS)
def test_responses_are_those_of_each_prompt_alone(kind):
    """Padding, the cache or rows that end early would give another model's responses."""
    model = random_model(kind, **MODELS[kind])
    prompts = [[3 + (7 * n + 5 * k) % 90 for k in range(n)] for n in (1, 2, 5, 9, 9, 13)]
    whole = [greedy(model, prompt, 12, set()) for prompt in prompts]
    ends = {whole[0][4], whole[3][1], whole[5][7]}  # some rows end early, at several places
    expected = [greedy(model, prompt, 12, ends) for prompt in prompts]
    assert len({len(response) for response in expected}) >= 3
    for batch_size, cap in ((1, 12), (4, 12), (6, 3)):
        found = gsil.sample(model, prompts, ends, cap, 0, batch_size, "")
        assert found == [response[:cap] for response in expected]


@pytest.mark.parametrize("temperature", [1, 2])
def test_samples_follow_the_models_plain_softmax(temperature):
    """With the top-k, temperature or penalty that a model ships, y- would not come from pi_t."""
    model = tiny_model(vocabulary=8, seed=1)
    shipped = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "do_sample": True}
    model.generation_config.update(**shipped)
    found = gsil.sample(model, [[5, 6]] * 4000, set(), 1, temperature, 4000, "a")
    shares = torch.bincount(torch.tensor(found)[:, 0], minlength=8) / 4000
    expected = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    assert (shares - expected).abs().max() < 0.03  # four standard errors of a share out of 4000


def test_the_seed_decides_the_samples(model, monkeypatch):
    """A resumed run would sample other negatives, or every batch the same ones."""
    entered, enter = [], torch.autocast.__enter__  # for each token it would cast all weights to bf16 again
    monkeypatch.setattr(torch.autocast, "__enter__", lambda self: entered.append(1) or enter(self))
    first = gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 1")
    assert len(entered) == 2  # once for each batch
    torch.rand(3)  # what ran before must not matter
    assert gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 1") == first
    assert gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 2") != first
    drawn = gsil.sample(model, [[5, 6]] * 4, set(), 8, 1, 2, "0 round 1")  # two batches of equal prompts
    assert len({tuple(response) for response in drawn}) == 4


def test_a_model_whose_logits_are_nan_does_not_answer(capsys):
    """The argmax of NaNs is token 0, which would silently pass for a response."""
    sick = tiny_model()
    sick.lm_head.weight.data[7] = float("nan")
    with pytest.raises(SystemExit) as stop:
        gsil.sample(sick, [[5]], {EOS}, 3, 0, 1, "")
    assert stop.value.code == 2 and "logits are NaN" in capsys.readouterr().err
