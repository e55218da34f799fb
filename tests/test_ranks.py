"""torchrun: two processes on the CPU do what one does."""

import contextlib
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import gsil
from conftest import ROOT
from helpers import metrics, read_jsonl, run, toy_flags

# The same two updates in one process and in two: the gradients of the first, as clipped, and the weights after both,
# by plain SGD, which moves by what the gradient is. (AdamW divides by its size, and would make whole steps of the
# last bits of gradients that are nearly 0.) 13 pairs in micro-batches leave one process a pair less.
UPDATES = """
import json, sys
from functools import partial
import torch
import gsil
import irft

def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def updates(pairs, micro_batch, sharded):
    args = gsil.parse_args(["--micro-batch", str(micro_batch), "--checkpoint-activations", "--clip", "0.5"])
    found = {}
    for loss in ("logistic", "sft"):
        model = gsil.load_model(gsil.TOY / "base", args)
        gsil.prepare(model, args)
        assert isinstance(model, gsil.FSDPModule) == sharded
        shift = torch.tensor(0.5, requires_grad=True)
        loss_of = partial(gsil.gsil_loss, loss="logistic", scale=1.0, shift=shift)
        if loss == "sft":
            shift.grad = torch.zeros(())
            loss_of = partial(gsil.sft_loss, mean_length=10.0)
        groups = [{"params": [*model.parameters()]}, {"params": [shift]}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        optimizer.zero_grad = lambda: None
        means = gsil.update(model, optimizer, pairs, loss_of, args)
        gradient = torch.cat([full(weight.grad).flatten() for weight in model.parameters()])
        del optimizer.zero_grad
        optimizer.zero_grad(set_to_none=False)
        gsil.update(model, optimizer, pairs[:3], loss_of, args)
        weights = torch.cat([full(weight).detach().flatten() for weight in model.parameters()])
        found[loss] = {"gradient": gradient, "weights": weights, "shift": shift.detach(), "means": means}
    return found

def whole_copies(pairs, micro_batch):
    # RFT's reward and policy, of which every rank keeps all: the gradient of an update of each.
    args = irft.parse_args(["--micro-batch", str(micro_batch), "--clip", "0.5"])
    reward_model, _ = irft.load_reward(gsil.TOY / "base", {1}, args)
    torch.nn.init.constant_(reward_model.score.weight, 0.1)
    rows = [pair | {"weight": 1.0, "logp": pair["generated_reference"], "advantage": n % 3 - 1.0} for n, pair in enumerate(pairs)]
    rows = [row | dict.fromkeys(irft.SAMPLED, 1.0) for row in rows]
    sampled = [{key: row[key] for key in row if key != "real_ids"} for row in rows]
    reward_loss = partial(irft.reward_loss, loss="logistic", penalty=0.01)
    policy = gsil.load_model(gsil.TOY / "base", args)
    found = {}
    for name, model, batch, loss_of in (("reward", reward_model, rows, reward_loss), ("policy", policy, sampled, irft.policy_loss)):
        irft.prepare(model, args, sharded=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad = lambda: None
        irft.update(model, optimizer, batch, loss_of, args)
        found[name] = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return found

if __name__ == "__main__":
    gsil.start_processes()
    pairs = gsil.read_json_lines(gsil.Path(sys.argv[1]))
    found = updates(pairs, 200, True) | whole_copies(pairs, 200)
    if gsil.ranks()[0] == 0:
        torch.save(found, sys.argv[2])
    gsil.main(gsil.parse_args(sys.argv[3:]))  # in the same processes: starting them takes longest
"""


def torchrun(script, *flags):
    """Output and exit code of a script started as two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="session")
def one_and_two(small, tmp_path_factory):
    """The same pairs, updates and run, in one process and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "updates.py").write_text(UPDATES)
    sys.path.insert(0, str(folder))
    module = importlib.import_module("updates")
    flags = "--temperature 0 --batch 13 --micro-batch 500 --epochs 1 --shift 0.1 "
    run(toy_flags(small, folder / "one") + flags)
    pairs = read_jsonl(folder / "one/round_1/generated.jsonl")[:13]
    for n, pair in enumerate(pairs):  # log-ratios far from 0, so that no metric hangs on rounding
        pair["real_reference"] += n % 3 - 1
        pair["generated_reference"] += 0.5
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    one = module.updates(pairs, 4096, False) | module.whole_copies(pairs, 4096)
    two_flags = (toy_flags(small, folder / "two") + flags).split()
    said, code = torchrun(
        folder / "updates.py", str(folder / "pairs.jsonl"), str(folder / "two.pt"), *two_flags
    )
    assert code == 0, said
    return folder, one, torch.load(folder / "two.pt"), said


@pytest.mark.parametrize("loss", ["logistic", "sft"])
def test_two_processes_take_the_steps_of_one(loss, one_and_two):
    """A loss divided by the wrong count, a gradient averaged twice or a pair counted on both ranks would be off by
    tens of per cent; another order of float32 sums is worth less than 1e-4 of the largest number."""
    _, one, two, _ = one_and_two
    one = one[loss]
    two = two[loss]
    assert two["means"] == pytest.approx(one["means"], rel=1e-4, abs=1e-4)  # d: sums of nats
    assert one["means"]["grad_norm"] > 0.5  # clipped: the norm is that of all shards
    start = AutoModelForCausalLM.from_pretrained(gsil.TOY / "base")
    start = torch.cat([weight.detach().flatten() for weight in start.parameters()])
    for ours, theirs in (
        (two["gradient"], one["gradient"]),
        (two["weights"] - start, one["weights"] - start),
    ):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert two["shift"].item() == pytest.approx(one["shift"].item(), rel=1e-4)
    assert (one["shift"] != 0.5) == (loss == "logistic")


@pytest.mark.parametrize("name", ["reward", "policy"])
def test_two_processes_find_the_gradients_of_rft(name, one_and_two):
    """Each rank has a whole copy: were gradients not averaged, the copies would part without a word."""
    _, one, two, _ = one_and_two
    assert (two[name] - one[name]).abs().max() < 1e-4 * one[name].abs().max()  # another order of float32 sums


def test_a_run_of_two_processes(one_and_two):
    """Greedy samples are the same everywhere, so the pairs must be: each prompt once, in order. SFT answers dev problems
    between its epochs, for which every rank has all weights, and must go on sharded. One process speaks. The saved
    models are whole and of their own class, not of the one that FSDP makes."""
    folder, _, _, said = one_and_two
    one, two = (
        [
            (pair["prompt"], pair["generated_ids"])
            for pair in read_jsonl(folder / run / "round_1/generated.jsonl")
        ]
        for run in ("one", "two")
    )
    assert one == two and len(one) == 40
    assert "parameters, 2 x cpu" in said and said.count("best: round 1") == 1
    assert [(r["phase"], r.get("step")) for r in metrics(folder / "one")] == [
        (r["phase"], r.get("step")) for r in metrics(folder / "two")
    ]
    for name in ("round_1", "sft"):
        config = json.loads((folder / "two" / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
    losses = [[r["loss"] for r in metrics(folder / run) if "loss" in r] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # AdamW steps of last-bit differences: a few 1e-4
    nlls = [[r["row"]["heldout_nll"] for r in metrics(folder / run) if "row" in r] for run in ("one", "two")]
    assert nlls[1][0] == pytest.approx(nlls[0][0], rel=1e-4)  # the base model, whose weights are the same
    assert nlls[1] == pytest.approx(nlls[0], rel=0.02)


def test_a_rank_that_fails_ends_the_run(tmp_path):
    """The others wait for it in a gathering; they must not wait for ever, and its sentence must be seen."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import gsil, os\n"
        "os.environ.setdefault('LOCAL_RANK', '0')\n"
        "gsil.start_processes()\n"
        "gsil.spread([1, 2], lambda share: gsil.die('no more') if gsil.ranks()[0] else share)\n"
    )
    said, code = torchrun(script)
    assert code != 0 and "error: no more" in said


def test_a_process_needs_a_gpu_of_its_own(monkeypatch, capsys):
    """torchrun with more processes than GPUs ended in a page of CUDA errors."""
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SystemExit):
        gsil.start_processes()
    assert "there are 4 GPUs here" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1, 5, 6])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_spread_has_a_result_per_item_in_order(world, n, monkeypatch):
    """Texts and their log-probs are matched by place: one lost or doubled would shift all that follow. Every rank calls
    the function, or a sharded model would wait for it for ever."""
    calls = []
    shares = []

    def double(items):
        calls.append(items)
        return [2 * item for item in items]

    def meet(value):
        """Every rank comes here with its share, one after the other; the last one has them all."""
        shares.append(value)
        if len(shares) < world:
            raise InterruptedError
        return shares

    monkeypatch.setattr(gsil, "gather", meet)
    for rank in range(world):
        monkeypatch.setattr(gsil, "ranks", lambda rank=rank: (rank, world))
        with contextlib.suppress(InterruptedError):
            results = gsil.spread([*range(n)], double)
    assert results == [2 * item for item in range(n)]
    assert all(calls) or n == 0
