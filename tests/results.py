"""Runs and prints README's tables: `python tests/results.py gsil` or `irft`, 30 or 60 minutes on 2 CPU cores.

A row is one `python gsil.py ...` or `python irft.py ...` command, run with --seed 0, 1 and 2 (runs/results
keeps what was run, so a second call only prints). Each number is a mean over the seeds, all on the same 500
held-out problems. The interval is 1.96 sqrt(p (1 - p) / 500 + s^2 / 3): the first term is for the choice of
problems, the second for the seeds, s being their standard deviation. Sampled numbers are from one sample a
problem, at temperature 1. Seconds are a median.
"""

import argparse
import functools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median, variance
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]
import gsil  # noqa: E402
import make_toy  # noqa: E402

RESULTS, SEEDS = ROOT / "runs" / "results", (0, 1, 2)
TOKENIZER = gsil.AutoTokenizer.from_pretrained(gsil.TOY / "base")
EOS = {TOKENIZER.eos_token_id}
ROWS = gsil.read_rows(f"{gsil.TOY}/heldout.jsonl", "train")
FLAGS = gsil.parse_args([])
PROBLEMS = gsil.read_demos("heldout", ROWS, TOKENIZER, EOS, math.inf, FLAGS)
PERFECT = "--data runs/toy-perfect/demos.jsonl --dev tests/toy/dev.jsonl --heldout tests/toy/heldout.jsonl"
COLUMNS = ["greedy", "sampled", "shows working", "right if worked", "NLL"]


def run(script, flags, seed):
    """The folder of `python SCRIPT.py FLAGS --seed SEED`, run unless it is there already."""
    words = [script, *flags.replace("--", "").replace("/", "-").split()]
    out = RESULTS / "_".join(words) / str(seed)
    if not (out / "summary.json").exists():
        print(f"running: python {script}.py {flags} --seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, f"{script}.py", *flags.split(), "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return out


def guess(problem):
    """A hasty response to a held-out problem: a bare number, the same one for every model."""
    value = random.Random(problem["prompt"]).randint(0, make_toy.LARGEST)
    return TOKENIZER(f"#### {value}").input_ids + [TOKENIZER.eos_token_id]


def look(policy, seed):
    """What a row shows of one model, each a float."""
    prompts = [problem["prompt_ids"] for problem in PROBLEMS]
    texts, right = {}, {}
    for key, temperature in (("greedy", 0), ("sampled", 1)):
        ids = gsil.sample(policy, prompts, EOS, 256, temperature, 256, f"{seed} answers")
        texts[key] = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
        found = map(gsil.final_answer, texts[key])
        right[key] = [answer == problem["answer"] for answer, problem in zip(found, PROBLEMS)]
    worked = ["=" in text for text in texts["sampled"]]
    careful = gsil.score(gsil.response_logps, policy, gsil.texts_of(PROBLEMS, "real"), FLAGS)
    hasty = gsil.score(gsil.response_logps, policy, [(p["prompt_ids"], guess(p)) for p in PROBLEMS], FLAGS)
    return {
        "greedy": fmean(right["greedy"]),
        "sampled": fmean(right["sampled"]),
        "shows working": fmean(worked),
        "right if worked": sum(r and w for r, w in zip(right["sampled"], worked)) / max(1, sum(worked)),
        "NLL": -sum(careful) / sum(len(problem["real_ids"]) for problem in PROBLEMS),
        "gap": fmean(careful) - fmean(hasty),
    }


@functools.cache
def looked(folder, seed):
    """look() at a saved model, kept beside it."""
    file = folder.with_name(f"{folder.name}.look.json")
    if not file.exists():
        file.write_text(json.dumps(look(gsil.load_model(folder, "cpu"), seed)))
    return json.loads(file.read_text())


def cell(values):
    """[0.96, 0.97, 0.96] -> '.963 ± .017'"""
    p = fmean(values)
    half = 1.96 * math.sqrt(p * (1 - p) / len(PROBLEMS) + variance(values) / len(values))
    return f"{p:.3f} ± {half:.3f}".replace("0.", ".")


def measured(script, flags, key="shows working", folder="round_1"):
    """One cell: what the three runs of a command show in one respect."""
    return cell([looked(run(script, flags, seed) / folder, seed)[key] for seed in SEEDS])


def extrapolated(folder, factor):
    """base + (sft - base) / factor, weight by weight: goes past the demonstrators without any sampling."""
    base, sft = (gsil.load_model(path, "cpu") for path in (gsil.TOY / "base", folder / "sft"))
    with torch.no_grad():
        for start, end in zip(base.parameters(), sft.parameters()):
            start.lerp_(end, 1 / factor)
    return base


class Mixed:
    """log pi = log base + (log sft - log base) / factor + constant, at every token: two models, mixed while
    sampling. What scale does in one model's weights, without training for it, at twice the cost for ever."""

    def __init__(self, folder, factor):
        self.models = [gsil.load_model(path, "cpu") for path in (gsil.TOY / "base", folder / "sft")]
        self.factor, self.device = factor, self.models[0].device

    def __call__(self, past_key_values=None, **inputs):
        caches = past_key_values.caches if past_key_values else [None, None]
        outs = [model(past_key_values=cache, **inputs) for model, cache in zip(self.models, caches)]
        base, sft = (out.logits.log_softmax(-1) for out in outs)  # (B, T, V) each
        caches = [out.past_key_values for out in outs]
        keep = lambda rows: [cache.batch_select_indices(rows) for cache in caches]  # noqa: E731
        return SimpleNamespace(
            logits=base + (sft - base) / self.factor,
            past_key_values=SimpleNamespace(caches=caches, batch_select_indices=keep),
        )


def seconds(folder, last):
    """What the rounds took, all of them; or SFT."""
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    return sum(row["seconds"] for row in rows if (row["name"] == "sft") == (last == "sft"))


def row(name, looks, took=()):
    cells = [cell([look[key] for look in looks]) for key in COLUMNS[:4]]
    cells += [f"{fmean(look['NLL'] for look in looks):.4f}", f"{median(took):.0f}" if took else ""]
    print("|", " | ".join([name, *cells]), "|", flush=True)


def method(name, script, flags, last="round_1"):
    """A row of a table: the model in folder `last` after this command."""
    folders = [run(script, flags, seed) for seed in SEEDS]
    looks = [looked(folder / last, seed) for seed, folder in enumerate(folders)]
    row(name, looks, [seconds(folder, last) for folder in folders])


def header(title, columns):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")


def predicted(scale, rounds=1):
    """Share of worked answers after exact rounds: logit = demo + (1 - 1/scale)^rounds (base - demo)."""
    shares = {}
    for steps in (2, 3, 4):
        base, demo = (math.log(1 / make_toy.HASTY[crowd][steps] - 1) for crowd in ("base", "demo"))
        logit = demo + (1 - 1 / scale) ** rounds * (base - demo)
        shares[steps] = 1 / (1 + math.exp(-max(-99, min(99, logit))))
    return f"{fmean(shares[problem['response'].count('=')] for problem in PROBLEMS):.3f}".removeprefix("0")


def gsil_tables():
    subprocess.run([sys.executable, "tests/toy/make_toy.py", "--perfect"], check=True, cwd=ROOT)
    for data in ("", PERFECT):
        header(f"python gsil.py --loss LOSS {data}", ["", *COLUMNS, "seconds"])
        row("base", [look(gsil.load_model(gsil.TOY / "base", "cpu"), seed) for seed in SEEDS])
        method("SFT", "gsil", data, "sft")
        for factor in (0.5, 0.3):
            looks = [look(extrapolated(run("gsil", data, seed), factor), seed) for seed in SEEDS]
            row(f"SFT weights / {factor}", looks)
        for factor in (0.5, 0.3):
            looks = [look(Mixed(run("gsil", data, seed), factor), seed) for seed in SEEDS]
            row(f"SFT log-probs / {factor}", looks)
        for loss in ("spin", "logistic", "hinge", "brier", "kliep", "lsif"):
            flags = data if loss == "logistic" else f"--loss {loss} --baseline none {data}".strip()
            method("SPIN" if loss == "spin" else f"GSIL {loss}", "gsil", flags)
        if not data:
            method("IRFT, T = 4", "irft", "--method irft --chunks 4 --baseline none", "round_4")
            method("RFT", "irft", "")
    header("python gsil.py --scale SCALE", ["scale", "predicted", "measured"])
    for scale in (1.0, 0.7, 0.5, 0.3, 0.2):
        flags = "" if scale == 0.3 else f"--scale {scale} --baseline none"
        print(f"| {scale} | {predicted(scale)} | {measured('gsil', flags)} |", flush=True)
    header("python gsil.py --loss spin --scale SCALE --rounds 4", ["scale", "1 round", "2", "3", "4"])
    for scale in ("1", "0.6", "0.5", "0.3"):
        flags, cells = f"--loss spin --scale {scale} --rounds 4 --baseline none", []
        for t in (1, 2, 3, 4):
            cells.append(f"{predicted(float(scale), t)} / {measured('gsil', flags, folder=f'round_{t}')}")
        print("|", " | ".join([scale, *cells]), "|", flush=True)
    columns = ["demonstrations", "SFT greedy", "sampled", "GSIL greedy", "sampled"]
    header("python gsil.py --epochs 8 --data runs/demos-N.jsonl ...", columns)
    demos = (gsil.TOY / "demos.jsonl").read_text().splitlines(keepends=True)
    for n in (64, 256, 512, 2048):
        (ROOT / f"runs/demos-{n}.jsonl").write_text("".join(demos[:n]))
        problems = "--dev tests/toy/dev.jsonl --heldout tests/toy/heldout.jsonl"
        flags = f"--epochs 8 --data runs/demos-{n}.jsonl {problems}" if n < 2048 else ""
        cells = [measured("gsil", flags, key, last) for last in ("sft", "round_1") for key in COLUMNS[:2]]
        print("|", " | ".join([str(n), *cells]), "|", flush=True)
    header("python gsil.py --loss sft --epochs 6 --lr LR", ["lr", "greedy", "sampled"])
    for lr in ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3"):
        flags = f"--loss sft --epochs 6 --lr {lr}"
        print("|", " | ".join([lr, *(measured("gsil", flags, key) for key in COLUMNS[:2])]), "|", flush=True)


def irft_tables():
    subprocess.run([sys.executable, "tests/toy/make_toy.py", "--perfect"], check=True, cwd=ROOT)
    none, irft = "--baseline none", "--method irft"
    methods = {
        "SFT": ("", "sft"),
        "SPIN = IRFT, T = 1": (irft, "round_1"),
        **{f"IRFT, T = {t}": (f"{irft} --chunks {t} {none}", f"round_{t}") for t in (2, 4, 8)},
        "RFT": ("", "round_1"),
        "RFT, preferences": (f"--preferences tests/toy/preferences.jsonl {none}", "round_1"),
    }
    header("python irft.py ...", ["", *COLUMNS, "seconds"])
    row("base", [look(gsil.load_model(gsil.TOY / "base", "cpu"), seed) for seed in SEEDS])
    for name, (flags, last) in methods.items():
        method(name, "irft", flags, last)

    header("mean log-prob of careful minus hasty responses to held-out prompts", ["", "gap in nats"])
    print(f"| base | {look(gsil.load_model(gsil.TOY / 'base', 'cpu'), 0)['gap']:.2f} |")
    for name, (flags, last) in methods.items():
        gaps = [looked(run("irft", flags, seed) / last, seed)["gap"] for seed in SEEDS]
        print(f"| {name} | {fmean(gaps):.2f} ± {1.96 * math.sqrt(variance(gaps) / 3):.2f} |", flush=True)

    header(
        "one closed form: share of worked answers after one round",
        ["scale or kl", "predicted", "SPIN, IRFT T = 1", "GSIL logistic", "RFT"],
    )
    for scale in ("1", "0.5", "0.3"):
        rft = f"--kl {scale} --reward-steps 256 --reward-penalty 0 {none}"
        others = "" if scale == "0.3" else f"--scale {scale} {none}"
        commands = ("irft", f"{irft} {others}".strip()), ("gsil", others), ("irft", rft)
        cells = [measured(*command) for command in commands]
        print("|", " | ".join([scale, predicted(float(scale)), *cells]), "|", flush=True)

    title = "python irft.py --method irft --chunks T --scale SCALE"
    columns = ["scale", "T = 1", "T = 2", "T = 4", "T = 8"]
    header(f"{title}: share of worked answers, predicted / measured", columns)
    for scale in ("0.3", "0.6", "1"):
        cells = []
        for t in (1, 2, 4, 8):
            flags = f"--chunks {t}" * (t > 1) + f" --scale {scale}" * (scale != "0.3")
            flags = f"{irft} {flags.strip()} {none}" if flags else irft
            found = measured("irft", " ".join(flags.split()), folder=f"round_{t}")
            cells.append(f"{predicted(float(scale), t)} / {found}")
        print("|", " | ".join([scale, *cells]), "|", flush=True)

    header("variations of T = 8, scale .3", ["", *COLUMNS, "seconds"])
    for steps in (4, 64):
        flags = f"{irft} --chunks 8 --steps-per-chunk {steps} {none}"
        method(f"--steps-per-chunk {steps}", "irft", flags, "round_8")
    for t in (1, 4, 8):
        flags = f"{irft} --chunks {t} {none} {PERFECT}"
        method(f"perfect demonstrators, T = {t}", "irft", flags, f"round_{t}")

    header(
        "python irft.py --rounds 8 ...: share of worked answers, in brackets of each seed",
        ["", "1 round", "2", "3", "4", "8"],
    )
    settings = [f"--reward-steps 64 --kl {kl}" for kl in ("0.1", "0.5", "1")]
    for setting in [*settings, "--reward-pairs all --kl 0.5"]:
        cells = []
        for t in (1, 2, 3, 4, 8):
            flags, folder = f"--rounds 8 {setting} {none}", f"round_{t}"
            looks = [looked(run("irft", flags, seed) / folder, seed) for seed in SEEDS]
            each = [f"{look['shows working']:.2f}" for look in looks]
            cells.append(f"{measured('irft', flags, folder=folder)} ({', '.join(each)})")
        print("|", " | ".join([setting, *cells]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    tables = {"gsil": gsil_tables, "irft": irft_tables}
    parser.add_argument("script", choices=tables)
    tables[parser.parse_args().script]()
