"""What the tests of eval.py share: its flags as a string, models A and B of tests/parity, files of rows."""

import json
import sys

import pytest
from conftest import ROOT

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
        ev.main(ev.parse_args(flags if isinstance(flags, list) else flags.split()))
    sentence = capsys.readouterr().err
    assert stop.value.code == 2
    for part in says:
        assert part in sentence, sentence
    return sentence


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def policy_of(model, tokenizer=None, window=256):
    """What load_policy makes of a folder, of a model in memory."""
    return ev.Policy(model, tokenizer, window, ev.cache_goes_on(model))


def flags_of(case, models, batch=1):
    """One of oracle.CASES as flags of eval.py."""
    family = case["task"].split("_")[0]
    return (
        f"--model {models}/{case['model']} --tasks {case['task']} --batch-size {batch} --device cpu "
        f"--data {case['task']}={ROOT}/tests/parity/rows/{family} --max-new-tokens {oracle.NEW_TOKENS} "
        + (f"--shots {case['shots']} " if "shots" in case else "")
        + "--chat " * case.get("chat", False)
        + (f"--limit {case['limit']} " if "limit" in case else "")
        + "--allow-code-execution"
    )
