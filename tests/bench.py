"""Speed beside the reference, both in one run on one machine, in turns; medians.

    python tests/bench.py --eval --model M --data DIR       # DIR: GSM8K's train.jsonl and test.jsonl
    python tests/bench.py --eval --model M --task arc_challenge --shots 25

--eval: seconds that eval.py and lm_eval 0.4.13 (which has to be installed) take for the same prompts, from
text to text or to log-likelihoods, without loading; and how many responses differ, or by how much
log-likelihoods do. lm_eval's own responses depend on the batch size where a stop string is a special token
that is not EOS: with --batch-size 1 there should be no difference. Without --data, the rows of tests/parity.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import torch  # noqa: E402

import eval as ev  # noqa: E402
import oracle  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--eval", action="store_true", required=True, help="the only comparison so far")
    flag("--model", required=True)
    flag("--task", default="gsm8k", choices=[name for name in ev.TASKS if name.startswith((
        "gsm8k", "arc", "hellaswag", "winogrande", "truthfulqa"))])
    flag("--shots", type=int)
    flag("--data", help="folder with the splits")
    flag("--limit", type=int, default=16)
    flag("--batch-size", type=int, default=8)
    flag("--max-new-tokens", type=int, default=256)
    flag("--repeats", type=int, default=3)
    bench_eval(parser.parse_args())


def timed(function, seconds):
    """The same function; appends the seconds of each call."""
    def call(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result
    return call


def bench_eval(args):
    """Print the seconds of both, their ratio and the number of different responses."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        sys.exit("lm_eval is not installed: pip install lm_eval==0.4.13 accelerate")
    parts, ours, theirs = [], [], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.data or oracle.ROWS / args.task.split("_")[0])
    flags = (f"--model {args.model} --tasks {args.task} --data {args.task}={folder} --limit {args.limit} "
             f"--device {device} --dtype float32 --batch-size {args.batch_size} "
             f"--max-new-tokens {args.max_new_tokens}" + f" --shots {args.shots}" * (args.shots is not None))
    for name in ("encode", "generate", "loglikelihoods"):
        setattr(ev, name, timed(getattr(ev, name), parts))
    reference = HFLM(pretrained=args.model, dtype="float32", batch_size=args.batch_size, device=device)
    reference.generate_until = timed(reference.generate_until, theirs)
    reference.loglikelihood = timed(reference.loglikelihood, theirs)
    files = {file.stem: str(file) for file in folder.glob("*.jsonl")}
    writes = args.task.startswith("gsm8k")
    for _ in range(args.repeats):
        samples = ev.main(ev.parse_args(flags.split()))["samples"][args.task]
        ours.append(sum(parts))
        parts.clear()
        result = lm_eval.simple_evaluate(
            model=reference, tasks=[oracle.local(args.task, **files)], limit=args.limit, bootstrap_iters=1,
            num_fewshot=args.shots, log_samples=True,
            gen_kwargs={"max_gen_toks": args.max_new_tokens} if writes else None)
    documents = oracle.records(result, args.task)["documents"]
    if writes:
        different = sum(sample["responses"][0] != document["response"]
                        for sample, document in zip(samples, documents, strict=True))
        compared = f"{different} of {len(samples)} responses differ"
    else:
        differences = [abs(a - b) for sample, document in zip(samples, documents, strict=True)
                       for a, b in zip(sample["loglikelihoods"], document["loglikelihoods"], strict=True)]
        compared = f"{len(differences)} log-likelihoods differ by {max(differences):.1e} at most"
    print(f"eval.py {median(ours):.1f} s, lm_eval {median(theirs):.1f} s, ratio "
          f"{median(theirs) / median(ours):.2f}; {compared}")


if __name__ == "__main__":
    main()
