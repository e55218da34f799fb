"""Does GSIL, SPIN or IRFT bring what continued fine-tuning on the same demonstrations does not?

The papers start from a model that was already fine-tuned on demonstrations, use the same demonstrations again,
and report gains that more fine-tuning does not bring. This study asks that on GSM8K text and a model of 135M
parameters. What follows is the plan. It was committed before the first run.

    python tests/studies/pretrained.py --convert runs/smollm2    # SmolLM2-135M-Instruct
    python tests/studies/gsm8k.py --data DIR --model runs/smollm2        # the form without a GPU
    python tests/studies/gsm8k.py --data openai/gsm8k:main --model runs/smollm2 --device cuda --demos 512 \\
        --settings 3 --seeds 0 1 2 --micro-batch 8192 --sample-batch 384   # add --arms rft; --a 2048 --demos 2048
    python tests/studies/gsm8k.py --report                       # the tables from the JSON files, without a model

DATA. Problems of GSM8K, in the files' order, whose answer has at most 90 tokens of the model's tokenizer and at
most 3 annotations <<a=b>>: 2298 of train and 383 of test. A is the first 512 of train, B the next 512, dev the last
128 of train, test all 383. Arms on A use its first --demos rows (256 without a GPU), arms on B the first --demos of B.

START. SFT of the model on all of A: 2 epochs, lr 1e-4, batch 16, AdamW, linear decay. Responses, in training and in
tests, have at most 128 tokens (demonstrations with EOS at most 92); one that is cut there has no EOS.

ENDPOINT. A response is valid if its last line is "#### value", value a number; it has at least one annotation; and
every annotation is true. An annotation is true if its left side consists of digits, decimal points, + - * / and
brackets (spaces and thousands commas taken out), has at least one operator between two numbers, and equals the
number on the right within 0.01. Anything else is false, also "<<" without an end. Primary: the share of valid
responses, one per test problem, sampled at temperature 1. Secondary: greedy; then accuracy, NLL per token of
the test answers, annotations and tokens per response, the share that ended with EOS. In a pilot of 100 problems a
start like this one had 0.39 valid sampled and 0.49 greedy, and 0.03 of its answers were right. Of the demonstrators'
own test answers 0.948 are valid: 9 of 383 have no annotation, 11 one without an operator, such as <<40=40>>.

ARMS, each from the start and in this order; their flags are in TRAINED below. COST is counted in tokens, without
padding: 1 for a token of a forward pass, in sampling and scoring, and 3 for a token of a training step. By this
measure an epoch of GSIL, SPIN or IRFT costs 3.1 epochs of SFT, and SFT gets 3.
    sft          continued SFT on A with the start's own recipe
    gsil         GSIL, logistic loss, on A
    extrapolated start + f (sft - start), f on dev from 1.5, 2, 3; costs what sft costs
    beyond-base  base + f (start - base), f on dev from 1.2, 1.5, 2; costs nothing
    tempered     the start sampled at temperature 0.3, 0.5 or 0.7, chosen on dev; costs nothing
    spin         SPIN on A
    irft         IRFT on A in T = 4 chunks, one epoch of each
    sft-b, gsil-b  fresh demonstrations: as sft and gsil, on B, with the flags that sft and gsil used
    rft          only if named in --arms
Without a GPU every trained arm has one setting (the first of TRAINED); with --settings 3 three are tried on dev for
each. The three arms that train nothing try three values in both forms: sharpening alone raises valid, and this
control should be hard to beat. Choices go by valid of the 128 dev problems, sampled at temperature 1 (tempered: at
its own), the first one in a tie. The scripts get no --dev, epochs are fixed, and nothing is chosen on test.

THE ONE SETTING. Responses have about 73 tokens, so log-ratios d of tens of nats are reached soon, and beyond |h| = 5
the logistic loss has little gradient left: scale then acts as a step size. Demonstrators are far better than the
start (0.95 against 0.39), so imitation, scale 1, leaves room enough, and h stays in range longer if lr is small:
5e-5, half of the start's. (The papers go down to 5e-7, but a pass over 256 pairs has 16 steps, in which that would
move nothing.) spin and irft get the same scale and lr. The shift is learned. Continued SFT keeps the start's lr of
1e-4 and makes 48 steps: it is the recipe that worked, and no weak opponent.

ANALYSIS. Intervals are 95 % and paired over problems: mean difference +- 1.96 sd / sqrt(n), n = 383; where there are
three seeds also over seeds, +- 4.30 sd / sqrt(3). The first question is gsil against sft on sampled valid. Two
shares near 0.45 of independent samples differ with sd 0.70 per problem, with a correlation of 0.2 by 0.63. So the
interval's half width is 0.063 to 0.070, and a true difference is found with 80 % probability from 0.09 to 0.10 on
(2.8 sd / sqrt(n)). Hence, beforehand:
    gain             the interval of gsil - sft lies above 0
    loss             it lies below 0
    none             it holds 0, and its upper end is below 0.10: a gain of 0.10 is excluded
    too little data  it holds 0 and 0.10
A gain is called one of the method only if none of extrapolated, beyond-base and tempered reaches gsil: each
interval of gsil minus one of them lies above 0, too; else it is called sharpening. With one seed the intervals know
nothing of other starts and orders: a gain is then one of these weights, to be tried with other seeds. All other
comparisons (spin, irft, B, greedy, accuracy) are secondary, without a correction for their number. The log-ratios
of both sides, means of the last four steps, show whether a run had left the losses' range (irft: of its last chunk,
against that chunk's start). Anything done in another way than written here is listed in RESULTS.md as a deviation.

An arm's outcomes per problem are tests/studies/gsm8k/A-DEMOS/ARM-seedN.json; an arm whose file exists is done.
Weights and training logs are in --out; the same command continues a study that was stopped.
"""

import argparse
import ast
import gc
import json
import math
import re
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch
from transformers import AutoTokenizer

import gsil
import irft

TRAINED = {  # name -> (part of the data, script, settings; the first one is used where only one is tried)
    "sft": ("a", "gsil --loss sft --epochs 3", ["--lr 1e-4", "--lr 5e-5", "--lr 2e-5"]),
    "gsil": ("a", "gsil --loss logistic --epochs 1 --baseline none", None),
    "spin": ("a", "gsil --loss spin --epochs 1 --baseline none", None),
    "irft": ("a", "irft --method irft --chunks 4 --epochs 1 --baseline none", None),
    "sft-b": ("b", "gsil --loss sft --epochs 3", "sft"),
    "gsil-b": ("b", "gsil --loss logistic --epochs 1 --baseline none", "gsil"),
    # About the cost of the others, if --demos is 512. Its own comparison before and after is not counted.
    "rft": (
        "a",
        "irft --method rft --baseline none --reward-steps 32 --reward-lr 2e-5 --policy-batch 16 --policy-steps 6",
        ["--policy-lr 1e-5 --kl 1", "--policy-lr 5e-5 --kl 1", "--policy-lr 1e-5 --kl 0.3"],
    ),
}
PAIR_SETTINGS = ["--scale 1 --lr 5e-5", "--scale 1 --lr 2e-5", "--scale 0.1 --lr 2e-5"]
UNTRAINED = {"extrapolated": (1.5, 2, 3), "beyond-base": (1.2, 1.5, 2), "tempered": (0.3, 0.5, 0.7)}
ARMS = ["sft", "gsil", "extrapolated", "beyond-base", "tempered", "spin", "irft", "sft-b", "gsil-b"]
CONTROLS = list(UNTRAINED)
ENOUGH = 0.10  # a gain that 383 problems show with 80 % probability; see ANALYSIS
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # number of seeds -> 95 % quantile of their mean


def parse_args(argv=None):
    """Parse the flags; the result is not modified afterwards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", help="a folder with GSM8K's train.jsonl and test.jsonl, or openai/gsm8k:main")
    flag("--model", help="the model before the start: a folder or a Hub name")
    flag("--report", action="store_true", help="only print the tables of the JSON files")
    flag("--results", type=Path, help="folder of the JSON files (default: tests/studies/gsm8k/A-DEMOS)")
    flag("--out", type=Path, help="folder of weights and logs (default: runs/gsm8k/A-DEMOS)")
    flag("--a", type=int, default=512, help="rows of A; B has as many")
    flag("--demos", type=int, default=256, help="rows of A, or of B, that an arm is trained on")
    flag("--dev-size", type=int, default=128, help="the last rows of train")
    flag("--settings", type=int, choices=[1, 3], default=1, help="tried on dev for every trained arm")
    flag("--seeds", type=int, nargs="+", default=[0], help="of the start and the arms")
    flag("--arms", nargs="+", choices=[*ARMS, "rft"], default=ARMS, help="beside the start")
    flag("--batch", type=int, default=16, help="demonstrations per optimizer step")
    flag("--max-new-tokens", type=int, default=128, help="longest response, everywhere")
    flag("--micro-batch", type=int, default=512, help="tokens per forward pass")
    flag("--sample-batch", type=int, default=64, help="responses sampled at once")
    flag("--device", default="cpu")
    args = parser.parse_args(argv)
    if not args.report and not (args.data and args.model):
        parser.error("name --data and --model, or ask for the --report")
    name = f"{args.a}-{args.demos}"
    args.results = args.results or ROOT / "tests/studies/gsm8k" / name
    args.out = args.out or Path("runs/gsm8k") / name
    return args


# ---- The endpoint
def number(node):
    """The value of a parsed sum, product or number; anything else is a ValueError."""
    if isinstance(node, ast.Expression):
        return number(node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -number(node.operand) if isinstance(node.op, ast.USub) else number(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = number(node.left), number(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("no arithmetic")


def true_annotation(text):
    """Whether the inside of <<a=b>> is true: "48/2=24" is, "48/2=25", "24=24" and "x*2=4" are not."""
    parts = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|\s", "", text).split("=")
    if len(parts) != 2 or not all(re.fullmatch(r"[\d.+\-*/()]+", part) for part in parts):
        return False
    try:
        left, right = (ast.parse(part, mode="eval") for part in parts)
        operators = [node for node in ast.walk(left) if isinstance(node, ast.BinOp)]
        plain = not any(isinstance(node, ast.BinOp) for node in ast.walk(right))
        # A difference of 0.01 is allowed; the last digits of floating point are not to decide.
        return bool(operators) and plain and abs(number(left) - number(right)) <= 0.01 + 1e-9
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False


def annotations(text):
    """The insides of all annotations; one that never ends is there as "", which is not true."""
    return [re.match(r"([^<>]*)>>|", rest)[1] or "" for rest in text.split("<<")[1:]]


def valid(text):
    """The endpoint: the last line is "#### number", and there are annotations, all of them true."""
    last = text.strip().split("\n")[-1]
    ends = re.fullmatch(r"####\s*\$?-?\$?(\d[\d,]*(\.\d+)?|\.\d+)\.?", last)
    inside = annotations(text)
    return bool(ends) and bool(inside) and all(true_annotation(one) for one in inside)


# ---- Data
def short(row, tokenizer):
    """Whether the answer has at most 90 tokens and at most 3 annotations."""
    tokens = tokenizer.encode(row["answer"], add_special_tokens=False)
    return len(tokens) <= 90 and row["answer"].count("<<") <= 3


def read(data, split):
    """The rows of GSM8K's train or test, from a folder or from the Hub."""
    if Path(data).is_dir():
        text = (Path(data) / f"{split}.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.split("\n") if line]  # a text may hold U+2028
    import datasets

    name, _, subset = data.partition(":")
    return [dict(row) for row in datasets.load_dataset(name, subset or None, split=split)]


def select(train, test, tokenizer, args):
    """{"start", "a", "b", "dev", "one", "test"} -> rows; see DATA."""
    train, test = ([row for row in rows if short(row, tokenizer)] for rows in (train, test))
    if len(train) < 2 * args.a + args.dev_size or args.demos > args.a or not test:
        sys.exit(f"error: {len(train)} problems are too few for A, B and dev, or --demos is above --a")
    a, b, dev = train[: args.a], train[args.a : 2 * args.a], train[-args.dev_size :]
    parts = {"start": a, "a": a[: args.demos], "b": b[: args.demos], "dev": dev, "test": test}
    return parts | {"one": dev[:1]}  # the scripts want something held out


# ---- Training
def train(folder, flags, part, model, seed, args):
    """Run a script unless its folder is finished; returns the folder of the trained model."""
    script, *flags = flags.split()
    script = {"gsil": gsil, "irft": irft}[script]
    if (folder / "args.json").exists():
        flags = ["--resume", str(folder)]
    else:
        data = args.out / "data"
        flags += ["--model", str(model), "--data", f"{data}/{part}.jsonl", "--heldout", f"{data}/one.jsonl"]
        for name in ("batch", "max_new_tokens", "micro_batch", "sample_batch", "device"):
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        flags += ["--seed", str(seed), "--out", str(folder)]
    models = sorted([*folder.glob("round_*[0-9]"), *folder.glob("sft")])
    if not models or len(models) < json.loads((folder / "args.json").read_text()).get("chunks", 1):
        script.main(script.parse_args(flags))
    return max(path for path in [*folder.glob("round_*[0-9]"), *folder.glob("sft")] if path.is_dir())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def looked_at(folder, data):
    """What a run cost, how its log-ratios moved, and what tells its pairs apart."""
    flags = json.loads((folder / "args.json").read_text())
    method, cost, pairs = flags.get("method") or flags["loss"], 0, []
    if method == "sft":
        rows = lines(Path(flags["data"]))
        encoded = [gsil.encode(row, data.tokenizer, data.eos_ids) for row in rows]
        tokens = sum(len(row["prompt_ids"]) + len(row["real_ids"]) for row in encoded)
        cost = 3 * flags["epochs"] * tokens
    for file in sorted(folder.glob("round_*[0-9].jsonl")):
        pairs += lines(file)
    for pair in pairs:
        prompt, sampled = len(pair["prompt_ids"]), len(pair["generated_ids"])
        both = 2 * prompt + len(pair["real_ids"]) + sampled
        cost += prompt + sampled + both  # sampled, and both sides scored
        cost += 3 * flags["epochs"] * both if method != "rft" else 0
    if method == "rft":  # sampled, scored by three models, trained on, at the pairs' mean lengths
        length = fmean(len(pair["prompt_ids"]) + len(pair["generated_ids"]) for pair in pairs)
        cost += 6 * flags["reward_steps"] * flags["batch"] * length
        cost += 7 * flags["policy_steps"] * flags["policy_batch"] * flags["group_size"] * length
    result = {"flags": flags, "cost": round(cost)}
    for name in ("model", "data", "heldout", "out", "resume"):  # folders of one machine
        flags.pop(name, None)
    names = ("d_real", "d_generated", "told_apart")
    steps = {(step["phase"], step["step"]): step for step in lines(folder / "metrics.jsonl")}
    result["steps"] = [
        [round(step[name], 2) for name in names] for step in steps.values() if names[0] in step
    ]
    if pairs:
        for side, ids in (("demonstrations", "real_ids"), ("own", "generated_ids")):
            rows = [pair[ids] for pair in pairs]
            texts = data.tokenizer.batch_decode(rows, skip_special_tokens=True)
            result[side] = {
                "valid": fmean(map(valid, texts)),
                "annotations": fmean(len(annotations(text)) for text in texts),
                "tokens": fmean(map(len, rows)),
                "ended": fmean(row[-1] in data.eos_ids for row in rows),
            }
    return result


def mixed(start, end, factor, options):
    """A model with the weights start + factor * (end - start)."""
    model, origins = gsil.load_model(end, options), gsil.load_model(start, options)
    with torch.no_grad():
        for weight, origin in zip(model.parameters(), origins.parameters()):
            weight.copy_(origin + factor * (weight - origin))
    return model


# ---- Measuring
def bits(values):
    """[True, False] -> "10": compact, and still a line that a person can read."""
    return "".join(str(int(value)) for value in values)


def outcomes(texts, tokens, ended, problems):
    """One entry per problem of each list."""
    return {
        "valid": bits(valid(text) for text in texts),
        "right": bits(gsil.final_answer(text) == row["answer"] for text, row in zip(texts, problems)),
        "annotations": bits(min(9, len(annotations(text))) for text in texts),
        "ended": bits(ended),
        "tokens": tokens,
    }


def asked(model, problems, temperature, seed, data, args):
    """The outcomes of one response per problem, and the first responses."""
    prompts = [row["prompt_ids"] for row in problems]
    options = (data.eos_ids, data.max_new_tokens, temperature, args.sample_batch, f"{seed} study")
    ids = gsil.sample(model, prompts, *options)
    texts = data.tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = [row[-1] in data.eos_ids for row in ids]
    return outcomes(texts, [len(row) for row in ids], ended, problems) | {"texts": texts[:3]}


def measured(model, seed, data, args, temperature=1):
    """What an arm's JSON has of its model: responses and log-likelihoods on all test problems."""
    texts = [(row["prompt_ids"], row["real_ids"]) for row in data.heldout]
    result = {"sampled": asked(model, data.heldout, temperature, seed, data, args)}
    result["greedy"] = asked(model, data.heldout, 0, seed, data, args)
    result["nll"] = [round(-logp, 2) for logp in gsil.score(model, texts, args.micro_batch)]
    return result | {"answer_tokens": [len(response) for _, response in texts]}


def share(text):
    """The share of ones in "0110"."""
    return text.count("1") / len(text)


def choose(settings, make, seed, data, args):
    """(the setting whose model, or model and temperature, is best on dev; {setting: share of valid responses})"""
    if len(settings) == 1:
        return settings[0], {}
    dev = {}
    for setting in settings:
        model, temperature = make(setting)
        dev[setting] = share(asked(model, data.dev, temperature, f"{seed} dev", data, args)["valid"])
        print(f"  dev, {setting}: {dev[setting]:.3f} valid", flush=True)
        del model
    return max(settings, key=dev.get), dev


# ---- The arms
def run_arm(name, seed, data, options, args):
    """Train and measure one arm; returns what its JSON holds."""
    start = end_of("start", None, seed, args)
    if name == "start":
        return looked_at(start.parent, data) | measured(gsil.load_model(start, options), seed, data, args)
    if name in UNTRAINED:
        continued = (
            end_of("sft", setting_of("sft", seed, args), seed, args) if name == "extrapolated" else None
        )

        def make(setting):
            if name == "tempered":
                return gsil.load_model(start, options), setting
            ends = (args.model, start) if name == "beyond-base" else (start, continued)
            return mixed(*ends, setting, options), 1

        setting, dev = choose(UNTRAINED[name], make, seed, data, args)
        before = json.loads(file_of("sft" if name == "extrapolated" else "start", seed, args).read_text())
        result = {"setting": setting, "dev": dev, "cost": before["cost"] if name == "extrapolated" else 0}
        model, temperature = make(setting)
        if name != "tempered":
            return result | measured(model, seed, data, args)
        # Greedy responses and likelihoods are the start's.
        kept = {key: before[key] for key in ("greedy", "nll", "answer_tokens")}
        return result | {"sampled": asked(model, data.heldout, temperature, seed, data, args)} | kept
    settings = TRAINED[name][2]
    if isinstance(settings, str):  # on B: what was chosen on A
        settings = [setting_of(settings, seed, args)]
    settings = (settings or PAIR_SETTINGS)[: args.settings]

    def make(setting):
        return gsil.load_model(end_of(name, setting, seed, args), options), 1

    setting, dev = choose(settings, make, seed, data, args)
    model, _ = make(setting)
    result = {"setting": setting, "dev": dev} | looked_at(folder_of(name, setting, seed, args), data)
    return result | measured(model, seed, data, args)


def file_of(name, seed, args):
    return args.results / f"{name}-seed{seed}.json"


def folder_of(name, setting, seed, args):
    return args.out / f"{name}-seed{seed}{setting.replace(' --', '-').replace(' ', '-')}"


def setting_of(name, seed, args):
    """The setting that a finished arm chose."""
    return json.loads(file_of(name, seed, args).read_text())["setting"]


def end_of(name, setting, seed, args):
    """The folder of an arm's weights, which are trained anew where only the arm's JSON is there."""
    if name == "start":
        flags = "gsil --loss sft --epochs 2 --lr 1e-4"
        return train(args.out / f"start-seed{seed}", flags, "start", args.model, seed, args)
    part, flags, _ = TRAINED[name]
    start = end_of("start", None, seed, args)
    return train(folder_of(name, setting, seed, args), f"{flags} {setting}", part, start, seed, args)


def study(args):
    """Every arm of every seed that is not finished, and the tables after each."""
    gc.freeze()  # the libraries' objects, which every load_model would look through for garbage
    options = gsil.parse_args(["--device", args.device, "--out", str(args.out / "unused")])
    tokenizer = gsil.load(AutoTokenizer, args.model, "tokenizer")
    parts = select(read(args.data, "train"), read(args.data, "test"), tokenizer, args)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        gsil.write(args.out / f"data/{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(args.model), "--max-new-tokens", str(args.max_new_tokens)]
    for name, part in (("data", "start"), ("dev", "dev"), ("heldout", "test")):
        flags += [f"--{name}", str(args.out / f"data/{part}.jsonl")]
    data = gsil.read_data(gsil.parse_args([*flags, "--out", str(args.out / "unused")]))
    if [len(data.demos), len(data.dev), len(data.heldout)] != [
        len(parts[p]) for p in ("start", "dev", "test")
    ]:
        sys.exit("error: the script left rows of the data out")
    demonstrators = file_of("demonstrators", 0, args)
    if not demonstrators.exists():
        texts, tokens = (
            [row["answer"] for row in parts["test"]],
            [len(row["real_ids"]) for row in data.heldout],
        )
        made = outcomes(texts, tokens, [True] * len(texts), data.heldout)
        save(demonstrators, {"arm": "demonstrators", "seed": 0, "sampled": made, "greedy": made, "cost": 0})
    of_study = {name: getattr(args, name) for name in ("a", "demos", "batch", "max_new_tokens", "settings")}
    for seed in args.seeds:
        for name in ["start", *args.arms]:
            file, began = file_of(name, seed, args), time.time()
            if file.exists():
                continue
            print(f"\n==== {name}, seed {seed}, {time.strftime('%H:%M')}", flush=True)
            found = run_arm(name, seed, data, options, args)
            save(
                file, {"arm": name, "seed": seed, "study": of_study, **found, "seconds": time.time() - began}
            )
            print(f"==== {name}: {(time.time() - began) / 60:.0f} minutes, {file}", flush=True)
            report(args)


def save(file, found):
    """Write an arm's JSON: one line per entry, so that a change shows in a diff."""
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    gsil.write(file, "{" + ",\n ".join(entries) + "}\n")


# ---- The tables
def values(run, mode, name):
    """The outcomes per problem as numbers: values(run, "sampled", "valid") -> [0, 1, ...]."""
    return [int(value) for value in run[mode][name]]


def interval(differences):
    """(mean, half width of its 95 % interval over problems)"""
    return fmean(differences), 1.96 * stdev(differences) / math.sqrt(len(differences))


def paired(runs, name, other, mode="sampled", measure="valid"):
    """(mean, half width over problems, half width over seeds or None) of arm name - arm other.
    Of several seeds, a problem's difference is its mean over the seeds that both arms have."""
    seeds = sorted({*runs[name]} & {*runs[other]})
    pairs = [[values(runs[arm][seed], mode, measure) for arm in (name, other)] for seed in seeds]
    by_seed = [[x - y for x, y in zip(*pair)] for pair in pairs]
    mean, half = interval([fmean(problem) for problem in zip(*by_seed)])
    means = [fmean(differences) for differences in by_seed]
    if len(seeds) not in STUDENT:
        return mean, half, None
    return mean, half, STUDENT[len(seeds)] * stdev(means) / math.sqrt(len(seeds))


def verdict(runs):
    """What the plan says beforehand about gsil against sft, in a sentence."""
    mean, half, _ = paired(runs, "gsil", "sft")
    low, high = mean - half, mean + half
    if high < 0:
        return "loss: GSIL is below continued SFT"
    if low <= 0:
        excluded = high < ENOUGH
        return "none: a gain of 0.10 is excluded" if excluded else "too little data to tell"
    rivals = {name: paired(runs, "gsil", name) for name in CONTROLS if name in runs}
    reached = [name for name, (mean, half, _) in rivals.items() if mean - half <= 0]
    if reached:
        return f"gain over continued SFT, but sharpening: {', '.join(reached)} reach GSIL"
    return "gain" + ("" if len(rivals) == len(CONTROLS) else ", before all of the controls have run")


def cell(runs, mode, name):
    """A share with its interval over problems, as mean ± half width."""
    per_problem = [fmean(one) for one in zip(*(values(run, mode, name) for run in runs.values()))]
    return "{:.3f} ± {:.3f}".format(*interval(per_problem))


def report(args):
    """Print the tables, from the JSON files alone."""
    runs = {}
    for name in ["demonstrators", "start", *ARMS, "rft"]:
        for file in sorted(args.results.glob(f"{name}-seed*.json")):
            run = json.loads(file.read_text("utf-8"))
            runs.setdefault(name, {})[run["seed"]] = run
    if not runs:
        sys.exit(f"error: {args.results} has no JSON files of arms")
    titles = ["valid, sampled", "valid, greedy", "right, sampled", "right, greedy", "NLL", "annotations"]
    titles += ["tokens", "ended", "d+", "d-", "told apart", "Mtokens", "seeds", "setting"]
    print(f"\n|  | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
    for name, of_seeds in runs.items():
        some = list(of_seeds.values())
        cells = [cell(of_seeds, mode, of) for of in ("valid", "right") for mode in ("sampled", "greedy")]
        nll = [sum(run["nll"]) / sum(run["answer_tokens"]) for run in some if "nll" in run]
        cells += [f"{fmean(nll):.3f}" if nll else "-"]
        for of in ("annotations", "tokens", "ended"):
            cells += [f"{fmean(fmean(values(run, 'sampled', of)) for run in some):.2f}"]
        last = [fmean(one) for run in some if run.get("steps") for one in zip(*run["steps"][-4:])]
        if last:  # the means of the last four steps, of each seed
            cells += [f"{fmean(last[n::3]):.2f}" for n in range(3)]
        else:
            cells += ["-"] * 3
        settings = dict.fromkeys(str(run["setting"]) for run in some if "setting" in run)
        cells += [
            f"{fmean(run['cost'] for run in some) / 1e6:.2f}",
            str(len(some)),
            ", ".join(settings) or "-",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for other in ("sft", "start", "sft-b"):
        if other not in runs:
            continue
        print(f"\nPaired differences to {other}, ± over problems (and over seeds)\n")
        print(f"|  | valid, sampled | valid, greedy | right, sampled | right, greedy |\n|{'---|' * 5}")
        names = (
            ["start", "gsil-b"] if other == "sft-b" else [name for name in runs if name != "demonstrators"]
        )
        for name in names:
            if name == other or name not in runs:
                continue
            cells = []
            for measure in ("valid", "right"):
                for mode in ("sampled", "greedy"):
                    mean, half, of_seeds = paired(runs, name, other, mode, measure)
                    seeds = "" if of_seeds is None else f" (± {of_seeds:.3f})"
                    cells.append(f"{mean:+.3f} ± {half:.3f}{seeds}")
            print(f"| {name} | {' | '.join(cells)} |")
    if {"gsil", "sft"} <= {*runs}:
        print(f"\nGSIL against continued SFT, sampled valid: {verdict(runs)}.")


if __name__ == "__main__":
    arguments = parse_args()
    report(arguments) if arguments.report else study(arguments)
