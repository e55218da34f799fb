"""irft.py: the reward, the policy steps, LoRA, whole runs. What it shares with gsil.py is tested there."""

import ast
import copy
import json
import math
import multiprocessing
import signal
from functools import partial

import pytest
import torch
from conftest import ROOT, byte_tokenizer, tiny_model
from helpers import (
    EOS,
    PAIRS,
    A,
    Q,
    assistant,
    commands,
    gradient,
    made_pairs,
    metrics,
    read_jsonl,
    relative,
    toy_flags,
    user,
    weights,
    write_jsonl,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import gsil
import irft

OWN = {"parse_args", "main"}


def functions(module):
    """name -> source text of a script's top-level functions and classes."""
    text = (ROOT / f"{module.__name__}.py").read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in found}


def test_what_both_scripts_need_is_the_same_text():
    """`diff gsil.py irft.py` must show the methods' difference; a fix in one file only would hide in it."""
    ours, theirs = functions(irft), functions(gsil)
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == OWN
    assert set(theirs) - set(ours) == {"tangent_exp", "gsil_loss"}


def args_for(flags=""):
    return irft.parse_args(["--data", "x.jsonl", "--out", "unused", *flags.split()])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model whose tokenizer pads with EOS, on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reward_model(folder):
    """A reward with a head that is not zero, so that its rewards differ."""
    model, tokenizer = irft.load_reward(folder, {EOS, 2}, args_for())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return model, tokenizer


def refused(call, capsys):
    """The sentence with which it ends, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- the reward --------------------------------------------------------------------------------------------


def test_reward_is_that_of_the_last_response_token_alone(reward_model):
    """A reward that depended on padding or on its neighbours would differ between fit and use. fp32 sums in
    another order: 1e-4 of rewards of about 1 to 10."""
    model, _ = reward_model
    with torch.no_grad():
        together = irft.reward(model, PAIRS)
        for (prompt, response), r in zip(PAIRS, together):
            hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
            assert r.item() == pytest.approx(model.score(hidden)[0, -1, 0].item(), rel=1e-4, abs=1e-4)
            alone = irft.reward(model, [(prompt, response)])
            assert r.item() == pytest.approx(alone.item(), rel=1e-4, abs=1e-4)
    found = irft.score(model, PAIRS, 12, irft.reward)
    assert found == pytest.approx(together.tolist(), rel=1e-4, abs=1e-4)


def test_a_saved_reward_is_an_ordinary_classifier(reward_model, tmp_path):
    """transformers looks for the last token that is no pad. Here the policy pads with EOS: had the reward
    done so too, others would read it one token early, wherever a response ends."""
    model, tokenizer = reward_model
    irft.save_model(model, tokenizer, tmp_path / "reward")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    pad = AutoTokenizer.from_pretrained(tmp_path / "reward").pad_token_id
    assert pad == loaded.config.pad_token_id and pad not in (EOS, 2)
    ids = [torch.tensor(prompt + response) for prompt, response in PAIRS]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    with torch.no_grad():
        theirs = loaded(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
        assert torch.allclose(theirs, irft.reward(model, PAIRS), rtol=1e-4, atol=1e-4)


def test_a_new_head_starts_at_zero_and_a_trained_one_is_kept(folder, reward_model, tmp_path):
    """A random head would make the first policy steps chase noise; a zeroed one would lose past rounds."""
    model, _ = irft.load_reward(folder, {EOS}, args_for())
    assert irft.reward(model, PAIRS).tolist() == [0, 0, 0]
    irft.save_model(*reward_model, tmp_path / "reward")
    again, _ = irft.load_reward(tmp_path / "reward", {EOS}, args_for())
    assert torch.equal(again.score.weight, reward_model[0].score.weight)


def bad_reward(kind, path):
    """A folder that cannot serve as --reward-model, and what must be said about it."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    if kind == "another tokenizer":
        tokenizer = byte_tokenizer(merges=[("a", "b")])
        saved = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
        assert saved.keys() > byte_tokenizer().get_vocab().keys()
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens("more")
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        inner["model"]["vocab"]["y"], inner["model"]["vocab"]["z"] = (
            inner["model"]["vocab"]["z"],
            inner["model"]["vocab"]["y"],
        )
        tokenizer.save_pretrained(path)
        (path / "tokenizer.json").write_text(json.dumps(inner))
    if kind == "two labels":
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(model.config)
    if kind == "no classifier":
        shape = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        model = MambaForCausalLM(MambaConfig(**shape))
    kept = {name: w for name, w in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(path, state_dict=kept if kind == "half the weights" else None)
    if kind != "another tokenizer":
        tokenizer.save_pretrained(path)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("another tokenizer", "its tokenizer differs"),
        ("two labels", "2 labels, a reward is one: train one with num_labels=1"),
        ("no classifier", "no classifier can be loaded"),
        ("half the weights", "weights are missing: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_reward_model_that_cannot_work_costs_no_samples(kind, says, folder, small, tmp_path, capsys):
    """It is needed once a round has been sampled: a mistake must be found before, and not block --out."""
    (tmp_path / "reward").mkdir()
    bad_reward(kind, tmp_path / "reward")
    flags = f"{toy_flags(small, tmp_path / 'out')} --model {folder} --reward-model {tmp_path}/reward"
    error = refused(lambda: irft.main(irft.parse_args(flags.split())), capsys)
    assert error.startswith("error: ") and says in error and not (tmp_path / "out").exists()


def fit(model, flags, preferences=(), pairs=None):
    """Reward steps on a copy of the model; the copy and the records."""
    model = copy.deepcopy(model)
    pairs = pairs or made_pairs(tiny_model(), 8)
    return model, list(irft.fit_reward(model, pairs, list(preferences), args_for(flags), "0 round 1"))


@pytest.mark.parametrize("flags", ["", "--reward-loss linear"])
def test_the_reward_learns_to_tell_real_from_generated(flags, folder):
    """A sign error would turn this around."""
    model, _ = irft.load_reward(folder, {EOS}, args_for())
    _, records = fit(model, f"--reward-steps 24 --reward-lr 1e-2 {flags}")
    assert [record["step"] for record in records] == [*range(1, 25)]
    assert records[0]["told_apart"] == 0.5 and records[0]["margin"] == 0  # ties count half
    assert records[-1]["told_apart"] == 1 and records[-1]["margin"] > 1


def test_the_penalty_keeps_rewards_small(folder):
    """The linear loss falls for ever; what holds it is the penalty."""
    model, _ = irft.load_reward(folder, {EOS}, args_for())
    flags = "--reward-loss linear --reward-steps 24 --reward-lr 1e-2 --reward-penalty"
    margins = [fit(model, f"{flags} {c}")[1][-1]["margin"] for c in (0.01, 1)]
    assert margins[1] < min(2, margins[0] / 3)  # c = 1: at best r = +-1/2


def test_preferences_join_with_their_weight(reward_model, monkeypatch):
    """The gradient is that of the pairs plus weight times that of the preferences, in parts of any size."""

    preferences = made_pairs(tiny_model(), 5, seed=1)

    def gradient_of(flags, pairs=None, others=preferences):
        found = []
        monkeypatch.setattr(irft, "clip_gradients", lambda optimizer, limit: 1.0)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: found.append(gradient(model[0])))
        model = [None]
        whole = irft.prepare
        monkeypatch.setattr(
            irft, "prepare", lambda m, *a, **k: (model.__setitem__(0, m.base_model), whole(m, *a, **k))
        )
        fit(reward_model[0], f"--reward-steps 1 {flags}", others, pairs)
        monkeypatch.undo()
        return found[0]

    none, half, one = (gradient_of(f"--preference-weight {weight}") for weight in (0, 0.5, 1))
    assert relative(half, none) > 1e-2
    assert relative(one - none, 2 * (half - none)) < 1e-4  # sums in fp32
    assert relative(one - none, gradient_of("", preferences, ())) < 1e-4  # as if they were the pairs
    assert relative(gradient_of("--preference-weight 1 --micro-batch 40"), one) < 1e-4


PREFERENCES = {
    "with a prompt": {"prompt": Q, "chosen": A, "rejected": "no"},
    "messages": {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant("no")]},
    "prompt and messages": {"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant("no")]},
    "HH transcripts": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: no",
    },
}


def preferences_of(path, tokenizer, room=200):
    make = partial(irft.make_preference, tokenizer=tokenizer, eos_ids={EOS}, room=room)
    return irft.read_demos(str(path), "train", make)


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_format_gives_the_same_pair(name, tokenizer, tmp_path):
    """chosen/rejected, with or without a prompt; the sides must not be swapped."""
    (pair,) = preferences_of(write_jsonl(tmp_path / "p.jsonl", [PREFERENCES[name]]), tokenizer)
    assert tokenizer.decode(pair["real_ids"]) == A + "</s>"
    assert tokenizer.decode(pair["generated_ids"]) == "no</s>"
    assert tokenizer.decode(pair["prompt_ids"]) == f"<|user|>\n{Q}</s>\n<|assistant|>\n"


HH = PREFERENCES["HH transcripts"]
OTHER = HH | {"rejected": HH["rejected"].replace(Q, "Why?")}


@pytest.mark.parametrize(
    "row, says",
    [
        (OTHER, "answer different prompts"),
        ({"prompt": Q, "chosen": A}, "rejected"),
        ({"prompt": Q, "chosen": A, "rejected": "no" * 200}, "longer than the model's window of 200"),
    ],
)
def test_preferences_that_cannot_be_compared_are_left_out_and_counted(row, says, tokenizer, tmp_path, capsys):
    """One in a file is left out with its place; a file of such rows is refused, before anything is sampled."""
    mixed = write_jsonl(tmp_path / "p.jsonl", [*[HH] * 10, row])
    assert len(preferences_of(mixed, tokenizer)) == 10
    said = capsys.readouterr().out
    assert "warning: 1 of 11 rows" in said and "p.jsonl line 11" in said and says in said
    bad = write_jsonl(tmp_path / "q.jsonl", [row])
    assert "q.jsonl line 1" in refused(lambda: preferences_of(bad, tokenizer), capsys)


# ---- the policy --------------------------------------------------------------------------------------------


def improve(reward_model, flags, monkeypatch):
    """Policy steps of the tiny model; the policy, the records, and the arguments clipped_loss was given."""
    policy, calls, whole = tiny_model(), [], irft.clipped_loss
    args = args_for(f"--policy-batch 4 {flags}")
    demos = [{"prompt_ids": prompt} for prompt, _ in PAIRS * 2]  # 6: a step takes 4 of them
    length = 1 if "--one-token" in flags else 6
    respond = partial(irft.sample, eos_ids={EOS}, max_new_tokens=length, batch_size=256)
    monkeypatch.setattr(irft, "clipped_loss", lambda *a: (calls.append(a), whole(*a))[1])
    steps = irft.improve_policy(policy, tiny_model(), reward_model[0], demos, respond, args, "0")
    return policy, list(steps), calls


def test_the_ratio_is_one_at_the_first_inner_step(reward_model, monkeypatch):
    """Else the log-probs of sampling and of training disagree, and every later ratio is off."""
    flags = "--policy-steps 2 --ppo-epochs 3 --micro-batch 60"
    _, _, calls = improve(reward_model, flags, monkeypatch)
    per_step = len(calls) // 6
    steps = [calls[i : i + per_step] for i in range(0, len(calls), per_step)]
    off = [max((new - old).abs().max().item() for new, old, _ in step) for step in steps]
    assert per_step > 1 and off[0] < 1e-4 and off[3] < 1e-4  # fp32 sums of log-probs of about -20
    assert min(off[1], off[2], off[4], off[5]) > 1e-3


def test_no_gradient_reaches_the_reward(reward_model, monkeypatch):
    """The policy must find better responses; it must not change what is thought of them."""
    before = copy.deepcopy(reward_model[0].state_dict())
    improve(reward_model, "--policy-steps 1", monkeypatch)
    assert all(parameter.grad is None for parameter in reward_model[0].parameters())
    assert all(torch.equal(before[name], value) for name, value in reward_model[0].state_dict().items())


def test_advantages_are_of_the_group(reward_model, monkeypatch):
    """Samples are laid out prompt by prompt; else a row would mix prompts and compare the unlike."""
    assert irft.advantages(torch.tensor([[1.0, 2, 6]])).tolist() == [[-3, -1.5, 4.5]]
    seen, asked, real = [], [], irft.sample
    monkeypatch.setattr(irft, "advantages", lambda r: (seen.append(r), r)[1])
    monkeypatch.setattr(irft, "sample", lambda model, *a, **k: (asked.append(a[0]), real(model, *a, **k))[1])
    improve(reward_model, "--policy-steps 1 --group-size 3", monkeypatch)
    assert seen[0].shape == (4, 3)
    assert all(asked[0][i] == asked[0][i + 1] == asked[0][i + 2] for i in range(0, 12, 3))


@pytest.mark.parametrize("kl", [0.5, 3])
def test_policy_steps_reach_the_closed_form(kl, reward_model, monkeypatch):
    """The optimum is pi_ref exp(r/kl) / Z. With reward 1 for words below 100 and else 0, their share q must
    become q e^(1/kl) / (q e^(1/kl) + 1 - q): neither sign, nor KL, nor its weight may be wrong."""
    # of responses of one token: the length of all is capped there
    monkeypatch.setattr(irft, "reward", lambda _, both: torch.tensor([float(r[0] < 100) for _, r in both]))
    whole = irft.sample
    short = lambda *a, **k: whole(*a, **k | {"max_new_tokens": 1})
    monkeypatch.setattr(irft, "sample", short)
    flags = f"--kl {kl} --policy-steps 24 --group-size 150 --policy-lr 1e-2"
    _, records, _ = improve(reward_model, flags, monkeypatch)
    with torch.no_grad():
        last = [tiny_model()(torch.tensor([prompt])).logits[0, -1] for prompt, _ in PAIRS]
    q = torch.stack([logits.softmax(-1)[:100].sum() for logits in last])
    tilted = q * math.exp(1 / kl)
    expected = (tilted / (tilted + 1 - q)).mean().item()
    found = [record["reward"] for record in records[-2:]]
    assert sum(found) / 2 == pytest.approx(expected, abs=0.06) and expected > q.mean() + 0.05


@pytest.mark.parametrize("sick, word", [({}, None), ({"kl": 6.0}, "runs away"), ({"long": 0.97}, "length")])
def test_each_warning_fires_on_its_sickness_alone(sick, word, small, tmp_path, monkeypatch, capsys):
    """A warning that fires on healthy runs is soon ignored; one that never fires protects nobody."""
    base = {"margin": 0.0, "told_apart": 0.5, "reward": 0.0, "length": 10.0}
    before = base | {"objective": 0.0, "kl": 0.0, "reward_length": sick.get("long", 0.3)}
    found = [before | {"objective": 0.5, "kl": sick.get("kl", 1.5)}, before]
    monkeypatch.setattr(irft, "compare", lambda *a: found.pop())
    run(small, tmp_path / "out", f"--baseline none {FAST}")
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warned) == (word is not None) and all(word in line for line in warned)


# ---- whole runs --------------------------------------------------------------------------------------------

FAST = "--reward-steps 4 --policy-steps 2 --policy-batch 4 --batch 8"


def run(small, out, flags):
    return irft.main(irft.parse_args([*toy_flags(small, out).split(), *flags.split()]))


def test_one_chunk_is_a_round_of_gsil_with_spin(small, tmp_path):
    """IRFT with T = 1 is SPIN: the same samples, the same steps, the same weights to the last digit."""
    run(small, tmp_path / "irft", "--method irft --baseline none")
    flags = f"{toy_flags(small, tmp_path / 'gsil')} --loss spin --baseline none"
    gsil.main(gsil.parse_args(flags.split()))
    ours, theirs = (tmp_path / script / "round_1" / "generated.jsonl" for script in ("irft", "gsil"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert weights(tmp_path / "irft" / "round_1") == weights(tmp_path / "gsil" / "round_1")


MODES = [
    "--reward-loss linear --ppo-epochs 2 --lora-rank 2",
    "--rounds 2 --reward-pairs all --temperature 0",
    "--preferences PREFERENCES --preference-weight 0.5",
    "--method irft --chunks 3",
    "--method irft --chunks 2 --loss linear --lora-rank 4",
]


@pytest.mark.parametrize("flags", MODES)
def test_end_to_end(flags, small, tmp_path):
    """Every mode must reach its table, with the rows and the files that design and README promise."""
    rows = read_jsonl(small / "dev.jsonl")
    preferences = [{"prompt": r["question"], "chosen": r["answer"], "rejected": "#### 1"} for r in rows]
    flags = flags.replace("PREFERENCES", str(write_jsonl(tmp_path / "p.jsonl", preferences)))
    summary = run(small, tmp_path / "out", flags if "irft" in flags else f"{flags} {FAST} --epochs 2")
    args = irft.parse_args([*flags.split(), "--out", "unused"])
    rounds = args.chunks if args.method == "irft" else args.rounds
    names = [f"{args.method} {t}" for t in range(1, rounds + 1)]
    assert [row["name"] for row in summary["rows"]] == ["base", *names, "sft"] and summary["best"] in names
    for t in range(1, rounds + 1):
        irft.load_model(tmp_path / "out" / f"round_{t}", args)
        assert (tmp_path / "out" / f"round_{t}" / "reward").exists() == (args.method == "rft")
    reports = [record for record in metrics(tmp_path / "out") if "when" in record]
    if args.method == "rft":
        assert len(reports) == 2 * rounds and abs(reports[0]["kl"]) < 1e-4
        for key in ("margin", "told_apart", "reward", "kl", "length", "reward_length", "objective"):
            assert all(math.isfinite(report[key]) for report in reports)


def test_chunks_share_out_the_demonstrations(small, tmp_path):
    """Each demonstration is in one chunk: together they are one pass over the data."""
    run(small, tmp_path, "--method irft --chunks 3 --baseline none")
    chunks = [
        [pair["prompt"] for pair in read_jsonl(tmp_path / f"round_{t}" / "generated.jsonl")]
        for t in (1, 2, 3)
    ]
    assert sorted(map(len, chunks)) == [13, 13, 14]
    assert len({prompt for chunk in chunks for prompt in chunk}) == 40


def test_the_reward_continues_and_the_kl_stays_with_the_start(small, tmp_path, monkeypatch):
    """A reward fitted afresh each round would forget; a moving reference would let the policy walk away."""
    loaded, started, whole, improved = [], [], irft.load_reward, irft.improve_policy
    monkeypatch.setattr(irft, "load_reward", lambda path, *a: loaded.append(str(path)) or whole(path, *a))

    def spy(policy, reference, *rest):
        started.append(copy.deepcopy(reference.state_dict()))
        return improved(policy, reference, *rest)

    monkeypatch.setattr(irft, "improve_policy", spy)
    run(small, tmp_path / "out", f"--rounds 2 --baseline none {FAST}")
    base = str(ROOT / "tests/toy/base")
    assert loaded == [base, base, str(tmp_path / "out" / "round_1" / "reward")]  # the first: looked at early
    start = tiny_state(base)
    assert all(torch.equal(start[name], reference[name]) for reference in started for name in start)


def tiny_state(path):
    return irft.load_model(path, args_for()).state_dict()


@pytest.mark.parametrize("which, sizes", [("last", [40, 40]), ("all", [40, 80])])
def test_reward_pairs_of_the_last_or_of_all_rounds(which, sizes, small, tmp_path, monkeypatch):
    """With all, the reward of round 2 knows what round 1's policy wrote; with last, it may turn around."""
    seen, fit_reward = [], irft.fit_reward
    monkeypatch.setattr(
        irft, "fit_reward", lambda model, pairs, *a: seen.append(pairs) or fit_reward(model, pairs, *a)
    )
    run(small, tmp_path, f"--rounds 2 --reward-pairs {which} --baseline none {FAST}")
    assert [len(pairs) for pairs in seen] == sizes
    assert [pair["generated_ids"] for pair in seen[0]] != [pair["generated_ids"] for pair in seen[1][:40]]


def until_held(flags, folder, step, threads):
    """A run that makes a file at that optimizer step, and waits to be killed."""
    torch.set_num_threads(threads)
    calls, update = [], irft.update

    def waits(*args):
        calls.append(1)
        if len(calls) == step:
            (folder / "now").touch()
            signal.pause()
        return update(*args)

    irft.update = waits
    irft.main(irft.parse_args(flags.split()))


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """The flags and the folder of a run of two rounds that nothing stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    flags = f"{inputs} --rounds 2 --reward-steps 2 --policy-steps 2 --policy-batch 2 --group-size 2 --batch 4"
    flags += " --baseline none"
    irft.main(irft.parse_args(f"{flags} --out {out}".split()))
    return flags, out


@pytest.mark.parametrize("part, step", [("reward", 6), ("policy", 8)])  # the second of round 2
def test_kill_9_and_resume(part, step, undisturbed, tmp_path):
    """Killed in round 2's reward or policy steps, a run goes on from round 1's weights and round 2's samples,
    and ends with the weights of an undisturbed run."""
    flags, whole = undisturbed
    out = tmp_path / "out"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["irft"])
    inputs = (f"{flags} --out {out}", tmp_path, step, torch.get_num_threads())
    process = server.Process(target=until_held, args=inputs)
    process.start()
    while process.is_alive() and not (tmp_path / "now").exists():
        process.join(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (out / "round_2").exists()
    irft.main(irft.parse_args(["--resume", str(out)]))
    for saved in ("round_1", "round_1/reward", "round_2", "round_2/reward"):
        assert weights(whole / saved) == weights(out / saved)
    assert metrics(whole) == metrics(out)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--group-size 1", "at least 2"),
        ("--reward-loss linear --reward-penalty 0", "falls for ever"),
        ("--scale 0.5", "--scale belongs to --method irft"),
        ("--method irft --kl 0.5", "--kl belongs to --method rft"),
        ("--kl -1", "--kl -1.0: must be above 0, or 0"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(flags, word, capsys):
    """One sample per prompt has nothing to be compared with. Exit code 2, before anything is read."""
    assert word in refused(lambda: irft.parse_args(flags.split()), capsys)


def test_more_chunks_than_demonstrations(small, tmp_path, capsys):
    """The last chunks would be empty, which is found before the first is sampled."""
    error = refused(lambda: run(small, tmp_path / "out", "--method irft --chunks 41"), capsys)
    assert "only 40 demonstrations" in error and not (tmp_path / "out").exists()


# ---- LoRA --------------------------------------------------------------------------------------------------


def lora_model(kind):
    """Tiny models whose linear layers are seven plain ones, fused, or GPT-2's Conv1D, and how many in a block."""
    torch.manual_seed(0)
    if kind == "GPT-2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, **shape)).eval(), 4
    if kind == "Phi-3":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Phi3Config(vocab_size=300, pad_token_id=None, initializer_range=0.2, **shape)
        return Phi3ForCausalLM(config).eval(), 4
    return tiny_model(), 7


@pytest.mark.parametrize("kind", ["Llama", "Phi-3", "GPT-2"])
def test_lora_starts_as_the_model_itself_and_merges_into_it(kind):
    """Samples and reference log-probs are taken before the first step: an adapter that is not zero would make
    policy and reference disagree. After training, the merged matrix must do what the adapted one did, and
    half a fused layer must not stay untrained."""
    model, linear_per_block = lora_model(kind)
    pairs = [([5, 6], [7, 8, 1])]
    before, names = irft.response_logps(model, pairs), set(model.state_dict())
    irft.add_lora(model, 3, "a seed")
    assert torch.equal(irft.response_logps(model, pairs), before)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * linear_per_block * 2 and all(name.endswith((".a", ".b")) for name in trained)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        irft.response_logps(model, pairs).sum().backward()
        optimizer.step()
    adapted = irft.response_logps(model, pairs)
    assert (adapted - before).abs() > 0.1
    irft.merge_lora(model)
    # W x + A B x and (W + A B) x round differently: 1e-4 of what was learned
    assert torch.allclose(irft.response_logps(model, pairs), adapted, rtol=1e-4, atol=1e-3)
    assert set(model.state_dict()) == names and all(weight.requires_grad for weight in model.parameters())


def test_lora_is_the_same_again():
    """A resumed run draws A anew: from the seed, or it would not go on as it was."""
    first, second, other = (tiny_model() for _ in range(3))
    for model, seed in ((first, "0"), (second, "0"), (other, "1")):
        irft.add_lora(model, 2, seed)
    name = "model.layers.0.mlp.up_proj.a"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_lora_with_nothing_to_adapt_leaves_no_folder(small, tmp_path, monkeypatch, capsys):
    """Found once the first round was sampled, it would have cost the samples."""
    monkeypatch.setattr(irft, "linear_layers", lambda model: [])
    error = refused(lambda: run(small, tmp_path / "out", "--lora-rank 2"), capsys)
    assert "no linear layers" in error and not (tmp_path / "out").exists()


def test_readme_commands_parse():
    """A README command that does not run is the first thing a newcomer meets."""
    found = commands("irft.py")
    assert len(found) >= 3
    for flags in found:
        irft.parse_args([*flags.split(), "--out", "unused"])
