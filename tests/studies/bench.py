"""Speed and memory beside the references: on one machine, in turns, each side in a process of its own.

    python tests/studies/bench.py --train --sample --data DIR        # DIR: GSM8K's train.jsonl; one CPU thread
    python tests/studies/bench.py --train --sample --device cuda     # a Llama of 1.1B parameters in bf16
    python tests/studies/bench.py --eval --repeats 3                 # a Llama of 7M parameters, one CPU thread
    python tests/studies/bench.py --eval --task gsm8k --model M --data DIR  # DIR: GSM8K's train and test.jsonl

--train: steps on pairs of GSM8K's text, or of random ids of its lengths; random weights. Needs trl, accelerate.
    ours        gsil.score, then gsil.update; the number behind it is --micro-batch, tokens per forward pass
    trl         TRL's DPOTrainer at its best settings: pairs sorted by length, reference computed beforehand;
                the number is its pairs per forward pass, the rest of a step is gradient accumulation
    plain       a loop with a second model as reference, a step's pairs padded to the longest, in one pass
    All have the same loss (spin, which is DPO's), AdamW, lr and clipping. A step includes its share of reference
    scoring. The first step of each does not count.
--sample: gsil.sample beside transformers' generate, the same prompts in one batch. A bias on EOS makes responses
    about as long as GSM8K's, but less evenly so.
--eval: seconds that eval.py and lm_eval 0.4.13 (which has to be installed) take from text to text or to
    log-likelihoods, the start of Python and the loading of the model not among them; what they go into (the
    model's passes over many tokens at once, those over one token of each row, the rest); and how many responses differ, or by how
    much log-likelihoods do. Without --data on the rows of tests/parity, without --model on random weights, which
    rarely say a stop sequence. lm_eval's own responses depend on the batch size where a stop sequence is a
    special token that is not EOS: with --batch 1 there should be no difference.

On a CPU read the CPU seconds: other programs disturb them less. Memory is the peak above what was in use with
the weights loaded: gradients, optimizer, activations and a second model are in it. A ratio is theirs by ours,
turn by turn, ours being the first of --micro-batch: above 1 ours is better. Shown: median (lowest - highest).
"""

import argparse
import copy
import gc
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import gsil

SCALE = 0.1
LR = 1e-4
EOS = 0
SHAPE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
SHAPE += ["num_attention_heads", "num_key_value_heads"]
SHAPES = {"tiny": [512, 64, 128, 2, 4, 2], "7m": [8192, 256, 688, 6, 4, 4]}
SHAPES["1b"] = [32000, 2048, 8192, 16, 32, 8]
SMALL = {"size": "7m", "batch": 16, "steps": 2, "trl_micro_batch": [1], "sample_batch": 32}
EVAL_SHOTS = {"gsm8k": 5, "mmlu": 5, "truthfulqa_mc2": None, "hellaswag": 10}
LARGE = {"size": "1b", "batch": 32, "steps": 4, "trl_micro_batch": [8], "sample_batch": 256}
# Every twentieth of the lengths of GSM8K's prompts and responses, in tokens of a vocabulary of 8192.
PROMPT_LENGTHS = [39, 42, 45, 48, 50, 52, 54, 57, 59, 62, 64, 67, 70, 73, 77, 81, 87, 95, 107, 160]
RESPONSE_LENGTHS = [44, 50, 55, 60, 64, 68, 73, 77, 82, 86, 92, 98, 104, 110, 117, 127, 137, 151, 176, 260]


def parse_args(argv=None):
    """Flags -> Namespace; those without a default here have one by device, of SMALL or LARGE."""
    raw = argparse.RawDescriptionHelpFormatter  # prints the docstring as it is
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("--train", action="store_true", help="steps of gsil.py beside TRL and a plain loop")
    flag("--sample", action="store_true", help="gsil.sample beside generate")
    flag("--eval", action="store_true", help="eval.py beside lm_eval")
    flag("--data", help="folder with the splits of GSM8K, or of --task")
    flag("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: one thread")
    flag("--repeats", type=int, default=1, help="turns")
    flag("--max-new-tokens", type=int, default=256, help="longest response")
    flag("--batch", type=int, help="pairs per step; --eval: prompts at a time, 8 if not given")
    flag("--timeout", type=int, default=600, help="seconds for a process; what it has measured counts")
    flag("--size", choices=SHAPES, help="of the model")
    flag(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=list(SIDES),
        help="of --train and --sample, in this order",
    )
    flag("--steps", type=int, help="in each turn of each side, behind the first")
    flag("--micro-batch", type=int, nargs="+", default=[512], help="ours: tokens per forward pass")
    flag("--trl-micro-batch", type=int, nargs="+", help="TRL: pairs per forward pass")
    flag("--sample-batch", type=int, help="prompts to sample for, at once")
    flag("--worker", nargs="+", help=argparse.SUPPRESS)  # in the process of a side: folder, settings
    flag("--model", help="--eval: a folder; if not given, random weights")
    flag("--task", nargs="+", default=list(EVAL_SHOTS), help="--eval: tasks with rows in tests/parity")
    flag("--shots", type=int, help="--eval: few-shot examples; if not given, 5, of hellaswag 10")
    flag("--limit", type=int, default=16, help="--eval: problems, of each of MMLU's subjects")
    args = parser.parse_args(argv)
    if args.data and not (Path(args.data) / "train.jsonl").is_file() and not args.eval:
        parser.error(f"--data {args.data}: there is no train.jsonl in it")
    for name, value in (LARGE if args.device == "cuda" else SMALL).items():
        if getattr(args, name) is None and not args.eval:
            setattr(args, name, value)
    return args


# ---- The driver: sides in turns ------------------------------------------------------------------


def bench(args):
    """All sides in turns; prints each turn's figures, then medians, extremes and ratios."""
    settings = {}
    if args.train:
        settings |= {"ours": args.micro_batch, "trl": args.trl_micro_batch, "plain": [args.batch]}
    if args.sample:
        settings |= {"sample": [args.sample_batch], "generate": [args.sample_batch]}
    if find_spec("trl") is None:
        print("TRL is not installed, so the comparison with it is left out: pip install trl accelerate")
        settings.pop("trl", None)
    settings = {side: settings[side] for side in args.sides if side in settings}
    turns = {(side, value): {} for side, values in settings.items() for value in values}
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(args)
        gsil.write(Path(folder) / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
        for n in range(args.repeats):
            for side, values in settings.items():
                # Freed memory stays with its process on a CPU, so there each setting has its own.
                for group in [values] if args.device == "cuda" else [[value] for value in values]:
                    for value, found in run_side(side, group, Path(folder), args):
                        turns[side, value][n] = found
                        print(f"turn {n + 1}: {side} {value} {found}", flush=True)
    for (side, value), measured in turns.items():
        print(f"\n{side} {value}{'' if measured else ': not measured'}")
        base = "sample" if side in ("sample", "generate") else "ours"
        ours = turns[base, settings[base][0]] if base in settings else {}
        for name in measured[min(measured)] if measured else []:
            line = f"    {name:24}{spread([found[name] for found in measured.values()])}"
            ratios = [found[name] / ours[n][name] for n, found in measured.items() if n in ours]
            if ratios and ours is not measured and not name.startswith("tokens"):
                line += f"    ratio{spread(ratios)}"
            print(line, flush=True)


def read(path):
    """The values of a .jsonl file. (gsil.read_rows would take a file of lists for one list.)"""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def spread(values):
    both_ends = f" ({min(values):.3f} - {max(values):.3f})" if len(values) > 1 else ""
    return f"{median(values):12.3f}{both_ends}"


def run_side(side, values, folder, args):
    """[(setting, figures)] of a side, measured in a process of its own, which may fail or be late."""
    results = folder / "results.jsonl"
    results.write_text("")
    command = [sys.executable, *sys.argv, "--sides", side, "--worker", str(folder), *map(str, values)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    how = {"text": True, "capture_output": True, "timeout": args.timeout}
    try:
        subprocess.run(command, check=True, env=environment, **how)
    except subprocess.CalledProcessError as error:
        print(f"{side} failed: {error.stderr[-1000:]}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{side} stopped after {args.timeout} s", flush=True)
    return read(results)


def work(args):
    """In the process of a side: measure each setting, and write down its figures at once."""
    folder, *values = args.worker
    torch.set_num_threads(1)
    pairs = read(Path(folder) / "pairs.jsonl")
    for value in map(int, values):
        torch.manual_seed(0)
        with torch.device(args.device):
            model = LlamaForCausalLM(make_config(args)).eval()  # fp32, as gsil.load_model has it
        found = SIDES[args.sides[0]](model, pairs, value, args)
        with open(f"{folder}/results.jsonl", "a") as file:
            file.write(json.dumps([value, found]) + "\n")
        del model
        gc.collect()  # a Trainer holds itself


# ---- The inputs ----------------------------------------------------------------------------------


def make_config(args):
    shape = dict(zip(SHAPE, SHAPES[args.size]))
    ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    return LlamaConfig(**shape, **ends, tie_word_embeddings=args.size != "1b")


def make_pairs(args):
    """Pairs as gsil.py has them, for one step more than is timed, and a line on them and the model."""
    n = args.batch * (args.steps + 1)
    vocabulary = SHAPES[args.size][0]
    chance = random.Random(0)
    if args.data:  # the generated response is another question's
        rows = read(Path(args.data) / "train.jsonl")
        bpe = ByteLevelBPETokenizer()
        texts = [text for row in rows for text in row.values()]
        bpe.train_from_iterator(texts, vocabulary, special_tokens=["<eos>"], show_progress=False)
        drawn = chance.sample(rows, 2 * n)
        prompts = [bpe.encode(f"Question: {row['question']}\nAnswer:").ids for row in drawn]
        responses = [bpe.encode(f" {row['answer']}").ids + [EOS] for row in drawn]
    else:
        words = range(1, vocabulary)
        prompts = [chance.choices(words, k=chance.choice(PROMPT_LENGTHS)) for _ in range(n)]
        lengths = [chance.choice(RESPONSE_LENGTHS) for _ in range(2 * n)]
        responses = [chance.choices(words, k=length - 1) + [EOS] for length in lengths]
    keys = ("prompt_ids", "real_ids", "generated_ids")
    pairs = [dict(zip(keys, ids)) for ids in zip(prompts, responses[:n], responses[n:])]
    with torch.device("meta"):
        size = LlamaForCausalLM(make_config(args)).num_parameters() / 1e6
    device = torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread"
    names = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl") if find_spec(name)]
    lengths = [len(x) + len(y) for x, y in both(pairs)]
    texts = f"texts of {min(lengths)} to {max(lengths)} tokens, mean {fmean(lengths):.0f}"
    print(
        f"{size:.1f}M parameters, {device}, {', '.join(names)}; {args.batch} pairs a step, {texts}",
        flush=True,
    )
    return pairs


def both(pairs):
    real = [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs]
    return real + [(pair["prompt_ids"], pair["generated_ids"]) for pair in pairs]


# ---- Seconds and memory --------------------------------------------------------------------------


class Meter:
    """Seconds, of the clock and of the CPU, spent inside: `with meter:`, also again; memory since it was made."""

    def __init__(self, device):
        self.device = device
        self.wall = 0.0
        self.cpu = 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.before = self.memory("RSS")

    def __enter__(self):
        self.add(-1)

    def __exit__(self, *_):
        self.add(1)

    def add(self, sign):
        if self.device == "cuda":
            torch.cuda.synchronize()  # it may not have done yet what it was told
        self.wall += sign * time.perf_counter()
        self.cpu += sign * time.process_time()

    def memory(self, which):
        """MB, now ("RSS") or at its peak ("HWM"): of the GPU's tensors, or of this process on Linux."""
        if self.device == "cuda":
            return (
                torch.cuda.max_memory_allocated if which == "HWM" else torch.cuda.memory_allocated
            )() / 2**20
        status = Path("/proc/self/status")
        return int(re.search(rf"Vm{which}:\s+(\d+)", status.read_text())[1]) / 1024

    def figures(self, n, unit):
        """{name: figure}, the seconds divided by n."""
        found = {f"seconds a {unit}": self.wall / n, "peak MB": self.memory("HWM") - self.before}
        return found | ({f"CPU seconds a {unit}": self.cpu / n} if self.device == "cpu" else {})


# ---- --train: the sides, (model, pairs, setting) -> figures --------------------------------------


def train_ours(model, pairs, max_tokens, args):
    flags = f"--loss spin --scale {SCALE} --lr {LR} --out none"
    flags += f" --batch {args.batch} --micro-batch {max_tokens}"
    run = gsil.parse_args(flags.split())
    shift = torch.tensor(0.0, device=args.device)
    loss_of = partial(gsil.gsil_loss, loss="spin", scale=SCALE, shift=shift)
    meter = Meter(args.device)
    for rows in (pairs[: args.batch], pairs[args.batch :]):
        meter.wall = meter.cpu = 0.0  # the first step does not count
        with meter:
            logps = gsil.score(model, both(rows), max_tokens)
            for pair, real, generated in zip(rows, logps, logps[len(rows) :]):
                pair |= {"real_reference": real, "generated_reference": generated}
            steps = len(rows) // args.batch
            optimizer, schedule = gsil.make_optimizer(model, LR, steps, run)
            for start in range(0, len(rows), args.batch):
                gsil.update(model, optimizer, rows[start : start + args.batch], loss_of, run)
                schedule.step()
    return meter.figures(args.steps, "step")


def train_trl(model, pairs, micro, args):
    import datasets
    import trl.trainer.dpo_trainer as trl

    expected = gsil.score(model, both(pairs[-4:])[:4], 4096)
    meter = Meter(args.device)

    class Timed(trl.DPOTrainer):
        scored = 0

        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

        def compute_ref_log_probs(self, *inputs):
            self.scored += micro
            if self.scored <= args.batch:  # for the first step
                return super().compute_ref_log_probs(*inputs)
            with meter:
                return super().compute_ref_log_probs(*inputs)

    class Clock(TrainerCallback):
        def on_step_end(self, _, state, *rest, **__):
            if state.global_step == 1:
                meter.add(-1)

        def on_train_end(self, *_, **__):
            meter.add(1)

    def length(pair):
        return max(len(x) + len(y) for x, y in both([pair]))

    # What counts is in order of length: as group_by_length puts it together in a much larger data set.
    ordered = sorted(pairs[: args.batch], key=length) + sorted(pairs[args.batch :], key=length)
    names = {"prompt_ids": "prompt_ids", "real_ids": "chosen_ids", "generated_ids": "rejected_ids"}
    rows = [{theirs: pair[ours] for ours, theirs in names.items()} for pair in ordered]
    # It takes seconds at 1B, and by it the second setting would find the first one's reference.
    trl.hash_module = lambda _: f"setting {micro}"
    words = Tokenizer(models.WordLevel({"<eos>": EOS}, "<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    flags = {"beta": SCALE, "learning_rate": LR, "lr_scheduler_type": "linear", "num_train_epochs": 1}
    flags |= {"weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": None, "gradient_checkpointing": False}
    flags |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": args.batch // micro}
    flags |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": micro}
    flags |= {"train_sampling_strategy": "sequential", "dataloader_pin_memory": args.device == "cuda"}
    flags |= {"bf16": args.device == "cuda", "use_cpu": args.device == "cpu", "disable_tqdm": True}
    flags |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
        trainer = Timed(model, args=trl.DPOConfig(folder, **flags), callbacks=[Clock()], **inputs)
        trainer.train()
    assert trainer.state.global_step == args.steps + 1
    scored = trainer.train_dataset["ref_chosen_logps"]
    for pair, ours in zip(pairs[-4:], expected):
        theirs = scored[ordered.index(pair)]
        assert abs(ours - theirs) < 0.003 * abs(ours), f"TRL has scored other tokens: {theirs}, not {ours}"
    return meter.figures(args.steps, "step")


def train_plain(model, pairs, batch, args):
    meter = Meter(args.device)
    frozen = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    for start in range(0, len(pairs), batch):
        if start == batch:  # the first step does not count
            meter.wall = meter.cpu = 0.0
        texts = both(pairs[start : start + batch])
        with meter:
            d_real, d_generated = (padded_logps(model, texts) - padded_logps(frozen, texts)).chunk(2)
            gsil.LOSSES["spin"](SCALE * d_real, SCALE * d_generated).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return meter.figures(args.steps, "step")


def padded_logps(model, texts):
    """log pi(y|x), (B,): logits of all positions, their log-softmax, the tokens' share of it."""
    ids = gsil.pad([x + y for x, y in texts], "right", model.device)  # (B, T)
    mask = gsil.pad([[0] * len(x) + [1] * len(y) for x, y in texts], "right", model.device)  # (B, T)
    attention = gsil.pad([[1] * len(x + y) for x, y in texts], "right", model.device)  # (B, T)
    with gsil.autocast():
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    return (logps * mask[:, 1:]).sum(-1)


# ---- --sample: the sides -------------------------------------------------------------------------


def sample_ours(model, prompts, args):
    return gsil.sample(model, prompts, {EOS}, args.max_new_tokens, 1.0, len(prompts), "bench")


def sample_generate(model, prompts, args):
    ids = gsil.pad(prompts, "left", model.device)
    mask = gsil.pad([[1] * len(prompt) for prompt in prompts], "left", model.device)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": args.max_new_tokens}
    with gsil.autocast():
        out = model.generate(input_ids=ids, attention_mask=mask, **how)
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]  # behind EOS are pads


def sampling(draw, model, pairs, batch, args):
    """Figures of draw(model, prompts, args) -> responses."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, device=args.device)
    head.weight = model.lm_head.weight
    head.bias.data.zero_()[EOS] = math.log(model.config.vocab_size / 100)
    model.lm_head = head
    prompts = [pairs[n % len(pairs)]["prompt_ids"] for n in range(batch)]
    meter = Meter(args.device)
    draw(model, prompts[:2], args)  # does not count
    with meter:
        responses = draw(model, prompts, args)
    tokens = sum(len(response) for response in responses)
    counts = {"tokens a second": tokens / meter.wall, "tokens a response": tokens / batch}
    return counts | meter.figures(tokens / 1000, "1000 tokens")


SIDES = {"ours": train_ours, "trl": train_trl, "plain": train_plain}
SIDES |= {"sample": partial(sampling, sample_ours), "generate": partial(sampling, sample_generate)}


# ---- --eval --------------------------------------------------------------------------------------


def timed(function, seconds, name_of):
    """The same function, whose seconds (of the CPU, with a GPU by the clock) are added to those of a name."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def call(*args, **kwargs):
        began = clock()
        result = function(*args, **kwargs)
        name = name_of(*args, **kwargs)
        seconds[name] = seconds.get(name, 0) + clock() - began
        return result

    return call


def save_random_model(folder, files):
    """A Llama of 7M parameters, and a tokenizer learned from the rows, in the folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(file) for file in files], SHAPES["7m"][0], special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = make_config(argparse.Namespace(size="7m"))
    config.max_position_embeddings = 4096
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def bench_eval(args):
    """A line for each task: the seconds of both sides in turns, their ratio, what they go into, differences."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        sys.exit("lm_eval is not installed: pip install lm_eval==0.4.13 accelerate")
    import oracle

    import eval as ev

    torch.set_num_threads(1)
    ours, theirs = {}, {}
    for name in ("encode", "generate", "loglikelihoods"):
        setattr(ev, name, timed(getattr(ev, name), ours, lambda *_, **__: "all"))
    for name in ("generate_until", "loglikelihood"):
        setattr(HFLM, name, timed(getattr(HFLM, name), theirs, lambda *_, **__: "all"))
    side, forward = {}, LlamaForCausalLM.forward  # of the side whose turn it is

    def name_of(model, input_ids, *_, **__):
        return "one by one" if input_ids.shape[1] == 1 else "many at once"

    with tempfile.TemporaryDirectory() as folder:
        path = args.model or save_random_model(Path(folder) / "model", oracle.ROWS.rglob("*.jsonl"))
        loaded = {"dtype": "float32", "batch_size": args.batch or 8, "device": args.device}
        reference = HFLM(pretrained=path, **loaded)
        for task in args.task:
            shots = EVAL_SHOTS.get(task) if args.shots is None else args.shots
            turns = []
            for _ in range(args.repeats):
                for side in (ours, theirs):
                    side.clear()
                    LlamaForCausalLM.forward = timed(forward, side, name_of)
                    if side is ours:
                        samples = run_eval(ev, oracle, task, path, shots, args)
                    else:
                        documents = run_lm_eval(oracle, task, reference, shots, Path(folder), args)
                turns.append((dict(ours), dict(theirs)))
            LlamaForCausalLM.forward = forward
            report(task, shots, turns, samples, documents)


def run_eval(ev, oracle, task, path, shots, args):
    """eval.py's samples of a task."""
    data = args.data or oracle.ROWS / task.split("_")[0]
    flags = f"--model {path} --tasks {task} --data {task}={data} --limit {args.limit} --device {args.device}"
    flags += f" --dtype float32 --batch-size {args.batch or 8} --max-new-tokens {args.max_new_tokens}"
    flags += "" if shots is None else f" --shots {shots}"
    return ev.main(ev.parse_args(flags.split()))["samples"][task]


def run_lm_eval(oracle, task, reference, shots, folder, args):
    """lm_eval's documents of a task, as oracle.records has them."""
    options = {"model": reference, "num_fewshot": shots, "limit": args.limit}
    if task.startswith("gsm8k"):
        options["gen_kwargs"] = {"max_gen_toks": args.max_new_tokens}
    if task != "mmlu":
        files = {file.stem: str(file) for file in Path(args.data).glob("*.jsonl")} if args.data else {}
        result = oracle.run_lm_eval(tasks=[oracle.local(task, **files)], **options)
        return oracle.records(result, task)["documents"]
    (folder / "tasks").mkdir(exist_ok=True)
    manager = oracle.local_mmlu(folder / "tasks")
    result = oracle.run_lm_eval(tasks=["local_mmlu"], task_manager=manager, **options)
    parts = [oracle.records(result, name)["documents"] for name in sorted(result["samples"])]
    return [document for part in parts for document in part]


def report(task, shots, turns, samples, documents):
    """Print the medians of both sides, the ratio turn by turn, shares of the seconds and differences."""
    ratio = spread([theirs["all"] / ours["all"] for ours, theirs in turns])
    print(f"\n{task}, {shots or 0} shots, {len(samples)} problems: lm_eval / eval.py{ratio}")
    for name, side in zip(("eval.py", "lm_eval"), zip(*turns)):
        parts = {
            part: median(one.get(part, 0.0) for one in side) for part in ("all", "many at once", "one by one")
        }
        passes = parts["many at once"] + parts["one by one"]  # the trial of a loaded model among them
        parts["rest"] = max(0.0, parts["all"] - passes)
        print(f"    {name:8}" + "".join(f"  {part} {value:.2f} s" for part, value in parts.items()))
    both_sides = list(zip(samples, documents, strict=True))
    if "loglikelihoods" in samples[0]:
        keys = [zip(x["loglikelihoods"], y["loglikelihoods"], strict=True) for x, y in both_sides]
        largest = max(abs(a - b) for pairs in keys for a, b in pairs)
        print(f"    log-likelihoods differ by {largest:.1e} at most", flush=True)
    else:
        different = sum(sample["responses"][0] != document["response"] for sample, document in both_sides)
        print(f"    {different} of {len(samples)} responses differ", flush=True)


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.worker:
        work(arguments)
    elif arguments.eval:
        bench_eval(arguments)
    else:
        bench(arguments)
