"""The GSM8K study: its endpoint, its choice of data, its command on a tiny input, and its tables."""

import json

import gsm8k
import pytest
from helpers import write_jsonl
from transformers import AutoTokenizer

import gsil

GSM8K = gsm8k.ROOT.parent / "shared/data/gsm8k"


TRUE = """48/2=24|(3+4)*2.5=17.5|1,250*2=2,500|5 + 6 = 11|-3+5=2|.5*4=2|1/3=.33|3*.33=1"""
# No operator, also not a sign; a sum on the right; no thousands comma; other operators, names and characters.
FALSE = """3*.32=1|48/2=25|24=24|-24=-24|24=20+4|2*3=6=6|2*3|1,2*2=24|2**3=8|7//2=3|4/0=0|x*2=4|1e2*2=200
|20%*10=2|(2+3=5|exit()+1=1|="""


@pytest.mark.parametrize(
    "inside", [*TRUE.split("|"), *FALSE.split("|"), "9" * 400 + "*1=1", "(" * 500 + "1=1"]
)
def test_annotations(inside):
    """Sums that are wrong, or no sums, would count as the habit that the whole study measures."""
    true = inside in TRUE.split("|")
    assert gsm8k.true_annotation(inside) is true
    assert gsm8k.valid(f"So <<1+1=2>>2 and <<{inside}>>\n#### 2") is true


def test_responses():
    """A response without its last line, or with an open annotation, would count as valid."""
    for end in ("\n#### 2", "\n#### $1,250.50\n", "\n#### -2", "<<2*2=4>>\n#### 4"):
        assert gsm8k.valid(f"<<1+1=2>>{end}")
        assert not gsm8k.valid(f"1+1 = 2{end}") or "<<" in end  # no annotation
    for end in (
        " #### 2",
        "\n#### 2\nNext:",
        "\n#### two",
        "\n####",
        "\n<<2+2=4\n#### 4",
        "<<2<4>>\n#### 4",
        "",
    ):
        assert not gsm8k.valid(f"<<1+1=2>>{end}")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs GSM8K in ../shared")
def test_demonstrators_reach_the_endpoint():
    """An endpoint that the demonstrators themselves miss would punish imitation."""
    answers = [row["answer"] for row in gsm8k.read(GSM8K, "test") if row["answer"].count("<<") in (1, 2, 3)]
    assert sum(map(gsm8k.valid, answers)) > 0.95 * len(answers) > 700


def test_selection():
    """Test problems, or one part's problems in another part, would be trained on."""
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    rows = [{"question": str(n), "answer": f"{n % 10} + 1 . #### 2"} for n in range(40)]
    rows[1]["answer"] = "<<" * 4
    rows[2]["answer"] = "1 " * 91
    args = gsm8k.parse_args(["--data=D", "--model=M", "--a=8", "--demos=6", "--dev-size=5"])
    parts = gsm8k.select(rows, rows[:4], tokenizer, args)
    numbers = {part: [int(row["question"]) for row in chosen] for part, chosen in parts.items()}
    assert numbers["start"] == [0, *range(3, 10)] and numbers["a"] == [0, *range(3, 8)]
    assert numbers["b"] == [*range(10, 16)] and numbers["dev"] == [*range(35, 40)]
    assert numbers["test"] == [0, 3] and numbers["one"] == [35]
    with pytest.raises(SystemExit, match="too few"):
        gsm8k.select(rows[:20], rows, tokenizer, args)


def test_command(tmp_path, capsys):
    """The study takes hours: an arm that cannot run, or a JSON that its tables cannot read, must show before."""
    rows = [json.loads(line) for line in (gsil.TOY / "demos.jsonl").read_text().splitlines()[:12]]
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
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json*")}
    capsys.readouterr()
    gsm8k.study(gsm8k.parse_args([*flags.split(), "--settings", "1"]))  # all is done
    changed = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {f"{part}.jsonl" for part in ("start", "a", "b", "dev", "one", "test")}
    gsm8k.report(gsm8k.parse_args(["--report", "--results", f"{tmp_path}/results"]))
    assert capsys.readouterr().out.count("\n| gsil-b |") == 4


def test_intervals_and_verdict():
    """The first question's answer is read off these numbers."""

    def runs(**shares):  # of 100 problems, the first ones are valid
        lists = {name.replace("_", "-"): "1" * n + "0" * (100 - n) for name, n in shares.items()}
        return {name: {0: {"sampled": {"valid": text}}} for name, text in lists.items()}

    mean, half, of_seeds = gsm8k.paired(runs(gsil=50, sft=40), "gsil", "sft")
    assert (mean, of_seeds) == (pytest.approx(0.1), None)
    assert half == pytest.approx(1.96 * (0.09 / 99) ** 0.5)  # 10 differences of 1, 90 of 0
    three = {name: {} for name in ("gsil", "sft")}
    for seed, won in enumerate((4, 5, 6)):
        three["gsil"] |= {seed: runs(gsil=won)["gsil"][0]}
        three["sft"] |= {seed: runs(gsil=0)["gsil"][0]}
    assert gsm8k.paired(three, "gsil", "sft")[2] == pytest.approx(4.30 * 0.01 / 3**0.5)
    assert gsm8k.verdict(runs(gsil=30, sft=40)).startswith("loss")
    assert gsm8k.verdict(runs(gsil=41, sft=40)).startswith("none")
    assert gsm8k.verdict(runs(gsil=50, sft=40)) == "gain, before all of the controls have run"
    controls = {"extrapolated": 20, "beyond_base": 30}
    assert gsm8k.verdict(runs(gsil=50, sft=40, tempered=40, **controls)) == "gain"
    assert gsm8k.verdict(runs(gsil=50, sft=40, tempered=50, **controls)).endswith("tempered reach GSIL")
