"""torchrun: two processes do what one does. They are started once, and run this file as a script."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from helpers import PROMPTS, logged, made_pairs, read_jsonl, run, table
from transformers import AutoConfig

import gsil


def measured(folder):
    """Samples, log-probs and steps of GSIL on a model that is sharded under torchrun."""
    flags = f"--model {folder} --data x --checkpoint-activations --clip 0.5 --micro-batch 50"
    args = gsil.parse_args(flags.split())
    model = gsil.load_model(folder, args)
    pairs = made_pairs(model, 13)
    for n, pair in enumerate(pairs):  # log-ratios far from 0, so that no metric hangs on rounding
        pair["real_reference"] += n % 3 - 0.75
        pair["generated_reference"] += 0.5
    texts = [(pair["prompt_ids"], pair["real_ids"]) for pair in pairs]
    found = {"sharded": {hasattr(weight, "full_tensor") for weight in model.parameters()}}
    found["samples"] = [gsil.sample(model, prompts, {1}, 8, 1, 1, "a") for prompts in (PROMPTS, PROMPTS[:1])]
    found["scores"] = [value for part in (texts, texts[:1]) for value in gsil.score(model, part, 50)]
    shift, unused = torch.tensor(0.5, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [{"params": [*model.parameters()]}, {"params": [shift, unused]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)  # AdamW would make steps of rounding errors
    loss_of = partial(gsil.gsil_loss, loss="logistic", scale=1.0, shift=shift)
    # The last process has fewer pairs than the first one, fewer micro-batches, and in the end none.
    found["steps"] = [gsil.update(model, optimizer, pairs[:n], loss_of, args) for n in (13, 3, 1, 13)]
    return found


if __name__ == "__main__":
    folder, out, *flags = sys.argv[1:]
    try:
        run([*flags, "--data", "nowhere.jsonl", "--out", f"{out}/refused"])
    except SystemExit:
        torch.save(measured(folder), f"{out}/{gsil.RANK}.pt")
    run([*flags, "--out", f"{out}/two"])
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two(inputs, tmp_path_factory):
    """The folder with a run in one process and one in two, and what the two said."""
    out = tmp_path_factory.mktemp("ranks")
    args = gsil.parse_args(inputs.split())
    flags = f"{inputs} --dev {args.data} --heldout {args.data} --temperature 0"
    flags += " --batch 5 --epochs 1 --shift 0.1"
    run(f"{flags} --out {out}/one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    command += [args.model, str(out), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_take_the_steps_of_one(rank, two, inputs):
    """A wrong divisor, a gradient averaged twice, or a dummy that counts would train."""
    found, expected = torch.load(two[0] / f"{rank}.pt"), measured(gsil.parse_args(inputs.split()).model)
    assert found["sharded"] == {True} and expected["sharded"] == {False}
    assert found["samples"] == expected["samples"]
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)  # float32 rounds sums of 40 nats
        assert theirs["grad_norm"] > 0.5  # so that it was clipped: the norm is that of all shards


def test_a_run_of_two_processes(two):
    """The pairs would be one process's, the model a shard of it, or a mistake be told twice."""
    out, said, errors = two
    assert said.count("2 x cpu") == said.count("results in") == errors.count("error: nowhere.jsonl") == 1
    assert not (out / "refused").exists()
    runs = (out / "one", out / "two")
    ours, theirs = (read_jsonl(run / "round_1.jsonl") for run in runs)
    assert len(ours) == len(theirs) == 6
    assert all(a["generated_ids"] == b["generated_ids"] for a, b in zip(ours, theirs))
    for name in ("round_1", "sft"):
        assert AutoConfig.from_pretrained(out / "two" / name).architectures == ["LlamaForCausalLM"]
        ours, theirs = ([step["loss"] for step in logged(run, name.replace("_", " "))] for run in runs)
        assert ours == pytest.approx(theirs, rel=0.02)  # AdamW turns last bits into steps: a few 1e-4
    ours, theirs = (table(run) for run in runs)
    assert ours.keys() == theirs.keys()
    assert ours["base"]["nll"] == pytest.approx(theirs["base"]["nll"], rel=1e-4)  # float32 sums
