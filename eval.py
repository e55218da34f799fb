"""Benchmarks in one file, scored exactly as EleutherAI's lm_eval 0.4.13 scores them.

A score is a pile of small decisions: the prompt to the character, the examples before it, where a
response is cut, which number in it counts. None is ours: on the same model and data every prompt,
response, log-likelihood and metric is lm_eval's (tests/parity). Three tasks are not from there:
`answers` asks as gsil.py and irft.py train, `reward` has a reward model choose between two responses,
`mt_bench` writes answers for FastChat to judge.

gsm8k looks for a number in the response and compares it with the right one, as text; humaneval runs
prompt + response + tests; arc, hellaswag, winogrande, truthfulqa, mmlu take the likeliest choice. A
value is a mean over problems, +- half its 95 % interval. Two models answer the same problems, so
--compare tests their differences problem by problem: sharper than two means.

    python eval.py                                  # the toy's base model on its held-out problems
    python eval.py --model runs/gsil-logistic-1/round_1 --compare tests/toy/base
    python eval.py --model M --tasks gsm8k,humaneval --allow-code-execution --out scores.json
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
from pathlib import Path
from statistics import fmean, stdev, variance

import pyarrow.parquet
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace; tasks becomes a list, data {task: path}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.usage = "%(prog)s [--FLAG VALUE ...]; --help explains the flags"
    flag = parser.add_argument
    flag("--model", default=f"{TOY}/base", help="a folder or a Hub name")
    flag("--compare", metavar="MODEL", help="a second model: differences problem by problem")
    flag("--tasks", default="answers", help=f"separated by commas: {', '.join(TASKS)}")
    flag("--data", action="append", default=[], metavar="[TASK=]PATH", help="not given: the toy's or Hub's")
    flag("--limit", type=float, help="the first so many problems; below 1: a share of them")
    flag("--shots", type=int, metavar="N", help="worked examples; if not given, 5 for gsm8k, else none")
    flag("--chat", action="store_true", help="ask in the chat template; answers and reward always do")
    flag("--max-new-tokens", type=int, help="of a response; if not given, 256 or 1024")
    flag("--samples", type=int, default=1, help="per problem, whose score is their mean")
    flag("--temperature", type=float, default=0.0, help="of the samples; 0: greedy")
    flag("--seed", type=int, default=0, help="of the samples; they depend on --batch-size, too")
    flag("--reward-model", metavar="MODEL", help="task reward: a classifier with one label")
    flag("--allow-code-execution", action="store_true", help="run what the model writes")
    flag("--batch-size", type=int, default=16, help="responses at a time; larger: faster, more memory")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="the first there is")
    flag("--out", help="JSON file for settings, versions, results and every sample")
    flag("--answers", metavar="FILE", help="mt_bench: the file to write, which FastChat reads")
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    tasks = ",".join(args.tasks)
    if not {*args.tasks} <= {*TASKS} or len({*args.tasks}) < len(args.tasks):
        parser.error(f"--tasks {tasks}: each once, out of {', '.join(TASKS)}")
    paths = {"answers": f"{TOY}/heldout.jsonl"}
    for item in args.data:
        task, equals, path = item.partition("=")
        if not equals and len(args.tasks) == 1:
            task, path = args.tasks[0], item
        paths[task] = path
    if not {*paths} <= {"answers", *args.tasks}:
        parser.error(f"--data {' '.join(args.data)}: should be TASK=PATH, with tasks of --tasks {tasks}")
    args.data = paths
    for name in ("limit", "max_new_tokens", "samples", "batch_size", "shots", "temperature", "seed"):
        value = getattr(args, name)
        zero = value == 0 and name in ("shots", "temperature", "seed")
        if value is not None and not (0 < value < math.inf or zero):
            parser.error(f"--{name.replace('_', '-')} {value}: too small, or no number to count with")
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples}: greedy ones are all the same, set --temperature")
    if "reward" in args.tasks and (not args.reward_model or args.samples > 1):
        parser.error("--tasks reward needs --reward-model, and one sample per problem")
    if "mt_bench" in args.tasks and (args.compare or not args.answers):
        parser.error("mt_bench needs --answers FILE, and no --compare")
    if args.answers and Path(args.answers).exists() and Path(args.answers).stat().st_size:
        parser.error(f"--answers {args.answers}: is there already, and would be overwritten")
    if "humaneval" in tasks and not args.allow_code_execution:
        parser.error("humaneval runs what the model writes: give --allow-code-execution")
    return args


# ---- 1. Prompts: what is asked -----------------------------------------------------------------


def draw_shots(pool, k, rows, draw="random"):
    """k worked examples for each row, from one stream with lm_eval's seed, so in the order of rows.

    draw: "random"; "first": the pool's first k; "others": one more, the row itself left out, which
    lm_eval does where a task names no test split.
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

    shots: (question, answer) each. With a tokenizer: a conversation in its chat template.
    """
    described, begun = problem.get("description", ""), problem.get("begun", "")  # mostly none
    if not tokenizer:
        examples = [f"{asked} {answer}\n\n" for asked, answer in shots]
        return "".join([described, *examples, question, begun])
    turns = [("system", described)] if described else []
    for asked, answer in shots:
        turns += [("user", asked), ("assistant", answer)]
    turns += problem.get("turns") or [("user", question)]
    if begun:
        turns.append(("assistant", begun))
    return render(tokenizer, turns)


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


@torch.no_grad()
def generate(policy, prompts, stop, max_new_tokens, temperature, batch_size, name=""):
    """Prompts, lists of ids -> (text up to the first stop, was it cut by max_new_tokens?) for each.

    By transformers' generate: penalties and EOS tokens in the generation config are the model's own.
    """
    model, tokenizer = policy.model, policy.tokenizer
    config = model.generation_config
    stop = [*stop, *(config.stop_strings or []), tokenizer.eos_token]
    reach = max(len(text.encode()) for text in stop) + 2  # so many tokens surely hold a stop
    ends = config.eos_token_id  # an id, a list of ids or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = {"max_new_tokens": max_new_tokens, "use_cache": True, "eos_token_id": sorted(ends)}
    how |= {"do_sample": temperature > 0, "temperature": temperature or None, "top_k": 0, "top_p": 1.0}
    how |= {"pad_token_id": tokenizer.pad_token_id, "stop_strings": None}
    how["logits_processor"] = [lambda ids, logits: no_nan(logits, name)]
    if policy.goes_on and model.device.type == "cpu":  # faster in passes of about 1000 tokens
        how["prefill_chunk_size"] = max(1, 1024 // batch_size)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # too long shows at once
    responses = [None] * len(prompts)
    for rows in tqdm(chunks(order, batch_size), desc=name, leave=False, disable=None):
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, padding_side="left")
        inputs = inputs.convert_to_tensors("pt").to(model.device)
        width = inputs.input_ids.shape[1]  # ids and mask are (B, P)

        # Saves time, `cut` decides. generate's own stop_strings also match across the prompt's end.
        def stopped(ids, scores, width=width, **_):  # (B, T) -> (B,)
            tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - reach) :])
            found = [any(text in tail for text in stop) for tail in tails]
            return torch.tensor(found, device=ids.device)

        out = model.generate(**inputs, **how, stopping_criteria=[stopped])[:, width:]  # (B, R)
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


def respond(name, task, problems, shots, policy, args):
    """A sample per problem: prompt, responses, what was found in them, metrics."""
    longest = args.max_new_tokens or task.max_new_tokens
    room = policy.window - longest  # of the prompt
    if room < 1:
        die(f"--max-new-tokens {longest}: no room for a prompt, the model's window is {policy.window}")
    template = policy.tokenizer if args.chat or task.always_chat else None
    samples, prompts = [], []
    for problem, some in zip(problems, shots):
        prompt = build_prompt(problem, some, problem.get("question"), template)
        ids = tokenize(policy.tokenizer, prompt, special=not task.always_chat)
        prompts += [ids[-room:]] * args.samples  # too long, it loses its beginning, as in lm_eval
        samples.append({"prompt": prompt, "truncated": len(ids) > room, "metrics": {}})
    torch.manual_seed(args.seed)
    found = generate(policy, prompts, task.stop, longest, args.temperature, args.batch_size, name)
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
def loglikelihoods(policy, pairs, name=""):
    """log p(continuation | context) in nats: [(ids, ids)] -> floats.

    A context that choices have in common is read once; their continuations go on from its cache. Other
    states than keys and values cannot go on for several tokens: there each choice is read as a whole.
    """
    model = policy.model
    readers = {}  # what is read first -> the pairs that need it
    for i, (context, rest) in enumerate(pairs):
        first = context if policy.goes_on else context + rest[:-1]
        readers.setdefault(tuple(first), []).append(i)
    values = [0.0] * len(pairs)
    for first, asked in tqdm(readers.items(), desc=name, leave=False, disable=None):
        rests = [pairs[i][1] for i in asked]
        longest = max(map(len, rests))
        keep = 1 if policy.goes_on else longest
        ids = torch.tensor([first], device=model.device)  # (1, P)
        out = model(ids, use_cache=True, logits_to_keep=keep)
        logits = out.logits.expand(len(rests), -1, -1)  # (C, keep, V)
        if policy.goes_on and longest > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(rests))
            ids = pad([rest[:-1] for rest in rests], "right", model.device)  # (C, R)
            more = model(ids, past_key_values=cache)  # no mask: pads come behind all that is scored
            logits = torch.cat([logits, more.logits], 1)  # at t they predict token t of the rest
        logps = no_nan(logits.log_softmax(-1), name)  # in the model's dtype, as in lm_eval
        for i, rest, row in zip(asked, rests, logps):
            row = row if policy.goes_on else row[-len(rest) :]  # (R, V)
            values[i] = row[range(len(rest)), rest].sum().item()
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
    samples, pairs = [], []
    for problem, some in zip(problems, shots):
        template = tokenizer if args.chat else None
        prompts = [build_prompt(problem, some, asks, template) for asks in problem["questions"]]
        said = [choice if args.chat else f" {choice}" for choice in problem["choices"]]
        # Blanks that end a prompt belong to the continuation. Both are encoded as one text and cut where
        # the prompt alone would end: of a token that spans the cut the rest is scored, as in lm_eval.
        starts = {prompt: tokenize(tokenizer, prompt.rstrip()) for prompt in dict.fromkeys(prompts)}
        truncated = False
        for prompt, text in zip(prompts, said):
            context = starts[prompt]
            rest = tokenize(tokenizer, prompt + text)[len(context) :]
            if not (context and 0 < len(rest) <= window):
                die(f"{name}: {len(rest)} tokens, should be 1 to {window}: {text!r:.200} after {prompt!r}")
            room = window + 1 - len(rest)  # one more than the window: the last token is never read
            truncated = truncated or len(context) > room
            pairs.append((context[-room:], rest))
        samples.append({"prompts": [*starts], "continuations": said, "truncated": truncated})
    found = iter(loglikelihoods(policy, pairs, name))
    for problem, sample in zip(problems, samples):
        lls = [next(found) for _ in problem["choices"]]
        measured = measure(problem, lls)
        sample |= {"loglikelihoods": lls, "gold": problem["gold"]}
        sample["metrics"] = {metric: measured[metric] for metric in task.counts}
    return samples


# ---- 4. Scores: a number, or whether a program passes its tests; the judgement of others -------


def find(pattern, which, text):
    """The first (which 0) or last (-1) match, its first group that is not empty; or [invalid]."""
    found = re.findall(pattern, text) or ["[invalid]"]
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


def passes(program, seconds=3.0):
    """Does a program end without an exception? In 3 s, as in code_eval, and 1 s to start Python.

    Not a sandbox: it may use the network, read your files, or do as RUNNER does and say that it passed.
    """
    secret = secrets.token_bytes(16)
    task = json.dumps([program, seconds]).encode() + b"\n"
    deadline = time.monotonic() + seconds + 1
    passed = True
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder}
        own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        how = {"cwd": folder, "env": own, "start_new_session": True, "bufsize": 0}
        how |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-I", "-c", RUNNER], **how) as child:
            # What it is told, what it has to say to that; at last, that its output ends.
            for told, answer in [(task, b"?"), (secret, secret), (b"", b"")]:
                with suppress(BrokenPipeError):
                    child.stdin.write(told)
                left = max(0, deadline - time.monotonic()) if passed else 0
                ready, _, _ = select.select([child.stdout], [], [], left)
                passed = passed and bool(ready) and child.stdout.read(16) == answer
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with everything it has started
    return passed


def score_programs(task, problems, responses):
    """prompt + response + tests, run: the share of a problem's samples that pass. A dict each."""
    [(name, extract)] = task.counts.items()
    scores = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads suffice, each waits for its process
        for problem, texts in zip(problems, responses):
            codes = [problem["code"] + extract(text) for text in texts]
            passed = [pool.submit(passes, f"{code}\n{problem['gold']}") for code in codes]
            scores.append({"gold": problem["gold"], "extracted": {name: codes}, "passed": passed})
        for score in tqdm(scores, "programs", leave=False, disable=None):
            score["passed"] = [future.result() for future in score["passed"]]
            score["metrics"] = {f"pass@1,{name}": fmean(score["passed"])}
    return scores


@torch.no_grad()
def rewards(model, tokenizer, pairs):
    """[(turns, response)] -> [reward], read where irft.py fits it: at the EOS of the response."""
    model.config.get_text_config().pad_token_id = None  # it may be EOS, which would not be read
    found = []
    for turns, response in tqdm(pairs, "rewards", leave=False, disable=None):  # one by one: no pads
        prompt = render(tokenizer, turns)
        both = render(tokenizer, [*turns, ("assistant", response)], done=True)
        if not both.startswith(prompt):
            die("--reward-model: its chat template changes the prompt once it is answered")
        said = both[len(prompt) :].split(tokenizer.eos_token)[0] + tokenizer.eos_token
        ids = pad([tokenize(tokenizer, prompt + said, special=False)], "right", model.device)  # (1, T)
        found.append(no_nan(model(ids).logits, "reward").item())
    return found


def judge(outcome, problems, reward_model, args):
    """Adds the duel of our responses with those of --compare, or with the data's own."""
    theirs = [problem["response"] for problem in problems]
    if args.compare:
        theirs = [sample["responses"][0].strip() for sample in outcome["compare"]["samples"]["reward"]]
    ours = [sample["responses"][0].strip() for sample in outcome["samples"]["reward"]]
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
    """Ask turn after turn, with the model's own answers in between, and write FastChat's file."""
    lines, samples = [], []
    for problem in tqdm(problems, name, leave=False, disable=None):
        how = {"temperature": TEMPERATURES.get(problem["category"], 0.7), "seed": 0, "samples": 1}
        how = argparse.Namespace(**vars(args) | how)
        turns, parts = [], []
        for question in problem["questions"]:
            turns.append(("user", question))
            parts += respond(name, task, [{"turns": turns}], [[]], policy, how)
            turns.append(("assistant", parts[-1]["responses"][0].strip()))
        responses = [text for _, text in turns[1::2]]
        counted = {cause: sum(part[cause] for part in parts) for cause in CAUSES}
        samples.append(counted | {"responses": responses, "metrics": {}})
        answer = {"question_id": problem["id"], "answer_id": secrets.token_hex(11)}
        answer |= {"model_id": Path(args.answers).stem, "choices": [{"index": 0, "turns": responses}]}
        lines.append(json.dumps(answer | {"tstamp": time.time()}) + "\n")
    Path(args.answers).write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(lines)} answers in {args.answers}")
    return samples


# ---- 5. Data: as gsil.py and irft.py read it, the same text ------------------------------------

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
    """--help prints the docstring as it is, and the defaults where there are any."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


# ---- 6. Tasks ----------------------------------------------------------------------------------


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
    """What is asked, where a response stops, what counts; as in lm_eval/tasks. A problem has gold, and
    question and target, for a worked example; or questions, one for each choice; or turns, to go on with.
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


def read_answer(row, graded=True):
    """A row in any format that gsil.py trains on."""
    *turns, (_, response) = [(message["role"], message["content"]) for message in to_messages(dict(row))]
    gold = final_answer(response)
    need(gold or not graded, "the response should end in '#### ' and the right value")
    return {"turns": turns, "response": response.strip(), "gold": gold}


def read_gsm8k(
    row, before="Question: ", after="\nAnswer:"
):  # gsm8k/gsm8k.yaml, gsm8k/gsm8k-cot-zeroshot.yaml
    question, answer = before + row["question"] + after, row["answer"]
    need(re.search(r"#### +[^\n]*\w", answer), "should end in '#### ' and the right value")
    return {"question": question, "target": answer, "gold": normalize(answer)}


def read_humaneval(row, instruct=False):  # humaneval/humaneval.yaml, humaneval/humaneval_instruct.yaml
    code, test, name = row["prompt"], row["test"], row["entry_point"]
    need(f"def {name}(" in code, "should be defined in prompt")
    problem = {"question": code, "code": code, "gold": f"{test}\ncheck({name})"}
    if instruct:
        asked = "Write a solution to the following problem and make sure that it passes the tests:"
        problem["question"] = f"{asked}\n```python\n{code}\n```\n"
        problem["begun"] = f"Here is the completed function:\n```python\n{code}\n"
    return problem


def choosing(question, choices, gold):
    """The problem of choosing. gold: the index of the right choice."""
    need(all(choices), "each choice should be text, one is empty")  # whose length acc_norm divides by
    need(0 <= gold < len(choices), f"should be an index of {len(choices)} choices")
    problem = {"questions": [question] * len(choices), "choices": choices, "gold": gold}
    return problem | {"question": question, "target": choices[gold]}


def read_arc(row):  # arc/arc_easy.yaml
    question, choices = "Question: " + row["question"] + "\nAnswer:", row["choices"]
    need(len(choices["label"]) == len(choices["text"]), "should have as many labels as texts")
    return choosing(question, choices["text"], choices["label"].index(row["answerKey"]))


def read_hellaswag(row):  # hellaswag/utils.py

    def clean(text):  # of WikiHow's marks, [title] and the like; a double blank becomes one, once
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    question = clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    choices = [clean(ending) for ending in row["endings"]]
    need(row["label"] != "", "is secret in this split: use train or validation")
    return choosing(question, choices, int(row["label"]))


def read_winogrande(row):  # winogrande/preprocess_winogrande.py
    before, _, rest = row["sentence"].partition("_")
    need(rest.strip(), "should have a _ where the option goes, and a text behind it")
    questions = [before + row[option] for option in ("option1", "option2")]
    need(row["answer"] in ("1", "2"), "should be 1 or 2: use train or validation")
    gold = int(row["answer"]) - 1
    return choosing(questions[gold], [rest.strip()] * 2, gold) | {"questions": questions}


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


def read_truthfulqa(row, targets):  # truthfulqa/truthfulqa_mc1.yaml, truthfulqa/utils.py
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


def read_mmlu(row):  # mmlu/default/_default_template_yaml
    subject = row["subject"]
    groups = [group for group, names in SUBJECTS.items() if subject in names.split()]
    need(groups, "should be one of MMLU's 57")
    about = f"multiple choice questions (with answers) about {subject.replace('_', ' ')}"
    need(len(row["choices"]) == 4, "should be four texts")
    question = row["question"].strip() + "\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*row["choices"])
    problem = choosing(question, [*"ABCD"], int(row["answer"]))
    problem |= {"description": f"The following are {about}.\n\n", "subject": subject}
    return problem | {"groups": ["mmlu", f"mmlu_{groups[0]}", f"mmlu_{subject}"]}


def read_mt_bench(row):
    """FastChat's llm_judge/data/mt_bench/question.jsonl"""
    need(isinstance(row["turns"], list), "should be a list of texts")
    return {"id": row["question_id"], "category": row["category"], "questions": row["turns"]}


LAST_NUMBER = {"flexible-extract": partial(find, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
BEHIND_HASHES = LAST_NUMBER | {"strict-match": partial(find, r"#### (\-?[0-9\.\,]+)", 0)}
BEHIND_IS = LAST_NUMBER | {"strict-match": partial(find, r"The answer is (\-?[0-9\.\,]+).", 0)}
LINE = {"final-answer": partial(find, "####[^\n]+", 0)}
FENCED = {"create_test": lambda text: text.split("```")[0]}
STOP, CODE_STOP = ("Question:", "</s>", "<|im_end|>"), ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
ACC, BOTH = ("acc,none",), ("acc,none", "acc_norm,none")
VALIDATION = ("validation", "train")
GSM8K = Task(read_gsm8k, ("openai/gsm8k", "main"), BEHIND_HASHES, score=score_answers, stop=STOP, shots=5)
COT = replace(GSM8K, counts=BEHIND_IS, stop=("Q:", *STOP[1:]), shots=0)
COT = replace(COT, read=partial(read_gsm8k, before="Q: ", after="\nA: Let's think step by step."))
CODE = Task(read_humaneval, ("openai/openai_humaneval",), {"create_test": str}, score=score_programs)
CODE = replace(CODE, max_new_tokens=1024, stop=CODE_STOP)
ARC = Task(read_arc, ("allenai/ai2_arc", "ARC-Easy"), BOTH, choose, shots=None)
SWAG = Task(read_hellaswag, ("Rowan/hellaswag",), BOTH, choose, splits=VALIDATION, shots=None, draw="others")
WINO = replace(SWAG, read=read_winogrande, data=("allenai/winogrande", "winogrande_xl"), counts=ACC)
TRUTH = Task(read_truthfulqa, ("truthfulqa/truthful_qa", "multiple_choice"), ACC, choose, splits=VALIDATION)
MMLU = Task(read_mmlu, ("cais/mmlu", "all"), ACC, choose, splits=("test", "dev"), shots=None, draw="first")
TASKS = {
    "answers": Task(read_answer, (), LINE, score=score_answers, reduce=final_answer, always_chat=True),
    "gsm8k": GSM8K,
    "gsm8k_cot_zeroshot": COT,
    "humaneval": CODE,
    "humaneval_instruct": replace(CODE, read=partial(read_humaneval, instruct=True), counts=FENCED),
    "arc_easy": ARC,
    "arc_challenge": replace(ARC, data=("allenai/ai2_arc", "ARC-Challenge")),
    "hellaswag": SWAG,
    "winogrande": WINO,
    "truthfulqa_mc1": replace(TRUTH, read=partial(read_truthfulqa, targets="mc1_targets")),
    "truthfulqa_mc2": replace(TRUTH, read=partial(read_truthfulqa, targets="mc2_targets")),
    "mmlu": MMLU,
    "reward": Task(partial(read_answer, graded=False), ("Anthropic/hh-rlhf",), {}, always_chat=True),
    "mt_bench": Task(read_mt_bench, (), {}, answer_mt_bench, max_new_tokens=1024, always_chat=True),
}


# ---- 7. The whole evaluation, and the models ---------------------------------------------------


def main(args):
    """Read, ask, score, print, write; returns what --out holds."""
    # What is wrong with files or the other models should show before this one has answered.
    for file in filter(None, (args.out, args.answers)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        open(file, "a", encoding="utf-8").close()
    if args.allow_code_execution:
        print("warning: runs what the model writes, not in a sandbox; use a container without network")
    data = {name: read_task(name, TASKS[name], args) for name in args.tasks}
    if args.compare:
        from transformers import AutoTokenizer  # slow, and a wrong flag should be found at once

        load(AutoTokenizer, args.compare, "a tokenizer")
    if "reward" in data:
        reward_model = load_model("AutoModelForSequenceClassification", args.reward_model, args)
        if reward_model[0].config.num_labels != 1 or not reward_model[1].chat_template:
            die(f"--reward-model {args.reward_model}: needed are num_labels=1 and a chat template")
    packages = {name: version(name) for name in ("torch", "transformers", "datasets")}
    outcome = {"version": 2, "scores as": "lm_eval 0.4.13", "packages": packages, "settings": vars(args)}
    outcome |= evaluate(args.model, data, args)
    if args.compare:
        outcome["compare"] = evaluate(args.compare, data, args)
        print_differences(outcome, outcome["compare"])
    if "reward" in data:
        judge(outcome, data["reward"][0], reward_model, args)
    if args.out:
        unfinished = Path(f"{args.out}.partial")  # the file is there whole or not at all
        unfinished.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(args.out)
    return outcome


def read_task(name, task, args):
    """The problems to ask, up to --limit, and the (question, target) of each one's worked examples."""
    k = task.shots or 0
    if task.shots != 0 and args.shots is not None:  # as in lm_eval: where it is 0 it stays 0
        k = args.shots
    everything = read_split(name, task, task.splits[0], args)
    pool = read_split(name, task, task.splits[1], args) if k else []
    needed = k + (k > 0 and task.draw == "others")
    problems, shots = [], []
    # MMLU's subjects are tasks of their own, as in lm_eval: examples and --limit are of each.
    for subject in dict.fromkeys(problem.get("subject", name) for problem in everything) or [name]:
        asked = [problem for problem in everything if problem.get("subject", name) == subject]
        others = [problem for problem in pool if problem.get("subject", name) == subject]
        if not asked or len(others) < needed:
            die(f"{subject}: too few, {len(asked)} problems, {len(others)} rows for {needed} worked examples")
        limit = args.limit or len(asked)
        asked = asked[: math.ceil(limit * len(asked)) if limit < 1 else int(limit)]
        problems += asked
        for some in draw_shots(others, k, asked, task.draw):
            shots.append([(shot["question"], shot["target"]) for shot in some])
    return problems, shots


def read_split(name, task, split, args):
    """The problems of a split. A bad row ends the run; of `answers`, more than a tenth do."""
    problems, unusable = [], []
    for place, row in find_rows(name, task, split, args):
        try:
            row = Row(row)
            problems.append({"row": row} | task.read(row))
        except (*UNUSABLE, IndexError) as error:
            column = getattr(row, "column", "")
            unusable.append(f"{place}: {f'{column} {error}'.strip()}; found {row!r:.400}")
    if len(unusable) > (len(problems) / 9 if name == "answers" else 0):
        die(unusable[0])
    if unusable:
        print(f"warning: {name}: {len(unusable)} rows are left out, the first is {unusable[0]}")
    return problems


def find_rows(name, task, split, args):
    """(place, row) pairs of a split: of a file, of the file so named in a folder, or of the Hub."""
    if name not in args.data:
        import datasets  # slow to import, and files do not need it

        rows = datasets.load_dataset(*task.data, split=split)
        return [(f"{task.data[0]} row {n}", row) for n, row in enumerate(rows, 1)]
    path = Path(args.data[name])
    if not path.is_dir() and split == task.splits[0]:
        return read_rows(str(path), split)
    folder = path if path.is_dir() else path.parent
    files = [*folder.glob(f"{split}.*")]
    if name == "mmlu" and not files:
        files = sorted(folder.glob(f"*/{split}.*"))  # a folder for each subject
        rows = [(place, file, row) for file in files for place, row in read_rows(str(file), split)]
        return [(place, row | {"subject": file.parent.name}) for place, file, row in rows]
    if len(files) != 1:
        hint = "; it holds the worked examples, --shots 0 asks without" if split == task.splits[1] else ""
        die(f"{folder}: there should be one file {split}.jsonl (or .json, .csv, .parquet){hint}")
    return read_rows(str(files[0]), split)


# What a sample counts, because it may explain a bad result.
CAUSES = {"truncated": "prompts lost their beginning", "empty": "responses are empty"}
CAUSES |= {"unfinished": "responses were cut at --max-new-tokens"}


def evaluate(path, data, args):
    """Ask one model; data: {task: (problems, their examples)} -> its results and samples by task."""
    policy = load_policy(path, args)
    needing = [name for name in data if args.chat or TASKS[name].always_chat]
    if needing and not policy.tokenizer.chat_template:
        die(f"{path} has no chat template, and {needing[0]} asks in it")
    outcome = {"model": path, "results": {}, "samples": {}}
    for name, (problems, shots) in data.items():
        samples = TASKS[name].run(name, TASKS[name], problems, shots, policy, args)
        outcome["samples"][name] = [{"doc_id": n} | sample for n, sample in enumerate(samples)]
        groups = {}  # MMLU has several, of subjects
        for problem, sample in zip(problems, samples):
            for group in problem.get("groups", [name]):
                subjects = groups.setdefault(group, {})
                subjects.setdefault(problem.get("subject"), []).append(sample)
        for group, subjects in groups.items():
            outcome["results"][group] = summarize(*subjects.values()) | {"shots": len(shots[0])}
    print_results(outcome)
    return outcome


def summarize(*parts):
    """Means over samples, CAUSES counted, standard errors: from the variances within each part, as
    lm_eval has it for MMLU's subjects, None for a part of one."""
    samples = [sample for part in parts for sample in part]
    n = len(samples)
    summary = {"n": n} | {key: sum(sample.get(key, 0) for sample in samples) for key in CAUSES}
    for metric in samples[0]["metrics"]:
        values = [[sample["metrics"][metric] for sample in part] for part in parts]
        error = None
        if min(map(len, values)) > 1:
            squares = sum((len(some) - 1) * variance(some) for some in values)
            error = math.sqrt(squares / (n - len(parts)) / n)
        mean = fmean(value for some in values for value in some)
        summary |= {metric: mean, metric.replace(",", "_stderr,"): error}
    return summary


def compare(ours, theirs):
    """Values of a metric by problem -> mean difference, half its 95 % interval, McNemar's exact p.

    p: how likely would a fair coin split the problems that one model alone gets right as unevenly?
    """
    differences = [a - b for a, b in zip(ours, theirs)]  # in them cancels how hard a problem is
    n, width, p = len(differences), None, None
    if n > 1:
        width = 1.96 * stdev(differences) / math.sqrt(n)
    if {*ours, *theirs} <= {0, 1}:
        wins, losses = differences.count(1), differences.count(-1)
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
    return {"difference": fmean(differences), "half_width": width, "mcnemar_p": p}


def print_results(outcome):
    """A line per metric; below, what may explain a bad one."""
    rows = []
    for name, result in outcome["results"].items():
        for metric in [key for key in result if "," in key and "_stderr," not in key]:
            error = result[metric.replace(",", "_stderr,")]
            width = error and 1.96 * error
            rows.append([f"{name},{metric}", result[metric], width, result["n"], result["shots"]])
    print_table([outcome["model"], "value", "±", "n", "shots"], rows)
    for name, result in outcome["results"].items():
        for key in [key for key in CAUSES if result[key] and name in TASKS]:
            print(f"{name}: {result[key]} {CAUSES[key]}")


def print_differences(outcome, other):
    """A row per metric; all go into `other`, the outcome of --compare, too."""
    other["differences"], rows = {}, []
    for name, samples in outcome["samples"].items():
        for metric in samples[0]["metrics"]:
            sides = [samples, other["samples"][name]]
            values = [[sample["metrics"][metric] for sample in side] for side in sides]
            found = other["differences"][f"{name},{metric}"] = compare(*values)
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


# window: as many tokens as prompt and response may have together; goes_on: see cache_goes_on
Policy = namedtuple("Policy", "model tokenizer window goes_on")


def load_policy(path, args):
    """A language model that can be asked; what is said of it."""
    model, tokenizer = load_model("AutoModelForCausalLM", path, args)
    window = find_window(model.config, tokenizer)
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > known:
        die(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model knows {known}")
    # A BOS in front changes every score, so it is said.
    begin = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else "no BOS token"
    about = f"{model.num_parameters():,} parameters, {str(model.dtype)[6:]}, {model.device}"
    print(f"model {path}: {about}; window {window or '2048, as none is given'}; prompts begin with {begin}")
    return Policy(model, tokenizer, window or 2048, cache_goes_on(model))


def cache_goes_on(model):
    """Can several tokens at once go on from its cache? Tried on two tokens; a cache there must be."""
    with torch.no_grad():
        cache = getattr(model(torch.tensor([[0, 0]], device=model.device)), "past_key_values", None)
    if type(cache).__name__ != "DynamicCache":
        die(f"{model.name_or_path}: {model.config.model_type} keeps no cache as attention does")
    return {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}


def find_window(config, tokenizer):
    """In lm_eval's order; None: unknown, some tokenizers say 1e30."""
    config = getattr(config, "text_config", None) or config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond it, numbers depend on a batch's other rows
        return rope["original_max_position_embeddings"]
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    windows = [getattr(config, name, None) for name in names] + [tokenizer.model_max_length]
    return next((window for window in windows if window and window < 1e29), None)


def load_model(kind, path, args):
    """A model of this kind, and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()  # it would only warn of missing weights
    transformers.logging.disable_progress_bar()
    tokenizer = load(transformers.AutoTokenizer, path, "a tokenizer")
    if tokenizer.eos_token is None:
        die(f"{path}: the tokenizer has no EOS token, a response could not end")
    if tokenizer.pad_token is None:  # as lm_eval does
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    how = {"dtype": args.dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = load(getattr(transformers, kind), path, f"an {kind}", **how)
    if info["missing_keys"]:
        die(f"{path}: lacks {', '.join(sorted(info['missing_keys'])):.200}: they would be random")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.device not in ("auto", "cpu", best):
        die(f"--device {args.device}: there is none here, the best is {best}")
    return model.eval().to(best if args.device == "auto" else args.device), tokenizer


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code instead
        stream.reconfigure(errors="backslashreplace")
    try:
        main(parse_args())
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        die(str(error) or "stopped")
