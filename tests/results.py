"""Runs what README's tables show and prints them: `python tests/results.py` (about 40 minutes on 2 CPU cores).

Each row is a `python gsil.py ...` command, run with --seed 0, 1 and 2; what is already in runs/results is not run again. Numbers
are means over the seeds, on the 500 held-out problems. +- is the half-width of a 95 % interval, 1.96 sqrt(p (1 - p) / 500 + s^2 / 3):
the first term for the choice of problems (all seeds share them), the second for the seeds, whose standard deviation is s.
"""
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "toy"))
import gsil  # noqa: E402
import make_toy  # noqa: E402

RESULTS, SEEDS = ROOT / "runs" / "results", (0, 1, 2)


def run(flags, seed):
    """The folder of `python gsil.py FLAGS --seed SEED`, run unless it is there already."""
    out = RESULTS / ("_".join(flags.replace("--", "").replace("/", "-").split()) or "default") / str(seed)
    if not (out / "summary.json").exists():
        command = [sys.executable, "gsil.py", *flags.split(), "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        print(" ".join(["python", *command[1:-2]]), flush=True)
    return out


def look(policy, problems, tokenizer, seed):
    """Greedy and sampled accuracy, share of samples that show working, accuracy given working, NLL in nats per token."""
    prompts, ends = [p["prompt_ids"] for p in problems], {tokenizer.eos_token_id}
    texts = {t: tokenizer.batch_decode(gsil.sample(policy, prompts, ends, 256, t, 256, f"{seed} answers"),
                                       skip_special_tokens=True) for t in (0, 1)}
    right = {t: [gsil.final_answer(x) == p["answer"] for x, p in zip(texts[t], problems)] for t in texts}
    worked = [" = " in text for text in texts[1]]
    nats = -sum(gsil.score(policy, problems, "real", 256))
    return {"greedy": statistics.fmean(right[0]), "sampled": statistics.fmean(right[1]), "worked": statistics.fmean(worked),
            "right_if_worked": sum(r and w for r, w in zip(right[1], worked)) / max(1, sum(worked)),
            "nll": nats / sum(len(p["real_ids"]) for p in problems)}


def cell(values, problems=500):
    """'0.964 +- 0.012' of one value per seed."""
    p = statistics.fmean(values)
    spread = statistics.variance(values) / len(values) if len(values) > 1 else 0
    return f"{p:.3f} ± {1.96 * math.sqrt(max(0, p * (1 - p)) / problems + spread):.3f}"


class Table:
    """Rows of models, one model per seed, all looked at in the same way."""

    def __init__(self, problems, tokenizer):
        self.problems, self.tokenizer, self.cache = problems, tokenizer, RESULTS / "looks.json"
        self.looks = json.loads(self.cache.read_text()) if self.cache.exists() else {}

    def look(self, key, make_policy, seed):
        key = f"{key} seed {seed}"
        if key not in self.looks:
            self.looks[key] = look(make_policy(), self.problems, self.tokenizer, seed)
            RESULTS.mkdir(parents=True, exist_ok=True)
            self.cache.write_text(json.dumps(self.looks, indent=1))
        return self.looks[key]

    def row(self, name, make_policy, seconds=None):
        """Print a row; make_policy(seed) gives the model, seconds(seed) what it took."""
        looks = [self.look(name, lambda: make_policy(seed), seed) for seed in SEEDS]
        took = "" if seconds is None else f"{statistics.fmean(seconds(seed) for seed in SEEDS):.0f}"
        print(f"| {name.split(': ')[-1]} | {cell([x['greedy'] for x in looks])} | {cell([x['sampled'] for x in looks])} "
              f"| {cell([x['worked'] for x in looks])} | {cell([x['right_if_worked'] for x in looks])} "
              f"| {statistics.fmean(x['nll'] for x in looks):.4f} | {took} |", flush=True)


def load(folder):
    return gsil.load_model(folder, "cpu")


def seconds_of(folder, name):
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    return next(row["seconds"] for row in rows if row["name"] == name)


def extrapolated(folder, factor):
    """base + (sft - base) / factor, weight by weight: the control that needs no sampling."""
    base, sft = load(gsil.TOY / "base"), load(folder / "sft")
    with torch.no_grad():
        for start, end in zip(base.parameters(), sft.parameters()):
            start.lerp_(end, 1 / factor)
    return base


def table(title, common, table_):
    print(f"\n{title}\n\n| | greedy | sampled | shows working | right given working | NLL | seconds |\n|---|---|---|---|---|---|---|")
    tag = title.split()[0] + ": "
    main = [run(common, seed) for seed in SEEDS]
    table_.row(tag + "base", lambda seed: load(gsil.TOY / "base"))
    table_.row(tag + "SFT", lambda seed: load(main[seed] / "sft"), lambda seed: seconds_of(main[seed], "sft"))
    for factor in (0.5, 0.3):
        table_.row(f"{tag}SFT weights / {factor}", lambda seed: extrapolated(main[seed], factor))
    for loss in ("spin", "logistic", "hinge", "brier", "kliep", "lsif"):
        flags = common if loss == "logistic" else f"--loss {loss} --baseline none {common}".strip()
        table_.row(f"{tag}{'SPIN' if loss == 'spin' else 'GSIL ' + loss}", lambda seed: load(run(flags, seed) / "round_1"),
                   lambda seed: seconds_of(run(flags, seed), "round 1"))


def predicted(scale, problems):
    """Share of worked answers if the round were exact: logit = base + (demo - base) / scale, by number of steps."""
    def logit(hasty):
        return math.log((1 - hasty) / hasty)
    worked = {n: 1 / (1 + math.exp(-(logit(b) + (logit(make_toy.HASTY["demo"][n]) - logit(b)) / scale)))
              for n, b in make_toy.HASTY["base"].items()}
    return statistics.fmean(worked[p["response"].count("=")] for p in problems)


def main():
    tokenizer = gsil.AutoTokenizer.from_pretrained(gsil.TOY / "base")
    problems = gsil.read_demos(str(gsil.TOY / "heldout.jsonl"), tokenizer, {tokenizer.eos_token_id}, math.inf,
                               gsil.parse_args([]))
    looks = Table(problems, tokenizer)
    table("Toy, imperfect demonstrators: python gsil.py --loss LOSS", "", looks)
    subprocess.run([sys.executable, "tests/toy/make_toy.py", "--perfect"], check=True, cwd=ROOT)
    table("Perfect demonstrators: python gsil.py --loss LOSS --data runs/toy-perfect/demos.jsonl --dev ... --heldout ...",
          "--data runs/toy-perfect/demos.jsonl --dev tests/toy/dev.jsonl --heldout tests/toy/heldout.jsonl", looks)
    print("\nShare of samples that show working: python gsil.py --scale SCALE\n\n| scale | predicted | measured |\n|---|---|---|")
    for scale in (1.0, 0.7, 0.5, 0.3, 0.2):
        flags = "" if scale == 0.3 else f"--scale {scale} --baseline none"
        found = [looks.look(f"scale {scale}", lambda: load(run(flags, seed) / "round_1"), seed)["worked"] for seed in SEEDS]
        print(f"| {scale} | {predicted(scale, problems):.3f} | {cell(found)} |", flush=True)
    print("\nSFT at other peak learning rates (held-out): python gsil.py --loss sft --epochs 6 --lr LR\n\n"
          "| lr | greedy | sampled |\n|---|---|---|")
    for lr in ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3"):
        found = [looks.look(f"sft lr {lr}", lambda: load(run(f"--loss sft --epochs 6 --lr {lr}", seed) / "round_1"), seed)
                 for seed in SEEDS]
        print(f"| {lr} | {cell([x['greedy'] for x in found])} | {cell([x['sampled'] for x in found])} |", flush=True)


if __name__ == "__main__":
    main()
