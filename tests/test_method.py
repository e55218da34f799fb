"""Section 5 of gsil.py: self_play, main, the SFT baseline. Whole runs, for every loss."""

import json

import pytest
import torch
from conftest import GPU, ROOT
from helpers import demos_of, finite, metrics, naive_logp, read_jsonl, run, toy_flags, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsil

BASE = ROOT / "tests/toy/base"
COLUMNS = ["name", "greedy_accuracy", "sampled_accuracy", "n", "heldout_nll", "mean_response_tokens"]
COLUMNS += ["eos_share", "seconds"]


def steps(folder, phase):
    return [record for record in metrics(folder) if record["phase"] == phase and "step" in record]


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "sft"])
def test_end_to_end(loss, small, tmp_path):
    """Every --loss must train, save, and be loadable and scored the same by someone who only has
    transformers."""
    out = tmp_path / "run"
    summary = run(
        toy_flags(small, out) + f"--loss {loss} --baseline none --epochs 1 --batch 8 --optimizer rmsprop"
    )
    assert summary == json.loads((out / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1"] and summary["best"] == "round 1"
    for row in summary["rows"]:
        assert list(row) == COLUMNS and row["n"] == 20
        assert finite(row[key] for key in COLUMNS[1:-1]) and 0 <= row["eos_share"] <= 1
    records = steps(out, "round 1")
    if loss != "sft":  # policy and reference are one model, and a learned shift begins at 0
        first = gsil.LOSSES[loss](torch.zeros(()), torch.zeros(())).item()
        assert records[0]["loss"] == pytest.approx(first, rel=1e-3) and records[0]["shift"] == 0
    for record in records:
        keys = {"phase", "step", "steps", "epoch", "loss", "grad_norm", "lr"}
        if loss != "sft":
            keys |= {"log_ratio_real", "log_ratio_generated", "told_apart", "shift"}
        assert {*record} == keys and finite(record[key] for key in keys - {"phase"})
    model = AutoModelForCausalLM.from_pretrained(out / "round_1")
    tokenizer = AutoTokenizer.from_pretrained(out / "round_1")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    demos = demos_of(small / "heldout.jsonl", tokenizer, [tokenizer.eos_token_id])[:20]
    nats = sum(naive_logp(model, demo["prompt_ids"], demo["real_ids"]) for demo in demos)
    tokens = sum(len(demo["real_ids"]) for demo in demos)
    assert summary["rows"][1]["heldout_nll"] == pytest.approx(-nats / tokens, rel=1e-3)  # float32 sums
    base = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    assert any(not torch.equal(base[key], value) for key, value in model.state_dict().items())


def test_generated_jsonl_holds_what_the_round_was_trained_on(small, tmp_path):
    """Whoever inspects a run needs the samples as text and ids, and log pi_t of both sides; in round 2 pi_t
    is round 1's result, and the samples are fresh."""
    run(toy_flags(small, tmp_path / "run") + "--rounds 2 --scale 1 --baseline none --epochs 1")
    demos = read_jsonl(small / "demos.jsonl")
    models = {1: BASE, 2: tmp_path / "run/round_1"}
    samples = []
    for number, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pairs = read_jsonl(tmp_path / f"run/round_{number}/generated.jsonl")
        samples.append([pair["generated_ids"] for pair in pairs])
        assert [pair["response"] for pair in pairs] == [demo["answer"] for demo in demos]
        for pair in pairs[:4]:
            assert tokenizer.decode(pair["generated_ids"]) == pair["generated"]
            for side in ("real", "generated"):
                expected = naive_logp(model, pair["prompt_ids"], pair[f"{side}_ids"])
                assert pair[f"{side}_reference"] == pytest.approx(expected, abs=1e-3)  # float32 sums
    assert samples[0] != samples[1]
    keys = {"prompt", "response", "generated", "prompt_ids", "real_ids", "generated_ids", "answer"}
    assert {*pairs[0]} == keys | {"real_reference", "generated_reference"}


def test_a_cut_sample_has_no_eos_and_trains_so(inputs, tmp_path):
    """The official code cuts, strips and appends EOS; then a cut sample is told apart by its end alone."""
    run(inputs + f"--epochs 1 --baseline none --out {tmp_path}/out")
    pairs = read_jsonl(tmp_path / "out/round_1/generated.jsonl")
    assert all(len(pair["real_ids"]) == 5 and 1 not in pair["real_ids"] for pair in pairs)  # 15 in the data
    cut = [pair for pair in pairs if len(pair["generated_ids"]) == 5]
    assert cut and all(pair["generated_ids"][-1] not in (1,) for pair in cut)


def test_the_baseline_has_its_budget_and_its_best_epoch(small, tmp_path):
    """SFT that trains less than GSIL, or is taken at a bad epoch, would be a straw man. The first of equal
    epochs is kept: the later ones have only had more time to overfit."""
    summary = run(toy_flags(small, tmp_path / "run") + "--epochs 1 --rounds 2 --scale 1 --lr 1e-3 --batch 20")
    records = steps(tmp_path / "run", "sft")
    assert records[-1]["epoch"] == 3 * 1 * 2 and len(records) == 12  # a GSIL epoch: two sides and the samples
    dev = [record["dev_accuracy"] for record in records if "dev_accuracy" in record]
    assert len(dev) == 6
    [row] = [record for record in metrics(tmp_path / "run") if record["phase"] == "sft" and "row" in record]
    assert row["dev_accuracy"] == max(dev)  # of the saved one, measured again
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "round 2", "sft"]


def test_of_equal_epochs_of_sft_the_first_is_kept(small, tmp_path, monkeypatch, capsys):
    """They are no better on dev, and have only had more time to overfit; the log says which one is kept."""
    saved = []
    save = gsil.save_model
    monkeypatch.setattr(gsil, "save_model", lambda *args: (saved.append(args[2].name), save(*args)))
    monkeypatch.setattr(gsil, "answer", lambda policy, problems, *_: (0.5, [[1]] * len(problems)))
    run(toy_flags(small, tmp_path / "run") + "--epochs 1")
    assert saved == ["round_1", "sft"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["kept" in line for line in lines] == [True, False, False]


def test_same_seed_same_bytes(small, tmp_path):
    """Numbers that cannot be repeated cannot be trusted: metrics (but for the clock) and weights agree."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(toy_flags(small, tmp_path / name) + f"--seed {seed} --baseline none --epochs 1")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    a, b, c = (weights(tmp_path / name / "round_1") for name in "abc")
    assert a == b != c


def test_a_pad_that_is_eos_is_learned(tmp_path, inputs):
    """Pad is EOS here: a mask made by comparing ids with pad would hide EOS, and the model would never learn
    to end a response. SFT on eight one-letter answers shows it at once."""
    rows = [{"prompt": f"{n}", "response": "b"} for n in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        f"--data {tmp_path}/x.jsonl --heldout {tmp_path}/x.jsonl --loss sft --epochs 16 --batch 4 --lr 1e-2"
    )
    summary = run(inputs + flags + f" --out {tmp_path}/out")
    before, after = (row["eos_share"] for row in summary["rows"])
    assert before < 0.2 and after > 0.8


def test_a_loss_of_your_own_is_one_line(small, tmp_path, monkeypatch, capsys):
    """README promises that an entry of LOSSES is all: listed by --help, checked at step 0, trained with."""
    squared = lambda real, generated: (real - 1) ** 2 + (generated + 1) ** 2
    monkeypatch.setitem(gsil.LOSSES, "squared", squared)
    with pytest.raises(SystemExit):
        gsil.parse_args(["--help"])
    assert "squared" in capsys.readouterr().out
    run(toy_flags(small, tmp_path / "run") + "--loss squared --baseline none")
    losses = [record["loss"] for record in steps(tmp_path / "run", "round 1")]
    assert losses[-1] < losses[0] and losses[0] == pytest.approx(2, rel=1e-3)


def test_the_log_of_a_run(small, tmp_path, capsys):
    """What a person sees: one word per thing, a sample before and after that differs, how to load the
    result."""
    out = tmp_path / "run"
    run(toy_flags(small, out) + "--lr 1e-3 --rounds 2 --epochs 1 --baseline none")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100 + len(str(out))
    assert lines[0].startswith("warning: rounds do not settle at --scale 0.3: use --rounds 1 or --scale 1")
    counts = "40 demonstrations, 20 dev, 20 held-out problems"
    assert lines[1] == f"data    {counts}, up to 256 tokens a response"
    assert "112,192 parameters, 1 x cpu" in lines[2]
    for word in ("round 1 of 2", "round 2 of 2", "sampling 40 responses", "equal their demonstration"):
        assert word in printed
    titles = [line for line in lines if "log-ratio: demo" in line]
    assert len(titles) == 2 and "told apart" in titles[0] and "shift" in titles[0]
    shown = [line.split(maxsplit=1) for line in lines if line.startswith(("    before ", "    now "))]
    assert [word for word, _ in shown] == ["before", "now"] * 2
    assert shown[0][1] != shown[1][1] and shown[2][1] != shown[3][1]
    loads = lines[-1].partition(". ")[2].removesuffix(" loads it")
    assert eval(loads, {"AutoModelForCausalLM": AutoModelForCausalLM}).num_parameters() == 112192


@pytest.mark.parametrize(
    "flags, warns", [("--scale 0.5", True), ("--scale 0.51", False), ("--loss sft", False)]
)
def test_rounds_that_do_not_settle_are_warned_of(flags, warns, inputs, tmp_path, capsys):
    """Further rounds at a small scale end nowhere; one sentence saves hours. SFT has no scale."""
    for rounds, expected in ((1, False), (2, warns)):
        run(inputs + f"{flags} --rounds {rounds} --epochs 1 --baseline none --out {tmp_path}/{rounds}")
        assert ("warning: rounds do not settle" in capsys.readouterr().out) == expected


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, tmp_path, monkeypatch):
    """bf16 autocast and the CUDA kernels may round differently, not compute something else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "cuda"):
        run(toy_flags(small, tmp_path / device) + f"--device {device} --baseline none --temperature 0")
    cpu, cuda = (
        [r["row"]["heldout_nll"] for r in metrics(tmp_path / d) if "row" in r] for d in ("cpu", "cuda")
    )
    assert cuda[0] == pytest.approx(cpu[0], rel=0.02)  # the base model: bf16 has 8 bits
    assert cuda[1] == pytest.approx(cpu[1], rel=0.1)  # trained: its steps differ, too
