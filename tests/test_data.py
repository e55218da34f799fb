"""Section 6 of gsil.py: any demonstrations -> ids. Right is the correct text, a refusal in one sentence, or a
warning with a count; never another text without a word."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import ZEPHYR, byte_tokenizer
from helpers import EOS, A, Q, assistant, demos_of, user, write_jsonl
from transformers import AutoConfig, AutoTokenizer

import gsil

TURNS = [user(Q), assistant(A)]
OTHERS = [user(Q), assistant("no")]
FORMATS = [  # of one demonstration
    {"prompt": Q, "response": A},
    {"prompt": [user(Q)], "completion": [assistant(A)]},
    {"prompt": [{"from": "human", "value": Q}], "response": A},
    {"instruction": Q, "input": "", "output": A},
    {"messages": TURNS, "prompt_id": "1", "prompt": Q},
    {"messages": [*TURNS, user("Thanks")]},
    {"messages": [user(Q), assistant([{"type": "text", "text": part} for part in (A[:3], A[3:])])]},
    {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    {"prompt": Q, "chosen": A, "rejected": "no"},
    {"prompt": Q, "chosen": TURNS, "rejected": OTHERS, "messages": OTHERS},  # UltraFeedback
    {"chosen": TURNS, "rejected": OTHERS},
    {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": "\n\nHuman: a"},  # Anthropic's HH
    {"real": TURNS, "generated": OTHERS},  # SPIN
    {"prompt": None, "response": None, "question": Q, "answer": A, "tools": None},
    {"messages": [user(Q), assistant(A) | {"tool_calls": []}], "tools": "[]"},
]
ASKED = f"<|user|>\n{Q}</s>\n<|assistant|>\n"
HISTORY = "<|user|>\na</s>\n<|assistant|>\nb</s>\n" + ASKED
ROWS = [(row, ASKED) for row in FORMATS] + [
    ({"messages": [user("a"), assistant("b"), *TURNS], "system": "s"}, "<|system|>\ns</s>\n" + HISTORY),
    ({"chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {Q}\n\nAssistant: {A}", "system": ""}, HISTORY),
    ({"instruction": "a", "input": "b", "output": A}, "<|user|>\na\n\nb</s>\n<|assistant|>\n"),
]


@pytest.mark.parametrize("row, prompt", ROWS)
def test_every_format_gives_the_same_ids(row, prompt, tokenizer):
    """The same demonstration in any listed format must train the same ids: prompt as it is asked in use, with
    all before the last turn; response, EOS, and nothing behind it, though the template has a newline there."""
    demo = gsil.encode(row, tokenizer, {EOS, 2})
    assert demo["prompt"] == prompt and demo["response"] == A and demo["answer"] == "3"
    assert demo["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    assert demo["real_ids"] == tokenizer(A, add_special_tokens=False).input_ids + [EOS]


def test_where_prompt_and_response_end():
    """Some chat models list several EOS ids; the one after an answer is the template's, not the tokenizer's. If
    a token spans the border of prompt and response, the prompt must stay the one that is sampled from."""
    tokenizer = byte_tokenizer(ZEPHYR.replace("{{ m.content }}</s>", "{{ m.content }}<|end|>"))
    demo = gsil.encode(FORMATS[0], tokenizer, {EOS, 2})
    assert demo["real_ids"] == tokenizer(A, add_special_tokens=False).input_ids + [2]
    tokenizer = byte_tokenizer(merges=[("Ċ", "I")])  # newline + "I" become one token
    demo = gsil.encode(FORMATS[0], tokenizer, {EOS})
    assert demo["prompt_ids"] == tokenizer(ASKED, add_special_tokens=False).input_ids
    assert tokenizer.decode(demo["prompt_ids"] + demo["real_ids"]) == ASKED + A + "</s>"


TEXTS = ["NA", "None", "null", "nan", "007", "1.0", "a, b", 'say "x"', "two\nlines", "\u2028 é 😀"]


@pytest.mark.parametrize("bom, end", [("", "\n"), ("\ufeff", "\r\n")], ids=["plain", "Windows"])
def test_texts_stay_as_they_are_in_every_kind_of_file(bom, end, tmp_path, tokenizer):
    """A cell NA that became a missing value, 007 that became 7, a BOM before the first column's name, or a
    text split at U+2028: each has cost people rows without a word."""
    rows = [{"prompt": f"{n} {text}", "response": text} for n, text in enumerate(TEXTS)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator=end).writerows([rows[0], *(row.values() for row in rows)])
    contents = {"x.jsonl": (end + end).join(lines) + end, "x.csv": table.getvalue()}
    contents["array.jsonl"] = "[" + f",{end}".join(lines) + "]"
    for name, content in contents.items():
        (tmp_path / name).write_bytes((bom + content).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in (*contents, "x.parquet"):
        demos = demos_of(tmp_path / name, tokenizer)
        assert [demo["response"] for demo in demos] == TEXTS
        assert [demo["prompt"] for demo in demos] == [ASKED.replace(Q, row["prompt"]) for row in rows]


UNUSABLE = [  # row, what the sentence says of it
    ({"text": "a", "label": 1}, "found text, label; accepted are the columns prompt"),
    (3, "columns, but 3"),
    ({"prompt": "a", "response": None}, "found prompt"),
    ({"prompt": "a", "response": " "}, "assistant is empty"),
    ({"question": "a", "answer": 4}, "assistant is empty or more than text: 4"),
    ({"messages": [assistant("a")]}, "messages has no prompt with a response"),
    ({"messages": [{"content": "a"}, assistant("b")]}, "not a turn with role and content"),
    ({"messages": [user(["a"]), assistant("b")]}, "has no attribute"),  # neither text nor parts
    ({"messages": [user([{"type": "image", "url": "x"}]), assistant("b")]}, "more than text"),
    ({"messages": [user("a"), assistant("b") | {"tool_calls": ["f"]}]}, "more than text"),
    ({"messages": [user("a"), assistant("b")], "tools": ["f"]}, "more than text"),
    ({"prompt": "a", "response": "\ud83d"}, "surrogates"),  # half an emoji
    ({"chosen": "Human: a\n\nAssistant: b"}, "transcript"),
    ({"prompt": "a", "response": "one <|end|> two"}, "EOS token"),
]
TEMPLATES = [  # a template that makes another text of a demonstration, what the sentence says
    ("{{ messages | length }}" + ZEPHYR, "changes prompt or response"),
    (ZEPHYR.replace("m.content", "m.content.split('</think>')[-1]"), "changes prompt or response"),
    (ZEPHYR.replace("in messages", "in messages if m.role != 'system'"), "drops a turn of the role system"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
]


def test_unusable_rows_say_why_and_a_tenth_of_them_is_left_out(tmp_path, tokenizer, capsys):
    """Never is such a row trained on as another text: cut at an EOS, without its tools, as an empty answer, or
    without the thoughts or the system turn that a template drops. Left out, they are counted."""
    turns = [{"role": "system", "content": "Be brief."}, user(Q), assistant("<think>hm</think>" + A)]
    cases = [(row, tokenizer, says) for row, says in UNUSABLE]
    cases += [({"messages": turns}, byte_tokenizer(template), says) for template, says in TEMPLATES]
    for row, asking, says in cases:
        with pytest.raises(gsil.UNUSABLE, match=says):
            gsil.encode(row, asking, {EOS, 2})
    path, n = tmp_path / "x.jsonl", len(UNUSABLE)
    rows = [{"prompt": "a", "response": "b"}] * (9 * n) + [row for row, _ in UNUSABLE]
    assert len(demos_of(write_jsonl(path, rows), tokenizer)) == 9 * n
    says = f"warning: {n} of {10 * n} rows are left out, such as {path} line {9 * n + 1}: found text"
    assert says in capsys.readouterr().out


def data_of(path, tokenizer, flags="", **config):
    """What read_data makes of a file, for a model of 300 tokens with a window of 256."""
    config = AutoConfig.for_model("llama", **{"vocab_size": 300, "max_position_embeddings": 256} | config)
    return gsil.read_data(config, tokenizer, {EOS, 2}, gsil.parse_args(["--data", str(path), *flags.split()]))


FILES = [  # name, content, what the sentence says
    ("x.jsonl", None, "x.jsonl: no such file"),
    ("empty.jsonl", b"\n", "empty.jsonl: no rows"),
    ("typo.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt"\n', "typo.jsonl line 2: "),
    ("latin.jsonl", b'{"prompt": "\xff"}', "latin.jsonl line 1: 'utf-8'"),
    ("latin.csv", b"prompt,response\n\xff,b\n", "latin.csv: 'utf-8'"),
    ("open.csv", b'prompt,response\na,"b', "open.csv: unexpected end"),
    ("wide.csv", b"prompt,response\na,b,c\n", "wide.csv row 1: "),
    ("array.json", b'[{"prompt": "a", "response": "b"}, {"prompt": "a"}]', "array.json row 2: found prompt"),
    (
        "nine.csv",
        b"prompt,response\n" + b"a,b\n" * 8 + b"a, \n",
        "row 9: a turn of the role assistant is empty",
    ),
    ("notes.txt", b"a\n", "notes.txt: not a .jsonl, .json, .csv or .parquet file"),
    ("a/hub-name", None, "Accepted are UTF-8 files .jsonl, .json, .csv; .parquet; the name of a Hub dataset"),
]


def test_data_that_cannot_be_used_is_one_sentence(tmp_path, tokenizer, monkeypatch, capsys):
    """The place, and what is accepted or fits. Prompt and response share the window; token ids beyond the
    embeddings would crash a GPU in the middle; dev problems without '####' would make the best round luck."""
    monkeypatch.chdir(tmp_path)
    for name, content, _ in FILES:
        if content is not None:
            Path(name).write_bytes(content)
    write_jsonl(Path("good.jsonl"), [{"prompt": "a", "response": "b" * 400}])
    prompt_ids = tokenizer("<|user|>\na</s>\n<|assistant|>\n").input_ids
    room, highest = 256 - len(prompt_ids), max(prompt_ids + tokenizer("b").input_ids)
    for flags, config, expected in (
        ("", {}, room),
        ("", {"max_position_embeddings": 4096}, 256),
        (f"--max-new-tokens {room}", {"vocab_size": highest + 1}, room),
    ):
        [[demo], *_, longest] = data_of("good.jsonl", tokenizer, flags, **config)
        assert longest == len(demo["real_ids"]) == expected
    cases = [(name, "", {}, says) for name, _, says in FILES]
    cases += [
        ("good.jsonl", f"--max-new-tokens {room + 1}", {}, f"--max-new-tokens: {room} fit"),
        ("good.jsonl", "", {"max_position_embeddings": len(prompt_ids)}, "--max-new-tokens: 0 fit"),
        ("good.jsonl", "", {"vocab_size": highest}, f"token ids above the {highest} that its model knows"),
        ("good.jsonl", "--dev good.jsonl", {}, "each needs an answer '#### value'"),
    ]
    for name, flags, config, says in cases:
        with pytest.raises(SystemExit) as stop:
            data_of(name, tokenizer, flags, **config)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert says in error


def test_what_may_explain_a_bad_run_is_counted(tmp_path, capsys):
    """Words unknown to the tokenizer, responses cut at the cap, problems that are also trained on: the run
    would end well and its numbers mean little. EOS after half a sentence would give a cut response away."""
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    long = {"question": "Mia has 1 keys .", "answer": "1 + 1 = 2 . #### 2"}
    rows = [long, {"question": "Supercalifragilistic", "answer": "#### 1"}]
    flags = f"--max-new-tokens 5 --heldout {write_jsonl(tmp_path / 'heldout.jsonl', [long])}"
    demos, _, heldout, longest = data_of(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer, flags)
    assert len(demos[0]["real_ids"]) == len(heldout[0]["real_ids"]) == longest == 5
    assert EOS not in demos[0]["real_ids"] and demos[1]["real_ids"][-1] == EOS
    printed = capsys.readouterr().out
    assert "warning: 1 rows have words that the tokenizer does not know" in printed
    assert "warning: 2 responses of the data are cut at --max-new-tokens 5" in printed
    assert "warning: 1 prompts of the dev or held-out problems are in" in printed


def test_the_window_of_a_model():
    """Beyond longrope's original window other factors apply to every position, so a log-prob would depend on
    the other rows in its batch; a wrapper's window is that of its text part, and some configs name none."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    small = {"hidden_size": 32, "num_attention_heads": 4, "original_max_position_embeddings": 64}
    phi = AutoConfig.for_model("phi3", rope_parameters=rope, max_position_embeddings=256, **small)
    wrapper = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 99})
    assert gsil.window(phi) == 64 and gsil.window(wrapper) == 99
    assert gsil.window(AutoConfig.for_model("mpt", max_seq_len=77)) == 77
    assert gsil.window(AutoConfig.for_model("bloom")) == float("inf")


def test_a_tenth_is_held_out_by_seed(tmp_path, tokenizer, capsys):
    """Own data without --heldout would have a table of dashes; what is also trained on would flatter it."""
    rows = [{"prompt": f"{n}", "response": f"{n}"} for n in range(40)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    found = []
    for seed in (0, 0, 1):
        demos, _, heldout, _ = data_of(path, tokenizer, f"--seed {seed}")
        found.append([demo["response"] for demo in heldout + demos])
        assert len(heldout) == 4 and sorted(found[-1], key=int) == [row["response"] for row in rows]
    assert found[0] == found[1] and {*found[0][:4]} != {*found[2][:4]}
    printed = capsys.readouterr().out
    assert "no --heldout: a tenth is held out, 4;" in printed and "warning" not in printed
