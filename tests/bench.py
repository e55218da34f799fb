"""Speed beside the reference, both in one run on one machine, in turns; medians.

    python tests/bench.py --eval --model M --data DIR       # DIR: GSM8K's train.jsonl and test.jsonl

--eval: seconds that eval.py and lm_eval 0.4.13 (which has to be installed) take for the same gsm8k prompts,
from text to text, without loading; and how many responses differ. lm_eval's own depend on the batch size where
a stop string is a special token that is not EOS: with --batch-size 1 there should be no difference.
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
    flag("--data", default=str(oracle.ROWS / "gsm8k"))
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
    flags = (f"--model {args.model} --tasks gsm8k --data gsm8k={args.data} --limit {args.limit} "
             f"--device {device} --dtype float32 --batch-size {args.batch_size} "
             f"--max-new-tokens {args.max_new_tokens}").split()
    ev.encode, ev.generate = timed(ev.encode, parts), timed(ev.generate, parts)
    reference = HFLM(pretrained=args.model, dtype="float32", batch_size=args.batch_size, device=device)
    reference.generate_until = timed(reference.generate_until, theirs)
    files = {split: str(Path(args.data) / f"{split}.jsonl") for split in ("train", "test")}
    for _ in range(args.repeats):
        said = [sample["responses"][0] for sample in ev.main(ev.parse_args(flags))["samples"]["gsm8k"]]
        ours.append(sum(parts))
        parts.clear()
        result = lm_eval.simple_evaluate(
            model=reference, tasks=[oracle.local("gsm8k", **files)], limit=args.limit, bootstrap_iters=1,
            gen_kwargs={"max_gen_toks": args.max_new_tokens}, log_samples=True)
    documents = oracle.records(result, "gsm8k")["documents"]
    different = sum(text != document["response"] for text, document in zip(said, documents, strict=True))
    print(f"eval.py {median(ours):.1f} s, lm_eval {median(theirs):.1f} s, ratio "
          f"{median(theirs) / median(ours):.2f}; {different} of {len(said)} responses differ")


if __name__ == "__main__":
    main()
