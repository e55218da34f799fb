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
    """A standard error, an interval or MMLU's groups would differ from lm_eval's, or be there for one problem."""
    scored = [{"truncated": True, "empty": 2, "metrics": {"acc,none": right}} for right in (1, 0, 1)]
    summary = ev.summarize(scored)
    low, high = summary.pop("acc_interval,none")
    expected = {"n": 3, "truncated": 3, "empty": 6, "unfinished": 0, "acc,none": 2 / 3}
    assert summary == pytest.approx(expected | {"acc_stderr,none": 1 / 3})
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's
    sizes = {group: len(names.split()) for group, names in ev.MMLU_SUBJECTS.items()}
    assert sizes == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}
    scored = [{"metrics": {"acc,none": value}} for value in (0.2, 0.4, 0.9)]  # no shares
    stderr = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    expected = pytest.approx((0.5 - 1.96 * stderr, 0.5 + 1.96 * stderr))
    assert ev.summarize(scored)["acc_interval,none"] == expected
    assert (
        ev.summarize(scored[:1])["acc_stderr,none"] is ev.summarize(scored[:1])["acc_interval,none"] is None
    )


def test_intervals_by_hand():
    """Intervals of shares would go beyond 0 or 1, or be empty when all are right."""
    assert ev.interval(0.9, None, 20) == pytest.approx((0.6990, 0.9721), abs=1e-4)
    assert ev.interval(1.0, 0.0, 3) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert ev.interval(0.0, None, 1) == pytest.approx((0.0, 0.7935), abs=1e-4)


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
