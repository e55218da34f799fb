"""Section 5 of gsil.py: self_play, the rounds, the baselines, the habit. Whole runs, for every loss."""

import json
import math
import os
import re
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from conftest import GPU
from helpers import EOS, demos_of, logged, naive_logp, read_jsonl, run, table, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import gsil

COLUMNS = {"dev", "greedy", "sampled", "habit", "nll", "length", "ended", "seconds"}
OWN_LOSS = lambda real, generated: gsil.tangent_exp(-real / 2) + gsil.tangent_exp(generated / 2)  # of README


@pytest.fixture
def data(inputs):
    """The six demonstrations of the fixture `inputs`, also used as dev and held-out problems."""
    return gsil.parse_args(inputs.split()).data


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "your own", "sft"])
def test_end_to_end(loss, inputs, data, tmp_path, monkeypatch):
    """A --loss could fail to train, save or load, or an entry of LOSSES not be enough for one."""
    monkeypatch.setitem(gsil.LOSSES, "your own", OWN_LOSS)
    out = tmp_path / "out"
    given = 2 if loss in ("hinge", "kliep") else 0  # the others learn the shift, which begins at 0
    flags = f"--heldout {data} --baseline none --lr 1e-3 --optimizer rmsprop --epochs 3 --out {out}"
    rows = run([*(inputs + flags + " --shift 2" * bool(given)).split(), "--loss", loss])
    assert rows == json.loads((out / "summary.json").read_text())
    stage = "sft" if loss == "sft" else "round 1"
    assert [*rows] == ["base", stage] and all({*row} == COLUMNS for row in rows.values())
    steps = logged(out, stage)
    if loss != "sft":  # policy and reference are one model
        first = gsil.LOSSES[loss](torch.tensor(1.0 * given), torch.tensor(1.0 * given)).item()
        assert steps[0]["loss"] == pytest.approx(first, rel=1e-3) and steps[0]["shift"] == given
        assert (steps[2]["shift"] == given) == (given > 0 or loss == "spin")  # in which it cancels
        assert steps[2]["d_real"] > steps[2]["d_generated"]
    assert len(steps) == 3 and all(math.isfinite(value) for step in steps for value in step.values())
    model = AutoModelForCausalLM.from_pretrained(out / stage.replace(" ", "_"))
    tokenizer = AutoTokenizer.from_pretrained(out / stage.replace(" ", "_"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    demos = [(demo["prompt_ids"], demo["real_ids"][:5]) for demo in demos_of(data, tokenizer)]
    nats = sum(naive_logp(model, prompt, response) for prompt, response in demos)
    assert rows[stage]["nll"] == pytest.approx(-nats / 30, rel=1e-4)  # float32 sums
    assert abs(rows[stage]["nll"] - rows["base"]["nll"]) > 1e-3


def test_the_pairs_of_a_round_are_in_its_file(inputs, data, tmp_path):
    """Samples that are edited, old or of another policy would be trained on."""
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


def check_extrapolated(out, base, factor):
    """The saved weights are start + factor * (sft - start)."""
    assert AutoConfig.from_pretrained(out / "extrapolated").extrapolated_by == factor
    assert isinstance(GenerationConfig.from_pretrained(out / "extrapolated").eos_token_id, list)
    folders = (base, out / "sft", out / "extrapolated")
    start, sft, found = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    for name, weight in found.items():
        expected = start[name] + factor * (sft[name] - start[name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)  # float32 rounds each weight


def test_the_baselines_however_they_are_asked_for(inputs, data, tmp_path, capsys):
    """--loss sft with fewer epochs, or a factor that nobody chose, would be a weaker baseline."""
    common = inputs + f"--heldout {data} --epochs 1 --batch 4 --rounds 2 --scale 0.5 --lr 1e-3"
    run(f"{common} --dev {data} --loss sft --out {tmp_path}/a")
    printed = capsys.readouterr().out
    assert "do not settle" not in printed  # there are no rounds
    run(f"{common} --dev {data} --baseline sft --out {tmp_path}/b")
    printed = capsys.readouterr().out  # three times as many: samples and two sides are two thirds of the work
    assert "do not settle at --scale 0.5" in printed
    asked, beside = logged(tmp_path / "a", "sft"), logged(tmp_path / "b", "sft")
    assert asked == beside and len(asked) == 12 and "sft" in table(tmp_path / "a")
    ours, theirs = (tmp_path / name / "sft/model.safetensors" for name in "ab")
    assert ours.read_bytes() == theirs.read_bytes()
    run(f"{common} --loss sft --baseline extrapolated --out {tmp_path}/c")
    assert len(logged(tmp_path / "c", "sft")) == 4  # without --dev more might overfit unnoticed
    assert "factor 2, not chosen" in capsys.readouterr().out
    check_extrapolated(tmp_path / "c", gsil.parse_args(inputs.split()).model, 2)


def test_the_best_round_is_chosen_on_dev(inputs, data, tmp_path, capsys):
    """A round that is chosen on held-out problems, or the earlier of equals, would be flattered."""
    out = tmp_path / "out"
    rows = run(inputs + f"--dev {data} --rounds 3 --scale 0.51 --epochs 1 --baseline none --out {out}")
    assert "do not settle" not in capsys.readouterr().out
    for name, dev, greedy in (("round 1", 0.4, 0.1), ("round 2", 0.4, 0.2), ("round 3", 0.3, 0.9)):
        rows[name] |= {"dev": dev, "greedy": greedy}
    (out / "summary.json").write_text(json.dumps(rows))
    run(f"--resume {out}")
    last = capsys.readouterr().out.splitlines()[-1]
    code = re.search(r"AutoModelForCausalLM\.from_pretrained\(.*\)", last)[0]
    assert "round_2" in code and eval(code, {"AutoModelForCausalLM": AutoModelForCausalLM})


def test_the_log_and_the_factor_that_samples_best_on_dev(small, tmp_path, capsys):
    """A person could not tell what was done, or a factor chosen greedily be a weak control."""
    flags = f"--data {small}/demos.jsonl --dev {small}/dev.jsonl --heldout {small}/heldout.jsonl"
    rows = run(f"{flags} --baseline extrapolated --lr 2e-3 --epochs 1 --out {tmp_path}/out")
    printed = capsys.readouterr().out
    asked = re.escape(read_jsonl(small / "heldout.jsonl")[-1]["question"][-20:])
    lines = ["data +40 demonstrations, .*", " +20 dev and 20 held-out problems"]
    ends = [pair["generated_ids"][-1] == EOS for pair in read_jsonl(tmp_path / "out/round_1.jsonl")]
    lines += [f"  [0-9.]+% of the responses equal .*, {fmean(ends):.1%} ended by themselves"]
    lines += [
        "a share of 20 .* ± 22% at most.*",
        "model .*112,192 parameters, 1 x cpu.*",
        rf"method .*{tmp_path}/out",
        "round 1",
        " +2/2  loss .*",
        f"base: '.*{asked}.*' -> '.*'",
    ]
    for line in (*lines, f"round 1: '.*{asked}.*' -> '.*'"):
        assert re.search(rf"^{line}$", printed, re.MULTILINE), line
    shares = {float(f): float(share) for f, share in re.findall(r"factor ([\d.]+)\D+([\d.]+)%", printed)}
    assert [*shares] == [1, 1.5, 2, 2.5, 3, 4] and [*rows] == ["base", "round 1", "sft", "extrapolated"]
    best = max(shares, key=shares.get)  # the first of equals
    check_extrapolated(tmp_path / "out", gsil.TOY / "base", best)
    assert abs(shares[1] / 100 - rows["sft"]["dev"]) > 0.01  # which is greedy


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, tmp_path):
    """bf16 autocast or CUDA's kernels would not only round differently, but compute something else."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    nlls = {}
    for device in ("cpu", "cuda"):
        flags = f"--data {small}/demos.jsonl --dev {small}/dev.jsonl --heldout {small}/heldout.jsonl"
        flags += f" --device {device} --baseline none --temperature 0 --out {tmp_path}/{device}"
        subprocess.run([sys.executable, gsil.__file__, *flags.split()], env=environment, check=True)
        nlls[device] = [row["nll"] for row in table(tmp_path / device).values()]
    assert nlls["cuda"][0] == pytest.approx(nlls["cpu"][0], rel=0.02)  # the base model: bf16 has 8 bits
    assert nlls["cuda"][1] == pytest.approx(nlls["cpu"][1], rel=0.1)  # trained: its steps differ, too


SHARES = [  # flags; responses of the model and of the demonstrators, a letter each; what is said of the habit y
    ("", "nnnnnnnyyy", "nnnyyyyyyy", "model 30.0%, demonstrators 70.0%; predicted 99.2% if .* nothing else"),
    *(
        (flags, "nny", "nyy", "no prediction from these flags")
        for flags in ("--loss hinge", "--temperature 0.7", "--shift 2")
    ),
    *(("", own, theirs, "no prediction from a share") for own, theirs in (("nn", "ny"), ("ny", "yy"))),
]


@pytest.mark.parametrize("flags, own, theirs, says", SHARES)
def test_the_predicted_habit(flags, own, theirs, says, inputs, tokenizer, tmp_path, capsys):
    """0 %, 100 % or a number that no theory backs would pass for a prediction."""
    out = tmp_path / "out"
    run(f"{inputs} --rounds 0 --habit y --baseline none {flags} --out {out}")
    pairs = [{"prompt_ids": [5], "real_reference": 0, "generated_reference": 0} for _ in own]
    for pair, real, generated in zip(pairs, theirs, own, strict=True):
        pair["real_ids"], pair["generated_ids"] = tokenizer(real).input_ids, tokenizer(generated).input_ids
    write_jsonl(out / "round_1.jsonl", pairs)  # as if the run had been stopped after sampling
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the references are not those of the model, so it does not train
        run(f"--resume {out} --rounds 1")
    assert re.search(f"'y', pooled over prompts: .*{says}", capsys.readouterr().out)
