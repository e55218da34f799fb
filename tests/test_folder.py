"""Section 8 of gsil.py: the run's folder. A run that stops anywhere ends with an undisturbed one's weights."""

import errno
import json
import multiprocessing
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
from helpers import as_script, check_equal, read_jsonl, refusal, run, write_jsonl
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gsil

FAST = "--scale 1 --epochs 1 --batch 4 --lr 1e-3 "


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(inputs + FAST + f"--rounds 2 --out {out}")
    return out


def killed(flags):
    """A run that is killed before the second step of round 2."""
    steps = iter(range(1, 5))

    def dies(*_):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(dies)
    run(flags)


def test_kill_9_and_resume(inputs, undisturbed, tmp_path, capsys):
    """A machine that is taken away would cost finished work, or change the final weights."""
    out = tmp_path / "out"
    flags = inputs + FAST + f"--rounds 2 --out {out}"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(flags,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "round_1").exists() and not (out / "round_2").exists()
    run(f"--resume {out}")
    check_equal(out, undisturbed)
    assert "sampling" not in capsys.readouterr().out


def test_a_fault_at_every_rename_and_resume(inputs, tmp_path, monkeypatch):
    """A file that is half written would be taken for whole, or a whole one be missed."""
    replace, names, failing = os.replace, [], None

    def fails(source, target):
        names.append(Path(target).name)
        if len(names) == failing:
            for file in filter(Path.is_file, (Path(source), *Path(source).rglob("*"))):
                os.truncate(file, file.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    run(inputs + FAST + f"--out {tmp_path}/whole")
    renamed = names.copy()
    names_of_all = {"data.crc32", "summary.json", "round_1.jsonl", "round_1", "sft"}
    assert renamed[0] == "args.json" and {*renamed[1:]} == names_of_all
    for failing in range(2, len(renamed) + 1):  # without the first one, args.json, there is nothing to resume
        names.clear()
        out = tmp_path / str(failing)
        with pytest.raises(OSError, match="No space"):
            run(inputs + FAST + f"--out {out}")
        failing = None
        run(f"--resume {out}")
        check_equal(out, tmp_path / "whole")


def test_resume_with_more_rounds_and_another_baseline(inputs, undisturbed, tmp_path):
    """Finished rounds would train again, lose their seconds, or get some that nobody measured."""
    out = tmp_path / "out"
    before = run(inputs + FAST + f"--baseline none --out {out}")
    rows = run(f"--resume {out} --rounds 2 --baseline sft")
    assert [*rows] == ["base", "round 1", "round 2", "sft"]
    assert rows["round 1"] == before["round 1"] and rows["round 1"]["seconds"] > 0
    check_equal(out, undisturbed)
    rows.pop("round 2")
    (out / "summary.json").write_text(json.dumps(rows))
    assert run(f"--resume {out}")["round 2"]["seconds"] is None


OTHER = """--model x, --data x, --split x, --dev x, --heldout x, --habit x, --prompt-template {prompt}, --max-new-tokens 6,
    --loss spin, --scale 2, --shift 1, --epochs 2, --temperature 2, --optimizer rmsprop, --lr 1, --shift-lr 1,
    --warmup 1, --batch 5, --checkpoint-activations, --clip 2, --sample-batch 2, --seed 1, --out x"""


def test_a_run_goes_on_with_its_own_flags_or_not_at_all(undisturbed, tmp_path, capsys):
    """Half of a run would be trained one way and half another, or a person guess what --resume wants."""
    saved = json.loads((undisturbed / "args.json").read_text())
    anew = "--device cpu --micro-batch 77 --baseline none --rounds 3 --lr 1e-3"  # the last one as it was
    args = vars(gsil.parse_args(["--resume", str(undisturbed), *anew.split()]))
    changed = {"micro_batch": 77, "baseline": "none", "rounds": 3, "resume": str(undisturbed)}
    assert args == saved | changed
    for flag in OTHER.split(","):
        said = refusal(capsys, f"--resume {undisturbed} {flag}")
        assert said.startswith("error: ") and flag.split()[0] in said, flag
    (tmp_path / "args.json").write_text('{"model": "x"}\n')  # of another version
    for folder in (tmp_path / "nothing", tmp_path, undisturbed / "round_1"):
        assert f"--resume {folder}" in refusal(capsys, f"--resume {folder}")


def test_two_runs_never_share_a_folder(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    """The second run of the same second would write into the files of the first one."""
    monkeypatch.chdir(tmp_path)
    Path("runs/gsil-spin-1").mkdir(parents=True)
    flags = (inputs + "--rounds 0 --loss spin --seed ").split()
    for args in [gsil.parse_args([*flags, seed]) for seed in "78"]:  # both flags before either run
        gsil.main(args)
    seeds = [json.loads(file.read_text())["seed"] for file in sorted(Path("runs").glob("*/args.json"))]
    assert seeds == [7, 8] and not any(Path("runs/gsil-spin-1").iterdir())
    first, second = [gsil.parse_args([*flags, seed, "--out", "mine"]) for seed in "78"]
    gsil.main(first)
    with pytest.raises(OSError, match="mine/args.json"):
        gsil.main(second)
    before = (undisturbed / "args.json").read_text()
    for out in (undisturbed, f"{undisturbed}/args.json", f"{undisturbed}/args.json/out"):
        code, said = as_script(f"{inputs} --out {out}", monkeypatch, capsys)
        assert code == 2 and re.match(f"error: .*{undisturbed}", said) and "to continue" not in said
    assert (undisturbed / "args.json").read_text() == before
    take = partial(gsil.take_folder, default="runs/many", rows=[])  # 60 runs in the same instant
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = pool.map(take, [gsil.parse_args([*flags, "9"])] * 60, chunksize=1)
    assert len({args.out for args in taken}) == 60


def test_other_data_for_a_resumed_run_is_said(inputs, tmp_path, capsys):
    """One half of the table would be of the old data, and one of the new."""
    data = write_jsonl(tmp_path / "x.jsonl", read_jsonl(gsil.parse_args(inputs.split()).data))
    run(f"{inputs} --data {data} --rounds 0 --out {tmp_path}/out")
    run(f"--resume {tmp_path}/out")
    assert "warning: the data" not in capsys.readouterr().out
    text = data.read_text()
    for content in (text.replace("What is 0", "What is 9"), text):
        data.write_text(content)
        for _ in range(2):
            run(f"--resume {tmp_path}/out")
            assert ("warning: the data, or its tokens" in capsys.readouterr().out) == (content != text)


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on(inputs, tmp_path, monkeypatch, capsys):
    """A person would take the run for lost, and begin again."""
    hook = register_optimizer_step_pre_hook(interrupt)
    code, said = as_script(f"{inputs} --out {tmp_path}/out", monkeypatch, capsys)
    hook.remove()
    assert code == 2 and said.startswith("error: ") and f"--resume {tmp_path}/out" in said
    run(f"--resume {tmp_path}/out")
