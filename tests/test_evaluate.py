"""Section 7 of gsil.py: what the table's numbers are."""

import pytest
import torch
from conftest import tiny_model
from helpers import demos_of, naive_logp, run, save, table, write_jsonl
from transformers import AutoModelForCausalLM

import gsil

ANSWERS = {"so\n#### 1,234": "1234", "#### $1,234.\nmore": "1234", "####7.0": "7.0", "#### -3": "-3"}
ANSWERS |= {"#### 7\r\nmore": "7", "####\u00a07\t": "7", "#### 1\n#### 2": "2", "#### 1 ##### 2 .": "2"}
ANSWERS |= {"1234": None}


def test_final_answers(tokenizer):
    """GSM8K's '#### 1,234' would not match 1234, or a heading be a demonstration's answer."""
    assert {text: gsil.final_answer(text) for text in ANSWERS} == ANSWERS
    headings = {"#### Step 1: Add\n1 + 1 = 2\n\n#### 2 \n\n": "2", "#### A heading\nand no value": None}
    for response, answer in headings.items():
        assert gsil.encode({"prompt": "1 + 1", "response": response}, tokenizer, {1})["answer"] == answer


def test_the_rows_of_the_table(inputs, tokenizer, tmp_path):
    """A number would be of other problems, texts or tokens than its title says."""
    # a token for each letter
    learned = ["= #### 1", "= #### 2", "#### 3", "no #### 4", "no #### 5", "no #### 6"]
    golds = {"demos": "123456", "dev": "123478", "heldout": "123457"}
    for name, answers in golds.items():
        texts = [text[:-1] + answer for text, answer in zip(learned, answers)]
        rows = [{"prompt": f"{n} ?", "response": text} for n, text in enumerate(texts)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    demos, dev, heldout = (f"{tmp_path}/{name}.jsonl" for name in golds)
    flags = inputs + f"--heldout {heldout} --max-new-tokens 9 --habit = "
    run(f"{flags} --data {demos} --loss sft --epochs 150 --lr 1e-2 --out {tmp_path}/learned")
    flags += f"--data {demos} --dev {dev} --model {tmp_path}/learned/sft --rounds 0 --out {tmp_path}/out"
    found = run(flags)["base"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "learned/sft")
    texts = [(one["prompt_ids"], one["real_ids"][:9]) for one in demos_of(heldout, tokenizer)]
    nats = -sum(naive_logp(model, prompt, response) for prompt, response in texts)
    expected = {"dev": 4 / 6, "greedy": 5 / 6, "sampled": 5 / 6, "habit": 2 / 6, "seconds": None}
    expected |= {"length": (9 + 9 + 7 + 9 + 9 + 9) / 6, "ended": 3 / 6}  # with EOS; the long ones are cut
    assert found.pop("nll") == pytest.approx(nats / sum(len(response) for _, response in texts), rel=1e-4)
    assert found == pytest.approx(expected)


def test_sampled_is_sampled_at_temperature_1(inputs, tmp_path):
    """Greedy numbers under the title `sampled` would hide what the model does when it is used."""
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # greedily it repeats one token
    flags = f"{inputs} --model {save(tmp_path, model)} --max-new-tokens 40 --rounds 0 --out {tmp_path}/out"
    two_letters = r"([a-zA-Z]).*(?!\1)[a-zA-Z]"
    assert run([*flags.split(), "--temperature", "0", "--habit", two_letters])["base"]["habit"] > 0


def test_what_cannot_be_measured_is_null(tmp_path, inputs, capsys):
    """Free text would get an accuracy of 0, or a text with control characters clear the screen."""
    data = write_jsonl(
        tmp_path / "x.jsonl", [{"prompt": f"say {n} \x1b[2J", "response": f"{n}"} for n in range(20)]
    )
    flags = f"{inputs} --data {data} --rounds 2 --scale 1 --epochs 1 --baseline none --out {tmp_path}/out"
    rows = run(flags)
    printed = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in printed) and "\\x1b[2J" in printed
    for row in table(tmp_path / "out").values():
        assert row["dev"] is row["greedy"] is row["sampled"] is row["habit"] is None
        assert row["nll"] > 0 and 1 <= row["length"] <= 5 and 0 <= row["ended"] <= 1
    assert rows["base"]["seconds"] is None and rows["round 2"]["seconds"] > 0
    titles, *lines = printed.partition("\nheld-out ")[2].splitlines()
    assert titles.split() == ["nll", "length", "ended", "seconds"] and lines[0].split()[0] == "base"
    assert float(lines[0].split()[1]) > 0 and lines[0].split()[-1] == "-"
    assert "no --heldout" in printed and "round_2" in lines[-1]
