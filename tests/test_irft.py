"""irft.py: the reward, the policy steps, whole runs, LoRA. What it shares with gsil.py is tested there."""

import copy
import inspect
import shutil
from functools import partial

import pytest
import torch
from conftest import tiny_model
from helpers import EOS, PAIRS, A, Q, made_pairs, metrics, read_jsonl, relative, run, weights, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import gsil
import irft


def sources(module):
    """name -> source of a script's functions and classes, or the value of a constant."""
    own = {name: x for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
    constants = {name: value for name, value in vars(module).items() if name.isupper()}
    return {name: inspect.getsource(x) for name, x in own.items()} | constants


def test_what_both_scripts_need_is_the_same():
    """`diff gsil.py irft.py` must show the methods' difference: a fix in one file only would hide in it, and
    what they share is tested in gsil.py alone."""
    ours, theirs = sources(irft), sources(gsil)
    different = {name for name in ours.keys() & theirs if ours[name] != theirs[name]}
    assert different == {"parse_args", "main", "LOSSES", "TITLES"}
    assert theirs.keys() - ours == {"tangent_exp", "gsil_loss"}


def args_for(flags=""):
    return irft.parse_args(["--data", "x.jsonl", "--out", "unused", *flags.split()])


def irft_run(flags):
    return irft.main(irft.parse_args(flags.split()))


@pytest.fixture(scope="session")
def folder(inputs):
    """A tiny model on disk, whose tokenizer pads with EOS."""
    return irft.parse_args(inputs.split()).model


@pytest.fixture(scope="session")
def reward_model(folder):
    """A reward with a head that is not zero, so that its rewards differ; and its tokenizer."""
    model, tokenizer = irft.load_reward(folder, {EOS, 2}, args_for())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return model, tokenizer


def spy(monkeypatch, name, stop=None):
    """The arguments of every call of a function of irft.py from now on; call number `stop` ends the run."""
    calls, whole = [], getattr(irft, name)

    def call(*args):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(irft, name, call)
    return calls


# ---- the reward --------------------------------------------------------------------------------------------


def test_reward_is_that_of_an_ordinary_classifier(folder, reward_model, tmp_path):
    """transformers reads the last token that is no pad: not ours if EOS were the pad, as it is the policy's.
    Pads and neighbours must not matter. A new head is zero, or policy steps chase noise; others stay."""
    model, tokenizer = reward_model
    irft.save_model(model, tokenizer, tmp_path / "reward")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    pads = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert pads.pad_token_id == loaded.config.pad_token_id and pads.pad_token_id not in (EOS, 2)
    texts = {"input_ids": [prompt + response for prompt, response in PAIRS]}
    with torch.no_grad():
        theirs = loaded(**pads.pad(texts, padding_side="right", return_tensors="pt")).logits[:, 0].tolist()
        together = irft.reward(model, PAIRS).tolist()
    alone = irft.score(model, PAIRS, 1, irft.reward)
    for ours in (together, alone):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)  # fp32 sums in another order, of 1 to 10
    again, new = (irft.load_reward(path, {EOS}, args_for())[0] for path in (tmp_path / "reward", folder))
    assert torch.equal(again.score.weight, model.score.weight)
    assert irft.reward(new, PAIRS).tolist() == [0, 0, 0]


def fit(model, flags, pairs, preferences=()):
    """The metrics of reward steps on a copy of the model."""
    return list(irft.fit_reward(copy.deepcopy(model), pairs, list(preferences), args_for(flags), "0"))


def test_the_reward_learns_and_its_penalty_holds_it(folder):
    """A sign error would turn the reward around. The linear loss falls for ever, but for its penalty."""
    model, _ = irft.load_reward(folder, {EOS}, args_for())
    margins = []
    for flags in ("", "--reward-loss linear", "--reward-loss linear --reward-penalty 1"):
        first, *_, last = fit(model, f"--reward-steps 24 --reward-lr 1e-2 {flags}", made_pairs(tiny_model()))
        assert first["told_apart"] == 0.5 and first["margin"] == 0  # ties count half
        assert last["told_apart"] == 1 and last["step"] == 24
        margins.append(last["margin"])
    assert min(margins[:2]) > 1 and margins[2] < min(2, margins[1] / 3)  # penalty 1: at best r = +-1/2


def test_preferences_join_with_their_weight(reward_model, monkeypatch):
    """The gradient is that of the pairs plus weight times that of the preferences, in parts of any size."""

    gradients = []

    def clip(optimizer, limit):
        fitted = optimizer.param_groups[0]["params"]
        gradients.append(torch.cat([weight.grad.flatten() for weight in fitted]))
        return 1.0

    monkeypatch.setattr(irft, "clip_gradients", clip)
    pairs, preferences = made_pairs(tiny_model(), 8), made_pairs(tiny_model(), 5, seed=1)
    for alone in (pairs, preferences):
        fit(reward_model[0], "--reward-steps 1", alone)
    for flags in ("", "--micro-batch 40"):
        flags = f"--reward-steps 1 --preference-weight 0.3 {flags}"
        fit(reward_model[0], flags, pairs, preferences)
        assert relative(gradients[-1], gradients[0] + 0.3 * gradients[1]) < 1e-4  # sums in fp32


HH = {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: no"}
PREFERENCES = [HH, {"prompt": Q, "chosen": A, "rejected": "no"}]
UNUSABLE = {  # what is said of it -> a row
    "answer different prompts": HH | {"rejected": HH["rejected"].replace(Q, "Why?")},
    "the columns chosen and rejected": {"prompt": Q, "chosen": A},
    "longer than the model's window of 200": {"prompt": Q, "chosen": A, "rejected": "no" * 200},
}


def test_preferences_are_pairs(tokenizer):
    """The sides must not be swapped. What cannot be compared raises, for read_demos to count or refuse it."""
    make = partial(irft.make_preference, tokenizer=tokenizer, eos_ids={EOS}, room=200)
    for pair in map(make, PREFERENCES):
        texts = [tokenizer.decode(pair[f"{part}_ids"]) for part in ("prompt", "real", "generated")]
        assert texts == [f"<|user|>\n{Q}</s>\n<|assistant|>\n", A + "</s>", "no</s>"]
    for says, row in UNUSABLE.items():
        with pytest.raises(ValueError, match=says):
            make(row)


# ---- the policy --------------------------------------------------------------------------------------------


def improve(reward_model, flags, max_new_tokens=6):
    """Policy steps of the tiny model, each on 4 of 6 prompts; the policy."""
    policy, args = tiny_model(), args_for(f"--policy-batch 4 {flags}")
    demos = [{"prompt_ids": prompt} for prompt, _ in PAIRS * 2]
    respond = partial(irft.sample, eos_ids={EOS}, max_new_tokens=max_new_tokens, batch_size=256)
    list(irft.improve_policy(policy, tiny_model(), reward_model, demos, respond, args, "0"))
    return policy


def test_a_policy_step(reward_model, monkeypatch):
    """The ratio is 1 at the first of 3 inner steps, or every later one is off; the reward is not
    trained along; and a response is compared with others to its own prompt, of which there are 3 in a row."""
    reward, before = reward_model[0], copy.deepcopy(reward_model[0].state_dict())
    losses, steps = spy(monkeypatch, "clipped_loss"), spy(monkeypatch, "update")
    improve(reward, "--policy-steps 2 --ppo-epochs 3 --group-size 3")
    off = [(new - old).abs().max().item() for new, old, _ in losses]
    assert [difference < 1e-4 for difference in off] == [True, False, False] * 2  # fp32, of -20
    assert all(torch.equal(before[name], value) for name, value in reward.state_dict().items())
    for i in range(0, 12, 3):
        first, *others = steps[0][2][i : i + 3]
        assert all(first["prompt_ids"] == other["prompt_ids"] for other in others)
        gain = first["objective"] - sum(other["objective"] for other in others) / 2
        assert first["advantage"] == pytest.approx(gain, abs=1e-4)  # fp32, of about 10


def test_policy_steps_reach_the_closed_form(monkeypatch):
    """The optimum is pi_ref exp(r/kl) / Z. With reward 1 for words below 100 and else 0, the logit of their
    share must rise by 1/kl: neither sign, nor KL, nor its weight may be wrong."""

    def share(model):
        """Of words below 100 in responses of one token."""
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt, _ in PAIRS])
        return logits.softmax(-1)[:, :100].sum(1)

    monkeypatch.setattr(irft, "reward", lambda _, texts: torch.tensor([float(y[0] < 100) for _, y in texts]))
    flags = "--kl 0.5 --policy-steps 24 --group-size 60 --policy-lr 1e-2"
    found, q = share(improve(None, flags, max_new_tokens=1)), share(tiny_model())
    expected = (q.logit() + 1 / 0.5).sigmoid()  # about 0.8; kl 1 would lead to 0.6, no kl to 1
    assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.08)  # chance in the samples


# ---- whole runs --------------------------------------------------------------------------------------------

FAST = "--reward-steps 2 --policy-steps 2 --policy-batch 2 --group-size 2 --batch 4"


@pytest.mark.parametrize("kl, correlation, warned", [(6, 0.3, "runs away"), (4, -0.97, "length alone")])
def test_each_sickness_has_its_warning(kl, correlation, warned, inputs, tmp_path, monkeypatch, capsys):
    """A warning that fires on healthy runs is soon ignored; one that never fires protects nobody."""
    before = {"kl": 0.0, "objective": 0.0, "length": 10.0, "reward_length": correlation}
    found = [before | {"kl": kl, "objective": 0.5}, before]
    monkeypatch.setattr(irft, "compare", lambda *_: found.pop())
    irft_run(f"{inputs} --out {tmp_path}/out --baseline none {FAST}")
    said = capsys.readouterr().out
    assert [word for word in ("runs away", "length alone") if word in said] == [warned]


def test_one_chunk_is_a_round_of_gsil_with_spin(inputs, tmp_path):
    """IRFT with T = 1 is SPIN: the same samples, the same steps, the same weights to the last digit."""
    flags = f"{inputs} --baseline none --batch 4 --out {tmp_path}"
    irft_run(f"{flags}/irft --method irft")
    run(f"{flags}/gsil --loss spin")
    ours, theirs = (tmp_path / script / "round_1" for script in ("irft", "gsil"))
    assert (ours / "generated.jsonl").read_bytes() == (theirs / "generated.jsonl").read_bytes()
    assert weights(ours) == weights(theirs)


@pytest.mark.parametrize(
    "flags, names",
    [
        (f"--reward-loss linear --ppo-epochs 2 --lora-rank 2 {FAST}", ["rft 1"]),
        ("--method irft --chunks 4 --loss linear --lora-rank 4", ["irft 1", "irft 2", "irft 3", "irft 4"]),
    ],
)
def test_end_to_end(flags, names, inputs, tmp_path):
    """Every mode must reach its table. Chunks are together one pass over the data. What is reported of an RFT
    round is of its policy before and after: at first it is the reference."""
    data = irft.parse_args(inputs.split()).data
    rows = irft_run(f"{inputs} --dev {data} --heldout {data} --out {tmp_path}/out {flags}")["rows"]
    assert [(row["name"], row["n"]) for row in rows] == [(name, 6) for name in ("base", *names, "sft")]
    chunks = [read_jsonl(path) for path in (tmp_path / "out").glob("round_*/generated.jsonl")]
    assert len({pair["prompt"] for chunk in chunks for pair in chunk}) == sum(map(len, chunks)) == 6
    assert len(chunks) == len(names) and max(map(len, chunks)) - min(map(len, chunks)) <= 1
    reports = [record for record in metrics(tmp_path / "out") if "when" in record]
    assert len(reports) == 2 * (names == ["rft 1"])
    assert "NaN" not in (tmp_path / "out/metrics.jsonl").read_text()
    for report in reports:
        assert report["objective"] == pytest.approx(report["reward"] - 0.1 * report["kl"], abs=1e-4)
        assert (abs(report["kl"]) < 1e-4) == (report["when"] == "before")


@pytest.mark.parametrize("which, stop", [("last", 6), ("all", 8)])
def test_a_second_round_also_of_a_resumed_run(which, stop, inputs, folder, tmp_path, monkeypatch):
    """A reward fitted afresh would forget, a moving reference let the policy walk away. Stopped in step 6, of
    round 2's reward, or 8, of its policy, a run ends with the same weights. Killed: see test_folder.py."""
    preferences = write_jsonl(tmp_path / "p.jsonl", PREFERENCES)
    flags = f"{inputs} --rounds 2 --reward-pairs {which} --preferences {preferences} --baseline none {FAST}"
    loads, fits, steps = [spy(monkeypatch, name) for name in ("load_reward", "fit_reward", "improve_policy")]
    irft_run(f"{flags} --out {tmp_path}/whole")
    assert [str(path) for path, *_ in loads] == [folder, folder, f"{tmp_path}/whole/round_1/reward"]
    (_, first, *_), (_, second, *_) = fits
    assert len(first) == 6 and second[6:] == (first if which == "all" else []) and first != second[:6]
    assert [len(others) for _, _, others, *_ in fits] == [2, 2]
    for _, reference, *_ in steps:
        assert all(map(torch.equal, reference.parameters(), tiny_model().parameters()))
    spy(monkeypatch, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        irft_run(f"{flags} --out {tmp_path}/stopped")
    monkeypatch.undo()
    assert (tmp_path / "stopped/round_1").exists() and not (tmp_path / "stopped/round_2").exists()
    irft_run(f"--resume {tmp_path}/stopped")
    for saved in ("round_1", "round_1/reward", "round_2", "round_2/reward"):
        assert weights(tmp_path / "whole" / saved) == weights(tmp_path / "stopped" / saved)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--group-size 1", "at least 2"),
        ("--reward-loss linear --reward-penalty 0", "falls for ever"),
        ("--scale 0.5", "--scale belongs to --method irft"),
        ("--method irft --kl 0.5", "--kl belongs to --method rft"),
        ("--kl -1", "--kl -1.0: must be above 0, or 0"),
        ("--method irft --chunks 7", "only 6 demonstrations"),
        ("--lora-rank 2", "no linear layers"),
        ("--reward-model TOKENIZER", "its tokenizer differs"),
        ("--reward-model WEIGHTS", "weights are missing: model.layers.2."),
    ],
)
def test_a_mistake_costs_no_samples(flags, says, inputs, folder, tmp_path, monkeypatch, capsys):
    """One sentence and exit code 2, before a round is sampled that would be lost. And --out stays free."""
    for fault in ("TOKENIZER", "WEIGHTS"):
        shutil.copytree(folder, tmp_path / fault)
    file = tmp_path / "TOKENIZER" / "tokenizer.json"  # in which y and z change places
    file.write_text(file.read_text().replace('"y"', '"new"').replace('"z"', '"y"').replace('"new"', '"z"'))
    file = tmp_path / "WEIGHTS" / "config.json"  # which promises a third layer
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    monkeypatch.setattr(irft, "linear_layers", lambda model: [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        irft_run(f"{inputs} --out out {flags}")
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- LoRA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, layers", [("llama", 7), ("phi3", 4), ("gpt2", 4)])  # plain, fused, Conv1D
def test_lora_starts_as_the_model_itself_and_merges_into_it(kind, layers):
    """An adapter that is not zero at first would make policy and reference disagree; half a fused layer must
    not stay untrained. Merged, it must do what it did. A resumed run draws A anew: from the seed."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 300, "initializer_range": 0.2, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    pairs = [([5, 6], [7, 8, 1])]
    before, names, drawn = irft.response_logps(model, pairs), set(model.state_dict()), []
    for seed in ("another", "a seed", "a seed"):
        irft.merge_lora(model)
        irft.add_lora(model, 3, seed)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        drawn.append(next(iter(trained.values())).clone())
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(irft.response_logps(model, pairs), before)
    assert len(trained) == 2 * layers * 2 and all(name.endswith((".a", ".b")) for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):
        irft.response_logps(model, pairs).sum().backward()
        optimizer.step()
    adapted = irft.response_logps(model, pairs)
    assert (adapted - before).abs() > 0.1
    irft.merge_lora(model)
    merged = irft.response_logps(model, pairs)  # W x + A B x and (W + A B) x round differently
    assert torch.allclose(merged, adapted, rtol=1e-4, atol=1e-3)
    assert set(model.state_dict()) == names and all(weight.requires_grad for weight in model.parameters())
