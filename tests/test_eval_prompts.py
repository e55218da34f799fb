"""eval.py: what is asked, and how the worked examples before it are drawn."""

import torch
from conftest import ROOT
from eval_tools import BASE, oracle, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as ev
import gsil


def test_examples_are_drawn_from_one_stream():
    """lm_eval draws for problem after problem: seeding anew for each would give all of them the same."""
    drawn = ev.draw_shots(range(7473), 5, [None] * 3)
    assert drawn == [[6374, 3610, 957, 61, 742], [7462, 6610, 4769, 286, 5501], [5677, 687, 806, 6279, 2905]]
    assert ev.draw_shots(range(7473), 5, [None] * 2) == drawn[:2]
    assert ev.draw_shots([], 0, [None] * 2) == [[], []]


def test_shots():
    """What is asked, except where lm_eval's task has none; if nothing is asked, five for gsm8k alone."""
    tasks = ["arc_challenge", "hellaswag", "truthfulqa_mc2", "gsm8k"]
    flags = ["--tasks", ",".join(tasks)]
    for task in tasks:
        flags += ["--data", f"{task}={oracle.ROWS / task.split('_')[0]}"]
    for more, expected in (["--shots", "3"], [3, 3, 0, 3]), ([], [0, 0, 0, 5]):
        args = ev.parse_args(flags + more)
        assert [len(ev.read_task(task, ev.TASKS[task], args)[1][0]) for task in tasks] == expected


def test_plain_prompt_is_what_its_docstring_shows():
    """The blank after 'Answer:' is there in an example, and not where the model goes on."""
    one, two = [ev.read_gsm8k({"question": f"{n}+{n}?", "answer": f"#### {2 * n}"}) for n in (1, 2)]
    assert ev.build_prompt(two, [(one["question"], "2")], two["question"]) == (
        "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:"
    )


def test_a_template_without_system_turn(models):
    """Gemma's template refuses MMLU's description as a system turn; lm_eval leaves the turn out."""
    tokenizer = AutoTokenizer.from_pretrained(models / "B")
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    problem = {"description": "About anatomy."}
    assert ev.build_prompt(problem, [], "Which?", tokenizer).startswith("<s><|user|>\nWhich?")


def test_bos_is_there_once(tokenizer, models):
    """A template that writes BOS itself must not get a second one from the tokenizer."""
    with_bos = AutoTokenizer.from_pretrained(models / "B")
    for text in ("a", "<s>a"):
        assert ev.tokenize(with_bos, text).count(with_bos.bos_token_id) == 1
    assert ev.tokenize(with_bos, "a", special=False) == with_bos("a").input_ids[1:]
    assert ev.tokenize(tokenizer, "a") == tokenizer("a").input_ids


def test_answers_asks_as_training_does():
    """A policy is trained on one prompt; asked with another it would look worse than it is."""
    outcome = run("--limit 5 --device cpu --max-new-tokens 40")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = list(gsil.read_rows(f"{ROOT}/tests/toy/heldout.jsonl", ""))[:5]
    demos = [gsil.encode(row, tokenizer, {1}) for _, row in rows]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = gsil.sample(model, [demo["prompt_ids"] for demo in demos], {1}, 40, 0, 5, "")
    for sample, demo, response in zip(outcome["samples"]["answers"], demos, ids):
        assert sample["prompt"] == demo["prompt"] and sample["gold"] == demo["answer"]
        assert ev.tokenize(tokenizer, sample["prompt"], special=False) == demo["prompt_ids"]
        assert sample["responses"] == [tokenizer.decode(response, skip_special_tokens=True)]


def test_answers_reads_what_training_reads():
    """Any of the formats, up to the last turn of the assistant; one row in ten may be unusable."""
    turns = [("system", "Short."), ("user", "1+1?")]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "#### 2")]]
    expected = {"turns": turns, "response": "#### 2", "gold": "2"}
    assert ev.read_answer({"messages": messages}) == expected
    short = ev.read_answer({"instruction": "1+1?", "output": "####\t$2."})
    assert (short["turns"], short["gold"]) == (turns[1:], "2")
    hh = {"chosen": "\n\nHuman: 1+1? \n\nAssistant: #### 2", "rejected": "x"}
    assert ev.read_answer(hh)["turns"] == turns[1:]
