"""Section 8 of gsil.py: a run that is stopped anywhere goes on, and ends with the weights of an undisturbed
one.

Runs here are of a random two-layer model on six rows, so that each takes a fraction of a second. Those that
are killed are processes of their own, forked by a server that has imported gsil before."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import metrics, read_jsonl, run, weights

import gsil

FAST = "--rounds 2 --scale 1 --epochs 1 --batch 4 --lr 1e-3 "


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(inputs + FAST + f"--out {out}")
    return out


def check_equal(ours, theirs):
    """The same files with the same weights, and the same metrics but for the clock."""
    for part in ("round_1", "round_2", "sft"):
        assert weights(ours / part) == weights(theirs / part), part
        assert {file.name for file in (ours / part).iterdir()} == {
            file.name for file in (theirs / part).iterdir()
        }
    assert metrics(ours) == metrics(theirs)
    assert not list(Path(ours).rglob("*.partial"))


# ---- killed anywhere -----------------------------------------------------------------------------------------

HOLD = {  # moment -> the function that is called then, and at which call the process is killed
    "sampling": (gsil, "sample", lambda calls: len(calls) == 2 and calls[-1][1]["seed"] == "0 round 2"),
    "training": (gsil, "update", lambda calls: len(calls) == 4),  # the second step of round 2
    "saving": (os, "replace", lambda calls: calls[-1][0][1].name == "round_1"),  # written, not yet renamed
    "the baseline": (gsil, "update", lambda calls: len(calls) == 6),
}


def until_held(flags, folder, moment, threads):
    """A run that makes a file at the moment, and waits to be killed."""
    calls = []
    torch.set_num_threads(threads)
    module, name, is_now = HOLD[moment]
    whole = getattr(module, name)

    def waits(*args, **kwargs):
        if moment != "sampling" or "round" in kwargs["seed"]:
            calls.append((args, kwargs))
        if calls and is_now(calls):
            (folder / "now").touch()
            signal.pause()
        return whole(*args, **kwargs)

    setattr(module, name, waits)
    run(flags)


@pytest.mark.parametrize("moment", HOLD)
def test_kill_9_and_resume(moment, inputs, undisturbed, tmp_path, monkeypatch):
    """A machine that is taken away must cost no more than the phase it was in, and change no digit. Finished
    rounds and finished sampling are not done again."""
    out = tmp_path / "out"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["gsil"])
    flags = inputs + FAST + f"--out {out}"
    process = server.Process(target=until_held, args=(flags, tmp_path, moment, torch.get_num_threads()))
    process.start()
    while process.is_alive() and not (tmp_path / "now").exists():
        process.join(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (out / "summary.json").exists()
    seeds = []
    sample = gsil.sample
    monkeypatch.setattr(gsil, "sample", lambda *a, **k: (seeds.append(k["seed"]), sample(*a, **k))[1])
    run(f"--resume {out}")
    check_equal(out, undisturbed)
    again = {"sampling": ["0 round 2"], "training": [], "saving": ["0 round 2"], "the baseline": []}
    assert [seed for seed in seeds if "round" in seed] == again[moment]


def test_a_fault_at_every_rename_and_resume(inputs, undisturbed, tmp_path, monkeypatch):
    """Each rename of a run in turn fails, and leaves half of what was to be renamed: no file may be taken for
    whole, and none be missed, afterwards."""
    replace = os.replace
    calls = []
    failing = None

    def fails(source, target):
        calls.append(str(target))
        if len(calls) == failing:
            for file in filter(Path.is_file, (Path(source), *Path(source).rglob("*"))):
                if file.name != "generated.jsonl" or file == Path(source):  # it was whole before
                    os.truncate(file, file.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    run(inputs + FAST + f"--out {tmp_path}/whole")
    names = [call.removeprefix(f"{tmp_path}/whole/") for call in calls]
    rounds = [name for n in (1, 2) for name in (f"round_{n}.partial/generated.jsonl", f"round_{n}")]
    assert names == ["args.json", "metrics.jsonl", *rounds, "sft", "summary.json"]
    for failing in range(2, len(names) + 1):  # without args.json there is nothing to resume
        calls.clear()
        out = tmp_path / str(failing)
        with pytest.raises(OSError, match="No space"):
            run(inputs + FAST + f"--out {out}")
        failing = None
        run(f"--resume {out}")
        check_equal(out, undisturbed)
        shutil.rmtree(out)


def test_resume_with_more_rounds(inputs, undisturbed, tmp_path, capsys):
    """Raising --rounds continues a finished run; the SFT baseline is trained again, its budget has grown. A
    round that is not trained again has its row, with its seconds, as before."""
    out = tmp_path / "one"
    run(inputs + FAST.replace("--rounds 2", "--rounds 1") + f"--out {out}")
    [seconds] = [
        record["row"]["seconds"]
        for record in read_jsonl(out / "metrics.jsonl")
        if record.get("row", {}).get("name") == "round 1"
    ]
    summary = run(f"--resume {out} --rounds 2")
    check_equal(out, undisturbed)
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "round 2", "sft"]
    assert summary["rows"][1]["seconds"] == seconds > 0
    assert json.loads((out / "args.json").read_text())["rounds"] == 2


def test_a_round_behind_a_resumed_run_has_no_seconds(inputs, undisturbed, tmp_path):
    """Stopped between saving and evaluating a round, its time is lost: 0 would be a number nobody
    measured."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    kept = [
        record
        for record in read_jsonl(out / "metrics.jsonl")
        if record.get("row", {}).get("name") != "round 2"
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert [row["seconds"] for row in run(f"--resume {out}")["rows"]][2] is None


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--resume {out} --lr 1", "give no other but --rounds"),
        ("--resume {out} --out elsewhere", "give no other but --rounds"),
        ("--resume {out}/round_1", "not the folder of a run"),
        ("--resume {other}", "not the folder of a run of this script"),
        ("--out {out}", "is there already"),
        ("--out {out}/args.json", "is there already"),
    ],
)
def test_a_run_goes_on_with_its_own_flags_or_not_at_all(flags, says, undisturbed, tmp_path, capsys):
    """Flags silently ignored, or changed halfway, would make args.json a lie; a run of another script has
    other flags; and a second run must not write into the first one's folder."""
    (tmp_path / "args.json").write_text('{"model": "x"}\n')
    with pytest.raises(SystemExit) as stop:
        run(flags.format(out=undisturbed, other=tmp_path))
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_resumed_flags_are_the_saved_ones(inputs, undisturbed):
    """Every flag, and --rounds can only grow."""
    saved = json.loads((undisturbed / "args.json").read_text())
    args = vars(gsil.parse_args(["--resume", str(undisturbed)]))
    assert args == saved | {"resume": str(undisturbed), "out": str(undisturbed)}
    assert gsil.parse_args(["--resume", str(undisturbed), "--rounds", "5"]).rounds == 5


def test_the_next_free_folder(inputs, tmp_path, monkeypatch):
    """Two runs must not write into one folder."""
    monkeypatch.chdir(tmp_path)
    run(inputs + "--rounds 0")
    run(inputs + "--rounds 0")
    run(inputs + "--rounds 0 --loss spin")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["gsil-logistic-1", "gsil-logistic-2", "gsil-spin-1"]
