"""eval.py: responses and log-likelihoods of many kinds of models and tokenizers, alone and in batches."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import byte_tokenizer, tiny_model
from eval_tools import ARC_ROW, GSM_ROW, fails, policy_of, run, write_jsonl
from helpers import naive_logp

import eval as ev

SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
KINDS = {  # learned, rotary and ALiBi positions; windows shorter than the context; other states than keys
    "GPT2": {},
    "Bloom": {},
    "Gemma2": {"sliding_window": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


def build_model(kind, more):
    """A random model whose next tokens are far from uniform, so that a state or position off shows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in (weight for weight in model.parameters() if weight.dim() == 2):
        torch.nn.init.normal_(weight, std=0.15)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_in_batches_as_alone(kind):
    """A plain loop over tokens has no pads, no neighbours and no cache: nothing of them may leak."""
    policy, rng = policy_of(build_model(kind, KINDS[kind]), byte_tokenizer()), random.Random(0)
    prompts = [rng.choices(range(3, 250), k=n) for n in (3, 12, 12, 30, 7)]
    for prompt, (text, was_cut) in zip(prompts, ev.generate(policy, prompts, [], 8, 0, 3), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] != 1:
            with torch.no_grad():
                ids.append(policy.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert text == policy.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert was_cut == (ids[-1] != 1)
    pairs = [(prompt, rng.choices(range(3, 250), k=k)) for prompt in prompts[2:] for k in (1, 5, 3)]
    for (context, rest), value in zip(pairs, ev.loglikelihoods(policy, pairs), strict=True):
        # sums of float32 in another order
        assert value == pytest.approx(naive_logp(policy.model, context, rest), rel=1e-4)


def test_one_context_is_read_once():
    """What makes it fast: a problem whose choices are letters costs one forward pass, not four."""
    policy, passes = policy_of(tiny_model()), []
    policy.model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    for choices in [[5], [6], [7], [8]], [[5], [6, 7], [9, 8, 7]]:
        ev.loglikelihoods(policy, [([3] * 50, choice) for choice in choices])
    assert passes == [(1, 50), (1, 50), (3, 2)]


def save(folder, model=None, **changes):
    """A folder with a model and the tokenizer, changed so."""
    (model or tiny_model()).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_models_without_keys_and_values_are_refused(tmp_path, capsys):
    """Pads would change Mamba's states, and transformers' RWKV mixes the rows of a batch up."""
    for kind, more in ("Mamba", {"state_size": 8}), ("Rwkv", {"attention_hidden_size": 32}):
        folder = save(tmp_path / kind, build_model(kind, more))
        fails(capsys, f"--model {folder} --limit 1", kind.lower(), "no cache")


def test_models_that_cannot_be_asked(tmp_path, capsys):
    """NaN's argmax is token 0, which would be scored as an answer, in truthfulqa_mc1 as 100 %; a choice longer
    than the window cannot be scored; without a template --chat would ask in another format; without EOS
    nothing could end."""
    gsm = f"--data {write_jsonl(tmp_path / 'gsm.jsonl', [GSM_ROW])} --max-new-tokens 4"
    endless = ARC_ROW | {"choices": {"text": ["a", "a" * 300], "label": ["A", "B"]}}
    arc = f"--tasks arc_easy --data {write_jsonl(tmp_path / 'arc.jsonl', [endless])}"
    fails(capsys, f"--model {save(tmp_path / 'good')} {arc}", "301 tokens", "256", "aaa")
    model = save(tmp_path / "untemplated", chat_template=None)
    fails(capsys, f"--model {model} --tasks gsm8k --chat --shots 0 {gsm}", "chat template")
    fails(capsys, f"--model {model} {gsm}", "chat template")
    fails(capsys, f"--model {save(tmp_path / 'endless', eos_token=None, pad_token=None)} {gsm}", "EOS")
    broken = tiny_model()
    broken.lm_head.weight.data[5, 0] = math.nan
    model = save(tmp_path / "broken", broken)
    fails(capsys, f"--model {model} {gsm}", "NaN", "answers")
    write_jsonl(tmp_path / "arc.jsonl", [ARC_ROW])
    fails(capsys, f"--model {model} {arc}", "NaN", "arc_easy")


def responses_of(folder, flags=""):
    rows = write_jsonl(folder / "rows.jsonl", [GSM_ROW | {"question": "?" * n} for n in (1, 9, 4)])
    outcome = run(f"--model {folder} --tasks gsm8k --shots 0 --data {rows} --max-new-tokens 9 {flags}")
    return [sample["responses"] for sample in outcome["samples"]["gsm8k"]]


def test_how_a_tokenizer_pads_changes_nothing(tmp_path):
    """Prompts are padded on the left whatever it says, and without a pad token EOS stands in. Stop strings of
    the model's own stop: transformers' generate would refuse them."""
    alone = responses_of(save(tmp_path), "--batch-size 1")
    assert len(alone[0][0]) > 1
    for change in {}, {"padding_side": "left"}, {"padding_side": "right"}, {"pad_token": None}:
        assert responses_of(save(tmp_path, **change)) == alone
    model, stop = tiny_model(), alone[0][0][3]
    model.generation_config.stop_strings = [stop]
    assert responses_of(save(tmp_path, model)) == [[text.split(stop)[0]] for [text] in alone]


def test_the_seed_decides_the_samples(tmp_path):
    """A result that cannot be had again is none."""
    flags = "--samples 3 --temperature 1 --seed"
    first, again, other = [responses_of(save(tmp_path), f"{flags} {seed}") for seed in (0, 0, 1)]
    assert first == again != other and all(len({*texts}) > 1 for texts in first)


@pytest.mark.parametrize("short", [0, 1])
def test_what_may_explain_a_result_is_counted(short, monkeypatch):
    """Beginnings that were not read, from the first token on; silence; responses cut. A problem's score is the
    mean of its samples."""
    monkeypatch.setattr(ev, "loglikelihoods", lambda *_: [0.0, 0.0])
    said = [("", False), (" \n", True), ("#### 2", True), ("2", False)]
    monkeypatch.setattr(ev, "generate", lambda *_: said)
    args = ev.parse_args(["--samples", "4", "--temperature", "1", "--max-new-tokens", "9"])
    policy = policy_of(tiny_model(), byte_tokenizer(), len("Question: Which?\nAnswer: b") - 1 - short)
    (sample,) = ev.choose("arc_easy", ev.TASKS["arc_easy"], [ev.read_arc(ARC_ROW)], [[]], policy, args)
    assert sample["truncated"] == bool(short)
    policy = policy._replace(window=len("Question: 1+1?\nAnswer:") + 9 - short)
    (sample,) = ev.respond("gsm8k", ev.TASKS["gsm8k"], [ev.read_gsm8k(GSM_ROW)], [[]], policy, args)
    assert (sample["truncated"], sample["empty"], sample["unfinished"]) == (bool(short), 2, 2)
    assert sample["metrics"] == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}


def test_windows():
    """lm_eval's order; a longrope model's is the one up to which its numbers depend on no other row."""
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 44}
    for config, window in [
        ({"n_positions": 11}, 11),
        ({"max_position_embeddings": 22}, 22),
        ({"text_config": SimpleNamespace(max_position_embeddings=33)}, 33),
        ({"max_position_embeddings": 512, "rope_parameters": longrope}, 44),
        ({}, 77),
    ]:
        assert ev.find_window(SimpleNamespace(**config), SimpleNamespace(model_max_length=77)) == window
    assert ev.find_window(SimpleNamespace(), SimpleNamespace(model_max_length=int(1e30))) is None
