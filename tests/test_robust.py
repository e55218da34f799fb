"""Nothing lost, nobody misled: killed runs go on, and a person's mistake gets one sentence.

Runs here are of a random two-layer model on six rows, so that each takes a fraction of a second. Those that
are killed are processes of their own, forked by a server that has imported the scripts before.
"""

import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoTokenizer, BertConfig, T5Config, T5ForConditionalGeneration)

import gsil
import irft
from conftest import ROOT, byte_tokenizer, tiny_model
from test_gsil import args_for, assistant, made_pairs, metrics, user, weights, write_jsonl

SCRIPTS = {"gsil": gsil, "irft": irft}
ROWS = [{"question": f"What is {n} ?", "answer": f"it is {n} . #### {n}"} for n in range(6)]
FAST = {
    "gsil": "--rounds 2 --epochs 1 --batch 4 --lr 1e-3",
    "irft": "--rounds 2 --reward-steps 2 --policy-steps 1 --policy-batch 2 --group-size 2 --batch 4",
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Flags for a model and data, both tiny."""
    folder = tmp_path_factory.mktemp("inputs")
    save(folder / "model", tiny_model(), byte_tokenizer())
    write_jsonl(folder / "demos.jsonl", ROWS)
    write_jsonl(folder / "dev.jsonl", [row | {"question": row["question"] + "!"} for row in ROWS[:2]])
    return f"--model {folder}/model --data {folder}/demos.jsonl --dev {folder}/dev.jsonl --max-new-tokens 8"


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def run(script, flags):
    return script.run_safely(script.main, script.parse_args(flags.split()))


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """script -> the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, script in SCRIPTS.items():
        run(script, f"{inputs} {FAST[name]} --out {folder / name}")
    return folder


def check_equal(ours, theirs):
    """The same files with the same weights, and the same metrics but for the clock."""
    saved = sorted(path.relative_to(theirs).parent for path in Path(theirs).rglob("model.safetensors"))
    assert len(saved) >= 3
    assert saved == sorted(path.relative_to(ours).parent for path in Path(ours).rglob("model.safetensors"))
    for part in saved:
        assert weights(ours / part) == weights(theirs / part), part
    assert metrics(ours) == metrics(theirs)
    assert not list(Path(ours).rglob("*.partial"))


# ---- killed anywhere ---------------------------------------------------------------------------------------


HOLD = {  # moment -> a function that is called then, and at which of its calls the process is killed
    "sampling": ("no_nan", lambda calls: len(calls) == 20),  # after base: the fourth token of round 1
    "training": ("check_finite", lambda calls: len(calls) == 3),  # round 2, or policy steps of round 1
    "saving": ("settle", lambda calls: calls[-1][1].name == "round_1"),  # all written, not yet renamed
}


def script_process(name, flags, folder, moment, limit, threads):
    """What `python NAME.py FLAGS` does; at the moment it makes a file and waits to be killed."""
    script, calls = SCRIPTS[name], []
    sys.argv = [f"{name}.py"]
    sys.stdout = sys.stderr = open(folder / "said", "w", buffering=1)
    torch.set_num_threads(threads)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if moment:
        function, is_now = HOLD[moment]
        whole = getattr(script, function)

        def waits(*args):
            calls.append(args)
            if is_now(calls):
                (folder / "now").touch()
                signal.pause()
            return whole(*args)

        setattr(script, function, waits)
    run(script, flags)


def script_stopped(name, flags, folder, moment=None, by=None, limit=None):
    """Exit code and last line of a script that is sent a signal at a moment, or is left little disk."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["gsil", "irft"])
    process = server.Process(
        target=script_process, args=(name, flags, folder, moment, limit, torch.get_num_threads())
    )
    process.start()
    while by and process.is_alive() and not (folder / "now").exists():
        process.join(0.01)
    if by:
        os.kill(process.pid, by)
    process.join()
    said = (folder / "said").read_text()
    assert "Traceback" not in said
    return process.exitcode, said.splitlines()[-1]


@pytest.mark.parametrize("moment", HOLD)
@pytest.mark.parametrize("name", SCRIPTS)
def test_kill_9_and_resume(name, moment, inputs, undisturbed, tmp_path):
    """A machine that is taken away must cost no more than the phase it was in, and change no digit."""
    out = tmp_path / "out"
    flags = f"{inputs} {FAST[name]} --out {out}"
    code, _ = script_stopped(name, flags, tmp_path, moment, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (out / "summary.json").exists()
    run(SCRIPTS[name], f"--resume {out}")
    check_equal(out, undisturbed / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fault_at_every_write_and_resume(name, inputs, undisturbed, tmp_path, monkeypatch):
    """Each rename of a run in turn fails, and leaves half of what was to be renamed: no file may be taken for
    whole, and none be missed, afterwards."""
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(str(target))
        if len(calls) in at:
            for file in filter(Path.is_file, (Path(source), *Path(source).rglob("*"))):
                os.truncate(file, file.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    at, whole = [], tmp_path / "whole"
    run(SCRIPTS[name], f"{inputs} {FAST[name]} --out {whole}")
    writes = {path.replace(str(whole), ""): n for n, path in enumerate(calls, 1)}  # of each file the last
    assert {"/args.json", "/metrics.jsonl", "/round_1", "/round_2", "/sft", "/summary.json"} <= {*writes}
    assert ("/round_2.partial/reward" in writes) == (name == "irft")
    for n in sorted({2, *writes.values()} - {1}):  # 2: the first line of metrics.jsonl
        calls.clear()
        at, out = [n], tmp_path / str(n)
        with pytest.raises(SystemExit) as stop:
            run(SCRIPTS[name], f"{inputs} {FAST[name]} --out {out}")
        assert stop.value.code == 2
        calls.clear()
        at = []
        run(SCRIPTS[name], f"--resume {out}")
        check_equal(out, undisturbed / name)
        shutil.rmtree(out)


@pytest.mark.parametrize("file", ["metrics.jsonl", "round_2.partial/generated.jsonl"])
def test_a_last_line_that_was_cut_off_is_dropped_and_said(
    file, inputs, undisturbed, tmp_path, monkeypatch, capsys
):
    """Files that were copied while a run wrote them end in half a line. Half a round's samples would train
    another model than the whole round's."""
    monkeypatch.setattr(gsil, "train_round", stops_in_round_2(gsil.train_round))
    with pytest.raises(SystemExit):
        run(gsil, f"{inputs} {FAST['gsil']} --out {tmp_path}")
    monkeypatch.undo()
    text = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(text[:-20])
    run(gsil, f"--resume {tmp_path}")
    assert f"{tmp_path / file}: dropped its last line" in capsys.readouterr().out
    check_equal(tmp_path, undisturbed / "gsil")


def stops_in_round_2(train_round):
    def wrapped(*args):
        for record in train_round(*args):
            yield record
            if record["phase"] == "round 2":
                raise KeyboardInterrupt

    return wrapped


def test_a_run_of_the_other_script_is_not_resumed(undisturbed, capsys):
    """Their flags differ: gsil.py would go on with a run of RFT by another method, and call it the same."""
    for name, other in (("gsil", "irft"), ("irft", "gsil")):
        with pytest.raises(SystemExit) as stop:
            run(SCRIPTS[name], f"--resume {undisturbed / other}")
        assert stop.value.code == 2 and "another script" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_prints_the_command_that_goes_on(name, inputs, undisturbed, tmp_path):
    """A traceback does not tell how to go on. The command it prints is run as it stands."""
    out = tmp_path / "out"
    flags = f"{inputs} {FAST[name]} --out {out}"
    code, last = script_stopped(name, flags, tmp_path, "training", signal.SIGINT)
    assert code == 130
    message, _, command = last.partition("; go on with: python ")
    assert message == "error: stopped" and command.split()[0] == f"{name}.py"
    run(SCRIPTS[name], command.split(maxsplit=1)[1])
    check_equal(out, undisturbed / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_leaves_the_last_round_as_it_was(name, inputs, undisturbed, tmp_path):
    """Files may not grow beyond 60 kB, which the weights exceed: saving round 2 fails, round 1 is safe."""
    out = tmp_path / "out"
    one = FAST[name].replace("--rounds 2", "--rounds 1")
    run(SCRIPTS[name], f"{inputs} {one} --out {out} --baseline none")
    before = weights(out / "round_1")
    code, last = script_stopped(name, f"--resume {out} --rounds 2", tmp_path, limit=60_000)
    assert code == 2 and "File too large" in last and f"{name}.py --resume {out}" in last
    assert weights(out / "round_1") == before and not (out / "round_2").exists()
    run(SCRIPTS[name], f"--resume {out}")
    for part in ("round_1", "round_2"):
        assert weights(out / part) == weights(undisturbed / name / part)


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    """After a power cut a rename may have happened and the bytes not: the file would be there, and empty."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    gsil.write(tmp_path / "x.jsonl", [{"a": 1}])
    assert done == [(tmp_path / "x.jsonl").stat().st_ino, "renamed"]
    done.clear()
    gsil.save_model(tiny_model(), byte_tokenizer(), tmp_path / "round_1")
    files = {path.stat().st_ino for path in (tmp_path / "round_1").iterdir()}
    assert len(files) >= 4 and {*done[:-1]} == files and done[-1] == "renamed"
