"""Section 5 of gsil.py: self_play, main, the SFT baseline. Whole runs, for every loss."""

import json

import pytest
import torch
from conftest import GPU
from helpers import demos_of, finite, metrics, naive_logp, read_jsonl, run, toy_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsil

COLUMNS = ["name", "greedy_accuracy", "sampled_accuracy", "n", "heldout_nll", "mean_response_tokens"]
COLUMNS += ["eos_share", "seconds"]
OWN_LOSS = lambda real, generated: (real - 1) ** 2 + (generated + 1) ** 2


@pytest.fixture
def data(inputs):
    """The six demonstrations of the fixture `inputs`, which may be dev and held-out problems, too."""
    return gsil.parse_args(inputs.split()).data


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "your own", "sft"])
def test_end_to_end(loss, inputs, data, tmp_path, monkeypatch):
    """Every --loss must train, save, and be loadable and scored the same by someone who only has
    transformers. README promises that an entry of LOSSES is all that a loss of your own needs."""
    monkeypatch.setitem(gsil.LOSSES, "your own", OWN_LOSS)
    flags = f"--heldout {data} --baseline none --lr 1e-3 --optimizer rmsprop --out {tmp_path}"
    summary = run([*(inputs + flags).split(), "--loss", loss])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1"] and summary["best"] == "round 1"
    for row in summary["rows"]:
        assert list(row) == COLUMNS and row["n"] == 6 and finite(row[key] for key in COLUMNS[1:-1])
    records = [record for record in metrics(tmp_path) if "step" in record]
    if loss != "sft":  # policy and reference are one model, and a learned shift begins at 0
        first = gsil.LOSSES[loss](torch.zeros(()), torch.zeros(())).item()
        assert records[0]["loss"] == pytest.approx(first, rel=1e-3) and records[0]["shift"] == 0
    assert all(finite(record[key] for key in record if key != "phase") for record in records)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "round_1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "round_1")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    demos = [(demo["prompt_ids"], demo["real_ids"][:5]) for demo in demos_of(data, tokenizer)]
    nats = sum(naive_logp(model, prompt, response) for prompt, response in demos)
    base, trained = (row["heldout_nll"] for row in summary["rows"])
    assert trained == pytest.approx(-nats / 30, rel=1e-4) and abs(trained - base) > 1e-3  # float32 sums


def test_generated_jsonl_holds_what_the_round_was_trained_on(inputs, data, tmp_path):
    """Whoever inspects a run needs the samples as text and ids, and log pi_t of both sides; in round 2 pi_t
    is round 1's result. Samples are fresh in each round and for each seed. The official code cuts, strips and
    appends EOS: then a response that is cut, at 5 tokens here, is told apart by its end alone."""
    flags = inputs + f"--heldout {data} --scale 1 --lr 1e-2 --baseline none"
    run(f"{flags} --rounds 2 --out {tmp_path}/a")
    run(f"{flags} --seed 1 --out {tmp_path}/b")
    samples = []
    base = gsil.parse_args(inputs.split()).model
    for policy, folder in ((base, "a/round_1"), (f"{tmp_path}/a/round_1", "a/round_2"), (base, "b/round_1")):
        model = AutoModelForCausalLM.from_pretrained(policy)
        tokenizer = AutoTokenizer.from_pretrained(policy)
        pairs = read_jsonl(tmp_path / folder / "generated.jsonl")
        samples.append([pair["generated_ids"] for pair in pairs])
        assert [pair["response"] for pair in pairs] == [row["answer"] for row in read_jsonl(data)]
        for pair in pairs:
            assert tokenizer.decode(pair["generated_ids"]) == pair["generated"]
            assert len(pair["real_ids"]) == 5 >= len(pair["generated_ids"]) and 1 not in pair["real_ids"]
            for side in ("real", "generated"):
                expected = naive_logp(model, pair["prompt_ids"], pair[f"{side}_ids"])
                assert pair[f"{side}_reference"] == pytest.approx(expected, abs=1e-3)  # float32 sums
    assert samples[0] != samples[1] and samples[0] != samples[2]


def test_the_best_round_and_the_best_epoch_of_sft_on_dev(inputs, data, tmp_path, monkeypatch, capsys):
    """SFT that trains less than GSIL, or is taken at a bad epoch, would be a straw man. Of equal epochs the
    first is kept: later ones have only had more time to overfit. And a best round that was chosen on the
    held-out problems would be flattered."""
    of_epochs = [0.2, 0.3, 0.3, 0.1, 0.1, 0.1]
    dev = iter([0.1, 0.9, 0.2, *of_epochs, 0.3])  # base, two rounds, epochs of SFT, the one that is kept
    answer = lambda policy, problems, *_: (next(dev), [[7, 1]]) if problems else (None, [])
    monkeypatch.setattr(gsil, "answer", answer)
    summary = run(inputs + f"--dev {data} --rounds 2 --scale 1 --epochs 1 --batch 4 --out {tmp_path}")
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "round 2", "sft"]
    assert summary["best"] == "round 1"
    steps = [record for record in metrics(tmp_path) if record["phase"] == "sft" and "step" in record]
    assert steps[-1]["epoch"] == 3 * 1 * 2 and len(steps) == 12  # a GSIL epoch: two sides and the samples
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["kept" in line for line in lines] == [True, True, False, False, False, False]


def test_the_log_of_a_run(small, tmp_path, capsys):
    """What a person sees: what is done, a sample before and after that differs, how to load the result."""
    run(toy_flags(small, tmp_path) + "--lr 1e-3 --epochs 1 --baseline none")
    lines = capsys.readouterr().out.splitlines()
    assert "data    40 demonstrations, 20 dev, 20 held-out problems, up to 256 tokens a response" in lines
    for words in ("112,192 parameters, 1 x cpu", "round 1 of 1", "sampling 40 responses", "log-ratio: demo"):
        assert any(words in line for line in lines)
    before, now = (line.split(maxsplit=1) for line in lines if line.startswith(("    before ", "    now ")))
    assert [before[0], now[0]] == ["before", "now"] and before[1] != now[1]
    loads = lines[-1].partition(". ")[2].removesuffix(" loads it")
    assert eval(loads, {"AutoModelForCausalLM": AutoModelForCausalLM}).num_parameters() == 112192


def test_rounds_that_do_not_settle_are_warned_of(capsys):
    """Further rounds at a small scale end nowhere; one sentence saves hours. SFT has no scale."""
    rounds = {"--rounds 2 --scale 0.5": 1, "--rounds 2 --scale 0.51": 0, "--rounds 2 --loss sft": 0, "": 0}
    for flags, warnings in rounds.items():
        with pytest.raises(SystemExit):
            run(f"{flags} --model /nowhere")
        assert capsys.readouterr().out.count("warning: rounds do not settle") == warnings


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, tmp_path, monkeypatch):
    """bf16 autocast and the CUDA kernels may round differently, not compute something else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # see conftest.py
    nlls = {}
    for device in ("cpu", "cuda"):
        flags = f"--device {device} --baseline none --temperature 0"
        summary = run(toy_flags(small, tmp_path / device) + flags)
        nlls[device] = [row["heldout_nll"] for row in summary["rows"]]
    assert nlls["cuda"][0] == pytest.approx(nlls["cpu"][0], rel=0.02)  # the base model: bf16 has 8 bits
    assert nlls["cuda"][1] == pytest.approx(nlls["cpu"][1], rel=0.1)  # trained: its steps differ, too
