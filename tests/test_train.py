"""Section 4 of gsil.py: update and train. A step is the gradient of the whole batch's mean, or none at all."""

import copy
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from helpers import EOS, gradient, logged, made_pairs, relative
from transformers import AutoModelForCausalLM

import gsil


def args_for(flags=""):
    return gsil.parse_args(["--data", "x.jsonl", "--micro-batch", "4096", *flags.split()])


def loss_with(shift=0.0):
    return partial(gsil.gsil_loss, loss="logistic", scale=0.5, shift=torch.as_tensor(shift))


def trained(model, rows, flags, folder, loss_of=None, learned=(), dev=()):
    """The metrics of every step of training on rows."""
    args = args_for(f"{flags} --out {folder}/run")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = SimpleNamespace(tokenizer=byte_tokenizer(), dev=list(dev), eos_ids={EOS}, max_new_tokens=7)
    gsil.train(model, rows, loss_of or loss_with(), args.epochs, out / "round_1", data, args, list(learned))
    return logged(out, "round 1")


def test_an_update_is_the_gradient_of_the_whole_batch():
    """Parts of the batch would weigh too much, or a step see the gradient of another one."""
    model = tiny_model()
    shift = torch.tensor(0.5, requires_grad=True)
    pairs = made_pairs(model)
    for n, pair in enumerate(pairs):  # some are told apart, some not
        pair["real_reference"] -= 0.5
        pair["generated_reference"] -= 0.25 + n % 2
    losses, metrics = loss_with(shift)(model, pairs)
    losses.mean().backward()
    expected, of_shift = gradient(model), shift.grad.item()
    norm = expected.norm().item()
    of_all = {name: values.mean().item() for name, values in metrics.items()}
    of_all |= {"loss": losses.mean().item(), "grad_norm": norm}
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [shift]}], lr=0.0)
    optimizer.zero_grad()
    found, parts = {}, []
    look = lambda *_: found.update(gradient=gradient(model), of_shift=shift.grad.item())
    optimizer.register_step_pre_hook(look)

    def loss_of(model, part):
        parts.append(part)
        return loss_with(shift)(model, part)

    for micro, clip in ((1, 1e6), (60, 1e6), (4096, 1e6), (4096, norm / 100)):
        args = args_for(f"--clip {clip} --micro-batch {micro}")
        parts.clear()
        means = gsil.update(model, optimizer, pairs, loss_of, args)
        assert sorted(pairs.index(row) for part in parts for row in part) == list(range(7))
        for part in parts:  # both sides are padded to the longest
            sides = [row["prompt_ids"] + row[f"{side}_ids"] for row in part for side in ("real", "generated")]
            assert len(part) == 1 or len(sides) * max(map(len, sides)) <= micro
        assert means == pytest.approx(of_all, rel=1e-4, abs=1e-4)  # float32 sums of about 40 nats
        assert relative(found["gradient"], expected * min(1, clip / norm)) < 1e-5
        assert found["of_shift"] == pytest.approx(of_shift, rel=1e-4)  # which is not clipped


def test_a_learned_shift_does_not_see_the_micro_batches(tmp_path):
    """Adam's usual eps makes a step of 0.02 of rounding error, the shift's first gradient."""
    last = []
    for micro in (4096, 60, 1):
        model, shift = tiny_model(), torch.tensor(0.0, requires_grad=True)
        flags = f"--batch 4 --epochs 4 --lr 1e-3 --micro-batch {micro}"
        steps = trained(model, made_pairs(model, 8), flags, tmp_path / str(micro), loss_with(shift), [shift])
        assert abs(steps[1]["shift"]) < 2e-4  # 0.02 * 1e-7 / 1e-4, and room for another order of sums
        last.append(steps[-1]["shift"])
    assert abs(last[0]) > 0.01 and last == pytest.approx([last[0]] * 3, rel=0.02)


def test_epochs_have_every_row_once_and_the_rate_rises_and_falls(tmp_path):
    """Rows dropped or repeated bias training, and without warmup AdamW begins with full steps."""
    model, seen = tiny_model(), []
    pairs = made_pairs(model, 7)

    def loss_of(model, part):
        seen.append([pairs.index(pair) for pair in part])
        return gsil.sft_loss(model, part, 4.0)

    steps = trained(model, pairs, "--batch 3 --warmup 2 --lr 4e-4", tmp_path, loss_of)
    assert [len(part) for part in seen] == [3, 3, 1] * 2
    epochs = [[n for part in parts for n in part] for parts in (seen[:3], seen[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]
    assert [step["lr"] for step in steps] == pytest.approx([0, 2e-4, 4e-4, 3e-4, 2e-4, 1e-4])


def test_the_first_epoch_that_solves_most_dev_problems_is_saved(tmp_path, capsys):
    """A later epoch with fewer right answers, or with as many, would be what people load."""
    tokenizer = byte_tokenizer()
    prompt_ids = tokenizer("1 + 1 ?").input_ids
    texts = {answer: tokenizer(f"#### {answer}").input_ids + [EOS] for answer in "12"}
    dev = [{"prompt_ids": prompt_ids, "real_ids": texts[answer], "answer": answer} for answer in "112"]
    for problems in (dev, []):
        model, taught, before = tiny_model(), iter("1" * 25 + "2" * 25 + "1" * 25), []  # one lesson an epoch

        def loss_of(model, rows, taught=taught, before=before):
            before.append(copy.deepcopy(model.state_dict()))
            return gsil.sft_loss(model, [{"prompt_ids": prompt_ids, "real_ids": texts[next(taught)]}], 1.0)

        folder = tmp_path / str(len(problems))
        trained(model, dev[:1] * 25, "--batch 1 --epochs 3 --lr 5e-3 --clip 9", folder, loss_of, dev=problems)
        saved = AutoModelForCausalLM.from_pretrained(folder / "run/round_1").state_dict()
        expected = before[25] if problems else model.state_dict()  # after one epoch; without dev after all
        assert all(torch.equal(saved[key], expected[key]) for key in saved)
    lines = [line for line in capsys.readouterr().out.splitlines() if "of dev right" in line]
    assert [line.split("%")[0].split()[-1] for line in lines] == ["66.7", "33.3", "66.7"]
    assert ["kept" in line for line in lines] == [True, False, False]


STOPS = {  # what must be said of a loss that is changed like this
    "policy and reference differ": lambda losses, metrics: (losses, {"d_real": metrics["d_real"] - 3}),
    "gradient norm": lambda losses, metrics: (losses + 1e38 * (losses - losses.detach()), metrics),
    "a loss should have (one|a) value": lambda losses, metrics: (losses.mean(), metrics),
}


@pytest.mark.parametrize("says", STOPS)
def test_training_stops_before_a_step_that_would_ruin_the_weights(says, tmp_path, capsys):
    """Other weights' references, an infinite gradient or a loss that is a mean would train."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SystemExit) as stop:
        trained(model, made_pairs(model), "", tmp_path, lambda *rows: STOPS[says](*loss_with()(*rows)))
    assert stop.value.code == 2 and re.search(says, capsys.readouterr().err)
    changed = any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert changed == (says == "policy and reference differ")  # which shows in the first step's metrics
