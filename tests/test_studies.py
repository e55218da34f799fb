"""The parts of tests/studies whose mistakes would not show in a table: theory, shares, intervals, flags."""

import json
import math

import bench
import pretrained
import pytest
import torch
from helpers import finite
from transformers import LlamaForCausalLM

import gsil

TINY = f"--model {gsil.TOY}/base --heldout 40 --demos 40 --crowd 40 --lesson 40 --lesson-epochs 1 --epochs 1"
TINY += " --policy-steps 1 --require 0 --max-new-tokens 20 --out "


def test_theory():
    """The line in the figures would be a wrong prediction."""
    # By hand: odds 1/4, times the square of (0.4/0.2) / (0.6/0.8) = 8/3, are 16/9.
    for scale, share in ((0.5, 16 / 25), (1, 0.4), (math.inf, 0.2)):
        assert pretrained.closed_form(0.2, 0.4, scale) == pytest.approx(share, rel=1e-12)
    # The prediction is made per number of steps, because the odds of a mean are not the mean of odds.
    problems = ((2, True), (3, False), (4, False), (4, True))
    heldout = [{"steps": steps} for steps, _ in problems]
    demos = [{"steps": steps, "works": works} for steps, works in problems]
    by_steps = pretrained.shares({"heldout": heldout, "demos": demos}, [0.2, 0.5, 0.5, 0.5])
    assert by_steps == [(0.2, 1, 0.25), (0.5, 0, 0.25), (0.5, 0.5, 0.5)]
    assert pretrained.predict(by_steps, 0.3) == 0.25 * 1 + 0.25 * 0 + 0.5 * 0.5


def test_intervals():
    """0 of 96 would look certain, seeds that share their problems would look like new problems, and seeds that
    differ would look sure."""
    mean, half = pretrained.interval([[False] * 96])
    assert (mean, half) == (0, pytest.approx(1.96 * math.sqrt(0.02 * 0.98 / 96), rel=1e-9))
    assert pretrained.interval([[True, False] * 48] * 2) == pretrained.interval([[True, False] * 48])
    _, half = pretrained.interval([[0.2, 0.4], [0.4, 0.6]])  # problems 0.3 and 0.5, seeds 0.3 and 0.5
    assert half == pytest.approx(1.96 * math.sqrt(0.02 / 2 + 0.02 / 2), rel=1e-9)


def test_parts_of_the_data():
    """Chance would move the shares that the prediction takes as given, a question in two parts would be known
    from training, and another --demos would change the held-out problems."""
    parts = pretrained.make_parts("habit", pretrained.parse_args(["--model", "M", "--lesson", "8000"]))
    for part, shares in pretrained.HABITS["habit"].items():
        for steps, share in shares.items():
            works = [row["works"] for row in parts[part] if row["steps"] == steps]
            assert sum(works) == int(share * len(works) + 1e-6) > 0
        assert all(row["works"] == ("=" in row["answer"]) for row in parts[part])
    questions = [row["question"] for rows in parts.values() for row in rows]
    assert len(set(questions)) == len(questions)
    more = pretrained.make_parts("habit", pretrained.parse_args(["--model", "M", "--demos", "90"]))
    assert more["heldout"] == parts["heldout"]


def study(flags):
    pretrained.main(pretrained.parse_args((TINY + flags).split()))


def test_a_study_from_start_to_table(tmp_path, capsys):
    """A study would lose an hour to a flag or a file that the scripts no longer have, and results of other
    settings would be mixed."""
    study(f"{tmp_path} --methods rft extrapolated")
    rows = [json.loads(file.read_text()) for file in (tmp_path / "habit/rows").glob("*.json")]
    measured = [row for row in rows if isinstance(row, dict)]
    assert len(measured) == 5  # start, SFT, SFT extrapolated by 1/0.5 and 1/0.3, RFT
    assert all(finite(row["logp"]) and len(row["works"]) == 40 for row in measured)
    lines = [line for line in (tmp_path / "habit/results.md").read_text().splitlines() if line[:1] == "|"]
    assert len(lines) == 7 and len({line.count("|") for line in lines}) == 1
    assert not list((tmp_path / "habit").glob("rft*/**/*.safetensors"))  # half a gigabyte each
    with pytest.raises(SystemExit, match="was begun with demos = 40, not 90"):
        study(f"{tmp_path} --demos 90")
    capsys.readouterr()
    study(f"{tmp_path} --methods rft")  # everything is kept: nothing is trained
    assert "to load" not in capsys.readouterr().out


@pytest.mark.parametrize("side", ["ours", "plain", "sample", "generate"])
def test_a_side_of_the_benchmark(side):
    """The comparison would miss a side of which the scripts' functions changed."""
    flags = "--size tiny --batch 2 --steps 1 --max-new-tokens 4"
    args = bench.parse_args(flags.split())
    torch.manual_seed(0)
    model = LlamaForCausalLM(bench.make_config(args)).eval()
    before = model.lm_head.weight.clone()
    figures = bench.SIDES[side](model, bench.make_pairs(args), 2, args)
    assert finite(figures.values()) and min(figures.values()) >= 0
    assert (side in ("ours", "plain")) == (not torch.equal(model.lm_head.weight, before))
