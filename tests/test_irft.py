"""irft.py: the reward, the policy steps, whole runs, LoRA. What it shares with gsil.py is tested there."""

import argparse
import inspect
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from helpers import EOS, PAIRS, check_equal, logged, made_pairs, read_jsonl, refusal, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import gsil
import irft

FAST = "--reward-steps 2 --policy-steps 2 --policy-batch 2 --group-size 2 --batch 4"


def sources(module):
    """name -> source of a script's functions and classes, or the value of a constant."""
    own = {name: x for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
    own.pop("Data")
    constants = {name: x for name, x in vars(module).items() if name.isupper() and name != "TAKEN"}
    return {name: inspect.getsource(x) for name, x in own.items()} | constants


def test_what_both_scripts_need_is_the_same():
    """A fix would be made in one script only, and a diff not show the methods' difference."""
    ours, theirs = sources(irft), sources(gsil)
    different = {name for name in ours.keys() & theirs if ours[name] != theirs[name]}
    allowed = {"parse_args", "train_sft", "main", "load_model", "LOSSES", "PRINTED"}
    assert different == allowed, "a fork that changes one script may delete this test"


def args_for(out, flags=""):
    args = irft.parse_args(["--data", "x.jsonl", "--out", "unused", *flags.split()])
    return argparse.Namespace(**vars(args) | {"out": str(out)})


@pytest.fixture(scope="session")
def folder(inputs):
    """A tiny model on disk, whose tokenizer pads with EOS."""
    return Path(irft.parse_args(inputs.split()).model)


def load_reward(path):
    """A reward model, and its tokenizer."""
    data = SimpleNamespace(tokenizer=byte_tokenizer(), eos_ids={EOS, 2})
    return irft.load_reward(path, data, args_for("unused"))


@pytest.fixture(scope="session")
def reward_folder(folder, tmp_path_factory):
    """A reward model on disk whose head is not zero, so that its rewards differ."""
    model, tokenizer = load_reward(folder)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return helpers.save(tmp_path_factory.mktemp("reward"), model, tokenizer)


def test_reward_is_that_of_an_ordinary_classifier(folder, reward_folder):
    """transformers would read a saved reward elsewhere, or a new head would reward noise."""
    model = load_reward(reward_folder)[0]
    loaded = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    pads = AutoTokenizer.from_pretrained(reward_folder)
    assert pads.pad_token_id == loaded.config.pad_token_id and pads.pad_token_id not in (EOS, 2)
    texts = {"input_ids": [prompt + response for prompt, response in PAIRS]}
    with torch.no_grad():
        theirs = loaded(**pads.pad(texts, padding_side="right", return_tensors="pt")).logits[:, 0].tolist()
        together = irft.reward(model, PAIRS).tolist()
    alone = irft.score(model, PAIRS, 1, irft.reward)
    for ours in (together, alone):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)  # fp32 sums in another order, of 1 to 10
    assert irft.reward(load_reward(folder)[0], PAIRS).tolist() == [0, 0, 0]


def fit(path, flags, pairs, out, preferences=()):
    """The metrics of reward steps from the reward model at path."""
    irft.fit_reward(load_reward(path)[0], pairs, list(preferences), "round 1", args_for(out, flags))
    return logged(out, "round 1 reward")


def test_the_reward_learns_and_preferences_join_with_their_weight(folder, reward_folder, tmp_path):
    """A sign error would turn the reward around, or linear fall forever without its penalty."""
    pairs, others, margins = made_pairs(tiny_model(), 8), made_pairs(tiny_model(), 5, seed=1), []
    for flags in ("", "--reward-loss linear", "--reward-loss linear --reward-penalty 1"):
        first, *_, last = fit(folder, f"--reward-steps 24 --reward-lr 1e-2 {flags}", pairs, tmp_path)
        assert first["told_apart"] == 0.5 and first["margin"] == 0  # ties count half
        assert last["told_apart"] == 1
        margins.append(last["margin"])
    assert min(margins[:2]) > 1 and margins[2] < min(2, margins[1] / 3)  # penalty 1: at best r = +-1/2
    flags = "--reward-steps 1 --preference-weight 0.3"
    losses = [fit(reward_folder, flags, rows, tmp_path)[0]["loss"] for rows in (pairs, others)]
    for micro_batch in (512, 40):
        joint = fit(reward_folder, f"{flags} --micro-batch {micro_batch}", pairs, tmp_path, others)[0]["loss"]
        assert joint == pytest.approx(losses[0] + 0.3 * losses[1], rel=1e-5)  # sums in fp32


def test_preferences_are_pairs(tokenizer):
    """The two sides would be swapped, or rows be used that cannot be compared."""
    encode = partial(irft.encode_preference, tokenizer=tokenizer, eos_ids={EOS}, window=200)
    transcript = "\n\nHuman: How many?\n\nAssistant: "
    row = {"chosen": f"{transcript}3", "rejected": f"{transcript}no"}
    for pair in map(encode, [row, {"prompt": "How many?", "chosen": "3", "rejected": "no"}]):
        texts = [tokenizer.decode(pair[f"{part}_ids"]) for part in ("prompt", "real", "generated")]
        assert texts == ["<|user|>\nHow many?</s>\n<|assistant|>\n", "3</s>", "no</s>"]
    unusable = {"different prompts": transcript.replace("many", "old") + "3", "columns chosen and": None}
    for says, rejected in (unusable | {"longer than the model's window": transcript + "no" * 200}).items():
        with pytest.raises((UserWarning, ValueError), match=says):
            encode(row | {"rejected": rejected})


def improve(policy, flags, out, max_new_tokens=6):
    """Policy steps, each on 4 of 6 prompts; the metrics of the last step."""
    args = args_for(out, f"--policy-batch 4 {flags}")
    demos = [{"prompt_ids": prompt} for prompt, _ in PAIRS * 2]
    data = SimpleNamespace(demos=demos, eos_ids={EOS}, max_new_tokens=max_new_tokens)
    small_tokens = helpers.Outcomes((torch.arange(300) < 100).float(), per_prompt=20.0)  # else a reward of 0
    irft.improve_policy(policy, tiny_model(), small_tokens, "round 1", data, args)
    return logged(out, "round 1 policy")[-1]


def share_of_small_tokens(model):
    """The mean share of tokens below 100 in responses of one token."""
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt, _ in PAIRS])
    return logits.softmax(-1)[:, :100].sum(1).mean().item()


def test_policy_steps_reach_the_closed_form(tmp_path):
    """A wrong sign, KL or weight of it, or another prompt's baseline would lead elsewhere."""
    policy, start = tiny_model(), share_of_small_tokens(tiny_model())
    flags = "--kl 0.5 --policy-steps 24 --group-size 60 --policy-lr 1e-2 --micro-batch 4096"
    improve(policy, flags, tmp_path, max_new_tokens=1)
    expected = 1 / (1 + (1 - start) / start * math.exp(-1 / 0.5))  # .8; kl 1 would lead to .6, and no kl to 1
    assert share_of_small_tokens(policy) == pytest.approx(expected, abs=0.08)  # chance in the samples


@pytest.mark.parametrize("epochs, moves", [(1, True), (2, False)])
def test_only_later_passes_clip(epochs, moves, tmp_path):
    """Rounding would clip the first pass, or later passes would forget the samples' age."""
    policy = tiny_model()

    def disturb(_, __, logits):  # training finds all tokens but 299 unlikely: a ratio of nearly 0
        return logits + 20 * (torch.arange(300) == 299) if torch.is_grad_enabled() else logits

    policy.lm_head.register_forward_hook(disturb)
    norm = improve(policy, f"--policy-steps 1 --ppo-epochs {epochs}", tmp_path)["grad_norm"]
    assert norm > 0.1 if moves else norm < 1e-3


def test_one_chunk_is_a_round_of_gsil_with_spin(inputs, tmp_path):
    """IRFT with T = 1 would not be SPIN, with the same samples and the same weights."""
    flags = f"{inputs} --baseline none --batch 4 --out {tmp_path}"
    run(f"{flags}/irft --method irft", irft)
    run(f"{flags}/gsil --loss spin")
    ours, theirs = tmp_path / "irft", tmp_path / "gsil"
    for file in ("round_1.jsonl", "round_1/model.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


METHODS = {f"--preferences {irft.TOY}/preferences.jsonl --reward-loss linear --ppo-epochs 2 {FAST}": 1}
METHODS |= {"--method irft --chunks 4 --loss linear": 4}


@pytest.mark.parametrize("flags, rounds", METHODS.items())
def test_end_to_end(flags, rounds, inputs, folder, tmp_path):
    """A mode would not reach its table, chunks overlap, or SFT train what LoRA does not."""
    data, out = irft.parse_args(inputs.split()).data, tmp_path / "out"  # six demonstrations
    rows = run(f"{inputs} --dev {data} --heldout {data} --out {out} --lora-rank 2 {flags}", irft)
    assert [*rows] == ["base", *(f"round {t + 1}" for t in range(rounds)), "sft"]
    chunks = [read_jsonl(path) for path in out.glob("round_*.jsonl")]
    assert len({pair["prompt"] for chunk in chunks for pair in chunk}) == sum(map(len, chunks)) == 6
    assert len(chunks) == rounds and max(map(len, chunks)) - min(map(len, chunks)) <= 1
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    assert isinstance(GenerationConfig.from_pretrained(out / "round_1").eos_token_id, list)
    for stage in ("round_1", "sft"):
        start, trained = (load_file(path / "model.safetensors") for path in (folder, out / stage))
        changed = [name for name in start if not torch.equal(start[name], trained[name])]
        assert len(changed) == 2 * 7 and all("_proj" in name for name in changed)  # LoRA's layers


@pytest.fixture(scope="session")
def two_rounds(inputs, reward_folder, tmp_path_factory):
    """The folder of a run with two rounds of RFT."""
    out = tmp_path_factory.mktemp("two_rounds") / "out"
    flags = f"{inputs} {FAST} --rounds 2 --reward-model {reward_folder} --baseline none --kl 0.5"
    flags += " --habit ^[A-Z]|[0-3] --max-new-tokens 9 --lora-rank 2 --policy-lr 1e-2 --reward-penalty 0.5"
    run(f"{flags} --out {out}", irft)
    return out


def test_a_second_round_builds_on_the_first(two_rounds):
    """A reward that starts anew would forget, and a moving reference let the policy walk away."""
    first, second = (logged(two_rounds, f"round {t} reward")[0]["loss"] for t in (1, 2))
    assert second == pytest.approx(math.log(2), abs=1e-5) and abs(first - math.log(2)) > 0.1  # no change yet
    start, end = (load_file(two_rounds / f"round_{t}_reward/model.safetensors") for t in (1, 2))
    moved = max((end[name] - start[name]).abs().max().item() for name in start)
    assert 0 < moved < 1.6e-3  # two steps of AdamW with the learning rates 1e-3 and 5e-4
    for when in ("round 1 before", "round 1 after", "round 2 before", "round 2 after"):
        (report,) = logged(two_rounds, when)
        assert report["objective"] == pytest.approx(report["reward"] - 0.5 * report["kl"], abs=1e-4)
        assert (abs(report["kl"]) < 1e-4) == (when == "round 1 before")  # there the policy is the reference


LOST = {"summary.json", "round_2.jsonl", "round_2_reward", "round_2"}


@pytest.mark.parametrize("finished", [[], ["round_2.jsonl"], ["round_2.jsonl", "round_2_reward"]])
def test_a_second_round_of_a_resumed_run(finished, two_rounds, tmp_path, capsys):
    """A stopped run would end with other weights, or not say what to expect of a later round."""
    out = tmp_path / "out"
    shutil.copytree(two_rounds, out, ignore=shutil.ignore_patterns(*LOST - {*finished}))
    run(f"--resume {out}", irft)
    check_equal(out, two_rounds)
    printed = capsys.readouterr().out
    assert "warning: rounds do not settle at --kl 0.5" in printed
    shares = re.search(r"model ([\d.]+)%, demonstrators ([\d.]+)%; predicted ([\d.]+)%", printed).groups()
    own, theirs, predicted = (float(share) / 100 for share in shares)
    odds = (theirs / (1 - theirs)) ** (1 / 0.5) * (own / (1 - own)) ** (1 - 1 / 0.5)  # 0.5: --kl
    assert predicted == pytest.approx(odds / (1 + odds), abs=2e-3)  # of three digits


def test_a_sick_round_is_warned_of(inputs, small, tmp_path, capsys):
    """A warning on every run would soon be ignored, and one that never fires protects nobody."""
    short = "--baseline none --reward-steps 1 --policy-steps 1 --policy-batch 2"
    run(f"{inputs} {short} --reward-lr 1e-9 --policy-lr 1e-9 --kl 0 --out {tmp_path}/idle", irft)
    assert not re.search("length alone|runs away|1 - 1/", capsys.readouterr().out)
    dev = tmp_path / "dev.jsonl"  # two samples: their rewards and lengths always correlate
    dev.write_text("".join((small / "dev.jsonl").open().readlines()[:2]))
    flags = f"--data {small}/demos.jsonl --dev {dev} --heldout {small}/heldout.jsonl --max-new-tokens 20"
    run(f"{flags} {short} --policy-lr 0.3 --out {tmp_path}/sick", irft)
    printed = capsys.readouterr().out
    assert "the reward follows length alone" in printed and "the policy runs away" in printed


MISTAKES = {
    "--group-size 1": "at least 2",
    "--reward-loss linear --reward-penalty 0": "falls forever",
    "--method irft --kl 0.5": "--kl has no use in --method irft",
    "--method irft --chunks 7": "only 5 demonstrations",
    "--reward-model exchanged": "its tokenizer differs",
    "--kl 0.3": "--kl 0.3: the run to resume has 0.5",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_costs_no_samples(flags, inputs, folder, two_rounds, tmp_path, monkeypatch, capsys):
    """A round would be sampled and lost, or a folder be left in the way of the next try."""
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copytree(folder, "exchanged"), "tokenizer.json")  # in which y and z change places
    file.write_text(file.read_text().replace('"y"', '"new"').replace('"z"', '"y"').replace('"new"', '"z"'))
    start = f"--resume {two_rounds}" if flags == "--kl 0.3" else f"{inputs} --out {tmp_path}/out"
    assert MISTAKES[flags] in refusal(capsys, f"{start} {flags}", irft)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, layers", [("llama", 7), ("phi3", 4), ("gpt2", 4)])  # plain, fused, Conv1D
def test_lora_starts_as_the_model_itself_and_merges_into_it(kind, layers, tmp_path):
    """Policy and reference would differ at first, or the saved model do something else."""
    model = helpers.random_model(kind)
    before = irft.response_logps(model, PAIRS)
    irft.add_lora(model, 3, "a seed")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert torch.equal(irft.response_logps(model, PAIRS), before)
    assert len(trained) == 2 * layers * 2 and all("lora" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):
        irft.response_logps(model, PAIRS).sum().backward()
        optimizer.step()
    adapted = irft.response_logps(model, PAIRS)
    assert ((adapted - before).abs() > 0.1).all()
    model.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # in fp32 (W + B A) x rounds differently
    assert torch.allclose(irft.response_logps(merged, PAIRS), adapted, rtol=1e-4, atol=1e-3)
    assert set(merged.state_dict()) == {name for name in model.state_dict() if "lora" not in name}
