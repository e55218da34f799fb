"""Benchmarks, scored as EleutherAI's lm_eval 0.4.13 scores them, in one file.

A benchmark score is a pile of small decisions: the prompt to the character, which worked examples precede it,
where an answer is cut, which number in it counts, when two numbers are equal. Each of them moves the score, so
none is ours: on the same model and data every prompt, generation and per-problem metric is that of lm_eval,
and tests/parity checks it. One task is our own: `answers`, which asks as gsil.py and irft.py train.

    prompt     worked examples + question, as plain text or (--chat) as the turns of a conversation
    response   greedy, cut at the task's stop strings; or --samples at --temperature
    score      gsm8k: a number is found in the response and compared with the right one, as strings
               humaneval: prompt + response + the problem's own tests is a program, which passes or does not

The value is a mean over problems; stderr = standard deviation / sqrt(n) says how far other problems of the kind
would move it. Two models answer the same problems, so --compare tests the differences problem by problem,
which is far sharper than setting one mean beside the other.

    python eval.py                                                  # the toy's base model, seconds
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
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    # who is asked, and what
    flag("--model", default=str(TOY / "base"), help="folder or Hub name")
    flag("--tasks", default="answers", help=f"comma-separated: {', '.join(TASKS)}")
    flag("--data", action="append", default=[], metavar="TASK=PATH", help="local rows instead of the Hub's: "
         "a file,\nor a folder with one per split; examples come from train.* in the same folder")
    flag("--limit", type=number(float, above=0), help="the first so many problems; below 1 a share of them")
    # how it is asked
    flag("--shots", type=number(int, 0), help="worked examples; tasks whose own number is 0 stay there")
    flag("--chat", action="store_true", help="ask in the model's chat template; `answers` always does")
    flag("--max-new-tokens", type=number(int, 1), help="of a response; default: the task's own")
    flag("--samples", type=number(int, 1), default=1, help="responses per problem: mean, for programs pass@k")
    flag("--temperature", type=number(float, 0), default=0.0, help="0: greedy")
    flag("--seed", type=number(int, 0), default=0, help="of samples; they also depend on --batch-size")
    # how it is run
    flag("--batch-size", type=number(int, 1), default=16, help="prompts at a time: memory and time only")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: as saved")
    flag("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first there is")
    flag("--allow-code-execution", action="store_true", help="run the programs a model writes: no sandbox")
    # what comes out
    flag("--compare", metavar="B", help="a second model, or a file that --out wrote: paired differences")
    flag("--out", help="JSON file: settings, versions, results, every sample")
    return complete(parser.parse_args(argv), parser)


# ---- 1. Prompts: what is asked -----------------------------------------------------------------------------

def draw_shots(pool, k, n):
    """k worked examples for each of n problems: one random stream, so they depend on the problems' order.

    lm_eval seeds it with 1234 and draws even for problems whose examples are the same; --limit changes none.
    """
    stream = random.Random(1234)
    return [stream.sample(pool, k) if k else [] for _ in range(n)]

def plain_prompt(task, row, shots):
    """'Question: 1+1?\\nAnswer: 2\\n\\n' per example, then 'Question: 2+2?\\nAnswer:': no space at the end."""
    examples = [f"{task.question(shot)} {task.target(shot)}\n\n" for shot in shots]
    return "".join(examples) + task.question(row) + task.begin(row)

def chat_prompt(task, row, shots, tokenizer):
    """The same as a conversation: each example is a turn of both, a begun answer is the assistant's."""
    turns = []
    for shot in shots:
        turns += [("user", task.question(shot)), ("assistant", task.target(shot))]
    turns += [("user", task.question(row))] + [("assistant", task.begin(row))] * bool(task.begin(row))
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not task.begin(row),
                                         continue_final_message=bool(task.begin(row)))


# ---- 2. Responses: what a model says -----------------------------------------------------------------------

def encode(tokenizer, prompt, special):
    """Token ids, with the BOS that this tokenizer adds, unless the text, a rendered template, has its own."""
    own = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=special and not own).input_ids

@torch.no_grad()
def generate(model, tokenizer, prompts, stop, max_new_tokens, temperature, batch, name=""):
    """The model's continuation of each prompt, a list of token ids, as text up to the first stop string.

    Long prompts come first: what does not fit into memory shows at once. Not decoded by hand as in gsil.py:
    a penalty or EOS list in the model's generation config belongs to the model here, as it does in lm_eval.
    """
    stop = [*stop, tokenizer.eos_token]
    ends = {*eos_ids(model, tokenizer), *(tokenizer.convert_tokens_to_ids(text) for text in stop
                                          if text in tokenizer.all_special_tokens)}
    reach = max(len(text.encode()) for text in stop) + 2        # tokens that can hold a stop string
    pad = next(id for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
               if id is not None)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {
        "do_sample": False}
    texts, order = [""] * len(prompts), sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for rows in tqdm(chunks(order, batch), desc=name, leave=False, disable=None):
        width = len(prompts[rows[0]])
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows])      # (B, P)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])

        def stopped(ids, scores, **_):          # (B, T) -> (B,): saves time, the text is cut below
            tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - reach):])
            return torch.tensor([any(text in tail for text in stop) for tail in tails], device=ids.device)

        def checked(ids, scores):               # argmax over NaN is token 0, and would look like an answer
            return scores if not scores.isnan().any() else die(
                f"{name}: the model's logits are NaN: a broken checkpoint, or a --dtype with too small a range")

        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True,
                             max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends),
                             stopping_criteria=[stopped], logits_processor=[checked], **how)
        for i, response in zip(rows, out[:, width:].tolist()):
            end = next((n for n, token in enumerate(response) if token in ends), None)
            texts[i] = cut(tokenizer.decode(response[:end], skip_special_tokens=True), stop)
    return texts

def cut(text, stop):
    """Up to the first of these strings: cut('a\\nQ: b', ['Q:']) -> 'a\\n'."""
    for end in stop:
        text = text.split(end)[0]
    return text


# ---- 3. Answers: is the number right? ----------------------------------------------------------------------

def find(pattern, which, text):
    """The first (which 0) or last (-1) match of a pattern, its first group that is not empty; or [invalid]."""
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    groups = found[which] if isinstance(found[which], tuple) else (found[which],)
    return next(filter(None, groups), "[invalid]").strip()

def normalize(text):
    """What lm_eval's exact_match ignores on gsm8k: ',', '$', all up to the last '#### ', a final '.', case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()

def final_answer(text):
    """GSM8K's convention: what follows '####' on its line, without $ and commas; None without '####'."""
    found = re.search(r"####[ $]*([^\n]+)", text)
    return found and found[1].replace(",", "").strip(" .")

def score_answers(task, rows, responses):
    """Each filter finds an answer in each response; equal to the gold one or not. A dict per row."""
    scores = []
    for row, texts in zip(rows, responses):
        gold = task.gold(row["answer"])
        extracted = {name: [extract(text) or "" for text in texts] for name, extract in task.filters.items()}
        scores.append({"gold": gold, "extracted": extracted, "metrics": {
            f"exact_match,{name}": fmean(task.same(answer) == gold for answer in answers)
            for name, answers in extracted.items()}})
    return scores


# ---- 4. Programs: do they pass their tests? ----------------------------------------------------------------

SECONDS = 3.0       # of CPU time, as lm_eval's code_eval gives; a second more by the clock, to start Python

# Runs in a process of its own: limits first, then no way to be heard (0, 1 and 2 lead nowhere), then the
# program. Only one that comes to its end lets the last line say the nonce: sys.exit(0) does not get there.
RUNNER = r"""
import json, os, resource, sys
program, nonce, seconds = json.load(sys.stdin)
answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
limits = {"AS": 4 << 30, "CPU": int(seconds) + 1, "FSIZE": 1 << 20, "CORE": 0, "NPROC": 0}
for name, most in limits.items():
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
    """Run a program in a child process: did it come to its end, in time, without an exception?

    Not a sandbox: the network is there, and so are your files. README lists what this does not prevent.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder,
                       "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, "-I", "-c", RUNNER], cwd=folder, env=environment, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        try:
            said = child.communicate(json.dumps([program, nonce, seconds]), timeout=seconds + 1)[0]
        except (subprocess.TimeoutExpired, BrokenPipeError, UnicodeDecodeError):
            said = ""
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)            # and whatever it has started
            except ProcessLookupError:
                pass
            child.wait()
    return said == nonce

def pass_at_k(n, c, k):
    """Chance that one of k samples passes when c of n did: 1 - C(n-c, k) / C(n, k), unbiased (2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def score_programs(task, rows, responses):
    """prompt + response + tests is a program; pass@k for each k the samples suffice for. A dict per row."""
    ends = [f"\n{row['test']}\ncheck({row['entry_point']})" for row in rows]
    bodies = [[row["prompt"] + task.filters["create_test"](text) for text in texts]
              for row, texts in zip(rows, responses)]
    programs = [body + end for samples, end in zip(bodies, ends) for body in samples]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(tqdm(pool.map(passes, programs), "programs", len(programs), leave=False, disable=None))
    n = len(responses[0])
    return [{"gold": end, "extracted": {"create_test": samples}, "passed": results, "metrics": {
        f"pass@{k},create_test": pass_at_k(n, sum(results), k) for k in (1, 2, 8, 10, 16, 32, 64, 100) if k <= n}}
        for end, samples, results in zip(ends, bodies, chunks(passed, n))]


# ---- 5. Tasks ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One benchmark. Names, prompts, stop strings and filters are those of lm_eval 0.4.13's task files."""
    data: tuple                                 # (Hub name or file, configuration, split) of the problems
    fields: tuple                               # columns that must be text
    question: Callable                          # row -> what is asked
    score: Callable                             # (task, rows, responses) -> a dict per row
    target: Callable = lambda row: row["answer"]        # row -> what an example answers
    begin: Callable = lambda row: ""                    # row -> the beginning of the answer, given
    stop: tuple = ()                            # a response ends before the first of these
    filters: dict = None                        # name: response -> the answer in it
    gold: Callable = normalize                  # right answer as written -> in the form compared
    same: Callable = normalize                  # found answer -> in the form compared
    max_new_tokens: int = 256
    shots: int = 0
    template: bool = False                      # asks as in training: always in the chat template


LAST_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
TASKS = {
    "answers": Task(                            # any question/answer file whose answers end in '#### value'
        (str(TOY / "heldout.jsonl"), None, "test"), ("question", "answer"), lambda row: row["question"],
        score_answers, filters={"final-answer": final_answer}, gold=final_answer, same=str, template=True),
    "gsm8k": Task(
        ("openai/gsm8k", "main", "test"), ("question", "answer"),
        lambda row: f"Question: {row['question']}\nAnswer:", score_answers, shots=5,
        stop=("Question:", "</s>", "<|im_end|>"), filters={
            "strict-match": lambda text: find(r"#### (\-?[0-9\.\,]+)", 0, text),
            "flexible-extract": lambda text: find(LAST_NUMBER, -1, text)}),
    "humaneval": Task(
        ("openai/openai_humaneval", None, "test"), ("prompt", "test", "entry_point"), lambda row: row["prompt"],
        score_programs, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_new_tokens=1024,
        filters={"create_test": lambda text: text}),
}
TASKS["gsm8k_cot_zeroshot"] = replace(
    TASKS["gsm8k"], question=lambda row: f"Q: {row['question']}\nA: Let's think step by step.", shots=0,
    stop=("Q:", "</s>", "<|im_end|>"), filters=TASKS["gsm8k"].filters | {
        "strict-match": lambda text: find(r"The answer is (\-?[0-9\.\,]+).", 0, text)})
TASKS["humaneval_instruct"] = replace(
    TASKS["humaneval"], begin=lambda row: f"Here is the completed function:\n```python\n{row['prompt']}\n",
    question=lambda row: "Write a solution to the following problem and make sure that it passes the tests:\n"
                         f"```python\n{row['prompt']}\n```\n",
    filters={"create_test": lambda text: text.split("```")[0]})


# ---- 6. The whole evaluation -------------------------------------------------------------------------------

def evaluate(path, data, args):
    """Ask one model all tasks; data: {task: (rows, pool of examples)}. Returns results and samples by task."""
    model, tokenizer, window = load(path, args)
    outcome = {"model": str(path), "results": {}, "samples": {}}
    for name, (rows, pool) in data.items():
        task, shots = TASKS[name], shots_of(TASKS[name], args)
        if (args.chat or task.template) and not tokenizer.chat_template:
            die(f"{path}: this tokenizer has no chat template; "
                + ("the task answers asks in it" if task.template else "leave --chat out to ask in plain text"))
        examples = draw_shots(pool, shots, len(rows))
        prompts = [chat_prompt(task, row, drawn, tokenizer) if args.chat or task.template
                   else plain_prompt(task, row, drawn) for row, drawn in zip(rows, examples)]
        longest = args.max_new_tokens or task.max_new_tokens
        room = window - longest
        if room <= 0:
            die(f"{name}: responses of {longest} tokens leave no room for a prompt in the window of {window}; "
                "lower --max-new-tokens")
        ids = [encode(tokenizer, prompt, special=not task.template) for prompt in prompts]
        torch.manual_seed(args.seed)
        texts = generate(model, tokenizer, [row[-room:] for row in ids for _ in range(args.samples)],
                         task.stop, longest, args.temperature, args.batch_size, name)
        responses = chunks(texts, args.samples)
        scores = task.score(task, rows, responses)
        outcome["samples"][name] = [
            {"doc_id": n, "prompt": prompt, "responses": said, "truncated": len(row) > room, **score}
            for n, (prompt, row, said, score) in enumerate(zip(prompts, ids, responses, scores))]
        outcome["results"][name] = summarize(outcome["samples"][name]) | {"shots": shots}
    return outcome

def summarize(samples):
    """Per metric the mean over problems and its standard error (None for one problem); what to be told."""
    summary = {"n": len(samples), "truncated": sum(sample["truncated"] for sample in samples),
               "empty": sum(not text.strip() for sample in samples for text in sample["responses"])}
    for metric in samples[0]["metrics"]:
        values = [sample["metrics"][metric] for sample in samples]
        summary[metric] = fmean(values)
        summary[metric.replace(",", "_stderr,")] = stderr(values)
    return summary

def stderr(values):
    """Standard error of the mean, from the sample standard deviation; None for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

def compare(ours, theirs):
    """Problem by problem: mean difference, the half width of its 95 % interval, McNemar's exact p.

    ours, theirs: a metric's values. p, only where all are 0 or 1: of the problems that just one model gets
    right, could so uneven a split come from a fair coin? None where it does not apply.
    """
    differences = [a - b for a, b in zip(ours, theirs)]
    error, p = stderr(differences), None
    if {*ours, *theirs} <= {0, 1}:
        wins, losses = differences.count(1), differences.count(-1)
        tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
        p = min(1.0, 2 * tail / 2 ** (wins + losses))
    return fmean(differences), error and 1.96 * error, p

def main(args):
    """Read, ask, score, print, write; returns what --out holds."""
    if any(TASKS[name].score is score_programs for name in args.tasks):
        if not args.allow_code_execution:
            die("humaneval runs programs written by the model: allow it with --allow-code-execution, "
                "best inside a container without network")
        print("warning: running programs written by the model. This is not a sandbox, use a container "
              "without network")
    data = {name: read_task(name, args) for name in args.tasks}
    other = args.compare and read_outcome(args.compare, args)
    outcome = {"settings": vars(args), "versions": {"python": sys.version.split()[0], "scores as": "lm_eval 0.4.13"}
               | {name: version(name) for name in ("torch", "transformers", "datasets")}}
    outcome |= evaluate(args.model, data, args)
    print_results(outcome)
    if args.compare:
        other = other or evaluate(args.compare, data, args)
        outcome["compared"] = print_comparison(outcome, other)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
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
    """--tasks as a list, --data as a dict; flags that do not fit together."""
    args.tasks = args.tasks.split(",")
    for name in args.tasks:
        if name not in TASKS or args.tasks.count(name) > 1:
            parser.error(f"--tasks {name}: {'named twice' if name in TASKS else 'unknown'}; "
                         f"there are {', '.join(TASKS)}")
    for item in args.data:
        if "=" not in item or item.split("=")[0] not in args.tasks:
            parser.error(f"--data {item}: it should be TASK=PATH, with a task of --tasks {','.join(args.tasks)}")
    args.data = dict(item.split("=", 1) for item in args.data)
    if args.limit and args.limit > 1 and args.limit % 1:
        parser.error(f"--limit {args.limit}: a whole number of problems, or a share below 1")
    if args.samples > 1 and not args.temperature:
        parser.error(f"--samples {args.samples}: greedy responses are all the same, set --temperature")
    return args

def chunks(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]

def shots_of(task, args):
    """--shots, or the task's own number; where that is 0, it stays, as in lm_eval."""
    return task.shots if args.shots is None or task.shots == 0 else args.shots

def read_task(name, args):
    """The problems to ask, up to --limit, and the pool of examples: two lists of rows, checked."""
    task, path = TASKS[name], args.data.get(name)
    rows = read_split(task, path, task.data[2])
    if not rows:
        die(f"{path or task.data[0]}: no rows")
    for place, row in rows:
        check_gold(name, task, place, row)
    k, pool = shots_of(task, args), []
    if k:
        pool = read_split(task, path and (path if Path(path).is_dir() else Path(path).parent), "train")
        if len(pool) < k:
            die(f"{name}: {k} examples per problem, but the train split has {len(pool)} rows; lower --shots")
    limit = len(rows) if args.limit is None else (
        math.ceil(args.limit * len(rows)) if args.limit < 1 else int(args.limit))
    return [row for _, row in rows][:limit], [row for _, row in pool]

def check_gold(name, task, place, row):
    """Rows that could never be scored right would be a silent 0."""
    if task.score is score_answers and (
            "#### " not in row["answer"] or not re.search(r"\w", task.gold(row["answer"]) or "")):
        die(f"{place}: field answer ends in {row['answer'][-30:]!r}; {name} expects '#### ' and the right number")
    if task.score is score_programs and not re.search(
            rf"^(def|class) {re.escape(row['entry_point'])}\b", row["prompt"], re.MULTILINE):
        die(f"{place}: field entry_point is {row['entry_point']!r}, and the prompt does not define it")

def read_split(task, path, split):
    """[(place, row)] of a split: from a file, from the file named after it in a folder, or from the Hub."""
    source, configuration, _ = task.data
    if path is None and not Path(source).is_file():
        rows = read_hub(source, configuration, split)
    else:
        file = Path(path or source)
        if file.is_dir():
            found = sorted(file.glob(f"{split}.*"))
            file = found[0] if len(found) == 1 else die(
                f"{file}: {len(found)} files there are named {split}.*, it should be one")
        rows = read_file(file) if file.is_file() else die(f"{file}: no such file")
    for place, row in rows:
        for field in task.fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                found = f"is {row[field]!r}" if isinstance(row, dict) and field in row else "is missing"
                die(f"{place}: field {field} {found}, it should be text")
    return rows

def read_file(path):
    """[(place, row)] of .jsonl or .json (one object a line, or one list), also as .gz; .csv and .parquet."""
    if path.suffix in (".csv", ".parquet"):
        return read_hub(path.suffix[1:], None, "train", data_files=str(path))
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        if text.lstrip().startswith("["):
            return [(f"{path} row {n}", row) for n, row in enumerate(json.loads(text), 1)]
        rows = []
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"{path} line {n}", json.loads(line)))
        return rows
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if text.lstrip().startswith("[") else f"line {n}"
        die(f"{path} {place}: not JSON ({error.msg}); one object on each line is expected, or one list")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        die(f"{path}: not a text file in UTF-8, or compressed with gzip ({error})")

def read_hub(name, configuration, split, **files):
    """[(place, row)] through `datasets`."""
    import datasets                         # slow, and a .jsonl file does not need it
    try:
        rows = datasets.load_dataset(name, configuration, split=split, **files)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        die(f"{files.get('data_files', name)}, split {split}: {str(error).splitlines()[0]}; --data TASK=PATH "
            "reads local files")
    return [(f"{files.get('data_files', name)} {split} row {n}", row) for n, row in enumerate(rows, 1)]

def load(path, args):
    """Model, tokenizer and the window: how many tokens prompt and response may have together."""
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
        die(f"{path}: not a causal language model with its tokenizer: {str(error).splitlines()[0]}")
    if tokenizer.eos_token is None:
        die(f"{path}: the tokenizer has no EOS token, so no response could end")
    config = getattr(model.config, "text_config", None) or model.config
    limits = [getattr(config, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx")]
    limits += [tokenizer.model_max_length if tokenizer.model_max_length < 1e29 else None, 2048]
    adds = tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else "no BOS"
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {device}, {model.dtype}, prompts "
          f"begin with {adds}" + ", no pad token: another stands in" * (tokenizer.pad_token_id is None))
    return model, tokenizer, next(limit for limit in limits if limit is not None)

def eos_ids(model, tokenizer):
    """Ids that end a response: the tokenizer's, and those of the model's generation config."""
    listed = model.generation_config.eos_token_id               # an id, a list of ids or None
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}

def print_results(outcome):
    print(f"\n{'task':20}{'metric':32}{'value':>8}{'stderr':>8}{'n':>6}{'shots':>6}{'truncated':>10}{'empty':>6}")
    for name, result in outcome["results"].items():
        for metric in outcome["samples"][name][0]["metrics"]:
            error = result[metric.replace(",", "_stderr,")]
            print(f"{name:20}{metric:32}{result[metric]:8.4f}{'-' if error is None else f'{error:.4f}':>8}"
                  f"{result['n']:6}{result['shots']:6}{result['truncated']:10}{result['empty']:6}")

def read_outcome(path, args):
    """What --out wrote, or None where --compare names a model."""
    if not Path(path).is_file():
        return None
    try:
        other = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in args.tasks if name not in other["samples"]]
    except (ValueError, KeyError, TypeError):
        die(f"--compare {path}: neither a model nor a file that --out wrote")
    return other if not missing else die(f"--compare {path}: it has no {', '.join(missing)}")

def print_comparison(ours, theirs):
    """Paired differences, ours minus theirs, by task and metric: printed and returned."""
    table = {}
    print(f"\n{ours['model']} minus {theirs['model']}, problem by problem\n"
          f"{'task':20}{'metric':32}{'difference':>11}  {'95% interval':20}{'McNemar p':>10}")
    for name, samples in ours["samples"].items():
        same = [(a["gold"], a["doc_id"]) for a in samples] == [
            (b["gold"], b["doc_id"]) for b in theirs["samples"][name]]
        if not same or ours["results"][name]["shots"] != theirs["results"][name]["shots"]:
            die(f"--compare {theirs['model']}: {name} has other problems or another number of examples there")
        for metric in [metric for metric in samples[0]["metrics"] if metric in theirs["samples"][name][0]["metrics"]]:
            difference, half, p = compare(*([sample["metrics"][metric] for sample in side["samples"][name]]
                                            for side in (ours, theirs)))
            interval = "-" if half is None else f"{difference - half:+.4f} .. {difference + half:+.4f}"
            print(f"{name:20}{metric:32}{difference:+11.4f}  {interval:20}{'-' if p is None else f'{p:.3g}':>10}")
            table[f"{name},{metric}"] = {"difference": difference, "half_width_95": half, "mcnemar_p": p}
    return table


if __name__ == "__main__":
    main(parse_args())
