"""Benchmarks in one file, scored exactly as EleutherAI's lm_eval 0.4.13 scores them.

A score is a pile of small decisions: the prompt to the character, the worked examples before it, where a
response is cut, which number in it counts, when two numbers are equal. Each moves the score, so none is ours:
on the same model and data every prompt, response, log-likelihood and per-problem metric is lm_eval's
(tests/parity). Three tasks are not from there: `answers` asks as gsil.py and irft.py train, `reward` has a
reward model choose between two responses, `mt_bench` writes answers for FastChat to judge.

    prompt      worked examples + question, as plain text, or with --chat as the turns of a conversation
    response    greedy, or --samples of them at --temperature; cut at the task's stop strings
                arc, hellaswag, winogrande, truthfulqa, mmlu: none, the likeliest of the choices is the answer
    score       gsm8k: a number is found in the response and compared with the right one, as text
                humaneval: prompt + response + the problem's own tests is a program that passes or does not

A value is a mean over problems, stderr = standard deviation / sqrt(n). Two models answer the same problems,
so --compare tests their differences problem by problem: far sharper than one mean beside the other.

    python eval.py                                  # the toy's base model on its held-out problems, seconds
    python eval.py --model runs/gsil-logistic-1/round_1 --compare tests/toy/base
    python eval.py --model M --tasks gsm8k,humaneval --allow-code-execution --out scores.json
    python eval.py --model M --tasks arc_challenge,hellaswag,winogrande,truthfulqa_mc2,mmlu --leaderboard
"""
import argparse
import gzip
import json
import math
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev, variance

# Threads that spin while they wait are 10 times slower as soon as another program wants the CPU, too.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as hf_logging

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace; tasks becomes a list, data a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                                     usage="%(prog)s [flags]; --help lists them")
    flag = parser.add_argument
    # who is asked what
    flag("--model", default=str(TOY / "base"), help="folder or Hub name")
    flag("--compare", metavar="MODEL", help="a second model: differences problem by problem")
    flag("--tasks", default="answers", help=f"separated by commas: {', '.join(TASKS)}")
    flag("--data", action="append", default=[], metavar="TASK=PATH", help="instead of the Hub: the problems' "
         "file, or\ntheir folder with test.*; worked examples come from train.* in the same folder")
    flag("--limit", type=number(float, above=0), help="the first so many problems; below 1 a share of them")
    # how
    flag("--shots", type=number(int, 0), help="worked examples; where a task has none there will be none")
    flag("--reward-model", metavar="MODEL", help="reward: scores the responses; a classifier with one label")
    flag("--answers", metavar="FILE", help="mt_bench: where to write, or go on; its name is the model's for "
         "FastChat,\ndefault: data/mt_bench/model_answer/MODEL.jsonl")
    flag("--leaderboard", action="store_true", help="the Open LLM Leaderboard's examples: 25 for "
         "arc_challenge,\n10 for hellaswag, 5 for winogrande, mmlu and gsm8k, 0 for truthfulqa")
    flag("--chat", action="store_true", help="ask in the model's chat template; `answers` always does")
    flag("--max-new-tokens", type=number(int, 1), help="of a response; default: the task's own")
    flag("--samples", type=number(int, 1), default=1, help="per problem: their mean, for programs pass@k")
    flag("--temperature", type=number(float, 0), default=0.0, help="of samples; 0: greedy")
    flag("--seed", type=number(int, 0), default=0, help="of samples, which depend on --batch-size too")
    flag("--allow-code-execution", action="store_true", help="run what the model writes; not in a sandbox")
    # the run
    flag("--batch-size", type=number(int, 1), default=16, help="prompts at a time: speed, memory, the draws")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first there is")
    flag("--trust-remote-code", action="store_true", help="run code that comes with a model")
    flag("--out", help="JSON file for settings, versions, results and every sample")
    return complete(parser.parse_args(argv), parser)


# ---- 1. Prompts: what is asked -----------------------------------------------------------------------------

def draw_shots(pool, k, rows, draw="random"):
    """k worked examples for each row, from one stream with lm_eval's seed: the order of rows matters.

    draw: "random"; "first": the pool's first k for every row; "others": one more, and the row itself is left
    out. lm_eval does that wherever a task names no test split, though the pool is another split then, too.
    """
    stream, drawn = random.Random(1234), []
    for row in rows:
        if not k or draw == "first":
            some = pool[:k]
        elif draw == "random":
            some = stream.sample(pool, k)
        else:
            some = [shot for shot in stream.sample(pool, k + 1) if shot != row][:k]
            if len(some) < k:               # the pool has it twice
                some = stream.sample([shot for shot in pool if shot != row], k)
        drawn.append(some)
    return drawn

def build_prompt(task, row, shots, question, tokenizer=None):
    """'Question: 1+1?\\nAnswer: 2\\n\\n' per example, then 'Question: 2+2?\\nAnswer:' without a blank.

    With a tokenizer as a conversation in its chat template: an example is a turn of each side, a begun answer
    is the assistant's.
    """
    described, begun, examples = task.describe(row), task.begin(row), [*map(task.example, shots)]
    if not tokenizer:
        return described + "".join(f"{asked} {answer}\n\n" for asked, answer in examples) + question + begun
    turns = [("system", described)] if described else []        # only MMLU describes itself
    for asked, answer in examples:
        turns += [("user", asked), ("assistant", answer)]
    turns += task.dialogue(row) if task.dialogue else [("user", question)]
    turns += [("assistant", begun)] if begun else []
    return render(tokenizer, turns)

def render(tokenizer, turns, done=False):
    """[(role, text)] in the chat template, up to where the assistant goes on; done: up to the end."""
    messages, begun = [{"role": role, "content": text} for role, text in turns], turns[-1][0] == "assistant"
    template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=not begun,
                       continue_final_message=begun and not done)
    for some in (messages, [message for message in messages if message["role"] != "system"]):
        with suppress(TemplateError):       # some templates refuse a system turn: lm_eval leaves it out
            return template(some)
    die(f"the chat template refuses this conversation, with and without system turn: {messages!r:.300}")

def encode(tokenizer, prompt, special=True):
    """Token ids, with the BOS this tokenizer adds, unless the text (a rendered template) begins with it."""
    own = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=special and not own).input_ids


# ---- 2. Responses: what the model says ---------------------------------------------------------------------

@torch.no_grad()
def generate(model, tokenizer, prompts, stop, max_new_tokens, temperature, batch, name=""):
    """Prompts, lists of token ids -> responses, as text up to the first stop string.

    By transformers' generate, not by a loop as in gsil.py: penalties and EOS tokens in the generation config
    belong to the model here, as they do in lm_eval. The longest prompts come first, so that too little memory
    shows at once.
    """
    stop = [*stop, tokenizer.eos_token]
    reach = max(len(text.encode()) for text in stop) + 2            # as many tokens surely hold a stop string
    ends = model.generation_config.eos_token_id                     # an id, a list of ids or None
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    responses, order = [""] * len(prompts), sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for rows in tqdm(chunks(order, batch), desc=name, leave=False, disable=None):
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, padding_side="left",
                               return_tensors="pt").to(model.device)        # ids and mask, (B, P) each
        width = padded.input_ids.shape[1]

        def stopped(ids, scores, **_):          # (B, T) -> (B,): saves time, `cut` decides; generate's own
            # stop_strings would also match across the end of the prompt
            tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - reach):])
            return torch.tensor([any(text in tail for text in stop) for tail in tails], device=ids.device)

        out = model.generate(**padded, max_new_tokens=max_new_tokens, do_sample=temperature > 0,
                             temperature=temperature or None, top_k=0, top_p=1.0, eos_token_id=sorted(ends),
                             pad_token_id=tokenizer.pad_token_id, use_cache=True, stopping_criteria=[stopped],
                             logits_processor=[lambda ids, logits: no_nan(logits, name)])   # (B, P + R)
        for i, text in zip(rows, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
            responses[i] = cut(text, stop)
    return responses

def pad(rows, side, device):
    """[[5, 6], [7]] -> ids [[5, 6], [7, 0]], mask [[1, 1], [1, 0]] for side "right"; (B, T), long."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return [pad_sequence(part, batch_first=True, padding_side=side).to(device) for part in (ids, masks)]

def no_nan(logits, name):
    """The argmax of NaNs would be taken for an answer. Any shape."""
    return logits if not logits.isnan().any() else die(
        f"{name}: the model's logits are NaN: broken weights, or a --dtype of too small range")

def cut(text, stop):
    """cut('18\\n\\nQ: Why?', ['Q:', '\\n\\n']) -> '18'."""
    for end in stop:
        text = text.split(end)[0]
    return text


# ---- 3. Choices: which continuation is the likeliest? ------------------------------------------------------

def encode_pair(tokenizer, context, continuation):
    """Ids of both; blanks that end a context belong to the continuation.

    Both are encoded as one text and cut where the context alone would end. A token that spans the cut is
    scored by its part behind it, as lm_eval does.
    """
    start = encode(tokenizer, context.rstrip())
    return start, encode(tokenizer, context + continuation)[len(start):]

@torch.no_grad()
def loglikelihoods(model, problems, batch, name=""):
    """log p(continuation | context) in nats: [[(ids, ids) per choice] per problem] -> floats of that shape.

    A context that choices of a problem have in common is read once; their continuations go on from its cache.
    Where these are one token each, the first pass has all there is.
    """
    readers = {}                            # (problem, context) -> the choices that go on from it
    for p, choices in enumerate(problems):
        for c, (context, _) in enumerate(choices):
            readers.setdefault((p, tuple(context)), []).append(c)
    parts = sorted(readers.items(), key=lambda part: -len(part[0][1]))      # longest first, as in generate
    values, most = [[0.0] * len(choices) for choices in problems], max(map(len, readers.values()))
    for some in tqdm(chunks(parts, max(1, batch // most)), desc=name, leave=False, disable=None):
        ids, mask = pad([context for (_, context), _ in some], "left", model.device)            # (B, P) each
        positions = (mask.cumsum(1) - 1).clamp(min=0)           # pads do not count
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                    logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        kinds = {type(layer) for layer in getattr(cache, "layers", [None])}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:          # a hybrid is a DynamicLayer, too
            die(f"{name}: the model has states other than keys and values, as Mamba: pads would change them")
        # A row of the batch, with its cache, is repeated for each choice that goes on from it: B become C.
        owner = [b for b, (_, cs) in enumerate(some) for _ in cs]
        asked = [(p, c) for (p, _), cs in some for c in cs]
        rests = [problems[p][c][1] for p, c in asked]
        logits = out.logits[owner]                                                              # (C, 1, V)
        if max(map(len, rests)) > 1:
            ids, rest_mask = pad([rest[:-1] for rest in rests], "right", model.device)          # (C, R) each
            mask = torch.cat([mask[owner], rest_mask], 1)                                       # (C, P + R)
            cache.batch_select_indices(torch.tensor(owner, device=model.device))
            more = model(input_ids=ids, attention_mask=mask, past_key_values=cache,
                         position_ids=(mask.cumsum(1) - 1)[:, -ids.shape[1]:]).logits           # (C, R, V)
            logits = torch.cat([logits, more], 1)               # at t they predict token t of the rest
        logps = no_nan(logits.log_softmax(-1), name)            # in the model's dtype, as in lm_eval
        for (p, c), rest, row in zip(asked, rests, logps):
            values[p][c] = row[range(len(rest)), rest].sum().item()
    return values

def best(values):
    return values.index(max(values))        # of equals the first, as numpy's argmax

# What is made of the log-likelihoods of a row's choices, gold being the index of the right one.
def acc(row, choices, lls, gold):
    return float(best(lls) == gold)

def acc_norm(row, choices, lls, gold):      # per character, without the blank in front
    return float(best([ll / len(choice) for ll, choice in zip(lls, choices)]) == gold)

def true_mass(row, choices, lls, gold):     # mc2: what part of the probability do true answers have?
    masses = [math.exp(ll - max(lls)) for ll in lls]
    return sum(mass for mass, true in zip(masses, row["mc2_targets"]["labels"]) if true) / sum(masses)

def choose(task, name, rows, shots, policy, args):
    """A sample per row: contexts (mostly one), continuations, their log-likelihoods, metrics."""
    samples, problems = [], []
    for row, some in zip(rows, shots):
        prompts = [build_prompt(task, row, some, question, args.chat and policy.tokenizer)
                   for question, _ in task.options(row)]
        said = [choice if args.chat else f" {choice}" for _, choice in task.options(row)]
        pairs = [encode_pair(policy.tokenizer, *pair) for pair in zip(prompts, said)]
        for prompt, text, (context, rest) in zip(prompts, said, pairs):
            if not (context and 0 < len(rest) <= policy.window):
                die(f"{name}: {len(rest)} tokens to score should be 1 to {policy.window}, the model's "
                    f"window, after at least 1 of context: {text!r:.200} after {prompt[-100:]!r}")
        # One more than the window: the last token is predicted and never read.
        problems.append([(context[-(policy.window + 1 - len(rest)):], rest) for context, rest in pairs])
        samples.append({"prompts": [*dict.fromkeys(prompts)], "continuations": said,
                        "truncated": max(len(context + rest) for context, rest in pairs) > policy.window + 1})
    found = loglikelihoods(policy.model, problems, args.batch_size, name)
    for row, lls, sample in zip(rows, found, samples):
        choices, gold = [choice for _, choice in task.options(row)], task.gold(row)
        sample |= {"loglikelihoods": lls, "gold": gold, "metrics": {
            f"{metric},none": measure(row, choices, lls, gold) for metric, measure in task.metrics.items()}}
    return samples


# ---- 4. Answers: is the number right? ----------------------------------------------------------------------

def find(pattern, which, text):
    """The first (which 0) or last (-1) match, of it the first group that is not empty; or [invalid]."""
    found = re.findall(pattern, text)
    groups = found[which] if found else ["[invalid]"]
    return (groups if isinstance(groups, str) else next(filter(None, groups))).strip()

def normalize(text):
    """What exact_match ignores on gsm8k: commas, dollars, all up to the last '#### ', a final point, case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):     # in this order
        text = re.sub(ignored, "", text)
    return text.lower()

def final_answer(text):
    """GSM8K's convention: what follows '####' on its line, without $ and commas; None without '####'."""
    found = re.search(r"####[ $]*([^\n]+)", text)
    return found and found[1].replace(",", "").strip(" .")

def score_answers(task, rows, responses):
    """By each filter: the answer found in a response, equal to the right one or not. A dict per row."""
    scores = []
    for row, texts in zip(rows, responses):
        gold = task.reduce(row["answer"])
        found = {name: [extract(text) for text in texts] for name, extract in task.filters.items()}
        metrics = {f"exact_match,{name}": fmean(task.reduce(answer) == gold for answer in answers)
                   for name, answers in found.items()}
        scores.append({"gold": gold, "extracted": found, "metrics": metrics})
    return scores


# ---- 5. Programs: do they pass their tests? ----------------------------------------------------------------

# code_eval gives 3 s by the clock. Here Python starts in it, too: 4 s, both of CPU time and by the clock.
SECONDS = 3.0

# A program's own process: its limits, then no input and no output, then the program. Only one that comes to
# its end has the nonce said for it: neither an exception nor sys.exit(0) gets there.
RUNNER = r"""
import json, os, resource, sys
program, nonce, seconds = json.load(sys.stdin)
answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
for name, most in dict(AS=4 << 30, CPU=int(seconds) + 1, FSIZE=1 << 20, CORE=0, NPROC=0).items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError, AttributeError):
        pass
write, leave = os.write, os._exit
exec(compile(program, "candidate.py", "exec"), {})
write(answer, nonce.encode())
leave(0)
"""

def passes(program, seconds=SECONDS):
    """Does a program come to its end, in time and without an exception? Not a sandbox: see README."""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clean = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder,
                 "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}       # and none of your secrets
        child = subprocess.Popen([sys.executable, "-I", "-c", RUNNER], cwd=folder, env=clean, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        try:
            said = child.communicate(json.dumps([program, nonce, seconds]), timeout=seconds + 1)[0]
        except (subprocess.TimeoutExpired, UnicodeDecodeError):
            said = ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)        # with everything it has started
            child.wait()
    return said == nonce

def pass_at_k(n, passed, k):
    """Chance that of k samples out of these n at least one passes: unbiased (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)

def score_programs(task, rows, responses):
    """prompt + response + tests, run; pass@k for the k that the samples suffice for. A dict per row."""
    n, [(name, extract)] = len(responses[0]), task.filters.items()
    codes = [[row["prompt"] + extract(text) for text in texts] for row, texts in zip(rows, responses)]
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    programs = [f"{code}\n{test}" for some, test in zip(codes, tests) for code in some]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # threads suffice, each waits for its process
        ran = list(tqdm(pool.map(passes, programs), "programs", len(programs), leave=False, disable=None))
    ks = [k for k in (1, 2, 5, 8, 10, 16, 32, 64, 100) if k <= n]
    return [{"gold": test, "extracted": {name: some}, "passed": passed,
             "metrics": {f"pass@{k},{name}": pass_at_k(n, sum(passed), k) for k in ks}}
            for test, some, passed in zip(tests, codes, chunks(ran, n))]


# ---- 6. Rewards: which of two responses does a reward model prefer? ----------------------------------------

def read_dialogue(row):
    """Turns up to the response, as (role, text); the same as text; the response, "" without one.

    Of an HH transcript in chosen, '\\n\\nHuman: Hi\\n\\nAssistant: Hello': [("user", "Hi")], all to the last
    '\\n\\nAssistant:', 'Hello'. Or of a column prompt or question, and chosen, response or answer.
    """
    text, response = (next((row[key] for key in keys if isinstance(row.get(key), str)), "")
                      for keys in (("prompt", "question"), ("chosen", "response", "answer")))
    if not text:                            # an HH transcript
        before, mark, response = response.rpartition("\n\nAssistant:")
        text = before + mark
    elif not text.startswith("\n\nHuman:"):
        text = f"\n\nHuman: {text}"
    if not text.rstrip().endswith("\n\nAssistant:"):
        text += "\n\nAssistant:"
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    turns = [("user" if who == "Human" else "assistant", said.strip())
             for who, said in zip(parts[::2], parts[1::2])]
    return turns[:-1], text, response.strip()

def reward_ids(tokenizer, beaver, turns, response):
    """What a reward model reads: the conversation in its own format, up to the EOS that ends the response.

    A chat template, as irft.py trains; beaver: 'BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Hello</s>'.
    """
    answered = turns + [("assistant", response)]
    if beaver:
        said = (f"USER: {text} " if role == "user" else f"ASSISTANT:{text}{tokenizer.eos_token}"
                for role, text in answered)
        return encode(tokenizer, "BEGINNING OF CONVERSATION: " + "".join(said))
    prompt, both = render(tokenizer, turns), render(tokenizer, answered, done=True)
    if not both.startswith(prompt):
        die("--reward-model: its chat template changes the prompt once it is answered")
    start, ids = (encode(tokenizer, text, special=False) for text in (prompt, both))
    if ids[:len(start)] != start:           # a token spans the cut: each alone, as in irft.py
        ids = start + encode(tokenizer, both[len(prompt):], special=False)
    ids.append(tokenizer.eos_token_id)
    return ids[:ids.index(tokenizer.eos_token_id, len(start)) + 1]

def load_reward(path, args):
    """Classifier with one output, its tokenizer, and whether it is of beaver's kind."""
    # beaver's class, of safe-rlhf, names its head otherwise and reads conversations in a format of its own
    model, tokenizer = load_both(AutoModelForSequenceClassification, path, "a classifier with one label",
                                 args, num_labels=1, key_mapping={"^score_head": "score"})
    beaver = any("ForScore" in kind for kind in model.config.architectures or [])
    if not beaver and not tokenizer.chat_template:
        die(f"--reward-model {path}: has no chat template, so how it reads a conversation is not known")
    print(f"{path}: reads {'beaver prompts' if beaver else 'its chat template'}, up to EOS")
    model.config.get_text_config().pad_token_id = None          # else it might read before an EOS that is pad
    return model, tokenizer, beaver

@torch.no_grad()
def rewards(model, tokenizer, beaver, pairs):
    """[(turns, response)] -> [(reward, tokens of the response)]. One at a time: no pads to be mistaken."""
    found = []
    for turns, response in tqdm(pairs, "rewards", leave=False, disable=None):
        ids = torch.tensor([reward_ids(tokenizer, beaver, turns, response)], device=model.device)   # (1, T)
        value = model(input_ids=ids).logits.float().item()
        if not math.isfinite(value):
            die(f"reward {value} of {response!r:.100}: broken weights, or a --dtype of too small range")
        found.append((value, len(encode(tokenizer, response, special=False))))
    return found

def duel(ours, theirs):
    """(reward, tokens) of both sides, by problem -> who wins how often, by how much, at what length."""
    (a, a_tokens), (b, b_tokens) = zip(*ours), zip(*theirs)
    wins, ties = sum(x > y for x, y in zip(a, b)), sum(x == y for x, y in zip(a, b))
    found = compare(a, b)
    return {"n": len(a), "wins": wins, "ties": ties, "losses": len(a) - wins - ties,
            "win_rate": wins / len(a), "reward": fmean(a), "other_reward": fmean(b),
            "difference": found["difference"], "half_width": found["half_width"],
            "tokens": fmean(a_tokens), "other_tokens": fmean(b_tokens)}

def judge(outcome, rows, reward_model, args):
    """Adds the duel of our responses with those of --compare, or with the data's own."""
    turns, _, theirs = zip(*map(read_dialogue, rows))
    if args.compare:
        theirs = [sample["responses"][0].strip() for sample in outcome["compare"]["samples"]["reward"]]
    ours = [sample["responses"][0].strip() for sample in outcome["samples"]["reward"]]
    reward_model[0].to(pick_device(args))
    both = [rewards(*reward_model, [*zip(turns, side)]) for side in (ours, theirs)]
    for sample, (reward, _), (other, _) in zip(outcome["samples"]["reward"], *both):
        sample |= {"reward": reward, "other_reward": other}
    outcome["duel"] = {"against": args.compare or "the data"} | duel(*both)
    print_table(["reward", ""], [[key, value] for key, value in outcome["duel"].items()])


# ---- 7. MT-Bench: two turns, for FastChat to judge ---------------------------------------------------------

# By category, else 0.7: FastChat 0e6d3e4b, llm_judge/common.py
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0}

def answer_mt_bench(task, name, rows, shots, policy, args):
    """Write FastChat's file, after each question; questions that have an answer in it already are skipped."""
    file = Path(args.answers or "data/mt_bench/model_answer/{}.jsonl".format(
        args.model.strip("./").replace("/", "-")))         # FastChat's name of a model is the file's
    tokenizer, answers, samples = policy.tokenizer, read_answers(file), []
    longest, room = limits(task, name, policy, args)       # room: of the prompt
    left = [row for row in rows if row["question_id"] not in answers]
    for row in tqdm(left, name, leave=False, disable=None):
        torch.manual_seed(0)                # for each question, as FastChat does
        turns, truncated = [], False
        for question in row["turns"]:
            turns.append(("user", question))
            ids = encode(tokenizer, render(tokenizer, turns), special=False)
            truncated |= len(ids) > room
            temperature = TEMPERATURES.get(row["category"], 0.7)
            [text] = generate(policy.model, tokenizer, [ids[-room:]], (), longest, temperature, 1, name)
            turns.append(("assistant", text.strip()))
        responses = [text for _, text in turns[1::2]]
        samples.append({"responses": responses, "truncated": truncated, "metrics": {}})
        answers[row["question_id"]] = {
            "question_id": row["question_id"], "answer_id": secrets.token_hex(11), "model_id": file.stem,
            "choices": [{"index": 0, "turns": responses}], "tstamp": time.time()}
        write_answers(file, answers)
    print(f"{name}: {len(answers)} answers in {file}, {len(samples)} of them new")
    return samples

def read_answers(file):
    """{question_id: answer} so far, without a last line that an interrupted run has left unfinished."""
    lines = file.read_text(encoding="utf-8").strip().split("\n") if file.exists() else []
    answers = {}
    for n, line in enumerate(lines, 1):
        try:
            answer = json.loads(line)
            answers[answer["question_id"]] = answer
        except (ValueError, KeyError, TypeError) as error:
            if n < len(lines) or not isinstance(error, ValueError):
                die(f"{file} line {n}: should be an answer in FastChat's form, found {line!r:.100}")
            print(f"{file}: dropped its last line, which is unfinished")
    return answers

def write_answers(file, answers):
    """Sorted by question; the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(answers[key]) + "\n" for key in sorted(answers)]
    unfinished = file.with_name(file.name + ".partial")
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, file)


# ---- 8. Tasks ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One benchmark; texts and names are those of its file in lm_eval 0.4.13, lm_eval/tasks/...

    It needs data, fields, and either options and gold (the model chooses) or question and score (it writes).
    By name are asked for: MMLU, which has subjects, and WINOGRANDE, where a choice may be empty.
    """
    data: tuple                                     # Hub name and configuration, or a file
    fields: dict                                    # column: an example of what it holds
    rules: tuple = ()                               # (column, row -> is it right?, what it should be)
    splits: tuple = ("test", "train")               # of the problems, of the worked examples
    shots: int | None = 0                           # worked examples; 0: always, None: 0 unless asked for
    draw: str = "random"                            # see draw_shots
    describe: Callable = lambda row: ""             # row -> what is said before all examples
    # the model chooses
    options: Callable | None = None                 # row -> [(what is asked, choice), ...]
    gold: Callable = lambda row: 0                  # row -> index of the right one
    metrics: dict = field(default_factory=lambda: {"acc": acc})
    # the model writes
    question: Callable | None = None                # row -> what is asked
    target: Callable = lambda row: row["answer"]    # row -> what a worked example answers
    begin: Callable = lambda row: ""                # row -> the answer's beginning, put into its mouth
    dialogue: Callable | None = None                # row -> [(role, text)], where question has several turns
    stop: tuple = ()                                # a response ends before any of these
    max_new_tokens: int = 256
    score: Callable | None = None                   # task, rows, responses -> a dict per row
    filters: dict = field(default_factory=dict)     # name: response -> what counts of it
    reduce: Callable = normalize                    # right answer and found answer -> what is compared
    trained: bool = False                           # asks as the training scripts do: always the template
    run: Callable | None = None                     # instead of `choose` or `respond`, where a task differs

    def example(self, row):
        """A worked example: what is asked, and its right answer."""
        if self.options:
            return self.options(row)[self.gold(row)]
        return self.question(row), self.target(row)

VALUE = ("answer", lambda row: re.search(r"#### +[^\n]*\w", row["answer"]),
         "text that ends in '#### ' and the right value")
ANSWERS = Task(
    (str(TOY / "heldout.jsonl"),), {"question": "text", "answer": "text"}, (VALUE,),
    question=lambda row: row["question"], score=score_answers, reduce=final_answer, trained=True,
    filters={"final-answer": lambda text: find("####[^\n]+", 0, text)})
GSM8K = Task(                           # gsm8k/gsm8k.yaml
    ("openai/gsm8k", "main"), {"question": "text", "answer": "text"}, (VALUE,), shots=5,
    question=lambda row: f"Question: {row['question']}\nAnswer:", stop=("Question:", "</s>", "<|im_end|>"),
    score=score_answers, filters={
        "strict-match": lambda text: find(r"#### (\-?[0-9\.\,]+)", 0, text),
        "flexible-extract": lambda text: find(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1, text)})
GSM8K_COT_ZEROSHOT = replace(           # gsm8k/gsm8k-cot-zeroshot.yaml
    GSM8K, question=lambda row: f"Q: {row['question']}\nA: Let's think step by step.", shots=0,
    stop=("Q:", "</s>", "<|im_end|>"), filters=GSM8K.filters | {
        "strict-match": lambda text: find(r"The answer is (\-?[0-9\.\,]+).", 0, text)})
HUMANEVAL = Task(                       # humaneval/humaneval.yaml
    ("openai/openai_humaneval",), {"prompt": "text", "test": "text", "entry_point": "text"},
    (("entry_point", lambda row: f"def {row['entry_point']}(" in row["prompt"], "defined in prompt"),),
    question=lambda row: row["prompt"], score=score_programs, filters={"create_test": lambda text: text},
    max_new_tokens=1024, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"))
HUMANEVAL_INSTRUCT = replace(           # humaneval/humaneval_instruct.yaml
    HUMANEVAL, question=lambda row: "Write a solution to the following problem and make sure that it passes "
                                    f"the tests:\n```python\n{row['prompt']}\n```\n",
    begin=lambda row: f"Here is the completed function:\n```python\n{row['prompt']}\n",
    filters={"create_test": lambda text: text.split("```")[0]})

ARC_EASY = Task(                        # arc/arc_easy.yaml
    ("allenai/ai2_arc", "ARC-Easy"),
    {"question": "text", "choices": {"text": ["text"], "label": ["text"]}, "answerKey": "text"},
    (("choices", lambda row: len(row["choices"]["text"]) == len(row["choices"]["label"]), "as many labels as "
      "texts"),
     ("answerKey", lambda row: row["answerKey"] in row["choices"]["label"], "one of choices.label")),
    shots=None, metrics={"acc": acc, "acc_norm": acc_norm},
    options=lambda row: [(f"Question: {row['question']}\nAnswer:", text) for text in row["choices"]["text"]],
    gold=lambda row: row["choices"]["label"].index(row["answerKey"]))
ARC_CHALLENGE = replace(ARC_EASY, data=("allenai/ai2_arc", "ARC-Challenge"))

def wikihow(text):
    """HellaSwag's texts without their marks, [title] and the like; a double blank becomes one, once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

HELLASWAG = Task(                       # hellaswag/utils.py
    ("Rowan/hellaswag",), {"activity_label": "text", "ctx_a": "text", "ctx_b": "text", "endings": ["text"]},
    (("label", lambda row: str(row.get("label")) in map(str, range(len(row["endings"]))),
      "the index of the right one in endings (only the splits train and validation have it)"),),
    splits=("validation", "train"), shots=None, draw="others", metrics={"acc": acc, "acc_norm": acc_norm},
    options=lambda row: [(wikihow(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                          wikihow(ending)) for ending in row["endings"]],
    gold=lambda row: int(row["label"]))

# The contexts differ here, and what is scored, the rest of the sentence, does not.
WINOGRANDE = Task(                      # winogrande/preprocess_winogrande.py
    ("allenai/winogrande", "winogrande_xl"),
    {"sentence": "text", "option1": "text", "option2": "text", "answer": "text"},
    (("sentence", lambda row: "_" in row["sentence"], "text with a _ where the option goes"),
     ("answer", lambda row: row["answer"] in ("1", "2"), "1 or 2 (only train and validation have it)")),
    splits=("validation", "train"), shots=None, draw="others",
    options=lambda row: [(row["sentence"].split("_")[0] + option, row["sentence"].split("_", 1)[1].strip())
                         for option in (row["option1"], row["option2"])],
    gold=lambda row: int(row["answer"]) - 1)

TRUTHFULQA_EXAMPLES = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""
def truthfulqa(targets):
    """The options of a row, out of its column mc1_targets or mc2_targets."""
    return lambda row: [(f"{TRUTHFULQA_EXAMPLES}Q: {row['question']}\nA:", choice)
                        for choice in row[targets]["choices"]]

TRUTHFULQA_MC1 = Task(                  # truthfulqa/truthfulqa_mc1.yaml
    ("truthfulqa/truthful_qa", "multiple_choice"),
    {"question": "text", "mc1_targets": {"choices": ["text"], "labels": [0]}},
    (("mc1_targets", lambda row: row["mc1_targets"]["labels"] == [1] + [0] * (
        len(row["mc1_targets"]["choices"]) - 1), "labels 1, 0, 0, ..., one per choice: the first is true"),),
    splits=("validation", "train"), options=truthfulqa("mc1_targets"))
TRUTHFULQA_MC2 = replace(               # truthfulqa/utils.py
    TRUTHFULQA_MC1, fields={"question": "text", "mc2_targets": {"choices": ["text"], "labels": [0]}},
    rules=(("mc2_targets", lambda row: {*row["mc2_targets"]["labels"]} == {0, 1}, "labels with 1 and 0"),
           ("mc2_targets", lambda row: len(row["mc2_targets"]["labels"]) == len(
               row["mc2_targets"]["choices"]), "as many labels as choices")),
    options=truthfulqa("mc2_targets"), metrics={"acc": true_mass})

SUBJECTS = {group: names.split() for group, names in {
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
        moral_scenarios philosophy prehistory professional_law world_religions"""}.items()}
MMLU = Task(                            # mmlu/default/_default_template_yaml
    ("cais/mmlu", "all"), {"subject": "text", "question": "text", "choices": ["text"], "answer": 0},
    (("subject", lambda row: row["subject"] in sum(SUBJECTS.values(), []), "one of MMLU's 57"),
     ("choices", lambda row: len(row["choices"]) == 4, "four texts"),
     ("answer", lambda row: row["answer"] in range(4), "0, 1, 2 or 3")),
    splits=("test", "dev"), shots=None, draw="first",
    describe=lambda row: "The following are multiple choice questions (with answers) about "
                         f"{row['subject'].replace('_', ' ')}.\n\n",
    options=lambda row: [("{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(
        row["question"].strip(), *row["choices"]), letter) for letter in "ABCD"],
    gold=lambda row: row["answer"])

REWARD = Task(
    ("Anthropic/hh-rlhf",), {},
    (("chosen", lambda row: all(text for _, text in read_dialogue(row)[0]) and read_dialogue(row)[0],
      "text '\\n\\nHuman: ...\\n\\nAssistant: ...', where there is no text in prompt or question"),),
    question=lambda row: read_dialogue(row)[1], dialogue=lambda row: read_dialogue(row)[0],
    stop=("Human:", "human:", "Assistant:", "assistant:"),
    score=lambda task, rows, responses: [{"metrics": {}} for _ in rows])       # see judge
MT_BENCH = Task(
    ("FastChat's question.jsonl",), {"question_id": 0, "category": "text", "turns": ["text"]},
    run=answer_mt_bench, max_new_tokens=1024, trained=True)

TASKS = {"answers": ANSWERS, "gsm8k": GSM8K, "gsm8k_cot_zeroshot": GSM8K_COT_ZEROSHOT,
         "humaneval": HUMANEVAL, "humaneval_instruct": HUMANEVAL_INSTRUCT, "arc_easy": ARC_EASY,
         "arc_challenge": ARC_CHALLENGE, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE,
         "truthfulqa_mc1": TRUTHFULQA_MC1, "truthfulqa_mc2": TRUTHFULQA_MC2, "mmlu": MMLU,
         "reward": REWARD, "mt_bench": MT_BENCH}
LEADERBOARD = {"arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "mmlu": 5, "gsm8k": 5}   # shots


# ---- 9. The whole evaluation -------------------------------------------------------------------------------

def evaluate(path, data, args):
    """Ask one model; data: {task: (rows, examples of each row)}. Returns its results and samples by task."""
    policy = load_policy(path, args)
    outcome = {"model": path, "results": {}, "samples": {}}
    trained = [name for name in data if TASKS[name].trained]
    if (args.chat or trained) and not policy.tokenizer.chat_template:
        die(f"{path} has no chat template: " + (f"{trained[0]} needs the one of the training" if trained
                                                else "leave out --chat to ask in plain text"))
    for name, (rows, shots) in data.items():
        task = TASKS[name]
        run = task.run or (choose if task.options else respond)
        samples = run(task, name, rows, shots, policy, args)
        outcome["samples"][name] = [{"doc_id": n} | sample for n, sample in enumerate(samples)]
        results = {name: summarize(samples)} if task is not MMLU else mmlu_results(
            [row["subject"] for row in rows], samples)
        outcome["results"] |= {key: result | {"shots": len(shots[0])} for key, result in results.items()}
    print_results(outcome)
    return outcome

def respond(task, name, rows, shots, policy, args):
    """A sample per row: prompt, responses, what was found in them, metrics."""
    chat, tokenizer = args.chat or task.trained, policy.tokenizer
    prompts = [build_prompt(task, row, some, task.question(row), chat and tokenizer)
               for row, some in zip(rows, shots)]
    ids = [encode(tokenizer, prompt, special=not task.trained) for prompt in prompts]
    longest, room = limits(task, name, policy, args)       # room: of the prompt
    stop = () if task.dialogue and chat else task.stop
    torch.manual_seed(args.seed)
    # A prompt that is too long loses its beginning, as in lm_eval, and is counted.
    responses = generate(policy.model, tokenizer, [row[-room:] for row in ids for _ in range(args.samples)],
                         stop, longest, args.temperature, args.batch_size, name)
    responses = chunks(responses, args.samples)
    return [{"prompt": prompt, "truncated": len(row) > room, "responses": said} | score
            for prompt, row, said, score in zip(prompts, ids, responses, task.score(task, rows, responses))]

def limits(task, name, policy, args):
    """Tokens that a response may have, and those that this leaves for the prompt."""
    longest = args.max_new_tokens or task.max_new_tokens
    if policy.window <= longest:
        die(f"{name}: responses of {longest} tokens do not fit into the window of {policy.window}; "
            "--max-new-tokens")
    return longest, policy.window - longest

def summarize(samples):
    """Means over problems and their standard errors (None for one problem), and what to look at first."""
    summary = {"n": len(samples), "truncated": sum(sample["truncated"] for sample in samples), "empty": sum(
        not text.strip() for sample in samples for text in sample.get("responses", []))}
    for metric in samples[0]["metrics"] if samples else []:
        values = [sample["metrics"][metric] for sample in samples]
        summary |= {metric: fmean(values), metric.replace(",", "_stderr,"): stderr(values)}
    return summary

def stderr(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

def mmlu_results(subjects, samples):
    """Of MMLU, its groups and subjects: accuracy over all questions, as in lm_eval, and its standard error
    from the variances within the subjects; acc,unweighted is the mean of the subjects' accuracies."""
    by_subject, results = {}, {}
    for subject, sample in zip(subjects, samples):
        by_subject.setdefault(subject, []).append(sample)
    groups = {"mmlu": [*by_subject]} | {f"mmlu_{group}": [name for name in names if name in by_subject]
                                        for group, names in SUBJECTS.items()}
    for group, names in groups.items():
        parts = [[sample["metrics"]["acc,none"] for sample in by_subject[name]] for name in names]
        if not parts:
            continue
        n, pooled = sum(map(len, parts)), None
        if min(map(len, parts)) > 1:
            squares = sum((len(part) - 1) * variance(part) for part in parts)
            pooled = math.sqrt(squares / (n - len(parts)) / n)
        results[group] = summarize(sum((by_subject[name] for name in names), [])) | {
            "acc_stderr,none": pooled, "acc,unweighted": fmean(map(fmean, parts))}
    return results | {f"mmlu_{name}": summarize(part) for name, part in by_subject.items()}

def compare(ours, theirs):
    """Values of a metric, problem by problem -> mean difference, half its 95 % interval, McNemar's exact p.

    p: of the problems that one model alone gets right, how likely would a fair coin split them as unevenly?
    None unless all values are 0 or 1.
    """
    # Problems are hard or easy for both models; in a difference that cancels.
    differences, p = [a - b for a, b in zip(ours, theirs)], None
    if {*ours, *theirs} <= {0, 1}:
        wins, losses = differences.count(1), differences.count(-1)
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
    error = stderr(differences)
    return {"difference": fmean(differences), "half_width": error and 1.96 * error, "mcnemar_p": p}

def main(args):
    """Read, ask, score, print, write; returns what --out holds."""
    if any(TASKS[name].score is score_programs for name in args.tasks):
        if not args.allow_code_execution:
            die("humaneval runs what the model writes: --allow-code-execution, and best in a container")
        print("warning: runs what the model writes; this is not a sandbox, use a container without network")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        if Path(args.out).is_dir() or not os.access(Path(args.out).parent, os.W_OK):    # not after hours
            die(f"--out {args.out}: should be a file, in a folder that can be written")
    data = {name: read_task(name, TASKS[name], args) for name in args.tasks}
    # before any model answers: a mistake here should not cost the answers
    if args.compare:
        load(AutoTokenizer, args.compare, args.trust_remote_code)
    if "reward" in data:
        reward_model = load_reward(args.reward_model, args)
        for n, row in enumerate(data["reward"][0], 1):
            turns, _, response = read_dialogue(row)
            if not (response or args.compare):
                die(f"reward, problem {n}: no chosen, response or answer to compare with: --compare MODEL")
            reward_ids(*reward_model[1:], turns, response)      # ends here if the template refuses these
    outcome = {"settings": vars(args), "versions": {"scores as": "lm_eval 0.4.13"} | {
        name: version(name) for name in ("torch", "transformers", "datasets")}}
    outcome |= evaluate(args.model, data, args)
    if args.compare:
        other = evaluate(args.compare, data, args)
        outcome["compare"] = other | {"differences": {}}
        for name, samples in outcome["samples"].items():
            for metric in samples[0]["metrics"]:
                ours, theirs = ([sample["metrics"][metric] for sample in model["samples"][name]]
                                for model in (outcome, other))
                outcome["compare"]["differences"][f"{name},{metric}"] = compare(ours, theirs)
        print_table(["difference of the two", "", "+-", "p"], [
            [name, *found.values()] for name, found in outcome["compare"]["differences"].items()])
    if "reward" in args.tasks:
        judge(outcome, data["reward"][0], reward_model, args)
    if args.out:
        Path(args.out).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return outcome


# ---- PLUMBING: nothing below decides a score ---------------------------------------------------------------

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
    """--tasks as a list, --data as a dict; flags that contradict each other."""
    args.tasks = args.tasks.split(",")
    if not {*args.tasks} <= {*TASKS} or len({*args.tasks}) < len(args.tasks):
        parser.error(f"--tasks {','.join(args.tasks)}: each once, out of {', '.join(TASKS)}")
    args.data = dict(item.partition("=")[::2] for item in args.data)
    if not {*args.data} <= {*args.tasks} or "" in args.data.values():
        parser.error(f"--data {args.data}: should be TASK=PATH, TASK one of --tasks {','.join(args.tasks)}")
    if args.leaderboard and args.shots is not None:
        parser.error(f"--leaderboard sets the worked examples, so does --shots {args.shots}")
    if "reward" in args.tasks and (not args.reward_model or args.samples > 1):
        parser.error("--tasks reward needs --reward-model, and one sample per problem")
    if "mt_bench" in args.tasks and (args.compare or "mt_bench" not in args.data):
        parser.error("--tasks mt_bench writes the answers of one model, without --compare, and needs "
                     "--data mt_bench=question.jsonl, FastChat's file")
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples}: greedy ones would all be the same, set --temperature")
    return args

def chunks(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]

def read_task(name, task, args):
    """The rows to ask, up to --limit, and the worked examples of each; MMLU: of each subject."""
    k = task.shots or 0
    if args.leaderboard:
        k = LEADERBOARD.get(name, k)
    elif args.shots is not None and task.shots != 0:        # as in lm_eval: where it is 0 it stays 0
        k = args.shots
    source = args.data.get(name, task.data[0])
    rows, pool = (read_split(name, task, split, args) if n else [] for split, n in zip(task.splits, (1, k)))
    for place, row in rows + pool:
        check_row(place, row, task)
    for place, row in rows if task.options else []:
        check_choices(place, [choice for _, choice in task.options(row)], task)
    subject = (lambda row: row["subject"]) if task is MMLU else lambda row: "all"
    problems, shots, need = [], [], k + (k > 0 and task.draw == "others")
    for part in dict.fromkeys(subject(row) for _, row in rows) or ["all"]:
        some, examples = ([row for _, row in split if subject(row) == part] for split in (rows, pool))
        if not some or len(examples) < need:
            die(f"{source}, {part}: {len(some)} problems, {len(examples)} rows to draw {need} worked "
                "examples from: too few")
        limit = args.limit or len(some)     # of each subject, as in lm_eval
        some = some[:math.ceil(limit * len(some)) if limit < 1 else int(limit)]
        problems, shots = problems + some, shots + draw_shots(examples, k, some, task.draw)
    return problems, shots

def read_split(name, task, split, args):
    """[(place, row)] of a split. MMLU may be a folder of folders, one per subject."""
    path = Path(args.data.get(name, task.data[0]))
    if name not in args.data and not path.is_file():
        return read_hub(*task.data, split=split)
    folders = [folder for folder in sorted(path.glob("*")) if folder.is_dir()] if task is MMLU else []
    if folders:
        return [(place, row | {"subject": folder.name}) for folder in folders
                for place, row in read_rows(folder, split)]
    return read_rows(path if path.is_dir() or split == task.splits[0] else path.parent, split)

def check_row(place, row, task):
    """Does a row have what its task needs? lm_eval scores many that have not, silently."""
    for column, example in task.fields.items():
        if not is_like(row.get(column), example):
            die(f"{place}: {column} should be like {example!r}, found {row.get(column)!r:.200}")
    for column, is_right, expected in task.rules:
        if not is_right(row):
            die(f"{place}: {column} should be {expected}, found {row.get(column)!r:.200}")

def check_choices(place, choices, task):
    """An empty one has no length for acc_norm to divide by, nor is it an answer."""
    if not all(choices) and task is not WINOGRANDE:
        die(f"{place}: each choice should be text, one is empty: {choices}")
    if not all(choices):
        print(f"warning: {place}: nothing follows the _ in sentence, what is scored is one blank")

def is_like(value, example):
    """is_like({"text": ["a", "b"]}, {"text": ["text"]}): the same types all the way down."""
    if type(value) is not type(example):
        return False
    if isinstance(example, dict):
        return all(is_like(value.get(key), part) for key, part in example.items())
    return not isinstance(example, list) or bool(value) and all(is_like(part, example[0]) for part in value)

def read_rows(path, split):
    """[(place, row)] of a file, or of the file named like the split in a folder."""
    files = sorted(path.glob(f"{split}.*")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        die(f"{path}: there should be a file" + f", just one, named {split}.*" * path.is_dir())
    file, rows, n = files[0], [], 0
    if ".jsonl" not in file.suffixes:                       # .json, .csv, .parquet
        return read_hub(file.suffix[1:], data_files=str(file), split="train")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for n, line in enumerate(lines, 1):             # bytes: what is not UTF-8 is found in its line
                rows += [(f"{file} line {n}", json.loads(line))] if line.strip() else []
                if line.strip() and not isinstance(rows[-1][1], dict):
                    raise ValueError(f"found {line.strip().decode()!r:.200}")
    except (OSError, EOFError, ValueError) as error:
        die(f"{file} line {n}: {error}; expected is one JSON object on each line, in UTF-8")
    return rows

def read_hub(*source, split, **files):
    """[(place, row)] of a dataset on the Hub, or of a file, through `datasets`."""
    import datasets                         # slow, and a .jsonl file does not need it
    name = files.get("data_files", source[0])
    try:
        rows = datasets.load_dataset(*source, split=split, **files)
        return [(f"{name} row {n}", row) for n, row in enumerate(rows, 1)]
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        die(f"{name}: {str(error.__cause__ or error).splitlines()[0]}; --data TASK=PATH reads local files")

def pick_device(args):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    return device if device in ("cpu", best) else die(
        f"--device {device}: PyTorch finds none here, the best is {best}")

# Who is asked; window: as many tokens as prompt and response may have together
Policy = namedtuple("Policy", "model tokenizer window")

def load(kind, path, trust, what="a tokenizer", **more):
    """kind.from_pretrained(path), or a sentence about what is wrong there."""
    try:
        return kind.from_pretrained(path, trust_remote_code=trust, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        die(f"{path}: not {what}: {str(error).strip().splitlines()[0]}; take a folder (a run's round_1) "
            "or with a network a Hub name, with config.json, .safetensors, tokenizer; --trust-remote-code if "
            "there is code in it")

def load_both(kind, path, what, args, **more):
    """A model of this kind, and its tokenizer."""
    hf_logging.set_verbosity_error()        # transformers would only warn of missing weights
    hf_logging.disable_progress_bar()
    model, info = load(kind, path, args.trust_remote_code, what, dtype=args.dtype, use_safetensors=True,
                       output_loading_info=True, **more)
    tokenizer = load(AutoTokenizer, path, args.trust_remote_code)
    if info["missing_keys"]:
        die(f"{path}: lacks {', '.join(sorted(info['missing_keys'])):.200}: they would be random")
    if tokenizer.eos_token is None:
        die(f"{path}: the tokenizer has no EOS token, a response could not end")
    return model.eval(), tokenizer

def load_policy(path, args):
    """The Policy at a path."""
    device = pick_device(args)
    model, tokenizer = load_both(AutoModelForCausalLM, path, "a causal language model", args)
    model.to(device)
    # A BOS in front changes every score, so it is said.
    size, first = sum(p.numel() for p in model.parameters()), tokenizer("a").input_ids[0]
    begin = tokenizer.bos_token if first == tokenizer.bos_token_id else "no BOS token"
    print(f"{path}: {size:,} parameters, {model.dtype}, {device}; prompts begin with {begin}"
          + "; no pad token, another stands in" * (tokenizer.pad_token is None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config = getattr(model.config, "text_config", None) or model.config
    # lm_eval's way to find the window, in its order; some tokenizers say 1e30 for "unknown"
    windows = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    windows += [tokenizer.model_max_length] * (tokenizer.model_max_length < 1e29)
    return Policy(model, tokenizer, next((window for window in windows if window), 2048))

def print_results(outcome):
    told, rows = ["n", "shots", "truncated", "empty"], []
    for name, result in outcome["results"].items():
        for metric in (key for key in result if "," in key and "_stderr," not in key):
            both = result[metric], result.get(metric.replace(",", "_stderr,"))
            rows.append([f"{name},{metric}", *both, *(result[key] for key in told)])
    print_table([Path(outcome["model"]).name, "value", "stderr", *told], rows)

def print_table(head, rows):
    for name, *cells in [head, *rows] if rows else []:
        cells = [f"{cell:.4f}" if isinstance(cell, float) else "-" if cell is None else cell
                 for cell in cells]
        print(f"{name:48}" + "".join(f"{cell:>10}" for cell in cells))
    print()


def run_safely(main, args):
    """main(args); Ctrl-C, or what cannot be read or written, ends in a sentence."""
    try:
        return main(args)
    except KeyboardInterrupt:
        print("error: stopped; --answers goes on where it was, all else starts anew", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        die(str(error))


if __name__ == "__main__":
    run_safely(main, parse_args())
