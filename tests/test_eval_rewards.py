"""eval.py: the tasks that are not lm_eval's: `answers`, `reward`, and `mt_bench` with its file for FastChat."""

import math

import pytest
import torch
import transformers
from conftest import byte_tokenizer, tiny_model
from eval_tools import GSM_ROW, fails, run, write_jsonl
from helpers import assistant, read_jsonl, user

import eval as ev
import gsil

HH = "\n\nHuman: Hi \n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So. #### 2"


def test_answers_asks_as_training_does(inputs, tmp_path):
    """A policy is trained on one prompt, of a row in any format; asked with another it would look worse than it
    is. What a reward model compares with needs no number at its end."""
    system = {"role": "system", "content": "Short."}
    rows = [GSM_ROW, {"messages": [system, user("1+1?"), assistant("#### 1,002")]}]
    rows += [{"instruction": "1+1?", "output": "####\t$2."}, {"chosen": HH, "rejected": "x"}]
    outcome = run(f"{inputs} --data {write_jsonl(tmp_path / 'rows.jsonl', rows)}")
    tokenizer, model = byte_tokenizer(), tiny_model()
    demos = [gsil.encode(row, tokenizer, {1}) for row in rows]
    ids = gsil.sample(model, [demo["prompt_ids"] for demo in demos], {1}, 5, 0, 4, "")
    for sample, demo, response in zip(outcome["samples"]["answers"], demos, ids, strict=True):
        assert sample["prompt"] == demo["prompt"] and sample["gold"] == demo["answer"]
        assert ev.tokenize(tokenizer, sample["prompt"], special=False) == demo["prompt_ids"]
        assert sample["responses"] == [tokenizer.decode(response, skip_special_tokens=True)]
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    read = ev.TASKS["reward"].read({"chosen": HH.replace("#### 2", "\n"), "rejected": "x"})
    assert read == {"turns": turns, "response": "So.", "gold": None}


def reward_model(folder, pad=1, labels=1):
    config = tiny_model().config
    config.num_labels, config.pad_token_id = labels, pad
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("pad", [1, 0, None])
def test_a_reward_is_read_at_the_end_of_the_training_text(pad, tmp_path):
    """At another token than it was fitted at it is noise; with EOS as pad too, as many models have it."""
    model = reward_model(tmp_path, pad)
    pairs = [([("user", GSM_ROW["question"])], answer) for answer in (GSM_ROW["answer"], "2", "3")]
    loaded = ev.load_model("AutoModelForSequenceClassification", tmp_path, ev.parse_args(["--device", "cpu"]))
    for (_, answer), value in zip(pairs, ev.rewards(*loaded, pairs), strict=True):
        demo = gsil.encode(GSM_ROW | {"answer": answer}, byte_tokenizer(), {1})
        hidden = model.model(torch.tensor([demo["prompt_ids"] + demo["real_ids"]])).last_hidden_state
        expected = (model.score.weight @ hidden[0, -1]).item()
        assert value == pytest.approx(expected, rel=1e-4)  # float32 sums in another order


def test_models_that_cannot_be_a_reward(tmp_path, capsys):
    """Found before any response is sampled, and said with what is needed; a missing head would be random."""
    flags = f"--tasks reward --data {write_jsonl(tmp_path / 'rows.jsonl', [GSM_ROW])} --model nowhere"
    flags += f" --reward-model {tmp_path}"
    reward_model(tmp_path, labels=2)
    fails(capsys, flags, "num_labels=1")
    tiny_model().save_pretrained(tmp_path)
    fails(capsys, flags, "score.weight")
    reward_model(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    fails(capsys, flags, "chat template")


def test_win_rate(inputs, tmp_path, monkeypatch):
    """A tie is not a win; without --compare the data's answer is the other side, with it the other model's."""
    sides = iter([[1.0, 2.0, 0.0], [0.0, 2.0, 4.0]])
    monkeypatch.setattr(ev, "rewards", lambda *_: next(sides))
    outcome = {"samples": {"reward": [{"responses": ["abc"]}] * 3}}
    ev.judge(outcome, [{"turns": [], "response": "a"}] * 3, (None,), ev.parse_args([]))
    found = outcome["duel"]
    assert (found["n"], found["wins"], found["ties"], found["against"]) == (3, 1, 1, "the data")
    assert found["win_rate"] == pytest.approx(1 / 3) and found["difference"] == -1
    assert found["half_width"] == pytest.approx(1.96 * math.sqrt(7 / 3))
    assert found["characters"] == 3 and found["other_characters"] == 1
    monkeypatch.undo()
    reward_model(tmp_path)
    same = run(f"{inputs} --tasks reward --reward-model {tmp_path} --compare {inputs.split()[1]}")
    assert same["duel"]["ties"] == 6


BENCH = {83: "writing", 81: "new", 82: "math", 84: "stem"}  # question_id -> category


def test_mt_bench_writes_what_fastchat_reads(inputs, tmp_path, monkeypatch, capsys):
    """Its rules: temperature by category, 0.7 for what it does not know; turn 2 sees turn 1. A field that its
    judge misses costs the run; a file that is there could be the demonstrations."""
    asked = []

    def fake(policy, prompts, stop, longest, temperature, batch_size, name=""):
        asked.append((policy.tokenizer.decode(prompts[0]), temperature, torch.initial_seed()))
        return [(" 7 ", True)]

    monkeypatch.setattr(ev, "generate", fake)
    rows = [{"question_id": n, "category": BENCH[n], "turns": ["1+1?", "And?"]} for n in BENCH]
    questions, file = write_jsonl(tmp_path / "question.jsonl", rows), tmp_path / "toy.jsonl"
    flags = f"{inputs} --tasks mt_bench --data {questions} --answers {file} --seed 5"
    result = run(flags)["results"]["mt_bench"]
    assert result["n"] == 4 and result["unfinished"] == 8
    assert [temperature for _, temperature, _ in asked] == [0.7, 0.7, 0.7, 0.7, 0, 0, 0.1, 0.1]
    assert {seed for _, _, seed in asked} == {0}
    assert "<|assistant|>\n7</s>" in asked[1][0] and "7" not in asked[0][0]
    for answer, n in zip(read_jsonl(file), BENCH, strict=True):
        assert {*answer} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (answer["question_id"], answer["model_id"]) == (n, "toy")
        assert answer["choices"] == [{"index": 0, "turns": ["7", "7"]}]
    fails(capsys, flags, "--answers", "overwritten")
