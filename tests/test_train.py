"""Section 4 of gsil.py: update and train. A step must be the gradient of the whole batch's mean, or none at
all."""

import copy
import math
import random
from functools import partial

import pytest
import torch
from conftest import tiny_model
from helpers import gradient, made_pairs, relative

import gsil

SHIFT = torch.tensor(0.5)


def loss_of_kind(loss, scale=1.0, shift=SHIFT):
    if loss == "sft":
        return partial(gsil.sft_loss, mean_length=4.0)
    return partial(gsil.gsil_loss, loss=loss, scale=scale, shift=shift)


def args_for(flags=""):
    return gsil.parse_args(["--data", "x.jsonl", *flags.split()])


def trained(model, pairs, flags="", loss="logistic", scale=1.0, shift=0.0, learn=False, first_loss=None):
    """The records of training on pairs; shift a number, or its start if it is learned."""
    args = args_for(flags)
    shift = torch.tensor(shift, requires_grad=learn)
    loss_of = loss_of_kind(loss, scale, shift)
    return list(gsil.train(model, pairs, loss_of, args.epochs, args, "0 round 1", shift, first_loss))


def one_gradient(loss, micro, monkeypatch):
    """The gradient of one update on seven pairs, as the optimizer would get it."""
    caught = []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *_: caught.append(gradient(model)) or torch.zeros(())
    )
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    means = gsil.update(
        model, optimizer, made_pairs(model), loss_of_kind(loss), args_for(f"--micro-batch {micro}")
    )
    return caught[0], means


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "sft"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(loss, monkeypatch):
    """Averaging the parts' means would weigh pairs of a small last part too much. Also with one pass over
    all, written out here. Seven pairs of different lengths in parts of one, of two or three, and whole: only
    the order of float32 sums differs, which is worth less than 1e-5 of the largest number."""
    whole, means = one_gradient(loss, 4096, monkeypatch)
    for micro in (1, 60):
        part, found = one_gradient(loss, micro, monkeypatch)
        assert relative(part, whole) < 1e-5
        assert found["loss"] == pytest.approx(means["loss"], rel=1e-5)
    model = tiny_model()
    losses, metrics = loss_of_kind(loss)(model, made_pairs(model))
    losses.mean().backward()
    assert relative(whole, gradient(model)) < 1e-5
    assert means["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for name, values in metrics.items():  # d is 0 here, up to the rounding of sums of about 40 nats
        assert means[name] == pytest.approx(values.mean().item(), abs=1e-4)


def test_a_learned_shift_does_not_see_the_micro_batches():
    """At the first step its true gradient is 0; Adam's usual eps made a whole step of the rounding, in
    another direction for each --micro-batch, and all later steps were others, too. With its eps the shift
    moves by shift-lr * gradient/1e-4 at most: gradients of 1e-7 make 2e-5. The weights differ by less than 2
    % of the run's own change, where AdamW makes steps of last-bit differences in the gradients that are
    nearly 0."""
    runs = []
    for micro in (4096, 60, 1):
        model = tiny_model()
        start = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        flags = f"--batch 4 --epochs 4 --lr 1e-3 --micro-batch {micro}"
        records = trained(model, made_pairs(model, 8), flags, learn=True)
        assert abs(records[1]["shift"]) < 2e-4  # of a --shift-lr of 0.02
        change = torch.cat([weight.detach().flatten() for weight in model.parameters()]) - start
        runs.append((change, records[-1]["shift"]))
    whole, shift = runs[0]
    assert abs(shift) > 0.01
    for change, other in runs[1:]:
        assert other == pytest.approx(shift, rel=0.02)
        assert (change - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "sft"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_training_tells_real_from_generated(loss, optimizer):
    """A sign error in a loss, or references taken from the wrong side, would turn this around."""
    model = tiny_model()
    pairs = made_pairs(model, 8)
    flags = f"--batch 4 --lr 1e-3 --epochs 10 --optimizer {optimizer}"
    records = trained(model, pairs, flags, loss, 0.5)
    assert records[-1]["loss"] < records[0]["loss"]
    if loss != "sft":
        last = records[-1]
        assert last["log_ratio_real"] > last["log_ratio_generated"] + 1 and last["told_apart"] == 1


def test_every_row_is_seen_once_per_epoch():
    """A shuffle that drops or repeats rows, or an epoch that drops the last small batch, biases training;
    fewer rows than --batch are one batch, not none."""
    model = tiny_model()
    pairs = made_pairs(model, 7)
    seen = []

    def spy(model, part):
        seen.append([pairs.index(pair) for pair in part])
        return loss_of_kind("logistic")(model, part)

    args = args_for("--batch 3 --epochs 2")
    records = list(gsil.train(model, pairs, spy, 2, args, "0 round 1"))
    assert [len(part) for part in seen] == [3, 3, 1] * 2
    epochs = [sum(seen[:3], []), sum(seen[3:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]
    places = [(record["step"], record["steps"], record["epoch"]) for record in records]
    assert places[0] == (1, 6, pytest.approx(1 / 3)) and places[-1] == (6, 6, 2)
    assert len(trained(model, pairs, "--batch 32 --epochs 3")) == 3


@pytest.mark.parametrize("loss", gsil.LOSSES)
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_wrong_reference_stops_the_run(loss, shift, capsys):
    """If log pi_t came from other weights, every log-ratio would be off; the first loss shows it. With honest
    references it is the loss at h = shift, and the run goes on."""
    model = tiny_model()
    pairs = made_pairs(model)
    first = gsil.LOSSES[loss](torch.tensor(shift), torch.tensor(shift)).item()
    record, *_ = trained(model, pairs, "--epochs 1", loss, 1.0, shift, first_loss=first)
    assert record["loss"] == pytest.approx(first, rel=1e-3)  # d of about 1e-5, times a slope of at most 100
    model = tiny_model()
    for pair in pairs:
        pair["real_reference"] += 3
    with pytest.raises(SystemExit) as stop:
        trained(model, pairs, "--epochs 1", loss, 1.0, shift, first_loss=first)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: policy and reference disagree")
    assert f"not {first:.4f}" in error


@pytest.mark.parametrize("where, says", [("loss", "loss nan"), ("gradient", "gradient norm inf")])
def test_a_number_that_is_not_finite_stops_before_the_step(where, says, capsys):
    """A step with a NaN gradient would destroy the weights without a word."""
    model = tiny_model()
    pairs = made_pairs(model)
    before = copy.deepcopy(model.state_dict())
    if where == "loss":
        pairs[2]["real_reference"] = math.nan
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(SystemExit) as stop:
        trained(model, pairs, "--epochs 1")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "lower learning rate" in error
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_shift_is_learned_only_when_asked():
    """A fixed shift that moved, or a learned one that did not, would be another method than the flag
    names."""
    for learn, start in ((True, 0.0), (False, 2.0)):
        model = tiny_model()
        records = trained(model, made_pairs(model, 8), "--batch 4 --epochs 4", shift=start, learn=learn)
        assert (abs(records[-1]["shift"] - start) > 1e-3) == learn


@pytest.mark.parametrize("warmup", [0, 4])
def test_warmup_and_decay(warmup):
    """The rate rises in --warmup steps, then falls on a line that ends near 0."""
    model = tiny_model()
    flags = f"--warmup {warmup} --batch 1 --epochs 16 --lr 1e-4"
    rates = [record["lr"] for record in trained(model, made_pairs(model, 1), flags)]
    falling = [1e-4 * (16 - step) / (16 - warmup) for step in range(warmup, 16)]
    assert rates == pytest.approx([1e-4 * step / 4 for step in range(warmup)] + falling)


def test_clipping_leaves_the_direction_and_says_the_norm(monkeypatch):
    """grad_norm is the norm before; a shift's gradient beside it must not shrink the model's."""
    norms = []
    for limit in (1e-3, 1e6):
        model = tiny_model()
        shift = torch.tensor(0.5, requires_grad=True)
        groups = [{"params": [*model.parameters()]}, {"params": [shift]}]
        optimizer = torch.optim.SGD(groups, lr=0.0)
        monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
        args = args_for(f"--clip {limit}")
        means = gsil.update(model, optimizer, made_pairs(model), loss_of_kind("logistic", 1.0, shift), args)
        norms.append(means["grad_norm"])
        assert gradient(model).norm().item() == pytest.approx(min(limit, means["grad_norm"]), rel=1e-3)
        assert abs(shift.grad) > 1e-2
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1e-2


def test_dropout_is_off():
    """With dropout the log-ratios would not be 0 at the first step, and the reference would be a random
    draw."""
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    pairs = made_pairs(model)
    model.train()
    (first,) = trained(model, pairs, "--epochs 1")
    rounding = 1e-4  # of sums of about 40 nats
    assert abs(first["log_ratio_real"]) < rounding and abs(first["log_ratio_generated"]) < rounding


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_micro_batches_are_the_batch(world, n, monkeypatch):
    """Every row counts once, on one rank, within --micro-batch tokens; every rank makes as many forward
    passes, or FSDP would hang."""
    rng = random.Random(n)
    batch = [{"n": i, "prompt_ids": [5], "real_ids": [5] * rng.randint(1, 9)} for i in range(n)]
    counted = []
    parts = []
    for rank in range(world):
        monkeypatch.setattr(gsil, "ranks", lambda rank=rank: (rank, world))
        found = gsil.micro_batches(batch, 14)
        parts.append(len(found))
        for part, count in found:
            counted += [row["n"] for row in part[:count]]
            assert 0 < len(part) * max(1 + len(row["real_ids"]) for row in part) <= 14
    assert sorted(counted) == list(range(n)) and len(set(parts)) == 1


def test_a_pair_counts_twice_in_a_micro_batch():
    """Both sides go through the model in one pass, padded to the longer one: else --micro-batch would say
    half of the memory that is used."""
    pair = {"prompt_ids": [5] * 3, "real_ids": [6] * 2, "generated_ids": [7] * 7}  # 2 x 10 tokens
    assert [len(part) for part, _ in gsil.micro_batches([pair] * 4, 40)] == [2, 2]
    assert [len(part) for part, _ in gsil.micro_batches([pair] * 4, 39)] == [1] * 4
