"""The parts of tests/studies whose mistakes would not show in a table: theory, shares, intervals, flags."""

import json
import math

import pretrained
import pytest
import torch
import toy


def test_theory():
    """The line of the figures. By hand: odds 1/4, times the square of (0.4/0.2) / (0.6/0.8) = 8/3, are 16/9.
    It is per number of steps: the closed form of mean shares would be another, as odds do not average."""
    for scale, share in ((0.5, 16 / 25), (1, 0.4), (math.inf, 0.2)):
        assert pretrained.closed_form(0.2, 0.4, scale) == pytest.approx(share, rel=1e-12)
    kinds = ((2, True), (3, False), (4, False), (4, True))
    heldout = [{"steps": steps} for steps, _ in kinds]
    demos = [{"steps": steps, "works": works} for steps, works in kinds]
    by_steps = pretrained.shares({"heldout": heldout, "demos": demos}, [0.2, 0.5, 0.5, 0.5])
    assert by_steps == [(0.2, 1, 0.25), (0.5, 0, 0.25), (0.5, 0.5, 0.5)]
    assert pretrained.predict(by_steps, 0.3) == 0.25 * 1 + 0.25 * 0 + 0.5 * 0.5


def test_intervals():
    """0 of 96 is no certainty, problems that all seeds share are no new problems, and seeds count by their
    spread: without it runs that differ would look sure."""
    mean, half = pretrained.interval([[False] * 96])
    assert (mean, half) == (0, pytest.approx(1.96 * math.sqrt(0.02 * 0.98 / 96), rel=1e-9))
    outcomes = [True, False] * 48
    assert pretrained.interval([outcomes, outcomes]) == pretrained.interval([outcomes])
    _, half = pretrained.interval([[0.2, 0.4], [0.4, 0.6]])  # problems 0.3 and 0.5, seeds 0.3 and 0.5
    assert half == pytest.approx(1.96 * math.sqrt(0.02 / 2 + 0.02 / 2), rel=1e-9)
    assert toy.cell([0.5]) == "0.500 ± 0.044"  # 1.96 sqrt(0.25 / 500)
    assert toy.cell([0.4, 0.5, 0.6]) == "0.500 ± 0.121"  # s = 0.1: 1.96 sqrt(0.25 / 500 + 0.01 / 3)


def test_parts_of_the_data():
    """The prediction takes the demonstrations' shares as given: chance must not move them. A question in two
    parts would be known from training; held-out problems that changed with --demos could not be compared."""
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


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    """Finished parts are kept by name: with another --demos they would pass for results of that size."""
    flags = ["--model", "M", "--out", str(tmp_path)]
    monkeypatch.setattr(pretrained, "study", lambda case, args: None)
    pretrained.main(pretrained.parse_args(flags))
    pretrained.main(pretrained.parse_args([*flags, "--cases", "mixed", "--seeds", "3"]))
    with pytest.raises(SystemExit, match="was begun with demos = 128, not 90"):
        pretrained.main(pretrained.parse_args([*flags, "--demos", "90"]))


def test_sft_extrapolated_by_one_is_sft(tmp_path):
    """The control would be unfair if it mixed up start and end, or a finished row and another's cache."""
    start, end = (toy.gsil.load_model(toy.gsil.TOY / "base", toy.FLAGS) for _ in range(2))
    with torch.no_grad():
        end.get_output_embeddings().weight *= 0.9
    end.save_pretrained(tmp_path / "sft")
    settings = ([problem["prompt_ids"] for problem in toy.PROBLEMS[:20]], toy.EOS, 40, 0, 20, "seed")
    wanted = toy.gsil.sample(end, *settings)
    assert wanted != toy.gsil.sample(start, *settings)
    assert len({len(response) for response in wanted}) > 1  # so some rows finish before others
    for make in (toy.Mixed, toy.extrapolated):
        assert toy.gsil.sample(make(tmp_path, 1), *settings) == wanted
    twice = toy.extrapolated(tmp_path, 0.5).get_output_embeddings().weight
    assert torch.allclose(twice, 0.8 * start.get_output_embeddings().weight, rtol=1e-5)


def test_every_table_of_the_toy(monkeypatch, tmp_path, capsys):
    """They take an hour: a flag that left the scripts, or a row without its number, must show before that."""

    def run(command, seed):
        script, *flags = command.split()
        getattr(toy, script).parse_args([*flags, "--out", str(tmp_path / "none")])
        return tmp_path

    rows = [{"name": "base", "seconds": None}, {"name": "sft", "seconds": 1}]
    (tmp_path / "summary.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    found = {**dict.fromkeys(toy.COLUMNS, 0.5), "gap": 1.0}
    fakes = dict.fromkeys(["look", "looked", "extrapolated", "Mixed"], lambda *_: found)
    for name, fake in {**fakes, "run": run, "ROOT": tmp_path}.items():
        monkeypatch.setattr(toy, name, fake)
    monkeypatch.chdir(tmp_path)  # main() leaves it, and monkeypatch comes back
    toy.main(toy.parse_args(["all", "--seeds", "2"]))
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert len(tables) == len(toy.TABLES)
    for lines in tables:
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
