"""irft.py: the reward model, the policy steps, whole runs. What it shares with gsil.py is tested there."""

import ast
import copy
import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import gsil
import irft
from conftest import ROOT, byte_tokenizer, tiny_model
from helpers import (A, EOS, PAIRS, Q, assistant, commands, made_pairs, metrics,  # noqa: F401
                       user, weights, write_jsonl)

OWN = {"parse_args", "main", "complete"}  # and LoRA is in irft.py alone


def functions(module):
    """name -> source text of a script's top-level functions."""
    text = (ROOT / f"{module.__name__}.py").read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) for node in found}


def test_what_both_scripts_need_is_the_same_text():
    """`diff gsil.py irft.py` must show the methods' difference; a fix in one file only would hide in it."""
    ours, theirs = functions(irft), functions(gsil)
    assert {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]} == OWN
    assert set(theirs) - set(ours) == {"tangent_exp"}


def args_for(flags=""):
    return irft.parse_args(["--data", "x.jsonl", *flags.split()])


def run_for(model_path, flags="", tokenizer=None):
    """What start() would return, for the functions that need a few of its fields."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_path)
    fields = {"tokenizer": tokenizer, "eos_ids": {EOS, 2}, "window": math.inf, "device": "cpu"}
    return SimpleNamespace(**vars(args_for(flags)) | {"model": str(model_path)} | fields)


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
    model, tokenizer = irft.load_reward(folder, run_for(folder))
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return model, tokenizer


# ---- the reward --------------------------------------------------------------------------------------------


def test_reward_is_that_of_the_last_response_token_alone(reward_model):
    """A reward that depended on padding or on its neighbours would differ between fit and use."""
    model, _ = reward_model
    with torch.no_grad():
        together = irft.reward(model, PAIRS)
        for (prompt, response), r in zip(PAIRS, together):
            hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
            assert torch.allclose(model.score(hidden)[0, -1, 0], r, atol=1e-5)
            assert torch.allclose(irft.reward(model, [(prompt, response)])[0], r, atol=1e-5)
    found = irft.score(irft.reward, model, PAIRS, args_for("--sample-batch 2"))
    assert found == pytest.approx(together.tolist(), abs=1e-5)


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
        assert torch.allclose(theirs, irft.reward(model, PAIRS), atol=1e-5)


def test_a_new_head_starts_at_zero_and_a_trained_one_is_kept(folder, reward_model, tmp_path):
    """A random head would make the first policy steps chase noise; a zeroed one would lose past rounds."""
    model, _ = irft.load_reward(folder, run_for(folder))
    assert irft.reward(model, PAIRS).tolist() == [0, 0, 0]
    irft.save_model(*reward_model, tmp_path / "reward")
    again, _ = irft.load_reward(tmp_path / "reward", run_for(folder))
    assert torch.equal(again.score.weight, reward_model[0].score.weight)


def test_another_tokenizer_is_an_error(folder, tmp_path, capsys):
    """Ids of the policy mean other words to a reward model with another tokenizer."""
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer(merges=[("a", "b")]).save_pretrained(tmp_path)
    wide = byte_tokenizer(merges=[("a", "b"), ("c", "d")])
    with pytest.raises(SystemExit) as stop:
        irft.load_reward(tmp_path, run_for(folder, tokenizer=wide))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "tokenizer differs" in error and "Traceback" not in error


def test_a_reward_model_with_missing_weights_is_an_error(tmp_path, capsys):
    """Half of a model would be random: its reward would be noise, and nothing would say so."""
    model = tiny_model()
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        irft.load_reward(tmp_path, run_for(tmp_path))
    assert stop.value.code == 2 and "lacks the weights" in capsys.readouterr().err


def fit(model, flags, preferences=(), pairs=None):
    """Reward steps on a copy of the model; the copy and the records."""
    model = copy.deepcopy(model)
    pairs = pairs or made_pairs(tiny_model(), 8)
    records = list(irft.fit_reward(model, pairs, list(preferences), args_for(flags), "rft 1", "0 round 1"))
    return model, records


@pytest.mark.parametrize("flags", ["", "--reward-loss linear"])
def test_the_reward_learns_to_tell_real_from_generated(flags, folder):
    """A sign error would turn this around."""
    model, _ = irft.load_reward(folder, run_for(folder))
    _, records = fit(model, f"--reward-steps 48 --reward-lr 1e-2 {flags}")
    assert records[0]["reward_step"] == 16 and records[-1]["reward_step"] == 48
    assert records[-1]["accuracy"] == 1 and records[-1]["margin"] > 1


def test_the_penalty_keeps_rewards_small(folder):
    """The linear loss falls for ever; what holds it is the penalty."""
    model, _ = irft.load_reward(folder, run_for(folder))
    margins = [
        fit(model, f"--reward-loss linear --reward-lr 1e-2 --reward-penalty {c}")[1][-1]["margin"]
        for c in (0.01, 1)
    ]
    assert margins[1] < min(2, margins[0] / 3)  # c = 1: at best r = +-1/2


def test_frozen_layers_do_not_move(folder):
    """--freeze-layers 0.5 of two layers: the first stays, the second and the head learn."""
    model, _ = irft.load_reward(folder, run_for(folder, "--freeze-layers 0.5"))
    after, _ = fit(model, "--reward-steps 4")
    moved = {
        name
        for (name, old), new in zip(model.named_parameters(), after.parameters())
        if not torch.equal(old, new)
    }
    assert not any(name.startswith("model.layers.0.") for name in moved)
    assert "score.weight" in moved and "model.layers.1.mlp.up_proj.weight" in moved


def test_preferences_join_with_their_weight(reward_model, monkeypatch):
    """The gradient is that of the pairs plus weight times that of the preferences, for any micro-batch."""
    gradients = {}

    def gradient(flags):
        def spy(parameters, clip):
            gradients[flags] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            return torch.tensor(1.0)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        fit(reward_model[0], f"--reward-steps 1 {flags}", made_pairs(tiny_model(), 5, seed=1))
        return gradients[flags]

    none, half, one = (gradient(f"--preference-weight {weight}") for weight in (0, 0.5, 1))
    assert (half - none).abs().max() > 1e-4
    assert torch.allclose(one - none, 2 * (half - none), atol=1e-5)
    assert torch.allclose(one, gradient("--preference-weight 1 --micro-batch 3"), atol=1e-5)


PREFERENCES = {
    "with a prompt": {"prompt": Q, "chosen": A, "rejected": "no"},
    "messages": {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant("no")]},
    "prompt and messages": {"prompt": Q, "chosen": [assistant(A)], "rejected": [assistant("no")]},
    "HH transcripts": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: no",
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_format_gives_the_same_pair(name, folder, tmp_path):
    """chosen/rejected, with or without a prompt; the sides must not be swapped."""
    run = run_for(folder)
    path = write_jsonl(tmp_path / "p.jsonl", [PREFERENCES[name]])
    (pair,) = irft.read_preferences(str(path), run)
    assert run.tokenizer.decode(pair["real_ids"]) == A + "</s>"
    assert run.tokenizer.decode(pair["generated_ids"]) == "no</s>"
    assert run.tokenizer.decode(pair["prompt_ids"]) == f"<|user|>\n{Q}</s>\n<|assistant|>\n"


def test_preferences_about_two_prompts_are_left_out_and_counted(folder, tmp_path, capsys):
    """Their rewards cannot be compared; some transcripts of Anthropic-HH are like that."""
    row = PREFERENCES["HH transcripts"]
    other = row | {"rejected": row["rejected"].replace(Q, "Why?")}
    run = run_for(folder)
    pairs = irft.read_preferences(str(write_jsonl(tmp_path / "p.jsonl", [row, other])), run)
    assert len(pairs) == 1 and "1 preferences; 1 left out" in capsys.readouterr().out


def test_preferences_without_a_rejected_side(folder, tmp_path, capsys):
    """A file of demonstrations is not one of preferences: one sentence with the place."""
    run = run_for(folder)
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": Q, "chosen": A}])
    with pytest.raises(SystemExit) as stop:
        irft.read_preferences(str(path), run)
    assert stop.value.code == 2 and "line 1: preferences have the columns" in capsys.readouterr().err


# ---- the policy --------------------------------------------------------------------------------------------


def improve(folder, reward_model, flags, monkeypatch):
    """Policy steps of the tiny model; the policy, the records, and the arguments policy_losses was given."""
    policy, calls, whole = tiny_model(), [], irft.policy_losses
    run = run_for(folder, f"--policy-batch 4 --max-new-tokens 6 {flags}")
    run.demos = [{"prompt_ids": prompt} for prompt, _ in PAIRS * 2]  # 6: a step takes 4 of them
    monkeypatch.setattr(irft, "policy_losses", lambda *a: (calls.append(a), whole(*a))[1])
    records = list(irft.improve_policy(policy, tiny_model(), reward_model[0], run, "rft 1", "0"))
    return policy, records, calls


def test_the_ratio_is_one_at_the_first_inner_step(folder, reward_model, monkeypatch):
    """Else the log-probs of sampling and of training disagree, and every later ratio is off."""
    flags = "--policy-steps 2 --ppo-epochs 3 --micro-batch 5"
    _, _, calls = improve(folder, reward_model, flags, monkeypatch)
    steps = [calls[i : i + 4] for i in range(0, len(calls), 4)]  # 16 samples: 5 + 5 + 5 + 1
    off = [max((new - old).abs().max().item() for new, old, *_ in step) for step in steps]
    assert len(off) == 6 and off[0] < 1e-4 and off[3] < 1e-4 and min(off[1], off[2], off[4], off[5]) > 1e-4


def test_no_gradient_reaches_the_reward(folder, reward_model, monkeypatch):
    """The policy must find better responses; it must not change what is thought of them."""
    before = copy.deepcopy(reward_model[0].state_dict())
    _, _, calls = improve(folder, reward_model, "--policy-steps 1", monkeypatch)
    assert all(parameter.grad is None for parameter in reward_model[0].parameters())
    assert all(torch.equal(before[name], value) for name, value in reward_model[0].state_dict().items())
    logps, old_logps, gains, _ = calls[0]
    assert logps.requires_grad and not old_logps.requires_grad and not gains.requires_grad


def test_advantages_are_of_the_group(folder, reward_model, monkeypatch):
    """Samples are laid out prompt by prompt; else a row would mix prompts and compare the unlike."""
    assert irft.advantages(torch.tensor([[1.0, 2, 6]])).tolist() == [[-3, -1.5, 4.5]]
    seen = []
    monkeypatch.setattr(irft, "advantages", lambda r: (seen.append(r), r)[1])
    asked = []
    real = irft.sample
    monkeypatch.setattr(irft, "sample", lambda model, *a: (asked.append(a[0]), real(model, *a))[1])
    improve(folder, reward_model, "--policy-steps 1 --group-size 3", monkeypatch)
    assert seen[0].shape == (4, 3)
    assert all(asked[0][i] == asked[0][i + 1] == asked[0][i + 2] for i in range(0, 12, 3))


@pytest.mark.parametrize("kl", [0.5, 3])
def test_policy_steps_reach_the_closed_form(kl, folder, reward_model, monkeypatch):
    """The optimum is pi_ref exp(r/kl) / Z. With reward 1 for words below 100 and else 0, their share q must
    become q e^(1/kl) / (q e^(1/kl) + 1 - q): neither sign, nor KL, nor its weight may be wrong."""
    monkeypatch.setattr(irft, "reward", lambda _, both: torch.tensor([float(r[0] < 100) for _, r in both]))
    flags = f"--kl {kl} --policy-steps 32 --group-size 200 --policy-lr 1e-2 --max-new-tokens 1"
    _, records, _ = improve(folder, reward_model, flags, monkeypatch)
    with torch.no_grad():
        last = [tiny_model()(torch.tensor([prompt])).logits[0, -1] for prompt, _ in PAIRS]
    q = torch.stack([logits.softmax(-1)[:100].sum() for logits in last])
    tilted = q * math.exp(1 / kl)
    expected = (tilted / (tilted + 1 - q)).mean().item()
    found = [record["reward"] for record in records[-2:]]
    assert sum(found) / 2 == pytest.approx(expected, abs=0.06) and expected > q.mean() + 0.05


@pytest.mark.parametrize(
    "sick, word",
    [({}, None), ({"kl": 6.0}, "runs away"), ({"objective": -1.0}, "runs away"), ({"long": 0.97}, "length")],
)
def test_each_reward_warning_fires_on_its_sickness_alone(sick, word):
    """A warning that fires on healthy runs is soon ignored."""
    before = {"objective": 0.0, "reward_length": sick.get("long", 0.3)}
    after = {"objective": sick.get("objective", 0.5), "kl": sick.get("kl", 1.5), "length": 10.0}
    found = irft.reward_warnings(before, after)
    assert len(found) == (word is not None) and all(word in sentence for sentence in found)


# ---- whole runs --------------------------------------------------------------------------------------------

FAST = "--reward-steps 4 --policy-steps 2 --policy-batch 4 --batch 8"


def run(small, out, flags):  # noqa: F811
    inputs = f"--data {small}/demos.jsonl --dev {small}/dev.jsonl --heldout {small}/heldout.jsonl --out {out}"
    return irft.main(irft.parse_args([*inputs.split(), *flags.split()]))


def test_one_chunk_is_a_round_of_gsil_with_spin(small, tmp_path):  # noqa: F811
    """IRFT with T = 1 is SPIN: the same samples, the same steps, the same weights to the last digit."""
    run(small, tmp_path / "irft", "--method irft --baseline none")
    flags = f"--loss spin --baseline none --data {small}/demos.jsonl --out {tmp_path}/gsil"
    gsil.main(gsil.parse_args(flags.split()))
    ours, theirs = (tmp_path / script / "round_1" / "generated.jsonl" for script in ("irft", "gsil"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert weights(tmp_path / "irft" / "round_1") == weights(tmp_path / "gsil" / "round_1")


MODES = [
    "",
    "--reward-loss linear --ppo-epochs 2 --freeze-layers 0.5",
    "--rounds 2 --reward-pairs all --temperature 0",
    "--preferences PREFERENCES --preference-weight 0.5",
    "--method irft --chunks 3",
    "--method irft --chunks 2 --loss linear --steps-per-chunk 3 --lora-rank 4",
]


@pytest.mark.parametrize("flags", MODES)
def test_end_to_end(flags, small, tmp_path):  # noqa: F811
    """Every mode must reach its table, with the rows and the files that design and README promise."""
    rows = [json.loads(line) for line in (small / "dev.jsonl").read_text().splitlines()]
    preferences = [{"prompt": r["question"], "chosen": r["answer"], "rejected": "#### 1"} for r in rows]
    flags = flags.replace("PREFERENCES", str(write_jsonl(tmp_path / "p.jsonl", preferences)))
    fast = "" if "irft" in flags else FAST
    summary = run(small, tmp_path / "out", f"{flags} {fast}")
    args = irft.parse_args(flags.split())
    rounds = args.chunks if args.method == "irft" else args.rounds
    names = [f"{args.method} {t}" for t in range(1, rounds + 1)]
    assert [row["name"] for row in summary["rows"]] == ["base", *names, "sft"] and summary["best"] in names
    for t in range(1, rounds + 1):
        gsil.load_model(tmp_path / "out" / f"round_{t}", "cpu")
        assert (tmp_path / "out" / f"round_{t}" / "reward").exists() == (args.method == "rft")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if "when" in record]
    if args.method == "rft":
        assert len(reports) == 2 * rounds and abs(reports[0]["kl"]) < 1e-4
        for key in ("dev_margin", "dev_reward_accuracy", "reward", "kl", "length", "reward_length", "eos"):
            assert all(math.isfinite(report[key]) for report in reports)
    if args.steps_per_chunk:
        steps = [record["step"] for record in records if record["phase"] == "irft 1" and "step" in record]
        assert steps[-1] == 3


def test_chunks_share_out_the_demonstrations(small, tmp_path):  # noqa: F811
    """Each demonstration is in one chunk: together they are one pass over the data."""
    run(small, tmp_path, "--method irft --chunks 3 --baseline none")
    files = [tmp_path / f"round_{t}" / "generated.jsonl" for t in (1, 2, 3)]
    chunks = [[json.loads(line)["prompt"] for line in file.read_text().splitlines()] for file in files]
    assert sorted(map(len, chunks)) == [13, 13, 14]
    assert len({prompt for chunk in chunks for prompt in chunk}) == 40


def test_the_reward_continues_and_the_kl_stays_with_the_start(small, tmp_path, monkeypatch):  # noqa: F811
    """A reward fitted afresh each round would forget; a moving reference would let the policy walk away."""
    loaded, started, whole, improved = [], [], irft.load_reward, irft.improve_policy
    monkeypatch.setattr(irft, "load_reward", lambda path, run: loaded.append(str(path)) or whole(path, run))

    def spy(policy, start_policy, *rest):
        started.append(copy.deepcopy(start_policy.state_dict()))
        return improved(policy, start_policy, *rest)

    monkeypatch.setattr(irft, "improve_policy", spy)
    run(small, tmp_path, f"--rounds 2 --baseline none {FAST}")
    assert loaded == [str(ROOT / "tests/toy/base"), str(tmp_path / "round_1" / "reward")]
    base = gsil.load_model(ROOT / "tests/toy/base", "cpu").state_dict()
    assert all(torch.equal(base[name], start[name]) for start in started for name in base)


@pytest.mark.parametrize("which, sizes", [("last", [40, 40]), ("all", [40, 80])])
def test_reward_pairs_of_the_last_or_of_all_rounds(which, sizes, small, tmp_path, monkeypatch):  # noqa: F811
    """With all, the reward of round 2 knows what round 1's policy wrote; with last, it may turn around."""
    seen, fit_reward = [], irft.fit_reward

    def spy(model, pairs, *rest):
        seen.append(pairs)
        return fit_reward(model, pairs, *rest)

    monkeypatch.setattr(irft, "fit_reward", spy)
    run(small, tmp_path, f"--rounds 2 --reward-pairs {which} --baseline none {FAST}")
    assert [len(pairs) for pairs in seen] == sizes
    assert [pair["generated_ids"] for pair in seen[0]] != [pair["generated_ids"] for pair in seen[1][:40]]


def test_resume_after_a_stop_equals_an_undisturbed_run(small, tmp_path, monkeypatch):  # noqa: F811
    """Stopped in round 2's policy steps, a run goes on from round 1's weights and round 2's samples."""
    run(small, tmp_path / "whole", f"--rounds 2 --baseline none {FAST}")
    improved = irft.improve_policy

    def stops(policy, start_policy, reward_model, run, name, seed):
        for record in improved(policy, start_policy, reward_model, run, name, seed):
            yield record
            if name == "rft 2":
                raise KeyboardInterrupt

    monkeypatch.setattr(irft, "improve_policy", stops)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "cut", f"--rounds 2 --baseline none {FAST}")
    monkeypatch.setattr(irft, "improve_policy", improved)
    irft.main(irft.parse_args(["--resume", str(tmp_path / "cut")]))
    for part in ("round_1", "round_1/reward", "round_2", "round_2/reward"):
        assert weights(tmp_path / "whole" / part) == weights(tmp_path / "cut" / part)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--group-size 1", "at least 2"),
        ("--reward-loss linear --reward-penalty 0", "falls for ever"),
        ("--freeze-layers 1.5", "share of the layers"),
        ("--scale 0.5", "--scale belongs to --method irft"),
        ("--method irft --kl 0.5", "--kl belongs to --method rft"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(flags, word, capsys):
    """One sample per prompt has nothing to be compared with. Exit code 2, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        irft.parse_args(flags.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_more_chunks_than_demonstrations(small, tmp_path, capsys):  # noqa: F811
    """The last chunks would be empty, which is found before the first is sampled."""
    with pytest.raises(SystemExit) as stop:
        run(small, tmp_path, "--method irft --chunks 41")
    assert stop.value.code == 2 and "only 40 demonstrations" in capsys.readouterr().err


def test_sft_costs_at_least_what_rft_does():
    """A baseline with less compute would be a cheap victory; 3 forward passes are a response trained on."""
    flags = "--rounds 2 --reward-steps 8 --batch 4 --policy-steps 8 --policy-batch 3 --group-size 2"
    run = args_for(f"{flags} --samples-per-prompt 3 --ppo-epochs 2")
    run.demos, run.dev, run.preferences = [{}] * 16, [{}] * 7, []
    pairs, reward = 3 * 16 * (1 + 2), 8 * 4 * 2 * 3  # sampled and both sides scored; two sides trained on
    policy, reports = 8 * 3 * 2 * (1 + 3 + 2 * 3), 2 * 7 * (1 + 3 + 1)
    assert irft.budget(run) == math.ceil(2 * (pairs + reward + policy + reports) / (3 * 16))
    run.preferences = [{}]
    assert irft.budget(run) == math.ceil(2 * (pairs + 2 * reward + policy + reports) / (3 * 16))


def test_readme_commands_parse():
    """A README command that does not run is the first thing a newcomer meets."""
    found = commands("irft.py")
    assert len(found) >= 3
    for flags in found:
        irft.parse_args(shlex.split(flags))


def test_the_shape_of_the_script():
    """No line over 110 columns."""
    lines = (ROOT / "irft.py").read_text().splitlines()
    assert max(map(len, lines)) <= 110


# ---- LoRA --------------------------------------------------------------------------------------------------


def test_lora_starts_as_the_model_itself_and_merges_into_it(folder):
    """Samples and reference log-probs are taken before the first step: an adapter that is not zero would make
    policy and reference disagree. After training, the merged matrix must do what the adapted one did."""
    model, pairs = gsil.load_model(folder, "cpu"), [([5, 6], [7, 8, 1])]
    before, names = irft.response_logps(model, pairs), set(model.state_dict())
    irft.add_lora(model, 3, "a seed")
    assert torch.equal(irft.response_logps(model, pairs), before)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(name.endswith((".a", ".b")) for name in trained)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        irft.response_logps(model, pairs).sum().backward()
        optimizer.step()
    adapted = irft.response_logps(model, pairs)
    assert (adapted - before).abs() > 0.1
    irft.merge_lora(model)
    assert torch.allclose(irft.response_logps(model, pairs), adapted, atol=1e-4)
    assert set(model.state_dict()) == names and all(weight.requires_grad for weight in model.parameters())


def test_lora_is_the_same_again(folder):
    """A resumed run draws A anew: from the seed, or it would not go on as it was."""
    first, second, other = (gsil.load_model(folder, "cpu") for _ in range(3))
    for model, seed in ((first, "0"), (second, "0"), (other, "1")):
        irft.add_lora(model, 2, seed)
    name = "model.layers.0.mlp.up_proj.a"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    gpt = torch.nn.ModuleDict({"query_key_value": torch.nn.Linear(2, 2)})
    with pytest.raises(SystemExit):
        irft.add_lora(gpt, 2, "0")
