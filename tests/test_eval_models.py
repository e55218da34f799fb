"""eval.py: responses and log-likelihoods of many kinds of models and tokenizers, alone and in batches."""

import math
import random

import pytest
import torch
import transformers
from conftest import byte_tokenizer, tiny_model
from eval_tools import ARC_ROW, GSM_ROW, fails, flags_of, oracle, policy_of, run, write_jsonl

import eval as ev

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
SIZES |= {
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
KINDS = {  # learned, rotary and ALiBi positions; windows shorter than the context; other states than keys
    "GPT2": {},
    "Bloom": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3_5Text": LINEAR,
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
}


def build_model(kind):
    """A random model whose next tokens are far from uniform, so that a state or position off shows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in (weight for weight in model.parameters() if weight.dim() == 2):
        torch.nn.init.normal_(weight, std=0.15)
    return model


def build(kind):
    return policy_of(build_model(kind), byte_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_responses_in_batches_are_those_of_each_prompt_alone(kind):
    """Alone, and by a plain loop without a cache, a prompt has no pads and no neighbours."""
    policy, rng = build(kind), random.Random(0)
    prompts = [[rng.randrange(3, 250) for _ in range(n)] for n in (3, 12, 12, 30, 7)]
    found = ev.generate(policy, prompts, ["zz"], 8, 0, 3)
    for prompt, (text, was_cut) in zip(prompts, found, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] != 1:
            with torch.no_grad():
                ids.append(policy.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        assert text == ev.cut(policy.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), ["zz"])
        assert was_cut == (ids[-1] != 1 and "zz" not in text)


@pytest.mark.parametrize("kind", KINDS)
def test_loglikelihoods_in_batches_are_those_of_each_text_alone(kind):
    """Choices go on from the cache of their context, or come with pads behind them: neither may leak."""
    policy, rng, pairs = build(kind), random.Random(0), []
    for n in (3, 20, 40):
        context = rng.choices(range(3, 250), k=n)
        pairs += [(context, rng.choices(range(3, 250), k=k)) for k in (1, 5, 3)]
    for (context, rest), value in zip(pairs, ev.loglikelihoods(policy, pairs), strict=True):
        with torch.no_grad():
            logps = policy.model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        expected = sum(logps[len(context) + t - 1, token].item() for t, token in enumerate(rest))
        assert value == pytest.approx(expected, rel=1e-4)  # sums of float32 in another order


def test_one_context_is_read_once():
    """What makes it fast: a problem whose choices are letters costs one forward pass, not four."""
    policy, passes = policy_of(tiny_model()), []
    policy.model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    context = list(range(10, 60))
    ev.loglikelihoods(policy, [(context, [letter]) for letter in (5, 6, 7, 8)])
    assert passes == [(1, 50)]
    ev.loglikelihoods(policy, [(context, [5, 6, 7]), (context, [5, 6]), (context, [9, 8, 7, 6])])
    assert passes[1:] == [(1, 50), (3, 3)]


@pytest.mark.parametrize(
    "kind, more",
    [("Mamba", {"state_size": 8}), ("Rwkv", {"attention_hidden_size": 32, "context_length": 256})],
)
def test_models_without_keys_and_values_are_refused(kind, more, tmp_path, capsys):
    """Pads would change Mamba's states, and transformers' RWKV mixes the rows of a batch up."""
    KINDS[kind] = more
    save(tmp_path, build_model(kind))
    fails(capsys, f"--model {tmp_path} --limit 1", kind.lower(), "no cache")


def test_samples_and_their_mean(models):
    """mean@n is a mean over all samples of all problems, and the seed decides them."""
    case = {"model": "A", "task": "gsm8k", "shots": 0}
    once, again, other = [
        run(flags_of(case, models, 8) + f" --samples 3 --temperature 1 --seed {seed}")["samples"]["gsm8k"]
        for seed in (0, 0, 1)
    ]
    assert once == again != other
    assert all(len(sample["responses"]) == 3 for sample in once)
    assert len({text for sample in once for text in sample["responses"]}) > 12
    responses = [["#### 2", "#### 3", "2", "#### 2"]]
    score = ev.score_answers(ev.TASKS["gsm8k"], [ev.read_gsm8k(GSM_ROW)], responses)[0]
    assert score["metrics"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}


def test_what_may_explain_a_result_is_counted(models, capsys):
    """Prompts that lost their examples, responses cut at the limit, or a model that says nothing."""
    result = run(flags_of(oracle.CASES["A gsm8k, every prompt cut"], models))["results"]["gsm8k"]
    assert result["truncated"] == result["n"] == 8 and "8 prompts lost" in capsys.readouterr().out
    empty = run(flags_of(oracle.CASES["A gsm8k 0 shots"], models) + " --max-new-tokens 1")["results"]["gsm8k"]
    assert empty["unfinished"] == 8 and "8 responses were cut at --max-new-tokens" in capsys.readouterr().out
    samples = [{"empty": n, "metrics": {"exact_match,x": 0.0}} for n in (1, 2)]
    assert ev.summarize(samples)["empty"] == 3


@pytest.mark.parametrize("short", [0, 1])
def test_truncation_is_counted_from_the_first_token_on(short, monkeypatch):
    """A count that starts a token late hides that the beginning of a prompt was never read."""
    monkeypatch.setattr(ev, "loglikelihoods", lambda *_: [0.0, 0.0])
    args = ev.parse_args(["--tasks", "arc_easy"])
    policy = policy_of(tiny_model(), byte_tokenizer(), len("Question: Which?\nAnswer: b") - 1 - short)
    (sample,) = ev.choose("arc_easy", ev.TASKS["arc_easy"], [ev.read_arc(ARC_ROW)], [[]], policy, args)
    assert sample["truncated"] == bool(short)


def save(folder, model=None, **changes):
    (model or tiny_model()).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_nan_logits_are_an_error(tmp_path, capsys):
    """argmax over NaN is token 0: fp16 overflow would be scored as an answer, and truthfulqa_mc1 as 100 %."""
    model = tiny_model()
    model.lm_head.weight.data[5, 0] = math.nan
    save(tmp_path, model)
    fails(capsys, f"--model {tmp_path} --limit 2 --max-new-tokens 4", "NaN", "answers")
    row = write_jsonl(tmp_path / "arc.jsonl", [ARC_ROW])
    fails(capsys, f"--model {tmp_path} --tasks arc_easy --data {row}", "NaN", "arc_easy")


def test_a_choice_longer_than_the_window(tmp_path, capsys):
    """It cannot be scored as a whole; lm_eval has a bare AssertionError for it."""
    endless = {"text": ["a", "a" * 300], "label": ["A", "B"]}
    row = write_jsonl(tmp_path / "arc.jsonl", [ARC_ROW | {"choices": endless}])
    fails(capsys, f"--model {save(tmp_path)} --tasks arc_easy --data {row}", "301 tokens", "256", "aaa")


def responses_of(folder, tmp_path, flags=""):
    rows = write_jsonl(tmp_path / "rows.jsonl", [GSM_ROW | {"question": "?" * n} for n in (1, 9, 4)])
    outcome = run(f"--model {folder} --tasks gsm8k --shots 0 --data {rows} --max-new-tokens 9 {flags}")
    return [sample["responses"] for sample in outcome["samples"]["gsm8k"]]


@pytest.mark.parametrize(
    "change", [{}, {"padding_side": "left"}, {"padding_side": "right"}, {"pad_token": None}]
)
def test_how_a_tokenizer_pads_changes_nothing(change, tmp_path):
    """Prompts are padded on the left whatever it says, and without a pad token EOS stands in."""
    folder = save(tmp_path / "model", **change)
    alone = responses_of(folder, tmp_path, "--batch-size 1")
    assert responses_of(folder, tmp_path) == alone and len(alone[0][0]) > 1


def test_stop_strings_of_the_model_stop(tmp_path):
    """transformers' generate refuses a generation config with them, unless it gets the tokenizer as well."""
    model = tiny_model()
    plain = responses_of(save(tmp_path / "plain", model), tmp_path)
    stop = plain[0][0][3]
    model.generation_config.stop_strings = [stop]
    assert responses_of(save(tmp_path / "stops", model), tmp_path) == [
        [text.split(stop)[0]] for [text] in plain
    ]


def test_windows():
    """lm_eval's order; a longrope model's is the one up to which its numbers depend on no other row."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    found = {}
    for name, config in {
        "GPT2": transformers.GPT2Config(n_positions=11),
        "Llama": transformers.LlamaConfig(max_position_embeddings=22),
        "inner": transformers.Gemma3Config(text_config={"max_position_embeddings": 33}),
        "tokenizer": transformers.BloomConfig(),
        "longrope": transformers.Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=512,
            original_max_position_embeddings=44,
            rope_parameters={
                "rope_type": "longrope",
                "long_factor": [2.0] * 4,
                "short_factor": [1.0] * 4,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 44,
            },
        ),
    }.items():
        found[name] = ev.find_window(config, tokenizer)
    assert found == {"GPT2": 11, "Llama": 22, "inner": 33, "tokenizer": 77, "longrope": 44}
    tokenizer.model_max_length = int(1e30)
    assert ev.find_window(transformers.BloomConfig(), tokenizer) is None


def test_no_template_and_no_eos(tmp_path, capsys):
    """Without a template --chat would silently ask in another format; without EOS nothing could end."""
    row = write_jsonl(tmp_path / "gsm8k.jsonl", [GSM_ROW])
    save(tmp_path, chat_template=None)
    fails(capsys, f"--model {tmp_path} --tasks gsm8k --chat --shots 0 --data {row}", "chat template")
    fails(capsys, f"--model {tmp_path}", "chat template")
    save(tmp_path, eos_token=None, pad_token=None)
    fails(capsys, f"--model {tmp_path} --tasks gsm8k --shots 0 --data {row}", "EOS")
