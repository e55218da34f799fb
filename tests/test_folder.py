"""Section 8 of gsil.py: a run that is stopped anywhere goes on, and ends with the weights of an undisturbed one."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import metrics, read_jsonl, run, weights, write_jsonl

import gsil

FAST = "--scale 1 --epochs 1 --batch 4 --lr 1e-3 "


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(inputs + FAST + f"--rounds 2 --out {out}")
    return out


def check_equal(ours, theirs):
    """The same files with the same weights, and the same metrics but for the clock."""
    names, expected = ([path.relative_to(out) for path in sorted(out.rglob("*"))] for out in (ours, theirs))
    assert names == expected
    for file in theirs.rglob("*.safetensors"):
        assert weights(ours / file.relative_to(theirs).parent) == weights(file.parent)
    assert metrics(ours) == metrics(theirs)


def killed(flags, threads):
    """A run that is killed before the second step of round 2."""
    torch.set_num_threads(threads)
    calls = []
    update = gsil.update

    def dies(*args):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    gsil.update = dies
    run(flags)


def test_kill_9_and_resume(inputs, undisturbed, tmp_path, capsys):
    """A machine that is taken away must cost no more than the phase it was in, and change no digit. What was
    sampled is not sampled again."""
    out = tmp_path / "out"
    arguments = (inputs + FAST + f"--rounds 2 --out {out}", torch.get_num_threads())
    process = multiprocessing.get_context("forkserver").Process(target=killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (out / "round_2").exists()
    run(f"--resume {out}")
    check_equal(out, undisturbed)
    assert "sampling" not in capsys.readouterr().out


def test_a_fault_at_every_rename_and_resume(inputs, tmp_path, monkeypatch):
    """Each rename of a run in turn fails, and leaves half of what was to be renamed: no file may be taken for
    whole, and none be missed, afterwards."""
    replace = os.replace
    names = []
    failing = None

    def fails(source, target):
        names.append(Path(target).name)
        if len(names) == failing:
            for file in filter(Path.is_file, (source, *source.rglob("*"))):
                if file.name != "generated.jsonl" or file == source:  # it was whole before
                    os.truncate(file, file.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    run(inputs + FAST + f"--out {tmp_path}/whole")
    renamed = ["args.json", "metrics.jsonl", "generated.jsonl", "round_1", "sft", "summary.json"]
    assert names == renamed
    for failing in range(2, len(renamed) + 1):  # without args.json there is nothing to resume
        names.clear()
        out = tmp_path / str(failing)
        with pytest.raises(OSError, match="No space"):
            run(inputs + FAST + f"--out {out}")
        failing = None
        run(f"--resume {out}")
        check_equal(out, tmp_path / "whole")


def test_resume_with_more_rounds(inputs, undisturbed, tmp_path):
    """SFT is trained again, as its budget has grown; a finished round is not, and keeps its seconds. If a run
    stopped between saving and evaluating a round, these are lost: 0 is a number that nobody measured."""
    out = tmp_path / "one"
    [_, row, _] = run(inputs + FAST + f"--out {out}")["rows"]
    summary = run(f"--resume {out} --rounds 2")
    check_equal(out, undisturbed)
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "round 2", "sft"]
    assert summary["rows"][1]["seconds"] == row["seconds"] > 0
    assert gsil.parse_args(["--resume", str(out), "--rounds", "1"]).rounds == 2  # they only grow
    kept = [record for record in read_jsonl(out / "metrics.jsonl") if record["phase"] != "round 2"]
    write_jsonl(out / "metrics.jsonl", kept)
    assert [row["seconds"] is None for row in run(f"--resume {out}")["rows"]] == [True, False, True, False]


def test_a_run_goes_on_with_its_own_flags_or_not_at_all(undisturbed, tmp_path, monkeypatch, capsys):
    """Flags silently ignored, or changed halfway, would make args.json a lie; and a second run must not write
    into the first one's folder."""
    saved = json.loads((undisturbed / "args.json").read_text())
    args = gsil.parse_args(["--resume", str(undisturbed)])
    assert vars(args) == saved | {"resume": str(undisturbed), "out": str(undisturbed)}
    (tmp_path / "args.json").write_text('{"model": "x"}\n')
    refused = {f"--resume {undisturbed} --lr 1": "give no other but --rounds"}
    refused |= dict.fromkeys([f"--resume {undisturbed}/round_1", f"--resume {tmp_path}"], "there is no run")
    refused |= dict.fromkeys([f"--out {undisturbed}", f"--out {undisturbed}/args.json"], "is there already")
    for flags, says in refused.items():
        with pytest.raises(SystemExit) as stop:
            gsil.parse_args(flags.split())
        assert stop.value.code == 2 and says in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("runs/gsil-spin-1").mkdir(parents=True)  # without --out, the next free one
    outs = [gsil.parse_args(["--loss", loss]).out for loss in ("spin", "lsif")]
    assert outs == ["runs/gsil-spin-2", "runs/gsil-lsif-1"]
