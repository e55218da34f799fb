"""eval.py: flags and rows that cannot be used, each one sentence before any work is done. How files are read is
tested in test_data.py: the functions are the same text."""

import inspect
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from eval_tools import ARC_ROW, BASE, GSM_ROW, fails, write_jsonl

import eval as ev
import gsil

SWAG_ROW = {"activity_label": "Tea", "ctx_a": "A man", "ctx_b": "", "endings": ["a", "[step]"], "label": "0"}
MMLU_ROW = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 4}
TWO = {"choices": ["a", "b"]}
BAD_ROWS = [  # task, row, what the sentence says
    ("gsm8k", {"question": "1+1?"}, "answer is missing"),
    ("gsm8k", GSM_ROW | {"answer": "It is 2"}, "answer should end in '#### '"),
    ("answers", GSM_ROW | {"answer": "2"}, "should end in '#### '"),
    (
        "humaneval",
        {"prompt": "def one():", "test": "", "entry_point": "two"},
        "entry_point should be defined",
    ),
    ("arc_easy", ARC_ROW | {"answerKey": "C"}, "answerKey 'C' is not in list"),
    ("arc_easy", ARC_ROW | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "choices should have as many"),
    ("hellaswag", SWAG_ROW, "each choice should be text, one is empty"),
    ("winogrande", {"sentence": "It is _"}, "sentence should have a _"),
    (
        "truthfulqa_mc1",
        {"question": "?", "mc1_targets": TWO | {"labels": [0, 1]}},
        "labels should be 1, 0, 0",
    ),
    (
        "truthfulqa_mc2",
        {"question": "?", "mc2_targets": TWO | {"labels": [1, 1]}},
        "labels should be 1 and 0",
    ),
    ("truthfulqa_mc2", {"question": "?", "mc2_targets": TWO | {"labels": [1]}}, "should have as many"),
    ("mmlu", MMLU_ROW, "answer should be an index of 4"),
    ("mmlu", MMLU_ROW | {"choices": ["a"]}, "choices should be four"),
    ("mmlu", {"subject": "cooking"}, "subject should be one of MMLU's"),
    ("mt_bench", {"turns": "one"}, "turns should be a list"),
]


@pytest.mark.parametrize("task, row, says", BAD_ROWS)
def test_bad_rows(task, row, says, tmp_path, capsys):
    """lm_eval scores most of these as silent zeros."""
    file = write_jsonl(tmp_path / "test.jsonl", [row])
    flags = f"--model nowhere --tasks {task} --data {file} --shots 0 --allow-code-execution --answers {file}0"
    fails(capsys, flags, f"error: {file} line 1: ", says)


def test_one_bad_row_in_ten_is_left_out_of_answers(tmp_path, capsys):
    """As in training, so that the file one trained on can be asked; but it is said. A benchmark stays whole."""
    bad = GSM_ROW | {"answer": 2}
    file = write_jsonl(tmp_path / "x.jsonl", [GSM_ROW] * 9 + [bad])
    problems, _ = ev.read_task("answers", ev.TASKS["answers"], ev.parse_args(["--data", str(file)]))
    said = capsys.readouterr().out
    assert len(problems) == 9 and f"1 rows are left out, the first is {file} line 10" in said
    fails(capsys, f"--tasks gsm8k --shots 0 --data {file}", "line 10")
    fails(capsys, f"--data {write_jsonl(file, [GSM_ROW] * 8 + [bad])}", "line 9")


def test_too_few_rows(tmp_path, capsys):
    """Where the worked examples come from, how many there are, and that none may be asked for."""
    write_jsonl(tmp_path / "train.jsonl", [GSM_ROW] * 3)
    write_jsonl(tmp_path / "test.jsonl", [GSM_ROW])
    flags = f"--tasks gsm8k --model nowhere --data {tmp_path}"
    fails(capsys, flags, "3 rows for 5 worked examples")
    (tmp_path / "train.jsonl").unlink()
    fails(capsys, flags, f"{tmp_path}: there should be one file train.", "--shots 0")
    write_jsonl(tmp_path / "test.jsonl", [])
    fails(capsys, f"{flags} --shots 0", "0 problems")


BAD_FLAGS = [  # flags, what the sentence says
    ("--tasks gsm9k", "--tasks gsm9k: each once, out of answers, gsm8k"),
    ("--tasks gsm8k,gsm8k", "--tasks gsm8k,gsm8k: each once"),
    ("--tasks gsm8k,mmlu --data x.jsonl", "--data x.jsonl: should be TASK=PATH"),
    ("--limit 0", "--limit 0"),
    ("--temperature nan", "--temperature nan"),
    ("--samples 2", "--samples 2: greedy ones are all the same"),
    ("--tasks humaneval", "give --allow-code-execution"),
    ("--max-new-tokens 512 --limit 1", "--max-new-tokens 512: no room for a prompt"),
    ("--compare nowhere", "nowhere: no such folder"),
    ("--tasks reward --data reward=x", "needs --reward-model"),
    ("--tasks mt_bench --data x", "needs --answers FILE"),
]


@pytest.mark.parametrize("flags, says", BAD_FLAGS)
def test_bad_flags(flags, says, capsys):
    """With the value and what would be right; nothing is guessed."""
    fails(capsys, flags, "error: ", says)


def test_pickles_are_not_read(tmp_path, capsys):
    """They may run any code."""
    folder = shutil.copytree(BASE, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(capsys, f"--model {folder} --limit 1", "no file named model.safetensors")


def test_where_nothing_can_be_written(tmp_path):
    """Said at once, not when all answers are there and would be lost."""
    command = [sys.executable, f"{ROOT}/eval.py", "--model", "nowhere", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr


def test_pieces_shared_with_gsil_are_the_same_text():
    """Copied, not imported: a reader meets the same function, and a repair must reach both."""
    for name in ("read_rows", "to_messages", "to_message", "final_answer", "pad", "die", "load", "Help"):
        assert inspect.getsource(getattr(ev, name)) == inspect.getsource(getattr(gsil, name)), name
    for name in ("COLUMNS", "ROLES", "BEYOND_TEXT", "UNUSABLE"):
        assert getattr(ev, name) == getattr(gsil, name), name
