"""All measurements on the toy: runs gsil.py and irft.py with several seeds, and prints the tables of RESULTS.md.

    python tests/studies/toy.py main --seeds 3      # the table of README
    python tests/studies/toy.py all                 # every table

A row is one command of gsil.py or irft.py, run once per seed, in this process. Runs are kept in runs/toy, so
the same command continues a study that was stopped, and a second call only prints; after a change of the
scripts delete that folder. OMP_NUM_THREADS sets the threads, as for any torch program.

All models are asked the same 500 held-out problems. A number is a mean over the seeds; behind it is half of its
95 % interval, 1.96 sqrt(p (1 - p) / 500 + s^2 / seeds): the first term is for the choice of problems, the second
for the seeds, s being their standard deviation. Sampled numbers, the share that shows its working among them, are
from one sample a problem, at temperature 1. Seconds are a median, of training and its samples.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, median, variance
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy"), str(ROOT / "tests" / "studies")]

import make_toy
import pretrained
import torch
from transformers import AutoTokenizer

import gsil
import irft

FLAGS = gsil.parse_args(["--device", "cpu"])
TOKENIZER = AutoTokenizer.from_pretrained(gsil.TOY / "base")
EOS = {TOKENIZER.eos_token_id}
PROBLEMS = gsil.read_demos(
    f"{gsil.TOY}/heldout.jsonl", "train", partial(gsil.encode, tokenizer=TOKENIZER, eos_ids=EOS)
)
OWN = "--dev tests/toy/dev.jsonl --heldout tests/toy/heldout.jsonl"  # beside another --data
PERFECT = f"--data runs/toy-perfect/demos.jsonl {OWN}"
NONE = "--baseline none"
COLUMNS = ["greedy", "sampled", "shows working", "right if worked", "NLL"]


# ---- Running and measuring


def run(command, seed):
    """The folder of `python SCRIPT.py FLAGS --seed SEED`, run or continued unless it is finished."""
    script, *flags = command.split()
    words = [script, *(flag.replace("--", "").replace("/", "-") for flag in flags)]
    out = ROOT / "runs" / "toy" / "_".join(words) / str(seed)
    if (out / "summary.json").exists():
        return out
    print(f"running: {command} --seed {seed}", file=sys.stderr, flush=True)
    if (out / "args.json").exists():
        flags = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        flags += ["--seed", str(seed), "--out", str(out), "--device", "cpu"]
    module = {"gsil": gsil, "irft": irft}[script]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.main(module.parse_args(flags))
    return out


def guess(problem):
    """A hasty response to a held-out problem: a bare number, the same one for every model."""
    value = random.Random(problem["prompt"]).randint(0, make_toy.LARGEST)
    return TOKENIZER(f"#### {value}").input_ids + [TOKENIZER.eos_token_id]


def look(policy, seed):
    """What a row shows of one model, each a float."""
    prompts = [problem["prompt_ids"] for problem in PROBLEMS]
    texts = {}
    right = {}
    for kind, temperature in (("greedy", 0), ("sampled", 1)):
        ids = gsil.sample(policy, prompts, EOS, 256, temperature, 256, f"{seed} answers")
        texts[kind] = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
        answers = [gsil.final_answer(text) for text in texts[kind]]
        right[kind] = [answer == problem["answer"] for answer, problem in zip(answers, PROBLEMS)]
    works = ["=" in text for text in texts["sampled"]]
    found = {
        "greedy": fmean(right["greedy"]),
        "sampled": fmean(right["sampled"]),
        "shows working": fmean(works),
    }
    both = [r and w for r, w in zip(right["sampled"], works)]
    found["right if worked"] = sum(both) / max(1, sum(works))
    careful = gsil.score(policy, [(p["prompt_ids"], p["real_ids"]) for p in PROBLEMS], 4096)
    hasty = gsil.score(policy, [(p["prompt_ids"], guess(p)) for p in PROBLEMS], 4096)
    found["NLL"] = -sum(careful) / sum(len(problem["real_ids"]) for problem in PROBLEMS)
    found["gap"] = fmean(careful) - fmean(hasty)
    return found


@functools.cache
def looked(folder, seed):
    """look() at a saved model, kept beside it."""
    file = folder.with_name(f"{folder.name}.look.json")
    if not file.exists():
        file.write_text(json.dumps(look(gsil.load_model(folder, FLAGS), seed)))
    return json.loads(file.read_text())


def looks(command, last, seeds):
    """look() at the folder `last` of a command's runs, one per seed."""
    return [looked(run(command, seed) / last, seed) for seed in seeds]


# ---- The controls: SFT, extrapolated. Neither trains on a sample of its own


def extrapolated(folder, scale):
    """start + (SFT - start)/scale, weight by weight."""
    start = gsil.load_model(gsil.TOY / "base", FLAGS)
    end = gsil.load_model(folder / "sft", FLAGS)
    with torch.no_grad():
        for weight, target in zip(start.parameters(), end.parameters()):
            weight.lerp_(target, 1 / scale)
    return start


class Caches:
    """Two models' caches, of which finished rows are dropped together."""

    def __init__(self, caches):
        self.caches = caches

    def reorder_cache(self, rows):
        for cache in self.caches:
            cache.reorder_cache(rows)


class Mixed:
    """log pi = log start + (log SFT - log start)/scale + constant, at every token: two models, for ever."""

    def __init__(self, folder, scale):
        self.models = [gsil.load_model(path, FLAGS) for path in (gsil.TOY / "base", folder / "sft")]
        self.scale = scale
        self.device = self.models[0].device

    def __call__(self, past_key_values=None, **inputs):
        caches = past_key_values.caches if past_key_values else [None, None]
        outs = [model(past_key_values=cache, **inputs) for model, cache in zip(self.models, caches)]
        start, end = [out.logits.log_softmax(-1) for out in outs]  # (B, T, V) each
        logits = start + (end - start) / self.scale
        return SimpleNamespace(logits=logits, past_key_values=Caches([out.past_key_values for out in outs]))


# ---- Printing


def cell(values):
    """[0.96, 0.97, 0.96] -> '0.963 ± 0.017'"""
    p = fmean(values)
    square = p * (1 - p) / len(PROBLEMS)
    if len(values) > 1:
        square += variance(values) / len(values)
    return f"{p:.3f} ± {1.96 * math.sqrt(square):.3f}"


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def head(title, columns):
    print(f"\n{title}\n")
    print_row(*columns)
    print("|" + "---|" * len(columns), flush=True)


def model_row(name, found, took=None):
    """found: look() per seed; took: seconds per seed, where the table has them ([]: of this row unknown)."""
    cells = [cell([one[key] for one in found]) for key in COLUMNS[:4]]
    cells.append(f"{fmean(one['NLL'] for one in found):.4f}")
    if took is not None:
        cells.append(f"{median(took):.0f}" if took else "")
    print_row(name, *cells)


def method_row(name, command, seeds, last="round_1", timed=True):
    """The model in folder `last` after this command."""
    took = []
    for seed in seeds:
        rows = json.loads((run(command, seed) / "summary.json").read_text())["rows"]
        took.append(sum(row["seconds"] or 0 for row in rows if (row["name"] == "sft") == (last == "sft")))
    model_row(name, looks(command, last, seeds), took if timed else None)


def base_row(seeds, took=None):
    model_row("base", [look(gsil.load_model(gsil.TOY / "base", FLAGS), seed) for seed in seeds], took)


def extrapolated_rows(data, seeds, kinds, took=None):
    """kinds: name -> what makes a policy of an SFT run's folder and a scale."""
    for name, make in kinds.items():
        for scale in (0.5, 0.3):
            found = [look(make(run(f"gsil {data}".strip(), seed), scale), seed) for seed in seeds]
            model_row(f"{name} extrapolated, 1/{scale}", found, took)


def predicted(scale, rounds=1):
    """Share of answers with working after exact rounds: logit = demo + (1 - 1/scale)^rounds (base - demo)."""
    shares = {}
    for steps in (2, 3, 4):
        base = math.log(1 / make_toy.HASTY["base"][steps] - 1)
        demo = math.log(1 / make_toy.HASTY["demo"][steps] - 1)
        logit = demo + (1 - 1 / scale) ** rounds * (base - demo)
        shares[steps] = 1 / (1 + math.exp(-max(-99, min(99, logit))))
    return fmean(shares[problem["response"].count("=")] for problem in PROBLEMS)


def measured(command, seeds, last="round_1", key="shows working"):
    return cell([one[key] for one in looks(command, last, seeds)])


# ---- The tables


def main_table(seeds):
    head("main: python gsil.py, --loss spin, python irft.py", ["", *COLUMNS])
    base_row(seeds)
    method_row("SFT", "gsil", seeds, "sft", timed=False)
    extrapolated_rows("", seeds, {"SFT": extrapolated})
    method_row("SPIN", f"gsil --loss spin {NONE}", seeds, timed=False)
    method_row("GSIL logistic", "gsil", seeds, timed=False)
    method_row("RFT", f"irft {NONE}", seeds, timed=False)


def losses(seeds, data=""):
    head(f"losses: python gsil.py --loss LOSS {data}".strip(), ["", *COLUMNS, "seconds"])
    base_row(seeds, [])
    method_row("SFT", f"gsil {data}".strip(), seeds, "sft")
    extrapolated_rows(data, seeds, {"SFT": extrapolated, "SFT log-probs": Mixed}, [])
    for loss in ("spin", "logistic", "hinge", "brier", "kliep", "lsif"):
        flags = data if loss == "logistic" else f"--loss {loss} {NONE} {data}"
        method_row("SPIN" if loss == "spin" else f"GSIL {loss}", f"gsil {flags}".strip(), seeds)
    if not data:
        method_row("IRFT, T = 4", irft_command(4), seeds, "round_4")
        method_row("RFT", f"irft {NONE}", seeds)


def make_perfect():
    """The files of PERFECT."""
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is not part of a table
        folder = ROOT / "runs" / "toy-perfect"
        make_toy.main(SimpleNamespace(seed=0, perfect=True, data_only=True, out=folder))


def perfect(seeds):
    make_perfect()
    losses(seeds, PERFECT)


def scales(seeds):
    head("scales: python gsil.py --scale SCALE; share with working", ["scale", "predicted", "measured"])
    points = [("start", 0, [look(gsil.load_model(gsil.TOY / "base", FLAGS), seed) for seed in seeds])]
    points.append(("SFT", 1, looks("gsil", "sft", seeds)))
    for scale in (0.5, 0.3):
        found = [look(extrapolated(run("gsil", seed), scale), seed) for seed in seeds]
        points.append(("SFT extrapolated", 1 / scale, found))
    for scale in (1.0, 0.7, 0.5, 0.3, 0.2):
        command = "gsil" if scale == 0.3 else f"gsil --scale {scale} {NONE}"
        print_row(str(scale), f"{predicted(scale):.3f}", measured(command, seeds))
        if scale >= 0.3:  # where the figure ends
            points.append(("GSIL", 1 / scale, looks(command, "round_1", seeds)))
    marks = []
    for name, inverse, found in points:
        share, half = cell([one["shows working"] for one in found]).split(" ± ")
        marks.append((name, inverse, float(share), float(half)))
    curve = [predicted(10 / i if i else math.inf) for i in range(36)]
    figure = ROOT / "runs" / "toy" / "shares.svg"
    figure.write_text(pretrained.figure(curve, marks))
    print(f"\nfigure: {figure.relative_to(ROOT)}")


def rounds(seeds):
    title = "rounds: python gsil.py --loss spin --scale SCALE --rounds 4; share with working, predicted / measured"
    head(title, ["scale", "1 round", "2", "3", "4"])
    for scale in ("1", "0.6", "0.5", "0.3"):
        command = f"gsil --loss spin --scale {scale} --rounds 4 {NONE}"
        cells = []
        for t in (1, 2, 3, 4):
            cells.append(f"{predicted(float(scale), t):.3f} / {measured(command, seeds, f'round_{t}')}")
        print_row(scale, *cells)


def demonstrations(seeds):
    title = "demonstrations: python gsil.py --epochs 8 on the first N; 2048: python gsil.py"
    head(title, ["demonstrations", "SFT greedy", "SFT sampled", "GSIL greedy", "GSIL sampled"])
    demos = (gsil.TOY / "demos.jsonl").read_text().splitlines(keepends=True)
    for n in (64, 256, 512, 2048):
        command = "gsil"
        if n < len(demos):
            (ROOT / f"runs/demos-{n}.jsonl").write_text("".join(demos[:n]))
            command = f"gsil --epochs 8 --data runs/demos-{n}.jsonl {OWN}"
        cells = []
        for last in ("sft", "round_1"):
            cells += [measured(command, seeds, last, key) for key in ("greedy", "sampled")]
        print_row(str(n), *cells)


def sft_lr(seeds):
    head("sft-lr: python gsil.py --loss sft --epochs 6 --lr LR", ["lr", "greedy", "sampled"])
    for lr in ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3"):
        command = f"gsil --loss sft --epochs 6 --lr {lr}"
        print_row(lr, measured(command, seeds, key="greedy"), measured(command, seeds, key="sampled"))


def irft_command(chunks, scale="0.3"):
    """One command for one run, without flags at their defaults: runs are kept by command."""
    command = f"irft --method irft {NONE}"
    if chunks > 1:
        command += f" --chunks {chunks}"
    if scale != "0.3":
        command += f" --scale {scale}"
    return command


# name -> command, folder of the model
METHODS = {"SFT": ("gsil", "sft"), "SPIN = IRFT, T = 1": (irft_command(1), "round_1")}
METHODS |= {f"IRFT, T = {t}": (irft_command(t), f"round_{t}") for t in (2, 4, 8)}
METHODS["RFT"] = (f"irft {NONE}", "round_1")
METHODS["RFT, preferences"] = (f"irft --preferences tests/toy/preferences.jsonl {NONE}", "round_1")


def methods(seeds):
    head("methods: python irft.py ...", ["", *COLUMNS, "seconds"])
    base_row(seeds, [])
    for name, (command, last) in METHODS.items():
        method_row(name, command, seeds, last)


def gap(seeds):
    title = "gap: mean log-prob of the worked answer minus that of a guess, over the held-out problems"
    head(title, ["", "gap in nats"])
    print_row("base", f"{look(gsil.load_model(gsil.TOY / 'base', FLAGS), 0)['gap']:.2f}")
    for name, (command, last) in METHODS.items():
        gaps = [one["gap"] for one in looks(command, last, seeds)]
        half = 1.96 * math.sqrt(variance(gaps) / len(gaps)) if len(gaps) > 1 else math.nan
        print_row(name, f"{fmean(gaps):.2f} ± {half:.2f}")


def closed_form(seeds):
    title = "closed-form: one round; share with working (RFT: --kl KL --reward-steps 256 --reward-penalty 0)"
    head(title, ["scale or kl", "predicted", "SPIN, IRFT T = 1", "GSIL logistic", "RFT"])
    for scale in ("1", "0.5", "0.3"):
        own = "gsil" if scale == "0.3" else f"gsil --scale {float(scale)} {NONE}"
        rft = f"irft --kl {scale} --reward-steps 256 --reward-penalty 0 {NONE}"
        cells = [measured(command, seeds) for command in (irft_command(1, scale), own, rft)]
        print_row(scale, f"{predicted(float(scale)):.3f}", *cells)


def chunks(seeds):
    title = "chunks: python irft.py --method irft --chunks T --scale SCALE; share with working, predicted / measured"
    head(title, ["scale", "T = 1", "T = 2", "T = 4", "T = 8"])
    for scale in ("0.3", "0.6", "1"):
        cells = []
        for t in (1, 2, 4, 8):
            found = measured(irft_command(t, scale), seeds, f"round_{t}")
            cells.append(f"{predicted(float(scale), t):.3f} / {found}")
        print_row(scale, *cells)


def chunks_perfect(seeds):
    make_perfect()
    head(f"chunks-perfect: python irft.py --method irft --chunks T {PERFECT}", ["", *COLUMNS, "seconds"])
    for t in (1, 4, 8):
        command = f"{irft_command(t)} {PERFECT}"
        method_row(f"perfect demonstrators, T = {t}", command, seeds, f"round_{t}")


def rft_rounds(seeds):
    title = "rft-rounds: python irft.py --rounds 8 ...; share with working, in brackets of each seed"
    head(title, ["", "1 round", "2", "3", "4", "8"])
    settings = [f"--reward-steps 64 --kl {kl}" for kl in ("0.1", "0.5", "1")]
    for setting in [*settings, "--reward-pairs all --kl 0.5"]:
        cells = []
        for t in (1, 2, 3, 4, 8):
            found = [
                one["shows working"]
                for one in looks(f"irft --rounds 8 {setting} {NONE}", f"round_{t}", seeds)
            ]
            cells.append(f"{cell(found)} ({', '.join(f'{share:.2f}' for share in found)})")
        print_row(setting, *cells)


TABLES = {"main": main_table, "losses": losses, "perfect": perfect, "scales": scales, "rounds": rounds}
TABLES |= {"demonstrations": demonstrations, "sft-lr": sft_lr, "methods": methods, "gap": gap}
TABLES |= {"closed-form": closed_form, "chunks": chunks, "chunks-perfect": chunks_perfect}
TABLES |= {"rft-rounds": rft_rounds}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], help="which tables to print")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... so many")
    return parser.parse_args(argv)


def main(args):
    os.chdir(ROOT)  # the commands name files of the repository
    for name in TABLES if "all" in args.tables else args.tables:
        TABLES[name](range(args.seeds))


if __name__ == "__main__":
    main(parse_args())
