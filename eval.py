"""Benchmarks for language models in one file, with the scores of EleutherAI's lm_eval 0.4.13.

A score depends on many small decisions: each character of the prompt, the few-shot examples, where
a response stops, which number in it counts. This file makes all of them as lm_eval does. On the same
model and data, prompts, responses, log-likelihoods and metrics are the same; see tests/parity.

    generation         gsm8k extracts a number from the response, humaneval runs the program in it
    multiple choice    arc, hellaswag, winogrande, truthfulqa, mmlu: the likeliest choice is the answer
    not in lm_eval     answers asks as gsil.py and irft.py train; reward is the win rate under a
                       reward model; mt_bench writes responses for FastChat's judge. These prompt
                       and sample as gsil.py does: no penalties, on a GPU in bfloat16

Two models answer the same problems, so --compare tests their differences problem by problem.

    python eval.py                                  # the toy's base model on its held-out problems
    python eval.py --model runs/gsil-logistic-1/round_1 --compare tests/toy/base --out scores.json
"""

import argparse
import copy
import json
import math
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev, variance
from subprocess import DEVNULL, PIPE, Popen
from typing import NamedTuple

import torch
import transformers
from jinja2 import TemplateError
from tqdm import tqdm

import gsil
from gsil import TOY, die, final_answer, load, pad, read_rows


def parse_args(argv=None):
    """Parse and check the flags. The result has a list of tasks, and in data the path of each task."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # prints the docstring as it is
    parser.usage = "%(prog)s [--FLAG VALUE ...]; --help explains the flags"
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    flag = parser.add_argument
    flag("--model", default=f"{TOY}/base", help="a folder or a Hub name (default: the toy's base)")
    flag("--compare", metavar="MODEL", help="a second model, compared with it problem by problem")
    flag("--tasks", default="answers", help=f"one or more, with commas: {', '.join(TASKS)}")
    flag("--data", action="append", default=[], metavar="[TASK=]PATH", help="file or folder")
    flag("--limit", type=float, help="the first N problems only, or below 1 this share of them")
    flag("--shots", type=int, metavar="N", help="few-shot examples; without it 5 for gsm8k, else 0")
    flag("--chat", action="store_true", help="use the chat template, as tasks not in lm_eval do")
    flag("--max-new-tokens", type=int, help="longest response; without it 256, for programs 1024")
    flag("--samples", type=int, default=1, help="responses per problem, whose mean is its score")
    flag("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    flag("--seed", type=int, default=0, help="for sampling, which also depends on --batch-size")
    flag("--reward-model", metavar="MODEL", help="for reward: a classifier with one label")
    flag("--reward-template", help="its chat template, if it has none; beaver: PKU-Alignment's")
    flag("--allow-code-execution", action="store_true", help="run programs that the model writes")
    flag("--batch-size", type=int, default=16, help="responses at once; more: faster, more memory")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved")
    flag("--device", choices=sorted({best, "cpu"}), default=best, help="computes everything")
    flag("--out", help="JSON file for the settings, versions, results and all samples")
    flag("--answers", metavar="FILE", help="for mt_bench: the file that FastChat will read")
    for action in parser._actions:
        if (action.choices and action.default) or type(action.default) in (int, float):
            action.help += " (default: %(default)s)"
    parser.error = die
    args = parser.parse_args(argv)
    tasks, args.tasks = args.tasks, args.tasks.split(",")
    if not {*args.tasks} <= {*TASKS} or len({*args.tasks}) < len(args.tasks):
        parser.error(f"--tasks {tasks}: name each task once, out of {', '.join(TASKS)}")
    data, args.data = args.data, {"answers": f"{TOY}/heldout.jsonl"}
    for item in data:
        task, _, path = (item if "=" in item else f"{tasks}={item}").partition("=")
        if task not in args.tasks or not path:
            parser.error(f"--data {item}: should be TASK=PATH, with one of --tasks {tasks}")
        args.data[task] = path
    for name, value in vars(args).items():
        low = 0 if value == 0 and name in ("shots", "temperature", "seed") else 1e-9
        if value == "" or (type(value) in (int, float) and not low <= value < math.inf):
            parser.error(f"--{name.replace('_', '-')}={value}: out of range")
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples {args.samples}: greedy responses are the same, set a --temperature")
    if "reward" in args.tasks and (not args.reward_model or args.samples > 1):
        parser.error("the task reward needs a --reward-model, and one sample per problem")
    mt_bench = "mt_bench" in args.tasks
    if not bool(args.answers) == mt_bench == ("mt_bench" in args.data) or (mt_bench and args.compare):
        parser.error("the task mt_bench needs --data and --answers FILE, and takes no --compare")
    if "humaneval" in tasks and not args.allow_code_execution:
        parser.error("humaneval runs programs that the model writes: give --allow-code-execution")
    return args


# ---- 1. Prompts -----------------------------------------------------------------------------
def draw_examples(pool, k, problems, sampler):
    """Give each problem k few-shot examples from the pool, the same ones as lm_eval. sampler: "random";
    "first_n", the first k of the pool; or "others", random ones without the problem itself."""
    stream = random.Random(1234)  # lm_eval's default seed; it serves all problems, so order matters
    for problem in problems:
        if k == 0 or sampler == "first_n":
            drawn = pool[:k]
        elif sampler == "random":
            drawn = stream.sample(pool, k)
        else:
            drawn = [x for x in stream.sample(pool, k + 1) if x["row"] != problem["row"]][:k]
            if len(drawn) < k:  # the pool contains the problem twice
                drawn = stream.sample([x for x in pool if x["row"] != problem["row"]], k)
        problem["examples"] = drawn


def build_prompt(problem, tokenizer=None):
    """Few-shot examples, then the question: 'Question: 1+1?\\nAnswer: 2\\n\\nQuestion: 2+2?\\nAnswer:'.
    With a tokenizer every question and every answer is a turn in its chat template instead."""
    description = problem.get("description", "")  # most tasks have none
    gen_prefix = problem.get("gen_prefix", "")  # the beginning of the response
    if tokenizer is None:
        examples = [f"{x['question']} {x['target']}\n\n" for x in problem["examples"]]
        return description + "".join(examples) + problem["question"] + gen_prefix
    turns = [turn("system", description)] if description else []
    for example in problem["examples"]:
        turns += [turn("user", example["question"]), turn("assistant", example["target"])]
    turns.append(turn("user", problem["question"]))
    turns += [turn("assistant", gen_prefix)] if gen_prefix else []
    begun = turns[-1]["role"] == "assistant"
    options = {"tokenize": False, "add_generation_prompt": not begun, "continue_final_message": begun}
    spoken = [one for one in turns if one["role"] != "system"]
    for messages in (turns, spoken):  # a template may refuse a system turn, then lm_eval drops it
        with suppress(TemplateError):
            prompt = tokenizer.apply_chat_template(messages, **options)
            if all(one["content"].strip() in prompt for one in spoken):
                return prompt
    die(f"{tokenizer.name_or_path}: the chat template refuses, changes or drops a turn of {turns!r:.300}")


def turn(role, text):
    return {"role": role, "content": text}


def to_ids(lm, text):
    """Text -> token ids. If the tokenizer adds BOS it comes first, unless the text begins with it."""
    has_bos = lm.tokenizer.bos_token and text.startswith(lm.tokenizer.bos_token)
    ids = lm.tokenizer(text, add_special_tokens=not has_bos).input_ids
    if max(ids, default=0) >= (known := lm.config.get_text_config().vocab_size):
        token = lm.tokenizer.convert_ids_to_tokens(max(ids))
        die(f"the tokenizer gives {token!r} the id {max(ids)}, the model has only {known} embeddings")
    return ids


def ask(name, problem, lm, args):
    """What lm_eval gives to a model: a prompt, its ids (cut at their beginning if they do not fit) and
    whether they were cut; or for choices the prompts, the continuations, and pairs of ids of both."""
    tokenizer = lm.tokenizer if args.chat else None
    if "choices" not in problem:
        prompt, room = build_prompt(problem, tokenizer), lm.window - lm.longest[name]
        ids = to_ids(lm, prompt)
        return {"prompt": prompt, "truncated": len(ids) > room, "ids": ids[-room:]}
    questions = problem.get("questions") or [problem["question"]] * len(problem["choices"])
    prompts = [build_prompt(problem | {"question": x}, tokenizer) for x in questions]
    continuations = [choice if args.chat else f" {choice}" for choice in problem["choices"]]
    truncated, pairs = False, []
    for prompt, continuation in zip(prompts, continuations):
        # As in lm_eval, both are encoded as one text, which is divided after as many ids as the
        # prompt has by itself. Spaces at the end of the prompt belong to the continuation.
        context = to_ids(lm, prompt.rstrip())
        rest = to_ids(lm, prompt + continuation)[len(context) :]
        if not (context and 0 < len(rest) <= lm.window):
            die(f"{name}: {continuation!r:.99} has {len(rest)} tokens, not 1 to {lm.window}, in {prompt!r}")
        room = lm.window + 1 - len(rest)  # the last token is never read
        pairs.append((context[-room:], rest))
        truncated = truncated or len(context) > room
    prompts = [*dict.fromkeys(prompts)]  # most often one, the same for all choices
    return {"prompts": prompts, "continuations": continuations, "truncated": truncated, "pairs": pairs}


# ---- 2. Generation: what does the model respond? --------------------------------------------
def generate(lm, prompts, stop, max_new_tokens, temperature, batch_size, name=""):
    """Prompts (lists of token ids) -> [(response, was it cut at max_new_tokens?)]. A response ends as in
    lm_eval, where an EOS that is not special stays in the text. The generation config applies: see KEPT."""
    model, tokenizer = lm.model, lm.tokenizer
    listed = model.generation_config.eos_token_id  # an id, ids or None
    eos_ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
    stop = [*stop, *(model.generation_config.stop_strings or []), tokenizer.eos_token]
    tail = max(len(text.encode()) for text in stop) + 2  # the last `tail` tokens hold any of them
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "use_cache": True}
    options |= {"temperature": temperature or None, "top_k": 0, "top_p": 1.0}  # the whole distribution
    options |= {"eos_token_id": sorted(eos_ids), "pad_token_id": tokenizer.eos_token_id}
    options |= {"stop_strings": None, "logits_processor": [lambda ids, logits: check_nan(logits, name)]}
    if lm.cache_size and model.device.type == "cpu":
        options["prefill_chunk_size"] = max(1, 1024 // batch_size)  # fastest at 1000 tokens a pass
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # too little memory shows early
    responses = [None] * len(prompts)
    for n in tqdm(range(0, len(order), batch_size), desc=name, leave=False, disable=None):
        rows = order[n : n + batch_size]
        ids = pad([prompts[i] for i in rows], "left", model.device)  # (B, P)
        mask = pad([[1] * len(prompts[i]) for i in rows], "left", model.device)  # (B, P)
        width = ids.shape[1]

        def stopped(ids, scores, start=width, **_):
            """Which rows contain a stop sequence? (B, T) -> (B,). A special token only shows here."""
            tails = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - tail) :])
            return torch.tensor([any(text in end for text in stop) for end in tails], device=ids.device)

        out = model.generate(ids, attention_mask=mask, stopping_criteria=[stopped], **options)
        out = out[:, width:]  # (B, T)
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        for i, ids, text, raw in zip(rows, out.tolist(), texts, tokenizer.batch_decode(out)):
            responses[i] = cut(text, stop), not eos_ids & {*ids} and cut(raw, stop) == raw
    return responses


def cut(text, stop):
    """cut('18\\n\\nQ: Why?', ['Q:', '\\n\\n']) -> '18'."""
    for sequence in stop:
        text = text.split(sequence)[0]
    return text


def check_nan(logits, name):
    """Broken weights would otherwise get a score: the argmax of NaNs is a token like any other."""
    if logits.isnan().any():
        die(f"{name}: the model's logits are NaN: its weights are broken, or need another --dtype")
    return logits


def run_generation(name, problems, lm, args):
    """Let the model respond to all problems -> a sample for each: prompt, responses, metrics."""
    task, samples = TASKS[name], [{**problem["asked"][lm.path]} for problem in problems]
    prompts = [ids for sample in samples for ids in [sample.pop("ids")] * args.samples]
    options = (lm.longest[name], args.temperature, args.batch_size)
    if task.own:
        rows = gsil.sample(lm.model, prompts, lm.eos_ids, *options, f"{args.seed} {name}")
        responses = [(gsil.decode(ids, lm), ids[-1] not in lm.eos_ids) for ids in rows]
    else:
        torch.manual_seed(args.seed)
        responses = generate(lm, prompts, task.stop, *options, name)
    for n, sample in enumerate(samples):
        part = responses[n * args.samples : (n + 1) * args.samples]
        sample["responses"] = [text for text, _ in part]
        sample["unfinished"] = sum(was_cut for _, was_cut in part)
        sample["empty"] = sum(not text.strip() for text, _ in part)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads suffice, as programs run in processes
        scores = pool.map(task.score, problems, [sample["responses"] for sample in samples])
    return [sample | score for sample, score in zip(samples, scores)]


# ---- 3. Log-likelihoods: which choice is the most likely continuation? ----------------------
@torch.no_grad()
def loglikelihoods(lm, pairs, name=""):
    """[(context, continuation)], lists of token ids -> log p(continuation | context) in nats. A context
    is read once, and all its continuations go on from copies of its key-value cache. If it shares most
    tokens with the context before it, as MMLU's do, only the others are read at all."""
    model, device = lm.model, lm.model.device
    groups = {}  # context -> the indices of its pairs
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    values = [0.0] * len(pairs)
    cache, cached = None, ()  # the cache, and the ids that are in it
    for context, members in tqdm(groups.items(), desc=name, leave=False, disable=None):
        continuations = [pairs[i][1] for i in members]
        inputs = [ids[:-1] for ids in continuations]  # the last token is predicted, but never read
        longest = max(map(len, continuations))
        if lm.cache_size:
            shared = len(os.path.commonprefix([cached[:-1], context[:-1]]))
            if shared > len(context) / 2 and len(cached) < lm.cache_size:
                cache.crop(shared - len(cached))  # minus the number of tokens to remove
            else:
                cache, shared = None, 0
            ids = torch.tensor([context[shared:]], device=device)  # (1, P)
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, cached = out.past_key_values, context
            logits = out.logits.expand(len(members), -1, -1)  # (C, 1, V)
            if longest > 1:
                copies = copy.deepcopy(cache)
                copies.batch_repeat_interleave(len(members))
                # No mask is needed: padding is on the right, where causal attention never looks.
                more = model(pad(inputs, "right", device), past_key_values=copies).logits
                logits = torch.cat([logits, more], 1)  # (C, longest, V)
        else:  # other states cannot go on with several tokens at once: each choice is read whole
            ids = pad([[*context, *ids] for ids in inputs], "right", device)
            logits = model(ids, logits_to_keep=longest).logits  # (C, longest, V)
        logps = check_nan(logits.log_softmax(-1), name)  # in the model's dtype, as in lm_eval
        for i, ids, row in zip(members, continuations, logps):
            values[i] = row[range(len(ids)), ids].sum().item()
    return values


def run_choices(name, problems, lm, args):
    """Let the model choose -> a sample for each problem: prompts, log-likelihoods, metrics."""
    samples = [{**problem["asked"][lm.path], "gold": problem["gold"]} for problem in problems]
    values = iter(loglikelihoods(lm, [pair for sample in samples for pair in sample.pop("pairs")], name))
    for problem, sample in zip(problems, samples):
        lls = [next(values) for _ in problem["choices"]]
        sample |= {"loglikelihoods": lls, "metrics": TASKS[name].score(problem, lls)}
    return samples


# ---- 4. Scoring -----------------------------------------------------------------------------
def acc(problem, lls):
    """Is the most likely choice the right one? Of equal ones the first counts."""
    return {"acc,none": float(lls.index(max(lls)) == problem["gold"])}


def acc_and_acc_norm(problem, lls):
    """acc_norm divides each log-likelihood by the length of its choice in characters."""
    norm = [ll / len(choice) for ll, choice in zip(lls, problem["choices"])]
    return acc(problem, lls) | {"acc_norm,none": float(norm.index(max(norm)) == problem["gold"])}


def mc2(problem, lls):
    """The share of the probability that the model gives to the true choices."""
    shares = torch.tensor(lls, dtype=torch.float64).softmax(0).tolist()
    return {"acc,none": sum(share for share, true in zip(shares, problem["labels"]) if true)}


def extract(pattern, index, text):
    """The match number `index` of a pattern; of several groups the first one that is not empty."""
    groups = (re.findall(pattern, text) or ["[invalid]"])[index]
    return (groups if isinstance(groups, str) else next(filter(None, groups))).strip()


def normalize(text):
    """Remove what exact_match ignores: , and $, all up to the last '#### ', a final point, case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):  # in the same order as in lm_eval
        text = re.sub(ignored, "", text)
    return text.lower()


def exact_match(problem, responses, strict):
    """Compare two numbers of a response with gold, as text: that of the strict pattern, the last one."""
    filters = {"strict-match": (strict, 0), "flexible-extract": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
    extracted, metrics = {}, {}
    for name, which in filters.items():
        extracted[name] = [extract(*which, text) for text in responses]
        metrics[f"exact_match,{name}"] = fmean(normalize(x) == problem["gold"] for x in extracted[name])
    return {"gold": problem["gold"], "extracted": extracted, "metrics": metrics}


def final_answer_match(problem, responses):
    """Compare what follows '####' in a response with the demonstration's, as gsil.py does."""
    answers = [final_answer(text) for text in responses]
    metrics = {"exact_match,final-answer": fmean(answer == problem["gold"] for answer in answers)}
    return {"gold": problem["gold"], "extracted": {"final-answer": answers}, "metrics": metrics}


def pass_at_1(problem, responses):
    """Run prompt + response (up to `end`) + tests: which share of the responses pass?"""
    programs = [problem["code"] + cut(text, problem.get("end", ())) for text in responses]
    passed = [passes(f"{program}\n{problem['gold']}") for program in programs]
    sample = {"gold": problem["gold"], "extracted": {"create_test": programs}, "passed": passed}
    return sample | {"metrics": {"pass@1,create_test": fmean(passed)}}


# What the process of a program does: set limits, close input and output, run the program. Only if the
# program ends without an exception or an exit does it read the secret from a pipe and send it back.
RUNNER = r"""
import contextlib, json, os, resource
program, seconds = json.load(open("job.json"))
source, answer, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2): os.dup2(nowhere, stream)
for name, most in dict(AS=4 << 30, CPU=int(seconds) + 1, FSIZE=1 << 20, CORE=0, NPROC=None).items():
    with contextlib.suppress(AttributeError, IndexError, OSError, ValueError):  # not every system has all
        if most is None:  # on Linux 256 more than all processes and threads that there are
            most = int(open("/proc/loadavg").read().split()[3].split("/")[1]) + 256
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
read, write, leave = os.read, os.write, os._exit
exec(compile(program, "candidate.py", "exec"), {})
write(answer, read(source, 16))
leave(0)
"""


def passes(program, seconds=3.0):
    """Does a program end without an exception, within 3 s as in lm_eval (and 1 s to start Python)?
    This is no sandbox: a program can use the network, read your files, or do as RUNNER does."""
    secret, deadline = os.urandom(16), time.monotonic() + seconds + 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "job.json").write_text(json.dumps([program, seconds]))
        env = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
        options = {"cwd": folder, "env": env, "start_new_session": True, "stderr": DEVNULL, "bufsize": 0}
        with Popen([sys.executable, "-I", "-c", RUNNER], stdin=PIPE, stdout=PIPE, **options) as child:
            with suppress(BrokenPipeError):
                child.stdin.write(secret)
            replies = []
            for _ in range(2):  # after the secret its output must end: no process may be left
                if select.select([child.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                    replies.append(child.stdout.read(16))
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with all processes that it has started
    return replies == [secret, b""]


@torch.no_grad()
def rewards(rm, problems, responses=None):
    """The reward of each response, a float, read where irft.py fits it: at the EOS that ends gsil.encode's
    ids. Without responses those of the data."""
    rm.model.config.get_text_config().pad_token_id = None  # else EOS would be skipped as a pad
    # BEAVER has no BOS, as its tokenizer adds one.
    begin = rm.tokenizer("").input_ids if rm.tokenizer.chat_template == BEAVER else []
    values, unreadable = [], 0
    for i, problem in enumerate(tqdm(problems, "rewards", leave=False, disable=None)):
        ids = problem["demo"]["prompt_ids"] + problem["demo"]["real_ids"]
        if responses:
            text = cut(responses[i], filter(None, map(rm.tokenizer.decode, rm.eos_ids))).strip()
            try:
                turns = {"messages": [*problem["turns"], turn("assistant", text)]}
                demo = gsil.encode(turns, rm.tokenizer, rm.eos_ids)
                ids = demo["prompt_ids"] + demo["real_ids"]
                check(len(ids) <= rm.window, "it does not fit the window")
            except (TemplateError, UserWarning, ValueError):  # an empty one is EOS alone, as after the data's
                ids = problem["demo"]["prompt_ids"] + problem["demo"]["real_ids"][-1:]
                unreadable += text != ""
        logits = rm.model(torch.tensor([begin + ids], device=rm.model.device)).logits
        values.append(check_nan(logits, "reward").item())
    if unreadable:
        print(f"warning: reward: {unreadable} responses are no text for the reward model, so count as empty")
    return values


def duel(outcome, problems, rm, args):
    """How often do the responses get more reward than those of --compare, or than the data's?"""
    sides = [outcome, *([outcome["compare"]] if args.compare else [])]
    ours, *others = [[x["responses"][0].strip() for x in side["samples"]["reward"]] for side in sides]
    theirs = others[0] if others else [problem["response"] for problem in problems]
    a, b = rewards(rm, problems, ours), rewards(rm, problems, *others)
    wins, ties = sum(x > y for x, y in zip(a, b)), sum(x == y for x, y in zip(a, b))
    result = {"against": args.compare or "the data", "n": len(a), "wins": wins, "ties": ties}
    result |= {"win_rate": wins / len(a), "reward": fmean(a), "other_reward": fmean(b)}
    result |= paired_difference(a, b)
    result |= {"characters": fmean(map(len, ours)), "other_characters": fmean(map(len, theirs))}
    print_table([["reward", ""], *result.items()])
    return result | {"rewards": a, "other_rewards": b}


# The temperature by category, otherwise 0.7: FastChat 0e6d3e4b, llm_judge/common.py
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0}


def run_mt_bench(name, problems, lm, args):
    """Ask both questions of each problem, the second one after the answer to the first."""
    samples, room = [], lm.window - lm.longest[name]  # a longer prompt loses its beginning
    for problem in tqdm(problems, name, leave=False, disable=None):
        temperature = TEMPERATURES.get(problem["category"], 0.7)
        settings = argparse.Namespace(**vars(args) | {"temperature": temperature, "seed": 0, "samples": 1})
        turns, parts = [], []
        for question in problem["questions"]:
            turns.append(turn("user", question))
            prompt = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = lm.tokenizer.encode(prompt, add_special_tokens=False)
            asked = {"prompt": prompt, "truncated": len(ids) > room, "ids": ids[-room:]}
            parts += run_generation(name, [{"asked": {lm.path: asked}}], lm, settings)
            turns.append(turn("assistant", parts[-1]["responses"][0].strip()))
        responses = [message["content"] for message in turns if message["role"] == "assistant"]
        line = {"question_id": problem["id"], "answer_id": os.urandom(11).hex(), "tstamp": time.time()}
        line |= {"model_id": Path(args.answers).stem, "choices": [{"index": 0, "turns": responses}]}
        counts = {cause: sum(part[cause] for part in parts) for cause in CAUSES}
        samples.append(counts | {"responses": responses, "metrics": {}, "fastchat": line})
    return samples


# ---- 5. Tasks -------------------------------------------------------------------------------
class Task(NamedTuple):
    """A task as in lm_eval/tasks. A problem has question (the text asked), target (its answer in few-shot
    examples), gold (what the score compares with) and perhaps choices, and questions if each has one."""

    hub: str  # NAME or NAME:CONFIGURATION of the data on the Hub, used without --data
    read: Callable  # turns a row of the data into a problem, or raises an error if it is unusable
    score: Callable = lambda problem, said: {"metrics": {}}  # said: responses or log-likelihoods
    run: Callable = run_generation
    splits: str = "test"  # of the problems; and of the few-shot examples, if there can be any
    sampler: str = "random"  # of the few-shot examples, see draw_examples
    num_fewshot: int = 0  # unless --shots says otherwise
    stop: tuple = ()  # a response ends before any of these sequences
    max_new_tokens: int = 256
    own: bool = False  # not from lm_eval, but asked and measured as gsil.py does


def check(condition, message):
    """lm_eval silently scores many rows that lack what their task needs."""
    if not condition:
        raise ValueError(message)


def read_demonstration(row, lms, rm, name):
    """A row of any format that gsil.py trains on, with its prompt for each model. If one of them cannot
    be asked, the row is left out for all, so that they answer the same problems."""
    asked = {}
    for lm in lms:
        demo = gsil.encode(row, lm.tokenizer, lm.eos_ids, lm.window - lm.longest[name])
        known = lm.config.get_text_config().vocab_size > max(demo["prompt_ids"])
        check(known, "the model has no embedding for a token of the prompt")
        asked[lm.path] = {"prompt": demo["prompt"], "truncated": False, "ids": demo["prompt_ids"]}
    problem = {"row": row, "subject": name, "groups": [name], "turns": gsil.to_messages(row)[0][:-1]}
    problem |= {"response": demo["response"].strip(), "gold": demo["answer"], "asked": asked}
    if name == "answers":
        check(demo["answer"], "the response should end in '#### ' and the right value")
    else:
        problem["demo"] = gsil.encode(row, rm.tokenizer, rm.eos_ids, rm.window)
    return problem | {"columns": demo["columns"], "changed": demo["changed"]}


def read_gsm8k(row, template):  # gsm8k/gsm8k.yaml, gsm8k/gsm8k-cot-zeroshot.yaml
    answer = row["answer"]
    check(re.search(r"#### +[^\n]*\w", answer), "answer should end in '#### ' and the right value")
    return {"question": template.format(row["question"]), "target": answer, "gold": normalize(answer)}


def read_humaneval(row):  # humaneval/humaneval.yaml
    code, name = row["prompt"], row["entry_point"]
    check(f"def {name}(" in code, "entry_point should be defined in prompt")
    return {"question": code, "code": code, "gold": f"{row['test']}\ncheck({name})"}


def read_humaneval_instruct(row):  # humaneval/humaneval_instruct.yaml
    question = "Write a solution to the following problem and make sure that it passes the tests:\n"
    question += f"```python\n{row['prompt']}\n```\n"
    gen_prefix = f"Here is the completed function:\n```python\n{row['prompt']}\n"
    return read_humaneval(row) | {"question": question, "gen_prefix": gen_prefix, "end": ("```",)}


def multiple_choice(question, choices, gold):
    """gold is the index of the right choice."""
    check(all(isinstance(x, str) and x for x in choices), "each choice should be text, one is empty")
    check(0 <= gold < len(choices), f"answer should be an index of {len(choices)} choices")
    return {"question": question, "target": choices[gold], "choices": choices, "gold": gold}


def read_arc(row):  # arc/arc_easy.yaml
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    check(len(labels) == len(texts), "choices should have as many labels as texts")
    check(row["answerKey"] in labels, f"answerKey should be one of {labels}")
    return multiple_choice(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def read_hellaswag(row):  # hellaswag/utils.py
    # Remove WikiHow's marks like [title], and double spaces once, as in lm_eval.
    clean = lambda x: re.sub(r"\[.*?\]", "", x.strip().replace(" [title]", ". ")).replace("  ", " ")
    question = clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    check(row["label"] != "", "label is secret in this split: use train or validation")
    return multiple_choice(question, [clean(ending) for ending in row["endings"]], int(row["label"]))


def read_winogrande(row):  # winogrande/preprocess_winogrande.py
    before, _, after = row["sentence"].partition("_")
    check(after.strip(), "sentence should have a _ where the option goes, and a text after it")
    check(row["answer"] in ("1", "2"), "answer should be 1 or 2: use train or validation")
    questions = [before + row["option1"], before + row["option2"]]  # the same text continues both
    gold = int(row["answer"]) - 1
    return multiple_choice(questions[gold], [after.strip()] * 2, gold) | {"questions": questions}


TRUTHFULQA_EXAMPLES = (
    "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United "
    "States is 78 years.\n\nQ: Who was president of the United States in 1955?\nA: Dwight D. Eisenhower "
    "was president of the United States in 1955.\n\nQ: Which party did he belong to?\nA: He belonged to "
    "the Republican Party.\n\nQ: What is the square root of banana?\nA: I have no comment.\n\nQ: How does a "
    "telescope work?\nA: Telescopes use lenses or mirrors to focus light and make objects appear "
    "closer.\n\nQ: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain.\n\n"
)


def read_truthfulqa(row, targets="mc1_targets"):  # truthfulqa/truthfulqa_mc1.yaml, truthfulqa/utils.py
    choices, labels = row[targets]["choices"], row[targets]["labels"]
    check(len(labels) == len(choices), f"{targets} should have as many labels as choices")
    if targets == "mc1_targets":
        check(labels == [1] + [0] * (len(labels) - 1), "labels should be 1, 0, 0, ...")
    check({*labels} == {0, 1}, "labels should be 1 and 0")
    question = f"{TRUTHFULQA_EXAMPLES}Q: {row['question']}\nA:"
    return multiple_choice(question, choices, 0) | {"labels": labels}


MMLU_SUBJECTS = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
}


def read_mmlu(row):  # mmlu/default/_default_template_yaml
    subject = row["subject"]
    group = [group for group, subjects in MMLU_SUBJECTS.items() if subject in subjects.split()]
    check(group, "subject should be one of MMLU's 57")
    check(len(row["choices"]) == 4, "choices should be four texts")
    question = row["question"].strip() + "\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*row["choices"])
    about = f"multiple choice questions (with answers) about {subject.replace('_', ' ')}"
    more = {"description": f"The following are {about}.\n\n", "subject": subject}
    more["groups"] = ["mmlu", f"mmlu_{group[0]}", f"mmlu_{subject}"]
    return multiple_choice(question, [*"ABCD"], int(row["answer"])) | more


def read_mt_bench(row, lms):  # FastChat's llm_judge/data/mt_bench/question.jsonl
    check(isinstance(row["turns"], list), "turns should be a list of texts")
    # Every template must have a place for all turns. A question stands for the answer to it.
    turns = [turn(role, text) for text in row["turns"] for role in ("user", "assistant")]
    for lm in lms:
        gsil.encode({"messages": turns}, lm.tokenizer, lm.eos_ids)
    return {"id": row["question_id"], "category": row["category"], "questions": row["turns"]}


ARC, GSM8K = "allenai/ai2_arc:ARC", "openai/gsm8k:main"
TRUTHFULQA = "truthfulqa/truthful_qa:multiple_choice"
GSM8K_STOP, CODE_STOP = ("</s>", "<|im_end|>"), ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
read_mc2 = partial(read_truthfulqa, targets="mc2_targets")
code = partial(Task, score=pass_at_1, stop=CODE_STOP, max_new_tokens=1024)
choices = partial(Task, run=run_choices)
commonsense = partial(choices, splits="validation train", sampler="others")
TASKS = {
    "answers": Task("", read_demonstration, final_answer_match, own=True),
    "gsm8k": Task(
        GSM8K,
        partial(read_gsm8k, template="Question: {}\nAnswer:"),
        partial(exact_match, strict=r"#### (\-?[0-9\.\,]+)"),
        splits="test train",
        num_fewshot=5,
        stop=("Question:", *GSM8K_STOP),
    ),
    "gsm8k_cot_zeroshot": Task(
        GSM8K,
        partial(read_gsm8k, template="Q: {}\nA: Let's think step by step."),
        partial(exact_match, strict=r"The answer is (\-?[0-9\.\,]+)."),
        stop=("Q:", *GSM8K_STOP),
    ),
    "humaneval": code("openai/openai_humaneval", read_humaneval),
    "humaneval_instruct": code("openai/openai_humaneval", read_humaneval_instruct),
    "arc_easy": choices(f"{ARC}-Easy", read_arc, acc_and_acc_norm, splits="test train"),
    "arc_challenge": choices(f"{ARC}-Challenge", read_arc, acc_and_acc_norm, splits="test train"),
    "hellaswag": commonsense("Rowan/hellaswag", read_hellaswag, acc_and_acc_norm),
    "winogrande": commonsense("allenai/winogrande:winogrande_xl", read_winogrande, acc),
    "truthfulqa_mc1": choices(TRUTHFULQA, read_truthfulqa, acc, splits="validation"),
    "truthfulqa_mc2": choices(TRUTHFULQA, read_mc2, mc2, splits="validation"),
    "mmlu": choices("cais/mmlu:all", read_mmlu, acc, splits="test dev", sampler="first_n"),
    "reward": Task("Anthropic/hh-rlhf", read_demonstration, own=True),
    "mt_bench": Task("", read_mt_bench, run=run_mt_bench, max_new_tokens=1024, own=True),
}


# ---- 6. Main --------------------------------------------------------------------------------
def main(args):
    """Read the data, evaluate one or two models, print and write the results; return what --out has."""
    transformers.logging.set_verbosity_error()  # what it warns of is said in load_model
    transformers.logging.disable_progress_bar()
    if args.allow_code_execution:
        print("warning: programs run without a sandbox; use a container without network")
    with ExitStack() as undo:  # what is to be done if this run fails
        for path in filter(None, (args.out, args.answers)):
            try:
                open(path, "x").close()  # so that no other run takes this name
            except OSError as error:
                die(f"{path}: {error.strerror}; choose a file that does not exist yet")
            undo.callback(os.remove, path)
        # Mistakes in the data or in the other models should show before the first model works for hours.
        lms = [open_lm(path, args) for path in (args.model, args.compare) if path]
        rm = load_reward_model(args) if "reward" in args.tasks else None
        data = {name: read_task(name, lms, rm, args) for name in args.tasks}
        outcome = {"version": 2, "scores as": "lm_eval 0.4.13", "settings": vars(args)}
        outcome["packages"] = {name: version(name) for name in ("torch", "transformers", "datasets")}
        outcome |= evaluate(lms[0], data, args)
        if args.compare:
            outcome["compare"] = evaluate(lms[1], data, args)
            outcome["compare"]["differences"] = compare(outcome, outcome["compare"])
        if rm:
            outcome["duel"] = duel(outcome, data["reward"], rm, args)
        if "mt_bench" in data:
            lines = [json.dumps(sample["fastchat"]) + "\n" for sample in outcome["samples"]["mt_bench"]]
            Path(args.answers).write_text("".join(lines), encoding="utf-8")
        if args.out:
            Path(args.out).write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
        undo.pop_all()
    return outcome


def read_task(name, lms, rm, args):
    """The problems of a task, up to --limit, with their few-shot examples."""
    task = TASKS[name]
    split, *fewshot_split = task.splits.split()
    k = task.num_fewshot if args.shots is None or not fewshot_split else args.shots
    if task.read is read_demonstration:  # gsil.py says which columns are used, and leaves out rows
        encode_row = partial(read_demonstration, lms=lms, rm=rm, name=name)
        everything = gsil.read_demos(args.data.get(name, task.hub), split, encode_row)
    else:
        everything = read_split(name, split, lms, args)
    pool = read_split(name, fewshot_split[0], lms, args) if k else []
    needed = k + (k > 0 and task.sampler == "others")
    problems = []
    # Each of MMLU's subjects has its own examples and its own --limit. Other tasks are one subject.
    for subject in dict.fromkeys(problem["subject"] for problem in everything) or [name]:
        part, rest = ([one for one in rows if one["subject"] == subject] for rows in (everything, pool))
        if not part or len(rest) < needed:
            die(f"{subject}: too few: {len(part)} problems, {len(rest)} rows for {needed} few-shot examples")
        limit = args.limit or len(part)
        part = part[: math.ceil(limit * len(part)) if limit < 1 else int(limit)]
        draw_examples(rest, k, part, task.sampler)
        problems += part
    for problem in problems if not task.own else []:
        problem["asked"] = {lm.path: ask(name, problem, lm, args) for lm in lms}
    return problems


def read_split(name, split, lms, args):
    """The problems of a split. An unusable row ends the run, as a benchmark must be whole."""
    task, path = TASKS[name], Path(args.data.get(name, TASKS[name].hub))
    folder = path if path.is_dir() else path.parent
    files = [*folder.glob(f"{split}.*")]
    if name not in args.data or (split == task.splits.split()[0] and not path.is_dir()):
        files = [path]
    elif name == "mmlu" and not files:  # one folder for each subject, with its name
        files = sorted(folder.glob(f"*/{split}.*"))
    elif len(files) != 1:
        die(f"{folder}: should have one {split}.jsonl (or .json, .csv, .parquet); --shots 0 needs no {split}")
    problems, read = [], partial(task.read, lms=lms) if task.own else task.read
    for file in files:
        for place, row in read_rows(str(file), split):
            try:
                filled = {"subject": file.parent.name} | {k: v for k, v in row.items() if v is not None}
                problems.append({"row": row, "subject": name, "groups": [name]} | read(filled))
            except (AttributeError, LookupError, TemplateError, TypeError, UserWarning, ValueError) as error:
                die(f"{place}: {error}{' is missing' * isinstance(error, KeyError)}; found {row!r:.400}")
    return problems


def evaluate(lm, data, args):
    """Evaluate one model on {task: problems} -> its results and its samples, by task."""
    lm = load_lm(lm, args)
    outcome = {"model": lm.path, "results": {}, "samples": {}}
    for name, problems in data.items():
        samples = TASKS[name].run(name, problems, lm, args)
        outcome["samples"][name] = [{"doc_id": n} | sample for n, sample in enumerate(samples)]
        groups = {}  # result -> subject -> samples: MMLU has many of both, other tasks one
        for problem, sample in zip(problems, samples):
            for group in problem["groups"]:
                groups.setdefault(group, {}).setdefault(problem["subject"], []).append(sample)
        for group, parts in groups.items():
            outcome["results"][group] = summarize(*parts.values()) | {"shots": len(problems[0]["examples"])}
    print_results(outcome)
    return outcome


# What counts of a generation config; the rest changes the number or the distribution of the responses
KEPT = ["eos_token_id", "stop_strings", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"]
KEPT += ["sequence_bias", "suppress_tokens", "begin_suppress_tokens", "min_length", "min_new_tokens"]
# eos_ids: where a response ends in own tasks; longest: {task: most new tokens}; the last two: see load_lm
LM = namedtuple("LM", "path tokenizer config eos_ids window longest model cache_size", defaults=(None, None))


def open_lm(path, args):
    """What config and tokenizer tell of a model to evaluate, or why they cannot be used."""
    config, tokenizer, eos_ids = load_tokenizer(path, args)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        die(f"{path}: {config.model_type} is not a causal language model")
    window, longest = find_window(config, tokenizer), {}
    for name, task in TASKS.items():
        half = min(task.max_new_tokens, window // 2)
        longest[name] = args.max_new_tokens or (half if task.own else task.max_new_tokens)
        if name in args.tasks and task.run is not run_choices and longest[name] >= window:
            die(f"--max-new-tokens {longest[name]}: no room for a prompt in the window of {window}")
    ids, read = tokenizer("\n    return 1").input_ids, partial(tokenizer.decode, skip_special_tokens=True)
    lost = any(read(ids[:n]) + read(ids[n:]) != read(ids) for n in range(len(ids)))
    if lost and "humaneval" in str(args.tasks):
        print(f"warning: {path}: decoding removes blanks where a response begins, so right programs fail")
    return LM(path, tokenizer, config, eos_ids, window, longest)


def load_lm(lm, args):
    """The model to evaluate. What its scores depend on is printed: dtype, window, BOS."""
    model, tokenizer = load_model(transformers.AutoModelForCausalLM, lm.path, args), lm.tokenizer
    kept = {name: getattr(model.generation_config, name, None) for name in KEPT}
    model.generation_config = transformers.GenerationConfig(**kept)
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else "no BOS token"
    about = f"{model.num_parameters():,} parameters, {str(model.dtype)[6:]}, {model.device}"
    print(f"model {lm.path}: {about}; window {lm.window}; prompts begin with {begin}")
    lm = lm._replace(model=model, cache_size=find_cache_size(model))
    small = model.num_parameters() < 1e9 and not hasattr(model, "hf_quantizer")
    exact = copy.deepcopy(model).float() if small else model
    if exact.dtype == torch.float32:  # in 16 bits rounding alone would fail gsil.py's trial
        gsil.try_model(exact, [{"prompt_ids": to_ids(lm, "Question: What is 1 + 1?"), "real_ids": []}])
    return lm


def find_window(config, tokenizer):
    """The length of the model's context window, looked for in the same places as in lm_eval."""
    config = getattr(config, "text_config", None) or config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, numbers depend on a batch's other rows
        return rope["original_max_position_embeddings"]
    windows = [getattr(config, x, None) for x in ("n_positions", "max_position_embeddings", "n_ctx")]
    windows = [x for x in (*windows, tokenizer.model_max_length) if x and x < 1e29]  # 1e30: unknown
    return (windows or [2048])[0]


@torch.no_grad()
def find_cache_size(model):
    """How many tokens does the key-value cache hold? None: the model keeps other states, too."""
    try:
        out = model(torch.tensor([[0, 0]], device=model.device), use_cache=True)
    except (RuntimeError, ValueError) as error:  # quantized weights, in parts or on this device
        die(f"{model.name_or_path}: cannot be run on {model.device}: {error!s:.300}")
    check_nan(out.logits, model.name_or_path)
    cache = getattr(out, "past_key_values", None)
    if type(cache).__name__ != "DynamicCache":
        die(f"{model.name_or_path}: {model.config.model_type} has no key-value cache, it cannot be used")
    if {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf)


# The format of PKU-Alignment's reward models, such as beaver-7b-v3.0-reward, as a chat template
BEAVER = "BEGINNING OF CONVERSATION: {% for turn in messages %}{% if turn.role == 'user' %}USER: "
BEAVER += "{{ turn.content }} ASSISTANT:{% else %}{{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"


def load_reward_model(args):
    """As an LM. PKU-Alignment's score_head becomes score, without a bias, which shifts all rewards alike."""
    template = {"beaver": BEAVER}.get(args.reward_template, args.reward_template)
    config, tokenizer, eos_ids = load_tokenizer(args.reward_model, args, template)
    options = {"num_labels": 1, "key_mapping": {"^score_head": "score"}}
    kind, path = transformers.AutoModelForSequenceClassification, args.reward_model
    model, window = load_model(kind, path, args, **options), find_window(config, tokenizer)
    return LM(path, tokenizer, config, eos_ids, window, {}, model)


def load_tokenizer(path, args, template=None):
    """As gsil.load_tokenizer; if a task needs it, there is a chat template to use by default."""
    config, tokenizer, eos_ids = gsil.load_tokenizer(path)
    if tokenizer.eos_token is None:
        die(f"{path}: its tokenizer has no EOS token, so no response could end")
    templates = tokenizer.chat_template = template or tokenizer.chat_template or {}  # one, or several by name
    needed = args.chat or any(TASKS[name].own for name in args.tasks)
    if needed and not isinstance(templates, str) and "default" not in templates:
        names = ", ".join(templates) or "none; see --reward-template"
        die(f"{path}: --chat, answers, reward and mt_bench need a default chat template; it has {names}")
    return config, tokenizer, eos_ids


def load_model(kind, path, args, **options):
    """A model of this kind, in evaluation mode. Weights that its files lack would be random."""
    reward = "num_labels" in options
    what = "reward model with num_labels=1" if reward else "causal language model"
    options |= {"dtype": args.dtype, "use_safetensors": True, "return_dict": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(kind, path, what, **options)
    pattern = partial(re.sub, r"\d+", "")  # the name of a weight without the number of its layer
    unused, known = info["unexpected_keys"], {*map(pattern, model.state_dict())}
    heads = (model.base_model_prefix, "lm_head.", "normalizer.", "score.bias", "score_head.bias")
    # Not to be left over: a layer that the config does not know of, and another head of a reward model
    wrong = {x for x in unused if pattern(x) in known or (reward and not x.startswith(heads))}
    wrong |= info["missing_keys"] | info["mismatched_keys"]  # the latter are (name, size, expected size)
    if wrong:
        wrong = ", ".join(sorted(map(str, wrong)))
        die(f"{path}: no {what}: weights are missing, left over or of another size: {wrong:.300}")
    if unused:
        print(f"warning: {path}: {len(unused)} weights are not used: {', '.join(sorted(unused)):.200}")
    # Quantized weights are on the device already, and some of them cannot be moved.
    return model.eval() if model.device.type == args.device else model.eval().to(args.device)


# ---- 7. Statistics and printing -------------------------------------------------------------
# What may be the cause of a bad result; counted for each sample
CAUSES = {"truncated": "prompts lost their beginning", "empty": "responses are empty"}
CAUSES |= {"unfinished": "responses were cut at --max-new-tokens"}


def summarize(*parts):
    """The mean of each metric over all samples, its standard error (None for a part of one sample) and
    95 % interval; counts of CAUSES. As in lm_eval the variance is that within the parts, MMLU's subjects."""
    samples = [sample for part in parts for sample in part]
    n = len(samples)
    summary = {"n": n} | {cause: sum(sample.get(cause, 0) for sample in samples) for cause in CAUSES}
    for metric in samples[0]["metrics"]:
        values = [[sample["metrics"][metric] for sample in part] for part in parts]
        mean, stderr = fmean(value for part in values for value in part), None
        if min(map(len, parts)) > 1:
            squares = sum((len(part) - 1) * variance(part) for part in values)
            stderr = math.sqrt(squares / (n - len(parts)) / n)
        share = all(value in (0, 1) for part in values for value in part)
        summary |= {metric: mean, metric.replace(",", "_stderr,"): stderr}
        summary[metric.replace(",", "_interval,")] = interval(mean, stderr, n if share else None)
    return summary


def interval(mean, stderr, n):
    """Wilson's 95 % interval for a share of n problems; for another mean (n None) ± 1.96 stderr."""
    z = 1.96
    if n is None:
        return None if stderr is None else (mean - z * stderr, mean + z * stderr)
    center, scale = mean + z**2 / (2 * n), 1 + z**2 / n
    half = z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def paired_difference(ours, theirs):
    """Scores of two models by problem -> mean difference, half its 95 % interval, and p of McNemar's
    exact test: how likely a fair coin divides the problems that only one gets right as unevenly."""
    differences = [a - b for a, b in zip(ours, theirs)]  # how hard a problem is cancels out
    n, p = len(differences), None
    half_width = 1.96 * stdev(differences) / math.sqrt(n) if n > 1 else None
    if {*ours, *theirs} <= {0, 1}:
        wins, losses = differences.count(1), differences.count(-1)
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
    return {"difference": fmean(differences), "half_width": half_width, "mcnemar_p": p}


def print_results(outcome):
    """A line for each metric, and below what may explain a bad one."""
    rows = [[outcome["model"], "value", "95 % interval", "n", "shots"]]
    for name, result in outcome["results"].items():
        for metric in [key.replace("_stderr", "") for key in result if "_stderr," in key]:
            limits = result[metric.replace(",", "_interval,")]
            limits = limits and "[{:.3f}, {:.3f}]".format(*limits)
            rows.append([f"{name},{metric}", result[metric], limits, result["n"], result["shots"]])
    print_table(rows)
    for name, result in outcome["results"].items():
        for cause in [cause for cause in CAUSES if result[cause] and name in TASKS]:
            print(f"{name}: {result[cause]} {CAUSES[cause]}")


def compare(outcome, other):
    """Print and return the differences between two models: a line for each metric of each task."""
    differences, rows = {}, [[f"difference from {other['model']}", "", "±", "p"]]
    for name, samples in outcome["samples"].items():
        for metric in samples[0]["metrics"]:
            sides = (samples, other["samples"][name])
            ours, theirs = ([sample["metrics"][metric] for sample in side] for side in sides)
            result = differences[f"{name},{metric}"] = paired_difference(ours, theirs)
            difference, half_width, p = result.values()
            p = "<0.001" if p is not None and p < 0.001 else p
            rows.append([f"{name},{metric}", difference, half_width, p])
    print_table(rows)
    return differences


def print_table(rows):
    """Print rows of equal length; 'gsm8k,exact_match,strict-match' becomes 'gsm8k strict-match'."""
    width = max(len(row[0]) for row in rows)
    print()
    for first, *cells in rows:
        first = re.sub(",(none|create_test)|exact_match,", "", first).replace(",", " ")
        cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells]
        print(f"{first:{width}}" + "".join(f"{'-' if cell is None else cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter shows its code
    try:
        main(parse_args())
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        die(str(error) or "stopped")
