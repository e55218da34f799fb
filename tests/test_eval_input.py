"""eval.py: flags, files and rows that cannot be used, each one sentence before any work is done."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from eval_tools import ARC_ROW, BASE, GSM_ROW, fails, oracle, write_jsonl

import eval as ev
import gsil

CODE = "def double(n):\n"
CODE_ROW = {"prompt": CODE, "test": "def check(candidate):\n    pass\n", "entry_point": "double"}
SWAG_ROW = {"activity_label": "Tea", "ctx_a": "A man", "ctx_b": "", "endings": ["a", "b"], "label": "0"}
WINO_ROW = {"sentence": "It is _ here.", "option1": "a", "option2": "b", "answer": "1"}
MMLU_ROW = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3}


def truth_row(kind, labels):
    return {"question": "Is it?", f"{kind}_targets": {"choices": ["a", "b"], "labels": labels}}


@pytest.mark.parametrize(
    "task, rows, says",
    [
        ("gsm8k", [GSM_ROW, {"question": "1+1?"}], ["line 2", "answer", "missing"]),
        ("gsm8k", [GSM_ROW, {"question": "1+1?", "answer": 18}], ["line 2", "answer", "18"]),
        ("gsm8k", [GSM_ROW, {"question": "1+1?", "answer": "It is 2"}], ["line 2", "It is 2", "#### "]),
        ("gsm8k", [{"question": ["1+1?"], "answer": "#### 2"}], ["line 1", "question", "['1+1?']"]),
        ("gsm8k", [], ["0 problems"]),
        ("gsm8k", ["text"], ["line 1", "'text'"]),
        ("answers", [{"question": "1+1?", "answer": "2"}], ["line 1", "####"]),
        ("answers", [{"text": "1+1?"}], ["line 1", "text", "question + answer"]),
        ("humaneval", [{"prompt": CODE, "test": ""}], ["line 1", "entry_point"]),
        ("humaneval", [CODE_ROW | {"entry_point": "triple"}], ["line 1", "entry_point", "triple"]),
        ("arc_easy", [ARC_ROW, ARC_ROW | {"answerKey": "C"}], ["line 2", "answerKey", "'C'"]),
        ("arc_easy", [ARC_ROW | {"choices": ["a", "b"]}], ["line 1", "choices", "['a', 'b']"]),
        ("arc_easy", [ARC_ROW | {"choices": {"text": ["a", ""], "label": ["A", "B"]}}], ["line 1", "empty"]),
        ("arc_easy", [ARC_ROW | {"choices": {"text": ["a"], "label": ["A", "B"]}}], ["line 1", "choices"]),
        ("hellaswag", [SWAG_ROW | {"label": ""}], ["line 1", "label", "''", "validation"]),
        ("hellaswag", [SWAG_ROW | {"endings": ["a", "[step]"]}], ["line 1", "empty"]),
        ("winogrande", [WINO_ROW | {"sentence": "no blank"}], ["line 1", "sentence", "_"]),
        ("winogrande", [WINO_ROW | {"sentence": "It is _"}], ["line 1", "sentence", "behind it"]),
        ("winogrande", [WINO_ROW | {"answer": ""}], ["line 1", "answer", "1 or 2", "validation"]),
        ("truthfulqa_mc1", [truth_row("mc1", [0, 1])], ["line 1", "mc1_targets", "1, 0, 0"]),
        ("truthfulqa_mc2", [truth_row("mc2", [1, 1])], ["line 1", "mc2_targets", "1 and 0"]),
        ("truthfulqa_mc2", [truth_row("mc2", [1, 0, 1])], ["line 1", "mc2_targets", "as many"]),
        ("mmlu", [MMLU_ROW | {"answer": 4}], ["line 1", "answer", "index of 4", "4"]),
        ("mmlu", [MMLU_ROW | {"answer": "B"}], ["line 1", "answer", "'B'"]),
        ("mmlu", [MMLU_ROW | {"choices": ["a"]}], ["line 1", "choices", "four"]),
        ("mmlu", [MMLU_ROW | {"subject": "cooking"}], ["line 1", "subject", "cooking"]),
        ("mmlu", [], ["0 problems"]),
        ("mt_bench", [{"question_id": 81, "category": "math", "turns": "one"}], ["line 1", "turns", "'one'"]),
    ],
)
def test_bad_rows(task, rows, says, tmp_path, capsys):
    """lm_eval scores most of these as silent zeros."""
    file = write_jsonl(tmp_path / "test.jsonl", rows)
    flags = f"--model nowhere --tasks {task} --data {file} --shots 0 --allow-code-execution --answers {file}0"
    fails(capsys, flags, "error: ", *says)


def test_one_bad_row_in_ten_is_left_out_of_answers(tmp_path, capsys):
    """As in training, so that the file one trained on can be asked; but it is said, with the place."""
    bad = {"question": "1+1?", "answer": "#### 2", "tool_calls": ["x"]}
    file = write_jsonl(tmp_path / "x.jsonl", [GSM_ROW] * 9 + [bad])
    problems, _ = ev.read_task("answers", ev.TASKS["answers"], ev.parse_args(["--data", str(file)]))
    assert len(problems) == 9 and "1 rows are left out" in capsys.readouterr().out
    write_jsonl(file, [GSM_ROW] * 8 + [bad])
    fails(capsys, f"--data {file}", "line 9")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--tasks gsm9k", ["gsm9k", "humaneval"]),
        ("--tasks gsm8k,gsm8k", ["gsm8k,gsm8k", "once"]),
        ("--tasks gsm8k --data humaneval=x", ["humaneval", "--tasks gsm8k"]),
        ("--tasks gsm8k,mmlu --data x.jsonl", ["x.jsonl", "TASK=PATH"]),
        ("--data nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
        ("--limit 0", ["--limit", "0"]),
        ("--temperature nan", ["--temperature nan"]),
        ("--tasks gsm8k --shots -1", ["--shots -1"]),
        ("--samp 2", ["--samp"]),
        ("--samples 2", ["--temperature"]),
        ("--tasks humaneval", ["--allow-code-execution"]),
        ("--max-new-tokens 512 --limit 1", ["512", "window", "--max-new-tokens"]),
        ("--model nowhere", ["nowhere"]),
        ("--compare nowhere", ["nowhere"]),
        ("--tasks reward --data reward=x", ["--reward-model"]),
        ("--tasks mt_bench --data x", ["--answers"]),
        ("--tasks mt_bench --data x --answers y --compare z", ["--compare"]),
    ],
)
def test_bad_flags(flags, says, capsys):
    """With the value and what would be right; nothing is guessed."""
    fails(capsys, flags, "error: ", *says)


BROKEN = {  # what is done to a model's folder -> what the sentence says
    "a pickle": (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "safetensors"),
    "half a file": (lambda path: os.truncate(path / "model.safetensors", 9999), "can be loaded"),
    "no model": (lambda path: (path / "config.json").unlink(), "can be loaded"),
    "own code": (
        lambda path: (path / "config.json").write_text(
            '{"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}'
        ),
        "custom code",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_cannot_be_read(name, tmp_path, capsys):
    """Pickles and a model's own code may do anything; neither is read."""
    shutil.copytree(BASE, tmp_path / "model")
    spoil, says = BROKEN[name]
    spoil(tmp_path / "model")
    fails(capsys, f"--model {tmp_path}/model --limit 1", says)


def test_where_nothing_can_be_written(tmp_path):
    """Said at once, not when all answers are there and would be lost."""
    file = write_jsonl(tmp_path / "file.jsonl", [GSM_ROW])
    command = [sys.executable, f"{ROOT}/eval.py", "--limit", "1", "--out", f"{file}/x.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
    assert "parameters" not in done.stdout  # before a model was loaded


def test_too_few_rows_for_the_examples(tmp_path, capsys):
    """Where they come from, how many there are, and that none may be asked for."""
    for split, n in (("train", 3), ("test", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", [GSM_ROW] * n)
    flags = f"--tasks gsm8k --model nowhere --data {tmp_path}"
    fails(capsys, flags, "3 rows", "5 worked examples")
    mmlu = f"--tasks mmlu --model nowhere --shots 9 --data {oracle.ROWS / 'mmlu'}"
    fails(capsys, mmlu, "abstract_algebra", "5 rows", "9 worked examples")
    (tmp_path / "train.jsonl").rename(tmp_path / "training.jsonl")
    fails(capsys, flags, str(tmp_path), "train.", "--shots 0")


def test_files_as_people_have_them(tmp_path):
    """BOM, CRLF, blank lines, U+2028, a list instead of lines, CSV cells: all the same two rows."""
    lines = [json.dumps(GSM_ROW | {"question": q}, ensure_ascii=False) for q in ("a\u2028b", "NA")]
    contents = {
        "a.jsonl": "\n".join(lines).encode(),
        "b.jsonl": b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n",
        "c.json": ("[" + ",\n".join(lines) + "]").encode(),
        "d.csv": 'question,answer\na\u2028b,"2\n#### 2"\nNA,"2\n#### 2"\n'.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows = [row for _, row in ev.read_rows(str(tmp_path / name), "")]
        assert rows == [GSM_ROW | {"question": "a\u2028b"}, GSM_ROW | {"question": "NA"}], name


UNREADABLE = [b'{"question": "a"}\n{oops\n', b"\xff\xfe", b"\n{", b'{}\n{"a": "\xff"}\n']


@pytest.mark.parametrize("content", UNREADABLE)
def test_files_that_cannot_be_read(content, tmp_path, capsys):
    """The line is named, also where the bytes are not text."""
    (tmp_path / "x.jsonl").write_bytes(content)
    fails(capsys, f"--data {tmp_path}/x.jsonl", "x.jsonl line")


def test_commands_of_the_docstring_parse():
    """A command that does not run is the first thing a newcomer meets."""
    found = re.findall(r"^    python eval.py(.*)$", ev.__doc__, re.MULTILINE)
    assert len(found) == 3
    for flags in found:
        ev.parse_args(shlex.split(flags.split("#")[0]))


SHARED = ["read_rows", "to_messages", "to_message", "final_answer", "pad", "die", "load", "Help"]


@pytest.mark.parametrize("name", SHARED)
def test_pieces_shared_with_gsil_are_the_same_text(name):
    """Copied, not imported: a reader meets the same function, and a repair must reach both."""
    assert inspect.getsource(getattr(ev, name)) == inspect.getsource(getattr(gsil, name))
    for constant in ("COLUMNS", "ROLES", "BEYOND_TEXT", "UNUSABLE"):
        assert getattr(ev, constant) == getattr(gsil, constant)
