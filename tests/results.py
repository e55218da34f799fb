"""Runs and prints README's tables: `python tests/results.py`, about 25 minutes on 2 CPU cores.

A row is one `python gsil.py ...` command, run with --seed 0, 1 and 2 (runs/results keeps what was run, so a
second call only prints). Each number is a mean over the seeds, all on the same 500 held-out problems. The
interval is 1.96 sqrt(p (1 - p) / 500 + s^2 / 3): the first term is for the choice of problems, the second for
the seeds, s being their standard deviation. Sampled numbers are from one sample a problem, at temperature 1.
Seconds are a median.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median, variance

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]
import gsil  # noqa: E402
import make_toy  # noqa: E402

RESULTS, SEEDS = ROOT / "runs" / "results", (0, 1, 2)
TOKENIZER = gsil.AutoTokenizer.from_pretrained(gsil.TOY / "base")
EOS = {TOKENIZER.eos_token_id}
ROWS = gsil.read_rows(f"{gsil.TOY}/heldout.jsonl", "train")
PROBLEMS = gsil.read_demos("heldout", ROWS, TOKENIZER, EOS, math.inf, gsil.parse_args([]))
PERFECT = "--data runs/toy-perfect/demos.jsonl --dev tests/toy/dev.jsonl --heldout tests/toy/heldout.jsonl"


def run(flags, seed):
    """The folder of `python gsil.py FLAGS --seed SEED`, run unless it is there already."""
    out = RESULTS / ("_".join(flags.replace("--", "").replace("/", "-").split()) or "default") / str(seed)
    if not (out / "summary.json").exists():
        print(f"running: python gsil.py {flags} --seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, "gsil.py", *flags.split(), "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return out


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
    logps = gsil.score(gsil.response_logps, policy, gsil.texts(PROBLEMS, "real"), 256)
    return {
        "greedy": fmean(right["greedy"]),
        "sampled": fmean(right["sampled"]),
        "shows working": fmean(worked),
        "right if worked": sum(r and w for r, w in zip(right["sampled"], worked)) / max(1, sum(worked)),
        "NLL": -sum(logps) / sum(len(problem["real_ids"]) for problem in PROBLEMS),
    }


def cell(values):
    """[0.96, 0.97, 0.96] -> '.963 ± .017'"""
    p = fmean(values)
    half = 1.96 * math.sqrt(p * (1 - p) / len(PROBLEMS) + variance(values) / len(values))
    return f"{p:.3f} ± {half:.3f}".replace("0.", ".")


def load(folder):
    return gsil.load_model(folder, "cpu")


def extrapolated(folder, factor):
    """base + (sft - base) / factor, weight by weight: goes past the demonstrators without any sampling."""
    base, sft = load(gsil.TOY / "base"), load(folder / "sft")
    with torch.no_grad():
        for start, end in zip(base.parameters(), sft.parameters()):
            start.lerp_(end, 1 / factor)
    return base


def seconds(folder, name):
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    return next(row["seconds"] for row in rows if row["name"] == name)


def table(title, data):
    """One row per method, all trained on the same data."""
    main = [run(data, seed) for seed in SEEDS]
    methods = {
        "base": (lambda seed: load(gsil.TOY / "base"), None),
        "SFT": (lambda seed: load(main[seed] / "sft"), lambda seed: seconds(main[seed], "sft")),
        "SFT weights / .5": (lambda seed: extrapolated(main[seed], 0.5), None),
        "SFT weights / .3": (lambda seed: extrapolated(main[seed], 0.3), None),
    }
    for loss in ("spin", "logistic", "hinge", "brier", "kliep", "lsif"):
        flags = data if loss == "logistic" else f"--loss {loss} --baseline none {data}".strip()
        methods[f"--loss {loss}"] = (
            lambda seed, flags=flags: load(run(flags, seed) / "round_1"),
            lambda seed, flags=flags: seconds(run(flags, seed), "round 1"),
        )
    columns = ["greedy", "sampled", "shows working", "right if worked", "NLL", "seconds"]
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n" + "|---" * 7 + "|")
    for name, (policy, took) in methods.items():
        looks = [look(policy(seed), seed) for seed in SEEDS]
        cells = [cell([x[key] for x in looks]) for key in columns[:4]]
        cells += [f"{fmean(x['NLL'] for x in looks):.4f}", f"{median(map(took, SEEDS)):.0f}" if took else ""]
        print("|", " | ".join([name, *cells]), "|", flush=True)


def predicted(scale):
    """Share of worked answers after an exact round: logit = base + (demo - base) / scale, per step count."""
    shares = {}
    for steps in (2, 3, 4):
        base, demo = (math.log(1 / make_toy.HASTY[crowd][steps] - 1) for crowd in ("base", "demo"))
        shares[steps] = 1 / (1 + math.exp(-(base + (demo - base) / scale)))
    return fmean(shares[problem["response"].count("=")] for problem in PROBLEMS)


def main():
    table("python gsil.py --loss LOSS", "")
    subprocess.run([sys.executable, "tests/toy/make_toy.py", "--perfect"], check=True, cwd=ROOT)
    table(f"python gsil.py --loss LOSS {PERFECT}", PERFECT)
    print("\npython gsil.py --scale SCALE\n\n| scale | predicted | measured |\n|---|---|---|")
    for scale in (1.0, 0.7, 0.5, 0.3, 0.2):
        flags = "" if scale == 0.3 else f"--scale {scale} --baseline none"
        worked = [look(load(run(flags, seed) / "round_1"), seed)["shows working"] for seed in SEEDS]
        print(f"| {scale} | {predicted(scale):.3f} | {cell(worked)} |", flush=True)
    print("\npython gsil.py --loss sft --epochs 6 --lr LR\n\n| lr | greedy | sampled |\n|---|---|---|")
    for lr in ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3"):
        folders = [run(f"--loss sft --epochs 6 --lr {lr}", seed) for seed in SEEDS]
        looks = [look(load(folder / "round_1"), seed) for seed, folder in enumerate(folders)]
        print("|", " | ".join([lr, *(cell([x[key] for x in looks]) for key in ("greedy", "sampled"))]), "|")


if __name__ == "__main__":
    main()
