"""Section 7 of gsil.py: what the table's numbers are."""

import pytest
from helpers import EOS, demos_of, metrics, naive_logp, run, toy_flags, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsil

ANSWERS = {"so\n#### 1,234": "1234", "#### $1,234.\nmore": "1234", "####7.0": "7.0", "#### -3": "-3"}
ANSWERS |= {"#### 7\r\nmore": "7", "####\u00a07\t": "7", "#### 1\n#### 2": "1", "1234": None}


def test_final_answers():
    """GSM8K's '#### 1,234' must match a bare 1234, whatever blank is around it."""
    assert {text: gsil.final_answer(text) for text in ANSWERS} == ANSWERS


def test_the_rows_of_the_table(inputs, tmp_path, monkeypatch):
    """Accuracy counts answers, NLL is per token of the demonstrations with EOS, length and the share that
    ends are of the sampled responses. Each is worked out here from responses that are known."""
    args = gsil.parse_args(inputs.split())
    model = AutoModelForCausalLM.from_pretrained(args.model)
    problems = demos_of(args.data, AutoTokenizer.from_pretrained(args.model))
    golds = [problem["real_ids"] for problem in problems]

    def known(policy, prompts, temperature, **_):
        """Greedy: 4 of 6 right. At temperature 1: 3 right, and 2 of 6 have no end."""
        if temperature == 0:
            return golds[:4] + [[EOS]] * 2
        return golds[:3] + [[7, EOS], [7, 7, 7], [7, 7, 7]]

    monkeypatch.setattr(gsil, "sample", known)
    files = f"--heldout {args.data} --dev {args.data} --out {tmp_path}"
    [row] = run(f"{inputs} --max-new-tokens 40 --rounds 0 {files}")["rows"]
    lengths = [len(gold) for gold in golds]
    nats = -sum(naive_logp(model, problem["prompt_ids"], problem["real_ids"]) for problem in problems)
    assert row.pop("heldout_nll") == pytest.approx(nats / sum(lengths), rel=1e-4)  # float32 sums
    assert row.pop("mean_response_tokens") == pytest.approx((sum(lengths[:3]) + 2 + 3 + 3) / 6)
    shares = {"greedy_accuracy": 4 / 6, "sampled_accuracy": 3 / 6, "eos_share": 4 / 6}
    assert row == pytest.approx({"name": "base", "n": 6, "seconds": None} | shares)
    assert metrics(tmp_path)[0]["dev_accuracy"] == 4 / 6


def test_what_cannot_be_measured_is_null(tmp_path, inputs, capsys):
    """Free text has no '####' to check, but a tenth that is held out has NLL and lengths; of fewer than ten
    demonstrations nothing is held out. Without dev problems the last round and epoch of SFT are taken."""
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"say {n}", "response": f"{n}"} for n in range(20)])
    [row] = run(f"{inputs} --data {data} --rounds 0 --out {tmp_path}/twenty")["rows"]
    assert row["n"] == 2 and row["greedy_accuracy"] is row["sampled_accuracy"] is None
    assert row["heldout_nll"] > 0 and 1 <= row["mean_response_tokens"] <= 5 and 0 <= row["eos_share"] <= 1
    table = capsys.readouterr().out.partition("\nheld-out ")[2].splitlines()
    assert table[1].split()[:3] == ["base", "-", "-"] and float(table[1].split()[3]) > 0
    summary = run(inputs + f"--rounds 2 --scale 1 --epochs 1 --out {tmp_path}/six")
    assert summary["best"] == "round 2"
    for row in summary["rows"]:
        assert {key for key in row if row[key] is not None} <= {"name", "n", "seconds"} and row["n"] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["kept" in line for line in lines] == [False, True]


def test_control_characters_do_not_reach_the_terminal(small, tmp_path, capsys, monkeypatch):
    """A model that has learned them could clear the screen, or write over the numbers."""
    evil = iter(["calm", "\x1b[2J\x1b]0;title\x07\r\x08\u202e"])
    kind = type(AutoTokenizer.from_pretrained(gsil.TOY / "base"))
    monkeypatch.setattr(gsil, "answer", lambda *_: (0.5, [[7, 1]] * 20))
    monkeypatch.setattr(kind, "batch_decode", lambda *_, **__: [next(evil)] * 20)
    run(toy_flags(small, tmp_path) + "--epochs 1 --baseline none --loss sft")
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and all(char.isprintable() or char == "\n" for char in printed)
