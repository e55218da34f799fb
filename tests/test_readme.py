"""README, the studies' results and the committed toy: a command that does not run, or a number nobody measured, is
the first thing a newcomer meets."""

import importlib
import json
import math
import re
import shlex
import sys
from functools import partial

import torch
from conftest import ROOT
from helpers import commands
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as ev
import gsil

sys.path.insert(0, str(ROOT / "tests" / "studies"))

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "tests/studies/RESULTS.md").read_text(encoding="utf-8")


def test_readme_is_short():
    """A newcomer reads it once; it had grown to 9,800 words before this limit."""
    assert len(README.splitlines()) <= 260
    assert len(README.encode()) <= 20480


def test_readme_commands_parse():
    """Flags that left the script must leave README."""
    found = commands("gsil.py")
    assert len(found) >= 3
    for flags in found:
        if "--resume" not in flags:
            gsil.parse_args(shlex.split(flags))


def test_readme_commands_of_eval_parse():
    """--leaderboard left for --shots, and HumanEval needs a consent: a command without them would be refused."""
    found = commands("eval.py")
    assert len(found) >= 3
    for flags in found:
        ev.parse_args(shlex.split(flags))


def test_flags_that_readme_names_exist():
    """Flags are also named in sentences, where no command is parsed."""
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--nproc-per-node", "--exclude"}
    assert len(named) >= 20
    scripts = ["gsil.py", "irft.py", "eval.py", "tests/studies/toy.py"]
    sources = "".join((ROOT / script).read_text(encoding="utf-8") for script in scripts)
    assert {flag for flag in named if f'"{flag}"' not in sources} == set()


def test_the_pair_by_hand_in_readme():
    """A student follows these numbers with a pencil; each must be what the code computes."""
    args = gsil.parse_args([])
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    policy = gsil.load_model(gsil.TOY / "base", args)
    question = (
        "Ava has 7 apples . Ava buys 4 more . the number grows 2 times . how many apples does Ava have ?"
    )
    answer = "7 + 4 = 11 . 11 * 2 = 22 . #### 22"
    row = {"question": question, "answer": answer}
    pair = gsil.encode(row, tokenizer, {tokenizer.eos_token_id})
    pair["generated_ids"] = tokenizer("#### 17").input_ids + [tokenizer.eos_token_id]
    text = README.partition("One pair by hand")[2].partition("\n#")[0]
    assert question in text and answer in text and "#### 17 <eos>" in text

    def sums():
        return gsil.score(
            policy, [(pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("real", "generated")], 4096
        )

    pair["real_reference"], pair["generated_reference"] = before = sums()
    loss_of = partial(gsil.gsil_loss, loss="logistic", scale=0.3, shift=torch.tensor(0.0))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    loss_of(policy, [pair])[0].sum().backward()
    optimizer.step()
    losses, found = loss_of(policy, [pair])
    d = [found["log_ratio_real"].item(), found["log_ratio_generated"].item()]
    pulls = [-0.3 / (1 + math.exp(0.3 * d[0])), 0.3 / (1 + math.exp(-0.3 * d[1]))]
    for value in (*before, *sums(), *d, 0.3 * d[0], 0.3 * d[1], losses.item(), *pulls):
        assert any(abs(float(number) - value) < 0.002 for number in re.findall(r"-?\d\.\d{3}", text)), value


def test_commands_of_studies_parse():
    """They take minutes or a GPU; their flags are checked at once."""
    found = re.findall(r"python tests/studies/(\w+)\.py([^`#\n]*)", README + RESULTS)
    assert {script for script, _ in found} == {"toy", "pretrained", "bench"}
    for script, flags in found:
        flags = flags.replace("NAME", "main").replace("DIR", str(ROOT / "tests/parity/rows/gsm8k"))
        importlib.import_module(script).parse_args(shlex.split(flags))


def test_readme_names_what_is_there():
    """It is how a reader of the papers finds the place in the code; a renamed function must not break it."""
    named = re.findall(r"`(gsil|irft|eval)\.py:(\w+)`", README)
    assert len(named) >= 10
    for script, name in named:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        assert re.search(rf"^(def {name}\(|{name} = )", source, re.MULTILINE), (script, name)


def test_links_lead_somewhere():
    """A renamed file or heading leaves a link that GitHub shows and does not follow."""
    texts = {"README.md": README, "tests/studies/RESULTS.md": RESULTS}
    for page, text in texts.items():
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https:")]
        assert len(links) >= 4
        for link in links:
            path, _, heading = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), (page, link)
            titles = (
                re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
            )
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, (page, link)


def test_readme_has_the_numbers_that_were_measured():
    """RESULTS.md has what the programs printed, with their commands; a number edited by hand must not pass for it."""
    rows = [line for line in README.splitlines() if line.startswith("|") and "±" in line]
    assert len(rows) >= 6
    printed = [
        line for line in README.splitlines() if re.match(r"    (held-out|base|round 1|sft|rft 1)  ", line)
    ]
    assert len(printed) == 5
    assert {line for line in rows + printed if line not in RESULTS.splitlines()} == set()
    numbers = re.findall(r"\d\.\d{3} ± \d\.\d{3}", README)
    assert {number for number in numbers if number not in RESULTS} == set()
    # Others with that many digits, but for the pair by hand, and seconds and GB on a GPU.
    text = README.partition("### One pair by hand")
    text = text[0] + text[2].partition("\n## ")[2]
    numbers = re.findall(r"(?<![\d.])\d\.\d{3,4}(?![\d.])", text) + re.findall(
        r"\d\.\d\d s|\d\d\.\d GB", README
    )
    numbers = {number.split()[0] for number in numbers} - {"1.386"}  # 2 ln 2
    assert len(numbers) >= 20
    assert {number for number in numbers if number not in RESULTS} == set()


def test_the_toys_files_are_what_make_toy_makes():
    """The committed files must be regenerable, and no question may stand in two of them."""
    import make_toy

    rows = make_toy.make_rows(0)
    for part in ("demos", "dev", "heldout", "preferences"):
        made = "".join(json.dumps(row) + "\n" for row in rows[part])
        assert (ROOT / f"tests/toy/{part}.jsonl").read_text() == made
    questions = [row.get("question", row.get("prompt")) for part in rows.values() for row in part]
    assert len(questions) == len(set(questions)) == 20000 + 2048 + 500 + 500 + 256
    perfect = make_toy.make_rows(0, perfect=True)
    assert [row["question"] for row in perfect["demos"]] == [row["question"] for row in rows["demos"]]
    assert all("=" in row["answer"] for row in perfect["demos"]) and perfect["heldout"] == rows["heldout"]


def test_the_toys_base_model():
    """The lesson needs a base that can do the sums but mostly does not show them; and a small repository."""
    import make_toy

    base = ROOT / "tests/toy/base"
    assert sum(path.stat().st_size for path in base.iterdir()) < 1e6
    rows = [json.loads(line) for line in (ROOT / "tests/toy/heldout.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(base)
    stats = make_toy.statistics(model, AutoTokenizer.from_pretrained(base), rows, temperature=1)
    assert stats["right given working"] >= 0.95 and 0.2 < stats["shows working"] < 0.4
