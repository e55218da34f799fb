"""Benchmarks in one file, scored exactly as EleutherAI's lm_eval 0.4.13 scores them.

A score is a pile of small decisions: the prompt to the character, the worked examples before it, where a
response is cut, which number in it counts, when two numbers are equal. Each moves the score, so none is ours:
on the same model and data every prompt, response and per-problem metric is lm_eval's (tests/parity). Only the
task `answers` is our own: it asks as gsil.py and irft.py train.

    prompt      worked examples + question, as plain text, or with --chat as the turns of a conversation
    response    greedy, or --samples of them at --temperature; cut at the task's stop strings
    score       gsm8k: a number is found in the response and compared with the right one, as text
                humaneval: prompt + response + the problem's own tests is a program that passes or does not

A value is a mean over problems, stderr = standard deviation / sqrt(n). Two models answer the same problems,
so --compare tests their differences problem by problem: far sharper than one mean beside the other.

    python eval.py                                  # the toy's base model on its held-out problems, seconds
    python eval.py --model runs/gsil-logistic-1/round_1 --compare tests/toy/base
    python eval.py --model M --tasks gsm8k,humaneval --allow-code-execution --out scores.json
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

TOY = Path(__file__).parent / "tests" / "toy"


def parse_args(argv=None):
    """Flags -> Namespace; tasks becomes a list, data a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
    flag("--chat", action="store_true", help="ask in the model's chat template; `answers` always does")
    flag("--max-new-tokens", type=number(int, 1), help="of a response; default: the task's own")
    flag("--samples", type=number(int, 1), default=1, help="per problem: their mean, for programs pass@k")
    flag("--temperature", type=number(float, 0), default=0.0, help="of samples; 0: greedy")
    flag("--seed", type=number(int, 0), default=0, help="of samples, which depend on --batch-size too")
    flag("--allow-code-execution", action="store_true", help="run what the model writes; not in a sandbox")
    # the run
    flag("--batch-size", type=number(int, 1), default=16, help="prompts at a time: only speed and memory")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first there is")
    flag("--out", help="JSON file for settings, versions, results and every sample")
    return complete(parser.parse_args(argv), parser)


# ---- 1. Prompts: what is asked -----------------------------------------------------------------------------

def draw_shots(pool, k, n):
    """k worked examples for each of n problems, from one stream with lm_eval's seed: order matters."""
    stream = random.Random(1234)
    return [stream.sample(pool, k) if k else [] for _ in range(n)]

def plain_prompt(task, row, shots):
    """'Question: 1+1?\\nAnswer: 2\\n\\n' per example, then 'Question: 2+2?\\nAnswer:' without a blank."""
    examples = [f"{task.question(shot)} {task.target(shot)}\n\n" for shot in shots]
    return "".join(examples) + task.question(row) + task.begin(row)

def chat_prompt(task, row, shots, tokenizer):
    """The same as a conversation: an example is a turn of each side, a begun answer is the assistant's."""
    turns, begun = [], task.begin(row)
    for shot in shots:
        turns += [("user", task.question(shot)), ("assistant", task.target(shot))]
    turns += [("user", task.question(row))] + ([("assistant", begun)] if begun else [])
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not begun,
                                         continue_final_message=bool(begun))

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

        def stopped(ids, scores, **_):          # (B, T) -> (B,): saves time, `cut` decides
            tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - reach):])
            return torch.tensor([any(text in tail for text in stop) for tail in tails], device=ids.device)

        def checked(ids, logits):               # (B, V): the argmax of NaNs would be taken for an answer
            return logits if not logits.isnan().any() else die(
                f"{name}: the model's logits are NaN: broken weights, or a --dtype of too small range")

        out = model.generate(**padded, max_new_tokens=max_new_tokens, do_sample=temperature > 0,
                             temperature=temperature or None, top_k=0, top_p=1.0, eos_token_id=sorted(ends),
                             pad_token_id=tokenizer.pad_token_id, use_cache=True,
                             stopping_criteria=[stopped], logits_processor=[checked])       # (B, P + R)
        for i, text in zip(rows, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)):
            responses[i] = cut(text, stop)
    return responses

def cut(text, stop):
    """cut('18\\n\\nQ: Why?', ['Q:', '\\n\\n']) -> '18'."""
    for end in stop:
        text = text.split(end)[0]
    return text


# ---- 3. Answers: is the number right? ----------------------------------------------------------------------

def find(pattern, which, text):
    """The first (which 0) or last (-1) match, of it the first group that is not empty; or [invalid]."""
    found = re.findall(pattern, text)
    groups = found[which] if found else ["[invalid]"]
    return (groups if isinstance(groups, str) else next(filter(None, groups))).strip()

def normalize(text):
    """What exact_match ignores on gsm8k: commas, dollars, all up to the last '#### ', a final point, case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
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


# ---- 4. Programs: do they pass their tests? ----------------------------------------------------------------

SECONDS = 3.0       # of CPU time for a program, as code_eval allows; by the clock one more, to start Python

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
        except (subprocess.TimeoutExpired, BrokenPipeError, UnicodeDecodeError):
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ran = list(tqdm(pool.map(passes, programs), "programs", len(programs), leave=False, disable=None))
    ks = [k for k in (1, 2, 5, 8, 10, 16, 32, 64, 100) if k <= n]
    return [{"gold": test, "extracted": {name: some}, "passed": passed,
             "metrics": {f"pass@{k},{name}": pass_at_k(n, sum(passed), k) for k in ks}}
            for test, some, passed in zip(tests, codes, chunks(ran, n))]


# ---- 5. Tasks ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One benchmark; texts and names are those of the task's file in lm_eval 0.4.13."""
    data: tuple                                     # Hub name and configuration, or a file
    fields: tuple                                   # columns that have to be text
    question: Callable                              # row -> what is asked
    score: Callable                                 # task, rows, responses -> a dict per row
    filters: dict                                   # name: response -> what counts of it
    stop: tuple = ()                                # a response ends before any of these
    shots: int = 0                                  # worked examples
    max_new_tokens: int = 256
    target: Callable = lambda row: row["answer"]    # row -> what a worked example answers
    begin: Callable = lambda row: ""                # row -> the answer's beginning, put into its mouth
    reduce: Callable = normalize                    # right answer and found answer -> what is compared
    trained: bool = False                           # asks as the training scripts do: always the template

ANSWERS = Task(
    (str(TOY / "heldout.jsonl"),), ("question", "answer"), lambda row: row["question"], score_answers,
    {"final-answer": lambda text: find("####[^\n]+", 0, text)}, reduce=final_answer, trained=True)
GSM8K = Task(
    ("openai/gsm8k", "main"), ("question", "answer"), lambda row: f"Question: {row['question']}\nAnswer:",
    score_answers, {"strict-match": lambda text: find(r"#### (\-?[0-9\.\,]+)", 0, text),
                    "flexible-extract": lambda text: find(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1, text)},
    stop=("Question:", "</s>", "<|im_end|>"), shots=5)
GSM8K_COT_ZEROSHOT = replace(
    GSM8K, question=lambda row: f"Q: {row['question']}\nA: Let's think step by step.", shots=0,
    stop=("Q:", "</s>", "<|im_end|>"), filters=GSM8K.filters | {
        "strict-match": lambda text: find(r"The answer is (\-?[0-9\.\,]+).", 0, text)})
HUMANEVAL = Task(
    ("openai/openai_humaneval",), ("prompt", "test", "entry_point"), lambda row: row["prompt"],
    score_programs, {"create_test": lambda text: text}, max_new_tokens=1024,
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"))
HUMANEVAL_INSTRUCT = replace(
    HUMANEVAL, question=lambda row: "Write a solution to the following problem and make sure that it passes "
                                    f"the tests:\n```python\n{row['prompt']}\n```\n",
    begin=lambda row: f"Here is the completed function:\n```python\n{row['prompt']}\n",
    filters={"create_test": lambda text: text.split("```")[0]})
TASKS = {"answers": ANSWERS, "gsm8k": GSM8K, "gsm8k_cot_zeroshot": GSM8K_COT_ZEROSHOT,
         "humaneval": HUMANEVAL, "humaneval_instruct": HUMANEVAL_INSTRUCT}


# ---- 6. The whole evaluation -------------------------------------------------------------------------------

def evaluate(path, data, args):
    """Ask one model; data: {task: (rows, examples of each row)}. Returns its results and samples by task."""
    model, tokenizer, window = load(path, args)
    outcome = {"model": path, "results": {}, "samples": {}}
    for name, (rows, shots) in data.items():
        task = TASKS[name]
        if (args.chat or task.trained) and not tokenizer.chat_template:
            die(f"{path} has no chat template: {name} needs the one of the training" if task.trained
                else f"{path} has no chat template: leave out --chat to ask in plain text")
        prompts = [chat_prompt(task, row, some, tokenizer) if args.chat or task.trained
                   else plain_prompt(task, row, some) for row, some in zip(rows, shots)]
        ids = [encode(tokenizer, prompt, special=not task.trained) for prompt in prompts]
        longest = args.max_new_tokens or task.max_new_tokens
        room = window - longest if window > longest else die(
            f"{name}: responses of {longest} tokens do not fit into the window of {window}; --max-new-tokens")
        torch.manual_seed(args.seed)
        responses = generate(model, tokenizer, [row[-room:] for row in ids for _ in range(args.samples)],
                             task.stop, longest, args.temperature, args.batch_size, name)
        responses = chunks(responses, args.samples)
        scores = task.score(task, rows, responses)
        outcome["samples"][name] = [
            {"doc_id": n, "prompt": prompt, "truncated": len(row) > room, "responses": said} | score
            for n, (prompt, row, said, score) in enumerate(zip(prompts, ids, responses, scores))]
        outcome["results"][name] = summarize(outcome["samples"][name]) | {"shots": len(shots[0])}
    return outcome

def summarize(samples):
    """Means over problems and their standard errors (None for one problem), and what to look at first."""
    summary = {"n": len(samples), "truncated": sum(sample["truncated"] for sample in samples),
               "empty": sum(not text.strip() for sample in samples for text in sample["responses"])}
    for metric in samples[0]["metrics"]:
        values = [sample["metrics"][metric] for sample in samples]
        summary |= {metric: fmean(values), metric.replace(",", "_stderr,"): stderr(values)}
    return summary

def stderr(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

def compare(ours, theirs):
    """Values of a metric, problem by problem -> mean difference, half its 95 % interval, McNemar's exact p.

    p: of the problems that one model alone gets right, how likely would a fair coin split them as unevenly?
    None unless all values are 0 or 1.
    """
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
    data = {name: read_task(name, TASKS[name], args) for name in args.tasks}
    outcome = {"settings": vars(args), "versions": {"scores as": "lm_eval 0.4.13"} | {
        name: version(name) for name in ("torch", "transformers", "datasets")}}
    outcome |= evaluate(args.model, data, args)
    print_results(outcome)
    if args.compare:
        other = evaluate(args.compare, data, args)
        print_results(other)
        outcome["compare"] = other | {"differences": {}}
        for name, samples in outcome["samples"].items():
            for metric in samples[0]["metrics"]:
                ours, theirs = ([sample["metrics"][metric] for sample in model["samples"][name]]
                                for model in (outcome, other))
                outcome["compare"]["differences"][f"{name},{metric}"] = compare(ours, theirs)
        print_table(["difference of the two", "", "+-", "p"], [
            [name, *found.values()] for name, found in outcome["compare"]["differences"].items()])
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
        if text != word and not (math.isfinite(kind(text)) and kind(text) >= low and kind(text) > above):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return text if text == word else kind(text)
    parse.__name__ = kind.__name__          # argparse: "invalid int value" when kind(text) fails
    return parse

def complete(args, parser):
    """--tasks as a list, --data as a dict; flags that contradict each other."""
    args.tasks = args.tasks.split(",")
    if not {*args.tasks} <= {*TASKS} or len({*args.tasks}) < len(args.tasks):
        parser.error(f"--tasks {','.join(args.tasks)}: each once, out of {', '.join(TASKS)}")
    args.data = dict(item.partition("=")[::2] for item in args.data)
    if not {*args.data} <= {*args.tasks} or "" in args.data.values():
        parser.error(f"--data {args.data}: should be TASK=PATH, TASK one of --tasks {','.join(args.tasks)}")
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples}: greedy ones would all be the same, set --temperature")
    return args

def chunks(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]

def read_task(name, task, args):
    """The rows to ask, up to --limit, and the worked examples of each."""
    k = task.shots if args.shots is None or task.shots == 0 else args.shots         # as lm_eval does
    source = args.data.get(name, task.data[0])
    path = Path(source)
    if name in args.data or path.is_file():
        rows = read_rows(path, "test")
        pool = read_rows(path if path.is_dir() else path.parent, "train") if k else []
    else:
        rows, pool = read_hub(*task.data, split="test"), read_hub(*task.data, split="train") if k else []
    if not rows or len(pool) < k:
        die(f"{source}: {len(rows)} problems, {len(pool)} rows to draw {k} worked examples from: too few")
    for place, row in rows + pool:
        row = row if isinstance(row, dict) else {}
        for field in task.fields:
            if not isinstance(row.get(field), str):
                die(f"{place}: {field} should be text, found {row.get(field)!r}")
        if task.score is score_answers and not re.search(r"#### +[^\n]*\w", row["answer"]):
            die(f"{place}: answer ends in {row['answer'][-20:]!r}, should end in '#### ' and the right value")
        if task.score is score_programs and f"def {row['entry_point']}(" not in row["prompt"]:
            die(f"{place}: entry_point {row['entry_point']!r} is not defined in prompt")
    limit = args.limit or len(rows)
    rows = [row for _, row in rows][:math.ceil(limit * len(rows)) if limit < 1 else int(limit)]
    return rows, draw_shots([row for _, row in pool], k, len(rows))

def read_rows(path, split):
    """[(place, row)] of a file, or of the file named like the split in a folder."""
    files = sorted(path.glob(f"{split}.*")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        die(f"{path}: there should be a file" + f", just one, named {split}.*" * path.is_dir())
    file, rows, n = files[0], [], 0
    if ".jsonl" not in file.suffixes:                       # .json, .csv, .parquet
        return read_hub(file.suffix[1:], data_files=str(file), split="train")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            for n, line in enumerate(lines, 1):
                rows += [(f"{file} line {n}", json.loads(line))] if line.strip() else []
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
        die(f"{name}: {str(error).splitlines()[0]}; --data TASK=PATH reads local files")

def load(path, args):
    """Model, tokenizer, window: as many tokens as prompt and response may have together."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    if device not in ("cpu", best):
        die(f"--device {device}: PyTorch finds none here, the best is {best}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype).to(device).eval()
    except (OSError, ValueError) as error:
        die(f"{path}: not a causal language model: {str(error).splitlines()[0]}")
    if tokenizer.eos_token is None:
        die(f"{path}: the tokenizer has no EOS token, a response could not end")
    size, first = sum(p.numel() for p in model.parameters()), tokenizer("a").input_ids[0]
    begin = tokenizer.bos_token if first == tokenizer.bos_token_id else "no BOS token"
    print(f"{path}: {size:,} parameters, {model.dtype}, {device}; prompts begin with {begin}"
          + "; no pad token, another stands in" * (tokenizer.pad_token is None))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    config = getattr(model.config, "text_config", None) or model.config
    windows = [getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
    windows += [tokenizer.model_max_length] * (tokenizer.model_max_length < 1e29)
    return model, tokenizer, next((window for window in windows if window), 2048)

def print_results(outcome):
    told, rows = ["n", "shots", "truncated", "empty"], []
    for name, result in outcome["results"].items():
        for metric in outcome["samples"][name][0]["metrics"]:
            both = result[metric], result[metric.replace(",", "_stderr,")]
            rows.append([f"{name},{metric}", *both, *(result[key] for key in told)])
    print_table([Path(outcome["model"]).name, "value", "stderr", *told], rows)

def print_table(head, rows):
    for name, *cells in [head, *rows]:
        cells = [f"{cell:.4f}" if isinstance(cell, float) else "-" if cell is None else cell
                 for cell in cells]
        print(f"{name:48}" + "".join(f"{cell:>10}" for cell in cells))
    print()


if __name__ == "__main__":
    main(parse_args())
