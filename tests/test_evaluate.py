"""Section 7 of gsil.py: what the table's numbers are."""

import pytest
from conftest import ROOT
from helpers import demos_of, metrics, naive_logp, read_jsonl, run, toy_flags, write_jsonl
from transformers import AutoModelForCausalLM

import gsil


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so\n#### 1,234", "1234"),
        ("#### $1,234.\nmore", "1234"),
        ("#### $1,234.00", "1234.00"),
        ("####7", "7"),
        ("####7.0", "7.0"),
        ("#### -3", "-3"),
        ("#### 7\r\nmore", "7"),
        ("#### 7\t", "7"),
        ("####\u00a07\u00a0", "7"),
        ("#### 7 apples", "7 apples"),
        ("#### 1\n#### 2", "1"),
        ("1234", None),
    ],
)
def test_final_answers(text, expected):
    """GSM8K's '#### 1,234' must match a bare 1234, whatever blank is around it; text without '####' has
    none."""
    assert gsil.final_answer(text) == expected


def test_the_rows_of_the_table(small, tmp_path, monkeypatch):
    """Accuracy counts answers, NLL is per token of the demonstrations with EOS, length and the share that
    ends are of the sampled responses. Each is worked out here from responses that are known."""
    base = ROOT / "tests/toy/base"
    problems = read_jsonl(small / "heldout.jsonl")
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = gsil.AutoTokenizer.from_pretrained(base)
    golds = [tokenizer(problem["answer"]).input_ids for problem in problems]
    eos = tokenizer.eos_token_id

    def known(policy, prompts, temperature, **_):
        """Greedy: 15 of 20 right. At temperature 1: 10 right, and 5 of 20 have no end."""
        if temperature == 0:
            return [gold + [eos] for gold in golds[:15]] + [[eos]] * 5
        return [gold + [eos] for gold in golds[:10]] + [[7, eos]] * 5 + [[7, 7, 7]] * 5

    monkeypatch.setattr(gsil, "sample", known)
    [row] = run(toy_flags(small, tmp_path / "out") + "--rounds 0")["rows"]
    assert row["name"] == "base" and row["n"] == 20 and row["seconds"] is None
    assert row["greedy_accuracy"] == 15 / 20 and row["sampled_accuracy"] == 10 / 20
    assert row["eos_share"] == 15 / 20
    length = (sum(len(gold) + 1 for gold in golds[:10]) + 5 * 2 + 5 * 3) / 20
    assert row["mean_response_tokens"] == pytest.approx(length)
    nats = 0.0
    for problem, gold in zip(problems, golds):
        turns = [{"role": "user", "content": problem["question"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        nats -= naive_logp(model, tokenizer(prompt, add_special_tokens=False).input_ids, gold + [eos])
    tokens = sum(len(gold) + 1 for gold in golds)
    assert row["heldout_nll"] == pytest.approx(nats / tokens, rel=1e-4)  # float32 sums
    [base_row] = [record for record in metrics(tmp_path / "out") if "row" in record]
    assert base_row["phase"] == "base" and base_row["dev_accuracy"] is not None


def test_own_data_has_numbers_without_answers_and_without_heldout(tmp_path, inputs, capsys):
    """Free text has no '####' to check: null, not wrong. But NLL, length and the share that ends are there,
    of a tenth that was held out."""
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"say {n}", "response": f"{n}"} for n in range(20)])
    summary = run(f"{inputs} --data {data} --epochs 1 --out {tmp_path}/out")
    assert [row["name"] for row in summary["rows"]] == ["base", "round 1", "sft"]
    for row in summary["rows"]:
        assert row["n"] == 2 and row["greedy_accuracy"] is None and row["sampled_accuracy"] is None
        assert row["heldout_nll"] > 0 and 1 <= row["mean_response_tokens"] <= 5 and 0 <= row["eos_share"] <= 1
    table = capsys.readouterr().out.partition("\nheld-out ")[2].splitlines()
    assert table[1].split()[:3] == ["base", "-", "-"] and float(table[1].split()[3]) > 0


def test_demonstrations_alone_are_enough(tmp_path, inputs):
    """Fewer than ten leave nothing to hold out: what cannot be measured is null, never made up; the last
    round and the last epoch of SFT are taken."""
    summary = run(inputs + f"--rounds 2 --scale 1 --epochs 1 --out {tmp_path}/out")
    assert summary["best"] == "round 2"
    for row in summary["rows"]:
        assert all(row[key] is None for key in row if key not in ("name", "n", "seconds")) and row["n"] == 0


def test_the_best_round_is_the_best_on_dev(small, tmp_path, monkeypatch):
    """Not on the held-out problems, which would flatter it."""
    on_dev = iter([0.1, 0.9, 0.2])  # base, round 1, round 2

    def answer(policy, problems, temperature, *_):
        dev = problems[0]["prompt"] == first
        accuracy = next(on_dev) if dev else 0.5
        return accuracy, [[7, 1]] * len(problems)

    first = demos_of(f"{small}/dev.jsonl", gsil.AutoTokenizer.from_pretrained(gsil.TOY / "base"))[0]["prompt"]
    monkeypatch.setattr(gsil, "answer", answer)
    flags = "--rounds 2 --scale 1 --epochs 1 --baseline none --batch 40"
    assert run(toy_flags(small, tmp_path / "out") + flags)["best"] == "round 1"


def test_control_characters_do_not_reach_the_terminal(small, tmp_path, capsys, monkeypatch):
    """A model that has learned them could clear the screen, or write over the numbers."""
    evil = iter(["calm", "\x1b[2J\x1b]0;title\x07\r\x08\u202e"])
    kind = type(gsil.AutoTokenizer.from_pretrained(gsil.TOY / "base"))
    monkeypatch.setattr(gsil, "answer", lambda policy, problems, *_: (0.5, [[7, 1]] * len(problems)))
    monkeypatch.setattr(kind, "batch_decode", lambda *_, **__: [next(evil)] * 20)
    run(toy_flags(small, tmp_path / "out") + "--epochs 1 --baseline none --batch 40")
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and all(char.isprintable() or char == "\n" for char in printed)
