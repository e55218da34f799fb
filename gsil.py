"""Generalized self-imitation learning (GSIL, arXiv 2410.10093) in one file.

GSIL fine-tunes a language model on demonstrations alone: prompts with good responses, without preference
labels. In each round the model responds to the prompts itself, then learns to tell the demonstrations from
its own responses. With y+ a demonstration, y- the model's response to the same prompt x, and pi_t the
model at the start of round t:

    d(y) = log pi(y|x) - log pi_t(y|x)      the log-ratio, summed over the response's tokens
    h(y) = scale * d(y) + shift             the paper calls these two alpha and beta
    minimize loss(h(y+), h(y-))             -log sigmoid(h(y+)) - log sigmoid(-h(y-)) by default

At its optimum a round turns pi_t into pi_t (p/pi_t)^(1/scale) / Z, where p is how the
demonstrators write and Z normalizes. Scale 1 imitates them. A smaller scale goes beyond them,
further in the direction that sets them apart from the model. A round multiplies log pi - log p by
1 - 1/scale, so several rounds settle at p only if scale is above 0.5. The formula is exact for the
loss spin. The others, except hinge, need shift = scale log Z, which differs between prompts; a
learned shift is one number. On long responses h soon leaves the range where the losses have a
gradient; there scale acts as a step size. Unlike the official code, this one never edits sampled
ids, so a response's format does not tell whose it is.

    python gsil.py                      # the built-in toy, about a minute on two CPU cores
    python gsil.py --model M --data train.jsonl --heldout test.jsonl --lr 5e-5 --out runs/mine
    torchrun --nproc-per-node 8 gsil.py --model M --data ...        # one process per GPU
"""

import argparse
import csv
import gc
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean

import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.utils.peft_utils import find_adapter_config_file

TOY = Path(__file__).resolve().parent / "tests" / "toy"
RESUMABLE = ("--device", "--micro-batch", "--baseline", "--rounds")  # flags that --resume may change
PRINTED = ("loss", "d_real", "d_generated", "told_apart", "shift")  # metrics.jsonl has all metrics
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # from torchrun
bar, say = partial(tqdm, leave=False, disable=RANK > 0), tqdm.write  # say: print above the bar
if not sys.stderr.isatty():  # a log gets no bar but a line a minute
    line = "  {desc}: {n_fmt} of {total_fmt}, {remaining} left\n"
    bar = partial(tqdm, disable=RANK > 0, delay=60, mininterval=60, miniters=1, bar_format=line)
    say = print
TAKEN = []  # [folder] once this run has one; if it stops, the error names it for --resume
# bf16 matrix products over fp32 weights on CUDA, plain fp32 elsewhere
autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def parse_args(argv=None):
    """Parse and check the flags. The result is not modified afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.usage = "%(prog)s [--flag value ...]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # prints the docstring as it is
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    devices = [best] if WORLD > 1 else sorted({best, "cpu"})
    if best == "cuda" and int(os.environ.get("LOCAL_RANK", "0")) >= torch.cuda.device_count():
        die(f"each process needs a GPU of its own, but there are {torch.cuda.device_count()}")
    flag = parser.add_argument_group("model and data").add_argument
    flag("--model", default=f"{TOY}/base", help="a folder or a Hub name (default: the toy)")
    flag("--data", default=f"{TOY}/demos.jsonl", help=".jsonl, .json, .csv, .parquet, Hub dataset")
    flag("--split", default="train", help="split of a Hub dataset (default: train)")
    flag("--dev", help="problems that choose the best epoch; their responses end in '#### value'")
    flag("--heldout", help="good responses for the table; without it a tenth of --data, at most 500")
    flag("--habit", metavar="REGEX", help="predict and measure how many responses contain this")
    flag("--prompt-template", help="text with {prompt} in it, for models without a chat template")
    flag("--max-new-tokens", type=int, help="longest response; without it 256, or half the window")
    flag = parser.add_argument_group("method").add_argument
    flag("--loss", choices=[*LOSSES, "sft"], default="logistic", help="sft: only the baseline")
    flag("--scale", type=float, default=0.3, help="1 imitates, less goes beyond the demonstrators")
    flag("--shift", type=float, help="the constant in h (paper: 2); without it, it is learned")
    flag("--rounds", type=int, default=1, help="each samples anew; settle at --scale above 0.5")
    flag("--epochs", type=int, default=2, help="passes over the pairs of a round")
    flag("--temperature", type=float, default=1.0, help="of the samples (paper: 0, greedy)")
    baselines = ["sft", "extrapolated", "none"]
    flag("--baseline", choices=baselines, default="sft", help="extrapolated: sft, then beyond it")
    flag = parser.add_argument_group("optimization").add_argument
    flag("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="paper: rmsprop")
    flag("--lr", type=float, default=2e-4, help="peak, right for the toy (paper, 7B: 5e-7)")
    flag("--shift-lr", type=float, default=0.02, help="learning rate of a learned shift")
    flag("--warmup", type=int, default=0, help="steps of linear warmup, before linear decay to 0")
    flag("--batch", type=int, default=32, help="demonstrations per optimizer step, over all GPUs")
    tokens = 8192 if best == "cuda" else 512  # a CPU wants little padding, a GPU much work
    flag("--micro-batch", type=int, default=tokens, help="tokens per forward pass; takes memory")
    flag("--checkpoint-activations", action="store_true", help="a third slower, in less memory")
    flag("--clip", type=float, default=1.0, help="largest gradient norm")
    flag = parser.add_argument_group("run").add_argument
    flag("--device", choices=devices, default=best, help="computes everything")
    flag("--sample-batch", type=int, default=256, help="responses at once; more is faster")
    flag("--seed", type=int, default=0, help="of samples, order of training, held-out tenth")
    flag("--out", help="folder for the results; without it the next free runs/gsil-LOSS-N")
    flag("--resume", metavar="DIR", help=f"continue that run; new may be {', '.join(RESUMABLE)}")
    for action in parser._actions:
        if (action.choices and action.default) or type(action.default) in (int, float):
            action.help += " (default: %(default)s)"
    parser.error = die
    args = parser.parse_args(argv)
    if args.resume:
        file = Path(args.resume) / "args.json"
        saved = json.loads(file.read_text() or "{}") if file.exists() else {}  # empty: killed as it began
        saved |= {"resume": args.resume, "out": args.resume}
        if saved.keys() != vars(args).keys():
            parser.error(f"--resume {args.resume}: no run of this version of {parser.prog} is there")
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)  # now with the saved values where a flag is not given
        for name, value in vars(args).items():
            option = f"--{name.replace('_', '-')}"
            if value != saved[name] and option not in RESUMABLE:
                parser.error(f"{option} {value}: the run to resume has {saved[name]}, which stays")
        if RANK == 0 and args.rounds > saved["rounds"] and Path(args.resume, "sft").exists():
            print(f"warning: sft's epochs grow with --rounds, but it is finished, with {saved['rounds']}")
        if args.device not in devices:  # the saved one may be another machine's
            parser.error(f"--device {args.device}: there is none; choose {' or '.join(devices)}")
    if args.data == f"{TOY}/demos.jsonl":
        args.dev, args.heldout = args.dev or f"{TOY}/dev.jsonl", args.heldout or f"{TOY}/heldout.jsonl"
        args.habit = args.habit or "="  # the response shows its working: 7 + 4 = 11 . #### 11
    may_be_zero = ("temperature", "rounds", "warmup", "seed")
    for name, value in vars(args).items():
        low = -1e99 if name == "shift" else 0 if value == 0 and name in may_be_zero else 1e-9
        if value == "" or (type(value) in (int, float) and not low <= value < math.inf):
            parser.error(f"--{name.replace('_', '-')}={value}: out of range")
    try:
        re.compile(args.habit or "")
    except re.error as error:
        parser.error(f"--habit {args.habit}: no regular expression: {error}")
    if args.prompt_template and args.prompt_template.count("{prompt}") != 1:
        parser.error(f"--prompt-template {args.prompt_template!r}: {{prompt}} should be in it once")
    if args.out and not args.resume and Path(args.out).exists() and any(Path(args.out).iterdir()):
        parser.error(f"--out {args.out} is not empty: choose another, or --resume {args.out}")
    return args


# ---- 0. Helpers ---------------------------------------------------------------------------
def batches(lengths, max_items=math.inf, max_tokens=math.inf):
    """Indices by similar length, for little padding: [3, 9, 2], 2 items each -> [[2, 0], [1]]."""
    parts = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if parts and len(parts[-1]) < max_items and (len(parts[-1]) + 1) * lengths[i] <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def pad(rows, side, device):
    """Lists of token ids -> (B, T), long: [[5, 6], [7]] -> [[5, 6], [7, 0]] for side "right"."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)


def gather(value=None):
    """[the value of each process], in every process. Each waits until all have come. Under torchrun
    transformers sets up torch.distributed, as load_model asks for shards."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def reshard(model):
    """FSDP: drop the weights that forward passes have gathered from the other processes."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def die(sentence):
    """Say in one sentence why the run ends, and exit with code 2. Under torchrun, whose store counts
    failures from the start, only the first process to fail reports, as the others fail with it."""
    store = WORLD > 1 and dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if not store or store.add("failures", 1) == 1:
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


# ---- 1. Sample: how does the model respond? -----------------------------------------------
def next_token_logits(model, ids, mask, cache):
    """The logits of the next token, (B, V), float32, and the cache of keys and values. ids (B, T): the tokens
    that are not in the cache yet. mask (B, tokens so far): 0 for the padding, which is on the left."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, T): they count real tokens only
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float(), out.get("past_key_values")


@torch.no_grad()
def sample(model, prompts, eos_ids, max_new_tokens, temperature, batch_size, seed):
    """Draw one response y ~ pi(.|x) for each prompt; both are lists of token ids. Each token comes
    from softmax(logits / temperature), or is the likeliest at temperature 0, as in transformers' generate
    with top_k=0, top_p=1. A response ends with one of eos_ids, a set, if the model samples it; else it has
    max_new_tokens ids. NaN logits end the run. Each process samples a share and returns all responses."""
    if WORLD > 1:
        # One joint forward pass gathers the weights on every process. load_model makes FSDP keep
        # them until `reshard`, so each process can run its own batches without the others.
        model(input_ids=pad(prompts[:1], "left", model.device))
    responses = [[] for _ in prompts]
    parts = batches([len(x) for x in prompts], min(batch_size, math.ceil(len(prompts) / WORLD)))
    n_tokens = sum(map(len, parts[RANK::WORLD])) * max_new_tokens  # at most
    progress = bar(total=n_tokens, desc="sampling", unit="token")
    for n in range(RANK, len(parts), WORLD):
        rows = parts[n]  # indices of prompts
        stream = random.Random(f"{seed} {n}").getrandbits(60)
        generator = torch.Generator(model.device).manual_seed(stream)
        ids = pad([prompts[i] for i in rows], "left", model.device)  # (B, T)
        mask = pad([[1] * len(prompts[i]) for i in rows], "left", model.device)  # (B, T)
        cache = None
        with autocast():  # around the loop, so that weights are cast once and not for every token
            for t in range(max_new_tokens):
                logits, cache = next_token_logits(model, ids, mask, cache)  # (B, V)
                if logits.isnan().any():  # otherwise argmax would silently pick a token
                    die("the model's logits are NaN: its weights are broken, or --lr was too high")
                if temperature == 0:
                    tokens = logits.argmax(-1)  # (B,)
                else:
                    probs = (logits / temperature).softmax(-1)
                    tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]  # (B,)
                for i, token in zip(rows, tokens.tolist()):
                    responses[i].append(token)
                alive = [k for k, i in enumerate(rows) if responses[i][-1] not in eos_ids]
                progress.update(len(alive) + (len(rows) - len(alive)) * (max_new_tokens - t))
                if not alive:
                    break
                if len(alive) < len(rows):  # finished rows leave the batch
                    rows = [rows[k] for k in alive]
                    keep = torch.tensor(alive, device=model.device)
                    cache.reorder_cache(keep)
                    tokens, mask = tokens[keep], mask[keep]
                ids = tokens[:, None]  # (B, 1): everything before is in the cache
                mask = F.pad(mask, (0, 1), value=1)
    progress.close()
    reshard(model)
    shares = gather(responses)  # in each share only the responses of that process are filled
    return [max(copies, key=len) for copies in zip(*shares)]


# ---- 2. Log-probabilities: how likely is a response? --------------------------------------
def response_logps(model, texts):
    """log pi(y|x) in nats, summed over y's tokens as in the official code. texts: B pairs (prompt
    ids, response ids), neither part empty. Returns (B,), float32, with gradients. [([5, 6], [7,
    1]), ([5], [8])] becomes the ids [[5, 6, 7, 1], [5, 8, 0, 0]] and the mask [[0, 0, 1, 1], [0,
    1, 0, 0]]. Padding is on the right and attention is causal, so real tokens never attend to
    padding, and no attention mask is needed."""
    ids = pad([prompt + response for prompt, response in texts], "right", model.device)  # (B, T)
    mask = pad([[0] * len(x) + [1] * len(y) for x, y in texts], "right", model.device)  # (B, T)
    first = min(len(prompt) for prompt, _ in texts)  # no response begins before this column
    targets, mask = ids[:, first:], mask[:, first:]  # (B, R)
    with autocast():  # the logits at a position predict the next token, so one more is kept
        out = model(input_ids=ids, use_cache=False, logits_to_keep=targets.shape[1] + 1)
    logits = out.logits[:, :-1].float().transpose(1, 2)  # (B, V, R)
    logps = -F.cross_entropy(logits, targets, reduction="none")  # (B, R)
    return torch.where(mask == 1, logps, 0.0).sum(1)


@torch.no_grad()
def score(model, texts, max_tokens, measure=response_logps):
    """measure(model, texts), as floats, of any number of texts. measure: response_logps, or in irft.py
    the reward. Every process takes a share."""
    if WORLD > 1:
        measure(model, texts[:1])  # gathers the weights, as in sample
    values = [0.0] * len(texts)
    parts = batches([len(x) + len(y) for x, y in texts], max_tokens=max_tokens)
    for rows in bar(parts[RANK::WORLD], "scoring"):
        for i, value in zip(rows, measure(model, [texts[i] for i in rows]).tolist()):
            values[i] = value
    reshard(model)
    shares = gather(values)  # a process has the values of its own batches, and 0 for all others
    return [sum(copies) for copies in zip(*shares)]


# ---- 3. Losses: a demonstration, or the model's own response? -----------------------------
H_MAX = 5.0  # exp(h) estimates p/pi_t; beyond e^5 = 148 its tangent or a constant takes its place


def tangent_exp(h, limit=H_MAX):
    """exp(h) up to `limit` and its tangent beyond: smooth, convex and finite. Any shape."""
    return torch.exp(h.clamp(max=limit)) * (1 + F.relu(h - limit))


# name -> f(h of demonstrations, h of own responses) -> loss, all (B,). The optimal h is log p/pi_t, except
# for hinge; for spin any function of x may be added to it, so that a shift has no effect.
LOSSES = {
    # the official code calls it Bernoulli
    "logistic": lambda real, generated: -F.logsigmoid(real) - F.logsigmoid(-generated),
    # sign(p - pi_t): only which of the two is likelier
    "hinge": lambda real, generated: F.relu(1 - real) + F.relu(1 + generated),
    "brier": lambda real, generated: (real.sigmoid() - 1) ** 2 + generated.sigmoid() ** 2,
    # E exp(d) over y- is 1, so at scale 1 this is SFT up to a constant
    "kliep": lambda real, generated: -real + tangent_exp(generated),
    # -exp(h+) + exp(2 h-)/2, beyond H_MAX constant in h+ and linear in h-
    "lsif": lambda real, generated: tangent_exp(2 * generated, 2 * H_MAX) / 2 - real.clamp(max=H_MAX).exp(),
    # SPIN, arXiv 2401.01335
    "spin": lambda real, generated: -F.logsigmoid(real - generated),
}


def gsil_loss(model, pairs, loss, scale, shift):
    """loss(h(y+), h(y-)) of each pair, (B,), float32, and metrics {name: (B,)}, d_* in nats.
    pairs: dicts with prompt_ids, real_ids, generated_ids and log pi_t, real_reference and
    generated_reference. loss: a key of LOSSES. shift: a scalar tensor, which may be learned. The
    losses are those of the official code, which calls the scale of spin beta, and whose
    exponentials are unbounded."""
    real = [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs]
    generated = [(pair["prompt_ids"], pair["generated_ids"]) for pair in pairs]
    logps = response_logps(model, real + generated)  # (2B,): one forward pass for both sides
    references = [pair[f"{side}_reference"] for side in ("real", "generated") for pair in pairs]
    d_real, d_generated = (logps - logps.new_tensor(references)).chunk(2)  # (B,) each
    h_real, h_generated = scale * d_real + shift, scale * d_generated + shift
    losses = LOSSES[loss](h_real, h_generated)
    told_apart = (d_real > d_generated) + (d_real == d_generated) / 2  # ties count half
    metrics = {"d_real": d_real, "d_generated": d_generated, "told_apart": told_apart}
    return losses, metrics | {"shift": shift.expand(len(pairs))}


def sft_loss(model, demos, mean_length):
    """-log pi(y|x) / mean_length of each demonstration, (B,), and no metrics. mean_length: tokens
    of a response, on average over the data, so that the data's mean loss is in nats per token."""
    logps = response_logps(model, [(demo["prompt_ids"], demo["real_ids"]) for demo in demos])
    return -logps / mean_length, {}


# ---- 4. Train -----------------------------------------------------------------------------
def update(model, optimizer, batch, loss_of, args):
    """Make one optimizer step on the mean loss of a batch, a list of rows. loss_of(model, rows) ->
    losses (B,), {metric: (B,)}. Returns {name: float}: means over the batch, and grad_norm before
    clipping. If loss or gradient are not finite, the run ends before the step. Each process takes
    a share, in micro-batches whose gradients add up to that of the whole batch."""
    share, sums, lengths = batch[RANK::WORLD], {}, []
    for row in share:  # tokens in a forward pass: of one text, or of two, padded to the longer
        sides = [len(row[key]) for key in ("real_ids", "generated_ids") if key in row]
        lengths.append(len(sides) * (len(row["prompt_ids"]) + max(sides)))
    parts = batches(lengths, max_tokens=args.micro_batch)
    for n in range(max(gather(len(parts)))):
        counts = n < len(parts)  # else a dummy: FSDP wants a backward pass of every process
        rows = [share[i] for i in parts[n]] if counts else batch[:1]
        losses, metrics = loss_of(model, rows)
        if losses.shape != (len(rows),):
            die(f"a loss should have one value per row, {len(rows)}, not the shape {[*losses.shape]}")
        loss = losses.sum() / len(batch) if counts else 0 * losses.sum()
        (loss * WORLD).backward()  # FSDP divides the sum over processes by WORLD
        for name, values in ({"loss": losses} | metrics).items():
            sums[name] = sums.get(name, 0.0) + counts * values.sum().item()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if WORLD > 1 and not hasattr(parameter, "full_tensor"):  # the shift, irft.py's LoRA
                if parameter.grad is None:  # a LoRA expert that this share did not use
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD
    shares = gather(sums)
    means = {name: sum(share[name] for share in shares) / len(batch) for name in sums}
    weights = optimizer.param_groups[0]["params"]  # of the model; group 1 has a learned shift
    norm = torch.nn.utils.clip_grad_norm_(weights, args.clip)
    means["grad_norm"] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(means["loss"] + means["grad_norm"]):  # this step would ruin the weights
        die(f"loss {means['loss']}, gradient norm {means['grad_norm']}: try a lower learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return means


def make_optimizer(model, lr, steps, args, learned=()):
    """AdamW or RMSprop without weight decay; a schedule of linear warmup and linear decay to 0."""
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    if learned:  # the shift; its first gradient is rounding error, which eps 1e-8 would blow up
        groups.append({"params": learned, "lr": args.shift_lr, "eps": 1e-4})
    optimizer_class = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.RMSprop
    optimizer = optimizer_class(groups, lr=lr, weight_decay=0)
    return optimizer, transformers.get_scheduler("linear", optimizer, args.warmup, steps)


def train(model, rows, loss_of, epochs, folder, data, args, learned=()):
    """Train on rows, and save in folder, such as OUT/round_1, the epoch that solves most dev problems, or
    without dev the last. data: a Data tuple, from read_data. learned: gsil.py's [shift], if it is learned."""
    steps = epochs * math.ceil(len(rows) / args.batch)
    optimizer, schedule = make_optimizer(model, args.lr, steps, args, learned)
    phase, step, right, best, unprinted = folder.name.replace("_", " "), 0, 0.0, -1.0, []
    for epoch in range(1, epochs + 1):
        order = random.Random(f"{args.seed} {phase} {epoch}").sample(rows, len(rows))
        for start in bar(range(0, len(order), args.batch), f"epoch {epoch}"):
            metrics = update(model, optimizer, order[start : start + args.batch], loss_of, args)
            metrics["lr"] = schedule.get_last_lr()[0]
            schedule.step()
            step += 1
            log_step(phase, step, steps, metrics, unprinted, args)  # prints and empties unprinted
            if step == 1 and max(abs(metrics.get(d, 0)) for d in ("d_real", "d_generated")) > 1:
                die("policy and reference differ before the first step, but should be one model")
        if data.dev:
            right, _ = accuracy(model, data.dev, temperature=0, data=data, args=args)  # the share
            print(f"  epoch {epoch}: {right:.1%} of dev right{', kept' if right > best else ''}")
        if (data.dev and right > best) or (not data.dev and epoch == epochs):
            best = right  # of equal epochs the first is kept, which had less time to overfit
            model.generation_config.eos_token_id = sorted(data.eos_ids)  # for transformers' generate
            model.save_pretrained(folder.with_suffix(".partial"))
    finish(folder, data.tokenizer)  # renames FOLDER.partial to FOLDER


# ---- 5. The method ------------------------------------------------------------------------
def self_play(policy, demos, folder, data, args):
    """A round's pairs: every demonstration with a response of the policy, pi_t, and log pi_t of both in
    nats, such as {"prompt": "2 + 2", "response": "4", "generated": "5<eos>", "prompt_ids": [7, 3,
    7], "real_ids": [9, 1], "generated_ids": [8, 1], "real_reference": -2.5, "generated_reference":
    -1.5, "answer": None}; the answer is what follows a '####'. FOLDER.jsonl keeps them."""
    file, seed = folder.with_suffix(".jsonl"), f"{args.seed} {folder.name.replace('_', ' ')}"
    if file.exists():  # the run was interrupted while it trained on them
        return [json.loads(line) for line in file.read_text().splitlines()]
    prompts = [demo["prompt_ids"] for demo in demos]
    options = (data.eos_ids, data.max_new_tokens, args.temperature, args.sample_batch, seed)
    responses = sample(policy, prompts, *options)
    texts = [(demo["prompt_ids"], demo["real_ids"]) for demo in demos] + [*zip(prompts, responses)]
    logps = score(policy, texts, args.micro_batch)
    pairs = []
    for demo, ids, real_logp, generated_logp in zip(demos, responses, logps, logps[len(demos) :]):
        pair = demo | {"generated": data.tokenizer.decode(ids), "generated_ids": ids}
        # These two numbers are all that a loss needs of pi_t, so no model stays in memory for it.
        pairs.append(pair | {"real_reference": real_logp, "generated_reference": generated_logp})
    write(file, "".join(json.dumps(pair) + "\n" for pair in pairs))
    equal = fmean(pair["real_ids"] == pair["generated_ids"] for pair in pairs)
    ended = fmean(ids[-1] in data.eos_ids for ids in responses)
    print(f"  {equal:.1%} of the responses equal their demonstration, {ended:.1%} ended by themselves")
    return pairs


def predict_habit(pairs, scale, data, args):
    """Print the share of responses with the habit: the model's, the demonstrators', and the predicted one.
    Its log-odds are the model's + (the demonstrators' - the model's) / scale, if responses with the habit
    differ from the others in nothing else. scale None: these flags lead to no such optimum."""
    own = habit_share([pair["generated_ids"] for pair in pairs], data, args)
    theirs = habit_share([pair["real_ids"] for pair in pairs], data, args)
    print(f"  {args.habit!r}, pooled over prompts: model {own:.1%}, demonstrators {theirs:.1%}", end="")
    if not scale or args.temperature != 1:
        print("; no prediction from these flags")
    elif not (0 < own < 1 and 0 < theirs < 1):
        print("; no prediction from a share of 0% or 100%")
    else:
        start, goal = torch.tensor([own, theirs], dtype=torch.float64).logit()
        optimum = (start + (goal - start) / scale).sigmoid().item()
        print(f"; predicted {optimum:.1%} if these responses differ in nothing else")


def gsil_round(start, folder, data, args):
    """A round: the policy responds, then learns to tell the demonstrations from its responses."""
    policy = load_model(start, args)
    pairs = self_play(policy, data.demos, folder, data, args)
    if args.habit:
        # The shift cancels in spin. A given shift moves the optimum of the others. Hinge has none.
        known = args.loss == "spin" or (args.loss != "hinge" and args.shift is None)
        predict_habit(pairs, args.scale if known else None, data, args)
    shift = torch.tensor(args.shift or 0.0, device=policy.device, requires_grad=args.shift is None)
    learned = [shift] if args.shift is None else []
    loss_of = partial(gsil_loss, loss=args.loss, scale=args.scale, shift=shift)
    train(policy, pairs, loss_of, args.epochs, folder, data, args, learned)


def train_sft(folder, data, args):
    """The baseline: supervised fine-tuning on the demonstrations."""
    epochs = args.epochs * args.rounds * (3 if data.dev else 1)  # 3: what two sides and samples cost
    if not data.dev and args.loss != "sft":
        print(f"  {epochs} epochs, a third of {args.loss}'s work, as there is no --dev to choose one")
    loss_of = partial(sft_loss, mean_length=fmean(len(demo["real_ids"]) for demo in data.demos))
    train(load_model(args.model, args), data.demos, loss_of, epochs, folder, data, args)


def extrapolate(folder, data, args):
    """A control without training of its own: start + factor * (sft - start); --dev chooses the factor."""
    start, best = load_model(args.model, args), -1.0
    for factor in (1, 1.5, 2, 2.5, 3, 4) if data.dev else (2,):
        model = load_model(folder.with_name("sft"), args)
        with torch.no_grad():
            for weight, origin in zip(model.parameters(), start.parameters()):
                weight.copy_(origin + factor * (weight - origin))
        # By samples, at temperature 1, as greedy answers hardly differ between the factors.
        right = accuracy(model, data.dev, 1, data, args)[0] if data.dev else 0.0
        what = f"{right:.1%} of dev right, sampled" if data.dev else "not chosen, without --dev"
        print(f"  factor {factor}, {what}")
        if right > best:
            best = right
            model.config.extrapolated_by = factor  # to be found in config.json
            model.generation_config.eos_token_id = sorted(data.eos_ids)
            model.save_pretrained(folder.with_suffix(".partial"))
        del model  # make room for the next one
    finish(folder, data.tokenizer)


def main(args):
    """Run and evaluate the rounds and the baselines; return the table that summary.json holds."""
    if RANK > 0:  # only the first process prints
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115
    if args.rounds > 1 and args.scale <= 0.5 and args.loss != "sft":
        print(f"warning: rounds do not settle at --scale {args.scale}: use one, or --scale 1")
    data = read_data(args)  # before the weights, so that mistakes show at once
    steps = args.epochs * math.ceil(len(data.demos) / args.batch)
    if args.warmup >= steps:
        die(f"--warmup {args.warmup}: --lr would not be reached in the {steps} steps of --epochs")
    policy = load_model(args.model, args)
    try_model(policy, data.demos)  # refuses a model whose padding or cache change what it predicts
    print(f"model   {args.model}: {policy.num_parameters():,} parameters, {WORLD} x {policy.device}")
    rows = data.demos + data.dev + data.heldout
    args = take_folder(args, f"runs/gsil-{args.loss}", rows)  # a copy, with args.out set
    shift = "learned" if args.shift is None else args.shift
    settings = "" if args.loss == "sft" else f", scale {args.scale}, shift {shift}"
    print(f"method  {args.loss}{settings}, results in {args.out}")
    if args.loss != "sft":
        print(f"        {args.rounds} x ({len(data.demos)} responses to sample, {steps} steps)")
    out = Path(args.out)
    saved = out / "summary.json"  # of a resumed run
    table = json.loads(saved.read_text()) if saved.exists() else {}

    if not table:
        if args.habit:  # what the models move towards
            table["demos"] = {"habit": habit_share([demo["real_ids"] for demo in data.demos], data, args)}
        evaluate("base", policy, None, table, data, args)  # no seconds; adds a row, saves table
    del policy  # every stage loads the model that it starts from
    stages = [f"round_{t}" for t in range(1, args.rounds + 1)] if args.loss != "sft" else []
    if args.rounds and (args.loss == "sft" or args.baseline != "none"):
        stages += ["sft", "extrapolated"] if args.baseline == "extrapolated" else ["sft"]
    start = args.model  # of a round; pi_t
    for stage in stages:
        name, folder, began, seconds = stage.replace("_", " "), out / stage, time.time(), None
        if not folder.exists():  # else a resumed run has this stage behind it
            print(f"\n{name}")
            if stage == "extrapolated":
                extrapolate(folder, data, args)
            elif stage == "sft":
                train_sft(folder, data, args)
            else:
                gsil_round(start, folder, data, args)
            seconds = time.time() - began
        start = folder
        if name not in table:  # else a resumed run need not load the model
            evaluate(name, load_model(folder, args), seconds, table, data, args)
    print_table(table, out, len(data.heldout))
    return table


# ---- 6. Data: rows of any usual format -> token ids ---------------------------------------
# Columns of prompt and response; the first pair whose columns a row has filled is used. Without a
# prompt column the other one holds a conversation, and its last assistant turn is the response.
COLUMNS = "prompt+chosen, chosen, prompt+response, prompt+completion, question+answer, "
COLUMNS += "instruction+output, real, messages, conversations"
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
ROLES |= dict.fromkeys(["assistant", "gpt", "bot", "model", "chatbot"], "assistant")
EMPTY = (None, "", [])  # values of a column or key that is not filled
# A row is not to be imitated if "name\nvalue" of an unused column, or of a key of the response's
# turn, matches: more than text by its name, but not if its value is no; by its value; good: no; bad: yes
NOT_TO_IMITATE = r"""(?x)
    (?!.*\n(\[\]|false|no|none|0(\.0+)?)\Z)
    .*(image|picture|photo|pixel|video|audio|speech|tool|function|think|thought|reason|rationale)
    | .*\n(data:\w+/|b['"]|<pil|[\s\S]*'bytes':\ b|\S+\.(png|jpe?g|gif|web[pm]|mp[34]|mov|avi|wav|flac)\W*\Z)
    | (is_|was_)?(label|desir\w*|accept\w*|approv\w*|good|correct|valid|keep|train|weight|pass\w*)
      \n(false|no|0|0?\.0+|-.+|bad|neg\w*|reject\w*|undesir\w*|wrong|incorrect|fail\w*|dislike\w*)\Z
    | (is_|was_)?(reject\w*|bad|wrong|incorrect|invalid|undesir\w*|toxic|harmful|flagged|spam)\n(true|yes|1)\Z"""

Data = namedtuple("Data", "tokenizer eos_ids max_new_tokens room demos dev heldout")


def read_rows(path, split):
    """Yield (place, row) for every row of a file or a dataset: ("x.jsonl row 1", {column: value}).
    A dataset is a Hub name or a folder; NAME:CONFIGURATION if it has several configurations."""
    n = 0
    try:
        if path.endswith((".jsonl", ".json")):
            text = Path(path).read_text("utf-8-sig").strip()
            lines = [line for line in text.split("\n") if line.strip()]  # a text may hold U+2028
            rows = json.loads(text) if text.startswith("[") else map(json.loads, lines)
        elif path.endswith(".csv"):  # not pandas, which makes a missing value of NA, and 7 of 007
            csv.field_size_limit(2**31 - 1)  # characters in a cell; the default is 131,072
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
        elif path.endswith(".parquet"):
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif Path(path).is_file():
            die(f"{path} should be a .jsonl, .json, .csv or .parquet file")
        else:
            import datasets  # slow to import

            name, *configuration = path.rsplit(":", 1)
            if tables := [*Path(name).glob("**/*.[ct]sv")]:
                die(f"{path}: pandas would drop NA from {tables[0]}: name a .csv file itself")
            rows = datasets.load_dataset(name, *configuration, split=split)
        for n, row in enumerate(rows, 1):
            yield f"{path} row {n}", row
    except Exception as error:  # noqa: BLE001 (these libraries raise anything)
        after = f" after row {n}" if n else ""
        die(f"{path}{after}: {' '.join(str(error.__cause__ or error).split())}")


def to_turns(turns, role):
    """A text, or turns with role and content or from and value -> [{"role", "content", "rest"}].
    The rest is what else a turn has, {key: value}. Raises as to_messages does."""
    messages = []
    for turn in turns if isinstance(turns, list) else [{"role": role, "content": turns}]:
        rest = {key: turn[key] for key in turn if turn[key] not in EMPTY} if isinstance(turn, dict) else {}
        role = str(rest.pop("role", rest.pop("from", ""))).strip().lower()
        content = rest.pop("content", rest.pop("value", ""))
        parts = content if isinstance(content, list) else [None]
        if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            content = "".join(str(part.get("text") or "") for part in parts)
        # Numbers may be ids or weights. Another text may be a thought, a list a call or a picture.
        more = {k for k in rest if rest[k] != "[]" and not isinstance(rest[k], (int, float))} - {"name"}
        if role and (more or role not in ROLES or isinstance(content, list) or "<image>" in str(content)):
            raise UserWarning(f"a turn has more than a usual role and a text: {turn!r:.80}")
        if not role or not isinstance(content, str) or (role != "system" and not content.strip()):
            raise ValueError(f"a turn is empty, or has no role, like text before a transcript: {turn!r:.80}")
        content.encode()  # half an emoji raises a ValueError
        messages.append({"role": ROLES[role], "content": content, "rest": rest})
    return messages


def to_messages(row):
    """A row -> [{"role", "content"}], the last one by the assistant, and the names of the used columns.
    Raises UserWarning if a row is none to imitate, ValueError if it is broken, with the reason."""
    rest = {name: row[name] for name in row if row[name] not in EMPTY} if isinstance(row, dict) else {}
    columns = {*rest}
    found = [names for names in COLUMNS.split(", ") if {*names.split("+")} <= columns]
    if not found or None in columns:  # a CSV has None for cells without a column
        raise ValueError(f"the row has {[*rest] or row}; accepted, in lower case, are {COLUMNS}")
    before, _, after = found[0].rpartition("+")
    prompt, turns = rest.pop(before, None), rest.pop(after)
    if before == "instruction" and "input" in rest:
        if not isinstance(rest["input"], str):
            raise ValueError(f"input should be a text, not {rest['input']!r:.80}")
        prompt = f"{prompt}\n\n{rest.pop('input')}"
    if isinstance(turns, str) and not before:  # Anthropic's HH: "\n\nHuman: ...\n\nAssistant: ..."
        parts = ["", *re.split(r"\n\n(Human|Assistant):", turns)]  # role and text by turns
        pairs = [(role, text.strip()) for role, text in zip(parts[::2], parts[1::2]) if role or text.strip()]
        turns = [{"role": role, "content": text} for role, text in pairs] or turns
    messages = to_turns(turns, "assistant")
    if before and messages[0]["role"] == "assistant":  # else the conversation has the prompt in it
        messages = to_turns(prompt, "user") + messages
    elif before:
        for turn in to_turns(prompt, "user"):
            if not any(turn["content"].strip() in other["content"] for other in messages):
                raise ValueError(f"{before!r} is not in the conversation of {after!r}")
    for column in [*rest]:
        if re.fullmatch("(?i)system.?(prompt|message)?", column) and messages[0]["role"] != "system":
            messages = to_turns(rest.pop(column), "system") + messages
    last = max((n for n, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    for name, value in [*rest.items(), *messages[last]["rest"].items()]:
        mark = f"{name}\n{str(value).strip()}".lower()
        if (name, after) != ("rejected", "chosen") and re.match(NOT_TO_IMITATE, mark):
            raise UserWarning(f"{name!r} is {value!r:.40}: more than a text, or a mark of a bad one")
    if last == 0:
        raise ValueError(f"{after!r} has no prompt with a response")
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in messages[: last + 1]]
    return messages, columns - {*rest}


def encode(row, tokenizer, eos_ids, room=math.inf):
    """A row -> {prompt, response, prompt_ids, real_ids (with EOS), answer}, and what read_demos reports:
    the used columns, and whether the tokenizer changed the text. room: the longest prompt that fits."""
    messages, columns = to_messages(row)
    response = messages[-1]["content"]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Of earlier responses a template may drop the thoughts, as it will when the model is used.
    asked = [turn["content"].strip() for turn in messages[:-1] if turn["role"] != "assistant"]
    kept = all(prompt.count(x) >= sum(other.count(x) for other in asked) for x in asked if x)
    if not (kept and text.startswith(prompt)) or response.strip() not in text[len(prompt) :]:
        raise ValueError("the chat template changes or drops a turn; see --prompt-template")
    to_ids = partial(tokenizer.encode, add_special_tokens=False)
    prompt_ids, ids = to_ids(prompt), to_ids(text)
    if ids[: len(prompt_ids)] != prompt_ids:  # a token spans the border
        ids = prompt_ids + to_ids(text[len(prompt) :])
    if eos_ids & {*to_ids(response)}:
        raise ValueError("there is an EOS token inside the response")
    if tokenizer.bos_token_id == ids[0] and any(tokenizer.bos_token in content for content in asked):
        raise ValueError(f"{tokenizer.bos_token} is in the prompt, but the template adds it, too")
    if tokenizer.unk_token_id in {*ids} - eos_ids:
        raise ValueError("the tokenizer (without --model the toy's) does not know some of its words")
    if len(prompt_ids) > room:
        raise UserWarning(f"the prompt has {len(prompt_ids)} tokens, but there is room for {room}")
    changed = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != text.strip()
    real_ids = ids[len(prompt_ids) :] + [tokenizer.eos_token_id]
    end = next(i for i, token in enumerate(real_ids) if token in eos_ids)  # a template may go on
    answer = final_answer(response.rstrip().split("\n")[-1])  # other lines may be headings
    demo = {"prompt": prompt, "response": response, "prompt_ids": prompt_ids, "real_ids": real_ids[: end + 1]}
    return demo | {"answer": answer, "columns": columns, "changed": changed}


def read_demos(path, split, encode_row):
    """[encode_row(row)] for every row of a file or dataset; prints which columns are used. Rows that are
    no demonstrations are left out, and broken ones, if these are at most a tenth. Both are counted."""
    demos, left_out, broken, used, columns, changed = [], [], [], set(), set(), 0
    for place, row in read_rows(path, split):
        try:
            demos.append(encode_row(row))
            used |= demos[-1].pop("columns")
            changed += demos[-1].pop("changed")
            columns |= {*row}
        except (UserWarning, ValueError, TemplateError) as error:
            reasons = left_out if isinstance(error, UserWarning) else broken
            reasons.append(f"{place}: {error}")
    n, examples = len(demos) + len(broken) + len(left_out), broken + left_out + ["none"]
    report = f"{n - len(demos)} of {n} rows are left out, such as {examples[0]}"
    if not demos or len(broken) > n / 10:
        die(report if n else f"{path}: no rows")
    if n > len(demos):
        print(f"warning: {report}")
    others = ", ".join(sorted(columns - used)) or "none"
    print(f"data    {path}: columns {', '.join(sorted(used))}; not used: {others}")
    if changed:
        print(f"warning: the tokenizer changes the text of {changed} of {len(demos)} rows, such as case")
    return demos


def load_tokenizer(path, prompt_template=None):
    """A model's config, its tokenizer with the chat template that --prompt-template becomes, and
    the ids that end a response: the EOS ids of tokenizer, config and generation config, and the
    first added token that the template puts behind a response."""
    config = load(transformers.AutoConfig, path, "config")
    tokenizer = load(transformers.AutoTokenizer, path, "tokenizer")
    sources = [tokenizer, config, config.get_text_config()]
    with suppress(OSError, ValueError):
        sources.append(transformers.GenerationConfig.from_pretrained(path))
    listed = [getattr(source, "eos_token_id", None) for source in sources]  # id, ids or None
    eos_ids = {i for ids in listed for i in (ids if isinstance(ids, list) else [ids])} - {None}
    if prompt_template:  # becomes a chat template, so that it is saved with the model
        text = prompt_template.replace("\\n", "\n").replace("\\t", "\t")
        if tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
            text = tokenizer.bos_token + text.removeprefix(tokenizer.bos_token)
        text = json.dumps(text, ensure_ascii=False).replace("{prompt}", '" ~ messages[0].content ~ "')
        one = "{% if messages[0].role == 'user' and not messages[2:] %}{{ " + text + " }}"
        refuse = "{{ raise_exception('--prompt-template has room for one question and its answer') }}"
        one += "{{ messages[1].content if messages[1:] }}{% else %}" + refuse + "{% endif %}"
        tokenizer.chat_template = one
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "z?"}]
    with suppress(TemplateError, TypeError, ValueError):  # no template, or it refuses these turns
        text = tokenizer.apply_chat_template(turns, tokenize=False).partition("z?")[2]
        end, added = tokenizer.encode(text, add_special_tokens=False), tokenizer.added_tokens_decoder
        # Such as <|im_end|> of a base model whose EOS is <|endoftext|>. Blanks may be added, too.
        eos_ids.update([i for i in end if i in added and added[i].content.strip()][:1])
    return config, tokenizer, eos_ids


def read_data(args):
    """What --model says of its tokens, and the encoded rows of --data, --dev and --heldout: Data."""
    transformers.logging.disable_progress_bar()
    if args.data == f"{TOY}/demos.jsonl" and Path(args.model).resolve() != TOY / "base":
        print(f"no --data: {args.model} learns the sums of the toy")
    config, tokenizer, eos_ids = load_tokenizer(args.model, args.prompt_template)
    if getattr(config, "quantization_config", None):
        die(f"{args.model} has quantized weights, which cannot be trained: name its full weights")
    if tokenizer.eos_token_id is None or not tokenizer.chat_template:
        die(f"{args.model}: its tokenizer needs EOS, and a chat template or --prompt-template")
    config = config.get_text_config()
    windows = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this all positions change, cached ones too
        windows.append(rope["original_max_position_embeddings"])
    window = min(filter(None, windows), default=math.inf)
    max_new_tokens = args.max_new_tokens or min(512, window) // 2
    room = window - max_new_tokens  # for the prompt
    encode_row = partial(encode, tokenizer=tokenizer, eos_ids=eos_ids, room=room)
    paths = (args.data, args.dev, args.heldout)
    demos, dev, heldout = [read_demos(path, args.split, encode_row) if path else [] for path in paths]
    rows = demos + dev + heldout
    if max(max(row["prompt_ids"] + row["real_ids"]) for row in rows) >= config.vocab_size:
        die(f"{args.model}: the tokenizer has ids beyond the model's {config.vocab_size} embeddings")
    if cut := sum(len(row["real_ids"]) > max_new_tokens for row in rows):
        print(f"warning: {cut} responses of the data are cut at --max-new-tokens {max_new_tokens}")
    for row in rows:
        row["real_ids"] = row["real_ids"][:max_new_tokens]  # without EOS, as a cut sample
    if not args.heldout:
        random.Random(args.seed).shuffle(demos)
        n = min(500, max(1, len(demos) // 10))
        demos, heldout = demos[n:], demos[:n]
        if not demos:
            die(f"{args.data} has one row, but one is held out: give more, or --heldout")
        print(f"no --heldout: {n} demonstrations are held out; the table shows if they are imitated")
    if not all(row["answer"] for row in dev):
        die(f"{args.dev}: every response of a dev problem should end in '#### value'")
    prompts = [{row["prompt"] for row in part} for part in (demos, dev, heldout)]
    if again := sum(map(len, prompts)) - len(set.union(*prompts)):
        print(f"warning: {again} dev or held-out prompts are also trained on, or in both files")
    print(f"data    {len(demos)} demonstrations, up to {max_new_tokens} tokens a response")
    print(f"        {len(dev)} dev and {len(heldout)} held-out problems")
    return Data(tokenizer, eos_ids, max_new_tokens, room, demos, dev, heldout)


# ---- 7. Evaluate --------------------------------------------------------------------------
def final_answer(text):
    """What follows the last '####', as in GSM8K: '#### $1,234.' -> '1234', or None."""
    found = re.findall(r"#{4,}[^\S\n]*\$?((?:(?!####)[^\n])+)", text)
    return found[-1].replace(",", "").strip().rstrip(". ") if found else None


def decode(ids, data):
    """A response's text, without the EOS in which it ends."""
    return data.tokenizer.decode([i for i in ids if i not in data.eos_ids])


def accuracy(policy, problems, temperature, data, args):
    """(share of right answers, or None if a problem has none to compare with; the responses' ids)"""
    prompts, seed = [problem["prompt_ids"] for problem in problems], f"{args.seed} answers"
    options = (data.eos_ids, data.max_new_tokens, temperature, args.sample_batch, seed)
    responses = sample(policy, prompts, *options)
    if not all(problem["answer"] for problem in problems):
        return None, responses
    right = [final_answer(decode(ids, data)) == row["answer"] for ids, row in zip(responses, problems)]
    return fmean(right), responses


def habit_share(responses, data, args):
    """The share of responses, lists of token ids, in which --habit is found."""
    return fmean(re.search(args.habit, decode(ids, data)) is not None for ids in responses)


# dev, greedy, sampled: shares of right answers. nll: nats per token of good responses. habit, length
# (in tokens), ended (with EOS): of sampled responses. All of these but dev: on held-out problems.
# seconds: of the whole stage. The row demos has the habit of --data alone.
TABLE = {"dev": ".1%", "greedy": ".1%", "sampled": ".1%", "habit": ".1%", "nll": ".4f"}
TABLE |= {"length": ".1f", "ended": ".0%", "seconds": ".0f"}


def evaluate(name, policy, seconds, table, data, args):
    """Add a row to the table, save the table, and print an answer to the last held-out prompt."""
    row = {"dev": accuracy(policy, data.dev, 0, data, args)[0] if data.dev else None, "seconds": seconds}
    row["greedy"], greedy = accuracy(policy, data.heldout, 0, data, args)
    row["sampled"], sampled = accuracy(policy, data.heldout, 1, data, args)
    texts = [(problem["prompt_ids"], problem["real_ids"]) for problem in data.heldout]
    row["nll"] = -sum(score(policy, texts, args.micro_batch)) / sum(len(y) for _, y in texts)
    row["habit"] = habit_share(sampled, data, args) if args.habit else None
    row["length"] = fmean(map(len, sampled))
    row["ended"] = fmean(ids[-1] in data.eos_ids for ids in sampled)
    prompt, response = data.heldout[-1]["prompt"], data.tokenizer.decode(greedy[-1])
    print(f"{name}: {prompt[-50:]!r} -> {response!r:.99}")
    table[name] = row
    write(Path(args.out) / "summary.json", json.dumps(table, indent=2))


def print_table(table, out, n):
    """Print the table, of n held-out problems, and how to load the round that is best on dev (the
    last one of equals, or if there is no dev; sft if there are no rounds)."""
    columns = [name for name in TABLE if any(row.get(name) is not None for row in table.values())]
    print("\nheld-out    " + "".join(f"{name:>9}" for name in columns))
    for name, row in table.items():
        cells = ["-" if row.get(key) is None else format(row[key], TABLE[key]) for key in columns]
        print(f"{name:12}" + "".join(f"{cell:>9}" for cell in cells))
    print(f"a share of {n} held-out problems is ± {0.98 / math.sqrt(n):.0%} at most (95%)")
    if {*table} - {"demos", "base"}:
        rounds = [name for name in table if name.startswith("round")] or ["sft"]
        best = max(reversed(rounds), key=lambda name: table[name]["dev"] or 0)
        print(f"\nto load {best}: AutoModelForCausalLM.from_pretrained('{out / best.replace(' ', '_')}')")


# ---- 8. Models and files ------------------------------------------------------------------
def load(auto_class, path, what, **options):
    """auto_class.from_pretrained(path), or one sentence with the library's reason why not."""
    try:
        if find_adapter_config_file(path):
            die(f"{path} has an adapter, which would be ignored: merge it into the weights first")
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001 (the libraries' errors have nothing else in common)
        models = [str(file.parent) for file in Path(path).glob("*/**/config.json")]
        if models and not Path(path, "config.json").exists():
            die(f"{path} is not a model's folder, but it has {', '.join(models[:3])}")
        where = "from there" if Path(path).exists() else "from the Hub; there is no such folder"
        reason = " ".join(str(error.__cause__ or error).split())
        die(f"{path}: no {what} can be loaded {where}: {reason:.400}")


def load_model(path, args):
    """A language model with fp32 weights, in evaluation mode: dropout would blur the log-ratios."""
    if args.device != "cpu":  # sharded or recomputed layers refer to themselves: `del` frees nothing
        gc.collect()
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    # FSDP2: each process has a part of every weight
    options["distributed_config"] = transformers.distributed.DistributedConfig(fsdp_size=WORLD)
    model, info = load(transformers.AutoModelForCausalLM, path, "causal language model", **options)
    if wrong := info["missing_keys"] | info["mismatched_keys"] | info["unexpected_keys"]:
        wrong = ", ".join(sorted(map(str, wrong)))
        die(f"{path}: missing or unused weights, or other sizes than the config's: {wrong:.200}")
    if WORLD > 1:
        model.set_reshard_after_forward(False)  # see sample
    if args.checkpoint_activations:  # transformers' own switch does nothing in evaluation mode
        modules = [*model.get_decoder().modules(), *model.modules()]
        for layer in next(module for module in modules if isinstance(module, torch.nn.ModuleList)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model.eval().to(args.device)


@torch.no_grad()
def try_model(model, demos):
    """Refuse a model for which padding, the cache or other rows of a batch change what it predicts by
    more than 1e-3 nats: `sample` and `response_logps` would be about something else than the model."""
    ids = (8 * (demos[0]["prompt_ids"] + demos[0]["real_ids"]))[:8]
    texts, cache, to_batch = [ids, ids[3:]], None, partial(pad, device=model.device)
    try:
        alone = [model(input_ids=to_batch([text], "right")).logits[0].log_softmax(-1) for text in texts]
        padded = model(input_ids=to_batch(texts, "right"), use_cache=False).logits.log_softmax(-1)
        gaps = [row[: len(logps)] - logps for row, logps in zip(padded, alone)]
        for left in (2, 1, 0):  # tokens to come: first both prompts, then a token each, rows exchanged
            so_far = [text[: len(text) - left] for text in texts]
            mask = to_batch([[1] * len(row) for row in so_far], "left")
            new = to_batch(so_far if cache is None else [row[-1:] for row in so_far], "left")
            logits, cache = next_token_logits(model, new, mask, cache)
            gaps += [row.log_softmax(-1) - logps[-1 - left] for row, logps in zip(logits, alone)]
            cache.reorder_cache(torch.tensor([1, 0], device=model.device))
            texts, alone = texts[::-1], alone[::-1]
        gap = torch.stack([gap.abs().max() for gap in gaps]).max().item()  # nan if one is
    except Exception as error:  # noqa: BLE001 (whatever a model does not take)
        die(f"cannot sample from {model.config.model_type}: {' '.join(str(error).split()):.300}")
    reshard(model)
    if not gap < 1e-3:
        die(f"cannot use {model.config.model_type}: padding or cache move log-probabilities by {gap:.2g}")


def write(file, text):
    """Write a file, which is there whole or not at all, even after kill -9."""
    if RANK == 0:
        Path(f"{file}.partial").write_text(text)
        os.replace(f"{file}.partial", file)


def finish(folder, tokenizer):
    """FOLDER.partial -> FOLDER, which so is there whole or not at all; a resumed run skips its stage."""
    gather()  # each process has saved its part of the weights
    if RANK == 0:
        tokenizer.save_pretrained(folder.with_suffix(".partial"))
        os.replace(folder.with_suffix(".partial"), folder)
    gather()  # all processes can load it


def take_folder(args, default, rows):
    """The flags with --out, which from now on is this run's; by default the first free `default`-N.
    The folder gets args.json, and a checksum of all rows, by which a resumed run knows them again."""
    out, n, digest = args.out, 1, 0
    while RANK == 0 and not out:
        Path(default).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # of two runs at once, one makes the folder
            Path(f"{default}-{n}").mkdir()
            out = f"{default}-{n}"
        n += 1
    args = argparse.Namespace(**vars(args) | {"out": gather(out)[0]})
    if RANK == 0 and not args.resume:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, "args.json").touch(exist_ok=False)  # the same --out for two runs: one fails
    TAKEN.append(args.out)
    write(Path(args.out) / "args.json", json.dumps(vars(args), indent=2))
    for row in rows:
        digest = zlib.crc32(repr(row).encode(), digest)
    file = Path(args.out) / "data.crc32"
    if not file.exists():
        write(file, str(digest))
    elif file.read_text() != str(digest):
        print("warning: the data, or its tokens, are not those with which this run began")
    return args


def log_step(phase, step, steps, metrics, unprinted, args):
    """Write all metrics to metrics.jsonl; print means of the main ones at step 1, each eighth and the last.
    unprinted: the metrics since the last printed line, which are added to and emptied here."""
    if RANK == 0:
        with open(Path(args.out) / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
    unprinted.append(metrics)
    if step in (1, steps) or step % math.ceil(steps / 8) == 0:
        names = [name for name in PRINTED if name in metrics]
        means = [f"  {name} {fmean(one[name] for one in unprinted):6.3f}" for name in names]
        say(f"  {step:4}/{steps}" + "".join(means))
        unprinted.clear()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(parse_args())
    except (KeyboardInterrupt, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        die((str(error) or "stopped") + "".join(f"; to continue: --resume {out}" for out in TAKEN))
    if WORLD > 1:
        dist.destroy_process_group()
