"""torchrun: two processes on the CPU do what one does. As it takes long, they are started once: they run this
file as a script."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, tiny_model
from helpers import made_pairs, metrics, read_jsonl, relative, run
from transformers import AutoConfig

import gsil
import irft


def whole(tensors):
    """All numbers of tensors, of which FSDP may give each process a part."""
    found = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in found])


def two_steps(method, micro_batch):
    """What two steps of GSIL change, or of RFT, where every process has a copy of the whole model; by SGD,
    which moves by what the gradient is: AdamW makes whole steps of the rounding of one near 0."""
    model = tiny_model()
    start = whole(model.parameters())
    pairs = made_pairs(model, 13)  # an odd number leaves one process a pair less
    for n, pair in enumerate(pairs):  # log-ratios far from 0, so that no metric hangs on rounding
        pair["real_reference"] += n % 3 - 0.75
        pair["generated_reference"] += 0.5
        pair |= {"logp": pair["generated_reference"], "advantage": n % 3 - 1.0}
        pair |= dict.fromkeys(irft.SAMPLED, float(n))
    shift = torch.tensor([0.5], requires_grad=True)
    loss_of = partial(gsil.gsil_loss, loss="logistic", scale=1.0, shift=shift)
    if method == "rft":
        pairs = [{key: pair[key] for key in pair if key != "real_ids"} for pair in pairs]
        loss_of = irft.policy_loss
    flags = f"--data x.jsonl --checkpoint-activations --clip 0.5 --micro-batch {micro_batch}"
    args = gsil.parse_args(flags.split())
    gsil.prepare(model, args, sharded=method == "gsil")
    assert isinstance(model, gsil.FSDPModule) == (method == "gsil" and gsil.ranks()[1] > 1)
    groups = [{"params": [*model.parameters()]}, {"params": [shift] * (method == "gsil")}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    means = [gsil.update(model, optimizer, batch, loss_of, args) for batch in (pairs, pairs[:3])]
    return {"weights": whole(model.parameters()) - start, "shift": shift.detach() - 0.5, "means": means}


if __name__ == "__main__":  # each of the two processes; at the end one of them fails
    gsil.start_processes()
    steps = {method: two_steps(method, 50) for method in ("gsil", "rft")}
    if gsil.ranks()[0] == 0:
        torch.save(steps, sys.argv[1])
    gsil.main(gsil.parse_args(sys.argv[2:]))
    gsil.spread([1, 2], lambda share: gsil.die("no more") if gsil.ranks()[0] else share)


@pytest.fixture(scope="session")
def one_and_two(inputs, tmp_path_factory):
    """The folder of a run in one process and of one in two, the latter's steps, and all that it said."""
    folder = tmp_path_factory.mktemp("ranks")
    data = gsil.parse_args(inputs.split()).data
    flags = f"{inputs} --dev {data} --heldout {data} --temperature 0 --batch 5 --epochs 1 --shift 0.1"
    run(f"{flags} --out {folder}/one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    command += [f"{folder}/two.pt", *flags.split(), "--out", f"{folder}/two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "error: no more" in said, said
    return folder, torch.load(folder / "two.pt"), said


@pytest.mark.parametrize("method", ["gsil", "rft"])
def test_two_processes_take_the_steps_of_one(method, one_and_two):
    """A loss divided by the wrong count, a gradient averaged twice or not at all, or a pair counted on both
    ranks would be off by tens of per cent; another order of float32 sums by less than 1e-4."""
    one = two_steps(method, 4096)
    two = one_and_two[1][method]
    assert relative(two["weights"], one["weights"]) < 1e-4
    assert two["shift"].item() == pytest.approx(one["shift"].item(), rel=1e-3)
    assert (one["shift"] != 0) == (method == "gsil")
    for found, expected in zip(two["means"], one["means"]):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)  # d: sums of nats
        assert expected["grad_norm"] > 0.5  # clipped: the norm is that of all shards


def test_a_run_of_two_processes(one_and_two):
    """Greedy samples are the same everywhere, so the pairs must be: each prompt once, in order. The saved models
    are of their own class, not of the one that FSDP makes. One process speaks; if one fails, the other does
    not wait for ever, and its sentence is seen."""
    folder, _, said = one_and_two
    assert "parameters, 2 x cpu" in said and said.count("best round on dev: round 1") == 1
    same = []
    numbers = []
    for out in (folder / "one", folder / "two"):
        pairs = read_jsonl(out / "round_1/generated.jsonl")
        ids = [(pair["prompt"], pair["generated_ids"]) for pair in pairs]
        records = metrics(out)
        places = [(record["phase"], record.get("step")) for record in records]
        kinds = [AutoConfig.from_pretrained(out / name).architectures for name in ("round_1", "sft")]
        same.append([ids, places, kinds])
        numbers.append([record.get("loss") or record["row"]["heldout_nll"] for record in records])
    assert same[0] == same[1] and len(ids) == 6
    assert numbers[1][0] == pytest.approx(numbers[0][0], rel=1e-4)  # the base model: the same weights
    assert numbers[1] == pytest.approx(
        numbers[0], rel=0.02
    )  # AdamW steps of last-bit differences: a few 1e-4


def test_a_process_needs_a_gpu_of_its_own(monkeypatch, capsys):
    """torchrun with more processes than GPUs ended in a page of CUDA errors."""
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SystemExit):
        gsil.start_processes()
    assert "there are 4 GPUs here" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2, 3])
def test_spread_has_a_result_per_item_in_order(world, monkeypatch):
    """Texts and their log-probs are matched by place: one lost or doubled would shift all that follow. Every
    rank has an item to call the function with, or a sharded model would wait for it for ever."""
    for n in (0, 1, 5, 6):
        shares = []
        monkeypatch.setattr(gsil, "gather", lambda share, shares=shares: shares.append(share) or shares)
        for rank in range(world):  # one after the other; the last one has the shares of all
            monkeypatch.setattr(gsil, "ranks", lambda rank=rank: (rank, world))
            results = gsil.spread([*range(n)], lambda items: [2 * item for item in items])
        assert results == [2 * item for item in range(n)]
        assert len(shares) == world and (all(shares) or n == 0)
