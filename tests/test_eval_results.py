"""eval.py: what a response or a program counts; means, intervals and comparisons; what --out keeps."""

import json
import math
import os
import select

import pytest
from conftest import byte_tokenizer, tiny_model
from helpers import GSM_ROW, evaluate, save
from tokenizers import decoders

import eval as ev

PROMPT = "def double(n):\n"
TEST = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
RIGHT = "    return 2 * n\n"
MUST_FAIL = {
    "memory": "    x = bytes(5 << 30)\n" + RIGHT,
    "large file": "    with open('x', 'wb') as file:\n        file.write(bytes(100 << 20))\n" + RIGHT,
    "segfault": "    import ctypes\n    ctypes.string_at(0)\n",
    "lone surrogate": RIGHT + "\n'\ud800'\n",
    "sleeps": "    import time\n    time.sleep(60)\n" + RIGHT,
    "kills its group": "    import os\n    os.killpg(0, 9)\n",
    "a process that gets away": "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n"
    "        time.sleep(3)\n        os._exit(0)\n" + RIGHT,
    "says what it finds": "    import os, sys, time\n    frame = sys._getframe()\n    while frame.f_back:\n"
    "        frame = frame.f_back\n    secrets = [v for v in frame.f_locals.values() if isinstance(v, bytes)]\n"
    "    for said in [b'?', *secrets]:\n        for n in range(3, 9):\n            try:\n"
    "                os.write(n, said)\n            except OSError:\n                pass\n"
    "        time.sleep(0.1)\n    os._exit(0)\n",
}
if os.geteuid() != 0:  # root may start processes without limit
    MUST_FAIL["forks without end"] = "    import os\n    while True:\n        os.fork()\n"


@pytest.mark.parametrize("name", MUST_FAIL)
def test_programs_that_must_fail(name):
    """Each of these would pass for a right answer, hang the run, or do damage."""
    assert not ev.passes(PROMPT + MUST_FAIL[name] + TEST + "check(double)", seconds=1)


def test_what_programs_may_do(tmp_path, monkeypatch):
    """A program could send the user's keys away or leave a process, or a right one fail that starts a thread."""
    for target in "threading.Thread", "multiprocessing.get_context('fork').Process":
        program = f"import multiprocessing, threading\nmore = {target}(target=print)\n"
        program += "more.start()\nmore.join()\n"
        limit = "resource.getrlimit(resource.RLIMIT_NPROC)[0]"  # root alone would not be bound by it
        assert ev.passes(f"{program}import resource\nassert 256 < {limit} < 1e6")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert ev.passes("import os\nassert 'HF_TOKEN' not in os.environ")
    at_home = "assert os.path.samefile(os.environ['HOME'], tempfile.gettempdir())"
    assert ev.passes(f"import os, tempfile\n{at_home}")
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    forks = f"import os, signal, time\nos.open('{path}', os.O_WRONLY)\nsignal.signal(15, signal.SIG_IGN)\n"
    assert not ev.passes(forks + "if os.fork() == 0:\n    time.sleep(60)\n", seconds=1)
    ended, _, _ = select.select([pipe], [], [], 5)  # a pipe without anyone to write can be read, to its end
    assert ended and os.read(pipe, 1) == b""
    os.close(pipe)


def test_a_tokenizer_that_removes_blanks(tmp_path, capsys):
    """Right functions would fail, as their first line is no longer indented."""
    tokenizer = byte_tokenizer()
    for warned in False, True:
        save(tmp_path, tiny_model(), tokenizer)
        flags = "--tasks humaneval --allow-code-execution --max-new-tokens 9"
        ev.open_lm(str(tmp_path), ev.parse_args(flags.split()))
        assert ("decoding removes blanks" in capsys.readouterr().out) == warned
        inner = tokenizer.backend_tokenizer
        inner.decoder = decoders.Sequence([inner.decoder, decoders.Strip(" ", 1, 0)])


def test_what_counts():
    """One right response of four would count in full, or of equal choices not the first."""
    problem = {"choices": ["a", "b"], "gold": 0}
    assert ev.acc(problem, [-2.0, -2.0])["acc,none"] == 1
    assert ev.mc2(problem | {"labels": [0, 1]}, [-2000.0, -2000.0])["acc,none"] == 0.5  # not 0 / 0
    score = ev.TASKS["gsm8k"].score(ev.TASKS["gsm8k"].read(GSM_ROW), ["", " \n", "#### 2", "2"])
    assert score["metrics"] == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    problem = ev.read_humaneval({"prompt": PROMPT, "test": TEST, "entry_point": "double"})
    score = ev.pass_at_1(problem, [RIGHT, "", ""])
    assert score["passed"] == [True, False, False]
    assert score["metrics"] == {"pass@1,create_test": pytest.approx(1 / 3)}


def test_summary_by_hand():
    """A standard error, an interval or MMLU's groups would differ from lm_eval's."""
    scored = [{"truncated": True, "empty": 2, "metrics": {"acc,none": right}} for right in (1, 0, 1)]
    summary = ev.summarize(scored)
    low, high = summary.pop("acc_interval,none")
    expected = {"n": 3, "truncated": 3, "empty": 6, "unfinished": 0, "acc,none": 2 / 3}
    assert summary == pytest.approx(expected | {"acc_stderr,none": 1 / 3})
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's, which stays between 0 and 1:
    assert ev.interval(1.0, 0.0, 3) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert ev.interval(0.0, None, 1) == pytest.approx((0.0, 0.7935), abs=1e-4)
    sizes = {group: len(names.split()) for group, names in ev.MMLU_SUBJECTS.items()}
    assert sizes == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}
    scored = [{"metrics": {"acc,none": value}} for value in (0.2, 0.4, 0.9)]  # no shares
    stderr = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    expected = pytest.approx((0.5 - 1.96 * stderr, 0.5 + 1.96 * stderr))
    assert ev.summarize(scored)["acc_interval,none"] == expected
    assert (
        ev.summarize(scored[:1])["acc_stderr,none"] is ev.summarize(scored[:1])["acc_interval,none"] is None
    )


def test_compare_by_hand():
    """Three problems that only A has right and one that only B has would give another p."""
    found = ev.paired_difference([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    deviation = math.sqrt((3 * 0.8**2 + 1.2**2 + 6 * 0.2**2) / 9)
    expected = {"difference": 0.2, "half_width": 1.96 * deviation / math.sqrt(10), "mcnemar_p": 0.625}
    assert found == pytest.approx(expected)
    assert ev.paired_difference([0.5, 0], [1, 0])["mcnemar_p"] is None
    assert ev.paired_difference([1], [0]) == {"difference": 1, "half_width": None, "mcnemar_p": 1.0}


def test_out_and_compare(inputs, tmp_path, capsys):
    """A table's settings, versions, prompts and responses would be lost with the terminal."""
    base = inputs.split()[1]
    outcome = evaluate(f"{inputs} --limit 0.7 --compare {base} --out {tmp_path}/scores.json")
    text = (tmp_path / "scores.json").read_text()
    saved = json.loads(text)
    assert saved == json.loads(json.dumps(outcome)) and text.startswith('{\n  "version": 2,\n')
    assert saved["settings"]["limit"] == 0.7 and "torch" in saved["packages"]
    assert saved["results"]["answers"]["n"] == 5 == len(saved["samples"]["answers"])  # of 6, rounded up
    found = saved["compare"]["differences"]["answers,exact_match,final-answer"]
    assert found == {"difference": 0, "half_width": 0, "mcnemar_p": 1.0}
    assert f"difference from {base}" in capsys.readouterr().out
