"""eval.py: prompts, generations, filters and metrics against lm_eval; execution of programs; bad input.

tests/parity/golden.json was written by tests/parity/oracle.py from lm_eval 0.4.13 itself. Everything is offline.
"""

import gzip
import importlib.util
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch

import eval as ev
import gsil
from conftest import ROOT, byte_tokenizer, tiny_model

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
        pytest.skip("these versions of torch and tokenizers make other random models than golden.json is about")
    return folder


def flags_of(case, models, batch=1):
    """One of oracle.CASES as flags of eval.py."""
    window, family = case.get("window", 2048), case["task"].split("_")[0]
    return (f"--model {models}/{case['model']}{window} --tasks {case['task']} --batch-size {batch} --device cpu "
            f"--data {case['task']}={ROOT}/tests/parity/rows/{family} --max-new-tokens {oracle.NEW_TOKENS} "
            + (f"--shots {case['shots']} " if "shots" in case else "") + "--chat " * case.get("chat", False)
            + (f"--limit {case['limit']} " if "limit" in case else "") + "--allow-code-execution")


def check_equal(samples, results, expected):
    """In this order, so that the first failure names the cause: prompts, responses, answers, metrics, means."""
    theirs = expected["documents"]
    assert [sample["prompt"] for sample in samples] == [document["prompt"] for document in theirs]
    assert [sample["responses"] for sample in samples] == [[document["response"]] for document in theirs]
    check_scores(samples, theirs)
    for key, value in expected["aggregates"].items():
        assert results[key] == (None if value == "N/A" else pytest.approx(value, abs=1e-9)), key


def check_scores(samples, theirs):
    for sample, document in zip(samples, theirs, strict=True):
        assert {name: found[0] for name, found in sample["extracted"].items()} == document["extracted"]
        assert sample["metrics"] == document["metrics"]


@pytest.mark.parametrize("name", oracle.CASES)
def test_equal_to_lm_eval(name, models):
    """A prompt that differs in one blank, a missing BOS, one stop string less: each changes the score."""
    outcome = run(flags_of(oracle.CASES[name], models))
    task = oracle.CASES[name]["task"]
    check_equal(outcome["samples"][task], outcome["results"][task], GOLDEN["cases"][name])


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot_zeroshot", "humaneval", "humaneval_instruct"])
def test_canned_responses_score_as_in_lm_eval(task):
    """Right and wrong answers, tricky ones above all: '#### 18.', 'The answer is 18', '...', sys.exit(0)."""
    rows, responses = oracle.canned()[task]
    samples = ev.TASKS[task].score(ev.TASKS[task], rows, [[text] for text in responses])
    check_scores(samples, GOLDEN["canned"][task]["documents"])
    summary = ev.summarize([{"responses": [text], "truncated": False, **sample}
                            for text, sample in zip(responses, samples)])
    for key, value in GOLDEN["canned"][task]["aggregates"].items():
        assert summary[key] == pytest.approx(value, abs=1e-9)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
@pytest.mark.parametrize("name", [name for name, case in oracle.CASES.items() if "gsm8k" in case["task"]])
def test_equal_to_lm_eval_live(name, models):
    """The golden file could be stale; where lm_eval is installed it is asked again."""
    outcome, task = run(flags_of(oracle.CASES[name], models)), oracle.CASES[name]["task"]
    expected = oracle.ask(oracle.CASES[name], models)
    check_equal(outcome["samples"][task], outcome["results"][task], expected)
