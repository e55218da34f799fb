"""Do 2 and 3 processes compute what one does? OMP_NUM_THREADS=1 python tests/studies/sharding.py

Run it by hand, on CPUs. It prints two tables in markdown.
"""

import filecmp
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import gsil
import irft

STEPS = {  # method, rows in the batch, flags; 3 does not divide the toy's weights, of 64 rows and of 1
    "GSIL, learned shift, 13 pairs": ("gsil", 13, ""),
    "GSIL, 2 pairs": ("gsil", 2, ""),
    "GSIL, 1 pair": ("gsil", 1, ""),
    "GSIL, --checkpoint-activations": ("gsil", 13, "--checkpoint-activations"),
    "IRFT, LoRA": ("lora", 13, "--method irft --lora-rank 4"),
    "RFT, reward": ("reward", 13, ""),
    "RFT, policy beside two models": ("policy", 13, ""),
}
RUNS = {  # script, flags, optimizer steps before the kill; a round or chunk takes 10, 6 or 8
    "GSIL, learned shift": ("gsil", "--rounds 2 --scale 1 --checkpoint-activations", 14),
    "IRFT, LoRA": ("irft", "--method irft --chunks 2 --lora-rank 4", 9),
    "RFT": ("irft", "--rounds 2 --reward-steps 4 --policy-steps 4 --policy-batch 5", 14),
}
COMPARED = ("responses", "log-probs", "loss", "gradient norm", "gradient", "shift's gradient")


def share(tensors):
    """How much of the tensors this process holds."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() for tensor in local) / sum(tensor.numel() for tensor in tensors)


def whole(tensors):
    """All numbers of tensors, of which each process may hold a part, as one vector."""
    full = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in full])


def one_step(method, n, flags):
    """What a step computes, and the largest share of weights, gradients and Adam's state that a process holds."""
    script, learned = gsil if method == "gsil" else irft, []
    args = script.parse_args(f"--micro-batch 160 {flags}".split())
    data, model = script.read_data(args), script.load_model(args.model, args)
    held, rows = [share([*model.parameters()])], [demo | {"weight": 1.0} for demo in data.demos[:n]]
    prompts = [row["prompt_ids"] for row in rows]
    responses = script.sample(model, prompts, data.eos_ids, 40, 0, 256, "0")  # greedy
    texts = [(row["prompt_ids"], row["real_ids"]) for row in rows] + [*zip(prompts, responses)]
    logps = script.score(model, texts, args.micro_batch)
    for k, row in enumerate(rows):  # the log-ratios get offsets, or they would be rounding alone
        row |= {"generated_ids": responses[k], "generated_reference": logps[n + k] - 0.5 + k % 2}
        row |= {"real_reference": logps[k] - 0.5}
    step = {"responses": gsil.pad(responses, "right", "cpu").float(), "log-probs": torch.tensor(logps)}
    if method == "gsil":
        learned = [torch.tensor(0.5, requires_grad=True)]
        loss_of = partial(gsil.gsil_loss, loss="logistic", scale=1.0, shift=learned[0])
    elif method == "lora":
        loss_of = partial(irft.irft_loss, loss="spin", scale=1.0)
        irft.add_lora(model, args.lora_rank, "0")
        for layer in model.modules():
            if hasattr(layer, "lora_b"):
                torch.nn.init.constant_(layer.lora_b, 0.01)  # at 0, A would have no gradient
    else:
        policy, (model, _) = model, irft.load_reward(args.model, data, args)
        loss_of = partial(irft.reward_loss, loss="logistic", penalty=0.01)
        torch.nn.init.constant_(model.score.weight, 0.1)  # at 0, as it is new, no layer has a gradient
    if method == "policy":
        rows = irft.rate(policy, irft.load_model(args.model, args), model, prompts, responses, args)
        advantages = irft.advantages(torch.tensor([[row["objective"] for row in rows]]))[0].tolist()
        rows = [row | {"advantage": advantage} for row, advantage in zip(rows, advantages)]
        model, loss_of = policy, partial(irft.policy_loss, fresh=True)
    optimizer, _ = script.make_optimizer(model, 1e-3, 1, args, learned)
    trained = optimizer.param_groups[0]["params"]

    def keep_gradients(*_):
        step["gradient"] = whole([weight.grad for weight in trained])
        step["shift's gradient"] = whole([shift.grad for shift in learned]) if learned else None
        held.append(share([weight.grad for weight in trained]))

    optimizer.register_step_pre_hook(keep_gradients)
    means = script.update(model, optimizer, rows, loss_of, args)
    size = sum(abs(row.get("advantage", 0.0)) for row in rows) / n  # a policy's losses of this size cancel
    step["loss"] = torch.tensor([means["loss"], size])
    step["gradient norm"] = torch.tensor(means["grad_norm"])
    held.append(share([optimizer.state[weight]["exp_avg_sq"] for weight in trained]))
    return step, [max(shares) for shares in zip(*gsil.gather(held))]


def run_and_die(script, steps, *flags):
    """A run whose last process is killed after some optimizer steps."""
    left = iter(range(int(steps), 0, -1))

    def kill(*_):
        if next(left) == 1 and gsil.RANK == gsil.WORLD - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(kill)
    script.main(script.parse_args(flags))


def torchrun(n, *command):
    """Run a script in n processes; returns torchrun's exit code."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, *command]
    with open("log.txt", "a") as log:
        return subprocess.call([str(word) for word in start], stdout=log, stderr=log)


def study():
    """Print how far 2 and 3 processes are from one, and where a run ends that lost a process."""
    results = {}
    for n in (1, 2, 3):
        assert torchrun(n, __file__, "steps") == 0, Path("log.txt").read_text()
        results[n] = torch.load(f"{n}.pt")
    print("| one step | processes |", " | ".join(COMPARED), "| weights held | gradients held | Adam held |")
    print("|---" * 11 + "|")
    for name, n in product(STEPS, (2, 3)):
        (one, _), (step, held) = results[1][name], results[n][name]
        keys = [key for key in COMPARED if one[key] is not None]
        cells = [f"{(step[key] - one[key]).norm() / one[key].norm():.0e}" for key in keys]
        cells += ["-"] * (len(COMPARED) - len(keys)) + [f"{part:.1%}" for part in held]
        print(f"| {name} | {n} | {' | '.join(cells)} |")
    for name, n in {"demos": 25, "dev": 2, "heldout": 2}.items():  # fewer problems than processes
        lines = (ROOT / f"tests/toy/{name}.jsonl").read_text().splitlines()
        Path(f"{name}.jsonl").write_text("\n".join(lines[:n]))
    flags = "--batch 5 --max-new-tokens 40 --data demos.jsonl --dev dev.jsonl --heldout heldout.jsonl --out"
    print("\n| kill -9 in round 2 | processes | codes: undisturbed, killed, resumed | last model's bytes |")
    print("|---" * 4 + "|")
    for (name, (script, method, steps)), n in product(RUNS.items(), (1, 2, 3)):
        file, command, killed = ROOT / f"{script}.py", f"{method} {flags}".split(), f"{name} {n} killed"
        codes = [torchrun(n, file, *command, f"{name} {n}")]
        codes.append(torchrun(n, __file__, script, steps, *command, killed))
        codes.append(torchrun(n, file, "--resume", killed))
        files = [f"{folder}/round_2/model.safetensors" for folder in (f"{name} {n}", killed)]
        same = "the same" if filecmp.cmp(*files, shallow=False) else "different"
        print(f"| {name} | {n} | {codes} | {same} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["steps"]:  # in each process
        steps = {name: one_step(*STEPS[name]) for name in STEPS}
        torch.save(steps, f"{gsil.WORLD}.pt" if gsil.RANK == 0 else os.devnull)
    elif len(sys.argv) > 1:  # in each process
        run_and_die({"gsil": gsil, "irft": irft}[sys.argv[1]], *sys.argv[2:])
    else:
        os.chdir(tempfile.mkdtemp())
        study()
