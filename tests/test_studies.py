"""The parts of tests/studies whose mistakes would not show in a table: theory, shares, intervals, flags."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "studies"))
import pretrained
import torch
import toy


def test_closed_form_multiplies_odds():
    """The line of the figure. By hand: odds 1/4, times the square of (0.4/0.2) / (0.6/0.8) = 8/3, are 16/9."""
    assert pretrained.closed_form(0.2, 0.4, 0.5) == pytest.approx(16 / 25, rel=1e-12)
    assert pretrained.closed_form(0.2, 0.4, 1) == pytest.approx(0.4, rel=1e-12)
    assert pretrained.closed_form(0.2, 0.4, math.inf) == pytest.approx(0.2, rel=1e-12)


def test_prediction_is_per_number_of_steps():
    """One closed form of mean shares would predict something else: odds do not average."""
    kinds = ((2, True, 0.2), (3, False, 0.5), (4, False, 0.5), (4, True, 0.5))
    heldout = [{"steps": steps} for steps, _, _ in kinds]
    demos = [{"steps": steps, "works": works} for steps, works, _ in kinds]
    by_steps = pretrained.shares({"heldout": heldout, "demos": demos}, [start for _, _, start in kinds])
    assert by_steps == [(0.2, 1, 0.25), (0.5, 0, 0.25), (0.5, 0.5, 0.5)]
    assert pretrained.predict(by_steps, 0.3) == 0.25 * 1 + 0.25 * 0 + 0.5 * 0.5


def test_intervals():
    """0 of 96 is no certainty, problems that all seeds share are no new problems, and seeds count by their spread."""
    mean, half = pretrained.interval([[False] * 96])
    assert (mean, half) == (0, pytest.approx(1.96 * math.sqrt(0.02 * 0.98 / 96), rel=1e-9))
    outcomes = [True, False] * 48
    assert pretrained.interval([outcomes, outcomes]) == pretrained.interval([outcomes])
    _, half = pretrained.interval([[0.2, 0.4], [0.4, 0.6]])  # problems 0.3 and 0.5, seeds 0.3 and 0.5
    assert half == pytest.approx(1.96 * math.sqrt(0.02 / 2 + 0.02 / 2), rel=1e-9)


def test_parts_of_the_data():
    """The prediction takes the demonstrations' shares as given: chance must not move them. A question in two parts
    would be known from training; and held-out problems that changed with --demos could not be compared."""
    parts = pretrained.make_parts("habit", pretrained.parse_args(["--model", "M", "--lesson", "8000"]))
    for part, share in {"crowd": {2: 0.3, 3: 0.2, 4: 0.1}, "demos": {2: 0.45, 3: 0.4, 4: 0.35}}.items():
        for steps in (2, 3, 4):
            works = [row["works"] for row in parts[part] if row["steps"] == steps]
            assert sum(works) == int(share[steps] * len(works) + 1e-6) > 0
        assert all(row["works"] == ("=" in row["answer"]) for row in parts[part])
    questions = [row["question"] for rows in parts.values() for row in rows]
    assert len(set(questions)) == len(questions)
    more = pretrained.make_parts("habit", pretrained.parse_args(["--model", "M", "--demos", "90"]))
    assert more["heldout"] == parts["heldout"]


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    """Finished parts are kept by name: with another --demos they would pass for results of that size."""
    cases = []
    monkeypatch.setattr(pretrained, "study", lambda case, args: cases.append(case))
    flags = ["--model", "M", "--out", str(tmp_path)]
    pretrained.main(pretrained.parse_args(flags))
    pretrained.main(pretrained.parse_args([*flags, "--cases", "mixed", "--seeds", "3"]))
    assert cases == ["habit", "mixed"]
    with pytest.raises(SystemExit, match="was begun with demos = 192, not 90"):
        pretrained.main(pretrained.parse_args([*flags, "--demos", "90"]))


def test_toys_interval_has_both_sources_of_chance():
    """Without the seeds' term runs that differ would look sure. By hand: p = 0.5, seeds 0.4, 0.5, 0.6, s = 0.1."""
    assert toy.cell([0.5]) == "0.500 ± 0.044"  # 1.96 sqrt(0.25 / 500)
    assert toy.cell([0.4, 0.5, 0.6]) == "0.500 ± 0.121"  # 1.96 sqrt(0.25 / 500 + 0.01 / 3)


def test_sft_extrapolated_by_one_is_sft(tmp_path):
    """The control would be unfair if it mixed up start and end, or a finished row and its neighbour's cache."""
    start = toy.gsil.load_model(toy.gsil.TOY / "base", toy.FLAGS)
    end = toy.gsil.load_model(toy.gsil.TOY / "base", toy.FLAGS)
    with torch.no_grad():
        end.get_output_embeddings().weight *= 0.9
    end.save_pretrained(tmp_path / "sft")
    prompts = [problem["prompt_ids"] for problem in toy.PROBLEMS[:20]]
    settings = (toy.EOS, 40, 0, 20, "seed")
    wanted = toy.gsil.sample(end, prompts, *settings)
    assert wanted != toy.gsil.sample(start, prompts, *settings)
    assert len({len(response) for response in wanted}) > 1  # so some rows finish before others
    for make in (toy.Mixed, toy.extrapolated):
        assert toy.gsil.sample(make(tmp_path, 1), prompts, *settings) == wanted
    twice = toy.extrapolated(tmp_path, 0.5).get_output_embeddings().weight
    assert torch.allclose(twice, 0.8 * start.get_output_embeddings().weight, rtol=1e-5)


def test_every_table_of_the_toy(monkeypatch, tmp_path, capsys):
    """They take an hour. A flag that left the scripts, or a row that lost its number, must show before that."""
    commands = set()

    def run(command, seed):
        script, *flags = command.split()
        {"gsil": toy.gsil, "irft": toy.irft}[script].parse_args([*flags, "--out", str(tmp_path / "none")])
        commands.add(command)
        rows = [
            {"name": "base", "seconds": None},
            {"name": "round 1", "seconds": 2},
            {"name": "sft", "seconds": 1},
        ]
        (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
        return tmp_path

    monkeypatch.setattr(toy, "run", run)
    monkeypatch.setattr(toy, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)  # main() leaves it, and monkeypatch comes back
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    found = {**dict.fromkeys(toy.COLUMNS, 0.5), "gap": 1.0}
    monkeypatch.setattr(toy, "look", lambda policy, seed: found)
    monkeypatch.setattr(toy, "looked", lambda folder, seed: found)
    monkeypatch.setattr(toy, "extrapolated", lambda folder, scale: None)
    monkeypatch.setattr(toy, "Mixed", lambda folder, scale: None)
    toy.main(toy.parse_args(["all", "--seeds", "2"]))
    printed = capsys.readouterr().out.split("\n\n")
    tables = [part.splitlines() for part in printed if part.startswith("|")]
    assert len(tables) == len(toy.TABLES)
    for lines in tables:
        assert len(lines) > 2
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert len(commands) > 40
