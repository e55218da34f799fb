"""Speed and memory beside the references, both in one run on one machine, in turns; medians.

    python tests/bench.py --train --data DIR                # DIR: GSM8K's train.jsonl; needs trl, accelerate
    python tests/bench.py --eval --model M --data DIR       # DIR: GSM8K's train.jsonl and test.jsonl
    python tests/bench.py --eval --model M --task arc_challenge --shots 25

--train: a Llama of 7M parameters, random weights, GSM8K's text; each side in its own process, one thread:
    ours        gsil.score, then gsil.train_round, for one epoch of --steps steps
    trl         TRL's DPOTrainer, same pairs, sorted by length, reference computed beforehand
    plain       a loop with a second model as reference, all pairs of a step padded to the longest at once,
                as in the official GSIL code
    sample      gsil.sample; generate: transformers' generate, in order of arrival, batches of the same size
    growth      our step with more pairs, longer texts, more parameters; not repeated
All train with the same loss (spin, which is DPO's), AdamW, lr and clipping; a step includes its share of
reference scoring. Memory is the peak above what was in use before: gradients and optimizer are in it. Ratios
are theirs by ours, turn by turn: above 1 ours is better. CPU seconds suffer less from other programs.

--eval: CPU seconds, on one thread, that eval.py and lm_eval 0.4.13 (which has to be installed) take for the
same prompts, from text to text or to log-likelihoods, without loading; and how many responses differ, or by
how much log-likelihoods do. lm_eval's own responses depend on the batch size where a stop string is a special
token that is not EOS: with --batch-size 1 there should be no difference. Without --data, the rows of
tests/parity.
"""
import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import datasets  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import eval as ev  # noqa: E402
import gsil  # noqa: E402
import oracle  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", action="store_true", help="gsil.py beside TRL, a plain loop and generate")
    what.add_argument("--eval", action="store_true", help="eval.py beside lm_eval")
    flag("--data", help="folder with the splits")
    flag("--batch-size", type=int, help="pairs per step, default 16; with --eval prompts, default 8")
    flag("--max-new-tokens", type=int, default=256)
    flag("--repeats", type=int, default=3)
    # of --train
    flag("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    flag("--steps", type=int, default=2, help="in each turn of each side")
    flag("--micro-batch", type=int, default=1, help="ours: pairs per forward pass")
    flag("--trl-micro-batch", type=int, default=1, help="the same for TRL")
    flag("--sample-batch", type=int, default=32, help="prompts sampled at a time")
    flag("--worker", help=argparse.SUPPRESS)                    # the folder, in the process of one side
    # of --eval
    flag("--model")
    flag("--task", default="gsm8k", choices=[name for name in ev.TASKS if name.startswith((
        "gsm8k", "arc", "hellaswag", "winogrande", "truthfulqa"))])
    flag("--shots", type=int)
    flag("--limit", type=int, default=16)
    args = parser.parse_args()
    if args.data and not (Path(args.data) / "train.jsonl").is_file():
        parser.error(f"--data {args.data}: there is no train.jsonl in it")
    args.batch_size = args.batch_size or (16 if args.train else 8)
    if args.worker:
        torch.set_num_threads(1)
        print(json.dumps(SIDES[args.sides[0]](args, Path(args.worker))))
    elif args.train:
        bench_train(args) if args.data else parser.error("--train needs --data")
    else:
        bench_eval(args) if args.model else parser.error("--eval needs --model")


def timed(function, seconds):
    """The same function; appends the CPU seconds of each call, with a GPU those by the clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def call(*args, **kwargs):
        began = clock()
        result = function(*args, **kwargs)
        seconds.append(clock() - began)
        return result

    return call


# ---- gsil.py: the driver -----------------------------------------------------------------------------------

def bench_train(args):
    """All sides in turns, each in a process of its own; prints medians, extremes and ratios."""
    if find_spec("trl") is None:
        print("TRL is not installed, so the comparison with it is left out: pip install trl accelerate")
        args.sides = [side for side in args.sides if side != "trl"]
    turns = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(args, Path(folder))
        for n in range(args.repeats):
            for side in args.sides:
                if side != "growth" or n == 0:
                    turns[side].append(run_side(side, folder))
    for side in args.sides:
        ours = turns.get({"trl": "ours", "plain": "ours", "generate": "sample"}.get(side), [])
        print()
        for name in turns[side][0]:
            values = [turn[name] for turn in turns[side]]
            ratios = [value / turn[name] for value, turn in zip(values, ours) if "tokens" not in name]
            ratio = f"   ratio {spread(ratios)}" if ratios else ""
            print(f"{side:9} {name:30} {spread(values)}{ratio}", flush=True)


def spread(values):
    return f"{median(values):8.2f} {f'({min(values):.2f} - {max(values):.2f})':20}"


def run_side(side, folder):
    """What a side returns, from a process of its own: the same command, with two more flags."""
    done = subprocess.run([sys.executable, *sys.argv, "--sides", side, "--worker", folder], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else sys.exit(done.stderr)


SHAPE = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
         "num_attention_heads": 4, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0}
SCALE, LR = 0.1, 1e-4


def make_inputs(args, folder):
    """A tokenizer, a model with random weights, and pairs: an answer beside one to another question."""
    rows = gsil.read(Path(args.data) / "train.jsonl")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((text for row in rows for text in row.values()), SHAPE["vocab_size"],
                            special_tokens=["<eos>"], show_progress=False)
    bpe.save(str(folder / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "bpe.json"), eos_token="<eos>",
                                        pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    gsil.hf_logging.disable_progress_bar()
    model.save_pretrained(folder)
    drawn = random.Random(0).sample(rows, 2 * args.batch_size * args.steps)
    pairs = [{"prompt": f"Question: {real['question']}\nAnswer:", "chosen": " " + real["answer"],
              "rejected": " " + other["answer"]} for real, other in zip(drawn[::2], drawn[1::2])]
    for pair in pairs:
        pair["prompt_ids"] = tokenizer(pair["prompt"]).input_ids
        for side, text in ("real", pair["chosen"]), ("generated", pair["rejected"]):
            ids = tokenizer(pair["prompt"] + text).input_ids
            pair[f"{side}_ids"] = ids[len(pair["prompt_ids"]):] + [tokenizer.eos_token_id]
    gsil.write(folder / "pairs.jsonl", pairs)
    lengths = [len(prompt + ids) for prompt, ids in both(pairs)]
    names = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl") if find_spec(name)]
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {args.steps} steps of "
          f"{args.batch_size} pairs, texts of {min(lengths)} - {max(lengths)} tokens, "
          f"mean {fmean(lengths):.0f}; one thread; {', '.join(names)}", flush=True)


# ---- gsil.py: the sides; each returns its figures ----------------------------------------------------------

def both(pairs):
    return gsil.texts_of(pairs, "real") + gsil.texts_of(pairs, "generated")


def memory(which):
    """MB of this process, VmRSS now or VmHWM at its peak; nan where there is no /proc."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{which}:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else math.nan


def load(folder):
    """The policy, after a first short step, so that nothing is loaded later; and the pairs."""
    model, pairs = gsil.load_model(folder, "cpu"), gsil.read(folder / "pairs.jsonl")
    gsil.response_logps(model, both(pairs[:1])).sum().backward()
    model.zero_grad()
    return model, pairs


class Meter:
    """Seconds, of the clock and of the CPU, spent inside: meter = Meter(), then `with meter:`, also again."""
    wall = cpu = 0.0

    def __enter__(self):
        self.wall, self.cpu = self.wall - time.perf_counter(), self.cpu - time.process_time()

    def __exit__(self, *_):
        self.wall, self.cpu = self.wall + time.perf_counter(), self.cpu + time.process_time()


def figures(before, reference, training, steps):
    return {"seconds a step": (reference.wall + training.wall) / steps,
            "CPU seconds a step": (reference.cpu + training.cpu) / steps,
            "  of these, reference": reference.cpu / steps,
            "peak MB": memory("VmHWM") - before}


def train_ours(model, pairs, args):
    run = gsil.parse_args(f"--loss spin --scale {SCALE} --lr {LR} --decay constant_with_warmup --batch "
                          f"{args.batch_size} --micro-batch {args.micro_batch}".split())
    reference, training, before = Meter(), Meter(), memory("VmRSS")
    with reference:
        for side in ("real", "generated"):
            logps = gsil.score(gsil.response_logps, model, gsil.texts_of(pairs, side), args)
            for pair, logp in zip(pairs, logps):
                pair[f"{side}_reference"] = logp
    with training:
        list(gsil.train_round(model, pairs, "spin", 1, run, "bench", "0"))
    return figures(before, reference, training, math.ceil(len(pairs) / args.batch_size))


def train_trl(args, folder):
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    (model, pairs), reference, training = load(folder), Meter(), Meter()

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *rest):
            self.before = memory("VmRSS")
            return super()._precompute_ref_logps(*rest)

        def compute_ref_log_probs(self, *rest):
            with reference:
                return super().compute_ref_log_probs(*rest)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            training.__enter__()

        def on_train_end(self, *_, **__):
            training.__exit__()

    # All pairs in order of length: as group_by_length would put them together in a much larger data set.
    pairs.sort(key=lambda pair: max(len(prompt + response) for prompt, response in both([pair])))
    rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    micro = args.trl_micro_batch
    trainer = Timed(
        model, processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_list(rows), args=DPOConfig(
            str(folder / "trl"), beta=SCALE, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, num_train_epochs=1, max_length=None, per_device_train_batch_size=micro,
            gradient_accumulation_steps=args.batch_size // micro, train_sampling_strategy="sequential",
            precompute_ref_log_probs=True, precompute_ref_batch_size=micro, gradient_checkpointing=False,
            bf16=False, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True))
    trainer.train()
    assert trainer.state.global_step == len(pairs) // args.batch_size
    theirs = [row["ref_chosen_logps"] for row in trainer.train_dataset]
    ours = gsil.score(gsil.response_logps, gsil.load_model(folder, "cpu"), gsil.texts_of(pairs, "real"), args)
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 0.1, "TRL has scored other responses"
    return figures(trainer.before, reference, training, trainer.state.global_step)


def train_plain(args, folder):
    model, pairs = load(folder)
    before, reference, training = memory("VmRSS"), Meter(), Meter()
    frozen = gsil.load_model(folder, "cpu").requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    for batch in gsil.chunks(pairs, args.batch_size):
        with reference:
            reference_logps = padded_logps(frozen, both(batch))
        with training:
            d_real, d_generated = (padded_logps(model, both(batch)) - reference_logps).chunk(2)
            (-F.logsigmoid(SCALE * (d_real - d_generated)).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return figures(before, reference, training, len(pairs) // args.batch_size)


def padded_logps(model, pairs):
    """log pi(y|x), (B,): logits of all positions, their log-softmax, the tokens' share of it."""
    ids, mask = gsil.collate(pairs, "cpu")                                                          # (B, T)
    lengths = torch.tensor([len(prompt + response) for prompt, response in pairs])
    attention = torch.arange(ids.shape[1]) < lengths[:, None]
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]                          # (B, T - 1)
    return (logps * mask[:, 1:]).sum(-1)


def sampling(args, folder, draw):
    """draw(model, prompts) -> responses, of every prompt twice.

    A bias on EOS makes the model's responses as long as GSM8K's on average, 100 tokens, but less evenly so.
    """
    model, pairs = load(folder)
    head = torch.nn.Linear(SHAPE["hidden_size"], SHAPE["vocab_size"])
    head.weight = model.lm_head.weight
    head.bias.data.zero_()[0] = math.log(SHAPE["vocab_size"] / 100)
    model.lm_head, prompts = head, [pair["prompt_ids"] for pair in pairs] * 2
    before, meter = memory("VmRSS"), Meter()
    torch.manual_seed(time.time_ns())
    with meter:
        lengths = list(map(len, draw(model, prompts)))
    return {"ms a token": 1000 * meter.wall / sum(lengths), "CPU ms a token": 1000 * meter.cpu / sum(lengths),
            "peak MB": memory("VmHWM") - before, "tokens a response": fmean(lengths)}


def sample_ours(args, folder):
    return sampling(args, folder, lambda model, prompts: gsil.sample(
        model, prompts, {0}, args.max_new_tokens, 1.0, args.sample_batch, str(time.time_ns())))


def sample_generate(args, folder):
    def draw(model, prompts):
        for part in gsil.chunks(prompts, args.sample_batch):
            ids, mask = gsil.collate([([], prompt) for prompt in part], "cpu", "left")
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                                 top_p=1.0, max_new_tokens=args.max_new_tokens)[:, ids.shape[1]:].tolist()
            yield from (row[:row.index(0) + 1] if 0 in row else row for row in out)         # 0: EOS and pad
    return sampling(args, folder, draw)


def growth(args, folder):
    """CPU seconds of our step, of 8 pairs of texts of 256 tokens, and with one thing changed."""
    pairs, seconds = gsil.read(folder / "pairs.jsonl"), {}
    for count, length, width in ((8, 256, 256), (4, 256, 256), (16, 256, 256), (8, 128, 256), (8, 512, 256),
                                 (8, 256, 128), (8, 256, 384)):
        shape = SHAPE | {"hidden_size": width, "intermediate_size": width * 8 // 3}
        model = LlamaForCausalLM(LlamaConfig(**shape))
        made = [pair | {f"{side}_ids": (pair[f"{side}_ids"] * 99)[:length - len(pair["prompt_ids"][:64])]
                        for side in ("real", "generated")} | {"prompt_ids": pair["prompt_ids"][:64]}
                for pair in pairs[:count]]
        changed = argparse.Namespace(**vars(args) | {"batch_size": count})
        name = f"{count} pairs, {length} tokens, {model.num_parameters() / 1e6:.1f}M"
        seconds[name] = train_ours(model, made, changed)["CPU seconds a step"]
    return seconds


SIDES = {"ours": lambda args, folder: train_ours(*load(folder), args), "trl": train_trl, "plain": train_plain,
         "sample": sample_ours, "generate": sample_generate, "growth": growth}


# ---- eval.py -----------------------------------------------------------------------------------------------

def bench_eval(args):
    """Print the seconds of both, their ratio and the number of different responses."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        sys.exit("lm_eval is not installed: pip install lm_eval==0.4.13 accelerate")
    torch.set_num_threads(1)
    parts, ours, theirs = [], [], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.data or oracle.ROWS / args.task.split("_")[0])
    flags = (f"--model {args.model} --tasks {args.task} --data {args.task}={folder} --limit {args.limit} "
             f"--device {device} --dtype float32 --batch-size {args.batch_size} "
             f"--max-new-tokens {args.max_new_tokens}" + f" --shots {args.shots}" * (args.shots is not None))
    for name in ("tokenize", "generate", "loglikelihoods"):
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
