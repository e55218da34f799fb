"""The study on the toy: intervals, predictions, commands, and one small run from the command to the table."""

import json
import math

import make_toy
import pytest
import toy


def test_intervals_and_verdict():
    """A difference would count by chance if an interval forgot the seeds, the problems, or that there are three."""
    outcomes = [[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1]]  # problems 0, 1, 2/3, 2/3; seeds 1/2, 3/4, 1/2
    halves = [1.96 * math.sqrt(19 / 108 / 4), 4.30 * math.sqrt(1 / 48 / 3)]  # variances 19/108 and 1/48
    assert toy.intervals(outcomes) == pytest.approx([7 / 12, *halves], rel=1e-9)
    assert toy.verdict(-0.3, 0.2, 0.25) == "counts"
    assert toy.verdict(0.22, 0.2, 0.25) == toy.verdict(0.22, 0.25, 0.2) == "does not count"
    assert math.isnan(toy.intervals(outcomes[:1])[2]) and toy.verdict(0.3, 0.2, math.nan) == "one seed"
    for bits in ([0, 0, 1], [1] * 9, [0]):  # leading zeros are problems, too
        assert toy.from_hex(toy.to_hex(bits)) == bits


def test_predictions():
    """The columns of the habit's table would bear wrong names if the formulas were mixed up."""
    one = {"2": [100, 20, 40]}  # odds 1/4, times the square of (0.4/0.2) / (0.6/0.8) = 8/3, are 16/9
    for formula in (toy.pooled, toy.per_steps, toy.one_shift):  # one kind of prompt: all are the closed form
        assert formula(one, {"2": 7}, 0.5) == pytest.approx(16 / 25, abs=1e-6)  # near enough for L-BFGS
    crowds = zip(make_toy.HASTY["base"].items(), make_toy.HASTY["demo"].values())
    kinds = {str(steps): [1000, 1000 * (1 - own), 1000 * (1 - theirs)] for (steps, own), theirs in crowds}
    problems = dict.fromkeys(kinds, 1)
    found = [formula(kinds, problems, 0.3) for formula in (toy.per_steps, toy.one_shift, toy.pooled)]
    assert found == pytest.approx([0.9865, 0.9769, 0.9827], abs=1e-4)  # four digits
    assert toy.per_steps(kinds, problems, 0.5, rounds=2) == pytest.approx(0.3, abs=1e-9)  # back at the start
    assert toy.steps_of("Ava has 7 eggs . Ava buys 4 more . Ava gives away 1 . how many does Ava have ?") == 2


def test_every_command_parses(tmp_path):
    """They take hours: a flag that left the scripts, or a table whose run has no command, must show before that."""
    args = toy.parse_args(["all", "--out", str(tmp_path)])
    commands = [toy.command(name, 0, args) for name in toy.RUNS]
    for script, *flags in commands + [toy.shlex.split(text) for text in toy.PAPERS.values()]:
        getattr(toy, script).parse_args([*flags, "--out", str(tmp_path / "none")])
    for names, _ in toy.TABLES.values():
        assert {*names} <= {*toy.RUNS, "extrapolated", "new-extrapolated"}


def test_a_slice_from_run_to_table(tmp_path, monkeypatch, capsys):
    """Tables are made of the files: they must say what the scripts' own table says, and a second call runs nothing."""
    monkeypatch.setattr(toy, "EPOCHS", (1,))
    monkeypatch.setattr(toy, "FACTORS", (1,))
    monkeypatch.setitem(toy.TABLES, "main", (["gsil", "extrapolated"], toy.print_main))
    monkeypatch.chdir(tmp_path)  # main() leaves it, and monkeypatch comes back
    flags = ["main", "--slice", "16", "--seeds", "0", "--out", str(tmp_path / "study")]
    toy.main(toy.parse_args(flags))
    printed = capsys.readouterr().out
    files = {
        file.name: json.loads(file.read_text())["stages"] for file in (tmp_path / "study").glob("*.json")
    }
    rows, table = files["gsil-0.json"], json.loads((tmp_path / "study/runs/gsil-0/summary.json").read_text())
    assert table.pop("demos")["habit"] > 0
    for stage, row in table.items():
        for key in ("greedy", "sampled", "habit"):
            assert sum(toy.from_hex(rows[stage][key])) == round(16 * row[key])
        assert rows[stage]["nll"] == pytest.approx(row["nll"], rel=1e-6)  # other batches, fp32
        assert f"| {row['greedy']:.3f} ± " in printed
    once, longer = files["sft-1-0.json"]["sft"], files["extrapolated-0.json"]["extrapolated"]  # by 1
    assert all(once[key] == longer[key] for key in ("greedy", "sampled", "tokens"))
    toy.shutil.rmtree(tmp_path / "study/runs")
    toy.main(toy.parse_args([*flags, "--report"]))
    assert capsys.readouterr().out == printed and not (tmp_path / "study/runs").exists()


def test_make_toy_with_another_seed(tmp_path):
    """Without --seed the files are the committed ones; with it they must not overwrite these, and are others."""
    for seed, same in (("0", True), ("1", False)):
        make_toy.main(make_toy.parse_args(["--data-only", "--seed", seed, "--out", str(tmp_path)]))
        for part in ("demos", "dev", "heldout", "preferences"):
            committed = (toy.gsil.TOY / f"{part}.jsonl").read_bytes()
            assert ((tmp_path / f"{part}.jsonl").read_bytes() == committed) == same
    assert make_toy.parse_args(["--seed", "1"]).out.parts[-2:] == ("runs", "toy-1")
    assert make_toy.parse_args([]).out == toy.gsil.TOY.resolve()
