"""eval.py: prompts, generations, filters and metrics against lm_eval; execution of programs; bad input.

tests/parity/golden.json was written by tests/parity/oracle.py from lm_eval 0.4.13. Everything is offline.
"""

import argparse
import gzip
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import transformers

import eval as ev
import gsil
import irft
from conftest import ROOT, byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "tests" / "parity"))
import oracle  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # real benchmark files, which this repository does not hold
GOLDEN = json.loads((ROOT / "tests/parity/golden.json").read_text("utf-8"))


def run(flags, **options):
    return ev.main(ev.parse_args([*flags.split(), *(str(part) for kv in options.items() for part in kv)]))


def fails(capsys, flags, *says):
    """The flags must end in exit code 2 and one sentence that has all of `says`."""
    with pytest.raises(SystemExit) as stop:
        ev.main(ev.parse_args(flags if isinstance(flags, list) else flags.split()))
    sentence = capsys.readouterr().err
    assert stop.value.code == 2
    for part in says:
        assert part in sentence, sentence
    return sentence


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- parity with lm_eval -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    oracle.build_models(folder)
    if oracle.fingerprint(folder) != GOLDEN["models"]:
        pytest.skip("this version of tokenizers makes other models than golden.json is about")
    return folder


def flags_of(case, models, batch=1):
    """One of oracle.CASES as flags of eval.py."""
    family = case["task"].split("_")[0]
    return (f"--model {models}/{case['model']} --tasks {case['task']} --batch-size {batch} --device cpu "
            f"--data {case['task']}={ROOT}/tests/parity/rows/{family} --max-new-tokens {oracle.NEW_TOKENS} "
            + (f"--shots {case['shots']} " if "shots" in case else "") + "--chat " * case.get("chat", False)
            + (f"--limit {case['limit']} " if "limit" in case else "") + "--allow-code-execution")


def check_equal(task, outcome, expected):
    """In this order the first failure names the cause: prompts, responses, answers, metrics, means."""
    samples, results = outcome["samples"][task], outcome["results"]
    theirs = expected["documents"]
    if "loglikelihoods" in samples[0]:
        for key in ("prompts", "continuations"):
            assert [sample[key] for sample in samples] == [document[key] for document in theirs]
        for sample, document in zip(samples, theirs):
            assert sample["loglikelihoods"] == pytest.approx(document["loglikelihoods"], abs=1e-4)
            # mc2 is a probability: as near as its log-likelihoods; all else is 0 or 1
            assert sample["metrics"] == pytest.approx(document["metrics"], abs=1e-5)
    else:
        assert [sample["prompt"] for sample in samples] == [document["prompt"] for document in theirs]
        assert [sample["responses"] for sample in samples] == [[document["response"]] for document in theirs]
        check_scores(samples, theirs)
    near = 1e-5 if "mc2" in task else 1e-9
    for key, value in expected["aggregates"].items():
        name, _, key = key.rpartition(" ")
        found = results[name or task][key]
        assert found == (None if value == "N/A" else pytest.approx(value, abs=near)), key


def check_scores(samples, theirs):
    for sample, document in zip(samples, theirs, strict=True):
        assert {name: found[0] for name, found in sample["extracted"].items()} == document["extracted"]
        assert sample["metrics"] == document["metrics"]


@pytest.mark.parametrize("name", oracle.CASES)
def test_equal_to_lm_eval(name, models):
    """A prompt that differs in one blank, a missing BOS, one stop string less: each changes the score."""
    outcome = run(flags_of(oracle.CASES[name], models))
    task = oracle.CASES[name]["task"]
    check_equal(task, outcome, GOLDEN["cases"][name])


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot_zeroshot", "humaneval", "humaneval_instruct"])
def test_canned_responses_score_as_in_lm_eval(task):
    """Right and wrong answers, tricky ones above all: '#### 18.', 'The answer is 18', '...', sys.exit(0)."""
    rows, responses = oracle.canned()[task]
    problems = [ev.TASKS[task].read(ev.Row(row)) for row in rows]
    samples = ev.TASKS[task].score(ev.TASKS[task], problems, [[text] for text in responses])
    check_scores(samples, GOLDEN["canned"][task]["documents"])
    summary = ev.summarize([{"responses": [text], "truncated": False, **sample}
                            for text, sample in zip(responses, samples)])
    for key, value in GOLDEN["canned"][task]["aggregates"].items():
        assert summary[key] == pytest.approx(value, abs=1e-9)


LIVE = ["A arc_challenge, every prompt cut", "B hellaswag 2 shots, chat", "A winogrande 5 shots",
        "A truthfulqa_mc2"]


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
@pytest.mark.parametrize(
    "name", [name for name, case in oracle.CASES.items() if "gsm8k" in case["task"] or name in LIVE])
def test_equal_to_lm_eval_live(name, models):
    """The golden file could be stale; where lm_eval is installed it is asked again."""
    outcome, task = run(flags_of(oracle.CASES[name], models)), oracle.CASES[name]["task"]
    expected = oracle.ask(oracle.CASES[name], models)
    check_equal(task, outcome, expected)


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("name", ["A gsm8k 5 shots", "B gsm8k 2 shots, chat", "B gsm8k, every prompt cut"])
def test_batch_size_changes_nothing(name, batch, models):
    """Rows of a batch end at different times and on different strings; padding must not leak into them. The
    special token <|im_end|> is a stop string that is not EOS: lm_eval itself depends on the batch there."""
    samples = run(flags_of(oracle.CASES[name], models, batch))["samples"][oracle.CASES[name]["task"]]
    assert [sample["responses"][0] for sample in samples] == [
        document["response"] for document in GOLDEN["cases"][name]["documents"]]


@pytest.mark.parametrize("name", ["A arc_challenge 25 shots", "B arc_challenge 2 shots, chat",
                                  "B hellaswag, every prompt cut", "A winogrande 5 shots", "A mmlu 5 shots"])
def test_batch_size_changes_no_loglikelihood(name, models):
    """Contexts are padded on the left, rests on the right, problems have 3 to 5 choices: none may leak."""
    samples = run(flags_of(oracle.CASES[name], models, 7))["samples"][oracle.CASES[name]["task"]]
    for sample, document in zip(samples, GOLDEN["cases"][name]["documents"], strict=True):
        assert sample["loglikelihoods"] == pytest.approx(document["loglikelihoods"], abs=1e-4)


def test_the_fixtures_catch_the_traps():
    """Rows on which a wrong rule gives the same numbers would let it pass."""
    documents = {name: case["documents"] for name, case in GOLDEN["cases"].items()}
    differ = {"bytes": 0, "blank in front": 0, "sum": 0}
    for name, task in (("A arc_challenge 25 shots", "arc/test"), ("B hellaswag", "hellaswag/validation")):
        for document in documents[name]:
            choices = [text[1:].lstrip() for text in document["continuations"]]
            lls = document["loglikelihoods"]
            by = {"characters": [ll / len(text) for ll, text in zip(lls, choices)], "sum": lls,
                  "bytes": [ll / len(text.encode()) for ll, text in zip(lls, choices)],
                  "blank in front": [ll / (len(text) + 1) for ll, text in zip(lls, choices)]}
            for wrong in differ:
                differ[wrong] += ev.best(by[wrong]) != ev.best(by["characters"])
    assert all(differ.values()), differ
    for task, k in (("hellaswag", 10), ("winogrande", 5)):      # the problem itself is drawn at least once
        rows, pool = ([row for _, row in ev.read_rows(f"{oracle.ROWS / task}/{split}.jsonl", split)]
                      for split in ("validation", "train"))
        stream = random.Random(1234)
        assert any(row in stream.sample(pool, k + 1) for row in rows)
        assert not any(row in some for row, some in zip(rows, ev.draw_shots(pool, k, rows, "others")))
    for task in ("hellaswag", "winogrande"):                    # contexts that end in a blank
        assert any(prompt != prompt.rstrip() for name in documents if name.startswith(f"A {task}")
                   for document in documents[name] for prompt in document["prompts"])
    for _, row in [*ev.read_rows(f"{oracle.ROWS}/truthfulqa/validation.jsonl", "")][:1]:      # true ones not in front
        assert row["mc2_targets"]["labels"] != sorted(row["mc2_targets"]["labels"], reverse=True)
    cut = documents["A arc_challenge, every prompt cut"]
    assert cut[0]["loglikelihoods"] != documents["A arc_challenge 25 shots"][0]["loglikelihoods"]


def test_acc_norm_counts_characters():
    """Not bytes, and not the blank in front: either would turn one of these two around."""
    assert ev.acc_norm({}, ["abc", "éé"], [-2.7, -2.0], 0) == 1
    assert ev.acc_norm({}, ["a", "bcd"], [-1.1, -3.0], 1) == 1
    assert ev.acc({}, ["abc", "éé"], [-2.0, -2.0], 0) == 1      # of equals the first


def test_one_context_is_read_once(models):
    """What makes it fast: a problem whose choices are letters costs one forward pass, not four."""
    passes, forward = [], ev.AutoModelForCausalLM.from_pretrained(models / "A").eval()
    forward.register_forward_pre_hook(lambda _, args, given: passes.append(given["input_ids"].shape),
                                      with_kwargs=True)
    context = list(range(10, 60))
    one = [[(context, [letter]) for letter in (5, 6, 7, 8)]]
    more = [[(context, [5, 6, 7]), (context, [5, 6]), (context, [9, 8, 7, 6])]]
    assert ev.loglikelihoods(forward, one, 1) and passes == [(1, 50)]
    found = ev.loglikelihoods(forward, more, 1)[0]
    assert passes[1:] == [(1, 50), (3, 3)]
    for (start, rest), value in zip(more[0], found):
        ids, n = start + rest, len(rest)
        logps = forward(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        assert value == pytest.approx(sum(logps[t - 1, ids[t]].item() for t in range(50, 50 + n)), abs=1e-4)


@pytest.mark.parametrize("kind", ["GPT2Config", "MistralConfig", "Gemma3TextConfig", "BloomConfig"])
def test_shared_contexts_in_other_models(kind):
    """Learned, rotary and ALiBi positions, windows shorter than the context: all go on from the cache."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    more = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "sliding_window": 8}
    config = getattr(transformers, kind)(**sizes, **(more if kind[0] in "MG" and kind[1] != "P" else {}))
    torch.manual_seed(0)
    other, rng, problems = ev.AutoModelForCausalLM.from_config(config).eval(), random.Random(0), []
    for n in (3, 20, 40):
        context = rng.choices(range(99), k=n)
        problems.append([(context, rng.choices(range(99), k=k)) for k in (1, 5, 3)])
    for choices, found in zip(problems, ev.loglikelihoods(other, problems, 9)):
        for (start, rest), value in zip(choices, found):
            ids, n = start + rest, len(rest)
            logps = other(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            assert value == pytest.approx(
                sum(logps[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids))), abs=1e-4)


@pytest.mark.parametrize("kind", ["Mamba", "FalconH1"])
def test_a_model_with_other_states_than_keys_is_refused(kind, capsys):
    """They would have read the pads: wrong log-likelihoods, in silence. FalconH1 has keys as well."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with pytest.raises(SystemExit):
        ev.loglikelihoods(ev.AutoModelForCausalLM.from_config(config), [[([1, 2], [3])]], 1, "arc_easy")
    assert "Mamba" in capsys.readouterr().err


@pytest.mark.parametrize("short", [0, 1])
def test_truncation_is_counted_from_the_first_token_on(short, monkeypatch):
    """A count that starts a token late hides that the beginning of a prompt was never read."""
    row = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "A"}
    monkeypatch.setattr(ev, "loglikelihoods", lambda model, problems, *_: [[0.0, 0.0]])
    policy = ev.Policy(None, byte_tokenizer(), len("Question: a\nAnswer: b") - 1 - short)
    args = SimpleNamespace(chat=False, batch_size=1)
    (sample,) = ev.choose(ev.ARC_EASY, "arc_easy", [row], [[]], policy, args)
    assert sample["truncated"] == bool(short)


def test_mmlu_by_hand():
    """Two subjects, 1/2 and 4/4 right: 5/6 over questions, 3/4 over subjects; the error from within them."""
    scored = [{"truncated": False, "metrics": {"acc,none": float(right)}} for right in (1, 0, 1, 1, 1, 1)]
    results = ev.mmlu_results(["anatomy"] * 2 + ["marketing"] * 4, scored)
    assert results["mmlu"]["acc,none"] == pytest.approx(5 / 6) and results["mmlu"]["acc,unweighted"] == 0.75
    assert results["mmlu"]["acc_stderr,none"] == pytest.approx(math.sqrt(0.5 / 4 / 6))
    assert results["mmlu_stem"]["acc,none"] == results["mmlu_anatomy"]["acc,none"] == 0.5
    assert results["mmlu_other"]["n"] == 4 and "mmlu_humanities" not in results
    assert {group: len(names) for group, names in ev.SUBJECTS.items()} == {
        "stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


def test_mmlu_in_one_file(models, tmp_path):
    """The Hub's configuration `all` is one table with a column subject: the same as a folder per subject."""
    for split in ("test", "dev"):
        rows = [row for _, row in ev.read_split("mmlu", ev.MMLU, split, ev.parse_args(
            ["--tasks", "mmlu", "--data", f"mmlu={oracle.ROWS / 'mmlu'}"]))]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    outcome = run(f"--model {models}/A --tasks mmlu --leaderboard --data mmlu={tmp_path} --device cpu")
    check_equal("mmlu", outcome, GOLDEN["cases"]["A mmlu 5 shots"])


def test_a_template_without_system_turn(models):
    """Gemma's template refuses MMLU's description as a system turn; lm_eval leaves the turn out."""
    tokenizer = ev.AutoTokenizer.from_pretrained(models / "B")
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    row = {"subject": "anatomy", "question": "Which?", "choices": [*"abcd"], "answer": 0}
    assert ev.build_prompt(ev.MMLU, row, [], "Which?", tokenizer).startswith("<s><|user|>\nWhich?")


def test_leaderboard_shots(tmp_path):
    """25, 10, 5, 0, 5 and gsm8k's 5; truthfulqa has none whatever is asked."""
    rows = {task: oracle.ROWS / task.split("_")[0] for task in (*ev.LEADERBOARD, "truthfulqa_mc2")}
    args = ev.parse_args(["--tasks", ",".join(rows), "--leaderboard"] + [
        part for task, path in rows.items() for part in ("--data", f"{task}={path}")])
    shots = {task: len(ev.read_task(task, ev.TASKS[task], args)[1][0]) for task in rows}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "mmlu": 5, "gsm8k": 5,
                     "truthfulqa_mc2": 0}


# Output, right answer, then what each filter's find is after normalisation; None: "[invalid]".
TABLE_K = [
    ("#### 18.", "18", "18", "18", None),
    ("#### 18.00", "18", "18.00", "18.00", None),
    ("#### $18", "18", None, "18", None),
    ("####18", "18", None, "18", None),
    ("####  18", "18", None, "18", None),
    ("#### -18", "-18", "-18", "-18", None),
    ("#### - 18", "-18", None, "18", None),
    ("#### 1,000", "1000", "1000", "1000", None),
    ("#### 1000", "1,000", "1000", "1000", None),
    ("#### 18 dollars", "18", "18", "18", None),
    ("#### 18%", "18", "18", "18", None),
    ("#### 1/2", "1", "1", "2", None),
    ("#### 3\n#### 18", "18", "3", "18", None),
    ("#### ,", "18", "", None, None),
    ("", "18", None, None, None),
    (" \n ", "18", None, None, None),
    ("eighteen", "18", None, None, None),
    ("١٨", "18", None, None, None),
    (".", "18", None, None, None),
    ("#### 18\n\nQuestion: next 5", "18", "18", "5", None),
    ("The answer is 18", "18", None, "18", "1"),
    ("The answer is 8", "8", None, "8", None),
    ("The answer is 18.", "18", None, "18", "18"),
    ("The answer is $18.", "18", None, "18", None),
    ("The answer is -18.", "-18", None, "-18", "-18"),
    ("The answer is 1,000.", "1000", None, "1000", "1000"),
    ("The answer is: 18.", "18", None, "18", None),
    ("the answer is 18.", "18", None, "18", None),
    ("It is 18...", "18", None, "18..", None),
    ("It is 18 and so on..", "18", None, ".", None),
    ("It is 18 (see step 3)", "18", None, "3", None),
    ("It is 5-3", "-3", None, "-3", None),
    ("It is **18**", "18", None, "18", None),
    ("\\boxed{18}", "18", None, "18", None),
    ("It is 18,", "18", None, "18", None),
    ("It is $$", "18", None, "", None),
    ("It is 1e3", "1000", None, "3", None),
]


@pytest.mark.parametrize("output, gold, strict, flexible, cot", TABLE_K)
def test_tricky_outputs(output, gold, strict, flexible, cot):
    """What counts as an answer is lm_eval's convention, odd as it is: none of these may be repaired."""
    row = {"question": "", "answer": f"Work.\n#### {gold}"}
    for name, expected in (("gsm8k", strict), ("gsm8k_cot_zeroshot", cot)):
        task = ev.TASKS[name]
        score = ev.score_answers(task, [row], [[output]])[0]
        for filter_name, value in (("strict-match", expected), ("flexible-extract", flexible)):
            found = ev.normalize(score["extracted"][filter_name][0])
            assert found == ("[invalid]" if value is None else value)
            right = score["metrics"][f"exact_match,{filter_name}"]
            assert right == (value == gold.replace(",", "")), filter_name


# ---- prompts -----------------------------------------------------------------------------------------------


def test_examples_are_drawn_from_one_stream():
    """lm_eval draws for problem after problem: seeding anew for each would give all of them the same."""
    drawn = ev.draw_shots(range(7473), 5, [None] * 3)
    assert drawn == [
        [6374, 3610, 957, 61, 742],
        [7462, 6610, 4769, 286, 5501],
        [5677, 687, 806, 6279, 2905],
    ]
    assert ev.draw_shots(range(7473), 5, [None] * 2) == drawn[:2]
    assert ev.draw_shots([], 0, [None] * 2) == [[], []]


def test_plain_prompt_is_what_its_docstring_shows():
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in (1, 2)]
    assert ev.build_prompt(ev.GSM8K, rows[1], rows[:1], ev.GSM8K.question(rows[1])) == (
        "Question: 1+1?\nAnswer: 2\n\n" "Question: 2+2?\nAnswer:")
    assert ev.cut("18\n\nQ: Why?", ["Q:", "\n\n"]) == "18"


def test_bos_is_there_once(tokenizer, models):
    """A template that writes BOS itself must not get a second one from the tokenizer."""
    with_bos = ev.AutoTokenizer.from_pretrained(models / "B")
    for text in ("a", "<s>a"):
        assert ev.encode(with_bos, text).count(with_bos.bos_token_id) == 1
    assert ev.encode(with_bos, "a", special=False) == with_bos("a").input_ids[1:]
    assert ev.encode(tokenizer, "a") == tokenizer("a").input_ids


def test_answers_asks_as_training_does(tmp_path):
    """A policy is trained on one prompt; asked with another it would look worse than it is."""
    base = str(ROOT / "tests/toy/base")
    outcome = run("--limit 5 --device cpu --max-new-tokens 40")
    args = gsil.parse_args(["--model", base])
    tokenizer = ev.AutoTokenizer.from_pretrained(base)
    rows = list(gsil.read_rows(args.heldout, "train"))[:5]
    demos = gsil.read_demos("heldout", rows, tokenizer, {1}, 512, args)
    model = ev.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = gsil.sample(model, [demo["prompt_ids"] for demo in demos], {1}, 40, 0, 5, "")
    for sample, demo, response in zip(outcome["samples"]["answers"], demos, ids):
        assert sample["prompt"] == demo["prompt"] and sample["gold"] == demo["answer"]
        assert ev.encode(tokenizer, sample["prompt"], special=False) == demo["prompt_ids"]
        assert sample["responses"] == [tokenizer.decode(response, skip_special_tokens=True)]
    for text in ("#### 22", "x ####22.", "#### $1,000 .", "none"):
        assert ev.final_answer(text) == gsil.final_answer(text)


# ---- responses ---------------------------------------------------------------------------------------------


def test_samples_and_their_mean(models):
    """mean@n is a mean over all samples of all problems, and the seed decides them."""
    case = {"model": "A", "task": "gsm8k", "shots": 0}
    once, again, other = (run(flags_of(case, models, 8) + f" --samples 3 --temperature 1 --seed {seed}")
                          for seed in (0, 0, 1))
    samples = once["samples"]["gsm8k"]
    assert samples == again["samples"]["gsm8k"] != other["samples"]["gsm8k"]
    assert all(len(sample["responses"]) == 3 for sample in samples)
    assert len({text for sample in samples for text in sample["responses"]}) > 12
    row = {"question": "", "answer": "#### 2"}
    score = ev.score_answers(ev.GSM8K, [row], [["#### 2", "#### 3", "2", "#### 2"]])[0]
    assert score["metrics"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}


def test_what_was_cut_or_empty_is_counted(models, capsys):
    """A prompt that lost its examples, or a model that says nothing, explains a bad score."""
    outcome = run(flags_of(oracle.CASES["A gsm8k, every prompt cut"], models))
    result = outcome["results"]["gsm8k"]
    assert result["truncated"] == result["n"] == 8 and "truncated" in capsys.readouterr().out
    sample = {"truncated": False, "metrics": {"exact_match,x": 0.0}}
    assert ev.summarize([sample | {"responses": texts} for texts in (["", "a"], [" \n", ""])])["empty"] == 3


def test_nan_logits_are_an_error(tmp_path, capsys):
    """argmax over NaN is token 0: fp16 overflow would be scored as if the model had answered."""
    model = tiny_model()
    model.lm_head.weight.data[5, 0] = math.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    fails(capsys, f"--model {tmp_path} --limit 2 --max-new-tokens 4", "NaN", "answers")


def test_nan_logits_choose_nothing(tmp_path, capsys):
    """lm_eval takes the first choice then, and truthfulqa_mc1 scores 100 %."""
    model = tiny_model()
    model.lm_head.weight.data[5, 0] = math.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    row = write_jsonl(tmp_path / "arc.jsonl", [ARC_ROW])
    fails(capsys, f"--model {tmp_path} --tasks arc_easy --data arc_easy={row}", "NaN", "arc_easy")
    endless = {"text": ["a", "a" * 300], "label": ["A", "B"]}
    long = write_jsonl(tmp_path / "arc.jsonl", [ARC_ROW | {"choices": endless}])
    fails(capsys, f"--model {tmp_path} --tasks arc_easy --data arc_easy={long}", "301 tokens", "256", "aaa")


# ---- rewards, MT-Bench -------------------------------------------------------------------------------------

BASE = str(ROOT / "tests/toy/base")
HH = {"chosen": "\n\nHuman: Hi \n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So.", "rejected": "x"}


def test_an_hh_transcript_and_its_formats():
    """Cut one turn too early, or given to beaver as it is, it has a form no model was trained on."""
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    assert ev.read_dialogue(HH) == (turns, HH["chosen"].removesuffix(" So."), "So.")
    one = {"prompt": "Why?", "response": "So."}
    assert ev.read_dialogue(one) == (turns[2:], "\n\nHuman: Why?\n\nAssistant:", "So.")
    blank_end = {"prompt": "\n\nHuman: a\n\nAssistant: ", "chosen": "b"}
    assert ev.read_dialogue(blank_end)[0] == [("user", "a")]
    open_end = {"prompt": HH["chosen"].removesuffix("\n\nAssistant: So."), "chosen": "So."}
    assert ev.read_dialogue(open_end) == (turns, HH["chosen"].removesuffix(" So."), "So.")
    tokenizer = byte_tokenizer()
    ids = ev.reward_ids(tokenizer, True, turns, "So.")
    assert tokenizer.decode(ids) == (
        "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Hello</s>USER: Why? ASSISTANT:So.</s>")
    ids = ev.reward_ids(tokenizer, False, turns[2:], "So.")        # the template's newline behind EOS is cut
    assert tokenizer.decode(ids) == "<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>"
    assert ev.build_prompt(ev.REWARD, HH, [], "", tokenizer).endswith(
        "<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n")


def test_our_reward_scores_as_in_training(tmp_path):
    """A reward read at another token than it was fitted at is noise. With EOS as pad too, as many have it."""
    tokenizer, args = ev.AutoTokenizer.from_pretrained(BASE), ev.parse_args(["--device", "cpu"])
    trained = argparse.Namespace(tokenizer=tokenizer, model=BASE, eos_ids={tokenizer.eos_token_id}, seed=0,
                                 freeze_layers=0, trust_remote_code=False, device="cpu", max_new_tokens=256,
                                 prompt_template=None)
    model, own = irft.load_reward(BASE, trained)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    rows = list(irft.read_rows(str(ROOT / "tests/toy/heldout.jsonl"), "train"))[:8]
    demos = irft.read_demos("", rows, tokenizer, trained.eos_ids, 512, trained)
    expected = irft.reward(model, irft.texts_of(demos, "real")).tolist()
    pairs = [([("user", row["question"])], row["answer"]) for _, row in rows]
    for pad in (own.pad_token_id, own.eos_token_id, None):
        model.config.pad_token_id = pad
        irft.save_model(model, own, tmp_path / "reward")
        found = ev.rewards(*ev.load_reward(str(tmp_path / "reward"), args), pairs)
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)


def test_beaver_weights_and_a_missing_head(tmp_path, capsys):
    """Loaded under their own names, beaver's head would be random numbers and only a warning."""
    args, pairs = ev.parse_args(["--device", "cpu"]), [([("user", "Hi")], "Hello")]
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, 1
    model = ev.AutoModelForSequenceClassification.from_config(config)
    beaver, headless = tmp_path / "beaver", tmp_path / "headless"
    for folder in (beaver, headless):
        model.save_pretrained(folder)
        byte_tokenizer(chat_template=None).save_pretrained(folder)
    weights = load_file(beaver / "model.safetensors")
    weights["score_head.weight"] = weights.pop("score.weight")
    save_file(weights | {"score_head.bias": torch.ones(1)}, beaver / "model.safetensors", {"format": "pt"})
    settings = json.loads((beaver / "config.json").read_text())
    (beaver / "config.json").write_text(json.dumps(settings | {"architectures": ["LlamaForScore"]}))
    tokenizer = byte_tokenizer()
    ids = tokenizer("BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Hello</s>", return_tensors="pt").input_ids
    hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
    found = ev.rewards(*ev.load_reward(str(beaver), args), pairs)
    assert found == [(pytest.approx((model.score.weight @ hidden).item(), abs=1e-5), 5)]
    fails(capsys, f"--tasks reward --data reward={ROOT}/tests/toy/heldout.jsonl --reward-model {headless}",
          "chat template")
    save_file({key: value for key, value in weights.items() if "score" not in key},
              headless / "model.safetensors", {"format": "pt"})
    fails(capsys, f"--tasks reward --data reward={ROOT}/tests/toy/heldout.jsonl --reward-model {headless}",
          "score.weight")


def test_win_rate(tmp_path, capsys):
    """A tie is not a win; a model against itself ties everywhere; without --compare the data answer."""
    found = ev.duel([(1.0, 3), (2.0, 3), (0.0, 9)], [(0.0, 1), (2.0, 1), (4.0, 1)])
    assert (found["wins"], found["ties"], found["losses"], found["tokens"]) == (1, 1, 1, 5)
    assert found["win_rate"] == pytest.approx(1 / 3) and found["difference"] == -1
    assert found["half_width"] == pytest.approx(1.96 * math.sqrt(7 / 3))
    config = transformers.AutoConfig.from_pretrained(BASE, num_labels=1)
    torch.manual_seed(0)
    ev.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    ev.AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    flags = (f"--tasks reward --reward-model {tmp_path} --chat --limit 6 --max-new-tokens 20 --device cpu "
             f"--data reward={ROOT}/tests/toy/heldout.jsonl ")
    assert run(flags + f"--compare {BASE}")["duel"]["ties"] == 6
    outcome = run(flags)
    assert outcome["duel"]["against"] == "the data" and outcome["duel"]["n"] == 6
    assert outcome["duel"]["tokens"] < 10 < outcome["duel"]["other_tokens"] < 40
    row = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    fails(capsys, f"--tasks reward --reward-model {tmp_path} --data reward={row}", "problem 1", "--compare")


QUESTIONS = [{"question_id": n, "category": category, "turns": ["ava has 2 apples .", "and ?"]}
             for n, category in ((83, "writing"), (81, "roleplay"), (82, "math"), (84, "coding"))]


def test_mt_bench_goes_on_where_it_stopped(tmp_path, capsys):
    """An interrupted run has spent hours; the file must end up as if it had not been interrupted."""
    questions, file = write_jsonl(tmp_path / "question.jsonl", QUESTIONS), tmp_path / "toy.jsonl"
    flags = f"--tasks mt_bench --data mt_bench={questions} --max-new-tokens 12 --device cpu --answers {file}"
    run(flags)
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [answer["question_id"] for answer in whole] == [81, 82, 83, 84]
    for answer in whole:        # the fields that FastChat's judge reads
        assert answer["model_id"] == "toy" and [*answer["choices"][0]] == ["index", "turns"]
        assert len(answer["choices"][0]["turns"]) == 2 and {"answer_id", "tstamp"} < {*answer}
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n" + lines[3][:40])
    capsys.readouterr()
    run(flags)
    assert "unfinished" in capsys.readouterr().out
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert again[:2] == whole[:2]
    assert [answer["choices"] for answer in again] == [answer["choices"] for answer in whole]
    file.write_text("{oops\n" + lines[0] + "\n")
    fails(capsys, flags, "toy.jsonl line 1", "oops")


def test_mt_bench_asks_with_its_own_first_answer(tmp_path, monkeypatch):
    """FastChat's rules: temperature by category, 0.7 for what it does not know; turn 2 sees turn 1."""
    asked = []

    def fake(model, tokenizer, prompts, stop, longest, temperature, batch, name=""):
        asked.append((tokenizer.decode(prompts[0]), temperature, torch.initial_seed()))
        return [" 7 "]
    monkeypatch.setattr(ev, "generate", fake)
    questions = write_jsonl(tmp_path / "q.jsonl", QUESTIONS[:1] + [QUESTIONS[2] | {"category": "new"}] + [
        QUESTIONS[3] | {"category": "stem"}])
    run(f"--tasks mt_bench --data mt_bench={questions} --answers {tmp_path}/a.jsonl --max-new-tokens 9")
    assert [temperature for _, temperature, _ in asked] == [0.7, 0.7, 0.7, 0.7, 0.1, 0.1]
    assert all(seed == 0 for _, _, seed in asked)
    assert "<assistant> 7 <eos>" in asked[1][0] and "7" not in asked[0][0]


# ---- programs ----------------------------------------------------------------------------------------------

PROMPT = "def double(n):\n"
TEST = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)"
RIGHT = "    return 2 * n\n"
MUST_PASS = {
    "right": RIGHT,
    "prints much": "    print('x' * 10 ** 7)\n" + RIGHT,
    "needs its folder": "    import os, tempfile\n"
    "    assert os.getcwd() == os.path.realpath(os.environ['HOME'])\n"
    "    tempfile.TemporaryFile().write(b'x')\n" + RIGHT,
    "main guard": RIGHT + "\nif __name__ == '__main__':\n    raise ValueError\n",
    "spoils what it came from": "    import builtins, json, os, sys\n"
    "    os._exit = os.write = builtins.exec = builtins.compile = None\n"
    "    sys.modules['os'] = sys.modules['json'] = None\n"
    + RIGHT,
}
if os.geteuid() == 0:  # others may start no process, nor a thread
    MUST_PASS["leaves a thread"] = (
        "    import threading, time\n    threading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT
    )
MUST_FAIL = {
    "wrong": "    return n\n",
    "empty": "",
    "syntax": "    return (\n",
    "unclosed quotes": "    '''\n",
    "exception": "    raise KeyboardInterrupt\n",
    "sys.exit(0)": "    import sys\n    sys.exit(0)\n",
    "sys.exit(0) at top level": RIGHT + "\nimport sys\nsys.exit(0)\n",
    "os._exit(0)": "    import os\n    os._exit(0)\n",
    "own check, and exit": "    return n\n\ndef check(candidate):\n    pass\n\nexit()\n",
    "input()": "    input()\n" + RIGHT,
    "endless loop": "    while True:\n        pass\n",
    "endless loop that catches all": "    while True:\n        try:\n"
    "            while True:\n                pass\n"
    "        except BaseException:\n            pass\n",
    "sleep": "    import time\n    time.sleep(60)\n" + RIGHT,
    "memory": "    x = bytes(5 << 30)\n" + RIGHT,
    "large file": "    with open('x', 'wb') as file:\n        file.write(bytes(100 << 20))\n" + RIGHT,
    "segfault": "    import ctypes\n    ctypes.string_at(0)\n",
    "guesses on stdout": "    import os\n    os.write(1, b'0' * 32)\n    os._exit(0)\n",
    "null byte": RIGHT + "\0",
    "lone surrogate": RIGHT + "\n'\ud800'\n",
    "own check": "    return n\n\ndef check(candidate):\n    pass\n",
    "own check that cannot be called": "    return n\n\nclass check:\n    pass\n",
    "own AssertionError": "    return n\n\nimport builtins, sys\n"
    "builtins.AssertionError = type('Quiet', (SystemExit,), {})\nsys.excepthook = print\n",
    "the answer from stdin": "    import os, sys\n    return int(os.read(0, 99) or sys.stdin.read() or n)\n",
    "spoils modules": "    import builtins, importlib, json, os, sys\n"
    "    os._exit = os.write = json.load = builtins.exec = lambda *a, **k: None\n"
    "    sys.modules['os'] = importlib.import_module('json')\n"
    "    importlib.invalidate_caches()\n    return n\n",
    "leaves by atexit": "    import atexit, os\n    atexit.register(os._exit, 0)\n    return n\n",
    "leaves by a thread": "    import os, threading, time\n"
    "    threading.Thread(target=os._exit, args=(0,)).start()\n    time.sleep(9)\n",
    "guesses on every descriptor": "    import os\n    for n in range(99):\n        try:\n"
    "            os.write(n, b'0' * 32)\n        except OSError:\n            pass\n    os._exit(0)\n",
    "kills itself": "    import os\n    os.kill(os.getpid(), 9)\n",
    "kills its group": "    import os\n    os.killpg(0, 9)\n",
    "stops itself": "    import os, signal\n    os.kill(os.getpid(), signal.SIGSTOP)\n" + RIGHT,
    "ignores signals": "    import signal\n    for n in {*range(1, 65)} - {9, 19, 32, 33}:\n"
    "        signal.signal(n, signal.SIG_IGN)\n    while True:\n        pass\n",
    "endless output": "    while True:\n        print('x' * 10 ** 6)\n",
    "memory in parts": "    x = []\n    while True:\n        x.append(bytes(10 ** 8))\n",
    "deep recursion": "    return double(n)\n",
    "deep recursion without a limit": "    import sys\n"
    "    sys.setrecursionlimit(10 ** 9)\n    return double(n)\n",
    "a process that gets away": "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n"
    "        time.sleep(3)\n        os._exit(0)\n" + RIGHT,
    "appends to the caller's lists": "    import os, sys\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in list(frame.f_locals.values()):\n"
    "            if isinstance(value, list):\n                value.append('passed')\n"
    "        frame = frame.f_back\n    os._exit(0)\n",
}


@pytest.mark.parametrize("name", MUST_PASS)
def test_programs_that_must_pass(name):
    assert ev.passes(PROMPT + MUST_PASS[name] + TEST)


@pytest.mark.parametrize("name", MUST_FAIL)
def test_programs_that_must_fail(name):
    """Each would otherwise be a right answer, a hang, or damage."""
    assert not ev.passes(PROMPT + MUST_FAIL[name] + TEST, seconds=1)


BOMBS = {
    "processes": "    import os\n    while True:\n        os.fork()\n",
    "threads": "    import threading, time\n    while True:\n"
    "        threading.Thread(target=time.sleep, args=(9,)).start()\n",
}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start processes without limit")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    """Without the limit these would take the machine down; with it, the first one to be started fails."""
    began = time.time()
    assert not ev.passes(PROMPT + BOMBS[name] + TEST, seconds=1)
    assert time.time() - began < 3


def test_programs_see_no_secrets_and_leave_nothing(tmp_path, monkeypatch):
    """Keys in the environment are not theirs to read; a process they start must not outlive them."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert ev.passes("import os\nassert 'HF_TOKEN' not in os.environ")
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    ev.passes(f"import os, sys, time\nif os.fork() == 0:\n    exec({child!r})\n", seconds=1)
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.skipif(not (SHARED / "humaneval").is_dir(), reason="HumanEval is not at ../shared/data")
def test_all_canonical_solutions_pass():
    """What stops bad programs must not stop good ones: 164 of 164."""
    rows = [row for _, row in ev.read_rows(SHARED / "humaneval/HumanEval.jsonl.gz", "test")]
    scores = ev.score_programs(ev.HUMANEVAL, rows, [[row["canonical_solution"]] for row in rows])
    assert len(scores) == 164 and all(score["metrics"] == {"pass@1,create_test": 1.0} for score in scores)


def test_pass_at_k_is_the_chance_that_one_of_k_passes():
    """1 - (1 - c/n)^k would be biased; counted over all choices of k samples it must come out exactly."""
    for n, c in ((5, 0), (5, 2), (6, 5), (4, 4)):
        samples = [i < c for i in range(n)]
        for k in range(1, n + 1):
            draws = [any(some) for some in combinations(samples, k)]
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
    row = {"prompt": PROMPT, "test": TEST.rpartition("\n")[0], "entry_point": "double"}
    score = ev.score_programs(ev.HUMANEVAL, [row], [[RIGHT, "", ""]])[0]
    assert score["passed"] == [True, False, False]
    assert [*score["metrics"]] == ["pass@1,create_test", "pass@2,create_test"]
    assert [*score["metrics"].values()] == pytest.approx([1 / 3, 2 / 3])


# ---- results -----------------------------------------------------------------------------------------------


def test_compare_by_hand():
    """Three problems only A has right, one only B: difference 2/10, p = 2 (1 + 4) / 16."""
    ours = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    theirs = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    found = ev.compare(ours, theirs)
    assert found["difference"] == pytest.approx(0.2) and found["mcnemar_p"] == pytest.approx(0.625)
    deviation = math.sqrt((3 * 0.8**2 + 1.2**2 + 6 * 0.2**2) / 9)
    assert found["half_width"] == pytest.approx(1.96 * deviation / math.sqrt(10))
    assert ev.compare([1, 0], [1, 0])["mcnemar_p"] == 1.0
    assert ev.compare([0.5, 0], [1, 0])["mcnemar_p"] is None
    assert ev.compare([1], [0]) == {"difference": 1, "half_width": None, "mcnemar_p": 1.0}


def test_the_interval_holds_what_it_promises():
    """Of 95 % intervals from known models, about 95 % must contain the true difference."""
    rng, inside = random.Random(0), 0
    for _ in range(400):
        pairs = [(rng.random() < 0.6, rng.random() < 0.5) for _ in range(200)]
        found = ev.compare([int(a) for a, _ in pairs], [int(b) for _, b in pairs])
        inside += abs(found["difference"] - 0.1) <= found["half_width"]
    assert 0.92 <= inside / 400 <= 0.98


def test_out_and_compare(tmp_path, capsys):
    """What a table is based on must be in the file: settings, versions, each prompt and response."""
    base = str(ROOT / "tests/toy/base")
    outcome = run(f"--limit 6 --max-new-tokens 40 --compare {base} --out {tmp_path}/scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved == json.loads(json.dumps(outcome))
    assert saved["settings"]["limit"] == 6 and "torch" in saved["versions"]
    assert saved["results"]["answers"]["n"] == 6 == len(saved["samples"]["answers"])
    found = saved["compare"]["differences"]["answers,exact_match,final-answer"]
    assert found == {"difference": 0, "half_width": 0, "mcnemar_p": 1.0}
    assert "difference" in capsys.readouterr().out


def test_limit_counts_as_in_lm_eval(capsys):
    """A share is rounded up; the first problems, so that their examples stay the same."""
    assert run("--limit 0.005 --max-new-tokens 4")["results"]["answers"]["n"] == 3
    one = run("--limit 1 --max-new-tokens 4")["results"]["answers"]
    assert one["exact_match_stderr,final-answer"] is None


# ---- bad input ---------------------------------------------------------------------------------------------

GSM_ROW = {"question": "1+1?", "answer": "2\n#### 2"}
CODE_ROW = {"prompt": PROMPT, "test": "def check(candidate):\n    pass\n", "entry_point": "double"}

ARC_ROW = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
SWAG_ROW = {"activity_label": "Tea", "ctx_a": "A man", "ctx_b": "", "endings": ["a", "b"], "label": "0"}
WINO_ROW = {"sentence": "It is _ here.", "option1": "a", "option2": "b", "answer": "1"}
MMLU_ROW = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}


def truth_row(kind, labels):
    return {"question": "Is it?", f"{kind}_targets": {"choices": ["a", "b"], "labels": labels}}


@pytest.mark.parametrize(
    "task, rows, says",
    [
        ("gsm8k", [GSM_ROW, {"question": "1+1?"}], ["line 2", "answer", "None"]),
        ("gsm8k", [GSM_ROW, {"question": "1+1?", "answer": 18}], ["line 2", "answer", "18"]),
        ("gsm8k", [GSM_ROW, {"question": "1+1?", "answer": "It is 2"}], ["line 2", "It is 2", "#### "]),
        ("gsm8k", [{"question": ["1+1?"], "answer": "#### 2"}], ["line 1", "question", "['1+1?']"]),
        ("gsm8k", [], ["0 problems"]),
        ("gsm8k", ["text"], ["line 1", "one JSON object"]),
        ("answers", [{"question": "1+1?", "answer": "2"}], ["line 1", "answer"]),
        ("humaneval", [{"prompt": PROMPT, "test": ""}], ["line 1", "entry_point"]),
        ("humaneval", [CODE_ROW | {"entry_point": "triple"}], ["line 1", "entry_point", "triple"]),
        ("arc_easy", [ARC_ROW, ARC_ROW | {"answerKey": "C"}], ["line 2", "answerKey", "label", "'C'"]),
        ("arc_easy", [ARC_ROW | {"choices": ["a", "b"]}], ["line 1", "choices", "label"]),
        ("arc_easy", [ARC_ROW | {"choices": {"text": ["a", ""], "label": ["A", "B"]}}], ["line 1", "empty"]),
        ("arc_easy", [ARC_ROW | {"choices": {"text": ["a"], "label": ["A", "B"]}}], ["line 1", "choices"]),
        ("hellaswag", [SWAG_ROW | {"label": ""}], ["line 1", "label", "''", "validation"]),
        ("hellaswag", [SWAG_ROW | {"endings": ["a", "[step]"]}], ["line 1", "empty"]),
        ("winogrande", [WINO_ROW | {"sentence": "no blank"}], ["line 1", "sentence", "_"]),
        ("winogrande", [WINO_ROW | {"answer": ""}], ["line 1", "answer", "1 or 2", "validation"]),
        ("truthfulqa_mc1", [truth_row("mc1", [0, 1])], ["line 1", "mc1_targets", "first is true"]),
        ("truthfulqa_mc2", [truth_row("mc2", [1, 1])], ["line 1", "mc2_targets", "1 and 0"]),
        ("truthfulqa_mc2", [truth_row("mc2", [1, 0, 1])], ["line 1", "mc2_targets", "as many"]),
        ("mmlu", [MMLU_ROW | {"answer": 4}], ["line 1", "answer", "0, 1, 2 or 3", "4"]),
        ("mmlu", [MMLU_ROW | {"answer": "B"}], ["line 1", "answer", "'B'"]),
        ("mmlu", [MMLU_ROW | {"choices": ["a"]}], ["line 1", "choices", "four"]),
        ("mmlu", [MMLU_ROW | {"subject": "cooking"}], ["line 1", "subject", "cooking"]),
        ("mmlu", [], ["0 problems"]),
        ("mt_bench", [{"question_id": 81, "category": "math", "turns": "one"}], ["line 1", "turns", "'one'"]),
    ],
)
def test_bad_rows(task, rows, says, tmp_path, capsys):
    """lm_eval scores most of these as silent zeros."""
    file = write_jsonl(tmp_path / "test.jsonl", rows)
    flags = f"--model nowhere --tasks {task} --data {task}={file} --shots 0 --allow-code-execution"
    fails(capsys, flags, "error: ", *says)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--tasks gsm9k", ["gsm9k", "humaneval"]),
        ("--tasks gsm8k,gsm8k", ["gsm8k,gsm8k", "once"]),
        ("--tasks gsm8k --data humaneval=x", ["humaneval", "--tasks gsm8k"]),
        ("--data answers", ["TASK=PATH"]),
        ("--data answers=nowhere.jsonl", ["nowhere.jsonl"]),
        ("--limit 0", ["--limit", "0"]),
        ("--samples 2", ["--temperature"]),
        ("--tasks humaneval", ["--allow-code-execution"]),
        ("--max-new-tokens 512 --limit 1", ["512", "window", "--max-new-tokens"]),
        ("--model nowhere", ["nowhere"]),
        ("--tasks arc_easy --leaderboard --shots 3", ["--leaderboard", "--shots 3"]),
        ("--tasks reward --data reward=x", ["--reward-model"]),
        ("--tasks mt_bench", ["question.jsonl"]),
        ("--tasks mt_bench --data mt_bench=x --compare y", ["--compare"]),
    ],
)
def test_bad_flags(flags, says, capsys):
    fails(capsys, flags, "error: ", *says)


HELLO = "\n\nHuman: Hi\n\nAssistant: Hello"
BROKEN = {  # what is done to a model's folder -> what the sentence says
    "a pickle": (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "safetensors"),
    "half a file": (lambda path: os.truncate(path / "model.safetensors", 9999), "not a"),
    "no model": (lambda path: (path / "config.json").unlink(), "not a"),
    "own code": (lambda path: (path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}'), "custom code"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_cannot_be_read(name, tmp_path, capsys):
    """Pickles and a model's own code may do anything; neither is read unless it is asked for."""
    shutil.copytree(BASE, tmp_path / "model")
    spoil, says = BROKEN[name]
    spoil(tmp_path / "model")
    fails(capsys, f"--model {tmp_path}/model --limit 1", says, "--trust-remote-code")
    flags = f"--tasks reward --data reward={write_jsonl(tmp_path / 'x.jsonl', [{'chosen': HELLO}])} --limit 1"
    fails(capsys, f"{flags} --reward-model {tmp_path}/model", says)


@pytest.mark.parametrize("out", ["", "/file.jsonl/x.json", "/file.jsonl/x/y.json"])
def test_where_nothing_can_be_written(out, tmp_path, capsys):
    """Said at once, not when all answers are there and would be lost."""
    write_jsonl(tmp_path / "file.jsonl", [GSM_ROW])
    with pytest.raises(SystemExit) as stop:
        ev.run_safely(ev.main, ev.parse_args(f"--limit 1 --out {tmp_path}{out}".split()))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.startswith("error: ") and str(tmp_path) in said.err
    assert "parameters" not in said.out  # before a model was loaded


def test_a_file_of_something_else_is_not_taken_for_answers(tmp_path, capsys):
    """--answers goes on where a file ends; the demonstrations, named by mistake, would be overwritten."""
    other = write_jsonl(tmp_path / "demos.jsonl", [GSM_ROW])
    before, questions = other.read_bytes(), write_jsonl(tmp_path / "q.jsonl", QUESTIONS[:1])
    fails(capsys, f"--tasks mt_bench --data mt_bench={questions} --answers {other}", "demos.jsonl line 1")
    assert other.read_bytes() == before


def test_ctrl_c_is_one_sentence(capsys):
    """A traceback for wanting to stop teaches nobody anything."""
    def stopped(args):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        ev.run_safely(stopped, None)
    assert stop.value.code == 130 and capsys.readouterr().err.startswith("error: stopped")


def test_too_few_rows_for_the_examples(tmp_path, capsys):
    for split, n in (("train", 3), ("test", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", [GSM_ROW] * n)
    flags = f"--tasks gsm8k --model nowhere --data gsm8k={tmp_path}"
    fails(capsys, flags, "3 rows", "5 worked examples")
    mmlu = f"--tasks mmlu --model nowhere --shots 9 --data mmlu={oracle.ROWS / 'mmlu'}"
    fails(capsys, mmlu, "abstract_algebra", "5 rows", "9 worked examples")
    (tmp_path / "train.jsonl").rename(tmp_path / "training.jsonl")
    fails(capsys, flags, "train.*")


def test_no_template_and_no_eos(tmp_path, capsys):
    """Without a template --chat would silently ask in another format; without EOS nothing could end."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.save_pretrained(tmp_path)
    row = write_jsonl(tmp_path / "gsm8k.jsonl", [GSM_ROW])
    fails(capsys, f"--model {tmp_path} --tasks gsm8k --chat --shots 0 --data gsm8k={row}", "chat template")
    fails(capsys, f"--model {tmp_path}", "chat template")
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    fails(capsys, f"--model {tmp_path} --tasks gsm8k --shots 0 --data gsm8k={row}", "EOS")


def test_winogrande_that_ends_in_the_blank(tmp_path, capsys):
    """lm_eval scores one blank there without a word."""
    row = write_jsonl(tmp_path / "x.jsonl", [WINO_ROW | {"sentence": "It is _"}])
    with pytest.raises(SystemExit):
        run(f"--tasks winogrande --model nowhere --data winogrande={row}")
    assert "x.jsonl line 1: nothing follows" in capsys.readouterr().out


def test_files_as_people_have_them(tmp_path):
    """BOM, CRLF, blank lines, a list instead of lines, gzip: all the same two rows."""
    lines = [json.dumps(GSM_ROW | {"question": q}, ensure_ascii=False) for q in ("a\u2028b", "c")]
    contents = {
        "a.jsonl": "\n".join(lines).encode(),
        "b.jsonl": b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n",
        "c.json": ("[" + ",\n".join(lines) + "]").encode(),
        "d.jsonl.gz": gzip.compress("\n".join(lines).encode()),
    }
    found = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found.append([row for _, row in ev.read_rows(tmp_path / name, "test")])
    assert len(found[0]) == 2 and all(rows == found[0] for rows in found)


UNREADABLE = [b'{"question": "a"}\n{oops\n', b"\xff\xfe", b"\n{", b'{}\n{"a": "\xff"}\n']


@pytest.mark.parametrize("content", UNREADABLE)
def test_files_that_cannot_be_read(content, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(content)
    sentence = fails(capsys, f"--data answers={tmp_path}/x.jsonl", "x.jsonl")
    assert "line 2" in sentence or "UTF-8" in sentence


# ---- README, the file itself -------------------------------------------------------------------------------


def test_readme_commands_parse():
    """A README command that does not run is the first thing a newcomer meets."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\s*python eval.py(.*)$", text + (ev.__doc__ or ""), re.MULTILINE)
    assert len(found) >= 6
    for flags in found:
        ev.parse_args(shlex.split(flags.split("#")[0]))


def test_the_shape_of_the_script():
    """Readable in one screen's width."""
    lines = (ROOT / "eval.py").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("name", ["die", "number", "chunks", "final_answer", "load"])
def test_pieces_shared_with_gsil_are_the_same_text(name):
    """Copied, not imported: a reader meets the same function, and a repair must reach both."""
    assert inspect.getsource(getattr(ev, name)) == inspect.getsource(getattr(gsil, name))
