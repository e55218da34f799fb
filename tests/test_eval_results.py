"""eval.py: means, intervals and comparisons, what is printed and written."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT
from eval_tools import BASE, run, write_jsonl

import eval as ev


def test_a_measure_of_choices_by_hand():
    """Characters, not bytes, and not the blank in front: either would turn one of these two around."""
    one = ev.measure({"choices": ["abc", "éé"], "gold": 0}, [-2.7, -2.0])
    assert one == {"acc,none": 0, "acc_norm,none": 1}
    assert ev.measure({"choices": ["a", "bcd"], "gold": 1}, [-1.1, -3.0])["acc_norm,none"] == 1
    equal = {"choices": ["abc", "éé"], "gold": 0}
    assert ev.measure(equal, [-2.0, -2.0])["acc,none"] == 1  # of equals the first
    assert ev.measure(equal | {"labels": [0, 1]}, [-2.0, -2.0])["acc,none"] == 0.5


def test_summary_by_hand():
    """Two subjects, 1/2 and 4/4 right: 5/6 over all questions; the error from within the subjects."""
    scored = [{"truncated": False, "metrics": {"acc,none": float(right)}} for right in (1, 0, 1, 1, 1, 1)]
    found = ev.summarize(scored[:2], scored[2:])
    assert found["acc,none"] == pytest.approx(5 / 6) and found["n"] == 6
    assert found["acc_stderr,none"] == pytest.approx(math.sqrt(0.5 / 4 / 6))
    assert ev.summarize(scored[:2])["acc_stderr,none"] == pytest.approx(math.sqrt(0.5 / 2))
    assert ev.summarize(scored[:1])["acc_stderr,none"] is None
    sizes = {group: len(names.split()) for group, names in ev.SUBJECTS.items()}
    assert sizes == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


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
    outcome = run(f"--limit 6 --max-new-tokens 40 --compare {BASE} --out {tmp_path}/scores.json")
    text = (tmp_path / "scores.json").read_text()
    saved = json.loads(text)
    assert saved == json.loads(json.dumps(outcome)) and text.startswith('{\n  "version": 2,\n')
    assert saved["settings"]["limit"] == 6 and "torch" in saved["packages"]
    assert saved["results"]["answers"]["n"] == 6 == len(saved["samples"]["answers"])
    found = saved["compare"]["differences"]["answers,exact_match,final-answer"]
    assert found == {"difference": 0, "half_width": 0, "mcnemar_p": 1.0}
    assert "difference" in capsys.readouterr().out


def test_what_a_table_looks_like(capsys):
    """Short names, half the width of the interval, a tiny p as what it is; nothing else to look up."""
    result = {"n": 100, "truncated": 0, "empty": 0, "unfinished": 3, "exact_match,strict-match": 0.5}
    ev.print_results(
        {"model": "M", "results": {"gsm8k": result | {"exact_match_stderr,strict-match": 0.05, "shots": 5}}}
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["M", "value", "±", "n", "shots"],
        ["gsm8k", "strict-match", "0.5000", "0.0980", "100", "5"],
    ]
    assert lines[3] == "gsm8k: 3 responses were cut at --max-new-tokens"
    sides = [
        {"model": name, "samples": {"mmlu": [{"metrics": {"acc,none": right}}] * 20}}
        for name, right in (("a", 1), ("b", 0))
    ]
    ev.print_differences(*sides)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["difference", "from", "b", "±", "p"], ["mmlu", "acc", "1.0000", "0.0000", "<0.001"]]


def test_limit_counts_as_in_lm_eval():
    """A share is rounded up; the first problems, so that their examples stay the same."""
    assert run("--limit 0.005 --max-new-tokens 4")["results"]["answers"]["n"] == 3
    one = run("--limit 1 --max-new-tokens 4")["results"]["answers"]
    assert one["exact_match_stderr,final-answer"] is None


def test_a_terminal_without_the_letters(tmp_path):
    """± in a cp1252 or ASCII pipe, after hours of work, must not end in a UnicodeEncodeError."""
    row = write_jsonl(tmp_path / "x.jsonl", [{"question": "ava has 2 apples .", "answer": "#### 2"}])
    command = [sys.executable, f"{ROOT}/eval.py", "--data", row, "--max-new-tokens", "4"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=False)
    assert done.returncode == 0 and b"\\xb1" in done.stdout, done.stderr
