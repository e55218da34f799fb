"""RFT and IRFT, reward learning from demonstrations (arXiv 2405.17888), in one file.

Which reward explains the demonstrations? One under which they are better than anything the model
would write itself: maximum-likelihood inverse reinforcement learning, over rewards r and policies pi,

    min over r, max over pi of   E_pi[r(x, y)] - kl KL(pi || pi_ref) - E_demonstrations[r(x, y)]

whose inner optimum is pi_ref exp(r/kl) / Z. RFT (Algorithm 1) keeps r in a reward model of its own. In
a round the policy answers the demonstrations' prompts; the reward learns to put the demonstration y+
above that answer y-; the policy improves on r - kl log pi/pi_ref, pi_ref being the policy at the very
start. IRFT (Algorithm 2) has no reward model: its reward is scale log pi/pi_ref, pi_ref being the policy
at the start of a chunk of the demonstrations; its loss -log s(scale (d(y+) - d(y-))) is SPIN's.

One round fitted to its optimum is pi_ref (p/pi_ref)^(1/kl) / Z for RFT, and with scale in the place of
kl for IRFT and GSIL; p is how the demonstrators write. So 1 imitates them, less than 1 goes past them.
RFT holds three models: policy, start policy, reward. Unlike in the official code, token ids stay as
sampled, and the reward is read at a response's last token in training and in use.

    python irft.py                         # RFT on the built-in toy, a minute on two CPU cores
    python irft.py --method irft --chunks 5
    python irft.py --preferences tests/toy/preferences.jsonl --preference-weight 0.5
"""

import argparse
import csv
import gc
import io
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

import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, get_scheduler
from transformers.cache_utils import DynamicCache
from transformers.distributed import gather_full_state_dict
from transformers.models.auto import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace, never written to later. The defaults were chosen on the toy's dev problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.usage = "%(prog)s [--FLAG VALUE ...]; --help explains the flags"
    flag = parser.add_argument_group("both methods").add_argument
    flag("--method", choices=["rft", "irft"], default="rft", help="explicit or implicit reward")
    flag("--model", default=f"{TOY}/base", help="start model: a folder or a Hub name")
    flag("--data", default=f"{TOY}/demos.jsonl", help=".jsonl .json .csv .parquet or a Hub name")
    flag("--split", default="train", help="split of a Hub dataset")
    flag("--dev", help="chooses SFT's epoch and the best round; answers end in '#### value'")
    flag("--heldout", help="good answers, for the table; if not given, a tenth of --data")
    flag("--prompt-template", help="text with {prompt} in it, instead of a chat template")
    flag("--max-new-tokens", type=int, help="longest response; if not given, 256 or what fits")
    flag("--temperature", type=float, default=1.0, help="of the pairs' samples; 0: greedy")
    flag("--baseline", choices=["sft", "none"], default="sft", help="SFT for comparison")
    flag("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="the paper: rmsprop")
    flag("--lr", type=float, default=2e-4, help="of IRFT and SFT: peak, for the toy; paper, 7B: 5e-7")
    flag("--warmup", type=int, default=0, help="steps in which lr rises; then it falls to 0")
    flag("--batch", type=int, default=32, help="pairs per step; larger: steadier, fewer steps")
    flag("--micro-batch", type=int, help="tokens per pass; not given: 512 on a CPU, 8192 on a GPU")
    flag("--checkpoint-activations", action="store_true", help="saves memory, a third slower")
    flag("--clip", type=float, default=1.0, help="largest gradient norm; lower: slower, steadier")
    flag("--lora-rank", type=int, help="rank of LoRA, which then trains alone; the paper: 64")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first there is")
    flag("--sample-batch", type=int, default=256, help="responses at a time; larger: faster, more memory")
    flag("--seed", type=int, default=0, help="of the samples and of the order of pairs")
    flag("--out", help="folder of the results; if not given, the next free runs/irft-METHOD-N")
    flag("--resume", metavar="DIR", help="continue that run; only --rounds may be raised")
    irft = parser.add_argument_group("--method irft")
    flag = irft.add_argument
    flag("--chunks", type=int, default=1, help="parts of the data, one after the other; 1: SPIN")
    flag("--loss", choices=[*LOSSES], default="spin", help="linear: the paper's raw gradient")
    flag("--scale", type=float, default=0.3, help="1 imitates, smaller goes further past")
    flag("--epochs", type=int, default=2, help="passes over the pairs; more: closer fit, overfitting")
    rft = parser.add_argument_group("--method rft")
    flag = rft.add_argument
    flag("--rounds", type=int, default=1, help="each samples afresh; above 1 take a kl near 1")
    flag("--reward-model", help="what the reward starts from, if not --model; same tokenizer")
    flag("--reward-loss", choices=[*REWARD_LOSSES], default="logistic", help="linear: the raw gradient")
    flag("--reward-steps", type=int, default=64, help="few: a vague reward, many: it overfits")
    flag("--reward-lr", type=float, default=1e-3, help="peak, for the toy; the paper: 1e-6")
    flag("--reward-penalty", type=float, default=0.01, help="times r^2; much: a flat reward")
    flag("--reward-pairs", choices=["last", "all"], default="last", help="all: of all rounds")
    flag("--preferences", help="chosen/rejected rows, which join the fit of the reward")
    flag("--preference-weight", type=float, default=0.5, help="of their loss; pairs have 1")
    flag("--kl", type=float, default=0.1, help="large: stays at the start; small: runs away")
    flag("--policy-steps", type=int, default=24, help="each on fresh samples; many: runs away")
    flag("--policy-lr", type=float, default=1e-3, help="peak, for the toy; the paper: 1e-6")
    flag("--policy-batch", type=int, default=64, help="prompts per policy step; few: noisy")
    flag("--group-size", type=int, default=4, help="samples per prompt, compared; few: noisy")
    flag("--ppo-epochs", type=int, default=1, help="steps per sample; above 1 with clipping")
    args = parser.parse_args(argv)
    if args.resume:
        return saved_args(args, parser)
    if args.data == parser.get_default("data"):  # the toy's problems belong to its demonstrations
        args.dev = args.dev or f"{TOY}/dev.jsonl"
        args.heldout = args.heldout or f"{TOY}/heldout.jsonl"
    for method, group in (("irft", irft), ("rft", rft)):
        for action in group._group_actions:
            if method != args.method and getattr(args, action.dest) != action.default:
                parser.error(f"{action.option_strings[0]} belongs to --method {method}")
    if args.micro_batch is None:  # measured: a CPU wants little padding, a GPU much work at a time
        args.micro_batch = 8192 if torch.cuda.is_available() and args.device != "cpu" else 512
    for name, value in vars(args).items():
        zero = name in ("temperature", "warmup", "seed", "rounds", "kl", "checkpoint_activations")
        zero = zero or name in ("reward_penalty", "preference_weight")
        if isinstance(value, (int, float)) and not (0 < value < math.inf or (zero and value == 0)):
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0" + ", or 0" * zero)
    if args.reward_loss == "linear" and not args.reward_penalty:
        parser.error("--reward-loss linear falls for ever without a --reward-penalty above 0")
    if args.group_size < 2:
        parser.error("--group-size 1: samples of a prompt are compared, so it takes at least 2")
    n = 1
    while not args.out and Path(f"runs/irft-{args.method}-{n}").exists():
        n += 1
    args.out = args.out or f"runs/irft-{args.method}-{n}"
    if os.path.exists(args.out) and (os.path.isfile(args.out) or os.listdir(args.out)):
        parser.error(f"--out {args.out} is there already: name another folder, or --resume {args.out}")
    return args


# ---- 1. Sample: what would the model answer itself? ------------------------------------------


@torch.no_grad()
def sample(model, prompts, eos_ids, max_new_tokens, temperature, batch_size, seed):
    """One response y ~ pi(.|x) per prompt, from the plain softmax: no top-k, no top-p, no penalty.

    prompts: lists of token ids; so are the responses, in the same order. A response ends in one of
    eos_ids if and only if that was sampled, else it has max_new_tokens ids. Temperature 0: greedy.
    """
    responses = [[] for _ in prompts]
    rank, world = ranks()
    parts = batches([len(prompt) for prompt in prompts], batch_size)
    for n, rows in enumerate(tqdm(parts, "sampling", leave=False, disable=rank > 0 or None)):
        stream = random.Random(f"{seed} {n * world + rank}").getrandbits(60)
        generator = torch.Generator(model.device).manual_seed(stream)
        ids = pad([prompts[i] for i in rows], "left", model.device)  # (B, P)
        mask = pad([[1] * len(prompts[i]) for i in rows], "left", model.device)  # (B, P)
        cache = None
        with autocast(model):  # around the loop, or weights would be cast anew for each token
            for _ in range(max_new_tokens):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # of non-pads
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits = out.logits[:, -1].float()  # (B, V)
                if logits.isnan().any():  # their argmax would be taken for a response
                    die("the model's logits are NaN: its weights are broken; lower --lr")
                if temperature == 0:
                    tokens = logits.argmax(-1)  # (B,)
                else:
                    shares = (logits / temperature).softmax(-1)
                    tokens = torch.multinomial(shares, 1, generator=generator)[:, 0]  # (B,)
                for i, token in zip(rows, tokens.tolist()):
                    responses[i].append(token)
                alive = [k for k, i in enumerate(rows) if responses[i][-1] not in eos_ids]
                if not alive:
                    break
                if len(alive) < len(rows):  # finished rows leave the batch: they cost no more
                    rows = [rows[k] for k in alive]
                    keep = torch.tensor(alive, device=model.device)
                    cache.reorder_cache(keep)  # of keys and values, or of any other state
                    tokens, mask = tokens[keep], mask[keep]
                ids = tokens[:, None]  # (B, 1): all before is in the cache
                mask = F.pad(mask, (0, 1), value=1)  # (B, P + tokens so far)
    return responses


# ---- 2. Log-probabilities: how likely does a model find a response? --------------------------


def response_logps(model, texts):
    """log pi(y|x) in nats, summed over y's tokens: [(prompt ids, response ids)] -> (B,) float32.

    Padding is on the right, attention is causal: no token sees the pads behind it, so no mask.
    """
    ids = pad([prompt + response for prompt, response in texts], "right", model.device)  # (B, T)
    mask = pad([[0] * len(x) + [1] * len(y) for x, y in texts], "right", model.device)  # (B, T)
    width = ids.shape[1] - min(len(prompt) for prompt, _ in texts)  # R: responses are in the last R
    with autocast(model):  # columns, so lm_head runs only there
        out = model(input_ids=ids, use_cache=False, logits_to_keep=width + 1)
    logits = out.logits[:, :-1].float().transpose(1, 2)  # (B, V, R), which predict
    ids, mask = ids[:, -width:], mask[:, -width:]  # (B, R)
    logps = -F.cross_entropy(logits, ids, reduction="none")  # (B, R)
    return torch.where(mask == 1, logps, 0.0).sum(1)


@torch.no_grad()
def score(model, texts, max_tokens, measure=response_logps):
    """measure(model, texts) in batches, without gradient: floats in the order of texts."""
    values = [0.0] * len(texts)
    parts = batches([len(x) + len(y) for x, y in texts], max_tokens=max_tokens)
    for rows in tqdm(parts, "scoring", leave=False, disable=ranks()[0] > 0 or None):
        for i, value in zip(rows, measure(model, [texts[i] for i in rows]).tolist()):
            values[i] = value
    return values


# ---- 3. IRFT: an implicit reward, scale * log pi/pi_ref --------------------------------------

H_MAX = 5.0  # at the optimum p/pi_ref = e^5 = 148: told apart so clearly, a response is done with

# name -> (h of demonstrations, h of generated responses) -> loss, (B,) each; h = scale * d
LOSSES = {
    # -log s(h+ - h-)   optimum log p/pi_ref + constant of x; SPIN, arXiv 2401.01335
    "spin": lambda real, generated: -F.logsigmoid(real - generated),
    # -(h+ - h-)        the raw gradient; held beyond H_MAX, else it would fall for ever
    "linear": lambda real, generated: -real.clamp(max=H_MAX) + generated.clamp(min=-H_MAX),
}


def irft_loss(model, pairs, loss, scale):
    """Losses of pairs, (B,), and metrics of each, {name: (B,)}."""
    real = [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs]
    generated = [(pair["prompt_ids"], pair["generated_ids"]) for pair in pairs]
    logps = response_logps(model, real + generated)  # (2B,): one forward pass for both
    logps_real, logps_generated = logps.chunk(2)  # (B,) each
    d_real = logps_real - logps.new_tensor([pair["real_reference"] for pair in pairs])
    d_generated = logps_generated - logps.new_tensor([pair["generated_reference"] for pair in pairs])
    told_apart = (d_real > d_generated) + (d_real == d_generated) / 2  # ties count half
    metrics = {"log_ratio_real": d_real, "log_ratio_generated": d_generated, "told_apart": told_apart}
    return LOSSES[loss](scale * d_real, scale * d_generated), metrics


def sft_loss(model, demos, mean_length):
    """Cross-entropy, (B,), over the demonstrations' mean length: on average one per token."""
    logps = response_logps(model, [(demo["prompt_ids"], demo["real_ids"]) for demo in demos])
    return -logps / mean_length, {}


# ---- 4. Train: one optimizer step, one loop --------------------------------------------------


def update(model, optimizer, batch, loss_of, args):
    """One optimizer step on the mean loss of a batch; returns its mean metrics, floats.

    loss_of(model, rows) -> losses (B,), {name: (B,)}. The batch goes through the model in parts of
    similar length, whose gradients add up to that of the whole; `count` rows of a part are its own.
    """
    sums = {}
    for part, count in micro_batches(batch, args.micro_batch):
        losses, metrics = loss_of(model, part)
        (losses[:count].sum() * ranks()[1] / len(batch)).backward()  # the ranks' mean is taken later
        for name, values in ({"loss": losses} | metrics).items():
            sums[name] = sums.get(name, 0.0) + values[:count].sum().item()
    everywhere = gather(sums)
    means = {name: sum(part[name] for part in everywhere) / len(batch) for name in sums}
    means["grad_norm"] = clip_gradients(optimizer, args.clip)
    if not math.isfinite(means["loss"] + means["grad_norm"]):  # before a step that would ruin all
        found = f"loss {means['loss']}, gradient norm {means['grad_norm']}"
        die(f"{found}: start anew with a lower learning rate or a larger scale")
    optimizer.step()
    optimizer.zero_grad()
    return means


def train(model, rows, loss_of, epochs, args, seed, shift=None, first_loss=None):
    """Train in place, every row once an epoch; yields the metrics of each step.

    shift: trained, too, if it requires a gradient. first_loss: what the first loss must be, when
    policy and reference are still one model; if it is not, one of them is wrong, and the run stops.
    """
    model.eval()  # no dropout, or the first log-ratios would not be 0
    prepare(model, args)  # recomputed activations, several GPUs
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    if shift is not None and shift.requires_grad:
        # Its first gradient is 0 but for rounding, of which Adam's usual eps makes a whole step.
        groups.append({"params": [shift], "lr": args.shift_lr, "eps": 1e-4})
    steps = epochs * math.ceil(len(rows) / args.batch)
    optimizer, schedule = make_optimizer(groups, args.lr, steps, args)
    step = 0
    for epoch in range(1, epochs + 1):
        order = random.Random(f"{seed} {epoch}").sample(rows, len(rows))
        for start in range(0, len(order), args.batch):
            began = time.time()
            metrics = update(model, optimizer, order[start : start + args.batch], loss_of, args)
            step += 1
            tolerance = (0.1 if model.device.type == "cuda" else 0.01) * max(1, abs(first_loss or 0))
            if step == 1 and first_loss is not None and abs(metrics["loss"] - first_loss) > tolerance:
                die(f"policy and reference disagree: first loss {metrics['loss']:.4f}, not {first_loss:.4f}")
            place = {"step": step, "steps": steps, "epoch": step * epochs / steps}
            yield place | metrics | {"lr": schedule.get_last_lr()[0], "seconds": time.time() - began}
            schedule.step()


# ---- 5. RFT: an explicit reward --------------------------------------------------------------


def reward(model, texts):
    """r(x, y) at y's last token, where no pad is seen: [(prompt ids, response ids)] -> (B,) float32."""
    ids = pad([prompt + response for prompt, response in texts], "right", model.device)  # (B, T)
    last = torch.tensor([len(x) + len(y) - 1 for x, y in texts], device=model.device)  # (B,)
    with autocast(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    hidden = hidden[torch.arange(len(texts), device=model.device), last]  # (B, H)
    return F.linear(hidden.float(), model.score.weight)[:, 0]  # (B,)


# name -> (r of demonstrations, r of generated responses) -> loss, (B,) each
REWARD_LOSSES = {
    # -log s(r+ - r-)   optimum log p/pi_t + constant of x; as reward models are usually fitted
    "logistic": lambda real, generated: -F.logsigmoid(real - generated),
    # -(r+ - r-)        the paper's raw gradient; falls for ever unless --reward-penalty holds it
    "linear": lambda real, generated: -(real - generated),
}


def reward_loss(model, pairs, loss, penalty):
    """Losses of pairs, (B,), times their weight, and metrics of each, {name: (B,)}."""
    real = [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs]
    generated = [(pair["prompt_ids"], pair["generated_ids"]) for pair in pairs]
    r_real, r_generated = reward(model, real + generated).chunk(2)  # (B,) each
    losses = REWARD_LOSSES[loss](r_real, r_generated) + penalty * (r_real**2 + r_generated**2)
    margin = r_real - r_generated
    told_apart = (margin > 0) + (margin == 0) / 2  # ties count half
    weights = losses.new_tensor([pair["weight"] for pair in pairs])
    return weights * losses, {"margin": margin, "told_apart": told_apart}


def fit_reward(model, pairs, preferences, args, seed):
    """Fit the reward in place to pairs and preferences, both as self_play makes them; yields metrics.

    A step's loss: the mean over a batch of pairs + --preference-weight * that over one of preferences.
    """
    prepare(model, args, sharded=False)
    loss_of = partial(reward_loss, loss=args.reward_loss, penalty=args.reward_penalty)
    groups = [{"params": list(model.parameters())}]
    optimizer, schedule = make_optimizer(groups, args.reward_lr, args.reward_steps, args)
    rng = random.Random(seed)
    for step in range(1, args.reward_steps + 1):
        began = time.time()
        some = rng.sample(pairs, min(args.batch, len(pairs)))
        others = rng.sample(preferences, min(args.batch, len(preferences)))
        n = len(some) + len(others)  # update takes one mean over all n
        batch = [pair | {"weight": n / len(some)} for pair in some]
        batch += [pair | {"weight": args.preference_weight * n / len(others)} for pair in others]
        metrics = update(model, optimizer, batch, loss_of, args)
        yield {"step": step, "steps": args.reward_steps} | metrics | {"seconds": time.time() - began}
        schedule.step()


def judge(policy, reference, reward_model, prompts, responses, args):
    """Sampled responses -> rows of a batch, with reward, kl = log pi/pi_ref, objective = r - --kl kl."""
    texts = [*zip(prompts, responses)]
    scored = partial(spread, texts)  # every rank scores a share
    rewards = scored(partial(score, reward_model, max_tokens=args.micro_batch, measure=reward))
    logps = scored(partial(score, policy, max_tokens=args.micro_batch))
    start_logps = scored(partial(score, reference, max_tokens=args.micro_batch))
    rows = []
    for (prompt, response), r, logp, start in zip(texts, rewards, logps, start_logps):
        row = {"prompt_ids": prompt, "generated_ids": response, "logp": logp, "reward": r}
        rows.append(row | {"kl": logp - start, "objective": r - args.kl * (logp - start)})
    return rows


def advantages(rewards):
    """(prompts, samples) -> the same: each reward minus the mean of its prompt's others: unbiased."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)  # (P, S)
    return (rewards - others).detach()


CLIP_RATIO = 0.2  # PPO's epsilon
SAMPLED = ("reward", "kl", "objective", "length")  # what is logged of sampled responses


def clipped_loss(logps, sampled_logps, gains):
    """PPO's objective of whole responses, negative: (B,) each -> (B,). At ratio 1 REINFORCE's gradient."""
    ratio = (logps - sampled_logps.detach()).exp()
    gains = gains.detach()
    return -torch.min(ratio * gains, ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO) * gains)


def policy_loss(policy, rows):
    """Losses of sampled responses, (B,), and what judge found about them, {name: (B,)}."""
    logps = response_logps(policy, [(row["prompt_ids"], row["generated_ids"]) for row in rows])  # (B,)
    found = {name: logps.new_tensor([row[name] for row in rows]) for name in ("logp", "advantage", *SAMPLED)}
    losses = clipped_loss(logps, found["logp"], found["advantage"])
    return losses, {name: found[name] for name in SAMPLED}


def improve_policy(policy, reference, reward_model, demos, respond, args, seed):
    """Policy steps on E[reward - kl * log pi/pi_ref] over fresh samples, in place; yields metrics."""
    prepare(policy, args, sharded=False)  # to shard what is sampled from at every step does not pay
    groups = [{"params": [weight for weight in policy.parameters() if weight.requires_grad]}]
    optimizer, schedule = make_optimizer(groups, args.policy_lr, args.policy_steps, args)
    rng = random.Random(seed)
    for step in range(1, args.policy_steps + 1):
        began = time.time()
        chosen = rng.sample(demos, min(args.policy_batch, len(demos)))
        prompts = [demo["prompt_ids"] for demo in chosen for _ in range(args.group_size)]  # P * S
        how = {"temperature": 1.0, "seed": f"{seed} {step}"}
        responses = spread(prompts, partial(respond, policy, **how))
        rows = judge(policy, reference, reward_model, prompts, responses, args)
        objective = torch.tensor([row["objective"] for row in rows]).view(-1, args.group_size)  # (P, S)
        for row, gain in zip(rows, advantages(objective).flatten().tolist()):
            row["advantage"] = gain
            row["length"] = float(len(row["generated_ids"]))
        for _ in range(args.ppo_epochs):  # from the second on the samples are not its own
            metrics = update(policy, optimizer, rows, policy_loss, args)
        metrics["policy_loss"] = metrics.pop("loss")  # 0 at first: nothing to watch
        yield {"step": step, "steps": args.policy_steps, **metrics, "seconds": time.time() - began}
        schedule.step()


def compare(policy, reference, reward_model, problems, respond, args, seed):
    """Dev demonstrations against fresh samples: metrics, and the correlation of reward and length."""
    prompts = [problem["prompt_ids"] for problem in problems]
    responses = spread(prompts, partial(respond, policy, temperature=1.0, seed=seed))
    rows = judge(policy, reference, reward_model, prompts, responses, args)
    texts = [(problem["prompt_ids"], problem["real_ids"]) for problem in problems]
    real = spread(texts, partial(score, reward_model, max_tokens=args.micro_batch, measure=reward))
    rewards = torch.tensor([row["reward"] for row in rows])
    lengths = torch.tensor([float(len(response)) for response in responses])
    margin = torch.tensor(real) - rewards
    told_apart = (margin > 0).float() + (margin == 0) / 2
    found = {"margin": margin.mean().item(), "told_apart": told_apart.mean().item()}
    found |= {name: fmean(row[name] for row in rows) for name in ("reward", "kl", "objective")}
    correlation = torch.corrcoef(torch.stack([rewards, lengths]))[0, 1].nan_to_num().item()
    return found | {"length": lengths.mean().item(), "reward_length": correlation}


# ---- 6. LoRA: fewer weights to train ---------------------------------------------------------


class LoRA(torch.nn.Module):
    """W x + alpha/rank B A x, W frozen (arXiv 2106.09685); alpha 16 as in the official code."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        self.linear = linear
        self.factor = 16 / rank
        self.transposed = isinstance(linear, Conv1D)  # GPT-2's weights are (in, out)
        n_out, n_in = linear.weight.T.shape if self.transposed else linear.weight.shape
        a = torch.randn(rank, n_in, generator=generator) / math.sqrt(n_in)
        self.a = torch.nn.Parameter(a.to(linear.weight.device))  # (rank, in)
        self.b = torch.nn.Parameter(linear.weight.new_zeros(n_out, rank))  # zero: no change yet

    def forward(self, x):  # (..., in) -> (..., out)
        return self.linear(x) + self.factor * F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merged(self):
        change = self.factor * self.b @ self.a  # (out, in)
        self.linear.weight += change.T if self.transposed else change
        return self.linear


def linear_layers(model):
    """[(name, module)] of all linear layers in the decoder, fused ones and Conv1D among them."""
    modules = model.get_decoder().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, (torch.nn.Linear, Conv1D))]


def add_lora(model, rank, seed):
    """In place: A and B of every linear layer in the decoder are trained, nothing else."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(random.Random(f"{seed} lora").getrandbits(60))
    for name, module in linear_layers(model):
        model.get_decoder().set_submodule(name, LoRA(module, rank, generator))


def merge_lora(model):
    """In place: W + alpha/rank B A takes the place of W, A and B, and can be trained again."""
    for name, module in list(model.get_decoder().named_modules()):
        if isinstance(module, LoRA):
            model.get_decoder().set_submodule(name, module.merged())
    model.requires_grad_(True)


# ---- 7. The methods --------------------------------------------------------------------------


def self_play(policy, demos, respond, tokenizer, seed, folder, args):
    """The pairs of a round: each demonstration, a response of the policy, log pi_t of both.

    respond(policy, prompts, temperature=, seed=) is sample with the settings of the run; see main.
    """
    file = folder.with_name(folder.name + ".partial") / "generated.jsonl"  # see save_model
    if file.exists():  # of a run that was interrupted while it trained on them
        return read_json_lines(file)
    print(f"  sampling {len(demos)} responses", flush=True)
    prompts = [demo["prompt_ids"] for demo in demos]
    responses = spread(prompts, partial(respond, policy, temperature=args.temperature, seed=seed))
    texts = [(demo["prompt_ids"], demo["real_ids"]) for demo in demos] + [*zip(prompts, responses)]
    logps = spread(texts, partial(score, policy, max_tokens=args.micro_batch))
    pairs = []
    for demo, ids, real, generated in zip(demos, responses, logps, logps[len(demos) :]):
        own = {"generated": tokenizer.decode(ids), "generated_ids": ids}
        # These two numbers are all that is needed of pi_t: no second model is kept.
        pairs.append(demo | own | {"real_reference": real, "generated_reference": generated})
    write(file, pairs)
    same = fmean(pair["real_ids"] == pair["generated_ids"] for pair in pairs)
    print(f"  {same:.1%} of them equal their demonstration: nothing to learn there", flush=True)
    return pairs


def irft_chunk(policy, pairs, name, out, seed, args):
    """Algorithm 2, one chunk: the policy learns to tell demonstrations from its own samples."""
    loss_of = partial(irft_loss, loss=args.loss, scale=args.scale)
    first_loss = LOSSES[args.loss](torch.zeros(()), torch.zeros(())).item()  # d = 0 on both sides
    steps = train(policy, pairs, loss_of, args.epochs, args, seed, first_loss=first_loss)
    log_steps(out, name, steps)  # the training happens while its steps are logged


def rft_round(models, pairs, preferences, demos, problems, respond, out, t, seed, args):
    """Algorithm 1, one round: the reward learns from the pairs, then the policy from the reward."""
    policy, start, eos_ids = models
    name = f"rft {t}"
    last = out / f"round_{t - 1}" / "reward"
    reward_model, reward_tokenizer = load_reward(last if t > 1 else start, eos_ids, args)
    reward_model.to(policy.device)
    if args.reward_pairs == "all":
        for k in range(1, t):
            pairs = pairs + read_json_lines(out / f"round_{k}" / "generated.jsonl")
    log_steps(out, f"reward of {name}", fit_reward(reward_model, pairs, preferences, args, seed))
    reference = load_model(args.model, args)  # frozen; the third model
    all_three = (policy, reference, reward_model)
    before = compare(*all_three, problems[:500], respond, args, f"{seed} before")  # enough for two digits
    log_steps(out, f"policy of {name}", improve_policy(*all_three, demos, respond, args, seed))
    after = compare(*all_three, problems[:500], respond, args, f"{seed} after")
    print_line("dev".rjust(10), before, title=True)
    for when, found in (("before", before), ("after", after)):
        log(out, {"phase": name, "when": when, **found})
        print_line(when.rjust(10), found)
    if after["kl"] > 0.5 * after["length"] or after["objective"] < before["objective"]:
        print("warning: the policy runs away, or gains nothing: raise --kl or lower --policy-lr")
    if abs(before["reward_length"]) > 0.95:
        print("warning: the reward follows length alone: does that make demonstrations better?")
    save_model(reward_model, reward_tokenizer, out / f"round_{t}.partial" / "reward")


def load_reward(path, eos_ids, args):
    """A classifier with one label, the reward, and its tokenizer; a head that it lacks starts at zero."""
    hf_logging.set_verbosity_error()  # transformers would warn of the missing head
    config = load(AutoConfig, path, "config")
    if config.num_labels != 1 and "SequenceClassification" in str(config.architectures):
        needed = "train one with num_labels=1, or name a language model, whose new head is trained here"
        die(f"--reward-model {path}: it has {config.num_labels} labels, a reward is one: {needed}")
    model, info = load(AutoModelForSequenceClassification, path, "classifier", num_labels=1, **WEIGHTS)
    missing = sorted({*info["missing_keys"]} - {"score.weight"})
    if missing or not hasattr(model, "score"):
        die(f"--reward-model {path}: weights are missing: {', '.join(missing) or 'score.weight':.200}")
    if info["missing_keys"]:  # at zero no response is preferred, and nothing is random
        torch.nn.init.zeros_(model.score.weight)
    tokenizer = load(AutoTokenizer, path, "tokenizer")
    # transformers reads a classifier at the last token that is not a pad: EOS must not be one
    if tokenizer.pad_token_id in {None, *eos_ids}:
        torch.manual_seed(args.seed)  # the new token's row is random, but alike in every run and rank
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def make_preference(row, tokenizer, eos_ids, room):
    """A row with chosen and rejected -> a pair as self_play makes them, chosen being real."""
    chosen = encode(row, tokenizer, eos_ids)
    if not (row.get("chosen") and row.get("rejected")):
        raise ValueError("preferences have the columns chosen and rejected")
    rejected = encode(row | {"chosen": row["rejected"]}, tokenizer, eos_ids)
    if chosen["prompt"] != rejected["prompt"]:
        raise ValueError("chosen and rejected answer different prompts")
    if max(len(side["prompt_ids"] + side["real_ids"]) for side in (chosen, rejected)) > room:
        raise ValueError(f"it is longer than the model's window of {room} tokens")
    return chosen | {"generated_ids": rejected["real_ids"]}


def read_rft_inputs(config, tokenizer, eos_ids, args):
    """(what the reward starts from, preferences), looked at before anything is sampled."""
    start = args.reward_model or args.model
    _, theirs = load_reward(start, eos_ids, args)
    if not tokenizer.get_vocab().items() <= theirs.get_vocab().items():
        die(f"--reward-model {start}: its tokenizer differs from that of {args.model}")
    make = partial(make_preference, tokenizer=tokenizer, eos_ids=eos_ids, room=window(config))
    return start, read_demos(args.preferences, args.split, make) if args.preferences else []


def main(args):
    """The start model, chunks or rounds, SFT for comparison, the table; returns summary.json."""
    start_processes()
    config, tokenizer, eos_ids = load_tokenizer(args)
    demos, dev, heldout, max_new_tokens = read_data(config, tokenizer, eos_ids, args)
    irft = args.method == "irft"
    parts = args.chunks if irft else args.rounds
    if irft and parts > len(demos):
        die(f"--chunks {parts}: there are only {len(demos)} demonstrations")
    start, preferences = (None, []) if irft else read_rft_inputs(config, tokenizer, eos_ids, args)
    policy = load_model(args.model, args)
    if args.lora_rank and not linear_layers(policy):
        die(f"--lora-rank: {args.model} has no linear layers in its decoder")
    print(f"model   {args.model}: {policy.num_parameters():,} parameters, {ranks()[1]} x {policy.device}")
    out, rows = open_folder(args)  # rows of the table, by name: a resumed run may have some
    respond = partial(sample, eos_ids=eos_ids, max_new_tokens=max_new_tokens, batch_size=args.sample_batch)
    # report(name, policy, seconds) adds a row to the table.
    report = partial(evaluate, out, rows, tokenizer, eos_ids, dev, heldout, respond, args)
    likelihood = partial(sft_loss, mean_length=fmean(len(demo["real_ids"]) for demo in demos))

    report("base", policy, None)
    for t in range(1, parts + 1):
        name, folder, seed = f"{args.method} {t}", out / f"round_{t}", f"{args.seed} round {t}"
        seconds = None
        if not folder.exists():  # a resumed run may have this one behind it
            began = time.time()
            print(f"\n{name} of {parts}")
            if args.lora_rank:
                add_lora(policy, args.lora_rank, seed)
            share = demos[t - 1 :: parts] if irft else demos  # a chunk: every T-th of them
            pairs = self_play(policy, share, respond, tokenizer, seed, folder, args)
            if irft:
                irft_chunk(policy, pairs, name, out, seed, args)
            else:
                models = (policy, start, eos_ids)
                rft_round(models, pairs, preferences, demos, dev or demos, respond, out, t, seed, args)
            if args.lora_rank:
                merge_lora(policy)
            save_model(policy, tokenizer, folder)
            seconds = time.time() - began
        del policy  # the next one needs the room
        policy = load_model(folder, args)
        report(name, policy, seconds)
    del policy

    if args.baseline == "sft" and parts:
        epochs = (3 if dev else 1) * args.epochs  # own samples and two sides cost 3
        seconds = sft_baseline(out, demos, dev, epochs, likelihood, tokenizer, respond, args)
        report("sft", load_model(out / "sft", args), seconds)
    return summarize(out, rows)


def sft_baseline(out, demos, dev, epochs, likelihood, tokenizer, respond, args):
    """SFT of the start model; out/sft is its best epoch on dev, else the last. Returns seconds."""
    print(f"\nSFT, for comparison: same start, {epochs} epochs")
    print_line(" " * 12, {"loss": 0, "dev_accuracy": 0}, title=True)
    policy = load_model(args.model, args)
    best = -1.0
    records = []
    for record in train(policy, demos, likelihood, epochs, args, f"{args.seed} sft"):
        records.append(record)
        if record["step"] * epochs % record["steps"] == 0:  # the end of an epoch
            record["dev_accuracy"], _ = answer(policy, dev, 0, tokenizer, respond, args)
            kept = record["dev_accuracy"] > best if dev else record["step"] == record["steps"]
            if kept:
                best = record["dev_accuracy"]
                save_model(policy, tokenizer, out / "sft")
            loss = fmean(one["loss"] for one in records[-record["steps"] // epochs :])
            first = f"epoch {record['epoch']:.0f}{' kept' if kept else ''}".ljust(12)
            print_line(first, {"loss": loss, "dev_accuracy": record["dev_accuracy"]})
        log(out, {"phase": "sft", **record})
    return sum(record["seconds"] for record in records)


# ---- 8. Data: any demonstrations -> token ids of prompts and responses -----------------------

# Columns of the prompt and of the response: of these pairs the first that a row has filled. Without
# a prompt's column the other one is a conversation, whose last assistant turn is imitated.
COLUMNS = [("prompt", "chosen"), (None, "chosen"), ("prompt", "response"), ("prompt", "completion")]
COLUMNS += [("question", "answer"), ("instruction", "output"), (None, "real")]
COLUMNS += [(None, "messages"), (None, "conversations")]
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
# A row or a turn with one of these says more than its text, and only text is trained on.
BEYOND_TEXT = ["tools", "functions", "tool_calls", "function_call", "reasoning_content", "images"]
BEYOND_TEXT += ["cells without a title"]
UNUSABLE = (ValueError, TemplateError, AttributeError, KeyError, TypeError)  # what such rows raise


def read_rows(path, split):
    """Yields (place, row) of a file or Hub dataset: place is what an error names, row a dict of columns."""
    kind = Path(path).suffix
    known = kind in (".jsonl", ".json", ".csv", ".parquet")
    if known != Path(path).is_file():
        die(f"{path}: " + ("no such file" if known else "not a .jsonl, .json, .csv or .parquet file"))
    place = path
    try:
        if kind in (".jsonl", ".json"):
            content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows' mark of UTF-8
            array = content.lstrip().startswith(b"[")  # of all rows, not an object on each line
            for n, line in enumerate(json.loads(content) if array else content.split(b"\n"), 1):
                place = f"{path} {'row' if array else 'line'} {n}"  # not splitlines: a text may hold U+2028
                if array or line.strip():
                    yield place, line if array else json.loads(line)
            return
        if kind == ".csv":  # every cell is text: NA, None and 007 stay as they are
            csv.field_size_limit(2**31 - 1)
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, restkey="cells without a title", strict=True))
        elif kind == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            import datasets  # slow to import, and files do not need it

            rows = datasets.load_dataset(path, split=split)
        yield from ((f"{path} row {n}", row) for n, row in enumerate(rows, 1))
    except (OSError, ValueError, csv.Error) as error:
        accepted = "UTF-8 files .jsonl, .json, .csv; .parquet; the name of a Hub dataset within reach"
        die(f"{place}: {str(error).splitlines()[0].rstrip('.')}. Accepted are {accepted}")


def to_messages(row):
    """A row -> messages, {"role", "content"}, the last by the assistant; else raises UNUSABLE."""
    if not isinstance(row, dict):
        raise TypeError(f"not an object with columns, but {row!r:.60}")
    filled = [name for name, value in row.items() if value is not None]
    pairs = [pair for pair in COLUMNS if {*pair} - {None} <= {*filled}]
    if not pairs:
        accepted = "; ".join(" + ".join(filter(None, pair)) for pair in COLUMNS)
        raise ValueError(f"found {', '.join(filled)}; accepted are the columns {accepted}")
    before, after = pairs[0]
    prompt, turns = row.get(before), row[after]
    if before == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    if isinstance(turns, str) and not before:  # Anthropic's HH: "\n\nHuman: ...\n\nAssistant: ..."
        beginning, *parts = re.split(r"\n\n(Human|Assistant):", turns)
        if beginning.strip():
            raise ValueError(f"a transcript begins with two newlines and Human:, not {turns!r:.40}")
        turns = [{"role": who, "content": text.strip()} for who, text in zip(parts[::2], parts[1::2])]
    elif not isinstance(turns, list):
        turns = [{"role": "assistant", "content": turns}]
    messages = [to_message(turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if before and messages and messages[0]["role"] == "assistant":  # else the prompt is among them
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = [to_message(turn) for turn in prompt] + messages
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, to_message({"role": "system", "content": row["system"]}))
    if len(messages) < 2 or any((row.get(name) or "[]") != "[]" for name in BEYOND_TEXT):
        raise ValueError(f"{after} has no prompt with a response behind it, or there is more than text")
    return messages


def to_message(turn):
    """A turn with role and content, or from and value -> {"role", "content"}, both text."""
    role = isinstance(turn, dict) and (turn.get("role") or turn.get("from"))
    if not role:
        raise TypeError(f"not a turn with role and content, but {turn!r:.60}")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    beyond = [name for name in BEYOND_TEXT if (turn.get(name) or "[]") != "[]"]
    if not isinstance(content, str) or beyond or (role != "system" and not content.strip()):
        raise ValueError(f"a turn of the role {role} is empty or more than text: {content!r:.60}")
    content.encode()  # raises UnicodeEncodeError, a ValueError, for half an emoji
    return {"role": ROLES.get(role, role), "content": content}


def encode(row, tokenizer, eos_ids):
    """A row -> {prompt, response, prompt_ids, real_ids (with EOS), answer or None}; raises UNUSABLE."""
    messages = to_messages(row)
    response = messages[-1]["content"]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if not text.startswith(prompt) or response.strip() not in text[len(prompt) :]:
        raise ValueError("the chat template changes prompt or response; see --prompt-template")
    for message in messages[:-1]:  # from earlier answers it may drop thoughts, as it will in use
        if message["role"] != "assistant" and message["content"].strip() not in prompt:
            raise ValueError(f"the chat template drops a turn of the role {message['role']}")
    to_ids = partial(tokenizer.encode, add_special_tokens=False)
    if eos_ids & {*to_ids(response)}:
        raise ValueError("there is an EOS token in its text, where the response would end")
    prompt_ids = to_ids(prompt)
    ids = to_ids(text)  # of both, then cut: some tokenizers encode the start of a text in another way
    if ids[: len(prompt_ids)] != prompt_ids:  # a token spans the cut
        ids = prompt_ids + to_ids(text[len(prompt) :])
    real_ids = ids[len(prompt_ids) :] + [tokenizer.eos_token_id]
    end = next(i for i, token in enumerate(real_ids) if token in eos_ids)  # the template may go on
    ids = {"prompt_ids": prompt_ids, "real_ids": real_ids[: end + 1]}
    return {"prompt": prompt, "response": response, **ids, "answer": final_answer(response)}


def read_demos(path, split, make):
    """[make(row) for rows of a file or Hub dataset], without those that raise UNUSABLE, at most a tenth."""
    made = []
    unusable = []
    for place, row in read_rows(path, split):
        try:
            made.append(make(row))
        except UNUSABLE as error:
            unusable.append(f"{place}: {error}")
    n = len(made) + len(unusable)
    if not n:
        die(f"{path}: no rows")
    if len(unusable) > n / 10:
        die(f"{unusable[0]} ({len(unusable)} of {n} rows cannot be used)")
    if unusable:
        print(f"warning: {len(unusable)} of {n} rows are left out, such as {unusable[0]}")
    return made


def read_data(config, tokenizer, eos_ids, args):
    """(demonstrations, dev problems, held-out problems, tokens of the longest response)."""
    make = partial(encode, tokenizer=tokenizer, eos_ids=eos_ids)
    paths = (args.data, args.dev, args.heldout)
    demos, dev, heldout = [read_demos(path, args.split, make) if path else [] for path in paths]
    everything = demos + dev + heldout
    vocabulary = config.get_text_config().vocab_size
    if max(max(demo["prompt_ids"] + demo["real_ids"]) for demo in everything) >= vocabulary:
        die(f"{args.model}: its tokenizer makes token ids above the {vocabulary} that its model knows")
    longest = max((demo["prompt_ids"] for demo in everything), key=len)
    room = window(config) - len(longest)
    if room < (args.max_new_tokens or 1):
        place = f"window of {window(config)} behind the prompt that begins {tokenizer.decode(longest)!r:.50}"
        die(f"--max-new-tokens: {max(0, room)} fit the model's {place}")
    max_new_tokens = args.max_new_tokens or min(256, room)
    unknown = {tokenizer.unk_token_id} - {None, *eos_ids}
    lost = sum(not unknown.isdisjoint(demo["prompt_ids"] + demo["real_ids"]) for demo in everything)
    if lost:
        print(f"warning: {lost} rows have words that the tokenizer does not know")
    cut = sum(len(demo["real_ids"]) > max_new_tokens for demo in everything)
    if cut:
        print(f"warning: {cut} responses of the data are cut at --max-new-tokens {max_new_tokens}")
    for demo in everything:
        demo["real_ids"] = demo["real_ids"][:max_new_tokens]  # without EOS, as a sample that is cut
    if not args.heldout:
        random.Random(args.seed).shuffle(demos)
        n = min(500, len(demos) // 10)
        demos, heldout = demos[n:], demos[:n]
        print(f"no --heldout: a tenth is held out, {n}; the table shows likeness to demonstrators")
    if not all(problem["answer"] for problem in dev):
        die(f"{args.dev}: dev problems choose the best round, so each needs an answer '#### value'")
    both = {demo["prompt"] for demo in demos} & {problem["prompt"] for problem in dev + heldout}
    if both:
        print(f"warning: {len(both)} prompts of the dev or held-out problems are in {args.data}, too")
    counts = f"{len(demos)} demonstrations, {len(dev)} dev, {len(heldout)} held-out problems"
    print(f"data    {counts}, up to {max_new_tokens} tokens a response")
    return demos, dev, heldout, max_new_tokens


def window(config):
    """The longest text in tokens that a model can read, math.inf if its config does not say."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, what the cache holds would be another text's
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None)) or math.inf


# ---- 9. Evaluate -----------------------------------------------------------------------------


def final_answer(text):
    """What follows '####' on its line, as in GSM8K: '#### $1,234.' -> '1234', '####7.0' -> '7.0'."""
    found = re.search(r"####[^\S\n]*\$?([^\n]+)", text)
    return found and found[1].replace(",", "").strip().rstrip(".")


def answer(policy, problems, temperature, tokenizer, respond, args):
    """(share of right answers, None if some problem has no answer to compare with; responses, token ids)"""
    prompts = [problem["prompt_ids"] for problem in problems]
    how = {"temperature": temperature, "seed": f"{args.seed} answers"}
    responses = spread(prompts, partial(respond, policy, **how))
    if not problems or not all(problem["answer"] for problem in problems):
        return None, responses
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    right = [final_answer(text) == problem["answer"] for text, problem in zip(texts, problems)]
    return fmean(right), responses


def evaluate(out, rows, tokenizer, eos_ids, dev, heldout, respond, args, name, policy, seconds):
    """Add a row to the table, unless a resumed run has it; show a response that has changed."""
    if name in rows:
        return
    dev_accuracy, _ = answer(policy, dev, 0, tokenizer, respond, args)
    greedy_accuracy, greedy = answer(policy, heldout, 0, tokenizer, respond, args)
    sampled_accuracy, sampled = answer(policy, heldout, 1, tokenizer, respond, args)
    texts = [(problem["prompt_ids"], problem["real_ids"]) for problem in heldout]
    logps = spread(texts, partial(score, policy, max_tokens=args.micro_batch))
    row = {"name": name, "greedy_accuracy": greedy_accuracy, "sampled_accuracy": sampled_accuracy}
    row |= {"n": len(heldout), "heldout_nll": None, "mean_response_tokens": None, "eos_share": None}
    if heldout:
        row["heldout_nll"] = -sum(logps) / sum(len(response) for _, response in texts)
        row["mean_response_tokens"] = fmean(len(response) for response in sampled)
        row["eos_share"] = fmean(response[-1] in eos_ids for response in sampled)
    row["seconds"] = seconds
    said = tokenizer.batch_decode(greedy[:50], skip_special_tokens=True)
    rows[name] = {"phase": name, "row": row, "dev_accuracy": dev_accuracy, "said": said}
    log(out, rows[name])
    if dev:
        print(f"{name}: {dev_accuracy:.1%} of the dev problems right", flush=True)
    for problem, before, now in zip(heldout, rows["base"]["said"], said):
        if before != now:
            print(f"  a sample: {problem['prompt'][-60:]!r}")
            print(f"    before {before!r:.80}\n    now    {now!r:.80}")
            break


# ---- 10. The run's folder, and what is printed ------------------------------------------------

# metric -> its title and format, in the order of print
TITLES = {"loss": ("loss", ".4f"), "log_ratio_real": ("log-ratio: demo", "+.2f")}
TITLES |= {"log_ratio_generated": ("own", "+.2f"), "margin": ("margin", "+.2f")}
TITLES |= {"told_apart": ("told apart", ".0%"), "reward": ("reward", "+.2f"), "kl": ("KL", ".2f")}
TITLES |= {"objective": ("objective", "+.2f"), "length": ("length", ".1f"), "dev_accuracy": ("dev", ".1%")}
TITLES |= {"greedy_accuracy": ("greedy", ".1%"), "sampled_accuracy": ("sampled", ".1%")}
TITLES |= {"heldout_nll": ("NLL/token", ".4f"), "mean_response_tokens": ("length", ".1f")}
TITLES |= {"eos_share": ("ended", ".0%"), "seconds": ("seconds", ".0f")}


def print_line(first, values, title=False):
    """A line of a table: of values, {metric: number or None}, those that TITLES has; or their titles."""
    for metric, (name, form) in TITLES.items():
        if metric in values:
            number = "-" if values[metric] is None else format(values[metric], form)
            first += (name if title else number).rjust(max(9, len(name) + 2))
    print(first, flush=True)


def log(out, record):
    """Add a record to metrics.jsonl."""
    if ranks()[0] == 0:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def log_steps(out, phase, steps):
    """Log every step's record; print the first, then the mean of each eighth of the steps."""
    unprinted = []
    for record in steps:
        log(out, {"phase": phase, **record})
        unprinted.append(record)
        step, last = record["step"], record["steps"]
        if step in (1, last) or step % math.ceil(last / 8) == 0:
            means = {key: fmean(one[key] for one in unprinted) for key in record if key != "seconds"}
            if step == 1:
                print_line("step".rjust(10), means, title=True)
            print_line(f"{step}/{last}".rjust(10), means)
            unprinted = []


def summarize(out, rows):
    """Print the table; write and return summary.json: its rows, the best round on dev or the last."""
    rounds = [record for name, record in rows.items() if name not in ("base", "sft")]
    best = max(rounds[::-1], key=lambda record: record["dev_accuracy"] or 0, default={"phase": None})
    summary = {"rows": [record["row"] for record in rows.values()], "best": best["phase"]}
    write(out / "summary.json", [summary])
    print()
    print_line("held-out".ljust(10), rows["base"]["row"], title=True)
    for row in summary["rows"]:
        print_line(row["name"].ljust(10), row)
    if rounds:
        folder = str(out / f"round_{best['phase'].split()[-1]}")
        how = "last round" if best["dev_accuracy"] is None else "best round on dev"
        print(f"\n{how}: {best['phase']}. AutoModelForCausalLM.from_pretrained({folder!r}) loads it")
    return summary


def saved_args(args, parser):
    """The flags of the run that --resume names; of those given now only --rounds may be larger."""
    found = read_json_lines(Path(args.resume) / "args.json")
    saved = found[0] if found else {}
    if {*saved} != {*vars(args)}:
        parser.error(f"--resume {args.resume}: there is no run of this script and version")
    if args != parser.parse_args([f"--resume={args.resume}", f"--rounds={args.rounds}"]):
        parser.error("--resume goes on with that run's flags: give no other but --rounds")
    changed = {"rounds": max(args.rounds, saved["rounds"]), "out": args.resume, "resume": args.resume}
    return argparse.Namespace(**saved | changed)


def open_folder(args):
    """The run's folder, and the rows of the table that a resumed run has: {name: record}."""
    out = Path(args.out)
    finished = {"base", *(folder.name.removeprefix("round_") for folder in out.glob("round_*"))}
    records = read_json_lines(out / "metrics.jsonl")  # unfinished phases and SFT happen again
    records = [record for record in records if record["phase"].split()[-1] in finished]
    gather(None)  # nobody writes before all have looked
    write(out / "args.json", [vars(args)])
    write(out / "metrics.jsonl", records)
    return out, {record["phase"]: record for record in records if "row" in record}


def read_json_lines(file):
    """[object of each line], without a last line that a full disk has cut off; [] if there is no file."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def write(file, records):
    """One JSON object a line; the file is there whole or not at all."""
    if ranks()[0] == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(file.name + ".partial")
        lines = [json.dumps(record) + "\n" for record in records]
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, file)


def save_model(model, tokenizer, folder):
    """HF format, written beside its place, where a round's samples are, and renamed when whole."""
    state = gather_full_state_dict(model) if isinstance(model, FSDPModule) else None
    if ranks()[0] == 0:
        unfinished = folder.with_name(folder.name + ".partial")
        model.save_pretrained(unfinished, state_dict=state)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    gather(None)  # the others wait until it is there


# ---- 11. Model, device, ranks -----------------------------------------------------------------


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help prints the docstring as it is, and the defaults where there are any."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def die(sentence):
    """A person's mistake: one sentence on stderr, exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def load(kind, path, what, **options):
    """kind.from_pretrained(path), or a sentence on what is wrong there."""
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # noqa: BLE001 (the libraries' errors have nothing else in common)
        if not Path(path).exists():
            die(f"{path}: no such folder, and no such model on the Hub, or the Hub was not reached")
        die(f"{path}: no {what} can be loaded from there: {' '.join(str(error).split()):.200}")


def load_tokenizer(args):
    """(config, tokenizer, ids that end a response): all but the weights."""
    hf_logging.disable_progress_bar()
    config = load(AutoConfig, args.model, "config")
    tokenizer = load(AutoTokenizer, args.model, "tokenizer")
    try:
        listed = GenerationConfig.from_pretrained(args.model).eos_token_id  # an id, ids or None
    except OSError:
        listed = GenerationConfig.from_model_config(config).eos_token_id
    if tokenizer.eos_token_id is None:
        die(f"{args.model}: its tokenizer has no EOS token, so no response could end")
    eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    if args.prompt_template:
        text = args.prompt_template.replace("\\n", "\n").replace("\\t", "\t")
        if "{prompt}" not in text:
            die(f"--prompt-template {args.prompt_template!r}: no {{prompt}}, where the prompt goes")
        if tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
            text = tokenizer.bos_token + text
        parts = [json.dumps(part, ensure_ascii=False) for part in text.split("{prompt}")]  # literals
        begin = "{{ " + " ~ messages[0].content ~ ".join(parts) + " }}"
        tokenizer.chat_template = begin + "{{ messages[1].content if messages[1:] }}"
    if not tokenizer.chat_template:
        die(f"{args.model}: its tokenizer has no chat template; give a --prompt-template")
    return config, tokenizer, eos_ids


# not from pickles, which can run any code
WEIGHTS = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}


def load_model(path, args):
    """A causal language model with fp32 weights that sample and response_logps can use."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    if device not in (best, "cpu"):
        die(f"--device {device}: there is none here, the best is {best}")
    if device != "cpu":  # sharded and recomputing layers refer to themselves, and would keep a GPU's memory
        gc.collect()
    model, info = load(AutoModelForCausalLM, path, "causal language model", **WEIGHTS)
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    broken += sorted(info["missing_keys"])  # these would be random without a word
    if broken:
        die(f"{path}: weights that are missing or not finite numbers: {', '.join(broken):.200}")
    model = model.to(device).eval()
    with torch.no_grad():  # what sample will need, tried on two tokens
        out = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    if type(out.get("past_key_values")) is not DynamicCache:
        die(f"{path}: {model.config.model_type} keeps no cache that sampling can use, as attention does")
    return model


def batches(lengths, max_items=math.inf, max_tokens=math.inf):
    """Items by similar length, for little padding: [3, 9, 2], 2 items -> their indices [[2, 0], [1]]."""
    found = []  # padded, a batch stays within max_tokens, unless it is a single item
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and len(found[-1]) < max_items and (len(found[-1]) + 1) * lengths[i] <= max_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def pad(rows, side, device):
    """[[5, 6], [7]] -> [[5, 6], [7, 0]] for side "right"; (B, T), long."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, 0, side).to(device)


def autocast(model):
    """bf16 matrix products over the fp32 weights on CUDA, plain fp32 elsewhere."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


def make_optimizer(groups, lr, steps, args):
    """AdamW or RMSprop, without weight decay; its schedule: up in --warmup steps, down to 0."""
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.RMSprop
    optimizer = kind(groups, lr=lr, weight_decay=0)
    return optimizer, get_scheduler("linear", optimizer, args.warmup, steps)


# Under torchrun every rank runs this file on its share of each batch. Without it these do nothing.


def start_processes():
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                die(
                    f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs here, one for each process"
                )
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        if dist.get_rank() > 0:
            sys.stdout = io.StringIO()  # one of them speaks


def ranks():
    """(number of this process, how many there are); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """[that value of each rank], on every rank, once all have come here."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def spread(items, function):
    """function(items), a result per item: every rank does a share and gets all, in order."""
    rank, world = ranks()
    results = [None] * len(items)
    share = items[rank::world] or items[:1]  # a sharded model needs all ranks
    for r, part in enumerate(gather(function(share))):
        results[r::world] = part[: len(items[r::world])]
    return results


def micro_batches(batch, max_tokens):
    """Parts of similar length, as many on every rank: [(this rank's rows, how many of them count)]."""
    rank, world = ranks()
    lengths = []
    for row in batch:  # one text, or two that are padded to the longer one
        sides = [len(row[key]) for key in ("real_ids", "generated_ids") if key in row]
        lengths.append(len(sides) * (len(row["prompt_ids"]) + max(sides)))
    order = sorted(range(len(batch)), key=lengths.__getitem__)
    groups = [order[n : n + world] for n in range(0, len(batch), world)]  # a row for every rank
    parts = []
    for part in batches([lengths[group[-1]] for group in groups], max_tokens=max_tokens):
        share = [batch[groups[n][rank]] for n in part if rank < len(groups[n])]
        parts.append((share or [batch[groups[part[0]][0]]], len(share)))
    return parts


def prepare(model, args, sharded=True):
    """--checkpoint-activations; under torchrun FSDP2, which spreads weights, gradients, optimizer."""
    modules = model.get_decoder().modules()  # of these the first list has the decoder's blocks
    layers = next(module for module in modules if isinstance(module, torch.nn.ModuleList))
    if sharded and dist.is_initialized():
        mesh = dist.init_device_mesh(model.device.type, (ranks()[1],))
        for part in (*layers, model):  # weights stay, once gathered, until a backward pass:
            fully_shard(part, mesh=mesh, reshard_after_forward=False)  # no rank waits in sampling
    if args.checkpoint_activations:  # transformers' own does nothing in evaluation mode
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def clip_gradients(optimizer, limit):
    """Clip the model's gradient, group 0, and return its norm before; a shift's is not clipped."""
    for weight in [weight for group in optimizer.param_groups for weight in group["params"]]:
        if dist.is_initialized() and not hasattr(weight, "full_tensor"):  # FSDP takes its own mean
            dist.all_reduce(weight.grad)
            weight.grad /= ranks()[1]
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code
        stream.reconfigure(errors="backslashreplace")
    arguments = parse_args()
    try:
        main(arguments)
    except (KeyboardInterrupt, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        die(f"{str(error) or 'stopped'}; if it had begun, go on with --resume {arguments.out}")
    if dist.is_initialized():
        dist.destroy_process_group()
