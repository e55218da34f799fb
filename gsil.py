"""GSIL, generalized self-imitation learning (arXiv 2410.10093), in one file.

Aligns a language model from demonstrations alone. Each round the model answers the demonstrations' prompts
itself, then learns to tell the two kinds of answer apart by its own log-ratio: it moves towards what the
demonstrators do and away from what only the model does. For a prompt x, a real response y+ and a generated
one y- ~ pi_t(.|x), pi_t being the policy at the start of round t:

    d(y) = log pi(y|x) - log pi_t(y|x)      summed over the response's tokens
    h(y) = scale * d(y) + shift             the official code's alpha and beta; this beta is not DPO's
    minimise loss(h(y+), h(y-))             logistic, hinge, brier, kliep, lsif or spin: see LOSSES

At its optimum a round reaches pi_t (p/pi_t)^(1/scale) / Z, where p is how the demonstrators write: scale 1
imitates them, scale < 1 goes past them. Differs from the official code, so that real and generated cannot be
told apart by format: ids stay as sampled, one prompt to sample and to train, EOS only where it was sampled;
so that no second model is in memory: log pi_t is computed once, before the round's first step; so that the
negatives are the model's own: sampled at temperature 1, not greedily; and the shift can be learned.

    python gsil.py                                      # the built-in toy, about a minute on two CPU cores
    python gsil.py --model M --data train.jsonl --heldout test.jsonl --lr 1e-5 --scale 0.1     # your own
"""
import argparse
import gc
import json
import math
import os
import random
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean

# Threads that spin while they wait are 10 times slower as soon as another program wants the CPU, too.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.distributed import gather_full_state_dict
from transformers.utils import logging as hf_logging

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace; the defaults suit the built-in toy and were chosen on its dev problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                                     usage="%(prog)s [flags]; --help lists them")
    flag = parser.add_argument
    # data: what is imitated, and what is checked
    flag("--model", default=str(TOY / "base"), help="the start policy: folder or Hub name")
    flag("--data", default=str(TOY / "demos.jsonl"), help=".jsonl .json .csv .parquet or Hub name")
    flag("--split", default="train", help="split of a Hub dataset")
    flag("--dev", help="problems to choose the best round by; checkable answers end in '#### value'")
    flag("--heldout", help="problems for the table, in the same form")
    flag("--prompt-template", help="text with {prompt}, instead of the chat template")
    flag("--max-new-tokens", type=number(int, 1), default=256, help="of any response, real or generated")
    # the method
    flag("--loss", choices=[*LOSSES, "sft"], default="logistic", help="sft: cross-entropy, no samples")
    flag("--scale", type=number(float, above=0), default=0.3, help="1 imitates, smaller goes further past")
    flag("--shift", type=number(float, word="learn"), help="added to h, official: 2; default: learn it")
    flag("--rounds", type=number(int, 0), default=1, help="each samples afresh; 0 only evaluates")
    flag("--epochs", type=number(int, 1), default=2, help="passes over the pairs in a round")
    flag("--samples-per-prompt", type=number(int, 1), default=1, help="pairs per demonstration")
    flag("--temperature", type=number(float, 0), default=1.0, help="of generated responses; 0: greedy")
    flag("--baseline", choices=["sft", "none"], default="sft", help="SFT, same start, at least our compute")
    # the optimizer
    flag("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="official: rmsprop")
    flag("--lr", type=number(float, above=0), default=2e-4, help="peak learning rate; official for 7B: 5e-7")
    flag("--shift-lr", type=number(float, above=0), default=0.02, help="the same for a learned shift")
    flag("--warmup", type=number(float, 0), default=0, help="steps, or below 1 a share of the round's steps")
    flag("--decay", choices=["linear", "cosine", "constant_with_warmup"], default="linear", help="of lr")
    flag("--batch", type=number(int, 1), default=32, help="pairs per step")
    flag("--micro-batch", type=number(int, 1), help="pairs per forward pass: less memory, same gradient")
    flag("--checkpoint-activations", action="store_true", help="compute them twice: less memory, slower")
    flag("--clip", type=number(float, above=0), default=1.0, help="largest gradient norm")
    flag("--seed", type=number(int, 0), default=0, help="of the samples and the order of pairs")
    # the run
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first there is")
    flag("--trust-remote-code", action="store_true", help="run code that comes with the model")
    flag("--sample-batch", type=number(int, 1), default=256, help="prompts sampled, or scored, at a time")
    flag("--out", help="folder for the results; default: the next free runs/gsil-LOSS-N")
    flag("--resume", metavar="DIR", help="continue that run by its own flags; --rounds may be raised")
    return complete(parser.parse_args(argv), parser)


# ---- 1. Sample: what would the model answer itself? --------------------------------------------------------

@torch.no_grad()
def sample(model, prompts, eos_ids, max_new_tokens, temperature, batch, seed):
    """Responses y ~ pi(.|x), the model's plain softmax: a top-k, top-p or penalty it ships is not used.

    prompts: lists of token ids. Returns such lists in the same order; a response ends in one of eos_ids if
    and only if that was sampled, else it has max_new_tokens ids. temperature 0 is greedy. seed: any string.
    """
    responses = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))          # similar lengths together
    for n, rows in enumerate(tqdm(chunks(order, batch), desc="sampling", leave=False, disable=None)):
        generator = torch.Generator(model.device).manual_seed(random.Random(f"{seed} {n}").getrandbits(60))
        ids, mask = collate([([], prompts[i]) for i in rows], model.device, "left")             # (B, P) each
        cache = None                                                            # keys and values so far
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]    # as ids; pads do not count
            with autocast(model):
                out = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                            past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, no_nan(out.logits[:, -1].float())      # (B, V)
            tokens = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator)[:, 0]               # (B,)
            for i, token in zip(rows, tokens.tolist()):
                responses[i].append(token)
            alive = [k for k, i in enumerate(rows) if responses[i][-1] not in eos_ids]
            if not alive:
                break
            if len(alive) < len(rows):                                          # finished rows cost no more
                keep = torch.tensor(alive, device=model.device)
                cache.batch_select_indices(keep)
                rows, tokens, mask = [rows[k] for k in alive], tokens[keep], mask[keep]
            ids = tokens[:, None]                                               # (B, 1): the cache has more
            mask = F.pad(mask, (0, 1), value=True)                              # (B, P + tokens so far)
    return responses


# ---- 2. Log-probs: how likely does a model find a response? ------------------------------------------------

def response_logps(model, pairs):
    """log pi(y|x) in nats, summed over the response's tokens: [(prompt ids, response ids)] -> (B,) float32.

    Padding is on the right and attention is causal: no token sees the pads behind it, no mask is needed.
    """
    ids, mask = collate(pairs, model.device)                            # (B, T), mask is True at responses
    width = ids.shape[1] - min(len(prompt) for prompt, _ in pairs)      # R: only there are responses,
    with autocast(model):                                               # so lm_head runs only there
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]    # (B, R, V)
    ids, mask = ids[:, -width:], mask[:, -width:]                       # (B, R): logits predict the next id
    logps = -F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return torch.where(mask, logps, 0.0).sum(-1)                        # (B,)


# ---- 3. Losses: real or generated? -------------------------------------------------------------------------

H_MAX = 5.0     # at the optimum p/pi_t = e^5 = 148: beyond, exponentials give way to something finite


def tangent_exp(h, limit=H_MAX):
    """exp(h) up to `limit`, its tangent beyond: smooth, convex, finite; the push never fades. Any shape."""
    return torch.exp(h.clamp(max=limit)) * (1 + F.relu(h - limit))


# (h_real, h_generated) -> loss per pair, all (B,). h+ is h_real, h- is h_generated, s the sigmoid; "optimum"
# is the h that minimises the expected loss, p being the demonstrators. spin is arXiv 2401.01335, a baseline.
LOSSES = {
    # -log s(h+) - log s(-h-)           optimum log p/pi_t (the official code calls it Bernoulli)
    "logistic": lambda h_real, h_generated: -F.logsigmoid(h_real) - F.logsigmoid(-h_generated),
    # max(0, 1 - h+) + max(0, 1 + h-)   optimum sign(p - pi_t): which of the two is likelier, not by how much
    "hinge": lambda h_real, h_generated: F.relu(1 - h_real) + F.relu(1 + h_generated),
    # (s(h+) - 1)^2 + s(h-)^2           optimum log p/pi_t
    "brier": lambda h_real, h_generated: (torch.sigmoid(h_real) - 1) ** 2 + torch.sigmoid(h_generated) ** 2,
    # -h+ + exp(h-)                     optimum log p/pi_t; at scale 1 the expected loss is SFT's + constant
    "kliep": lambda h_real, h_generated: -h_real + tangent_exp(h_generated),
    # -exp(h+) + exp(2 h-) / 2          optimum log p/pi_t; held beyond H_MAX, else it could fall for ever
    "lsif": lambda h_real, h_generated:
        -torch.exp(h_real.clamp(max=H_MAX)) + 0.5 * tangent_exp(2 * h_generated, 2 * H_MAX),
    # -log s(h+ - h-)                   optimum log p/pi_t + any constant of the prompt
    "spin": lambda h_real, h_generated: -F.logsigmoid(h_real - h_generated),
}


# ---- 4. One round ------------------------------------------------------------------------------------------

def self_play(policy, run, demos, seed):
    """The pairs of a round: each demonstration beside fresh responses of the policy; log pi_t of both."""
    pairs = [dict(demo) for demo in demos for _ in range(run.samples_per_prompt)]
    responses = respond(policy, [pair["prompt_ids"] for pair in pairs], run, run.temperature, seed)
    for pair, ids in zip(pairs, responses):                                 # y- ~ pi_t(.|x)
        pair |= {"generated": run.tokenizer.decode(ids), "generated_ids": ids}
    for side in ("real", "generated"):      # the reference: once, by the policy itself, without gradient
        for pair, logp in zip(pairs, score(response_logps, policy, texts_of(pairs, side), run)):
            pair[f"{side}_reference"] = logp
    return pairs


def pair_losses(model, pairs, loss, scale, shift):
    """Losses and log-ratios d of real and of generated responses, (B,) each; sft: -log pi, log pi, empty."""
    sides = ("real",) if loss == "sft" else ("real", "generated")
    logps = response_logps(model, sum((texts_of(pairs, side) for side in sides), []))      # (2B,); sft: (B,)
    if loss == "sft":
        return -logps, logps, logps[:0]
    reference = [pair[f"{side}_reference"] for side in sides for pair in pairs]            # (2B,), as logps
    d_real, d_generated = (logps - torch.tensor(reference, device=model.device)).chunk(2)          # (B,) each
    return LOSSES[loss](scale * d_real + shift, scale * d_generated + shift), d_real, d_generated


def train_round(model, pairs, loss, epochs, args, name, seed):
    """Train the policy in place, every pair once an epoch; yields metrics every 16 steps and each epoch."""
    model.eval()                            # no dropout: log-ratios must be 0 before the first step
    shard(model)
    recompute(model, args)
    learned = args.shift == "learn"
    shift = torch.tensor(0.0 if learned else args.shift, device=model.device, requires_grad=learned)
    groups = [{"params": list(model.parameters())}, {"params": [shift], "lr": args.shift_lr}]
    per_epoch, step, seconds = math.ceil(len(pairs) / args.batch), 0, 0.0
    steps = round(epochs * per_epoch)
    optimizer, schedule = make_optimizer(groups, args.lr, steps, args)
    for epoch in range(1, math.ceil(epochs) + 1):
        order = random.Random(f"{seed} {epoch}").sample(pairs, len(pairs))
        for batch in chunks(order, args.batch)[:steps - step]:          # IRFT may end within an epoch
            total, real, generated, began = 0.0, [], [], time.time()
            # the loss is a mean over pairs; for sft over tokens, as cross-entropy usually is
            weight = sum(len(pair["real_ids"]) for pair in batch) if loss == "sft" else len(batch)
            for part, count in micro_batches(batch, args.micro_batch):
                losses, d_real, d_generated = pair_losses(model, part, loss, args.scale, shift)
                mean = losses[:count].sum() / weight                # parts add up to the mean of the batch
                (mean * ranks()[1]).backward()                      # and gradients become means over ranks
                total += mean.item()
                real, generated = real + d_real[:count].tolist(), generated + d_generated[:count].tolist()
            total, real, generated = added_up(total, real, generated)
            norm = clip_gradients(model, args.clip, shift)
            check_step(model, batch, name, step, total, norm, loss, args.scale, shift.detach())
            optimizer.step()                # after the check: a bad step cannot be undone
            optimizer.zero_grad()
            step, seconds = step + 1, seconds + time.time() - began
            if step % 16 == 0 or step % per_epoch == 0 or step == steps:
                pairwise = {} if loss == "sft" else {"generated": fmean(generated), "shift": shift.item(),
                                                     "accuracy": fmean(map(float.__gt__, real, generated))}
                yield {"phase": name, "step": step, "steps": steps, "epoch": step / per_epoch,
                       "loss": total, "real": fmean(real), **pairwise, "grad_norm": norm,
                       "lr": schedule.get_last_lr()[0], "seconds": seconds}
                seconds = 0.0
            schedule.step()


# ---- 5. The whole method -----------------------------------------------------------------------------------

def main(args):
    """Base, rounds, SFT baseline; returns what summary.json holds: the table's rows, the best round."""
    run, policy = start(args, f"gsil-{args.loss}")
    write(run.out / "args.json", [vars(args)])          # nothing is written before all input has been read
    evaluate(run, "base", policy)
    for t in range(1, args.rounds + 1):
        name, seed, folder = f"round {t}", f"{args.seed} round {t}", run.out / f"round_{t}"
        if not folder.exists():             # a resumed run may have this round behind it
            pairs = run.demos if args.loss == "sft" else keep_pairs(policy, run, name, t, run.demos, seed)
            for record in train_round(policy, pairs, args.loss, args.epochs, args, name, seed):
                log(run, record)
            save_model(policy, run.tokenizer, folder)
        del policy                          # the next one needs the room
        policy = load_model(folder, run.device, run.trust_remote_code)
        evaluate(run, name, policy)
    if args.baseline == "sft" and args.loss != "sft" and args.rounds:
        del policy
        sft_baseline(run, 3 * args.epochs * args.rounds * args.samples_per_prompt)      # 3: 2 sides, samples
    return summarize(run)


# ---- PLUMBING: the method can be understood without it -----------------------------------------------------

def die(sentence):
    """A person's mistake: one sentence on stderr, exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)

def number(kind, low=-math.inf, above=-math.inf, word=None):
    """argparse type: a finite int or float, >= low and > above; or this word."""
    def parse(text):
        if text != word and not (abs(kind(text)) < math.inf and kind(text) >= low and kind(text) > above):
            raise ValueError
        return text if text == word else kind(text)
    limits = {f">= {low}": low > -math.inf, f"> {above}": above > -math.inf, f"or {word}": word}
    # argparse puts the name into its sentence: invalid int >= 1 value: '0'
    parse.__name__ = " ".join([kind.__name__, *(limit for limit, given in limits.items() if given)])
    return parse

def complete(args, parser):
    """Defaults that depend on other flags; with --resume, the flags of that run."""
    if args.resume:
        return resumed(args, parser)
    if args.data == parser.get_default("data"):             # the toy's problems go with its demonstrations
        args.dev, args.heldout = args.dev or f"{TOY}/dev.jsonl", args.heldout or f"{TOY}/heldout.jsonl"
    if args.shift is None:
        args.shift = 0.0 if args.loss in ("spin", "sft") else "learn"
    elif args.shift == "learn" and args.loss in ("spin", "sft"):
        parser.error(f"--shift learn: a shift changes nothing in --loss {args.loss}, so it cannot be learned")
    return args

def resumed(args, parser):
    """The flags of the run that --resume names; only --rounds may be raised."""
    saved = read(Path(args.resume) / "args.json")
    if not saved:
        parser.error(f"--resume {args.resume}: no args.json there, so it is not the folder of a run")
    if {*saved[0]} != {*vars(args)}:
        parser.error(f"--resume {args.resume}: a run of another script, or of another version of this one")
    # A flag at its default was most likely not given, so it is no contradiction to that run.
    own = [k for k, v in vars(args).items() if v not in (saved[0].get(k), parser.get_default(k))]
    if own := {*own} - {"resume", "rounds"}:
        parser.error(f"--resume goes on with the flags of that run; these are others: {', '.join(own)}")
    rounds = max(args.rounds, saved[0]["rounds"])
    return argparse.Namespace(**saved[0] | {"resume": args.resume, "rounds": rounds})

def chunks(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]

def autocast(model):
    """bf16 matrix products over the fp32 weights on CUDA, plain fp32 elsewhere."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")

def collate(pairs, device, side="right"):
    """[([5, 6], [7, 2]), ([5], [9])] -> ids [[5, 6, 7, 2], [5, 9, 0, 0]], mask [[0, 0, 1, 1], [0, 1, 0, 0]].

    Both (B, T), long and bool. The mask comes from lengths: a pad id that is also EOS or a word does no harm.
    """
    ids = [torch.tensor(prompt + response) for prompt, response in pairs]
    mask = [torch.tensor([False] * len(prompt) + [True] * len(response)) for prompt, response in pairs]
    return [pad_sequence(rows, batch_first=True, padding_side=side).to(device) for rows in (ids, mask)]

def texts_of(pairs, side):
    """[(prompt ids, that side's response ids)], as response_logps takes them; side: "real" or "generated"."""
    return [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]

@torch.no_grad()
def score(measure, model, texts, args):
    """measure(model, [(prompt ids, response ids)]) in batches of similar length: floats, same order."""
    batch = 2 * args.micro_batch if args.micro_batch else args.sample_batch     # 2: in training both sides
    def of_share(texts, _):
        values, order = [0.0] * len(texts), sorted(range(len(texts)), key=lambda i: len(sum(texts[i], [])))
        for rows in tqdm(chunks(order, batch), desc="scoring", leave=False, disable=None):
            for i, value in zip(rows, measure(model, [texts[i] for i in rows]).tolist()):
                values[i] = value
        return values
    return shared_out(texts, of_share)

def respond(policy, prompts, run, temperature, seed):
    """One response to each of the prompts, every rank sampling its share."""
    sharded = isinstance(policy, FSDPModule)
    if sharded:                             # weights stay, once gathered: no rank waits for another's tokens
        policy.set_reshard_after_forward(False)
    responses = shared_out(prompts, lambda share, rank: sample(
        policy, share, run.eos_ids, run.max_new_tokens, temperature, run.sample_batch, seed + rank))
    if sharded:
        policy.set_reshard_after_forward(True)
    return responses

# Under torchrun every rank runs this file; these make one run of them. Without it they do nothing.

def ranks():
    """(number of this process, how many there are); without torchrun (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def shared_out(items, function):
    """function(a share of items, name of this rank) on every rank -> all results, in order, on every rank.

    Shares are equally long, so that all ranks call a sharded model equally often: a short one gets one of
    the first items again, whose result is dropped. The name is "" on rank 0: one process keeps its seeds.
    """
    rank, world = ranks()
    if world == 1:
        return function(items, "")
    share = [items[i % len(items)] for i in range(rank, world * math.ceil(len(items) / world), world)]
    parts = [None] * world                  # dealt out like cards: rank r has the items r, r + world, ...
    dist.all_gather_object(parts, function(share, f" rank {rank}" * (rank > 0)))
    return [parts[i % world][i // world] for i in range(len(items))]

def micro_batches(batch, size):
    """This rank's share of a batch, `size` at a time: [(pairs, how many of them count)]; as many parts on
    every rank. size None: all at once."""
    rank, world = ranks()
    if size or world > 1:                   # similar lengths together: less padding, equal work
        batch = sorted(batch, key=lambda pair: len(pair["prompt_ids"]) + max(
            len(pair["real_ids"]), len(pair.get("generated_ids", ()))))
    share = batch[rank::world]
    excess = math.ceil(len(batch) / world) - len(share)         # 1 where the last round of cards went short
    parts = chunks(share + batch[:1] * excess, size or len(batch))
    return [(part, len(part) - excess * (part is parts[-1])) for part in parts]

def added_up(*values):
    """Numbers, or lists, of all ranks in one: [total, list, ...], the same on every rank."""
    parts = [values] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, values)
    return [sum(column[1:], column[0]) for column in zip(*parts)]

def clip_gradients(model, limit, *others):
    """The gradients' mean over ranks, where FSDP has not taken it already; clips the model's: their norm."""
    world = ranks()[1]
    for weight in (*model.parameters(), *others) if world > 1 else ():
        if weight.requires_grad and not hasattr(weight, "full_tensor"):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad / world
            dist.all_reduce(weight.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return (norm.full_tensor() if isinstance(model, FSDPModule) else norm).item()

def shard(model):
    """Spread weights, and so gradients and optimizer, over the ranks, in place: FSDP2, layer by layer."""
    if ranks()[1] > 1:
        kind = type(model)
        mesh = dist.init_device_mesh(model.device.type, (ranks()[1],))
        for part in (*layers_of(model), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)    # the root, too: by default it stays
        # FSDP makes a class of its own; saved as that, a model with its own code could not be loaded.
        type(model).__module__, type(model).__name__ = kind.__module__, kind.__name__

def layers_of(model):
    """The transformer's layers: the first list of modules in a decoder."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))

def recompute(model, args):
    """--checkpoint-activations: a layer keeps its input only, the rest is computed again going backward."""
    for layer in layers_of(model) if args.checkpoint_activations else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

def make_optimizer(groups, lr, steps, args):
    """AdamW or RMSprop without weight decay, and its schedule."""
    make = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[args.optimizer]
    optimizer = make(groups, lr=lr, weight_decay=0)
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * steps)
    return optimizer, get_scheduler(args.decay, optimizer, num_warmup_steps=warmup, num_training_steps=steps)

def no_nan(logits):
    if logits.isnan().any():                # their argmax would be taken for a response
        die("the model's logits are NaN: its weights are broken; start anew with a lower learning rate")
    return logits

def check_finite(where, loss, norm, remedy, worst=lambda: ""):
    if not math.isfinite(loss + norm):
        die(f"{where}: loss {loss}, gradient {norm}{worst()}; finished rounds are safe; {remedy}")

@torch.no_grad()
def worst_pair(model, batch, *how):
    """In words, the pair with the largest log-ratios (sft: log-probs), NaN being the largest of all."""
    ratios = [sum((d.tolist() for d in pair_losses(model, [pair], *how)[1:]), []) for pair in batch]
    sizes = [max(math.inf if math.isnan(d) else abs(d) for d in both) for both in ratios]
    worst = sizes.index(max(sizes))
    lengths = [len(batch[worst][key]) for key in ("real_ids", "generated_ids") if key in batch[worst]]
    return f"; worst pair: {batch[worst]['prompt']!r:.200}, log-ratios {ratios[worst]}, lengths {lengths}"

def check_step(model, batch, name, step, total, norm, loss, scale, shift):
    """Stop before a bad step: numbers not finite, or a first loss that is not that of policy == reference."""
    check_finite(f"{name}, step {step + 1}", total, norm, "lower --lr, or --scale if log-ratios are large",
                 lambda: worst_pair(model, batch, loss, scale, shift))
    expected = total if loss == "sft" or step else LOSSES[loss](shift, shift).item()
    # In bf16 a log-prob depends a little on what else is in the batch.
    if abs(total - expected) > (0.1 if model.device.type == "cuda" else 0.01) * max(1, abs(expected)):
        die(f"{name}: policy and reference disagree: first loss {total:.4f}, it should be {expected:.4f}")

# Columns of the prompt and of the response: of these pairs, the first whose columns all exist. Without one of
# the prompt, the response is a list of messages or an HH transcript, and its last assistant turn is imitated.
FORMATS = [("prompt", "chosen"), (None, "chosen"), ("prompt", "response"), ("prompt", "completion"),
           ("question", "answer"), ("instruction", "output"), (None, "real"), (None, "messages"),
           (None, "conversations")]
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}

def read_rows(name, split):
    """Yield (place, row) of a file or Hub dataset: place is what an error names, row a dict of columns."""
    kind = Path(name).suffix[1:] if Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet") else None
    if kind and not Path(name).is_file():
        die(f"{name}: no such file")
    if kind == "jsonl":
        # bytes, cut at \n alone: a text may contain characters at which str.splitlines would cut, too
        for n, line in enumerate(Path(name).read_bytes().split(b"\n"), 1):
            try:
                if line.strip():
                    yield f"{name} line {n}", json.loads(line)
            except ValueError as error:
                die(f"{name} line {n}: not JSON ({getattr(error, 'msg', error)}); a .jsonl file has one "
                    "object on each line, in UTF-8")
        return
    import datasets                         # slow, and a .jsonl file does not need it
    source = {"path": kind, "data_files": name, "split": "train"} if kind else {"path": name, "split": split}
    try:
        yield from ((f"{name} row {n}", row) for n, row in enumerate(datasets.load_dataset(**source), 1))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        die(f"{name}, split {source['split']}: {str(error.__cause__ or error).splitlines()[0]}; take a local "
            ".jsonl, .json, .csv or .parquet file, or with a network the name of a dataset on the Hub")

def to_messages(place, row):
    """A row in any of FORMATS -> messages, dicts with role and content, the last one by the assistant."""
    columns = [pair for pair in FORMATS if isinstance(row, dict) and {*pair} - {None} <= {*row}]
    if not columns:
        die(f"{place}: found {', '.join(row) if isinstance(row, dict) else row!r}; accepted are the columns "
            + "; ".join(" + ".join(filter(None, pair)) for pair in FORMATS))
    before, after = columns[0]              # names of columns
    prompt, turns = row.get(before), row[after]
    if before == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    if isinstance(turns, str) and not before:               # HH: "\n\nHuman: ...\n\nAssistant: ..."
        parts = re.split(r"\n\n(Human|Assistant):", turns)[1:]
        turns = [{"from": who, "value": text.strip()} for who, text in zip(parts[::2], parts[1::2])]
    elif not isinstance(turns, list):
        turns = [{"role": "assistant", "content": turns}]

    def message(turn):                      # two conventions; what is neither is caught below
        turn = turn if isinstance(turn, dict) else {}
        return {"role": ROLES.get(turn.get("from"), turn.get("role", turn.get("from"))),
                "content": turn.get("value", turn.get("content"))}

    turns = [message(turn) for turn in turns]
    while turns and turns[-1]["role"] != "assistant":       # the last assistant turn is the response
        turns.pop()
    if before and len(turns) == 1:          # else the conversation in the column has its prompt in it
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = [message(turn) for turn in prompt] + turns
    if len(turns) < 2 or not all(turn["role"] and isinstance(turn["content"], str) and turn["content"].strip()
                                 for turn in turns):
        die(f"{place}: {' and '.join(filter(None, columns[0]))} must hold a prompt and, by the assistant, a "
            "response, both text, not empty")
    return turns

def read_demos(name, rows, tokenizer, eos_ids, window, args):
    """Rows -> dicts with prompt, response (text), prompt_ids, real_ids (EOS included), answer (or None)."""
    demos = []
    for place, row in rows:
        turns = to_messages(place, row)
        try:
            prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            both = tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            die(f"{place}: the chat template refuses this conversation: {error}; see --prompt-template")
        if not both.startswith(prompt) or args.prompt_template and len(turns) > 2:
            die(f"{place}: the template changes the prompt once it is answered, or lacks room for all turns")
        # One string is encoded, then cut: some tokenizers treat the start of a string in a way that the model
        # would not. Only where a token would span the cut is the response encoded alone.
        prompt_ids, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, both))
        if ids[:len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + tokenizer(both[len(prompt):], add_special_tokens=False).input_ids
        real_ids = ids[len(prompt_ids):] + [tokenizer.eos_token_id]
        end = next(i for i, token in enumerate(real_ids) if token in eos_ids)       # nothing behind EOS
        if len(prompt_ids) + args.max_new_tokens > window:
            die(f"{place}: {len(prompt_ids)} prompt tokens + --max-new-tokens exceed the window of {window}")
        demos.append({"prompt": prompt, "response": turns[-1]["content"], "prompt_ids": prompt_ids,
                      "real_ids": real_ids[:end + 1][:args.max_new_tokens],
                      "answer": final_answer(turns[-1]["content"])})
    cut = sum(demo["real_ids"][-1] not in eos_ids for demo in demos)
    print(f"{name}: {len(demos)} rows" + f", {cut} cut at --max-new-tokens {args.max_new_tokens}" * (cut > 0))
    return demos or die(f"{name}: no rows")

def start(args, label):
    """Device, model, data, folder; prints the header. Returns what all phases need, and the policy."""
    hf_logging.disable_progress_bar()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():            # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if ranks()[0] == 0 else open(os.devnull, "w")       # one of them speaks
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    if device not in ("cpu", best):
        die(f"--device {device}: PyTorch finds none here, the best is {best}")
    policy = load_model(args.model, device, args.trust_remote_code)
    tokenizer = load(AutoTokenizer, args.model, args.trust_remote_code)
    print(f"{args.model}: {sum(p.numel() for p in policy.parameters()):,} parameters, {device} (--device "
          f"{args.device}), fp32 weights{', bf16 autocast' if device == 'cuda' else ''}"
          f"{f', {ranks()[1]} processes' * (ranks()[1] > 1)}")
    listed = policy.generation_config.eos_token_id              # an id, a list of ids or None
    eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if args.prompt_template:                                    # becomes, and is saved as, the chat template
        if "{prompt}" not in args.prompt_template:
            die(f"--prompt-template {args.prompt_template!r}: where the prompt goes it has to say {{prompt}}")
        bos = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
        template = args.prompt_template.replace("{prompt}", "{{ messages[0].content }}")
        tokenizer.chat_template = bos + template + "{{ messages[1].content if messages[1:] }}"
    if tokenizer.eos_token_id is None or not tokenizer.chat_template:
        die(f"--model {args.model}: the tokenizer lacks an EOS token, or a chat template: --prompt-template")
    window = getattr(policy.config, "max_position_embeddings", None) or math.inf        # in tokens
    demos, dev, heldout = [
        path and read_demos(path, read_rows(path, args.split), tokenizer, eos_ids, window, args)
        for path in (args.data, args.dev, args.heldout)]
    known = {demo["prompt"] for demo in demos}
    for path, problems in ((args.dev, dev), (args.heldout, heldout)):
        if both := sum(problem["prompt"] in known for problem in problems or []):
            print(f"warning: {both} of the {len(problems)} prompts in {path} are in {args.data}, too")
    args.out = args.resume or args.out or next(
        path for n in range(1, 10 ** 6) if not Path(path := f"runs/{label}-{n}").exists())
    out = Path(args.out)
    if out.exists() and any(out.iterdir()) and not args.resume:
        die(f"--out {out} is not empty; name another folder, or continue that run with --resume {out}")
    if dist.is_initialized():
        dist.barrier()                      # nobody writes before all have looked
    # A resumed run forgets what an interrupted phase has logged: it happens again. So does the SFT baseline.
    records = [record for record in read(out / "metrics.jsonl") if record["phase"] == "base"
               or (out / f"round_{record['phase'].split()[-1]}").exists()]
    return argparse.Namespace(**vars(args) | {
        "out": out, "device": device, "tokenizer": tokenizer, "eos_ids": eos_ids, "window": window,
        "demos": demos, "dev": dev, "heldout": heldout, "records": records}), policy

def load(kind, path, trust, what="a tokenizer", **more):
    """kind.from_pretrained(path), or a sentence about what is wrong there."""
    try:
        return kind.from_pretrained(path, trust_remote_code=trust, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        die(f"{path}: not {what}: {str(error).strip().splitlines()[0]}; take a folder (a run's round_1) "
            "or with a network a Hub name, with config.json, .safetensors, tokenizer; --trust-remote-code if "
            "there is code in it")

def load_model(path, device, trust=False):
    """A causal language model with fp32 weights; pickles, which can run anything, are not read."""
    if device != "cpu":                     # FSDP, and layers that recompute, refer to themselves: Python
        gc.collect()                        # would free them some day, and knows nothing of a GPU's memory
    # A weight that the file lacks would be random without a word; one that is NaN would be found much later.
    model, info = load(AutoModelForCausalLM, path, trust, "a causal language model", dtype=torch.float32,
                       use_safetensors=True, output_loading_info=True)
    if bad := [*info["missing_keys"], *(k for k, w in model.named_parameters() if not w.isfinite().all())]:
        die(f"{path}: weights that are missing or not finite numbers: {', '.join(sorted(bad)):.200}")
    return model.to(device).eval()

def save_model(model, tokenizer, folder):
    """HF format, written beside its place and moved there when complete, with the samples of the round."""
    unfinished = folder.with_name(folder.name + ".partial")
    state = gather_full_state_dict(model) if isinstance(model, FSDPModule) else None        # {} but on rank 0
    if ranks()[0] == 0:
        model.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        settle(unfinished, folder)
    if dist.is_initialized():
        dist.barrier()

def write(path, rows):
    """One JSON object a line; the file is there whole or not at all."""
    if ranks()[0]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settle(unfinished, path)

def settle(unfinished, path):
    """Rename a file or folder that is complete, and on the disk: not even a power cut leaves half of it."""
    for file in filter(Path.is_file, (unfinished, *unfinished.rglob("*"))):
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
    os.replace(unfinished, path)

def read(path):
    """The rows that `write` wrote, if any; a last line that was cut off, as by copying, is dropped."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    if rest:
        print(f"{path}: dropped its last line, which is unfinished")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        die(f"{path}: line {len(lines)} or before is not JSON ({error}); delete the file")

def keep_pairs(policy, run, name, t, demos, seed):
    """The pairs of round t from their file, which a resumed run may have; else made, and written there."""
    file, began = run.out / f"round_{t}.partial" / "generated.jsonl", time.time()
    pairs = read(file)                      # training changes nothing in them, so they can be used again
    if len(pairs) != len(demos) * run.samples_per_prompt:
        pairs = self_play(policy, run, demos, seed)
        write(file, pairs)
    origin = f"round_{t - 1}" if t > 1 else run.model       # one model in three roles
    same = fmean(pair["real_ids"] == pair["generated_ids"] for pair in pairs)
    log(run, {"phase": name, "start": origin, "negatives from": origin, "reference": origin,
              "pairs": len(pairs), "identical": same, "seconds": time.time() - began})
    return pairs

def log(run, record):
    """Add to metrics.jsonl and print in one line, but for a row, which comes in the table."""
    run.records.append(record)
    write(run.out / "metrics.jsonl", run.records)
    shown = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value!r}"
             for key, value in record.items() if key not in ("phase", "row")]
    print(f"{record['phase']}: {', '.join(shown)}", flush=True)

def final_answer(text):
    """GSM8K's convention: what follows '####' on its line, without $ and commas; None without '####'."""
    found = re.search(r"####[ $]*([^\n]+)", text)
    return found and found[1].replace(",", "").strip(" .")

def answers(run, policy, problems, temperature):
    """One response each: (share of right ones, None unless all problems have a '####' answer; token ids)."""
    prompts = [problem["prompt_ids"] for problem in problems]
    ids = respond(policy, prompts, run, temperature, f"{run.seed} answers")
    said = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
    right = [final_answer(text) == problem["answer"] for text, problem in zip(said, problems)]
    return fmean(right) if all(problem["answer"] for problem in problems) else None, ids

COLUMNS = {"greedy_accuracy": "greedy", "sampled_accuracy": "sampled", "n": "n", "heldout_nll": "NLL",
           "mean_response_tokens": "tokens", "eos_share": "EOS", "seconds": "seconds"}  # summary.json: screen

def evaluate(run, name, policy):
    """Log a row of the table, unless a resumed run has it, and the greedy response to the first prompt."""
    if any(record["phase"] == name and "row" in record for record in run.records):
        return
    row, problems = {"name": name} | dict.fromkeys(COLUMNS), run.heldout or run.demos[:1]   # to say something
    greedy, first = answers(run, policy, problems, 0)
    if run.heldout:
        sampled, ids = answers(run, policy, problems, 1)
        tokens = sum(len(problem["real_ids"]) for problem in problems)
        nll = -sum(score(response_logps, policy, texts_of(problems, "real"), run)) / tokens
        row |= zip(COLUMNS, [greedy, sampled, len(ids), nll, fmean(map(len, ids)),
                             fmean(response[-1] in run.eos_ids for response in ids)])
    row["seconds"] = sum(record.get("seconds", 0) for record in run.records if record["phase"] == name)
    log(run, {"phase": name, "row": row, "dev_accuracy": run.dev and answers(run, policy, run.dev, 0)[0],
              "says": run.tokenizer.decode(first[0])})
    for sentence in warnings(run.records) if name != "sft" else []:
        print(f"warning, {name}: {sentence}")

def sft_baseline(run, epochs):
    """SFT from the same start; its best epoch on dev, without --dev the last."""
    policy, best = load_model(run.model, run.device, run.trust_remote_code), -1
    # Records come every 16 steps, too; between epochs the generator waits, and the policy can be asked.
    for record in train_round(policy, run.demos, "sft", epochs, run, "sft", f"{run.seed} sft"):
        if record["epoch"] % 1 == 0:
            record["dev_accuracy"] = dev = run.dev and answers(run, policy, run.dev, 0)[0]
            if dev is None or dev > best:
                best = dev
                save_model(policy, run.tokenizer, run.out / "sft")
        log(run, record)
    del policy
    evaluate(run, "sft", load_model(run.out / "sft", run.device, run.trust_remote_code))

def warnings(records):
    """What these records of metrics.jsonl show of the last round that a person should know: sentences."""
    rounds = [record for record in records if "row" in record and record["phase"] != "sft"]
    before, now = (rounds * 2)[-2:]         # of a single one, itself
    ours = [record for record in records if record["phase"] == now["phase"]]
    real, found = [record["real"] for record in ours if "generated" in record], []
    # The last quarter of the round against its first half; a nat is more than noise.
    if len(real) >= 4 and fmean(real[-(len(real) // 4):]) < min(-1, fmean(real[:len(real) // 2])):
        found.append("real responses keep getting less likely: lower --lr, larger --scale, or GSIL's kliep")
    if any(record.get("identical", 0) > 0.5 for record in ours):
        found.append("most samples equal the demonstration: little is left to learn")
    if (now["row"]["eos_share"] or 0) < (before["row"]["eos_share"] or 0) - 0.1:
        found.append("fewer responses end in EOS: are demonstrations cut? raise --max-new-tokens")
    if (now["dev_accuracy"] or 0) < (before["dev_accuracy"] or 0) - 0.03:
        found.append("the round lost on dev, it over-corrects: fewer rounds, epochs; larger --scale or --kl")
    return found

def summarize(run):
    """Print the table, write summary.json: its rows, and the round best on dev (without --dev the last)."""
    done = [record for record in run.records if "row" in record]
    rounds = [record for record in done if record["phase"] not in ("base", "sft")][::-1]    # latest first
    best = max(rounds, key=lambda record: record["dev_accuracy"] or 0, default={"phase": None})["phase"]
    summary = {"rows": [record["row"] for record in done], "best": best}
    write(run.out / "summary.json", [summary])
    print(f"\n{'':10}" + "".join(f"{title:>10}" for title in COLUMNS.values()))
    for row in summary["rows"]:
        cells = ("-" if row[key] is None else f"{row[key]:.3g}" for key in COLUMNS)
        print(f"{row['name']:10}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"best round: {best}; results in {run.out}")
    return summary


def run_safely(main, args):
    """main(args); Ctrl-C, a full disk, a folder that cannot be written end in a sentence on how to go on."""
    try:
        return main(args)
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        begun = args.out and os.path.exists(f"{args.out}/args.json")
        python = "torchrun ..." if "LOCAL_RANK" in os.environ else "python"
        how = f"go on with: {python} {sys.argv[0]} --resume {args.out}" if begun else "nothing is written yet"
        print(f"error: {str(error) or 'stopped'}; {how}", file=sys.stderr)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2)


if __name__ == "__main__":
    run_safely(main, parse_args())
    if dist.is_initialized():
        dist.destroy_process_group()
