"""eval.py: flags and rows that cannot be used. How files are read: test_data.py, as gsil.py does that."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import ARC_ROW, GSM_ROW, evaluate, refused, write_jsonl

SWAG_ROW = {"activity_label": "Tea", "ctx_a": "A man", "ctx_b": "", "endings": ["a", "[step]"], "label": "0"}
MMLU_ROW = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 4}
TWO = {"choices": ["a", "b"]}
BAD_ROWS = [  # task, row, what the sentence says
    ("gsm8k", {"question": "1+1?"}, "'answer' is missing"),
    ("gsm8k", GSM_ROW | {"answer": "It is 2"}, "answer should end in '#### '"),
    ("answers", GSM_ROW | {"answer": "2"}, "should end in '#### '"),
    ("answers", GSM_ROW | {"answer": "#### Step 1\nIt is 2"}, "should end in '#### '"),
    ("humaneval", {"prompt": "def a():", "test": "", "entry_point": "b"}, "entry_point should be defined"),
    ("arc_easy", ARC_ROW | {"choices": {"text": [3, 4], "label": ["A", "B"]}}, "each choice should be text"),
    ("arc_easy", ARC_ROW | {"answerKey": "C"}, "answerKey should be one of"),
    ("arc_easy", ARC_ROW | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "choices should have as many"),
    ("hellaswag", SWAG_ROW, "each choice should be text, one is empty"),
    ("winogrande", {"sentence": "It is _"}, "sentence should have a _"),
    ("truthfulqa_mc1", {"question": "?", "mc1_targets": TWO | {"labels": [0, 1]}}, "labels should be 1, 0"),
    ("truthfulqa_mc2", {"question": "?", "mc2_targets": TWO | {"labels": [1, 1]}}, "labels should be 1 and"),
    ("truthfulqa_mc2", {"question": "?", "mc2_targets": TWO | {"labels": [1]}}, "should have as many"),
    ("mmlu", MMLU_ROW, "answer should be an index of 4"),
    ("mmlu", MMLU_ROW | {"choices": ["a"]}, "choices should be four"),
    ("mmlu", {"subject": "cooking"}, "subject should be one of MMLU's"),
    ("mt_bench", {"turns": "one"}, "turns should be a list"),
]


@pytest.mark.parametrize("task, row, says", BAD_ROWS)
def test_bad_rows(task, row, says, tmp_path, inputs, capsys):
    """Most of these would be scored as silent zeros, as lm_eval does."""
    file = write_jsonl(tmp_path / "test.jsonl", [row])
    flags = f"{inputs} --tasks {task} --data {file} --shots 0 --allow-code-execution"
    flags += f" --answers {file}0" * (task == "mt_bench")
    refused(capsys, flags, "error: ", f"{file} row 1: ", says)


def test_one_bad_row_in_ten_is_left_out_of_answers(tmp_path, inputs, capsys):
    """The file that one trained on could not be asked, or a benchmark would lose problems."""
    bad = GSM_ROW | {"answer": 2}
    file = write_jsonl(tmp_path / "x.jsonl", [GSM_ROW] * 9 + [bad])
    assert evaluate(f"{inputs} --data {file}")["results"]["answers"]["n"] == 9
    assert f"1 of 10 rows are left out, such as {file} row 10" in capsys.readouterr().out
    refused(capsys, f"{inputs} --tasks gsm8k --shots 0 --data {file}", "row 10")
    refused(capsys, f"{inputs} --data {write_jsonl(file, [GSM_ROW] * 8 + [bad])}", "row 9")


def test_too_few_rows(tmp_path, inputs, capsys):
    """A traceback would not say where few-shot examples come from, nor that there may be none."""
    train, test = (write_jsonl(tmp_path / f"{split}.jsonl", [GSM_ROW]) for split in ("train", "test"))
    flags = f"{inputs} --tasks gsm8k --data {tmp_path}"
    refused(capsys, flags, "1 rows for 5 few-shot examples")
    train.unlink()
    refused(capsys, flags, f"{tmp_path}: should have one train.jsonl", "--shots 0")
    write_jsonl(test, [])
    refused(capsys, f"{flags} --shots 0", "0 problems")


BAD_FLAGS = [  # flags, what the sentence says
    ("--tasks gsm9k", "--tasks gsm9k: name each task once, out of answers, gsm8k"),
    ("--tasks gsm8k,mmlu --data x.jsonl", "--data x.jsonl: should be TASK=PATH"),
    ("--temperature nan", "--temperature=nan"),
    ("--compare=", "--compare=: out of range"),
    ("--data=", "--data : should be TASK=PATH"),
    ("--answers x", "mt_bench needs --data and --answers"),
    ("--samples 2", "--samples 2: greedy responses are the same"),
    ("--tasks humaneval", "give --allow-code-execution"),
    ("--max-new-tokens 512 --limit 1", "--max-new-tokens 512: no room for a prompt"),
    ("--compare nowhere", "there is no such folder"),
    ("--tasks reward --data reward=x", "needs a --reward-model"),
    ("--tasks mt_bench --data x", "needs --data and --answers FILE"),
]


@pytest.mark.parametrize("flags, says", BAD_FLAGS)
def test_bad_flags(flags, says, capsys):
    """A wrong flag would be guessed at, or show when hours of work are done."""
    refused(capsys, flags, "error: ", says)


def test_as_a_command(tmp_path):
    """A mistake would end in a traceback, or --help would wait for libraries that it does not need."""
    command = [sys.executable, f"{ROOT}/eval.py", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"error: {tmp_path}: File exists" in done.stderr
    lines = ["import sys, eval", "eval.parse_args([])", "print({'datasets', 'scipy'} & {*sys.modules})"]
    command = [sys.executable, "-c", "; ".join(lines)]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "set()\n"


@pytest.mark.parametrize("name", ["out", "answers"])
def test_no_file_is_overwritten_or_left_behind(name, tmp_path, capsys):
    """A result of hours would be lost, or the file of a refused run be in the way."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [GSM_ROW])
    flags = f"--data {rows} --tasks {'mt_bench' if name == 'answers' else 'answers'} --{name}"
    refused(capsys, f"{flags} {rows}", f"{rows}: File exists; choose a file that does not exist")
    assert rows.read_text() == json.dumps(GSM_ROW) + "\n"
    refused(capsys, f"{flags} /dev/null", "/dev/null: File exists")
    refused(capsys, f"{flags} {tmp_path}/no/x.json", "No such file or directory")
    refused(capsys, f"{flags} {tmp_path}/x.json --model nowhere --limit 1", "nowhere")
    refused(capsys, f"{flags} {tmp_path}/x --data {tmp_path}/x", "should be a .jsonl")  # it exists already
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
