"""eval.py: programs that a model wrote, run with their tests. What code_eval, too, makes of exit(0), endless
loops, syntax errors and the like is among the canned responses of test_eval_parity.py."""

import os
import select

import pytest
from conftest import byte_tokenizer, tiny_model
from helpers import GSM_ROW, save
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


def test_programs_see_no_secrets_and_leave_nothing(tmp_path, monkeypatch):
    """A program could send the user's keys away, or leave a process that goes on after its score."""
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


def test_programs_may_start_threads_and_processes():
    """A right program would fail for every user but root, whom no limit of processes binds."""
    for target in "threading.Thread", "multiprocessing.get_context('fork').Process":
        program = f"import multiprocessing, threading\nmore = {target}(target=print)\n"
        program += "more.start()\nmore.join()\n"
        limit = "resource.getrlimit(resource.RLIMIT_NPROC)[0]"
        assert ev.passes(f"{program}import resource\nassert 256 < {limit} < 1e6")


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


def test_samples_are_averaged():
    """One right response of three or four would count as a right answer."""
    score = ev.TASKS["gsm8k"].score(ev.TASKS["gsm8k"].read(GSM_ROW), ["", " \n", "#### 2", "2"])
    assert score["metrics"] == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}
    problem = ev.read_humaneval({"prompt": PROMPT, "test": TEST, "entry_point": "double"})
    score = ev.pass_at_1(problem, [RIGHT, "", ""])
    assert score["passed"] == [True, False, False]
    assert score["metrics"] == {"pass@1,create_test": pytest.approx(1 / 3)}
