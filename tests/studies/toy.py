"""All measurements on the toy: runs gsil.py and irft.py with three seeds, and prints the tables of RESULTS.md.

    python tests/studies/toy.py main                                    # README's main table
    python tests/studies/toy.py main again few habit anew               # more tables, see TABLES; `all` makes all
    python tests/studies/toy.py habit --report --figure shares.png      # the figure needs `pip install matplotlib`
    python tests/studies/toy.py main --report --out tests/studies/toy   # prints from the files alone, runs nothing

Every run is one command of gsil.py or irft.py (RUNS), once per seed, in this process and on the CPU. What it
answered is kept in a small file, --out/NAME-SEED.json, from which tables are computed: for each held-out problem
whether the greedy and the sampled response is right, and whether the sampled one shows its working (HABIT). The
same command continues a study that was stopped, and tables share runs. Two processes with other --seeds may work at
the same time, but not while `anew` makes its base. --out/runs holds models and logs, and may be deleted when all is
done. After a change of the scripts delete --out. OMP_NUM_THREADS sets the threads; one is best on a busy machine.

Intervals. Each problem's outcome is averaged over the seeds. Over problems an interval is 1.96 sd / sqrt(problems),
over seeds t sd / sqrt(seeds), with t = 4.30 for three. A cell shows the larger of the two. A difference, which is
paired by problem and by seed, shows both, and counts only if it exceeds both.

Budgets. Rows have the scripts' defaults, with these exceptions. GSIL, SPIN and each chunk of IRFT make 2 epochs and
SFT makes 6, of which the script keeps the one with most greedy answers right on the 500 dev problems. RFT has 64
steps of its reward and 24 of its policy, and chooses nothing. "SFT extrapolated" is start + factor (SFT - start):
SFT is trained for 1, 2, ... 6 epochs, each with its own schedule and without dev, and of those and all FACTORS the
study takes the pair with most sampled answers right on dev. "SFT, filtered" learns from the demonstrations that show
their working. Its greedy answers are all right early, so the choice on dev hardly sees the sampled ones, and a
second row has the last of 6 epochs. Scale 0.3 and kl 0.1 were chosen on the toy when the scripts were written.
With few demonstrations dev is its first 100 problems, and the epochs are in RUNS.

Tokens are millions of tokens through models: 1 for each token that is read, sampled or scored, 3 for one that is
trained on. Dev and held-out problems are not counted; nor is what was trained or tried but not chosen. Seconds are a
median over seeds, of training and its samples.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, median, stdev

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]

import make_toy
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import gsil
import irft

HABIT = "="  # a response that shows its working has this in it
EPOCHS = range(1, 7)  # of SFT, before it is extrapolated
FACTORS = (1, 1.5, 2, 2.5, 3, 4)
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # number of seeds -> of the t distribution, two-sided 95 %

# ---- The runs: name -> command. {toy} is tests/toy, {out} is --out, {new} is the toy of another seed.
OWN = (
    "--dev {toy}/dev.jsonl --heldout {toy}/heldout.jsonl --habit ="  # beside a --data that is not the default
)
NEW = "--model {new}/base --dev {new}/dev.jsonl --heldout {new}/heldout.jsonl --habit ="
NONE = "--baseline none"
START = "--model {out}/runs/gsil-{seed}/sft"  # the papers' setting: SFT comes first
RUNS = {
    "gsil": "gsil",
    "hinge": f"gsil --loss hinge {NONE}",
    "spin": f"gsil --loss spin {NONE}",
    "rft": f"irft {NONE}",
    "filtered": f"gsil --loss sft --data {{out}}/data/filtered.jsonl {OWN}",
    "filtered-last": (
        "gsil --loss sft --epochs 6 --data {out}/data/filtered.jsonl --heldout {toy}/heldout.jsonl --habit ="
    ),
    "again": f"gsil {START}",
    "again-scale-1": f"gsil --scale 1 {START} {NONE}",
    "again-spin": f"gsil --loss spin {START} {NONE}",
    "again-irft": f"irft --method irft --chunks 4 {START} {NONE}",
    "again-rft": f"irft {START} {NONE}",
    "new-gsil": f"gsil --data {{new}}/demos.jsonl {NEW}",
    "new-filtered": f"gsil --loss sft --data {{out}}/data/new-filtered.jsonl {NEW}",
    "new-rft": f"irft --data {{new}}/demos.jsonl {NEW} {NONE}",
    "rft-kl-1": f"irft --rounds 3 --kl 1 {NONE}",
    "spin-rounds-0.6": f"gsil --loss spin --scale 0.6 --rounds 4 {NONE}",
    "spin-rounds-0.3": f"gsil --loss spin --rounds 4 {NONE}",
}
for n in EPOCHS:  # a --data that is named leaves dev out, so that the last epoch is kept
    sft = f"gsil --loss sft --epochs {n}"
    RUNS[f"sft-{n}"] = f"{sft} --data {{toy}}/demos.jsonl --heldout {{toy}}/heldout.jsonl --habit ="
    new = "--model {new}/base --data {new}/demos.jsonl --heldout {new}/heldout.jsonl --habit ="
    RUNS[f"new-sft-{n}"] = f"{sft} {new}"
for scale in ("1", "0.7", "0.5", "0.2"):
    RUNS[f"gsil-{scale}"] = f"gsil --scale {scale} {NONE}"
for scale in ("1", "0.5"):
    RUNS[f"spin-{scale}"] = f"gsil --loss spin --scale {scale} {NONE}"
for kl in ("1", "0.5", "0.3"):  # so that the reward comes close to its optimum
    RUNS[f"rft-{kl}"] = f"irft --kl {kl} --reward-steps 256 --reward-penalty 0 {NONE}"
# number of demonstrations -> epochs of GSIL and SFT for 96 steps, and for as many tokens as RFT takes.
# The script makes 3 times as many epochs of SFT as --epochs says.
FEW = {64: {"gsil": 48, "sft": 16, "gsil-more": 168, "sft-more": 104}}
FEW[256] = {"gsil": 12, "sft": 4, "gsil-more": 42, "sft-more": 26}
for n, epochs in FEW.items():
    few = f"--data {{out}}/data/first-{n}.jsonl --dev {{out}}/data/dev-100.jsonl"
    few += f" --heldout {{toy}}/heldout.jsonl --habit = {NONE}"
    for more in ("", "-more"):
        RUNS[f"few-{n}-gsil{more}"] = f"gsil --epochs {epochs['gsil' + more]} {few}"
        RUNS[f"few-{n}-sft{more}"] = f"gsil --loss sft --epochs {epochs['sft' + more]} {few}"
    RUNS[f"few-{n}-rft"] = f"irft {few}"


def command(name, seed, args, shown=False):
    """The words of a run's command: as it is run, or as a person would type it."""
    out = Path("runs/toy-study") if shown else args.out
    small = args.slice and not shown
    folders = {"out": out, "toy": out / "data/slice" if small else "tests/toy", "new": out / "data/new"}
    words = shlex.split(RUNS[name].format(seed=seed, **folders))
    if shown:
        return shlex.join(["python", f"{words[0]}.py", *words[1:], "--seed", str(seed)])
    if args.slice and "--data" not in words:
        words += shlex.split(f"--data {{toy}}/demos.jsonl {OWN}".format(**folders))
    if args.slice and words[0] == "irft" and "--method" not in words:
        words += ["--policy-steps", "2", "--reward-steps", "2"]
    return words


# ---- Running and measuring
def write_rows(path, rows):
    if not path.exists():  # else another process may be reading it
        path.parent.mkdir(parents=True, exist_ok=True)
        gsil.write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def prepare(names, args):
    """Write the data that the runs need and that is not in tests/toy."""
    out, toy = args.out / "data", ROOT / "tests/toy"
    if args.slice:
        for part in ("demos", "dev", "heldout"):
            write_rows(out / f"slice/{part}.jsonl", read_rows(toy / f"{part}.jsonl")[: args.slice])
        toy = out / "slice"
    demos = read_rows(toy / "demos.jsonl")
    write_rows(out / "filtered.jsonl", [row for row in demos if HABIT in row["answer"]])
    write_rows(out / "dev-100.jsonl", read_rows(toy / "dev.jsonl")[:100])
    for n in FEW:
        write_rows(out / f"first-{n}.jsonl", demos[:n])
    new = out / "new"
    if any(name.startswith("new-") for name in names) and not new.exists():
        say("making base and demonstrations anew, 6 to 10 minutes of one core")
        partial = out / "new.partial"
        flags = ["--seed", "1", "--out", str(partial)] + (["--data-only"] if args.slice else [])
        with contextlib.redirect_stdout(sys.stderr):
            make_toy.main(make_toy.parse_args(flags))
        if args.slice:
            shutil.copytree(ROOT / "tests/toy/base", partial / "base", dirs_exist_ok=True)
            for part in ("demos", "dev", "heldout"):
                lines = (partial / f"{part}.jsonl").read_text().splitlines(keepends=True)
                (partial / f"{part}.jsonl").write_text("".join(lines[: args.slice]))
        os.replace(partial, new)
    if new.exists():
        demos = [row for row in read_rows(new / "demos.jsonl") if HABIT in row["answer"]]
        write_rows(out / "new-filtered.jsonl", demos)


def say(text):
    print(text, file=sys.stderr, flush=True)


def to_hex(outcomes):
    """[True, False, True, True, False] -> "5 16": the number of outcomes, and they as bits."""
    bits = "".join("1" if outcome else "0" for outcome in outcomes)
    return f"{len(bits)} {int(bits, 2):x}"


def from_hex(text):
    """The outcomes that to_hex wrote, as 0 and 1."""
    length, digits = text.split()
    return [int(bit) for bit in f"{int(digits, 16):0{length}b}"]


def steps_of(prompt):
    """The number of steps of a problem: every sentence ends in a full stop, and the first is no step."""
    return prompt.count(" . ") - 1


def look(model, data, args):
    """What a model answers to the held-out problems, with the scripts' own samples."""
    row = {}
    for name, temperature in (("greedy", 0), ("sampled", 1)):
        _, responses = gsil.accuracy(model, data.heldout, temperature, data, args)
        texts = data.tokenizer.batch_decode(responses, skip_special_tokens=True)
        answers = [gsil.final_answer(text) for text in texts]
        row[name] = to_hex([answer == problem["answer"] for answer, problem in zip(answers, data.heldout)])
    row["habit"] = to_hex([HABIT in text for text in texts])  # of the sampled responses
    texts = [(problem["prompt_ids"], problem["real_ids"]) for problem in data.heldout]
    row["nll"] = -sum(gsil.score(model, texts, args.micro_batch)) / sum(len(y) for _, y in texts)
    return row


def shares(pairs, tokenizer):
    """A round's pairs -> {number of steps: [pairs, own responses with the habit, demonstrations with it]}."""
    kinds = {}
    for pair in pairs:
        kind = kinds.setdefault(str(steps_of(pair["prompt"])), [0, 0, 0])
        kind[0] += 1
        kind[1] += HABIT in pair["generated"]
        kind[2] += HABIT in tokenizer.decode(pair["real_ids"])
    return kinds


def tokens_of(folder, stage, data, args):
    """Tokens through models in a stage of a run, see above, from what is in its folder."""

    def count(rows, *sides):
        return sum(len(row["prompt_ids"]) + len(row[side]) for row in rows for side in sides)

    phases = {}  # of a resumed run the last record of a step counts
    for record in read_rows(folder / "metrics.jsonl"):
        phases.setdefault(record["phase"], {})[record["step"]] = record
    if stage == "sft":
        epochs = len(phases["sft"]) / math.ceil(len(data.demos) / args.batch)
        return 3 * epochs * count(data.demos, "real_ids")
    pairs = read_rows(folder / f"{stage.replace(' ', '_')}.jsonl")
    both = count(pairs, "real_ids", "generated_ids")
    tokens = count(pairs, "generated_ids") + both  # sampled, then scored
    if stage in phases:
        return tokens + 3 * both * len(phases[stage]) / math.ceil(len(pairs) / args.batch)
    tokens += 3 * both * len(phases[f"{stage} reward"]) * min(args.batch, len(pairs)) / len(pairs)
    prompt = fmean(len(demo["prompt_ids"]) for demo in data.demos)
    samples = min(args.policy_batch, len(data.demos)) * args.group_size
    for record in phases[f"{stage} policy"].values():
        # A sample is drawn, read by policy, reference and reward model, and trained on.
        tokens += samples * (prompt + record["length"]) * (1 + 3 + 3)
    return tokens


def begin(words, folder, seed):
    """The module and the flags of a run, which is new or continued."""
    module = {"gsil": gsil, "irft": irft}[words[0]]
    if (folder / "args.json").exists():
        return module, module.parse_args(["--resume", str(folder)])
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--seed", str(seed), "--out", str(folder), "--device", "cpu"]
    return module, module.parse_args(words[1:] + flags)


def run(name, seed, args):
    """Run a command, unless that was done before, and write what its models answer to NAME-SEED.json."""
    file, folder = args.out / f"{name}-{seed}.json", args.out / "runs" / f"{name}-{seed}"
    if file.exists():
        return
    say(f"{name}, seed {seed}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("extrapolated"):
        found = extrapolate(name.removesuffix("extrapolated"), seed, args)
    else:
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log):
            module, flags = begin(command(name, seed, args), folder, seed)
            table = module.main(flags)
            data = module.read_data(flags)
            found = {"command": command(name, seed, args, shown=True), "stages": {}}
            for stage, printed in table.items():
                # The base is the same in every run; demos are no model.
                if stage == "demos" or (stage == "base" and not name.endswith("gsil")):
                    continue
                place = flags.model if stage == "base" else folder / stage.replace(" ", "_")
                row = look(gsil.load_model(place, flags), data, flags)
                for key in ("greedy", "sampled", "habit"):
                    if printed[key] is not None and fmean(from_hex(row[key])) != printed[key]:
                        sys.exit(f"error: {folder}: {stage} now answers otherwise than in summary.json")
                row |= {key: printed[key] for key in ("dev", "seconds", "length", "ended")}
                if stage != "base":
                    row["tokens"] = round(tokens_of(folder, stage, data, flags))
                if stage.startswith("round"):
                    pairs = read_rows(folder / f"{stage.replace(' ', '_')}.jsonl")
                    row["shares"] = shares(pairs, data.tokenizer)
                found["stages"][stage] = row
    found["problems"] = found.get("problems") or dict(
        Counter(str(steps_of(problem["prompt"])) for problem in data.heldout)
    )
    gsil.write(file, json.dumps(found) + "\n")


def lengthened(start, folder, factor, args):
    """start + factor (SFT - start), weight by weight; folder holds SFT's model."""
    model = gsil.load_model(folder, args)
    with torch.no_grad():
        for weight, origin in zip(model.parameters(), start.parameters()):
            weight.copy_(origin + factor * (weight - origin))
    return model


def extrapolate(prefix, seed, args):
    """Choose SFT's epochs and the factor by sampled accuracy on dev; the result is like that of a run."""
    for n in EPOCHS:
        run(f"{prefix}sft-{n}", seed, args)
    runs = args.out / "runs"
    with open(runs / f"{prefix}extrapolated-{seed}.log", "a") as log, contextlib.redirect_stdout(log):
        words = command(f"{prefix}gsil", seed, args)
        _, flags = begin(words, runs / f"{prefix}extrapolated-{seed}", seed)
        data = gsil.read_data(flags)
        start, dev = gsil.load_model(flags.model, flags), {}
        for n in EPOCHS:
            for factor in FACTORS:
                model = lengthened(start, runs / f"{prefix}sft-{n}-{seed}" / "sft", factor, flags)
                dev[n, factor], _ = gsil.accuracy(model, data.dev, 1, data, flags)
                print(f"{n} epochs, factor {factor}: {dev[n, factor]:.1%} of dev sampled right", flush=True)
        n, factor = max(dev, key=dev.get)  # of equal ones the first
        chosen = read(f"{prefix}sft-{n}", seed, args)
        row = look(lengthened(start, runs / f"{prefix}sft-{n}-{seed}" / "sft", factor, flags), data, flags)
    row |= {key: chosen["stages"]["sft"][key] for key in ("tokens", "seconds")}
    row |= {"dev": dev[n, factor], "epochs": n, "factor": factor}
    tried = {f"{epochs} x {factor}": share for (epochs, factor), share in dev.items()}
    found = {"command": f"{chosen['command']}, then base + {factor} (sft - base)"}
    return found | {"stages": {"extrapolated": row}, "problems": chosen["problems"], "dev": tried}


# ---- From files to numbers
def read(name, seed, args):
    """What a run's file holds, or None."""
    file = args.out / f"{name}-{seed}.json"
    return json.loads(file.read_text()) if file.exists() else None


def read_stage(name, stage, args):
    """{seed: the row of that stage} of the seeds that were run. Rounds have the cost of those before them, too."""
    rows = {}
    for seed in args.seeds:
        found = read(name, seed, args)
        if found:
            row, before = dict(found["stages"][stage]), []
            if stage.startswith("round"):
                before = [found["stages"][f"round {t}"] for t in range(1, int(stage.split()[1]))]
            for key in ("tokens", "seconds"):  # of a run that was stopped some seconds are not known
                values = [other.get(key) for other in (row, *before)]
                row[key] = None if None in values else sum(values)
            rows[seed] = row | {"problems": found["problems"]}
    return rows


def intervals(outcomes):
    """Outcomes of each seed, [[number of each problem]] -> mean, half intervals over problems and over seeds."""
    problems = [fmean(values) for values in zip(*outcomes)]
    over_problems = 1.96 * stdev(problems) / math.sqrt(len(problems))
    over_seeds = math.nan
    if len(outcomes) in T_QUANTILE:
        means = [fmean(values) for values in outcomes]
        over_seeds = T_QUANTILE[len(outcomes)] * stdev(means) / math.sqrt(len(outcomes))
    return fmean(problems), over_problems, over_seeds


def verdict(mean, over_problems, over_seeds):
    """A difference counts only if it exceeds both intervals."""
    if math.isnan(over_seeds):
        return "one seed"
    return "counts" if abs(mean) > max(over_problems, over_seeds) else "does not count"


def tilted(own, theirs, scale, rounds=1):
    """Share of a habit after exact rounds: log-odds theirs + (1 - 1/scale)^rounds (own - theirs)."""
    if not (0 < own < 1 and 0 < theirs < 1):
        return math.nan
    own, theirs = math.log(own / (1 - own)), math.log(theirs / (1 - theirs))
    log_odds = theirs + (1 - 1 / scale) ** rounds * (own - theirs)
    return 1 / (1 + math.exp(-max(-500, min(500, log_odds))))


def pooled(kinds, problems, scale):
    """As the scripts print it: one share of the model, one of the demonstrators."""
    n, own, theirs = (sum(values) for values in zip(*kinds.values()))
    return tilted(own / n, theirs / n, scale)


def per_steps(kinds, problems, scale, rounds=1):
    """The closed form for each number of steps, then the mean over the held-out problems."""
    values = {kind: tilted(own / n, theirs / n, scale, rounds) for kind, (n, own, theirs) in kinds.items()}
    return sum(count * values[kind] for kind, count in problems.items()) / sum(problems.values())


def one_shift(kinds, problems, scale):
    """The optimum of GSIL's logistic loss if one shift serves all prompts: no closed form, found by L-BFGS.

    A response with the habit or without it is all there is, so for each number of steps the policy is one share s,
    and h = scale log(s / own) + shift with the habit, scale log((1 - s) / (1 - own)) + shift without."""
    counts = torch.tensor([kinds[kind] for kind in kinds], dtype=torch.float64)  # (K, 3)
    weights, own, theirs = counts[:, 0] / counts[:, 0].sum(), *(counts[:, 1:] / counts[:, :1]).T
    if not ((own > 0) & (own < 1) & (theirs > 0) & (theirs < 1)).all():
        return math.nan
    own, theirs = torch.stack([own, 1 - own]), torch.stack([theirs, 1 - theirs])  # (2, K)
    start = (own * (theirs / own) ** (1 / scale)).log()
    log_odds = (start[0] - start[1]).clone().requires_grad_()  # (K,): the closed form
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 1000, "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([log_odds, shift], line_search_fn="strong_wolfe", **settings)

    def loss():
        optimizer.zero_grad()
        log_policy = F.logsigmoid(torch.stack([log_odds, -log_odds]))  # (2, K)
        h = scale * (log_policy - own.log()) + shift
        value = (weights * (theirs * F.softplus(-h) + own * F.softplus(h)).sum(0)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    values = dict(zip(kinds, log_odds.sigmoid().tolist()))
    return sum(count * values[kind] for kind, count in problems.items()) / sum(problems.values())


# ---- Printing
def print_table(columns, rows):
    print()
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def cell(outcomes):
    """[[outcomes of a seed]] -> '0.963 ± 0.017', with the larger of the two intervals."""
    mean, over_problems, over_seeds = intervals(outcomes)
    half = over_problems if math.isnan(over_seeds) else max(over_problems, over_seeds)
    return f"{mean:.3f} ± {half:.3f}"


def number(value, digits):
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


COLUMNS = ["", "greedy", "sampled", "shows working", "right if worked", "NLL", "tokens", "seconds"]


def model_cells(rows):
    """Cells of one model; rows: those of read_stage."""
    bits = {key: [from_hex(row[key]) for row in rows] for key in ("greedy", "sampled", "habit")}
    cells = [cell(bits[key]) for key in bits]
    worked = sum(map(sum, bits["habit"]))
    both = sum(r * h for right, habit in zip(bits["sampled"], bits["habit"]) for r, h in zip(right, habit))
    cells.append(number(both / worked if worked else None, 3))
    cells.append(number(fmean(row["nll"] for row in rows), 4))
    costs = {}
    for key in ("tokens", "seconds"):
        known = [row[key] for row in rows if row.get(key) is not None]
        costs[key] = median(known) if known else None
    return [*cells, number(costs["tokens"] and costs["tokens"] / 1e6, 1), number(costs["seconds"], 0)]


def print_models(table, args):
    """The table of models, and how each was made. table: (name, run, stage)."""
    rows, commands = [], []
    for name, source, stage in table:
        found = read_stage(source, stage, args)
        if found:
            cells = model_cells([*found.values()])
            seeds = "" if len(found) == len(args.seeds) else f" ({len(found)} of {len(args.seeds)} seeds)"
            rows.append([name + seeds, *cells])
            commands.append(f"{name} `{read(source, min(found), args)['command']}`")
    print_table(COLUMNS, rows)
    print("\nCommands of the first seed: " + "; ".join(commands) + ".")
    for name, source, stage in table:
        if stage == "extrapolated" and read_stage(source, stage, args):
            chosen = [
                f"{row['epochs']} x {row['factor']}" for row in read_stage(source, stage, args).values()
            ]
            print(f"\n{name}: chosen on dev, epochs x factor, by seed: {', '.join(chosen)}.")


def print_differences(table, pairs, args):
    """Paired differences of rows of a table of models. pairs: (name, name minus which this is)."""
    places, rows = {name: (source, stage) for name, source, stage in table}, []
    for name, other in pairs:
        one, two = read_stage(*places[name], args), read_stage(*places[other], args)
        seeds = [seed for seed in one if seed in two]
        for key in ("sampled", "greedy") if seeds else ():
            outcomes = []
            for seed in seeds:
                sides = zip(from_hex(one[seed][key]), from_hex(two[seed][key]))
                outcomes.append([right - left for right, left in sides])
            mean, *halves = intervals(outcomes)
            numbers = [f"{mean:+.3f}", *(number(half, 3) for half in halves)]
            rows.append([f"{name} - {other}", key, *numbers, verdict(mean, *halves)])
    print_table(["paired difference", "answers", "mean", "± problems", "± seeds", ""], rows)


# ---- The tables
def rows_of(prefix):
    """The rows of the main table; prefix "new-": base and demonstrations are made anew."""
    rows = [("base", f"{prefix}gsil", "base"), ("SFT", f"{prefix}gsil", "sft")]
    rows += [("SFT, filtered", f"{prefix}filtered", "sft")]
    rows += [] if prefix else [("SFT, filtered, last epoch", "filtered-last", "sft")]
    rows += [("SFT extrapolated", f"{prefix}extrapolated", "extrapolated")]
    rows += [] if prefix else [("SPIN", "spin", "round 1")]
    rows += [("GSIL logistic", f"{prefix}gsil", "round 1")]
    rows += [] if prefix else [("GSIL hinge", "hinge", "round 1")]
    return [*rows, ("RFT", f"{prefix}rft", "round 1")]


def print_main(args, prefix=""):
    rows = rows_of(prefix)
    print_models(rows, args)
    others = ("SFT", "SFT extrapolated", "SFT, filtered")
    pairs = [("GSIL logistic", other) for other in others] + [("RFT", "GSIL logistic")]
    if not prefix:
        pairs += [("GSIL logistic", "SFT, filtered, last epoch"), ("RFT", "SFT extrapolated")]
        pairs += [("GSIL hinge", "GSIL logistic")]
    print_differences(rows, pairs, args)


def print_anew(args):
    print_main(args, "new-")


AGAIN = [("start: SFT", "gsil", "sft"), ("SFT continued", "again", "sft")]
AGAIN += [("GSIL 0.3", "again", "round 1"), ("GSIL 1", "again-scale-1", "round 1")]
AGAIN += [("SPIN", "again-spin", "round 1"), ("IRFT, T = 4", "again-irft", "round 4")]
AGAIN += [("RFT", "again-rft", "round 1")]


def print_again(args):
    print_models(AGAIN, args)
    print_differences(AGAIN, [(name, "start: SFT") for name, _, _ in AGAIN[1:]], args)


def rows_of_few(n):
    rows = [(f"{n}: SFT, 96 steps", f"few-{n}-sft", "sft")]
    rows += [(f"{n}: GSIL, 96 steps", f"few-{n}-gsil", "round 1")]
    rows += [(f"{n}: SFT, tokens as RFT", f"few-{n}-sft-more", "sft")]
    rows += [(f"{n}: GSIL, tokens as RFT", f"few-{n}-gsil-more", "round 1")]
    return [*rows, (f"{n}: RFT", f"few-{n}-rft", "round 1")]


def print_few(args):
    rows, pairs = [row for n in FEW for row in rows_of_few(n)], []
    print_models(rows, args)
    for n in FEW:
        sft, gsil_, sft_more, gsil_more, rft = (name for name, _, _ in rows_of_few(n))
        pairs += [(gsil_, sft), (gsil_more, sft_more), (rft, gsil_more), (rft, sft_more)]
    print_differences(rows, pairs, args)


# (name, run, stage, scale or kl)
HABITS = [("SFT", "gsil", "sft", 1)]
HABITS += [("GSIL logistic", "gsil" if scale == "0.3" else f"gsil-{scale}", "round 1", float(scale))
           for scale in ("1", "0.7", "0.5", "0.3", "0.2")]  # fmt: skip
HABITS += [
    ("SPIN", name, "round 1", scale) for name, scale in (("spin-1", 1), ("spin-0.5", 0.5), ("spin", 0.3))
]
RFT_HABITS = [
    ("RFT, 256 reward steps, no penalty", f"rft-{kl}", "round 1", float(kl)) for kl in ("1", "0.5", "0.3")
]
RFT_HABITS += [("RFT", "rft", "round 1", 0.1)]


def predictions(row, name, source, scale, args):
    """[pooled, per number of steps, with one shift] of one seed; None where a formula does not apply."""
    kinds = row["shares"]
    shift = one_shift(kinds, row["problems"], scale) if name == "GSIL logistic" else None
    return [pooled(kinds, row["problems"], scale), per_steps(kinds, row["problems"], scale), shift]


def habit_rows(args):
    """[(name, scale, the predictions' means over seeds, outcomes)] of the runs that there are."""
    rows = []
    for name, source, stage, scale in HABITS + RFT_HABITS:
        found = read_stage(source, stage, args)
        if stage == "sft":  # the shares are those of the round beside it
            found = {seed: read_stage(source, "round 1", args)[seed] | row for seed, row in found.items()}
        if found:
            formulas = zip(*(predictions(row, name, source, scale, args) for row in found.values()))
            means = [None if None in values else fmean(values) for values in formulas]
            rows.append((name, scale, means, [from_hex(row["habit"]) for row in found.values()]))
    return rows


def print_habit(args):
    rows = habit_rows(args)
    cells = [
        [name, f"{scale:g}", *(number(p, 3) for p in means), cell(outcomes)]
        for name, scale, means, outcomes in rows
    ]
    print_table(["", "scale or kl", "pooled", "per number of steps", "with one shift", "measured"], cells)
    if args.figure:
        draw(rows, read_stage("gsil", "round 1", args), args)


def draw(rows, start, args):
    """The figure: share of working over the scale, a line for each formula and a dot for each run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    scales = [1 / (1 + i / 20) for i in range(81)]  # 1 to 0.2
    formulas = {"pooled": pooled, "per number of steps": per_steps, "with one shift (GSIL)": one_shift}
    kinds = {}  # of all seeds together
    for row in start.values():
        for kind, counts in row["shares"].items():
            kinds[kind] = [a + b for a, b in zip(kinds.get(kind, (0, 0, 0)), counts)]
    for style, (name, formula) in zip(("--", "-", ":"), formulas.items()):
        values = [formula(kinds, row["problems"], scale) for scale in scales]
        axes.plot([1 / scale for scale in scales], values, style, color="gray", label=f"predicted, {name}")
    for name, marker, color in (("SFT", "s", "C2"), ("GSIL logistic", "o", "C0"), ("SPIN", "^", "C1"),
                                ("RFT, 256 reward steps, no penalty", "D", "C3")):  # fmt: skip
        points = [(1 / scale, *intervals(outcomes)) for label, scale, _, outcomes in rows if label == name]
        if points:
            x, y, over_problems, over_seeds = zip(*points)
            halves = [max(a, 0 if math.isnan(b) else b) for a, b in zip(over_problems, over_seeds)]
            axes.errorbar(x, y, halves, fmt=marker, color=color, capsize=3, label=f"measured, {name}")
    ticks = (1, 0.7, 0.5, 0.3, 0.2)
    axes.set_xticks([1 / scale for scale in ticks], [f"{scale:g}" for scale in ticks])
    axes.set(
        xlabel="scale, or kl of RFT (axis: 1/scale)", ylabel="share that shows its working", ylim=(0.5, 1.02)
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(args.figure, dpi=150)


# (name, run, scale or kl, rounds)
ROUNDS = [("RFT", "rft-kl-1", 1, 3), ("SPIN", "spin-rounds-0.6", 0.6, 4), ("SPIN", "spin-rounds-0.3", 0.3, 4)]


def print_rounds(args):
    """Per round the habit's share, predicted from the start's shares, and the accuracy."""
    rows = []
    for name, source, scale, last in ROUNDS:
        start = read_stage(source, "round 1", args)
        for t in range(1, last + 1) if start else ():
            found = [*read_stage(source, f"round {t}", args).values()]
            predicted = fmean(per_steps(row["shares"], row["problems"], scale, t) for row in start.values())
            bits = [cell([from_hex(row[key]) for row in found]) for key in ("habit", "greedy", "sampled")]
            rows.append([name, f"{scale:g}", str(t), number(predicted, 3), *bits])
    print_table(["", "scale or kl", "round", "predicted", "shows working", "greedy", "sampled"], rows)


# ---- The papers' settings: commands, and what RESULTS.md shows of them on a tiny random model
ZEPHYR = "--model alignment-handbook/zephyr-7b-sft-full"
ULTRACHAT = f"{ZEPHYR} --data HuggingFaceH4/ultrachat_200k --split 'train_sft[:50000]'"
ULTRAFEEDBACK = f"{ZEPHYR} --data HuggingFaceH4/ultrafeedback_binarized --split train_prefs"
GSIL = f"gsil {ULTRAFEEDBACK} --scale 0.01 --shift 2 --temperature 0 --optimizer rmsprop --lr 5e-7"
IRFT = f"irft --method irft --chunks 5 {ULTRACHAT} --scale 0.1 --optimizer rmsprop --lr 5e-7"
RFT = "irft --model pythia-1.4b-hh --data Anthropic/hh-rlhf --kl 0.05 --reward-steps 2000 --reward-lr 1e-6"
PAPERS = {
    "GSIL": f"{GSIL} --warmup 30 --batch 128 --epochs 1 --max-new-tokens 256 {NONE}",
    "IRFT": f"{IRFT} --epochs 1 --batch 8 {NONE}",
    "IRFT, LoRA": f"{IRFT} --epochs 1 --batch 8 --lora-rank 64 {NONE}",
    "RFT": f"{RFT} --policy-steps 2000 --policy-lr 1e-6 --max-new-tokens 128 {NONE}",
}
SMALLER = {
    "GSIL": "--batch 16",
    "RFT": "--reward-steps 32 --policy-steps 8",
}  # 512 prompts; GSIL warms up 30 steps
FASTER = {name: "--lr 1e-3" for name in PAPERS} | {"RFT": "--reward-lr 1e-3 --policy-lr 1e-3"}
TINY = (
    "--model {out}/data/tiny --data {out}/data/first-512.jsonl --heldout {out}/data/dev-100.jsonl --habit ="
)


def run_papers(args):
    """Each command on a tiny random model, with its learning rate and with one that moves something."""
    tiny, rows = args.out / "data/tiny", args.slice or 512
    write_rows(args.out / "data/first-512.jsonl", read_rows(ROOT / "tests/toy/demos.jsonl")[:rows])
    if not tiny.exists():
        tokenizer = make_toy.make_tokenizer()
        tokenizer.save_pretrained(tiny)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.2}
        torch.manual_seed(0)
        config = LlamaConfig(eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0, **sizes)
        LlamaForCausalLM(config).save_pretrained(tiny)
    for name, text in PAPERS.items():
        for kind, more in (("papers", ""), ("moves", FASTER[name])):
            slug = name.lower().replace(", ", "-")
            file, folder = (
                args.out / f"papers-{slug}-{kind}.json",
                args.out / "runs" / f"papers-{slug}-{kind}",
            )
            if file.exists():
                continue
            say(f"papers: {name}, {kind}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            words = shlex.split(
                f"{text} --split train {TINY.format(out=args.out)} {SMALLER.get(name, '')} {more}"
            )
            with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log):
                module, flags = begin(words, folder, 0)
                module.main(flags)
            gsil.write(file, json.dumps(moved(folder, name)) + "\n")


def moved(folder, name):
    """What the last steps of a run say: margin of the demonstrations, and KL from the reference, in nats."""
    records = read_rows(folder / "metrics.jsonl")
    if name == "RFT":
        after = next(record for record in records if record["phase"] == "round 1 after")
        steps = [
            f"{sum(r['phase'] == f'round 1 {part}' for r in records)} {part}" for part in ("reward", "policy")
        ]
        return {"steps": " + ".join(steps), "margin": after["margin"], "kl": after["kl"]}
    last = [record for record in records if record["phase"] == records[-1]["phase"]][-4:]
    margin = fmean(record["d_real"] - record["d_generated"] for record in last)
    # On samples of the reference the mean of log pi_ref - log pi estimates KL(pi_ref | pi).
    kl = -fmean(record["d_generated"] for record in last)
    return {"steps": str(len(records)), "margin": margin, "kl": kl}


def print_papers(args):
    rows = []
    for name in PAPERS:
        for kind, label in (("papers", "the paper's lr"), ("moves", f"`{FASTER[name]}`")):
            file = args.out / f"papers-{name.lower().replace(', ', '-')}-{kind}.json"
            if file.exists():
                found = json.loads(file.read_text())
                numbers = [f"{found[key]:.4f}" for key in ("margin", "kl")]
                rows.append([name, label, found["steps"], *numbers])
    print_table(["", "flags", "steps", "margin", "KL"], rows)
    for text in PAPERS.values():
        script, rest = text.split(maxsplit=1)
        print(f"\n    {'python' if 'lora' in text else 'torchrun --nproc-per-node 8'} {script}.py {rest}")


# name -> the runs that a table needs, in this order for each seed, and what prints it
TABLES = {
    "main": (["gsil", "spin", "hinge", "rft", "filtered", "filtered-last", "extrapolated"], print_main),
    "again": (["gsil", "again", "again-scale-1", "again-spin", "again-irft", "again-rft"], print_again),
    "few": ([name for name in RUNS if name.startswith("few-")], print_few),
    "habit": (["gsil", *(name for _, name, _, _ in HABITS)], print_habit),
    "habit-rft": ([name for _, name, _, _ in RFT_HABITS], print_habit),
    "anew": (["new-gsil", "new-extrapolated", "new-filtered", "new-rft"], print_anew),
    "rounds": ([name for _, name, _, _ in ROUNDS], print_rounds),
    "papers": ([], print_papers),
}


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("tables", nargs="+", choices=[*TABLES, "all"], help="which tables to make and print")
    flag("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    flag("--out", type=Path, default=ROOT / "runs" / "toy-study", help="results; default runs/toy-study")
    flag("--report", action="store_true", help="run nothing, print from the files in --out")
    flag("--figure", type=Path, metavar="FILE.png", help="draw the table habit, too")
    flag(
        "--slice", type=int, metavar="N", help="a trial with the first N rows of all data, in a minute or two"
    )
    args = parser.parse_args(argv)
    if len(args.seeds) > max(T_QUANTILE):
        parser.error(f"--seeds: at most {max(T_QUANTILE)}")
    args.out = args.out.resolve()
    args.figure = args.figure and args.figure.resolve()
    return args


def main(args):
    os.chdir(ROOT)  # the commands name files of the repository
    tables = TABLES if "all" in args.tables else args.tables
    for table in tables:
        names, show = TABLES[table]
        if not args.report:
            args.out.mkdir(parents=True, exist_ok=True)
            prepare(names, args)
            for seed in args.seeds:
                for name in names:
                    run(name, seed, args)
            if table == "papers":
                run_papers(args)
        print(f"\n## {table}")
        show(args)


if __name__ == "__main__":
    main(parse_args())
