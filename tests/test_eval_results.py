"""eval.py: means, intervals and comparisons, what is printed and written."""

import json
import math

import pytest
from helpers import evaluate

import eval as ev


def test_ties_and_tiny_probabilities():
    """Of equal choices not the first would count, or probabilities that underflow would give 0 / 0."""
    problem = {"choices": ["a", "b"], "gold": 0}
    assert ev.acc(problem, [-2.0, -2.0])["acc,none"] == 1
    assert ev.mc2(problem | {"labels": [0, 1]}, [-2000.0, -2000.0])["acc,none"] == 0.5


def test_summary_by_hand():
    """A standard error of one problem, or MMLU's groups, would differ from lm_eval's."""
    scored = [{"truncated": True, "empty": 2, "metrics": {"acc,none": right}} for right in (1, 0, 1)]
    summary = ev.summarize(scored)
    low, high = summary.pop("acc_interval,none")
    expected = {"n": 3, "truncated": 3, "empty": 6, "unfinished": 0, "acc,none": 2 / 3}
    assert summary == pytest.approx(expected | {"acc_stderr,none": 1 / 3})
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's
    assert ev.summarize(scored[:1])["acc_stderr,none"] is None
    sizes = {group: len(names.split()) for group, names in ev.MMLU_SUBJECTS.items()}
    assert sizes == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


def test_intervals_by_hand():
    """Intervals would go beyond 0 or 1, be empty when all are right, or be Wilson's where nothing is a share."""
    assert ev.interval(0.9, None, 20) == pytest.approx((0.6990, 0.9721), abs=1e-4)
    assert ev.interval(0.5, None, 2) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert ev.interval(1.0, 0.0, 3) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert ev.interval(0.0, None, 1) == pytest.approx((0.0, 0.7935), abs=1e-4)
    scored = [{"metrics": {"acc,none": value}} for value in (0.2, 0.4, 0.9)]
    summary = ev.summarize(scored)
    stderr = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    assert summary["acc_interval,none"] == pytest.approx((0.5 - 1.96 * stderr, 0.5 + 1.96 * stderr))
    assert ev.summarize(scored[:1])["acc_interval,none"] is None


def test_compare_by_hand():
    """Three problems that only A has right and one that only B has would give another p than 2 (1 + 4) / 16."""
    found = ev.paired_difference([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    deviation = math.sqrt((3 * 0.8**2 + 1.2**2 + 6 * 0.2**2) / 9)
    expected = {"difference": 0.2, "half_width": 1.96 * deviation / math.sqrt(10), "mcnemar_p": 0.625}
    assert found == pytest.approx(expected)
    assert ev.paired_difference([0.5, 0], [1, 0])["mcnemar_p"] is None
    assert ev.paired_difference([1], [0]) == {"difference": 1, "half_width": None, "mcnemar_p": 1.0}


def test_out_and_compare(inputs, tmp_path, capsys):
    """A table's settings, versions, prompts and responses would be lost with the terminal."""
    base = inputs.split()[1]
    outcome = evaluate(f"{inputs} --limit 0.7 --compare {base} --out {tmp_path}/scores.json")
    text = (tmp_path / "scores.json").read_text()
    saved = json.loads(text)
    assert saved == json.loads(json.dumps(outcome)) and text.startswith('{\n  "version": 2,\n')
    assert saved["settings"]["limit"] == 0.7 and "torch" in saved["packages"]
    assert saved["results"]["answers"]["n"] == 5 == len(saved["samples"]["answers"])  # of 6, rounded up
    found = saved["compare"]["differences"]["answers,exact_match,final-answer"]
    assert found == {"difference": 0, "half_width": 0, "mcnemar_p": 1.0}
    assert f"difference from {base}" in capsys.readouterr().out


def test_what_a_table_looks_like(capsys):
    """A reader would have to look up names, or take a tiny p for 0."""
    result = {"n": 100, "truncated": 0, "empty": 0, "unfinished": 3, "shots": 5}
    result |= {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.05}
    result["exact_match_interval,strict-match"] = ev.interval(0.5, 0.05, 100)
    ev.print_results({"model": "M", "results": {"gsm8k": result}})
    right, wrong = [{"mmlu": [{"metrics": {"acc,none": value}}] * 20} for value in (1, 0)]
    ev.compare({"samples": right}, {"model": "b", "samples": wrong})
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(3) == "gsm8k: 3 responses were cut at --max-new-tokens"
    assert [line.split() for line in lines if line] == [
        ["M", "value", "95", "%", "interval", "n", "shots"],
        ["gsm8k", "strict-match", "0.5000", "[0.404,", "0.596]", "100", "5"],
        ["difference", "from", "b", "±", "p"],
        ["mmlu", "acc", "1.0000", "0.0000", "<0.001"],
    ]
