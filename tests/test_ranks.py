"""torchrun: two processes on the CPU do what one does."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import gsil
import irft
from conftest import ROOT
from test_gsil import small  # noqa: F401


def torchrun(script, flags, processes=2):
    """Output and exit code of a script started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(script)]
    done = subprocess.run(
        [*command, *flags.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return done.stdout + done.stderr, done.returncode


def inputs(small, out):  # noqa: F811
    return f"--data {small}/demos.jsonl --dev {small}/dev.jsonl --out {out} --temperature 0 --batch 13 "


def generated(out):
    lines = (Path(out) / "round_1" / "generated.jsonl").read_text().splitlines()
    return [(pair["prompt"], pair["generated_ids"]) for pair in map(json.loads, lines)]


def distance(ours, theirs):
    """The largest difference of two models' weights."""
    theirs = theirs.state_dict()
    return max((weight - theirs[key]).abs().max().item() for key, weight in ours.state_dict().items())


def test_two_processes_train_to_the_weights_of_one(small, tmp_path):  # noqa: F811
    """Greedy samples are the same everywhere, so the pairs must be: each prompt once, in order. Then the same
    steps, although 40 pairs in batches of 13 leave one process a pair less. A loss divided by the wrong
    count, a gradient averaged twice, or weights of the root that FSDP forgot to gather, would show as a
    distance of 1e-3. SFT answers dev problems between its epochs, for which every rank has all weights, and
    must go on sharded. The shift is not learned here: its first gradient is 0 but for rounding, and AdamW
    makes a full step of that, up or down."""
    flags = "--micro-batch 4 --checkpoint-activations --epochs 1 --rounds 2 --shift 0.1"
    gsil.main(gsil.parse_args((inputs(small, tmp_path / "one") + flags).split()))
    said, code = torchrun(ROOT / "gsil.py", inputs(small, tmp_path / "two") + flags)
    assert code == 0, said
    assert "2 processes" in said and said.count("best round: round") == 1
    assert generated(tmp_path / "one") == generated(tmp_path / "two")
    start = AutoModelForCausalLM.from_pretrained(gsil.TOY / "base")
    for name in ("round_1", "round_2", "sft"):
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / run / name) for run in ("one", "two"))
        assert distance(one, two) < 1e-5 < 5e-4 < distance(one, start)


def test_two_processes_fit_the_reward_and_the_policy_of_one(small, tmp_path, monkeypatch):  # noqa: F811
    """RFT keeps whole copies: their gradients must be averaged, or the copies would part; and every sample
    counts once, on one rank. The samples are made up, as two ranks draw others than one."""
    script = tmp_path / "same.py"
    script.write_text(
        "import irft\n"
        "respond = lambda policy, prompts, *_: [[5 + 7 * i % 40, 1] for i in range(len(prompts))]\n"
        "if __name__ == '__main__':\n"
        "    irft.respond = respond\n"
        "    irft.main(irft.parse_args())\n"
    )
    flags = "--reward-steps 6 --policy-steps 3 --policy-batch 5 --baseline none"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(irft, "respond", importlib.import_module("same").respond)
    irft.main(irft.parse_args((inputs(small, tmp_path / "one") + flags).split()))
    said, code = torchrun(script, inputs(small, tmp_path / "two") + flags)
    assert code == 0, said
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "round_1") for name in ("one", "two"))
    assert distance(one, two) < 1e-4
    one, two = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "round_1" / "reward")
        for name in ("one", "two")
    )
    assert distance(one, two) < 1e-5


def test_a_sharded_model_keeps_its_class_name(tmp_path):
    """FSDP makes a class of its own; saved by that name, a model with own code could not be loaded again."""
    script = tmp_path / "shards.py"
    script.write_text(
        "import gsil, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "model = gsil.load_model(gsil.TOY / 'base', 'cpu')\n"
        "gsil.shard(model)\n"
        "assert isinstance(model, gsil.FSDPModule)\n"
        "print(type(model).__module__, type(model).__name__)\n"
    )
    said, code = torchrun(script, "")
    assert code == 0 and said.count("transformers.models.llama.modeling_llama LlamaForCausalLM") == 2, said


def test_a_rank_that_fails_ends_the_run(tmp_path):
    """The others wait for it in a gathering; they must not wait for ever, and its sentence must be seen."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import gsil, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "gsil.shared_out([1, 2], lambda share, rank: gsil.die('no more') if rank else share)\n"
    )
    said, code = torchrun(script, "")
    assert code != 0 and "error: no more" in said


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_micro_batches_are_the_batch(world, n, monkeypatch):
    """Every pair counts once, on one rank; every rank makes as many forward passes, or FSDP would hang."""
    rng = random.Random(n)
    batch = [{"n": i, "prompt_ids": [5], "real_ids": [5] * rng.randint(1, 9)} for i in range(n)]
    counted, parts = [], []
    for rank in range(world):
        monkeypatch.setattr(gsil, "ranks", lambda rank=rank: (rank, world))
        found = gsil.micro_batches(batch, 2)
        parts.append(len(found))
        counted += [pair["n"] for part, count in found for pair in part[:count]]
        assert all(part for part, _ in found)
    assert sorted(counted) == list(range(n)) and len(set(parts)) == 1


def test_checkpointed_activations_change_no_gradient():
    """They are computed a second time, by the same layers, or the gradient is another model's."""
    gradients = []
    for flags in ([], ["--checkpoint-activations"]):
        model = gsil.load_model(gsil.TOY / "base", "cpu")
        gsil.recompute(model, gsil.parse_args(flags))
        calls = []
        gsil.layers_of(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
        gsil.layers_of(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(2))
        gsil.response_logps(model, [([5, 6], [7, 8, 1])]).sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        assert calls.count(2) == (2 if flags else 1)
    assert torch.equal(*gradients)
