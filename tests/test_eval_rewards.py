"""eval.py: what a reward model reads and prefers; MT-Bench's answers for FastChat."""

import json
import math

import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer, tiny_model
from eval_tools import BASE, fails, run, write_jsonl
from safetensors.torch import load_file, save_file

import eval as ev
import gsil

HELDOUT = f"{ROOT}/tests/toy/heldout.jsonl"
HH = {"chosen": "\n\nHuman: Hi \n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So.", "rejected": "x"}
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]


def test_an_hh_transcript():
    """The turns are those of the training, and asked in the chat template."""
    problem = ev.read_answer(HH, graded=False)
    assert problem["turns"] == TURNS and problem["response"] == "So."
    assert ev.build_prompt(problem, [], None, byte_tokenizer()).endswith(
        "<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n"
    )


def reward_model(folder, vocabulary, head=True, labels=1, **changes):
    config = tiny_model(vocabulary).config
    config.num_labels, config.pad_token_id = labels, changes.pop("pad", 1)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    if not head:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {k: v for k, v in weights.items() if "score" not in k},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    return model


@pytest.mark.parametrize("pad", [1, 0, None])
def test_a_reward_is_read_at_the_end_of_the_training_text(pad, tmp_path):
    """At another token than it was fitted at it is noise; with EOS as pad too, as many models have it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = reward_model(tmp_path, len(tokenizer), pad=pad)
    tokenizer.save_pretrained(tmp_path)
    rows = [row for _, row in list(gsil.read_rows(HELDOUT, ""))[:4]]
    pairs = [([("user", row["question"])], row["answer"]) for row in rows]
    args = ev.parse_args(["--device", "cpu"])
    found = ev.rewards(*ev.load_model("AutoModelForSequenceClassification", tmp_path, args), pairs)
    for row, value in zip(rows, found, strict=True):
        demo = gsil.encode(row, tokenizer, {tokenizer.eos_token_id})
        hidden = model.model(
            input_ids=torch.tensor([demo["prompt_ids"] + demo["real_ids"]])
        ).last_hidden_state
        assert value == pytest.approx((model.score.weight @ hidden[0, -1]).item(), rel=1e-4)


@pytest.mark.parametrize(
    "how, template, says",
    [
        ({}, False, "chat template"),
        ({"head": False}, True, "score.weight"),
        ({"labels": 2}, True, "num_labels=1"),
    ],
)
def test_models_that_cannot_be_a_reward(how, template, says, tmp_path, capsys):
    """Found before any response is sampled, and said with what is needed."""
    reward_model(tmp_path, 300, **how)
    byte_tokenizer(**({} if template else {"chat_template": None})).save_pretrained(tmp_path)
    fails(capsys, f"--tasks reward --data {HELDOUT} --reward-model {tmp_path} --model nowhere", says)


def test_win_rate(tmp_path, monkeypatch):
    """A tie is not a win; a model against itself ties everywhere; without --compare the data answer."""
    sides = iter([[1.0, 2.0, 0.0], [0.0, 2.0, 4.0]])
    monkeypatch.setattr(ev, "rewards", lambda *_: next(sides))
    outcome = {"samples": {"reward": [{"responses": ["abc"]}] * 3}}
    problems = [{"turns": [], "response": "a"}] * 3
    ev.judge(outcome, problems, (None,), ev.parse_args([]))
    found = outcome["duel"]
    assert (found["n"], found["wins"], found["ties"]) == (3, 1, 1)
    assert found["win_rate"] == pytest.approx(1 / 3) and found["difference"] == -1
    assert found["half_width"] == pytest.approx(1.96 * math.sqrt(7 / 3))
    assert found["characters"] == 3 and found["other_characters"] == 1
    monkeypatch.undo()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    reward_model(tmp_path, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    flags = f"--tasks reward --reward-model {tmp_path} --limit 6 --max-new-tokens 20 --device cpu "
    assert run(flags + f"--data {HELDOUT} --compare {BASE}")["duel"]["ties"] == 6
    assert run(flags + f"--data {HELDOUT}")["duel"]["against"] == "the data"


QUESTIONS = [
    {"question_id": n, "category": category, "turns": ["ava has 2 apples .", "and ?"]}
    for n, category in ((83, "writing"), (81, "roleplay"), (82, "math"), (84, "coding"))
]


def test_mt_bench_writes_what_fastchat_reads(tmp_path, capsys):
    """A field that its judge misses costs the run; a file that is there could be the demonstrations."""
    questions, file = write_jsonl(tmp_path / "question.jsonl", QUESTIONS), tmp_path / "toy.jsonl"
    flags = f"--tasks mt_bench --data {questions} --max-new-tokens 1 --device cpu --answers {file}"
    assert run(flags)["results"]["mt_bench"]["n"] == 4
    assert "responses were cut at --max-new-tokens" in capsys.readouterr().out
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [83, 81, 82, 84]
    for answer in answers:
        assert answer["model_id"] == "toy" and [*answer["choices"][0]] == ["index", "turns"]
        assert len(answer["choices"][0]["turns"]) == 2 and {"answer_id", "tstamp"} < {*answer}
    fails(capsys, flags, "--answers", "overwritten")


def test_mt_bench_asks_with_its_own_first_answer(tmp_path, monkeypatch):
    """FastChat's rules: temperature by category, 0.7 for what it does not know; turn 2 sees turn 1."""
    asked = []

    def fake(policy, prompts, stop, longest, temperature, batch_size, name=""):
        asked.append((policy.tokenizer.decode(prompts[0]), temperature, torch.initial_seed()))
        return [(" 7 ", False)]

    monkeypatch.setattr(ev, "generate", fake)
    rows = [QUESTIONS[0], QUESTIONS[2] | {"category": "new"}, QUESTIONS[3] | {"category": "stem"}]
    questions = write_jsonl(tmp_path / "q.jsonl", rows)
    run(f"--tasks mt_bench --data {questions} --answers {tmp_path}/a.jsonl --max-new-tokens 9 --seed 5")
    assert [temperature for _, temperature, _ in asked] == [0.7, 0.7, 0.7, 0.7, 0.1, 0.1]
    assert all(seed == 0 for _, _, seed in asked)
    assert "<assistant> 7 <eos>" in asked[1][0] and "7" not in asked[0][0]
