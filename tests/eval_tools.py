"""What the tests of eval.py share: its flags as a string, models A and B of tests/parity, files of rows."""

import json
import sys

import pytest
from conftest import ROOT
from helpers import write_jsonl  # noqa: F401 (as oracle: for the tests that import it from here)

import eval as ev

sys.path.insert(0, str(ROOT / "tests" / "parity"))
import oracle

BASE = str(ROOT / "tests/toy/base")
GOLDEN = json.loads((ROOT / "tests/parity/golden.json").read_text("utf-8"))
GSM_ROW = {"question": "1+1?", "answer": "2\n#### 2"}
ARC_ROW = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


def run(flags):
    return ev.main(ev.parse_args(flags.split()))


def fails(capsys, flags, *says):
    """The flags must end in exit code 2 and one sentence that has all of `says`."""
    with pytest.raises(SystemExit) as stop:
        run(flags)
    sentence = capsys.readouterr().err
    assert stop.value.code == 2
    for part in says:
        assert part in sentence, sentence


def policy_of(model, tokenizer=None, window=256):
    """What load_policy makes of a folder, of a model in memory."""
    return ev.Policy(model, tokenizer, window, ev.cache_goes_on(model))


def flags_of(case, models, batch=1):
    """One of oracle.CASES as flags of eval.py."""
    task = case["task"]
    flags = f"--model {models}/{case['model']} --tasks {task} --batch-size {batch} --allow-code-execution "
    flags += f"--data {oracle.ROWS / task.split('_')[0]} --max-new-tokens {oracle.NEW_TOKENS} --device cpu "
    flags += "".join(f"--{name} {case[name]} " for name in ("shots", "limit") if name in case)
    return flags + "--chat" * case.get("chat", False)
