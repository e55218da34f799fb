"""gsil.py: sampling, log-probs, data, training, files. The losses and the theory have tests/test_theory.py.

Everything runs offline, on a random two-layer model with a byte tokenizer (conftest.py) or on the toy.
"""

import copy
import csv
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import gsil
from conftest import ROOT, ZEPHYR, byte_tokenizer, tiny_model

EOS = 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16]]
PAIRS = [([5, 6, 7], [8, 9, 10, EOS]), ([11], [12, EOS]), ([13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23])]


def naive_logp(model, prompt, response):
    """One forward pass per token, no batch, no padding: slow and obviously right."""
    total = 0.0
    for i, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:i]])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


# ---- sampling ----------------------------------------------------------------------------------------------


def test_greedy_equals_generate_at_batch_1(model):
    """Our loop with cache and left padding must be the model's own argmax; else negatives come from another
    model."""
    ours = gsil.sample(model, PROMPTS, {EOS}, 12, 0, 4, "")
    for prompt, response in zip(PROMPTS, ours):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        assert response == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_left_padding_and_order_change_nothing(positions, model):
    """Sorting by length, padding and rows that leave the batch early must not mix up or alter responses.
    Rotary positions are relative and forgive a shift; those of GPT-2 do not."""
    if positions == "absolute":
        torch.manual_seed(0)
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **shape)).eval()
    alone = [gsil.sample(model, [prompt], {EOS, 40}, 12, 0, 1, "")[0] for prompt in PROMPTS]
    for batch in (1, 2, 3, 4):
        assert gsil.sample(model, PROMPTS, {EOS, 40}, 12, 0, batch, "") == alone


def test_eos_is_kept_if_and_only_if_sampled(model):
    """A response cut at the cap must not get an EOS it never had, and nothing may follow a sampled one."""
    ends = set(range(0, 300, 12))  # many "EOS" ids: some rows end, some are cut
    responses = gsil.sample(model, PROMPTS * 20, ends, 10, 1, 16, "x")
    finished = [r for r in responses if r[-1] in ends]
    assert 0 < len(finished) < len(responses)
    assert all(not ends & set(r[:-1]) for r in responses)
    assert all(len(r) == 10 for r in responses if r[-1] not in ends)


def test_samples_follow_the_models_plain_softmax():
    """Any top-k, top-p, temperature or penalty a model ships would make y- come from something else than
    pi_t."""
    model = tiny_model(vocabulary=8, seed=1)
    plain = gsil.sample(model, [[5, 6]] * 4000, set(), 1, 1, 4000, "a")
    model.generation_config.update(
        top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, do_sample=True
    )
    assert gsil.sample(model, [[5, 6]] * 4000, set(), 1, 1, 4000, "a") == plain
    found = torch.bincount(torch.tensor(plain)[:, 0], minlength=8) / 4000
    expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (found - expected).abs().max() < 0.03
    hot = gsil.sample(model, [[5, 6]] * 4000, set(), 1, 2.0, 4000, "a")
    warmer = model(torch.tensor([[5, 6]])).logits[0, -1].div(2).softmax(-1)
    assert (torch.bincount(torch.tensor(hot)[:, 0], minlength=8) / 4000 - warmer).abs().max() < 0.03


def test_seed_decides_the_samples(model):
    """Without a generator of its own, a resumed run would sample other negatives than an undisturbed one."""
    first = gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 1")
    torch.rand(3)  # what ran before must not matter
    assert gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 1") == first
    assert gsil.sample(model, PROMPTS, {EOS}, 8, 1, 2, "0 round 2") != first


# ---- log-probs ---------------------------------------------------------------------------------------------


def test_collate_does_what_its_docstring_shows():
    """The literal example in the docstring is what readers rely on."""
    ids, mask = gsil.collate([([5, 6], [7, 2]), ([5], [9])], "cpu")
    shown = re.search(r"ids (\[\[.*?\]\]), mask (\[\[.*?\]\])", gsil.collate.__doc__)
    assert ids.tolist() == json.loads(shown[1]) and mask.int().tolist() == json.loads(shown[2])
    assert ids.dtype == torch.long and mask.dtype == torch.bool


def test_logps_equal_a_naive_loop_for_any_batch(model):
    """Off-by-one targets, a lost EOS, or pads that leak into a row would all change these sums."""
    expected = [naive_logp(model, prompt, response) for prompt, response in PAIRS]
    assert gsil.response_logps(model, PAIRS).tolist() == pytest.approx(expected, abs=1e-4)
    for pair, value in zip(PAIRS, expected):
        assert gsil.response_logps(model, [pair]).item() == pytest.approx(value, abs=1e-4)
    assert gsil.response_logps(model, PAIRS[::-1]).tolist() == pytest.approx(expected[::-1], abs=1e-4)
    rows = [{"prompt_ids": prompt, "real_ids": response} for prompt, response in PAIRS]
    for batch in (1, 2, 3):
        args = gsil.parse_args(["--sample-batch", str(batch)])
        found = gsil.score(gsil.response_logps, model, gsil.texts_of(rows, "real"), args)
        assert found == pytest.approx(expected, abs=1e-4)


def test_scoring_takes_as_many_responses_as_training():
    """2 per pair of --micro-batch, or scoring would run out of memory where training does not."""
    sizes, args = [], gsil.parse_args(["--micro-batch", "1"])
    measure = lambda _, texts: sizes.append(len(texts)) or torch.zeros(len(texts))  # noqa: E731
    gsil.score(measure, None, [([1], [2])] * 5, args)
    assert sizes == [2, 2, 1]


def test_logps_leave_their_inputs_alone(model):
    """A list extended in place would change the next epoch's data."""
    pairs = copy.deepcopy(PAIRS)
    gsil.response_logps(model, pairs)
    assert pairs == PAIRS


def test_no_gradient_into_prompt_positions_or_pads():
    """Only logits that predict a response token may be trained; else the model also learns to write
    prompts."""

    class Fake(torch.nn.Module):
        device = torch.device("cpu")
        logits = torch.randn(3, 11, 30, requires_grad=True)

        def forward(self, input_ids, use_cache, logits_to_keep):
            return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})

    fake = Fake()
    gsil.response_logps(fake, PAIRS).sum().backward()
    touched = fake.logits.grad.abs().sum(-1) > 0  # (B, T): position t predicts token t + 1
    for row, (prompt, response) in zip(touched.tolist(), PAIRS):
        first, last = len(prompt) - 1, len(prompt) + len(response) - 2
        assert [t for t, is_touched in enumerate(row) if is_touched] == list(range(first, last + 1))


# ---- demonstrations ----------------------------------------------------------------------------------------


def args_for(flags=""):
    return gsil.parse_args(["--data", "x.jsonl", *flags.split()])


def demos_of(path, tokenizer, flags="", eos_ids=(EOS, 2)):
    rows = gsil.read_rows(str(path), "train")
    return gsil.read_demos(str(path), rows, tokenizer, set(eos_ids), math.inf, args_for(flags))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


Q, A = "How many?", "It is 3.\n#### 3"
SAME = {
    "prompt/response": {"prompt": Q, "response": A},
    "prompt/completion": {"prompt": Q, "completion": A},
    "conversational prompt/completion": {"prompt": [user(Q)], "completion": [assistant(A)]},
    "question/answer": {"question": Q, "answer": A},
    "prompt as conversation": {"prompt": [{"from": "human", "value": Q}], "response": A},
    "instruction/output": {"instruction": Q, "input": "", "output": A},
    "instruction/input/output": {"instruction": "How", "input": "many?", "output": A},
    "messages": {"messages": [user(Q), assistant(A)], "prompt_id": "1"},
    "messages after which the user goes on": {"messages": [user(Q), assistant(A), user("Thanks")]},
    "conversations": {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    "chosen as text": {"prompt": Q, "chosen": A, "rejected": "no"},
    "UltraFeedback": {
        "prompt": Q,
        "chosen": [user(Q), assistant(A)],
        "rejected": [user(Q), assistant("no")],
        "messages": [user(Q), assistant("another")],
        "score_chosen": 8.0,
    },
    "chosen without prompt": {"chosen": [user(Q), assistant(A)], "rejected": [user(Q), assistant("no")]},
    "HH transcript": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: no",
    },
    "SPIN": {"real": [user(Q), assistant(A)], "generated": [user(Q), assistant("no")]},
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_pair(name, tmp_path, tokenizer):
    """The same demonstration in any listed format must train the same ids."""
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [SAME[name]]), tokenizer)
    question = Q if name != "instruction/input/output" else "How\n\nmany?"
    prompt = f"<|user|>\n{question}</s>\n<|assistant|>\n"
    assert demo["prompt"] == prompt and demo["response"] == A and demo["answer"] == "3"
    assert demo["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    assert demo["real_ids"] == tokenizer(A, add_special_tokens=False).input_ids + [EOS]


def test_json_csv_and_parquet_files_equal_jsonl(tmp_path, tokenizer):
    """These go through the datasets library; they must arrive as the same rows."""
    import datasets

    rows = [{"question": Q, "answer": A}, {"question": "Next?", "answer": "#### 4"}]
    expected = demos_of(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for suffix in ("json", "csv", "parquet"):
        assert demos_of(tmp_path / f"x.{suffix}", tokenizer) == expected


def test_multi_turn_conversations_keep_their_history(tmp_path, tokenizer):
    """The prompt is everything before the last assistant turn."""
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [row]), tokenizer)
    assert demo["prompt"] == "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n"
    assert demo["response"] == "d"


def test_nothing_follows_eos_and_pad_may_be_eos(tmp_path, tokenizer):
    """The template puts a newline after EOS; a response that had it would give the real side away. And pad
    is EOS here: masks made by comparing ids with pad would drop it, the model would never learn to stop."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [SAME["messages"]]), tokenizer)
    assert demo["real_ids"][-1] == EOS and EOS not in demo["real_ids"][:-1]
    _, mask = gsil.collate([(demo["prompt_ids"], demo["real_ids"])], "cpu")
    assert mask.sum() == len(demo["real_ids"])


def test_real_responses_end_as_the_models_template_does(tmp_path):
    """Some chat models list several EOS ids; the one after an answer is the template's, not the
    tokenizer's."""
    tokenizer = byte_tokenizer(ZEPHYR.replace("{{ m.content }}</s>", "{{ m.content }}<|end|>"))
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [SAME["messages"]]), tokenizer)
    assert demo["real_ids"][-1] == 2 and tokenizer.eos_token_id == EOS


def test_every_eos_the_model_lists_ends_a_response(tmp_path, tokenizer):
    """A chat model may end a turn by another id than its tokenizer's EOS; samples would run on to the cap."""
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, 2]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "x.jsonl", [SAME["messages"]])
    flags = f"--model {tmp_path}/model --data {data} --out {tmp_path}/out --max-new-tokens 20"
    args = gsil.parse_args(flags.split())
    run, _ = gsil.start(args, "gsil-logistic")
    assert run.eos_ids == {EOS, 2}


def test_a_response_is_cut_at_the_cap_without_eos(tmp_path, tokenizer, capsys):
    """Real and generated share one cap; EOS after half a sentence would give a cut response away."""
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [SAME["messages"]]), tokenizer, "--max-new-tokens 5")
    assert len(demo["real_ids"]) == 5 and EOS not in demo["real_ids"]
    assert "1 cut at --max-new-tokens 5" in capsys.readouterr().out


def test_a_token_across_the_cut_does_not_change_the_prompt(tmp_path):
    """If encoding prompt + response merges a token across their border, the sampled-from prompt must win."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "I")])  # newline + "I" become one token
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [SAME["messages"]]), tokenizer)
    assert demo["prompt_ids"] == tokenizer(demo["prompt"], add_special_tokens=False).input_ids
    assert tokenizer.decode(demo["prompt_ids"] + demo["real_ids"]) == demo["prompt"] + A + "</s>"


def test_final_answers():
    """GSM8K's '#### 1,234' must match a bare 1234; text without '####' has no answer to check."""
    assert gsil.final_answer("so\n#### 1,234") == "1234" == gsil.final_answer("#### $1234.\nmore")
    assert gsil.final_answer("1234") is None


# ---- training ----------------------------------------------------------------------------------------------


def made_pairs(model, n=7, seed=0):
    """Pairs of ragged lengths with honest references."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(
            3, 300, (int(torch.randint(low, high, (), generator=rng)),), generator=rng
        ).tolist()

    pairs = [{"prompt_ids": ids(1, 6), "real_ids": ids(1, 8), "generated_ids": ids(1, 8)} for _ in range(n)]
    for side in ("real", "generated"):
        texts, args = gsil.texts_of(pairs, side), gsil.parse_args(["--sample-batch", "3"])
        for pair, logp in zip(pairs, gsil.score(gsil.response_logps, model, texts, args)):
            pair[f"{side}_reference"] = logp
    return pairs


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "sft"])
def test_accumulated_gradients_equal_the_full_batch(loss, monkeypatch):
    """Averaging the micro-batches' means would weigh pairs (for sft: tokens) of a small last part too
    much."""
    gradients = []

    def spy(parameters, clip):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return torch.tensor(1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for micro in (7, 3):  # 3 + 3 + 1 pairs, of different token counts
        model = tiny_model()
        args = args_for(f"--loss {loss} --batch 7 --micro-batch {micro} --shift 0.5 --scale 1")
        list(gsil.train_round(model, made_pairs(model), loss, 1, args, "round 1", "0 round 1"))
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item() + 1e-7)
    if loss == "sft":  # and sft is the usual mean over tokens
        model = tiny_model()
        pairs = made_pairs(model)
        nll = -gsil.response_logps(model, [(p["prompt_ids"], p["real_ids"]) for p in pairs]).sum()
        (nll / sum(len(p["real_ids"]) for p in pairs)).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(gradients[0], expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("loss", gsil.LOSSES)
def test_one_round_tells_real_from_generated(loss):
    """A sign error in a loss, or references taken from the wrong side, would turn this around."""
    model = tiny_model()
    args = args_for(f"--loss {loss} --batch 4 --scale 0.5 --lr 1e-3 --seed 3")
    records = list(gsil.train_round(model, made_pairs(model, 8), loss, 10, args, "round 1", "0 round 1"))
    assert records[-1]["real"] > records[-1]["generated"] + 1 and records[-1]["accuracy"] == 1


def test_every_pair_is_seen_once_per_epoch(monkeypatch):
    """A shuffle that drops or repeats pairs, or an epoch that drops the last small batch, biases training."""
    model, seen = tiny_model(), []
    pairs = made_pairs(model, 7)
    whole = gsil.pair_losses
    monkeypatch.setattr(
        gsil, "pair_losses", lambda m, part, *rest: (seen.append(part), whole(m, part, *rest))[1]
    )
    args = args_for("--batch 3")
    list(gsil.train_round(model, pairs, "logistic", 2, args, "round 1", "0 round 1"))
    assert [len(part) for part in seen] == [3, 3, 1] * 2
    epochs = [[pairs.index(pair) for part in seen[i : i + 3] for pair in part] for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]


def test_a_wrong_reference_stops_the_run(capsys):
    """If log pi_t came from other weights, every log-ratio would be off; the first loss shows it."""
    model = tiny_model()
    pairs = made_pairs(model)
    for pair in pairs:
        pair["real_reference"] += 1
    with pytest.raises(SystemExit) as stop:
        list(gsil.train_round(model, pairs, "logistic", 1, args_for(), "round 1", "0 round 1"))
    assert stop.value.code == 2 and "policy and reference disagree" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_step(capsys):
    """A step with a NaN gradient would destroy the weights without a word."""
    model = tiny_model()
    pairs, before = made_pairs(model), copy.deepcopy(model.state_dict())
    for n, pair in enumerate(pairs):
        pair["prompt"] = f"prompt {n}"
    pairs[2]["real_reference"] = math.nan
    with pytest.raises(SystemExit) as stop:
        list(gsil.train_round(model, pairs, "logistic", 1, args_for(), "round 1", "0 round 1"))
    error = capsys.readouterr().err
    lengths = [len(pairs[2]["real_ids"]), len(pairs[2]["generated_ids"])]
    assert stop.value.code == 2 and "loss nan" in error and "lower --lr" in error
    assert "'prompt 2', log-ratios [nan" in error and f"lengths {lengths}" in error
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_shift_is_learned_only_when_asked():
    """A fixed shift that moved, or a learned one that did not, would be another method than the flag
    names."""
    for flag, moves in (("learn", True), ("2", False)):
        model = tiny_model()
        args = args_for(f"--shift {flag} --batch 4")
        pairs = made_pairs(model, 8)
        records = list(gsil.train_round(model, pairs, "logistic", 8, args, "round 1", "0 round 1"))
        assert (abs(records[-1]["shift"] - (0 if moves else 2)) > 1e-3) == moves


def test_warmup_and_decay():
    """--warmup counts steps, or a share of them below 1; linear decay must end near 0."""
    for warmup, flat in (("4", 4), ("0.5", 8), ("0", 0)):
        model = tiny_model()
        args = args_for(f"--warmup {warmup} --batch 1 --lr 1e-4")
        rates = [
            record["lr"]
            for record in gsil.train_round(model, made_pairs(model, 1), "logistic", 16, args, "r", "0 r")
        ]
        assert max(rates) <= 1e-4 and rates.index(max(rates)) == flat and rates[-1] < 2e-5
        assert rates[0] == (0 if flat else 1e-4)


def test_dropout_is_off():
    """With dropout the log-ratios would not be 0 at the first step, and the reference would be a random
    draw."""
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    pairs = made_pairs(model)
    model.train()
    (first,) = gsil.train_round(model, pairs, "logistic", 1, args_for(), "round 1", "0 round 1")
    assert abs(first["real"]) < 1e-4 and abs(first["generated"]) < 1e-4


def test_the_loss_sees_scale_times_log_ratio_plus_shift(model):
    """Without the scale in h the policy would still learn, to another strength than --scale names."""
    pairs = made_pairs(model, 3)
    for n, pair in enumerate(pairs):  # pretend the policy has moved by d = n + 1 and d = -1
        pair["real_reference"] -= n + 1
        pair["generated_reference"] += 1
    losses, real, generated = gsil.pair_losses(model, pairs, "logistic", 0.3, 0.5)
    assert torch.allclose(real, torch.tensor([1.0, 2, 3]), atol=1e-4)
    assert torch.allclose(generated, torch.tensor([-1.0] * 3), atol=1e-4)
    for n, loss in enumerate(losses.tolist()):
        h_real, h_generated = 0.3 * (n + 1) + 0.5, 0.3 * -1 + 0.5
        by_hand = math.log(1 + math.exp(-h_real)) + math.log(1 + math.exp(h_generated))
        assert loss == pytest.approx(by_hand, abs=1e-4)


# ---- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """40 demonstrations and 20 problems of the toy: a run takes a second or two."""
    folder = tmp_path_factory.mktemp("small")
    for name, n in (("demos", 40), ("dev", 20), ("heldout", 20)):
        lines = (ROOT / f"tests/toy/{name}.jsonl").read_text().splitlines(keepends=True)[:n]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def run(small, out, flags=""):
    inputs = f"--data {small}/demos.jsonl --dev {small}/dev.jsonl --heldout {small}/heldout.jsonl --out {out}"
    return gsil.main(gsil.parse_args([*inputs.split(), *flags.split()]))


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def metrics(folder):
    """metrics.jsonl without what the clock says."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
        record.get("row", {}).pop("seconds", None)
    return records


@pytest.mark.parametrize("loss", [*gsil.LOSSES, "sft"])
def test_end_to_end(loss, small, tmp_path):
    """Every --loss must train, save, and be loadable and scored the same by someone who only has
    transformers."""
    summary = run(small, tmp_path / "run", f"--loss {loss} --baseline none --epochs 1 --batch 8")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1"] and summary["best"] == "round 1"
    for row in summary["rows"]:
        assert list(row) == ["name", *gsil.COLUMNS]
        assert row["n"] == 20 and all(math.isfinite(row[key]) for key in row if key != "name")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "round_1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "round_1")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    demos = demos_of(small / "heldout.jsonl", tokenizer)
    nats = sum(naive_logp(model, demo["prompt_ids"], demo["real_ids"]) for demo in demos)
    tokens = sum(len(demo["real_ids"]) for demo in demos)
    assert summary["rows"][1]["heldout_nll"] == pytest.approx(-nats / tokens, rel=1e-3)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tests/toy/base").state_dict()
    assert any(not torch.equal(base[key], value) for key, value in model.state_dict().items())


def test_generated_jsonl_holds_what_the_round_was_trained_on(small, tmp_path):
    """Whoever inspects a run needs the samples as text and ids, and log pi_t of both sides."""
    run(small, tmp_path / "run", "--samples-per-prompt 2 --baseline none --epochs 1")
    pairs = [json.loads(line) for line in (tmp_path / "run/round_1/generated.jsonl").read_text().splitlines()]
    assert len(pairs) == 80 and pairs[0]["prompt"] == pairs[1]["prompt"] != pairs[2]["prompt"]
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tests/toy/base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/toy/base")
    for pair in pairs[:4]:
        assert tokenizer.decode(pair["generated_ids"]) == pair["generated"]
        for side in ("real", "generated"):
            expected = naive_logp(base, pair["prompt_ids"], pair[f"{side}_ids"])
            assert pair[f"{side}_reference"] == pytest.approx(expected, abs=1e-3)


def test_the_baseline_has_its_budget_and_its_best_epoch(small, tmp_path):
    """SFT that trains less than GSIL, or is taken at a bad epoch, would be a straw man."""
    summary = run(small, tmp_path / "run", "--epochs 2 --rounds 2 --samples-per-prompt 2 --lr 1e-3")
    records = metrics(tmp_path / "run")
    sft = [record for record in records if record["phase"] == "sft" and "step" in record]
    assert sft[-1]["epoch"] == 3 * 2 * 2 * 2
    dev = [r["dev_accuracy"] for r in records if r["phase"] == "sft" and "dev_accuracy" in r]
    assert dev[-1] == max(dev) and len(dev) == 24 + 1  # each epoch, then the saved one again
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "round 2", "sft"]


def test_same_seed_same_bytes(small, tmp_path):
    """Numbers that cannot be repeated cannot be trusted: metrics (but for the clock) and weights agree."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(small, tmp_path / name, f"--seed {seed} --baseline none")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    a, b, c = (weights(tmp_path / name / "round_1") for name in "abc")
    assert a == b != c


def test_resume_after_a_stop_equals_an_undisturbed_run(small, tmp_path, monkeypatch):
    """Stopped in round 2's training, a run goes on from round 1's weights and round 2's samples, exactly."""
    run(small, tmp_path / "whole", "--rounds 2 --epochs 1")
    train, sample = gsil.train_round, gsil.sample

    def stops(*args):
        for record in train(*args):
            yield record
            if record["phase"] == "round 2":
                raise KeyboardInterrupt

    monkeypatch.setattr(gsil, "train_round", stops)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "cut", "--rounds 2 --epochs 1")
    monkeypatch.setattr(gsil, "train_round", train)
    seeds = []
    monkeypatch.setattr(gsil, "sample", lambda *a: (seeds.append(a[-1]), sample(*a))[1])
    gsil.main(gsil.parse_args(["--resume", str(tmp_path / "cut")]))
    assert not {"0 round 1", "0 round 2"} & set(seeds)  # finished sampling is not done again
    for folder in ("round_1", "round_2", "sft"):
        assert weights(tmp_path / "whole" / folder) == weights(tmp_path / "cut" / folder)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_of_equal_epochs_of_sft_the_first_is_kept(small, tmp_path, monkeypatch):
    """The later ones are no better on dev, and have only had more time to overfit."""
    saved, save = [], gsil.save_model
    monkeypatch.setattr(gsil, "save_model", lambda *args: (saved.append(args[2].name), save(*args)))
    monkeypatch.setattr(gsil, "answers", lambda run, policy, problems, _: (0.5, [[EOS]] * len(problems)))
    run(small, tmp_path, "--epochs 1")
    assert saved == ["round_1", "sft"]


def test_resume_with_more_rounds(small, tmp_path):
    """Raising --rounds continues a finished run; the SFT baseline is trained again, its budget has grown."""
    run(small, tmp_path / "two", "--rounds 2 --epochs 1")
    run(small, tmp_path / "one", "--rounds 1 --epochs 1")
    gsil.main(gsil.parse_args(["--resume", str(tmp_path / "one"), "--rounds", "2"]))
    for folder in ("round_1", "round_2", "sft"):
        assert weights(tmp_path / "two" / folder) == weights(tmp_path / "one" / folder)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


def test_resume_keeps_the_flags_of_the_run(small, tmp_path, capsys):
    """Flags silently ignored, or silently changed halfway, would make args.json a lie."""
    run(small, tmp_path / "run", "--rounds 0")
    for flags in (["--resume", str(tmp_path / "run"), "--lr", "1"], ["--resume", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            gsil.parse_args(flags)
        assert stop.value.code == 2
    assert "no args.json" in capsys.readouterr().err


def test_without_dev_and_heldout(small, tmp_path):
    """Demonstrations alone are enough to train; what cannot be measured is null, never made up."""
    args = gsil.parse_args(f"--data {small}/demos.jsonl --out {tmp_path}/run --epochs 1".split())
    summary = gsil.main(args)
    assert args.dev is None and args.heldout is None and summary["best"] == "round 1"
    for row in summary["rows"]:
        assert all(row[key] is None for key in row if key not in ("name", "seconds"))


def test_problems_without_answers_have_nll_but_no_accuracy(small, tmp_path):
    """Free text has no '####' to check; calling it wrong would be a made-up number."""
    free = write_jsonl(tmp_path / "free.jsonl", [{"prompt": "Ava has 7 apples .", "response": "7 + 4"}] * 3)
    summary = run(small, tmp_path / "run", f"--rounds 0 --heldout {free}")
    assert summary["rows"][0]["greedy_accuracy"] is None and summary["rows"][0]["heldout_nll"] > 0


def test_a_prompt_template_is_used_saved_and_needs_no_chat_template(small, tmp_path):
    """A base model without chat template trains on --prompt-template; the saved one must know the format."""
    tokenizer = byte_tokenizer(chat_template=None)
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a {b}", "response": "c"}] * 4)
    flags = f"--model {tmp_path}/model --data {data} --baseline none --max-new-tokens 9 --out {tmp_path}/run"
    with pytest.raises(SystemExit):
        gsil.main(gsil.parse_args(flags.split()))
    gsil.main(gsil.parse_args([*flags.split(), "--prompt-template", "Q: {prompt}\n A: "]))
    pair = json.loads((tmp_path / "run/round_1/generated.jsonl").read_text().splitlines()[0])
    assert pair["prompt"] == "Q: a {b}\n A: " and pair["real_ids"] == tokenizer("c").input_ids + [EOS]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/round_1")
    text = saved.apply_chat_template([user("a {b}")], tokenize=False, add_generation_prompt=True)
    assert text == pair["prompt"]


def test_the_next_free_folder(small, tmp_path, monkeypatch):
    """Two runs must not write into one folder."""
    inputs = ["--data", f"{small}/demos.jsonl", "--model", str(ROOT / "tests/toy/base"), "--rounds", "0"]
    monkeypatch.chdir(tmp_path)
    gsil.main(gsil.parse_args(inputs))
    gsil.main(gsil.parse_args(inputs))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["gsil-logistic-1", "gsil-logistic-2"]
    with pytest.raises(SystemExit):
        gsil.main(gsil.parse_args([*inputs, "--out", "runs/gsil-logistic-1"]))


# ---- a person's mistakes -----------------------------------------------------------------------------------

MISTAKES = {  # file content (None: no file) -> what the sentence must name
    "missing": (None, ["x.jsonl", "no such file"]),
    "empty": ("", ["x.jsonl", "no rows"]),
    "not JSON": ('{"prompt": "a", "response": "b"}\n{"prompt"\n', ["x.jsonl line 2", "not JSON"]),
    "not an object": ("3\n", ["x.jsonl line 1", "found 3"]),
    "unknown columns": (
        '{"text": "a", "label": 1}\n',
        ["x.jsonl line 1", "text, label", "question + answer"],
    ),
    "null": ('{"prompt": "a", "response": null}\n', ["x.jsonl line 1", "response"]),
    "blank": ('{"prompt": "a", "response": " "}\n', ["x.jsonl line 1", "response"]),
    "number": ('{"question": "a", "answer": 4}\n', ["x.jsonl line 1", "answer"]),
    "no assistant": ('{"messages": [{"role": "user", "content": "a"}]}\n', ["x.jsonl line 1", "messages"]),
    "long prompt": (json.dumps({"prompt": "a " * 600, "response": "b"}), ["x.jsonl line 1", "512"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name, tmp_path, capsys):
    """A traceback, or a half-written folder, is no answer to a typo."""
    content, named = MISTAKES[name]
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        gsil.main(gsil.parse_args(["--data", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "run")]))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and all(word in error for word in named)
    assert not (tmp_path / "run").exists()


OUT_OF_RANGE = """--scale 0, --scale nan, --batch 0, --rounds -1, --lr x, --loss dpo, --shift x, --device tpu,
    --temperature -1, --loss spin --shift learn"""


@pytest.mark.parametrize("flags", OUT_OF_RANGE.split(","))
def test_numbers_out_of_range_are_argparse_errors(flags, capsys):
    """Caught before a model is loaded, with the flag's name."""
    with pytest.raises(SystemExit) as stop:
        gsil.parse_args(flags.split())
    assert stop.value.code == 2 and flags.split()[-2] in capsys.readouterr().err


def test_a_path_that_is_no_model(tmp_path, capsys):
    """The library's own message is a page long."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        gsil.main(gsil.parse_args(["--model", str(tmp_path), "--out", str(tmp_path / "run")]))
    assert stop.value.code == 2 and "not a causal language model" in capsys.readouterr().err


# ---- warnings ----------------------------------------------------------------------------------------------


def history(**sick):
    """The records of a healthy run of two rounds, with some of round 2's made sick."""
    records = []
    for name in ("round 1", "round 2"):
        now = {"real": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "identical": 0.1, "eos": 1.0, "dev": 0.8}
        now |= sick if name == "round 2" else {}
        records.append({"phase": name, "identical": now["identical"]})
        records += [{"phase": name, "real": real, "generated": -1.0} for real in now["real"]]
        records.append({"phase": name, "row": {"eos_share": now["eos"]}, "dev_accuracy": now["dev"]})
    return records


@pytest.mark.parametrize(
    "sick, word",
    [
        ({"real": [0, -1, -2, -3, -4, -5, -6, -7]}, "less likely"),
        ({"identical": 0.9}, "equal the demonstration"),
        ({"eos": 0.7}, "EOS"),
        ({"dev": 0.7}, "over-corrects"),
        ({}, None),
    ],
)
def test_each_warning_fires_on_its_sickness_alone(sick, word):
    """A warning that never fires protects nobody; one that always fires is not read."""
    found = gsil.warnings(history(**sick))
    assert len(found) == (word is not None) and all(word in sentence for sentence in found)


# ---- the toy, README, the file itself ----------------------------------------------------------------------


def test_the_toys_files_are_what_make_toy_makes():
    """The committed files must be regenerable, and no question may stand in two of them."""
    import make_toy

    rows = make_toy.make_rows(0)
    for part in ("demos", "dev", "heldout", "preferences"):
        made = "".join(json.dumps(row) + "\n" for row in rows[part])
        assert (ROOT / f"tests/toy/{part}.jsonl").read_text() == made
    questions = [row.get("question", row.get("prompt")) for part in rows.values() for row in part]
    assert len(questions) == len(set(questions)) == 20000 + 2048 + 500 + 500 + 256
    perfect = make_toy.make_rows(0, perfect=True)
    assert [row["question"] for row in perfect["demos"]] == [row["question"] for row in rows["demos"]]
    assert all("=" in row["answer"] for row in perfect["demos"]) and perfect["heldout"] == rows["heldout"]


def test_the_toys_base_model():
    """The lesson needs a base that can do the sums but mostly does not show them; and a small repository."""
    import make_toy

    base = ROOT / "tests/toy/base"
    assert sum(path.stat().st_size for path in base.iterdir()) < 1e6
    rows = [json.loads(line) for line in (ROOT / "tests/toy/heldout.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    stats = make_toy.statistics(model, tokenizer, rows, temperature=1)
    assert stats["right given working"] >= 0.95 and 0.2 < stats["shows working"] < 0.4


def commands(script):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(rf"^\s*(?:.*&& )?(?:python|torchrun .*) {script}(.*)$", text, re.M)
    return [line.split("#")[0] for line in found]


def test_readme_commands_parse():
    """A README command that does not run is the first thing a newcomer meets."""
    found = commands("gsil.py")
    assert len(found) >= 4
    for flags in found:
        if "--resume" not in flags:
            gsil.parse_args(shlex.split(flags.replace("`", "")))


def test_the_pair_by_hand_in_readme():
    """A student follows these numbers with a pencil; each must be what the code computes."""
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    policy, args = gsil.load_model(gsil.TOY / "base", "cpu"), gsil.parse_args([])
    question = "Ava has 7 apples . Ava buys 4 more . the number grows 2 times . "
    question += "how many apples does Ava have ?"
    row = {"question": question, "answer": "7 + 4 = 11 . 11 * 2 = 22 . #### 22"}
    [pair] = gsil.read_demos("x", [("x", row)], tokenizer, {tokenizer.eos_token_id}, 512, args)
    pair["generated_ids"] = tokenizer("#### 17").input_ids + [tokenizer.eos_token_id]
    text = (ROOT / "README.md").read_text().partition("### One pair by hand")[2].partition("\n### ")[0]
    assert question in text and row["answer"] in text and "#### 17 <eos>" in text

    def sums():
        sides = (gsil.texts_of([pair], side) for side in ("real", "generated"))
        return [gsil.response_logps(policy, side).item() for side in sides]

    pair["real_reference"], pair["generated_reference"] = before = sums()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    gsil.pair_losses(policy, [pair], "logistic", 0.3, 0.0)[0].sum().backward()
    optimizer.step()
    loss, *d = (value.item() for value in gsil.pair_losses(policy, [pair], "logistic", 0.3, 0.0))
    pulls = [-0.3 / (1 + math.exp(0.3 * d[0])), 0.3 / (1 + math.exp(-0.3 * d[1]))]
    for value in (*before, *sums(), *d, 0.3 * d[0], 0.3 * d[1], loss, *pulls):
        assert any(abs(float(n) - value) < 0.002 for n in re.findall(r"-?\d\.\d{3}", text)), value


def test_readme_commands_of_tests_have_their_flags():
    """tests/results.py, bench.py, real.py and make_toy.py take minutes; their flags are checked at once."""
    found = re.findall(r"python (tests/[\w/]+\.py)([^`#\n]*)", (ROOT / "README.md").read_text())
    assert len(found) >= 6
    for script, flags in found:
        source = (ROOT / script).read_text()
        for word in flags.split():
            if word.startswith("--") or word in ("gsil", "irft"):
                assert f'"{word}"' in source, (script, word)


def test_readme_names_what_is_there():
    """It is how a reader of the papers finds the place in the code; a renamed function must not break it."""
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`(gsil|irft|eval)\.py:(\w+)`", text)
    assert len(named) >= 18
    for script, name in named:
        source = (ROOT / f"{script}.py").read_text()
        assert re.search(rf"^(def {name}\(|{name} = )", source, re.M), (script, name)


def test_a_sixth_loss_is_one_line(small, tmp_path, monkeypatch, capsys):
    """README promises that an entry of LOSSES is all: listed by --help, checked at step 0, trained with."""
    squared = lambda h_real, h_generated: (h_real - 1) ** 2 + (h_generated + 1) ** 2  # noqa: E731
    monkeypatch.setitem(gsil.LOSSES, "squared", squared)
    with pytest.raises(SystemExit):
        gsil.parse_args(["--help"])
    assert "squared" in capsys.readouterr().out
    run(small, tmp_path / "run", "--loss squared --baseline none")
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] < 2.01


@pytest.mark.parametrize("script", ["gsil", "irft"])
def test_readme_has_the_numbers_that_were_measured(script):
    """tests/results_*.md is what tests/results.py printed; a number edited by hand must not pass for it."""
    readme = (ROOT / "README.md").read_text()
    rows = [row for row in (ROOT / f"tests/results_{script}.md").read_text().splitlines() if "±" in row]
    assert len(rows) >= 20
    for row in rows:
        assert row in readme, row


def test_readme_says_how_long_the_scripts_are():
    """Its limits admit that they are too long; they must not grow behind that sentence."""
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in ("gsil", "irft", "eval")}
    said = "`gsil.py` has {gsil} lines, `irft.py` {irft}, `eval.py` {eval};".format(**lines)
    assert said in (ROOT / "README.md").read_text()


def test_the_shape_of_the_script():
    """One sitting: no line over 110 columns, and the method ends by line 265."""
    lines = (ROOT / "gsil.py").read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("# ---- PLUMBING")) <= 265


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, tmp_path):
    """bf16 autocast and the CUDA kernels may round differently, not compute something else."""
    for device in ("cpu", "cuda"):
        run(small, tmp_path / device, f"--device {device} --baseline none --temperature 0")
    found = [[r["row"]["heldout_nll"] for r in metrics(tmp_path / d) if "row" in r] for d in ("cpu", "cuda")]
    for cpu, cuda, tolerance in zip(*found, (0.02, 0.1)):  # base, round 1
        assert cuda == pytest.approx(cpu, rel=tolerance)
