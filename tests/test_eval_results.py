"""eval.py: means, intervals and comparisons, what is printed and written."""

import io
import json
import math
import runpy
import sys

import pytest
from eval_tools import run

import eval as ev


def test_ties_and_tiny_probabilities():
    """Of equals the first, as with numpy's argmax. Probabilities that floats cannot tell from 0 have shares."""
    problem = {"choices": ["a", "b"], "gold": 0}
    assert ev.measure(problem, [-2.0, -2.0])["acc,none"] == 1
    assert ev.measure(problem | {"labels": [0, 1]}, [-2000.0, -2000.0])["acc,none"] == 0.5


def test_summary_by_hand():
    """Of one problem there is no error; MMLU's groups have as many subjects as in lm_eval."""
    scored = [{"truncated": True, "empty": 2, "metrics": {"acc,none": right}} for right in (1, 0, 1)]
    expected = {"n": 3, "truncated": 3, "empty": 6, "unfinished": 0, "acc,none": 2 / 3}
    assert ev.summarize(scored) == pytest.approx(expected | {"acc_stderr,none": 1 / 3})
    assert ev.summarize(scored[:1])["acc_stderr,none"] is None
    sizes = {group: len(names.split()) for group, names in ev.SUBJECTS.items()}
    assert sizes == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


def test_compare_by_hand():
    """Three problems only A has right, one only B: difference 2/10, p = 2 (1 + 4) / 16."""
    found = ev.compare([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    deviation = math.sqrt((3 * 0.8**2 + 1.2**2 + 6 * 0.2**2) / 9)
    expected = {"difference": 0.2, "half_width": 1.96 * deviation / math.sqrt(10), "mcnemar_p": 0.625}
    assert found == pytest.approx(expected)
    assert ev.compare([0.5, 0], [1, 0])["mcnemar_p"] is None
    assert ev.compare([1], [0]) == {"difference": 1, "half_width": None, "mcnemar_p": 1.0}


def test_out_and_compare(inputs, tmp_path, capsys):
    """What a table is based on must be in the file: settings, versions, each prompt and response."""
    base = inputs.split()[1]
    outcome = run(f"{inputs} --limit 0.7 --compare {base} --out {tmp_path}/scores.json")
    text = (tmp_path / "scores.json").read_text()
    saved = json.loads(text)
    assert saved == json.loads(json.dumps(outcome)) and text.startswith('{\n  "version": 2,\n')
    assert saved["settings"]["limit"] == 0.7 and "torch" in saved["packages"]
    assert saved["results"]["answers"]["n"] == 5 == len(saved["samples"]["answers"])  # of 6, rounded up
    found = saved["compare"]["differences"]["answers,exact_match,final-answer"]
    assert found == {"difference": 0, "half_width": 0, "mcnemar_p": 1.0}
    assert f"difference from {base}" in capsys.readouterr().out


def test_what_a_table_looks_like(capsys):
    """Short names, half the width of the interval, a tiny p as what it is; nothing else to look up."""
    result = {"n": 100, "truncated": 0, "empty": 0, "unfinished": 3, "shots": 5}
    result |= {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.05}
    ev.print_results({"model": "M", "results": {"gsm8k": result}})
    right, wrong = [{"mmlu": [{"metrics": {"acc,none": value}}] * 20} for value in (1, 0)]
    ev.print_differences({"samples": right}, {"model": "b", "samples": wrong})
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(3) == "gsm8k: 3 responses were cut at --max-new-tokens"
    assert [line.split() for line in lines if line] == [
        ["M", "value", "±", "n", "shots"],
        ["gsm8k", "strict-match", "0.5000", "0.0980", "100", "5"],
        ["difference", "from", "b", "±", "p"],
        ["mmlu", "acc", "1.0000", "0.0000", "<0.001"],
    ]


def test_a_terminal_without_the_letters(inputs, monkeypatch):
    """± in a cp1252 or ASCII pipe, after hours of work, must not end in a UnicodeEncodeError."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, "ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["eval.py", *inputs.split()])
    runpy.run_path(ev.__file__, run_name="__main__")
    assert b"\\xb1" in pipe.getvalue()
