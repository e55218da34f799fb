"""eval.py: responses and log-likelihoods of many kinds of models and tokenizers, alone and in batches."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ZEPHYR, byte_tokenizer, tiny_model
from helpers import (
    ARC_ROW,
    GSM_ROW,
    evaluate,
    greedy,
    lm_of,
    naive_logp,
    random_model,
    refused,
    save,
    write_jsonl,
)
from safetensors.torch import save_file

import eval as ev

# Learned, rotary and ALiBi positions; windows shorter than the context; other states than keys
KINDS = {
    "gpt2": {},
    "bloom": {},
    "gemma2": {"sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_in_batches_as_alone(kind):
    """Pads, neighbours in the batch or a cache could leak into a response."""
    lm, rng = lm_of(random_model(kind, **KINDS[kind]), byte_tokenizer()), random.Random(0)
    prompts = [rng.choices(range(3, 250), k=n) for n in (3, 12, 12, 30, 7)]
    for prompt, (text, was_cut) in zip(prompts, ev.generate(lm, prompts, [], 8, 0, 3), strict=True):
        ids = greedy(lm.model, prompt, 8, {1})
        assert text == lm.tokenizer.decode(ids, skip_special_tokens=True) and was_cut == (ids[-1] != 1)
    pairs = [(prompt, rng.choices(range(3, 250), k=k)) for prompt in prompts[2:] for k in (1, 5, 3)]
    for (context, rest), value in zip(pairs, ev.loglikelihoods(lm, pairs), strict=True):
        assert value == pytest.approx(naive_logp(lm.model, context, rest), rel=1e-4)  # float32 sums


def saved(folder, model=None, **changes):
    """The folder with a model and the tokenizer, after these changes to the tokenizer."""
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return save(folder, model or tiny_model(), tokenizer)


def test_models_that_a_batch_changes_are_refused(tmp_path, capsys):
    """Pads would change Mamba's states and RoBERTa's positions, and RWKV mix up the rows."""
    no_cache = "no key-value cache"
    for kind, says in (("mamba", no_cache), ("rwkv", no_cache), ("roberta", "cannot use roberta: padding")):
        model = random_model(kind, is_decoder=True, state_size=8, attention_hidden_size=32)
        model.bfloat16()  # which rounds by more than the trial allows
        refused(capsys, f"--model {saved(tmp_path, model)} --limit 1", says)


def test_weights_that_do_not_fit_the_config(tmp_path, capsys):
    """Random weights, or less than a file holds, would get a score, or a pickle run any code."""
    flags = f"--model {saved(tmp_path)} --limit 1 --max-new-tokens 2"
    for name, shape, says in [
        ("model.embed_tokens.weight", (290, 32), "[290, 32]), torch.Size([300, 32])"),
        ("model.layers.2.mlp.up_proj.weight", (64, 32), "left over"),
        ("v_head.weight", (1, 32), None),
    ]:
        weights = tiny_model().state_dict() | {name: torch.ones(shape)}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if says:
            refused(capsys, flags, name, says)
    assert evaluate(flags)["results"] and "not used: v_head.weight" in capsys.readouterr().out
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(capsys, flags, "no file named model.safetensors")


def test_models_that_cannot_be_asked(tmp_path, capsys):
    """Broken weights, a choice beyond the window, no template or no EOS would get a score."""
    gsm = f"--data {write_jsonl(tmp_path / 'gsm.jsonl', [GSM_ROW])} --max-new-tokens 4"
    endless = ARC_ROW | {"choices": {"text": ["a", "a" * 300], "label": ["A", "B"]}}
    arc = f"--tasks arc_easy --data {write_jsonl(tmp_path / 'arc.jsonl', [endless])}"
    refused(capsys, f"--model {saved(tmp_path / 'good')} {arc}", "301 tokens", "256", "aaa")
    model = saved(tmp_path / "untemplated", chat_template=None)
    refused(capsys, f"--model {model} --tasks gsm8k --chat --shots 0 {gsm}", "none; see --reward-template")
    refused(capsys, f"--model {model} {gsm}", "chat template")
    model = saved(tmp_path / "named", chat_template={"rag": ZEPHYR, "tools": ZEPHYR})
    refused(capsys, f"--model {model} {gsm}", f"{model}: ", "need a default chat template", "rag", "tools")
    assert evaluate(f"--model {model} {gsm} --tasks gsm8k --shots 0")["results"]  # which does not ask in one
    refused(capsys, f"--model {saved(tmp_path / 'endless', eos_token=None, pad_token=None)} {gsm}", "EOS")
    broken = tiny_model()
    broken.lm_head.weight.data[5, 0] = math.nan
    model = saved(tmp_path / "broken", broken)
    refused(capsys, f"--model {model} {gsm}", f"{model}: ", "NaN")
    second = saved(tmp_path / "t5")
    transformers.T5Config().save_pretrained(second)  # which shows before the first model is loaded
    refused(capsys, f"--model {model} {gsm} --compare {second}", f"{second}: t5 is not a causal")


def responses_of(folder, flags=""):
    rows = write_jsonl(folder / "rows.jsonl", [GSM_ROW | {"question": "?" * n} for n in (1, 9, 4)])
    outcome = evaluate(f"--model {folder} --tasks gsm8k --shots 0 --data {rows} --max-new-tokens 9 {flags}")
    return [sample["responses"] for sample in outcome["samples"]["gsm8k"]]


def test_what_changes_a_response_and_what_does_not(tmp_path):
    """Prompts padded on the wrong side, or a config for several responses, would change them."""
    plain = saved(tmp_path)
    alone = responses_of(plain, "--batch-size 1")
    assert len(alone[0][0]) > 1
    for change in {}, {"padding_side": "left"}, {"padding_side": "right"}, {"pad_token": None}:
        assert responses_of(saved(tmp_path, **change)) == alone
    first, again, other = [responses_of(plain, f"--temperature 1 --seed {seed}") for seed in (0, 0, 1)]
    three = responses_of(plain, "--temperature 1 --samples 3")
    assert first == again != other and all(len({*texts}) > 1 for texts in three)
    model, stop = tiny_model(), alone[0][0][3]
    model.generation_config.update(num_return_sequences=3, return_dict_in_generate=True, num_beams=3)
    model.generation_config.update(min_p=0.5, typical_p=0.5, max_length=7, do_sample=True)
    odd = saved(tmp_path / "odd", model)
    assert responses_of(odd) == alone and responses_of(odd, "--temperature 1") == first
    model.generation_config.update(repetition_penalty=3.0)  # but not of pads
    penalized = responses_of(saved(tmp_path / "odd", model))
    assert penalized == responses_of(odd, "--batch-size 1") != alone
    model.generation_config.update(repetition_penalty=None, stop_strings=[stop])
    assert responses_of(saved(tmp_path / "odd", model)) == [[text.split(stop)[0]] for [text] in alone]


@pytest.mark.parametrize("bias, empty, unfinished", [(100.0, 3, 0), (-100.0, 0, 3)])
def test_what_may_explain_a_result_is_counted(bias, empty, unfinished, tmp_path, capsys):
    """Silent models, or answers that are cut, would look like wrong answers."""
    model = tiny_model()
    model.generation_config.sequence_bias = [[[1], bias]]  # of EOS
    texts = responses_of(saved(tmp_path, model))
    assert all((text == "") == (empty == 3) for [text] in texts)
    said = capsys.readouterr().out
    assert ("gsm8k: 3 responses are empty" in said) == (empty == 3)
    assert ("gsm8k: 3 responses were cut at --max-new-tokens" in said) == (unfinished == 3)


@pytest.mark.parametrize("short", [0, 1])
def test_prompts_that_lose_their_beginning_are_counted(short, tmp_path):
    """A benchmark whose prompts do not fit would pass for one that was asked in full."""
    asked = "Question: Which?\nAnswer: ", "Question: 1+1?\nAnswer:" + "?" * 9  # room for a response
    for task, row, text in zip(("arc_easy", "gsm8k"), (ARC_ROW, GSM_ROW), asked):
        model = tiny_model()
        model.config.max_position_embeddings = len(text) - short
        rows = write_jsonl(tmp_path / "rows.jsonl", [row])
        flags = f"--model {saved(tmp_path, model)} --tasks {task} --data {rows} --shots 0 --max-new-tokens 9"
        assert evaluate(flags)["results"][task]["truncated"] == short


def test_windows():
    """Prompts would be cut elsewhere than in lm_eval, or longrope mix up the rows of a batch."""
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 44}
    wrapper = {"text_config": SimpleNamespace(max_position_embeddings=33)}
    configs = {11: {"n_positions": 11}, 22: {"max_position_embeddings": 22}, 33: wrapper, 77: {}}
    configs |= {44: {"max_position_embeddings": 512, "rope_parameters": longrope}}
    for window, config in configs.items():
        assert ev.find_window(SimpleNamespace(**config), SimpleNamespace(model_max_length=77)) == window
    assert ev.find_window(SimpleNamespace(), SimpleNamespace(model_max_length=int(1e30))) == 2048


def test_a_shared_beginning_is_read_once():
    """Few-shot examples would be read for every letter, or used when no longer in the cache."""
    rng = random.Random(0)
    examples, *rests = [rng.choices(range(3, 250), k=k) for k in (40, 9, 12, 9, 30)]
    pairs = [(examples + rest, continuation) for rest in rests for continuation in ([5], [6], [7, 8, 9])]
    pairs += [([4] * 20, [5, 6]), ([4] * 20, [7])]  # nothing in common with those before
    pairs += [([4] * n, [5, n]) for n in (21, 18)]  # one goes on where the other ends
    for kind, more, read in [("gemma2", {"sliding_window": 8}, 49), ("gpt2", {}, 9), ("gemma2", {}, 9)]:
        lm, shapes = lm_of(random_model(kind, **more)), []
        lm.model.register_forward_pre_hook(lambda _, inputs, shapes=shapes: shapes.append(inputs[0].shape))
        values = ev.loglikelihoods(lm, pairs)
        assert [shapes[0], shapes[1], shapes[4]] == [(1, 49), (3, 2), (1, read)] and shapes[8] == (1, 20)
        for (context, rest), value in zip(pairs, values, strict=True):
            assert value == pytest.approx(naive_logp(lm.model, context, rest), rel=1e-4)
        ev.loglikelihoods(lm, [([3] * 50, [letter]) for letter in (5, 6, 7, 8)])
        assert shapes[-1] == (1, 50)


def test_own_tasks_end_at_an_eos_token_that_is_not_special(tmp_path):
    """The end of a turn would stay in the answer and make it wrong."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [GSM_ROW])
    flags = f"--model {saved(tmp_path)} --data {rows} --max-new-tokens 9"
    [sample] = evaluate(flags)["samples"]["answers"]
    model, tokenizer, [text] = tiny_model(), byte_tokenizer(), sample["responses"]
    end = next(letter for letter in text if letter.isascii() and letter != text[0])
    model.generation_config.eos_token_id = [1, tokenizer(end).input_ids[0]]
    model.generation_config.repetition_penalty = 9.0  # which gsil.py does not apply, either
    save(tmp_path, model)
    before = text.split(end)[0]
    assert evaluate(flags)["samples"]["answers"][0]["responses"] == [before]
    prompt = tokenizer(sample["prompt"]).input_ids
    model.generation_config.repetition_penalty = None
    assert ev.generate(lm_of(model, tokenizer), [prompt], [], 9, 0, 1) == [(before + end, False)]


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path, capsys):
    """An id without an embedding would end the run in an IndexError."""
    tokenizer, known = byte_tokenizer(), len(byte_tokenizer())
    tokenizer.add_tokens(["house"])
    rows = write_jsonl(tmp_path / "x.jsonl", [GSM_ROW | {"question": "How many house?"}])
    flags = (
        f"--model {save(tmp_path, tiny_model(known), tokenizer)} --shots 0 --data {rows} --max-new-tokens 4"
    )
    refused(capsys, f"{flags} --tasks gsm8k", f"gives 'house' the id {known}", f"only {known} embeddings")
    refused(capsys, flags, "the model has no embedding for a token")
