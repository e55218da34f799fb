"""eval.py: programs that a model wrote, run with their tests."""

import gzip
import os
import time

import pytest
from conftest import ROOT

import eval as ev

SHARED = ROOT.parent / "shared" / "data"  # real benchmark files, which this repository does not hold
PROMPT = "def double(n):\n"
TEST = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)"
RIGHT = "    return 2 * n\n"
MUST_PASS = {
    "right": RIGHT,
    "prints much": "    print('x' * 10 ** 7)\n" + RIGHT,
    "needs its folder": "    import os, tempfile\n"
    "    assert os.getcwd() == os.path.realpath(os.environ['HOME'])\n"
    "    tempfile.TemporaryFile().write(b'x')\n" + RIGHT,
    "main guard": RIGHT + "\nif __name__ == '__main__':\n    raise ValueError\n",
    "spoils what it came from": "    import builtins, json, os, sys\n"
    "    os._exit = os.write = builtins.exec = builtins.compile = None\n"
    "    sys.modules['os'] = sys.modules['json'] = None\n" + RIGHT,
}
if os.geteuid() == 0:  # others may start no process, nor a thread
    MUST_PASS["leaves a thread"] = (
        "    import threading, time\n    threading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT
    )
MUST_FAIL = {
    "wrong": "    return n\n",
    "empty": "",
    "syntax": "    return (\n",
    "unclosed quotes": "    '''\n",
    "exception": "    raise KeyboardInterrupt\n",
    "sys.exit(0)": "    import sys\n    sys.exit(0)\n",
    "sys.exit(0) at top level": RIGHT + "\nimport sys\nsys.exit(0)\n",
    "os._exit(0)": "    import os\n    os._exit(0)\n",
    "own check, and exit": "    return n\n\ndef check(candidate):\n    pass\n\nexit()\n",
    "input()": "    input()\n" + RIGHT,
    "endless loop": "    while True:\n        pass\n",
    "endless loop that catches all": "    while True:\n        try:\n"
    "            while True:\n                pass\n"
    "        except BaseException:\n            pass\n",
    "sleep": "    import time\n    time.sleep(60)\n" + RIGHT,
    "memory": "    x = bytes(5 << 30)\n" + RIGHT,
    "large file": "    with open('x', 'wb') as file:\n        file.write(bytes(100 << 20))\n" + RIGHT,
    "segfault": "    import ctypes\n    ctypes.string_at(0)\n",
    "guesses on stdout": "    import os\n    os.write(1, b'0' * 32)\n    os._exit(0)\n",
    "null byte": RIGHT + "\0",
    "lone surrogate": RIGHT + "\n'\ud800'\n",
    "own check": "    return n\n\ndef check(candidate):\n    pass\n",
    "own check that cannot be called": "    return n\n\nclass check:\n    pass\n",
    "own AssertionError": "    return n\n\nimport builtins, sys\n"
    "builtins.AssertionError = type('Quiet', (SystemExit,), {})\nsys.excepthook = print\n",
    "the answer from stdin": "    import os, sys\n    return int(os.read(0, 99) or sys.stdin.read() or n)\n",
    "spoils modules": "    import builtins, importlib, json, os, sys\n"
    "    os._exit = os.write = json.load = builtins.exec = lambda *a, **k: None\n"
    "    sys.modules['os'] = importlib.import_module('json')\n"
    "    importlib.invalidate_caches()\n    return n\n",
    "leaves by atexit": "    import atexit, os\n    atexit.register(os._exit, 0)\n    return n\n",
    "leaves by a thread": "    import os, threading, time\n"
    "    threading.Thread(target=os._exit, args=(0,)).start()\n    time.sleep(9)\n",
    "guesses on every descriptor": "    import os\n    for n in range(99):\n        try:\n"
    "            os.write(n, b'0' * 32)\n        except OSError:\n            pass\n    os._exit(0)\n",
    "kills itself": "    import os\n    os.kill(os.getpid(), 9)\n",
    "kills its group": "    import os\n    os.killpg(0, 9)\n",
    "stops itself": "    import os, signal\n    os.kill(os.getpid(), signal.SIGSTOP)\n" + RIGHT,
    "ignores signals": "    import signal\n    for n in {*range(1, 65)} - {9, 19, 32, 33}:\n"
    "        signal.signal(n, signal.SIG_IGN)\n    while True:\n        pass\n",
    "endless output": "    while True:\n        print('x' * 10 ** 6)\n",
    "memory in parts": "    x = []\n    while True:\n        x.append(bytes(10 ** 8))\n",
    "deep recursion": "    return double(n)\n",
    "deep recursion without a limit": "    import sys\n"
    "    sys.setrecursionlimit(10 ** 9)\n    return double(n)\n",
    "a process that gets away": "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n"
    "        time.sleep(3)\n        os._exit(0)\n" + RIGHT,
    "appends to the caller's lists": "    import os, sys\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in list(frame.f_locals.values()):\n"
    "            if isinstance(value, list):\n                value.append('passed')\n"
    "        frame = frame.f_back\n    os._exit(0)\n",
    "looks for the secret": "    import os, sys, time\n    frame = sys._getframe()\n    while frame.f_back:\n"
    "        frame = frame.f_back\n"
    "    for said in [b'?'] + [v for v in frame.f_locals.values() if isinstance(v, bytes)]:\n"
    "        for n in range(3, 9):\n            try:\n                os.write(n, said)\n"
    "            except OSError:\n                pass\n        time.sleep(0.2)\n    os._exit(0)\n",
}


@pytest.mark.parametrize("name", MUST_PASS)
def test_programs_that_must_pass(name):
    assert ev.passes(PROMPT + MUST_PASS[name] + TEST)


@pytest.mark.parametrize("name", MUST_FAIL)
def test_programs_that_must_fail(name):
    """Each would otherwise be a right answer, a hang, or damage."""
    assert not ev.passes(PROMPT + MUST_FAIL[name] + TEST, seconds=1)


BOMBS = {
    "processes": "    import os\n    while True:\n        os.fork()\n",
    "threads": "    import threading, time\n    while True:\n"
    "        threading.Thread(target=time.sleep, args=(9,)).start()\n",
}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may start processes without limit")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    """Without the limit these would take the machine down; with it, the first one to be started fails."""
    began = time.time()
    assert not ev.passes(PROMPT + BOMBS[name] + TEST, seconds=1)
    assert time.time() - began < 3


def test_programs_see_no_secrets_and_leave_nothing(tmp_path, monkeypatch):
    """Keys in the environment are not theirs to read; a process they start must not outlive them."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert ev.passes("import os\nassert 'HF_TOKEN' not in os.environ")
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    ev.passes(f"import os, sys, time\nif os.fork() == 0:\n    exec({child!r})\n", seconds=1)
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.skipif(not (SHARED / "humaneval").is_dir(), reason="HumanEval is not at ../shared/data")
def test_all_canonical_solutions_pass(tmp_path):
    """What stops bad programs must not stop good ones: 164 of 164."""
    file = tmp_path / "test.jsonl"
    file.write_bytes(gzip.decompress((SHARED / "humaneval/HumanEval.jsonl.gz").read_bytes()))
    rows = [row for _, row in ev.read_rows(str(file), "")]
    problems = [ev.read_humaneval(row) for row in rows]
    scores = ev.score_programs(ev.TASKS["humaneval"], problems, [[row["canonical_solution"]] for row in rows])
    assert len(scores) == 164 and all(score["metrics"] == {"pass@1,create_test": 1.0} for score in scores)


def test_samples_of_a_program_are_averaged():
    """One of three passes: pass@1 is 1/3, not 1."""
    row = {"prompt": PROMPT, "test": TEST.rpartition("\n")[0], "entry_point": "double"}
    problems = [ev.read_humaneval(row)]
    (score,) = ev.score_programs(ev.TASKS["humaneval"], problems, [[RIGHT, "", ""]])
    assert score["passed"] == [True, False, False]
    assert score["metrics"] == {"pass@1,create_test": pytest.approx(1 / 3)}
