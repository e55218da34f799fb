"""Section 5 of gsil.py: self_play, the rounds, the baselines, the habit. Whole runs, for every loss."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import GPU, ROOT
from helpers import demos_of, logged, naive_logp, read_jsonl, run, table, toy_flags, weights, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gsil

COLUMNS = {"dev", "greedy", "sampled", "habit", "nll", "length", "ended", "seconds"}
OWN_LOSS = lambda real, generated: (real - 1) ** 2 + (generated + 1) ** 2


@pytest.fixture
def data(inputs):
    """The six demonstrations of the fixture `inputs`, which may be dev and held-out problems, too."""
    return gsil.parse_args(inputs.split()).data


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "your own", "sft"])
def test_end_to_end(loss, inputs, data, tmp_path, monkeypatch):
    """A --loss could fail to train, save or load, or README's word be false that an entry of LOSSES is enough."""
    monkeypatch.setitem(gsil.LOSSES, "your own", OWN_LOSS)
    out = tmp_path / "out"
    flags = f"--heldout {data} --baseline none --lr 1e-3 --optimizer rmsprop --out {out}"
    rows = run([*(inputs + flags).split(), "--loss", loss])
    assert rows == json.loads((out / "summary.json").read_text())
    stage = "sft" if loss == "sft" else "round 1"
    assert [*rows] == ["base", stage] and all({*row} == COLUMNS for row in rows.values())
    always = ("greedy", "sampled", "nll", "length", "ended")
    assert all(math.isfinite(row[key]) for key in always for row in rows.values())
    steps = logged(out, stage)
    if loss != "sft":  # policy and reference are one model, and a learned shift begins at 0
        first = gsil.LOSSES[loss](torch.zeros(()), torch.zeros(())).item()
        assert steps[0]["loss"] == pytest.approx(first, rel=1e-3) and steps[0]["shift"] == 0
    assert len(steps) == 2 and all(math.isfinite(value) for step in steps for value in step.values())
    model = AutoModelForCausalLM.from_pretrained(out / stage.replace(" ", "_"))
    tokenizer = AutoTokenizer.from_pretrained(out / stage.replace(" ", "_"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    demos = [(demo["prompt_ids"], demo["real_ids"][:5]) for demo in demos_of(data, tokenizer)]
    nats = sum(naive_logp(model, prompt, response) for prompt, response in demos)
    assert rows[stage]["nll"] == pytest.approx(-nats / 30, rel=1e-4)  # float32 sums
    assert abs(rows[stage]["nll"] - rows["base"]["nll"]) > 1e-3


def test_the_pairs_of_a_round_are_in_its_file(inputs, data, tmp_path):
    """Samples that are edited, old or of another policy, or an EOS on a side that is cut, would be trained on."""
    flags = inputs + f"--heldout {data} --scale 1 --lr 1e-2 --baseline none"
    run(f"{flags} --rounds 2 --out {tmp_path}/a")
    run(f"{flags} --seed 1 --out {tmp_path}/b")
    samples, base = [], gsil.parse_args(inputs.split()).model
    for policy, folder in ((base, "a/round_1"), (f"{tmp_path}/a/round_1", "a/round_2"), (base, "b/round_1")):
        model = AutoModelForCausalLM.from_pretrained(policy)
        tokenizer = AutoTokenizer.from_pretrained(policy)
        pairs = read_jsonl(tmp_path / f"{folder}.jsonl")
        samples.append([pair["generated_ids"] for pair in pairs])
        assert [pair["response"] for pair in pairs] == [row["answer"] for row in read_jsonl(data)]
        for pair in pairs:
            assert tokenizer.decode(pair["generated_ids"]) == pair["generated"]
            assert len(pair["real_ids"]) == 5 >= len(pair["generated_ids"]) and 1 not in pair["real_ids"]
            for side in ("real", "generated"):
                expected = naive_logp(model, pair["prompt_ids"], pair[f"{side}_ids"])
                assert pair[f"{side}_reference"] == pytest.approx(expected, abs=1e-3)  # float32 sums
    assert samples[0] != samples[1] and samples[0] != samples[2]


def test_sft_is_one_baseline_however_it_is_asked_for(inputs, data, tmp_path, capsys):
    """--loss sft with fewer epochs, or without the choice on dev, would be a weaker baseline than the table's."""
    common = inputs + f"--heldout {data} --epochs 1 --batch 4 --rounds 2 --scale 1 --lr 1e-3"
    run(f"{common} --dev {data} --loss sft --out {tmp_path}/a")
    run(f"{common} --dev {data} --baseline sft --out {tmp_path}/b")
    asked, beside = logged(tmp_path / "a", "sft"), logged(tmp_path / "b", "sft")
    # Three times as many epochs with --dev, as samples and two sides take two thirds of the work.
    assert asked == beside and len(asked) == 12 and "sft" in table(tmp_path / "a")
    assert weights(tmp_path / "a/sft") == weights(tmp_path / "b/sft")
    run(f"{common} --loss sft --out {tmp_path}/c")
    assert len(logged(tmp_path / "c", "sft")) == 4  # without --dev more might overfit unnoticed


def test_the_best_round_is_chosen_on_dev(inputs, data, tmp_path, capsys):
    """A round that is chosen on the held-out problems, or among equals the earlier one, would be flattered."""
    out = tmp_path / "out"
    rows = run(inputs + f"--dev {data} --rounds 3 --scale 1 --epochs 1 --baseline none --out {out}")
    for name, dev, greedy in (("round 1", 0.4, 0.1), ("round 2", 0.4, 0.2), ("round 3", 0.3, 0.9)):
        rows[name] |= {"dev": dev, "greedy": greedy}
    (out / "summary.json").write_text(json.dumps(rows))
    run(f"--resume {out}")
    last = capsys.readouterr().out.splitlines()[-1]
    code = re.search(r"AutoModelForCausalLM\.from_pretrained\(.*\)", last)[0]
    assert "round_2" in code and eval(code, {"AutoModelForCausalLM": AutoModelForCausalLM})


def test_rounds_that_do_not_settle_are_warned_of(inputs, capsys):
    """Further rounds at a small scale end nowhere, and cost hours."""
    rounds = {"--rounds 2 --scale 0.5": 1, "--rounds 2 --scale 0.51": 0, "--rounds 2 --loss sft": 0, "": 0}
    for flags, warnings in rounds.items():
        with pytest.raises(SystemExit):
            run(f"{flags} --model /nowhere")
        assert capsys.readouterr().out.count("warning: ") == warnings


def check_extrapolated(out, base, factor):
    """The saved weights are start + factor * (sft - start)."""
    assert AutoConfig.from_pretrained(out / "extrapolated").extrapolated_by == factor
    folders = (base, out / "sft", out / "extrapolated")
    start, sft, found = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for name, weight in found.items():
        expected = start[name] + factor * (sft[name] - start[name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)  # float32 rounds each weight


def test_extrapolated_by_2_without_dev(inputs, tmp_path, capsys):
    """A factor that nobody chose would pass for a tuned one."""
    rows = run(inputs + f"--baseline extrapolated --epochs 1 --lr 1e-3 --out {tmp_path}/out")
    assert [*rows] == ["base", "round 1", "sft", "extrapolated"] and "not chosen" in capsys.readouterr().out
    check_extrapolated(tmp_path / "out", gsil.parse_args(inputs.split()).model, 2)


def test_the_log_and_the_factor_that_samples_best_on_dev(small, tmp_path, capsys):
    """A person could not tell what was done, on what, or how it changed the answers; and a factor that is chosen
    greedily, where every factor saturates, or from few factors, would make the control a weak one."""
    rows = run(toy_flags(small, tmp_path / "out") + "--baseline extrapolated --lr 2e-3 --epochs 1")
    printed = capsys.readouterr().out
    asked = re.escape(read_jsonl(small / "heldout.jsonl")[0]["question"][-20:])
    lines = ["data .*40 demonstrations, 20 dev and 20 held-out.*", "model .*112,192 parameters, 1 x cpu.*"]
    lines += [rf"method .*{tmp_path}/out", "round 1", " +2/2  loss .*", f"base: '.*{asked}.*' -> '.*'"]
    for line in (*lines, f"round 1: '.*{asked}.*' -> '.*'"):
        assert re.search(rf"^{line}$", printed, re.MULTILINE), line
    shares = {float(f): float(share) for f, share in re.findall(r"factor ([\d.]+)\D+([\d.]+)%", printed)}
    assert [*shares] == [1, 1.5, 2, 2.5, 3, 4] and [*rows] == ["base", "round 1", "sft", "extrapolated"]
    check_extrapolated(
        tmp_path / "out", gsil.TOY / "base", max(shares, key=shares.get)
    )  # the first of equals
    assert abs(shares[1] / 100 - rows["sft"]["dev"]) > 0.01  # which is greedy


def log_of_habit(inputs, out, capsys, own, theirs, flags=""):
    """What a run says of the habit, a letter r or s, if its model and demonstrators give p, q, r, s so often."""
    run(f"{inputs} --rounds 0 --habit [rs] --epochs 1 --baseline none {flags} --out {out}")
    folder = gsil.parse_args(inputs.split()).model
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = {letter: tokenizer(letter).input_ids for letter in "pqrs"}
    logps = {letter: naive_logp(model, [5], ids[letter]) for letter in ids}
    real, generated = ("".join(x * n for x, n in zip("pqrs", counts)) for counts in (theirs, own))
    pairs = []
    for x, y in zip(real, generated, strict=True):
        pair = {"prompt": "", "prompt_ids": [5], "response": x, "generated": y}
        pair |= {"real_ids": ids[x], "real_reference": logps[x]}
        pairs.append(pair | {"generated_ids": ids[y], "generated_reference": logps[y]})
    write_jsonl(out / "round_1.jsonl", pairs)  # as if the run had been stopped after sampling
    capsys.readouterr()
    run(f"--resume {out} --rounds 1")
    return capsys.readouterr().out


def test_the_predicted_habit(inputs, tmp_path, capsys):
    """A reader would take for a fact what follows from two shares alone, and holds under a condition."""
    printed = log_of_habit(inputs, tmp_path / "out", capsys, (10, 4, 3, 3), (1, 5, 7, 7))
    printed = printed[printed.index("'[rs]'") :].partition("loss")[0]
    assert re.findall(r"\d+\.\d%", printed) == ["30.0%", "70.0%", "99.2%"]
    assert re.search("over all prompts.*if .* differ in nothing else", printed, re.DOTALL)


CASES = {  # shares of the letters, 0.3 and 0.7 with the habit as above; its share after a round at scale 0.3
    "differ in nothing else": ((0.50, 0.20, 0.15, 0.15), (3 / 14, 6 / 70, 0.35, 0.35), 0.992),
    "q is preferred, too": ((0.50, 0.20, 0.15, 0.15), (0.05, 0.25, 0.35, 0.35), 0.923),
    "q was rare": ((0.699, 0.001, 0.15, 0.15), (0.1, 0.2, 0.35, 0.35), 0.000108),
}


@pytest.mark.parametrize("pi, p, reached", CASES.values(), ids=CASES)
def test_what_the_condition_of_the_prediction_means(pi, p, reached):
    """Who reads `if they differ in nothing else` as a formality would be wrong by nearly 100 %."""
    pi, p = torch.tensor(pi), torch.tensor(p)
    optimum = pi * (p / pi) ** (1 / 0.3)
    assert pi[2:].sum().item() == pytest.approx(0.3) and p[2:].sum().item() == pytest.approx(0.7)
    assert (optimum[2:].sum() / optimum.sum()).item() == pytest.approx(reached, rel=5e-3)  # three digits


# 0 % and 100 %, then shares that would do
WITHOUT = {"--epochs 1": ((5, 5, 0, 0), (2, 2, 3, 3)), "--epochs 2": ((5, 2, 2, 1), (0, 0, 5, 5))}
WITHOUT |= dict.fromkeys(["--loss hinge", "--temperature 0.7", "--shift 2"], ((5, 2, 2, 1), (2, 2, 3, 3)))


@pytest.mark.parametrize("flags", WITHOUT)
def test_a_habit_that_cannot_be_predicted(flags, inputs, tmp_path, capsys):
    """0 %, 100 % or a number that no theory backs would pass for a prediction."""
    printed = log_of_habit(inputs, tmp_path / "out", capsys, *WITHOUT[flags], flags)
    assert "no prediction" in printed and "predicted" not in printed


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, tmp_path):
    """bf16 autocast and the CUDA kernels may round differently, but not compute something else."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    nlls = {}
    for device in ("cpu", "cuda"):
        flags = toy_flags(small, tmp_path / device) + f"--device {device} --baseline none --temperature 0"
        subprocess.run([sys.executable, str(ROOT / "gsil.py"), *flags.split()], env=environment, check=True)
        nlls[device] = [row["nll"] for row in table(tmp_path / device).values()]
    assert nlls["cuda"][0] == pytest.approx(nlls["cpu"][0], rel=0.02)  # the base model: bf16 has 8 bits
    assert nlls["cuda"][1] == pytest.approx(nlls["cpu"][1], rel=0.1)  # trained: its steps differ, too
