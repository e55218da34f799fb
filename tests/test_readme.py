"""README, RESULTS.md, the toy: a command that fails, or a number nobody measured, is what a newcomer meets first."""

import importlib
import re
import shlex
from functools import partial

import make_toy
import torch
from conftest import ROOT
from transformers import AutoTokenizer

import gsil

PAGES = ("README.md", "tests/studies/RESULTS.md")
README, RESULTS = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]


def test_commands_parse(tmp_path, monkeypatch):
    """A command that takes hours or needs a GPU would keep flags that have left its script."""
    text = (README + RESULTS).replace("\\\n", " ")
    found = re.findall(r"(?:python|torchrun .*) (?:tests/\w+/)?(\w+)\.py\b([^`#\n]*)", text)
    scripts = {"gsil", "irft", "eval", "make_toy", "toy", "pretrained", "bench", "gsm8k"}
    assert {script for script, _ in found} == scripts and len(found) >= 35
    examples = {"LOSS": "hinge", "SCALE": "1", "LR": "1", "T": "4", "NAME": "main", "...": "--seed=0"}
    examples["DIR"] = str(ROOT / "tests/parity/rows/gsm8k")
    monkeypatch.chdir(tmp_path)  # a person who followed README has runs/mine already
    for script, flags in found:
        words = [examples.get(word, word) for word in shlex.split(flags)]
        if "--resume" not in words:
            importlib.import_module(script).parse_args(words)


def test_what_is_named_exists():
    """A reader would look for flags, functions, files and headings that have other names now."""
    scripts = ["gsil.py", "irft.py", "eval.py", "tests/studies/toy.py"]
    sources = {script: (ROOT / script).read_text(encoding="utf-8") for script in scripts}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc-per-node", "--exclude"}
    functions = re.findall(r"`((?:gsil|irft|eval)\.py):(\w+)`", README)
    assert len(flags) >= 20 and len(functions) >= 10
    assert [flag for flag in flags if f'"{flag}"' not in "".join(sources.values())] == []
    for script, name in functions:
        assert re.search(rf"^(def {name}\(|{name} = )", sources[script], re.MULTILINE), (script, name)
    for line in re.findall(r"^ +- (.*)$", README, re.MULTILINE):  # of a diff
        assert f" {line}\n" in sources["gsil.py"] + sources["irft.py"], line
    titles = re.findall(r"^#+ (.*)$", README + RESULTS, re.MULTILINE)
    anchors = ["", *(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)]
    for page, text in zip(PAGES, (README, RESULTS)):
        links = re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", text)
        assert len(links) >= 4
        for path, heading in links:
            assert (ROOT / page).parent.joinpath(path).exists() and heading in anchors, (page, path, heading)


def test_the_pair_by_hand():
    """A student follows these numbers with a pencil, and would look for a mistake of their own."""
    text = README.partition("One pair by hand")[2].partition("\n#")[0]
    question = re.search(r"^\*(Ava .*\?)\*", text, re.MULTILINE)[1]
    answer, guess = re.findall(r"^\| y. `(.*) <eos>` \|", text, re.MULTILINE)
    args = gsil.parse_args(["--device", "cpu"])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pair = gsil.encode({"question": question, "answer": answer}, tokenizer, {tokenizer.eos_token_id})
    pair["generated_ids"] = tokenizer(f"{guess} <eos>").input_ids
    policy = gsil.load_model(args.model, args)
    texts = [(pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("real", "generated")]
    before = gsil.score(policy, texts, 4096)
    pair["real_reference"], pair["generated_reference"] = before
    loss_of = partial(gsil.gsil_loss, loss="logistic", scale=0.3, shift=torch.tensor(0.0))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):  # the second step's metrics are of the model before it, after the first
        found = gsil.update(policy, optimizer, [pair], loss_of, args)
    before, sign = torch.tensor(before), torch.tensor([-1.0, 1.0])  # (2,), as all that follow
    d = torch.tensor([found["d_real"], found["d_generated"]])
    pulls = sign * 0.3 * (sign * 0.3 * d).sigmoid()
    printed = [float(number) for number in re.findall(r"-?\d\.\d{3}", text)]
    for value in [found["loss"], *torch.cat([before, before + d, d, 0.3 * d, pulls]).tolist()]:
        assert min(abs(number - value) for number in printed) < 0.002, value  # three digits, and rounding


def test_readme_is_short_and_has_the_numbers_that_were_measured():
    """A number edited by hand would pass for one that a program printed into RESULTS.md."""
    assert len(README.splitlines()) <= 240 and len(README.encode()) <= 18432
    lines = re.findall(r"^\|.*±.*|^    (?:held-out|base|round 1|sft|rft 1)  .*", README, re.MULTILINE)
    assert len(lines) >= 11 and set(lines) <= set(RESULTS.splitlines())
    text, _, rest = README.partition("### One pair by hand")  # which is computed, above
    text += rest.partition("\n## ")[2]
    numbers = set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", text))
    numbers |= set(re.findall(r"(?<![\d.])\d\.\d{3,4}(?![\d.])|\d\.\d\d(?= s)|\d\d\.\d(?= GB)", text))
    numbers -= {"1.386"}  # 2 ln 2
    assert len(numbers) >= 40 and [number for number in numbers if number not in RESULTS] == []


def test_the_toys_files_are_what_make_toy_makes(tmp_path):
    """The committed files could not be made again, be overwritten, or share a question."""
    for seed, same in (("0", True), ("1", False)):
        make_toy.main(make_toy.parse_args(["--data-only", "--seed", seed, "--out", str(tmp_path)]))
        for part in ("demos", "dev", "heldout", "preferences"):
            made = (tmp_path / f"{part}.jsonl").read_bytes()
            assert ((gsil.TOY / f"{part}.jsonl").read_bytes() == made) == same
    assert make_toy.parse_args(["--seed", "1"]).out.parts[-2:] == ("runs", "toy-1")
    assert make_toy.parse_args([]).out == gsil.TOY.resolve()
    rows, perfect = make_toy.make_rows(0), make_toy.make_rows(0, perfect=True)
    questions = [row.get("question", row.get("prompt")) for part in rows.values() for row in part]
    assert len(questions) == len(set(questions)) == sum(make_toy.SIZES.values())
    assert [row["question"] for row in perfect["demos"]] == [row["question"] for row in rows["demos"]]
    assert all("=" in row["answer"] for row in perfect["demos"]) and perfect["heldout"] == rows["heldout"]
