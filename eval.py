"""Benchmarks in one file, scored exactly as EleutherAI's lm_eval 0.4.13 scores them.

A score is a pile of small decisions: the prompt to the character, the examples before it, where a
response is cut, which number in it counts. Each moves the score, so none is ours: on the same model
and data every prompt, response, log-likelihood and metric is lm_eval's (tests/parity). Three tasks
are not from there: `answers` asks as gsil.py and irft.py train, `reward` has a reward model choose
between two responses, `mt_bench` writes answers for FastChat to judge.

    prompt      worked examples + question, as plain text or, with --chat, as a conversation
    response    greedy, or --samples of them at --temperature; cut at the task's stop strings
                arc, hellaswag, winogrande, truthfulqa, mmlu: the likeliest of the choices
    score       gsm8k: a number is found in the response and compared with the right one, as text
                humaneval: prompt + response + the problem's tests is a program that passes or not

A value is a mean over problems, +- half the width of its 95 % interval. Two models answer the same
problems, so --compare tests their differences problem by problem: sharper than two means.

    python eval.py                                  # the toy's base model on its held-out problems
    python eval.py --model runs/gsil-logistic-1/round_1 --compare tests/toy/base
    python eval.py --model M --tasks gsm8k,humaneval --allow-code-execution --out scores.json
    python eval.py --model M --tasks hellaswag,mmlu,gsm8k --shots hellaswag=10,mmlu=5
"""

import argparse
import csv
import json
import math
import os
import random
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev, variance

import pyarrow.parquet
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace: tasks becomes a list, data {task: path}, shots {task: examples}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    flag = parser.add_argument_group("who is asked what").add_argument
    flag("--model", default=f"{TOY}/base", help="a folder or a Hub name")
    flag("--compare", metavar="MODEL", help="a second model: differences problem by problem")
    flag("--tasks", default="answers", help=f"separated by commas: {', '.join(TASKS)}")
    where = "the problems' file, or a folder with test.* and train.*; if not given, the Hub's"
    flag("--data", action="append", default=[], metavar="[TASK=]PATH", help=where)
    flag("--limit", type=float, help="the first so many problems; below 1: a share of them")
    flag = parser.add_argument_group("how").add_argument
    flag("--shots", default="", metavar="N", help="worked examples, or gsm8k=8,mmlu=5; gsm8k: 5")
    flag("--chat", action="store_true", help="ask in the chat template; `answers` always does")
    flag("--max-new-tokens", type=int, help="of a response; if not given, 256 or 1024")
    flag("--samples", type=int, default=1, help="per problem: their mean; of programs pass@k")
    flag("--temperature", type=float, default=0.0, help="of the samples; 0: greedy")
    flag("--seed", type=int, default=0, help="of the samples; they depend on --batch-size, too")
    flag("--reward-model", metavar="MODEL", help="task reward: a classifier with one label")
    flag("--allow-code-execution", action="store_true", help="run what the model writes")
    flag = parser.add_argument_group("run").add_argument
    flag("--batch-size", type=int, default=16, help="prompts at a time: more is faster, less fits")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="as saved")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="the first there is")
    flag("--out", help="JSON file for settings, versions, results and every sample")
    flag("--answers", metavar="FILE", help="mt_bench: FastChat's file, to write or to continue")
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    if not {*args.tasks} <= {*TASKS} or len({*args.tasks}) < len(args.tasks):
        parser.error(f"--tasks {','.join(args.tasks)}: each once, out of {', '.join(TASKS)}")
    args.data = by_task("--data", args.data, args.tasks, parser)
    args.shots = by_task("--shots", [*filter(None, args.shots.split(","))], args.tasks, parser)
    for task, number in args.shots.items():
        if not number.isdecimal():
            parser.error(f"--shots {number}: must be a number, at least 0, or TASK=NUMBER,...")
        args.shots[task] = int(number)
    for name in ("limit", "max_new_tokens", "samples", "batch_size", "temperature", "seed"):
        value = getattr(args, name)
        zero = value == 0 and name in ("temperature", "seed")
        if value is not None and not (0 < value < math.inf or zero):
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0 (temperature, seed: or 0)")
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples}: greedy ones are all the same, set --temperature")
    if "reward" in args.tasks and (not args.reward_model or args.samples > 1):
        parser.error("--tasks reward needs --reward-model, and one sample per problem")
    if "mt_bench" in args.tasks and (args.compare or "mt_bench" not in args.data):
        parser.error("mt_bench needs --data question.jsonl, of FastChat, and no --compare")
    if "humaneval" in ",".join(args.tasks) and not args.allow_code_execution:
        parser.error("humaneval runs what the model writes: give --allow-code-execution")
    return args


def by_task(flag, items, tasks, parser):
    """["gsm8k=5"] -> {"gsm8k": "5"}; a number alone is for all tasks, a path for the only one."""
    found = {}
    for item in items:
        task, equals, value = item.partition("=")
        if task in TASKS and equals:
            found[task] = value
        elif flag == "--data" and len(tasks) > 1:
            parser.error(f"--data {item}: say which of the tasks it is for, TASK=PATH")
        else:
            found |= dict.fromkeys(tasks, item)
    if not {*found} <= {*tasks}:
        parser.error(f"{flag} {', '.join(items)}: not all are of --tasks {','.join(tasks)}")
    return found


# ---- 1. Prompts: what is asked -----------------------------------------------------------------


def draw_shots(pool, k, rows, draw="random"):
    """k worked examples for each row, from one stream with lm_eval's seed, so in the order of rows.

    draw: "random"; "first": the pool's first k; "others": one more, and the row itself is left out.
    That lm_eval does where a task names no test split, though the pool is another split there, too.
    """
    stream = random.Random(1234)
    drawn = []
    for row in rows:
        if k == 0 or draw == "first":
            some = pool[:k]
        elif draw == "random":
            some = stream.sample(pool, k)
        else:
            some = [shot for shot in stream.sample(pool, k + 1) if shot != row][:k]
            if len(some) < k:  # the pool has it twice
                some = stream.sample([shot for shot in pool if shot != row], k)
        drawn.append(some)
    return drawn


def build_prompt(problem, shots, question, tokenizer=None):
    """'Question: 1+1?\\nAnswer: 2\\n\\n' per example, then 'Question: 2+2?\\nAnswer:' without a blank.

    shots: (question, answer) each. With a tokenizer as a conversation in its chat template: an example
    is a turn of each side, a begun answer is the assistant's.
    """
    described, begun = problem.get("description"), problem.get("begun")
    if not tokenizer:
        examples = [f"{asked} {answer}\n\n" for asked, answer in shots]
        return "".join([described or "", *examples, question, begun or ""])
    turns = [("system", described)] if described else []  # only MMLU describes itself
    for asked, answer in shots:
        turns += [("user", asked), ("assistant", answer)]
    turns += problem.get("turns") or [("user", question)]
    return render(tokenizer, [*turns, ("assistant", begun)] if begun else turns)


def render(tokenizer, turns, done=False):
    """[(role, text)] in the chat template, to where the assistant goes on; done: to the end."""
    begun = turns[-1][0] == "assistant"
    how = {"add_generation_prompt": not begun, "continue_final_message": begun and not done}
    for skipped in (None, "system"):
        messages = [{"role": role, "content": text} for role, text in turns if role != skipped]
        with suppress(TemplateError):  # some templates refuse a system turn: lm_eval leaves it out
            return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    die(f"the chat template refuses this conversation, also without system turn: {turns!r:.300}")


def tokenize(tokenizer, prompt, special=True):
    """Token ids, with the BOS that this tokenizer adds, unless the text begins with it already."""
    own = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=special and not own).input_ids


# ---- 2. Responses: what the model says ---------------------------------------------------------

TOKENS_PER_PASS = 1024  # of prompts; on a CPU eight of 1000 are read faster one by one than at once
KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # caches, see Policy


@torch.no_grad()
def generate(policy, prompts, stop, max_new_tokens, temperature, batch_size, name=""):
    """Prompts, lists of ids -> (text up to the first stop, was it cut by max_new_tokens?) for each.

    By transformers' generate, not by a loop as in gsil.py: penalties and EOS tokens in the generation
    config belong to the model here, as they do in lm_eval.
    """
    model, tokenizer, _, kinds = policy
    config = model.generation_config
    stop = [*stop, *(config.stop_strings or []), tokenizer.eos_token]
    reach = max(len(text.encode()) for text in stop) + 2  # so many tokens surely hold a stop
    ends = config.eos_token_id  # an id, a list of ids or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ahead = kinds == {"DynamicLayer"} and not config.cache_implementation and (config.num_beams or 1) == 1
    # The longest first: too little memory shows at once. Pads would change states other than keys and
    # values: a model that has some reads prompts of one length together.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = groupby(order, lambda i: kinds <= KEYS_AND_VALUES or len(prompts[i]))
    size = 1 if kinds == {"NoneType"} else batch_size  # RWKV, one of these, mixes rows up
    batches = [rows for _, group in groups for rows in chunks([*group], size)]
    responses = [None] * len(prompts)
    finite = [lambda ids, logits: no_nan(logits, name)]
    for rows in tqdm(batches, desc=name, leave=False, disable=None):
        some = [prompts[i] for i in rows]
        inputs = tokenizer.pad({"input_ids": some}, padding_side="left", return_tensors="pt")
        width = inputs.input_ids.shape[1]  # ids and mask are (B, P)

        # Saves time, `cut` decides. generate's own stop_strings also match across the prompt's end.
        def stopped(ids, scores, width=width, **_):  # (B, T) -> (B,)
            tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - reach) :])
            found = [any(text in tail for text in stop) for tail in tails]
            return torch.tensor(found, device=ids.device)

        if ahead and min(map(len, some)) > 1:
            inputs["past_key_values"] = read_ahead(model, some, max_new_tokens)
        how = {"do_sample": temperature > 0, "temperature": temperature or None, "top_k": 0, "top_p": 1.0}
        how |= {"eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad_token_id, "stop_strings": None}
        how |= {"stopping_criteria": [stopped], "logits_processor": finite}
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, **how, max_new_tokens=max_new_tokens, use_cache=True)
        out = out[:, width:]  # (B, R)
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        for i, ids, text, raw in zip(rows, out.tolist(), texts, tokenizer.batch_decode(out)):
            responses[i] = cut(text, stop), not ends & {*ids} and cut(raw, stop) == raw
    return responses


def cut(text, stop):
    """cut('18\\n\\nQ: Why?', ['Q:', '\\n\\n']) -> '18'."""
    for end in stop:
        text = text.split(end)[0]
    return text


def no_nan(logits, name):
    """The argmax of NaNs would be taken for an answer. Any shape."""
    if logits.isnan().any():
        die(f"{name}: the model's logits are NaN: broken weights, or a --dtype of too small range")
    return logits


def read(model, contexts):
    """One pass over contexts, padded on the left -> output (cache, last logits), mask (B, P)."""
    ids = pad(contexts, "left", model.device)  # (B, P)
    mask = pad([[1] * len(context) for context in contexts], "left", model.device)  # (B, P)
    where = (mask.cumsum(1) - 1).clamp(min=0)  # pads do not count
    return model(ids, attention_mask=mask, position_ids=where, use_cache=True, logits_to_keep=1), mask


def read_ahead(model, prompts, room):
    """The cache of all prompts, but for their last tokens, from which generate goes on.

    It has room for so many more tokens: transformers' own is copied as a whole at each of them.
    """
    width = max(map(len, prompts)) - 1
    parts = chunks([prompt[:-1] for prompt in prompts], max(1, TOKENS_PER_PASS // width))
    caches = [read(model, part)[0].past_key_values for part in parts]
    for layers in zip(*[cache.layers for cache in caches]):
        sides = [layer.keys for layer in layers], [layer.values for layer in layers]  # (b, heads, w, D)
        keys, values = [  # (B, heads, width + room, D)
            torch.cat([F.pad(states, (0, 0, width - states.shape[2], room)) for states in side])
            for side in sides
        ]
        for layer in layers:  # what is copied is freed
            layer.keys = layer.values = None
        layers[0].keys, layers[0].values = keys[:, :, :width], values[:, :, :width]
        layers[0].update = partial(append, layers[0], keys, values)
    return caches[0]


def append(layer, all_keys, all_values, keys, values, *_, **__):
    """What a layer of the cache does with the keys and values, (B, heads, T, D), of new tokens."""
    start = layer.keys.shape[2]
    end = start + keys.shape[2]
    all_keys[:, :, start:end], all_values[:, :, start:end] = keys, values
    layer.keys, layer.values = all_keys[:, :, :end], all_values[:, :, :end]
    return layer.keys, layer.values


def respond(name, task, problems, shots, policy, args):
    """A sample per problem: prompt, responses, what was found in them, metrics."""
    chat, longest = args.chat or task.always_chat, args.max_new_tokens or task.max_new_tokens
    room = policy.window - longest  # of the prompt
    if room < 1:
        die(f"{name}: {longest} new tokens exceed the window, {policy.window}: lower --max-new-tokens")
    template = policy.tokenizer if chat else None
    samples, prompts = [], []
    for problem, some in zip(problems, shots):
        prompt = build_prompt(problem, some, problem.get("question"), template)
        ids = tokenize(policy.tokenizer, prompt, special=not task.always_chat)
        prompts += [ids[-room:]] * args.samples  # too long, it loses its beginning, as in lm_eval
        samples.append({"prompt": prompt, "truncated": len(ids) > room, "metrics": {}})
    stop = () if chat and "turns" in problems[0] else task.stop
    torch.manual_seed(args.seed)
    found = generate(policy, prompts, stop, longest, args.temperature, args.batch_size, name)
    for sample, some in zip(samples, chunks(found, args.samples)):
        sample["responses"] = [text for text, _ in some]
        sample["empty"] = sum(not text.strip() for text, _ in some)
        sample["unfinished"] = sum(was_cut for _, was_cut in some)
    if task.score:
        scores = task.score(task, problems, [sample["responses"] for sample in samples])
        samples = [sample | score for sample, score in zip(samples, scores)]
    return samples


# ---- 3. Choices: which continuation is the likeliest? ------------------------------------------


@torch.no_grad()
def loglikelihoods(policy, problems, batch_size, name=""):
    """log p(continuation | context) in nats: [[(ids, ids) per choice] per problem] -> floats alike.

    A context that choices of a problem have in common is read once; their continuations go on from its
    cache. Where these are one token each, the first pass has all there is.
    """
    model = policy.model
    if not policy.kinds <= KEYS_AND_VALUES:
        return whole_loglikelihoods(model, problems, batch_size, name)
    readers = {}  # (problem, context) -> the choices that go on from it
    for p, choices in enumerate(problems):
        for c, (context, _) in enumerate(choices):
            readers.setdefault((p, tuple(context)), []).append(c)
    parts = sorted(readers.items(), key=lambda part: -len(part[0][1]))  # longest first, as in generate
    size = max(1, batch_size // max(map(len, readers.values())))
    values = [[0.0] * len(choices) for choices in problems]
    for some in tqdm(chunks(parts, size), desc=name, leave=False, disable=None):
        out, mask = read(model, [context for (_, context), _ in some])  # mask (B, P)
        # A row, with its cache, is repeated for each choice that goes on from it: B become C.
        owner = [b for b, (_, cs) in enumerate(some) for _ in cs]
        asked = [(p, c) for (p, _), cs in some for c in cs]
        rests = [problems[p][c][1] for p, c in asked]
        logits = out.logits[owner]  # (C, 1, V)
        if max(map(len, rests)) > 1:
            ids = pad([rest[:-1] or [0] for rest in rests], "right", model.device)  # (C, R)
            new = pad([[1] * (len(rest) - 1) or [0] for rest in rests], "right", model.device)  # (C, R)
            mask = torch.cat([mask[owner], new], 1)  # (C, P + R)
            where = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]  # (C, R)
            cache = out.past_key_values
            cache.batch_select_indices(torch.tensor(owner, device=model.device))
            more = model(
                ids, attention_mask=mask, position_ids=where, past_key_values=cache
            ).logits  # (C, R, V)
            logits = torch.cat([logits, more], 1)  # at t they predict token t of the rest
        logps = no_nan(logits.log_softmax(-1), name)  # in the model's dtype, as in lm_eval
        for (p, c), rest, row in zip(asked, rests, logps):
            values[p][c] = row[range(len(rest)), rest].sum().item()
    return values


def whole_loglikelihoods(model, problems, batch_size, name):
    """The same for other states than keys and values: pads come behind all that is scored."""
    pairs = [(p, c, *pair) for p, choices in enumerate(problems) for c, pair in enumerate(choices)]
    pairs.sort(key=lambda pair: -len(pair[2] + pair[3]))
    values = [[0.0] * len(choices) for choices in problems]
    for some in tqdm(chunks(pairs, batch_size), desc=name, leave=False, disable=None):
        ids = pad([(context + rest)[:-1] for *_, context, rest in some], "right", model.device)  # (B, T)
        logps = no_nan(model(ids, use_cache=False).logits.log_softmax(-1), name)  # (B, T, V)
        for (p, c, context, rest), row in zip(some, logps):
            steps = range(len(context) - 1, len(context) + len(rest) - 1)
            values[p][c] = row[steps, rest].sum().item()
    return values


def measure(problem, lls):
    """What log-likelihoods of a problem's choices count; gold is the index of the right one."""
    norm = [ll / max(1, len(choice)) for ll, choice in zip(lls, problem["choices"])]  # per character
    acc = float(lls.index(max(lls)) == problem["gold"])  # of equals the first
    if "labels" in problem:  # truthfulqa_mc2: the true answers' part of the probability
        masses = [math.exp(ll - max(lls)) for ll in lls]
        acc = sum(mass for mass, true in zip(masses, problem["labels"]) if true) / sum(masses)
    return {"acc,none": acc, "acc_norm,none": float(norm.index(max(norm)) == problem["gold"])}


def choose(name, task, problems, shots, policy, args):
    """A sample per problem: contexts (mostly one), continuations, log-likelihoods, metrics."""
    tokenizer, window = policy.tokenizer, policy.window
    samples, asked = [], []
    for problem, some in zip(problems, shots):
        template = tokenizer if args.chat else None
        prompts = [build_prompt(problem, some, asks, template) for asks in problem["questions"]]
        said = [choice if args.chat else f" {choice}" for choice in problem["choices"]]
        # Blanks that end a prompt belong to the continuation. Both are encoded as one text and cut where
        # the prompt alone would end: of a token that spans the cut the rest is scored, as in lm_eval.
        starts = {prompt: tokenize(tokenizer, prompt.rstrip()) for prompt in {*prompts}}
        pairs = []
        for prompt, text in zip(prompts, said):
            context = starts[prompt]
            rest = tokenize(tokenizer, prompt + text)[len(context) :]
            if not (context and 0 < len(rest) <= window):
                die(f"{name}: {len(rest)} tokens, should be 1 to {window}: {text!r:.200} after {prompt!r}")
            pairs.append((context, rest))
        # One more than the window: the last token is predicted and never read.
        asked.append([(context[-(window + 1 - len(rest)) :], rest) for context, rest in pairs])
        truncated = max(len(context + rest) for context, rest in pairs) > window + 1
        sample = {"prompts": [*dict.fromkeys(prompts)], "continuations": said}
        samples.append(sample | {"truncated": truncated})
    found = loglikelihoods(policy, asked, args.batch_size, name)
    for problem, lls, sample in zip(problems, found, samples):
        measured = measure(problem, lls)
        metrics = {metric: measured[metric] for metric in task.counts}
        sample |= {"loglikelihoods": lls, "gold": problem["gold"], "metrics": metrics}
    return samples


# ---- 4. What counts of a response: a number, or whether a program passes its tests -------------


def find(pattern, which, text):
    """The first (which 0) or last (-1) match, its first group that is not empty; or [invalid]."""
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    groups = found[which]
    return (groups if isinstance(groups, str) else next(filter(None, groups))).strip()


def normalize(text):
    """What exact_match ignores: commas, dollars, all up to the last '#### ', a last point, case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):  # in this order
        text = re.sub(ignored, "", text)
    return text.lower()


def score_answers(task, problems, responses):
    """By each filter: is the answer found in a response the right one? A dict per problem."""
    scores = []
    for problem, texts in zip(problems, responses):
        gold, found, metrics = problem["gold"], {}, {}
        for name, extract in task.counts.items():
            found[name] = [extract(text) for text in texts]
            metrics[f"exact_match,{name}"] = fmean(task.reduce(each) == gold for each in found[name])
        scores.append({"gold": gold, "extracted": found, "metrics": metrics})
    return scores


# code_eval gives 3 s by the clock. Here Python starts in it, too: 4 s, of CPU time and by the clock.
SECONDS = 3.0

# A program's own process: its limits, then no input and no output, then the program. Only one that
# comes to its end asks for the secret and gives it back: neither an exception nor sys.exit(0) does.
RUNNER = r"""
import json, os, resource, sys
program, seconds = json.loads(sys.stdin.readline())
source, answer, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
for name, most in dict(AS=4 << 30, CPU=int(seconds) + 1, FSIZE=1 << 20, CORE=0, NPROC=0).items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError, AttributeError):
        pass
read, write, leave = os.read, os.write, os._exit
exec(compile(program, "candidate.py", "exec"), {})
write(answer, b"?")
write(answer, read(source, 16))
leave(0)
"""


def passes(program, seconds=SECONDS):
    """Does a program come to its end, in time and without an exception?

    Not a sandbox: it may use the network, read your files and this process's environment, stop this
    process, or do as RUNNER does and say that it passed. Run it in a container.
    """
    secret = secrets.token_bytes(16)
    deadline = time.monotonic() + seconds + 1
    task = json.dumps([program, seconds]).encode() + b"\n"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder}
        own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        how = {
            "cwd": folder,
            "env": own,
            "start_new_session": True,
            "stderr": subprocess.DEVNULL,
            "bufsize": 0,
        }
        command, pipe = [sys.executable, "-I", "-c", RUNNER], subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, **how) as child:
            passed = True
            for said, answer in (
                (task, b"?"),
                (secret, secret),
                (b"", b""),
            ):  # at last, the end of its output
                with suppress(BrokenPipeError):
                    child.stdin.write(said)
                left = max(0, deadline - time.monotonic()) if passed else 0
                ready, _, _ = select.select([child.stdout], [], [], left)
                passed = passed and bool(ready) and child.stdout.read(16) == answer
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with everything it has started
    return passed


def pass_at_k(n, passed, k):
    """Chance that of k out of these n samples one passes: unbiased (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def score_programs(task, problems, responses):
    """prompt + response + tests, run; pass@k for all k that n samples suffice for. A dict each."""
    n, [(name, extract)] = len(responses[0]), task.counts.items()
    scores, programs = [], []
    for problem, texts in zip(problems, responses):
        codes = [problem["code"] + extract(text) for text in texts]
        programs += [f"{code}\n{problem['gold']}" for code in codes]
        scores.append({"gold": problem["gold"], "extracted": {name: codes}})
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads suffice, each waits for its process
        ran = pool.map(passes, programs)
        ran = list(tqdm(ran, "programs", len(programs), leave=False, disable=None))
    ks = [k for k in (1, 2, 5, 8, 10, 16, 32, 64, 100) if k <= n]
    for score, passed in zip(scores, chunks(ran, n)):
        metrics = {f"pass@{k},{name}": pass_at_k(n, sum(passed), k) for k in ks}
        score |= {"passed": passed, "metrics": metrics}
    return scores


# ---- 5. The judgement of others: a reward model; FastChat's judge of MT-Bench ------------------


def load_reward(path, args):
    """A classifier with one output, which is the reward, and its tokenizer."""
    model, tokenizer = load_model("AutoModelForSequenceClassification", path, args)
    if model.config.num_labels != 1 or not tokenizer.chat_template:
        die(f"--reward-model {path}: needed are num_labels=1, the reward, and a chat template")
    model.config.get_text_config().pad_token_id = None  # else it may read before an EOS that is pad
    return model, tokenizer


def reward_ids(tokenizer, turns, response):
    """What a reward model reads, as irft.py trains it: the chat, up to the EOS of the response."""
    prompt = render(tokenizer, turns)
    both = render(tokenizer, [*turns, ("assistant", response)], done=True)
    if not both.startswith(prompt):
        die("--reward-model: its chat template changes the prompt once it is answered")
    start, ids = [tokenize(tokenizer, text, special=False) for text in (prompt, both)]
    if ids[: len(start)] != start:  # a token spans the cut: each alone, as in irft.py
        ids = start + tokenize(tokenizer, both[len(prompt) :], special=False)
    ids.append(tokenizer.eos_token_id)
    return ids[: ids.index(tokenizer.eos_token_id, len(start)) + 1]


@torch.no_grad()
def rewards(model, tokenizer, pairs):
    """[(turns, response)] -> [reward]. One at a time: there are no pads to be mistaken."""
    found = []
    for turns, response in tqdm(pairs, "rewards", leave=False, disable=None):
        ids = torch.tensor([reward_ids(tokenizer, turns, response)], device=model.device)  # (1, T)
        found.append(no_nan(model(ids).logits, "reward").item())
    return found


def judge(outcome, problems, reward_model, args):
    """Adds the duel of our responses with those of --compare, or with the data's own."""
    ours = [sample["responses"][0].strip() for sample in outcome["samples"]["reward"]]
    theirs = [problem["response"] for problem in problems]
    if args.compare:
        samples = outcome["compare"]["samples"]["reward"]
        theirs = [sample["responses"][0].strip() for sample in samples]
    turns = [problem["turns"] for problem in problems]
    a, b = [rewards(*reward_model, [*zip(turns, side)]) for side in (ours, theirs)]
    wins, ties = sum(x > y for x, y in zip(a, b)), sum(x == y for x, y in zip(a, b))
    found = {"against": args.compare or "the data", "n": len(a), "wins": wins, "ties": ties}
    found |= {"win_rate": wins / len(a), "reward": fmean(a), "other_reward": fmean(b)}
    found |= compare(a, b)  # and the lengths, as reward models are known to prefer long responses
    found |= {"characters": fmean(map(len, ours)), "other_characters": fmean(map(len, theirs))}
    outcome["duel"] = found | {"rewards": a, "other_rewards": b}
    print_table(["reward", ""], [*found.items()])


# By category, else 0.7: FastChat 0e6d3e4b, llm_judge/common.py
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0}


def answer_mt_bench(name, task, problems, shots, policy, args):
    """Write FastChat's file, after each question; those that have an answer there are skipped."""
    own = args.model.strip("./").replace("/", "-")  # FastChat calls the model as the file
    file = Path(args.answers or f"data/mt_bench/model_answer/{own}.jsonl")
    answers, samples = {}, []
    for place, row in read_rows(str(file), "") if file.exists() else ():
        if "choices" not in row:
            die(f"{place}: should be an answer in FastChat's form, found {row!r:.100}")
        answers[row["question_id"]] = row
    for problem in tqdm(problems, name, leave=False, disable=None):
        if problem["id"] in answers:
            continue
        turns, parts = [], []
        for question in problem["questions"]:
            turns.append(("user", question))
            how = {"temperature": TEMPERATURES.get(problem["category"], 0.7), "seed": 0, "samples": 1}
            how = argparse.Namespace(**vars(args) | how)
            parts += respond(name, task, [{"turns": turns}], [[]], policy, how)
            turns.append(("assistant", parts[-1]["responses"][0].strip()))
        responses = [text for _, text in turns[1::2]]
        counted = {cause: sum(part[cause] for part in parts) for cause in CAUSES}
        samples.append(counted | {"responses": responses, "metrics": {}})
        answer = {"question_id": problem["id"], "answer_id": secrets.token_hex(11)}
        answer |= {"model_id": file.stem, "choices": [{"index": 0, "turns": responses}]}
        answers[problem["id"]] = answer | {"tstamp": time.time()}
        write(file, "".join(json.dumps(answers[key]) + "\n" for key in sorted(answers)))
    print(f"{name}: {len(answers)} answers in {file}, {len(samples)} of them new")
    return samples


# ---- 6. Data: as gsil.py and irft.py read it, the same text ------------------------------------

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
    if kind in (".jsonl", ".json", ".csv", ".parquet") and not Path(path).is_file():
        die(f"{path}: no such file")
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
        die(f"{place}: {str(error).splitlines()[0]}. Accepted are {accepted}")


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


def final_answer(text):
    """What follows '####' on its line, as in GSM8K: '#### $1,234.' -> '1234', '####7.0' -> '7.0'."""
    found = re.search(r"####[^\S\n]*\$?([^\n]+)", text)
    return found and found[1].replace(",", "").strip().rstrip(".")


def pad(rows, side, device):
    """[[5, 6], [7]] -> [[5, 6], [7, 0]] for side "right"; (B, T), long."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, 0, side).to(device)


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


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help prints the docstring as it is, and every default."""


# ---- 7. Tasks ----------------------------------------------------------------------------------


class Row(dict):
    """A row that knows which column it was last asked for: an error in a reader is about that one."""

    column = ""

    def __getitem__(self, column):
        self.column = column
        need(self.get(column) is not None, "is missing")
        return self.get(column)


def need(ok, expected):
    """lm_eval scores many rows that lack what their task needs, silently."""
    if not ok:
        raise ValueError(expected)


@dataclass(frozen=True)
class Task:
    """One benchmark: what is asked, where a response stops, what counts; as in lm_eval/tasks.

    A problem has question, target, which is what a worked example answers, and gold; where the model
    chooses, questions, one for each choice, and gold is an index; or turns, to go on with.
    """

    read: Callable  # row -> problem
    data: tuple  # Hub name and configuration
    counts: dict | tuple  # filter -> what counts of a response; or metrics, see measure
    run: Callable = respond
    score: Callable | None = None  # task, problems, responses -> a dict per problem
    reduce: Callable = normalize  # what counts of a response -> what is compared with gold
    stop: tuple = ()  # a response ends before any of these
    max_new_tokens: int = 256
    splits: tuple = ("test", "train")  # of the problems, of the worked examples
    shots: int | None = 0  # worked examples; 0: never any, None: none unless asked for
    draw: str = "random"  # see draw_shots
    always_chat: bool = False  # as the training scripts ask


def read_answer(row):
    """A row in any format that gsil.py trains on."""
    *messages, response = to_messages(dict(row))
    gold = final_answer(response["content"])
    need(gold, "the response should end in '#### ' and the right value")
    return {"turns": [(message["role"], message["content"]) for message in messages], "gold": gold}


def read_gsm8k(row, before="Question: ", after="\nAnswer:"):
    """gsm8k/gsm8k.yaml, gsm8k/gsm8k-cot-zeroshot.yaml"""
    question, answer = before + row["question"] + after, row["answer"]
    need(re.search(r"#### +[^\n]*\w", answer), "should end in '#### ' and the right value")
    return {"question": question, "target": answer, "gold": normalize(answer)}


def read_humaneval(row):
    """humaneval/humaneval.yaml"""
    code, test, name = row["prompt"] + "", row["test"] + "", row["entry_point"]
    need(f"def {name}(" in code, "should be defined in prompt")
    return {"question": code, "code": code, "gold": f"{test}\ncheck({name})"}


def read_humaneval_instruct(row):
    """humaneval/humaneval_instruct.yaml"""
    problem = read_humaneval(row)
    code = f"```python\n{problem['code']}\n"
    asked = "Write a solution to the following problem and make sure that it passes the tests:"
    return problem | {
        "question": f"{asked}\n{code}```\n",
        "begun": f"Here is the completed function:\n{code}",
    }


def choosing(question, choices, gold):
    """The problem of choosing."""
    need(all(choices), "each choice should be text, one is empty")  # whose length acc_norm divides by
    example = {"question": question, "target": choices[gold], "gold": gold}
    return example | {"questions": [question] * len(choices), "choices": choices}


def read_arc(row):
    """arc/arc_easy.yaml"""
    question, choices = "Question: " + row["question"] + "\nAnswer:", row["choices"]
    need(len(choices["label"]) == len(choices["text"]), "should have as many labels as texts")
    need(row["answerKey"] in choices["label"], "should be one of choices.label")
    return choosing(question, choices["text"], choices["label"].index(row["answerKey"]))


def read_hellaswag(row):
    """hellaswag/utils.py"""

    def clean(text):  # of WikiHow's marks, [title] and the like; a double blank becomes one, once
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    question = clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    choices = [clean(ending) for ending in row["endings"]]
    known = [str(n) for n in range(len(choices))]
    need(str(row["label"]) in known, "should be an index of endings: use train or validation")
    return choosing(question, choices, int(row["label"]))


def read_winogrande(row):
    """winogrande/preprocess_winogrande.py: prompts differ; what is scored, the rest, does not."""
    need("_" in row["sentence"], "should have a _ where the option goes")
    before, rest = row["sentence"].split("_", 1)
    questions, rest = [before + row[option] for option in ("option1", "option2")], rest.strip()
    need(row["answer"] in ("1", "2"), "should be 1 or 2: use train or validation")
    gold = int(row["answer"]) - 1
    example = {"question": questions[gold], "target": rest, "gold": gold}
    return example | {"questions": questions, "choices": [rest, rest]}


TRUTHFULQA_EXAMPLES = (
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\nA: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\nA: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain.\n\n"
)


def read_truthfulqa(row, targets):
    """truthfulqa/truthfulqa_mc1.yaml, truthfulqa/utils.py"""
    question = TRUTHFULQA_EXAMPLES + "Q: " + row["question"] + "\nA:"
    choices, labels = row[targets]["choices"], row[targets]["labels"]
    need(len(labels) == len(choices), "should have as many labels as choices")
    if targets == "mc1_targets":
        need(labels == [1] + [0] * (len(labels) - 1), "labels should be 1, 0, 0, ...")
        return choosing(question, choices, 0)
    need({*labels} == {0, 1}, "labels should be 1 and 0")
    return choosing(question, choices, 0) | {"labels": labels}


SUBJECTS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
        virology""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
}


def read_mmlu(row):
    """mmlu/default/_default_template_yaml"""
    need(row["subject"] in " ".join(SUBJECTS.values()).split(), "should be one of MMLU's 57")
    about = "The following are multiple choice questions (with answers) about "
    about += row["subject"].replace("_", " ") + ".\n\n"
    need(len(row["choices"]) == 4, "should be four texts")
    question = row["question"].strip() + "\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*row["choices"])
    need(str(row["answer"]) in [*"0123"], "should be 0, 1, 2 or 3")
    problem = choosing(question, [*"ABCD"], int(row["answer"]))
    return problem | {"description": about, "subject": row["subject"]}


def read_reward(row):
    """A row as gsil.py trains on it, or, for --compare, a prompt alone. Plain: HH's transcript."""
    answered = {after for _, after in COLUMNS} & {*row}
    none = {} if answered else {"response": "-", "answer": "-"}
    *messages, response = to_messages(dict(row) | none)
    turns = [(message["role"], message["content"]) for message in messages]
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names.get(role, role)}: {said}" for role, said in turns)
    theirs = response["content"].strip() if answered else None
    return {"turns": turns, "question": f"{text}\n\nAssistant:", "response": theirs}


def read_mt_bench(row):
    """FastChat's llm_judge/data/mt_bench/question.jsonl"""
    need(isinstance(row["turns"], list), "should be a list of texts")
    return {"id": row["question_id"], "category": row["category"], "questions": row["turns"]}


NUMBERS = {"flexible-extract": partial(find, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
BEHIND_HASHES = NUMBERS | {"strict-match": partial(find, r"#### (\-?[0-9\.\,]+)", 0)}
BEHIND_IS = NUMBERS | {"strict-match": partial(find, r"The answer is (\-?[0-9\.\,]+).", 0)}
HASHES = {"final-answer": partial(find, "####[^\n]+", 0)}
STOP = ("Question:", "</s>", "<|im_end|>")
GSM8K = Task(read_gsm8k, ("openai/gsm8k", "main"), BEHIND_HASHES, score=score_answers, stop=STOP, shots=5)
read_cot = partial(read_gsm8k, before="Q: ", after="\nA: Let's think step by step.")
HUMANEVAL = Task(read_humaneval, ("openai/openai_humaneval",), {"create_test": str}, score=score_programs)
HUMANEVAL = replace(HUMANEVAL, max_new_tokens=1024, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"))
FENCED = {"create_test": lambda text: text.split("```")[0]}
ACC, BOTH = ("acc,none",), ("acc,none", "acc_norm,none")
ARC = Task(read_arc, ("allenai/ai2_arc", "ARC-Easy"), BOTH, run=choose, shots=None)
SWAG = Task(read_hellaswag, ("Rowan/hellaswag",), BOTH, run=choose, shots=None, draw="others")
SWAG = replace(SWAG, splits=("validation", "train"))
TRUTH = Task(read_truthfulqa, ("truthfulqa/truthful_qa", "multiple_choice"), ACC, run=choose)
TRUTH = replace(TRUTH, splits=("validation", "train"))
TASKS = {
    "answers": Task(
        read_answer,
        (f"{TOY}/heldout.jsonl",),
        HASHES,
        score=score_answers,
        always_chat=True,
        reduce=final_answer,
    ),
    "gsm8k": GSM8K,
    "gsm8k_cot_zeroshot": replace(GSM8K, read=read_cot, counts=BEHIND_IS, stop=("Q:", *STOP[1:]), shots=0),
    "humaneval": HUMANEVAL,
    "humaneval_instruct": replace(HUMANEVAL, read=read_humaneval_instruct, counts=FENCED),
    "arc_easy": ARC,
    "arc_challenge": replace(ARC, data=("allenai/ai2_arc", "ARC-Challenge")),
    "hellaswag": SWAG,
    "winogrande": replace(
        SWAG, read=read_winogrande, data=("allenai/winogrande", "winogrande_xl"), counts=ACC
    ),
    "truthfulqa_mc1": replace(TRUTH, read=partial(read_truthfulqa, targets="mc1_targets")),
    "truthfulqa_mc2": replace(TRUTH, read=partial(read_truthfulqa, targets="mc2_targets")),
    "mmlu": Task(
        read_mmlu, ("cais/mmlu", "all"), ACC, run=choose, splits=("test", "dev"), shots=None, draw="first"
    ),
    "reward": Task(
        read_reward, ("Anthropic/hh-rlhf",), {}, stop=("Human:", "human:", "Assistant:", "assistant:")
    ),
    "mt_bench": Task(read_mt_bench, ("",), {}, run=answer_mt_bench, max_new_tokens=1024, always_chat=True),
}


# ---- 8. The whole evaluation -------------------------------------------------------------------


def main(args):
    """Read, ask, score, print, write; returns what --out holds."""
    if args.out:  # where nothing can be written this ends now, not after hours
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        open(args.out, "a", encoding="utf-8").close()
    if args.allow_code_execution:
        print("warning: runs what the model writes, not in a sandbox; use a container without network")
    data = {name: read_task(name, TASKS[name], args) for name in args.tasks}
    # Before any model answers: a mistake here should not cost the answers.
    if args.compare:
        from transformers import AutoTokenizer

        load(AutoTokenizer, args.compare, "a tokenizer")
    if "reward" in data:
        reward_model = load_reward(args.reward_model, args)
        for n, problem in enumerate(data["reward"][0], 1):
            reward_ids(reward_model[1], problem["turns"], "a")  # ends if the template refuses these
            if problem["response"] is None and not args.compare:
                die(f"reward, problem {n}: has no response to compare with: --compare MODEL")
    packages = {name: version(name) for name in ("torch", "transformers", "datasets")}
    outcome = {"version": 2, "scores as": "lm_eval 0.4.13", "packages": packages}
    outcome["settings"] = vars(args)
    outcome |= evaluate(args.model, data, args)
    if args.compare:
        outcome["compare"] = evaluate(args.compare, data, args)
        print_differences(outcome, outcome["compare"])
    if "reward" in data:
        judge(outcome, data["reward"][0], reward_model, args)
    if args.out:
        write(Path(args.out), json.dumps(outcome, indent=2) + "\n")
    return outcome


def read_task(name, task, args):
    """The problems to ask, up to --limit, and the (question, answer) of each one's worked examples."""
    k = task.shots or 0
    if task.shots != 0:  # as in lm_eval: where it is 0 it stays 0
        k = args.shots.get(name, k)
    everything = read_split(name, task, task.splits[0], args)
    pool = read_split(name, task, task.splits[1], args) if k else []
    need = k + (k > 0 and task.draw == "others")
    problems, shots = [], []
    # MMLU's subjects are tasks of their own, as in lm_eval: examples and --limit are of each.
    subjects = [problem.get("subject", name) for _, problem in everything]
    for subject in dict.fromkeys(subjects) or [name]:
        rows = [pair for pair in everything if pair[1].get("subject", name) == subject]
        others = [pair for pair in pool if pair[1].get("subject", name) == subject]
        if not rows or len(others) < need:
            die(f"{subject}: too few, {len(rows)} problems, {len(others)} rows for {need} worked examples")
        limit = args.limit or len(rows)
        rows = rows[: math.ceil(limit * len(rows)) if limit < 1 else int(limit)]
        examples = {id(row): (problem["question"], problem["target"]) for row, problem in others}
        problems += [problem for _, problem in rows]
        drawn = draw_shots([row for row, _ in others], k, [row for row, _ in rows], task.draw)
        shots += [[examples[id(row)] for row in some] for some in drawn]
    return problems, shots


def read_split(name, task, split, args):
    """[(row, problem)] of a split. A bad row ends the run; of `answers`, more than a tenth do."""
    found, unusable = [], []
    for place, row in find_rows(name, task, split, args):
        try:
            row = Row(row)
            found.append((row, task.read(row)))
        except (*UNUSABLE, IndexError) as error:
            column = getattr(row, "column", "")
            cell = row.get(column, row) if isinstance(row, dict) else row
            unusable.append(f"{place}: {column} {error}; found {cell!r:.200}")
    if len(unusable) > (len(found) / 9 if name == "answers" else 0):
        die(unusable[0])
    if unusable:
        print(f"warning: {name}: {len(unusable)} rows are left out, the first is {unusable[0]}")
    empty = sum("" in problem.get("choices", ()) for _, problem in found)
    if empty:
        print(f"warning: {name}: nothing follows the _ in {empty} sentences, one blank is scored")
    return found


def find_rows(name, task, split, args):
    """(place, row) pairs of a split: of a file, of the file so named in a folder, or of the Hub."""
    path = Path(args.data.get(name, task.data[0]))
    if name not in args.data and not path.exists():
        import datasets  # slow to import, and files do not need it

        try:
            rows = datasets.load_dataset(*task.data, split=split)
        except (OSError, ValueError) as error:
            die(f"{path}: {str(error).splitlines()[0]}; --data {name}=PATH reads local files")
        return [(f"{path} row {n}", row) for n, row in enumerate(rows, 1)]
    if not path.is_dir() and split == task.splits[0]:
        return read_rows(str(path), split)
    folder = path if path.is_dir() else path.parent
    subjects = [part for part in sorted(folder.glob("*")) if part.is_dir() and name == "mmlu"]
    found = []
    for part in subjects or [folder]:
        files = [*part.glob(f"{split}.*")]
        if len(files) != 1:
            hint = "; for the worked examples, or give --shots 0" if split == task.splits[1] else ""
            die(f"{part}: there should be one file {split}.jsonl (or .json, .csv, .parquet){hint}")
        more = {"subject": part.name} if subjects else {}
        found += [(place, row | more) for place, row in read_rows(str(files[0]), split)]
    return found


# What a sample counts, because it may explain a bad result.
CAUSES = {"truncated": "prompts lost their beginning", "empty": "responses are empty"}
CAUSES |= {"unfinished": "responses were cut at --max-new-tokens"}


def evaluate(path, data, args):
    """Ask one model; data: {task: (problems, their examples)} -> its results and samples by task."""
    policy = load_policy(path, args)
    needing = [name for name in data if args.chat or TASKS[name].always_chat]
    if needing and not policy.tokenizer.chat_template:
        die(f"{path} has no chat template: --chat, answers and mt_bench need one; {needing[0]}")
    outcome = {"model": path, "results": {}, "samples": {}}
    for name, (problems, shots) in data.items():
        samples = TASKS[name].run(name, TASKS[name], problems, shots, policy, args)
        outcome["samples"][name] = [{"doc_id": n} | sample for n, sample in enumerate(samples)]
        results = {name: summarize(samples)}
        if name == "mmlu":
            results = mmlu_results([problem["subject"] for problem in problems], samples)
        outcome["results"] |= {key: result | {"shots": len(shots[0])} for key, result in results.items()}
    print_results(outcome)
    return outcome


def summarize(samples):
    """Means over problems, their standard errors, None for one problem, and the CAUSES counted."""
    summary = {"n": len(samples)}
    summary |= {key: sum(sample.get(key, 0) for sample in samples) for key in CAUSES}
    for metric in samples[0]["metrics"] if samples else []:
        values = [sample["metrics"][metric] for sample in samples]
        summary |= {metric: fmean(values), metric.replace(",", "_stderr,"): stderr(values)}
    return summary


def stderr(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mmlu_results(subjects, samples):
    """Of MMLU, its groups and subjects: accuracy over all questions and its standard error from the
    variances within subjects, as in lm_eval; acc,unweighted: the mean of the subjects' accuracies."""
    by_subject, results = {}, {}
    for subject, sample in zip(subjects, samples):
        by_subject.setdefault(subject, []).append(sample)
    for group, names in {"mmlu": " ".join(SUBJECTS.values()), **SUBJECTS}.items():
        parts = [by_subject[name] for name in names.split() if name in by_subject]
        if not parts:
            continue
        rights = [[sample["metrics"]["acc,none"] for sample in part] for part in parts]
        result = summarize([sample for part in parts for sample in part])
        result |= {"acc,unweighted": fmean(map(fmean, rights)), "acc_stderr,none": None}
        if min(map(len, rights)) > 1:
            squares = sum((len(right) - 1) * variance(right) for right in rights)
            n = result["n"]
            result["acc_stderr,none"] = math.sqrt(squares / (n - len(parts)) / n)
        results[group if group == "mmlu" else f"mmlu_{group}"] = result
    return results | {f"mmlu_{name}": summarize(part) for name, part in by_subject.items()}


def compare(ours, theirs):
    """Values of a metric by problem -> mean difference, half its 95 % interval, McNemar's exact p.

    p: of the problems that one model alone gets right, how likely would a fair coin split them as
    unevenly? None unless all values are 0 or 1.
    """
    # Problems are hard or easy for both models; in a difference that cancels.
    differences, p = [a - b for a, b in zip(ours, theirs)], None
    if {*ours, *theirs} <= {0, 1}:
        wins, losses = differences.count(1), differences.count(-1)
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
    error = stderr(differences)
    return {"difference": fmean(differences), "half_width": error and 1.96 * error, "mcnemar_p": p}


def print_results(outcome):
    """A line per metric; below, what may explain a bad one."""
    rows = []
    for name, result in outcome["results"].items():
        for metric in [key for key in result if "," in key and "_stderr," not in key]:
            error = result.get(metric.replace(",", "_stderr,"))
            width = error and 1.96 * error
            rows.append([f"{name},{metric}", result[metric], width, result["n"], result["shots"]])
    if rows:  # mt_bench has none
        print_table([outcome["model"], "value", "±", "n", "shots"], rows)
    for name, result in outcome["results"].items():
        for key in [key for key in CAUSES if result[key] and name in TASKS]:
            print(f"{name}: {result[key]} {CAUSES[key]}")


def print_differences(outcome, other):
    """A row per metric; all go into `other`, the outcome of --compare, too."""
    other["differences"], rows = {}, []
    for name, samples in outcome["samples"].items():
        for metric in samples[0]["metrics"]:
            ours = [sample["metrics"][metric] for sample in samples]
            theirs = [sample["metrics"][metric] for sample in other["samples"][name]]
            found = other["differences"][f"{name},{metric}"] = compare(ours, theirs)
            difference, width, p = found.values()
            tiny = p is not None and p < 0.001
            rows.append([f"{name},{metric}", difference, width, "<0.001" if tiny else p])
    print_table([f"difference from {other['model']}", "", "±", "p"], rows)


def print_table(head, rows):
    """'gsm8k,exact_match,strict-match' is shown as 'gsm8k strict-match', 'mmlu,acc,none' as 'mmlu acc'."""
    wide = max(len(row[0]) for row in [head, *rows])
    print()
    for first, *cells in [head, *rows]:
        first = re.sub(",(none|create_test)|exact_match,", "", first).replace(",", " ")
        cells = ["-" if cell is None else cell for cell in cells]
        cells = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"{first:{wide}}" + "".join(f"{cell:>10}" for cell in cells))


# ---- 9. Models and files -----------------------------------------------------------------------

# window: as many tokens as prompt and response may have together; kinds: what the model keeps of the
# tokens that it has read, as the names of the classes of its cache's layers
Policy = namedtuple("Policy", "model tokenizer window kinds")


def load_policy(path, args):
    model, tokenizer = load_model("AutoModelForCausalLM", path, args)
    window = find_window(model.config, tokenizer)
    # A BOS in front changes every score, so it is said.
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else "no BOS token"
    size = sum(weight.numel() for weight in model.parameters())
    print(f"model {path}: {size:,} parameters, {str(model.dtype)[6:]}, {model.device}; ", end="")
    print(f"prompts begin with {begin}; window {window or '2048, as none is given'}")
    return Policy(model, tokenizer, window or 2048, cache_kinds(model))


def cache_kinds(model):
    out = model(torch.tensor([[0]], device=model.device), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    return {type(layer).__name__ for layer in getattr(cache, "layers", [None])}


def find_window(config, tokenizer):
    """In lm_eval's order; None: unknown, some tokenizers say 1e30."""
    config = getattr(config, "text_config", None) or config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it, numbers depend on a batch's other rows
        return rope["original_max_position_embeddings"]
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    windows = [getattr(config, name, None) for name in names]
    windows += [tokenizer.model_max_length] if tokenizer.model_max_length < 1e29 else []
    return next(filter(None, windows), None)


def load_model(kind, path, args, **more):
    """A model of this kind, and its tokenizer."""
    import transformers  # slow, and a wrong flag should be found at once

    transformers.logging.set_verbosity_error()  # it would only warn of missing weights
    transformers.logging.disable_progress_bar()
    tokenizer = load(transformers.AutoTokenizer, path, "a tokenizer")
    if tokenizer.eos_token is None:
        die(f"{path}: the tokenizer has no EOS token, a response could not end")
    if tokenizer.pad_token is None:  # as lm_eval does
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    how = {"dtype": args.dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = load(getattr(transformers, kind), path, f"an {kind}", **how, **more)
    if info["missing_keys"]:
        die(f"{path}: lacks {', '.join(sorted(info['missing_keys'])):.200}: they would be random")
    known = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= known:
        die(f"{path}: the tokenizer has more tokens than the {known} that the model knows")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.device not in ("auto", "cpu", best):
        die(f"--device {args.device}: PyTorch finds none here, the best is {best}")
    return model.eval().to(best if args.device == "auto" else args.device), tokenizer


def write(file, text):
    """The file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def run_safely(main, args):
    """main(args); Ctrl-C, or what cannot be read or written, ends in a sentence."""
    try:
        return main(args)
    except KeyboardInterrupt:
        print("error: stopped; --answers goes on where it was, else all starts anew", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        die(str(error))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code instead
        stream.reconfigure(errors="backslashreplace")
    run_safely(main, parse_args())
