"""The parts of tests/studies whose mistakes would not show in a table, and each of its commands."""

import json
import math

import bench
import gsm8k
import make_toy
import pretrained
import pytest
import torch
import toy
from helpers import read_jsonl, write_jsonl
from transformers import AutoTokenizer, LlamaForCausalLM

import gsil


def test_predictions():
    """The line in the figures, or a column of the habit's table, would be a wrong prediction."""
    # By hand: odds 1/4, times the square of (0.4/0.2) / (0.6/0.8) = 8/3, are 16/9.
    for scale, share in ((0.5, 16 / 25), (1, 0.4), (math.inf, 0.2)):
        assert pretrained.closed_form(0.2, 0.4, scale) == pytest.approx(share, rel=1e-12)
    crowds = zip(make_toy.HASTY["base"].items(), make_toy.HASTY["demo"].values())
    kinds = {str(steps): [1000, 1000 * (1 - own), 1000 * (1 - theirs)] for (steps, own), theirs in crowds}
    problems = dict.fromkeys(kinds, 1)
    found = [formula(kinds, problems, 0.3) for formula in (toy.per_steps, toy.one_shift, toy.pooled)]
    assert found == pytest.approx([0.9865, 0.9769, 0.9827], abs=1e-4)  # four digits
    assert toy.per_steps(kinds, problems, 0.5, rounds=2) == pytest.approx(0.3, abs=1e-9)  # back at the start
    # The prediction of a mean is made per number of steps, because the odds of a mean are not the mean of odds.
    rows = [
        {"steps": steps, "works": works} for steps, works in ((2, True), (3, False), (4, False), (4, True))
    ]
    by_steps = pretrained.shares({"heldout": rows, "demos": rows}, [0.2, 0.5, 0.5, 0.5])
    assert by_steps == [(0.2, 1, 0.25), (0.5, 0, 0.25), (0.5, 0.5, 0.5)]
    assert pretrained.predict(by_steps, 0.3) == 0.25 * 1 + 0.25 * 0 + 0.5 * 0.5


def test_intervals():
    """0 of 96 would look certain, or seeds that share their problems like new problems."""
    mean, half = pretrained.interval([[False] * 96])
    assert (mean, half) == (0, pytest.approx(1.96 * math.sqrt(0.02 * 0.98 / 96), rel=1e-9))
    assert pretrained.interval([[True, False] * 48] * 2) == pretrained.interval([[True, False] * 48])
    _, half = pretrained.interval([[0.2, 0.4], [0.4, 0.6]])  # problems 0.3 and 0.5, seeds 0.3 and 0.5
    assert half == pytest.approx(1.96 * math.sqrt(0.02 / 2 + 0.02 / 2), rel=1e-9)
    outcomes = [[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 1]]  # problems 0, 1, 2/3, 2/3; seeds 1/2, 3/4, 1/2
    halves = [1.96 * math.sqrt(19 / 108 / 4), 4.30 * math.sqrt(1 / 48 / 3)]  # variances 19/108 and 1/48
    assert toy.intervals(outcomes) == pytest.approx([7 / 12, *halves], rel=1e-9)
    assert math.isnan(toy.intervals(outcomes[:1])[2]) and toy.verdict(0.3, 0.2, math.nan) == "one seed"
    assert toy.verdict(0.22, 0.2, 0.25) == toy.verdict(0.22, 0.25, 0.2) == "does not count"


TRUE = "48/2=24 (3+4)*2.5=17.5 1,250*2=2,500 -3+5=2 .5*4=2 1/3=.33 3*.33=1"
# Wrong; no operator, or a sign; a sum on the right; no thousands comma; other operators, names and characters
FALSE = (
    "3*.32=1 48/2=25 24=24 -24=-24 24=20+4 2*3=6=6 2*3 1,2*2=24 2**3=8 7//2=3 4/0=0 x*2=4 1e2*2=200 20%*10=2"
)
ENDS = ["\n#### 2", "\n#### $1,250.50\n", "\n#### -2", "<<2*2=4>>\n#### 4"]
NO_ENDS = ["", " #### 2", "\n#### 2\nNext:", "\n#### two", "\n####", "\n<<2+2=4\n#### 4", "<<2<4>>\n#### 4"]


def test_valid_responses_of_gsm8k():
    """Wrong sums, no sums, or a response without its last line would count as the habit."""
    for inside in [*TRUE.split(), *FALSE.split(), "(2+3=5", "exit()+1=1", "(" * 500 + "1=1", "="]:
        true = inside in TRUE.split()
        assert gsm8k.true_annotation(inside) == true, inside
        assert gsm8k.valid(f"So <<1+1=2>>2 and <<{inside}>>\n#### 2") == true, inside
    for end in ENDS + NO_ENDS:
        assert gsm8k.valid(f"<<1+1=2>>{end}") == (end in ENDS), end
    assert not gsm8k.valid("1+1 = 2\n#### 2")  # no annotation


def test_the_parts_of_gsm8k():
    """Test problems, or one part's problems in another part, would be trained on."""
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    rows = [{"question": str(n), "answer": f"{n % 10} + 1 . #### 2"} for n in range(40)]
    args = gsm8k.parse_args(["--data=D", "--model=M", "--a=8", "--demos=6", "--dev-size=5"])
    parts = gsm8k.select(rows, rows[:4], tokenizer, args)
    numbers = {part: {int(row["question"]) for row in chosen} for part, chosen in parts.items()}
    assert numbers["start"] == {*range(8)} and numbers["b"] == {*range(8, 14)} and numbers["a"] == {*range(6)}
    assert numbers["dev"] == {*range(35, 40)} and numbers["test"] == {*range(4)}


def test_the_verdict_of_gsm8k():
    """The first question's answer is read off these numbers."""
    gains = {"gain, before all of the controls have run": {}}
    gains |= {"gain": {"extrapolated": 20, "beyond-base": 30, "tempered": 40}}
    gains |= {"reach GSIL": {"extrapolated": 20, "beyond-base": 30, "tempered": 50}}
    cases = {"loss": {"gsil": 30}, "none": {"gsil": 41}} | {
        says: {"gsil": 50} | gains[says] for says in gains
    }
    for says, shares in cases.items():  # of 100 problems, of which the first ones are valid
        shares = {"sft": 40} | shares
        runs = {name: {0: {"sampled": {"valid": "1" * n + "0" * (100 - n)}}} for name, n in shares.items()}
        found = gsm8k.verdict(runs)
        assert says in found and (says != "gain" or found == says), found
    mean, half, of_seeds = gsm8k.paired(runs, "gsil", "sft")
    assert (mean, of_seeds) == (pytest.approx(0.1), None)
    assert half == pytest.approx(1.96 * (0.09 / 99) ** 0.5)  # 10 differences of 1, 90 of 0


# From the command to the table: a study takes hours, so what cannot run must show before.
TINY = f"--model {gsil.TOY}/base --heldout 40 --demos 40 --crowd 40 --lesson 40 --lesson-epochs 1 --epochs 1"
TINY += " --policy-steps 1 --require 0 --max-new-tokens 20 --methods rft extrapolated --out "


def test_pretrained(tmp_path, capsys):
    """A flag that left the scripts would stop the study, or other settings' results join it."""
    pretrained.main(pretrained.parse_args(f"{TINY}{tmp_path}".split()))
    rows = [json.loads(file.read_text()) for file in (tmp_path / "habit/rows").glob("*.json")]
    measured = [row for row in rows if isinstance(row, dict)]
    assert len(measured) == 5  # start, SFT, SFT extrapolated by 1/0.5 and 1/0.3, RFT
    assert all(math.isfinite(sum(row["logp"])) and len(row["works"]) == 40 for row in measured)
    lines = [line for line in (tmp_path / "habit/results.md").read_text().splitlines() if line[:1] == "|"]
    assert len(lines) == 7 and len({line.count("|") for line in lines}) == 1
    assert not list((tmp_path / "habit").glob("rft*/**/*.safetensors"))  # half a gigabyte each
    with pytest.raises(SystemExit, match="was begun with demos = 40, not 90"):
        pretrained.main(pretrained.parse_args(f"{TINY}{tmp_path} --demos 90".split()))
    capsys.readouterr()
    pretrained.main(
        pretrained.parse_args(f"{TINY}{tmp_path}".split())
    )  # everything is kept: nothing is trained
    assert "to load" not in capsys.readouterr().out


def test_gsm8k(tmp_path, capsys):
    """An arm could not run, write what the tables do not read, or be trained a second time."""
    rows = read_jsonl(gsil.TOY / "demos.jsonl")[:12]
    write_jsonl(tmp_path / "train.jsonl", rows[:9])
    write_jsonl(tmp_path / "test.jsonl", rows[9:])
    flags = f"--data {tmp_path} --model {gsil.TOY}/base --a 4 --demos 4 --dev-size 1 --batch 4 --device cpu"
    flags += f" --max-new-tokens 16 --out {tmp_path}/out --results {tmp_path}/results"
    gsm8k.study(gsm8k.parse_args(flags.split()))
    runs = {file.stem[:-6]: json.loads(file.read_text()) for file in (tmp_path / "results").iterdir()}
    assert {*runs} == {"demonstrators", "start", *gsm8k.ARMS}
    assert all(len(run["sampled"]["valid"]) == 3 for run in runs.values())
    assert runs["sft-b"]["setting"] == runs["sft"]["setting"] and len(runs["irft"]["steps"]) == 4
    assert runs["gsil"]["cost"] / runs["sft"]["cost"] == pytest.approx(1, abs=0.5)
    assert runs["extrapolated"]["nll"] != runs["sft"]["nll"] != runs["start"]["nll"]
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    capsys.readouterr()
    gsm8k.study(gsm8k.parse_args([*flags.split(), "--settings", "1"]))
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    gsm8k.report(gsm8k.parse_args(["--report", "--results", f"{tmp_path}/results"]))
    assert capsys.readouterr().out.count("\n| gsil-b |") == 4


def test_toy(tmp_path, monkeypatch, capsys):
    """Tables would say something else than the scripts' own, or a run have lost its flags."""
    args = toy.parse_args(["all", "--out", str(tmp_path)])
    commands = [toy.command(name, 0, args) for name in toy.RUNS]
    for script, *flags in commands + [toy.shlex.split(text) for text in toy.PAPERS.values()]:
        getattr(toy, script).parse_args([*flags, "--out", str(tmp_path / "none")])
    for names, _ in toy.TABLES.values():
        assert {*names} <= {*toy.RUNS, "extrapolated", "new-extrapolated"}
    monkeypatch.setattr(toy, "EPOCHS", (1,))
    monkeypatch.setattr(toy, "FACTORS", (1,))
    monkeypatch.setitem(toy.TABLES, "main", (["gsil", "extrapolated"], toy.print_main))
    monkeypatch.chdir(tmp_path)  # main() leaves it, and monkeypatch comes back
    flags = ["main", "--slice", "16", "--seeds", "0", "--out", f"{tmp_path}/study"]
    toy.main(toy.parse_args(flags))
    printed, folder = capsys.readouterr().out, tmp_path / "study"
    files = [json.loads((folder / f"{run}-0.json").read_text()) for run in ("gsil", "sft-1", "extrapolated")]
    found, sft, longer = (file["stages"] for file in files)
    rows = json.loads((folder / "runs/gsil-0/summary.json").read_text())
    assert rows.pop("demos")["habit"] > 0
    for stage, row in rows.items():
        for key in ("greedy", "sampled", "habit"):
            assert sum(toy.from_hex(found[stage][key])) == round(16 * row[key])
        assert found[stage]["nll"] == pytest.approx(row["nll"], rel=1e-6)  # other batches, fp32
        assert f"| {row['greedy']:.3f} ± " in printed
    for key in ("greedy", "sampled", "tokens"):  # longer by a factor of 1
        assert sft["sft"][key] == longer["extrapolated"][key]
    for bits in ([0, 0, 1], [1] * 9, [0]):  # leading zeros are problems, too
        assert toy.from_hex(toy.to_hex(bits)) == bits
    toy.shutil.rmtree(folder / "runs")
    toy.main(toy.parse_args([*flags, "--report"]))
    assert capsys.readouterr().out == printed and not (folder / "runs").exists()


@pytest.mark.parametrize("side", ["ours", "plain", "sample", "generate"])
def test_a_side_of_the_benchmark(side):
    """The comparison would miss a side of which the scripts' functions changed."""
    args = bench.parse_args(["--size=tiny", "--batch=2", "--steps=1", "--max-new-tokens=4"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(bench.make_config(args)).eval()
    before = model.lm_head.weight.clone()
    figures = bench.SIDES[side](model, bench.make_pairs(args), 2, args)
    assert 0 <= min(figures.values()) and sum(figures.values()) < math.inf
    assert (side in ("ours", "plain")) == (not torch.equal(model.lm_head.weight, before))
