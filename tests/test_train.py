"""Section 4 of gsil.py: update and train. A step is the gradient of the whole batch's mean, or none at all."""

import copy
import math
import random
from functools import partial

import pytest
import torch
from conftest import tiny_model
from helpers import gradient, made_pairs, relative

import gsil


def args_for(flags):
    return gsil.parse_args(["--data", "x.jsonl", *flags.split()])


def trained(model, pairs, flags, loss="logistic", shift=0.0, first_loss=None):
    """The records of training on pairs; shift a number, or a tensor that is learned."""
    args = args_for(flags)
    loss_of = partial(gsil.gsil_loss, loss=loss, scale=0.5, shift=torch.as_tensor(shift))
    learned = shift if isinstance(shift, torch.Tensor) else None
    return list(gsil.train(model, pairs, loss_of, args.epochs, args, "0 round 1", learned, first_loss))


def test_an_update_is_the_gradient_of_the_whole_batch():
    """Averaging the parts' means would weigh pairs of a small last part too much. Parts of one pair, of two or
    three, and the whole against one pass over all, written out here, but for the rounding of float32 sums. No
    step sees the one before; clipping leaves the direction, and the shift beside it alone."""
    model = tiny_model()
    shift = torch.tensor(0.5, requires_grad=True)
    pairs = made_pairs(model)
    for n, pair in enumerate(pairs):  # some are told apart, some not
        pair["real_reference"] -= 0.5
        pair["generated_reference"] -= 0.25 + n % 2
    loss_of = partial(gsil.gsil_loss, loss="logistic", scale=0.5, shift=shift)
    losses, metrics = loss_of(model, pairs)
    losses.mean().backward()
    expected = gradient(model)
    norm = expected.norm().item()
    of_shift = shift.grad.item()
    of_all = {name: values.mean().item() for name, values in metrics.items()}
    of_all |= {"loss": losses.mean().item(), "grad_norm": norm}
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [shift]}], lr=0.0)
    optimizer.zero_grad()
    found = {}
    look = lambda *_: found.update(gradient=gradient(model), of_shift=shift.grad.item())
    optimizer.register_step_pre_hook(look)
    for micro, clip in ((1, 1e6), (60, 1e6), (4096, 1e6), (4096, norm / 100)):
        args = args_for(f"--clip {clip} --micro-batch {micro}")
        means = gsil.update(model, optimizer, pairs, loss_of, args)
        assert means == pytest.approx(of_all, rel=1e-4, abs=1e-4)  # sums of about 40 nats
        assert relative(found["gradient"], expected * min(1, clip / norm)) < 1e-5
        assert found["of_shift"] == pytest.approx(of_shift, rel=1e-4)


def test_a_learned_shift_does_not_see_the_micro_batches():
    """Its first gradient is 0, but for a rounding of 1e-7, of which Adam's usual eps made a step of 0.02 in any
    direction; with ours it is 0.02 * 1e-7/1e-4. A shift that was given as a number stays."""
    last = []
    for micro in (4096, 60, 1):
        model = tiny_model()
        shift = torch.tensor(0.0, requires_grad=True)
        flags = f"--batch 4 --epochs 4 --lr 1e-3 --micro-batch {micro}"
        records = trained(model, made_pairs(model, 8), flags, shift=shift)
        assert abs(records[1]["shift"]) < 2e-4
        last.append(records[-1]["shift"])
    assert abs(last[0]) > 0.01 and last == pytest.approx([last[0]] * 3, rel=0.02)
    assert {record["shift"] for record in trained(model, made_pairs(model), "", shift=2.0)} == {2.0}


@pytest.mark.parametrize("loss", gsil.LOSSES)
@pytest.mark.parametrize("shift, optimizer", [(0.0, "adamw"), (2.0, "rmsprop")])
def test_training_tells_real_from_generated(loss, shift, optimizer, capsys):
    """A sign error in a loss would turn this around. References of other weights, or dropout, would spoil every
    log-ratio: the first loss, which is else that of h = shift, shows it."""
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    pairs = made_pairs(tiny_model(), 8)
    expected = gsil.LOSSES[loss](torch.tensor(shift), torch.tensor(shift)).item()
    flags = f"--batch 8 --lr 1e-3 --epochs 10 --optimizer {optimizer}"
    first, *_, last = trained(model, pairs, flags, loss, shift, expected)
    assert first["loss"] == pytest.approx(expected, rel=1e-3)  # d of about 1e-5, times a slope of at most 100
    assert last["loss"] < first["loss"] and last["told_apart"] == 1
    assert last["log_ratio_real"] > last["log_ratio_generated"] + 1
    for pair in pairs:
        pair["real_reference"] += 3
    with pytest.raises(SystemExit) as stop:
        trained(tiny_model(), pairs, flags, loss, shift, expected)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "disagree" in error and f"not {expected:.4f}" in error


def test_every_row_is_seen_once_per_epoch():
    """A shuffle that drops or repeats rows, or an epoch that drops the last small batch, biases training."""
    model = tiny_model()
    pairs = made_pairs(model, 7)
    seen = []
    sizes = []

    def loss_of(model, part):
        seen.extend(pairs.index(pair) for pair in part)
        sizes.append(len(part))
        return gsil.sft_loss(model, part, 4.0)

    records = list(gsil.train(model, pairs, loss_of, 2, args_for("--batch 3"), "0 round 1"))
    assert sizes == [3, 3, 1] * 2
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]
    epochs = [record["epoch"] for record in records]
    assert epochs == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_a_number_that_is_not_finite_stops_before_the_step(capsys):
    """A step with a gradient that is NaN or infinite would destroy the weights without a word."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(SystemExit):
        trained(model, made_pairs(tiny_model()), "")
    assert "gradient norm" in capsys.readouterr().err
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_warmup_and_decay():
    """The rate rises in --warmup steps, then falls on a line that ends near 0. A row is a batch, not none."""
    model = tiny_model()
    records = trained(model, made_pairs(model, 1), "--warmup 2 --epochs 6 --lr 4e-4")
    assert [record["lr"] for record in records] == pytest.approx([0, 2e-4, 4e-4, 3e-4, 2e-4, 1e-4])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_are_the_batch(world, monkeypatch):
    """Every row counts once, on one rank, within --micro-batch tokens; every rank makes as many forward
    passes, or FSDP would hang. Both sides of a pair are padded to the longer one."""
    rng = random.Random(0)
    for n in (1, 2, 5, 9):
        batch = [{"n": i, "prompt_ids": [5], "real_ids": [5] * rng.randint(1, 9)} for i in range(n)]
        counted = []
        passes = set()
        for rank in range(world):
            monkeypatch.setattr(gsil, "ranks", lambda rank=rank: (rank, world))
            parts = gsil.micro_batches(batch, 14)
            passes.add(len(parts))
            for part, count in parts:
                counted += [row["n"] for row in part[:count]]
                assert 0 < len(part) * max(1 + len(row["real_ids"]) for row in part) <= 14
        assert sorted(counted) == list(range(n)) and len(passes) == 1
    pair = {"prompt_ids": [5] * 3, "real_ids": [6] * 2, "generated_ids": [7] * 7}  # 2 x 10 tokens
    for tokens, sizes in ((40, [2, 2]), (39, [1] * 4)):
        assert [len(part) for part, _ in gsil.micro_batches([pair] * 4 * world, tokens)] == sizes
