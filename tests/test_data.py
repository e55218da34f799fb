"""Section 6 of gsil.py: any demonstrations -> ids, or a refusal or warning, but never silently another text."""

import csv
import io
import json
import re
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import ZEPHYR, byte_tokenizer
from helpers import EOS, A, Q, assistant, demos_of, refusal, user, write_jsonl
from tokenizers.normalizers import Lowercase
from transformers import AutoConfig

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
    {"messages": [{"role": "User", "content": Q}, {"role": " bot ", "content": A}]},
    {"messages": [{"role": "prompter", "content": Q}, {"role": "model", "content": A}]},
    {"prompt": Q, "chosen": A, "rejected": "Yes"},
    {"prompt": Q, "chosen": TURNS, "rejected": OTHERS, "messages": OTHERS},  # UltraFeedback
    {"chosen": TURNS, "rejected": OTHERS},
    {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": "\n\nHuman: a"},  # Anthropic's HH
    {"real": TURNS, "generated": OTHERS},  # SPIN
    {"prompt": None, "response": None, "question": Q, "answer": A, "tools": None},
    {"messages": [user(Q), assistant(A) | {"tool_calls": [], "functions": "[]"}], "tools": "[]"},
    {"prompt": Q, "response": A, "has_image": False, "num_tools": 0.0},
]
ASKED = f"<|user|>\n{Q}</s>\n<|assistant|>\n"
HISTORY = "<|user|>\na</s>\n<|assistant|>\nb</s>\n" + ASKED
ROWS = [(row, ASKED) for row in FORMATS] + [
    ({"messages": [user("a"), assistant("b"), *TURNS], "system": "s"}, "<|system|>\ns</s>\n" + HISTORY),
    ({"chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {Q}\n\nAssistant: {A}", "system": ""}, HISTORY),
    ({"instruction": "a", "input": "[]", "output": A}, "<|user|>\na\n\n[]</s>\n<|assistant|>\n"),
]


@pytest.mark.parametrize("row, prompt", ROWS)
def test_every_format_gives_the_same_ids(row, prompt, tokenizer):
    """A format would train other ids: without an earlier turn, without EOS, or beyond it."""
    demo = gsil.encode(row, tokenizer, {EOS, 2})
    assert demo["prompt"] == prompt and demo["response"] == A and demo["answer"] == "3"
    assert demo["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    assert demo["real_ids"] == tokenizer(A, add_special_tokens=False).input_ids + [EOS]


def test_where_prompt_and_response_end():
    """A model would learn another end than its template's, or a prompt that no one samples from."""
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
    """NA would be a missing value, 007 become 7, a BOM part of a name, U+2028 the end of a row."""
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


SYSTEM = [{"role": "system", "content": "Be brief."}, user(Q), assistant("<think>hm</think>" + A)]
LAST = ZEPHYR.replace("messages", "messages[1:]")  # drops the first turn
BROKEN = [  # row, a regex for what is said of it, and a chat template
    ({"text": "a", "label": 1}, "text.*label.*accepted.*prompt"),
    ({"Prompt": "a", "Response": "b"}, "Prompt.*accepted, in lower case, are prompt"),
    ({"prompt": "a", "response": None}, "accepted.*response"),
    ({"prompt": "a", "response": " "}, "turn is empty"),
    ({"question": "a", "answer": 4}, "empty.*4"),
    ({"messages": [assistant("a")]}, "messages.* has no prompt with a response"),
    ({"chosen": "Human: a\n\nAssistant: b"}, "transcript"),
    ({"prompt": "a", "response": "one <|end|> two"}, "EOS token"),
    ({"prompt": "<s>a", "response": "b"}, "<s> is in the prompt", "<s>" + ZEPHYR),
    ({"prompt": "zebra", "chosen": OTHERS}, "prompt.* is not in the conversation"),
    ({"prompt": [user("zebra"), user(Q)], "chosen": OTHERS}, "prompt.* is not in the conversation"),
    ({"instruction": "Double it", "input": 7, "output": "14"}, "input should be a text, not 7"),
    ({"prompt": "a", "response": "\ud83d"}, "surrogate"),  # half an emoji
    (3, "row.* 3"),
    ({"messages": [{"content": "a"}, assistant("b")]}, "turn.*role"),
    ({"messages": [[user("a"), assistant("b")]]}, "turn.*role"),
    ({"messages": "\n\n", "system": "s"}, "turn is empty"),
    ({"prompt": [user(["a"])], "response": "b"}, "turn"),
    ({"prompt": [user([{"type": "text"}])], "response": "b"}, "turn"),
    ({"messages": SYSTEM}, "changes or drops a turn", "{{ messages | length }}" + ZEPHYR),
    ({"messages": SYSTEM}, "drops a turn", ZEPHYR.replace("m.content", "m.content.split('</think>')[-1]")),
    ({"messages": SYSTEM}, "drops a turn", LAST),
    ({"messages": [SYSTEM[0], user("Be brief. Hi"), assistant("b")]}, "drops a turn", LAST),
    ({"messages": SYSTEM}, "must alternate", "{{ raise_exception('roles must alternate') }}"),
]
NO_DEMONSTRATIONS = [  # of these any number is left out
    ({"messages": [user([{"type": "image", "url": "x"}]), assistant("b")]}, "more than"),
    ({"messages": [user("a"), assistant("b") | {"tool_calls": ["f"]}]}, "tool_calls"),
    ({"messages": [user("a"), assistant("b")], "tools": ["f"]}, "tools"),
    ({"prompt": "a", "completion": "go away", "label": False}, "label"),
    ({"prompt": "a", "response": "b", "is_bad": "true"}, "is_bad"),
    ({"messages": [user("a"), assistant("b") | {"label": 1}], "label": "bad"}, "label"),
    ({"messages": [user("a"), assistant("b") | {"weight": 0}, user("c")]}, "weight"),
    ({"messages": [user("a"), assistant("b") | {"channel": "analysis"}]}, "channel"),
    ({"messages": [user("a"), assistant("b"), {"role": "ipython", "content": "c"}]}, "role.*ipython"),
    ({"prompt": "<image> a", "response": "b"}, "more than"),
    ({"prompt": "a", "response": "b", "snapshot": ["x.PNG"]}, "snapshot.*more than"),
    ({"prompt": "a", "response": "b", "my_reasoning": "I add."}, "my_reasoning.*more than"),
    ({"prompt": "a" * 400, "response": "b"}, "400|[0-9]+ tokens"),
]


@pytest.mark.parametrize("row, says, template", [(*case, ZEPHYR)[:3] for case in BROKEN + NO_DEMONSTRATIONS])
def test_rows_that_cannot_be_used_say_why(row, says, template, tmp_path, capsys):
    """Such a row would train as another text: cut at an EOS, without its tools or system turn."""
    (tmp_path / "x.json").write_text(json.dumps([row]))
    with pytest.raises(SystemExit) as stop:
        demos_of(tmp_path / "x.json", byte_tokenizer(template), room=300)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.match(rf"error: 1 of 1 rows .*{tmp_path}/x.json row 1: .*\n$", said)
    said = said.partition(" row 1: ")[2]
    assert re.search(says, said) and not re.search(r"Error\(|attribute|object", said)  # no words of Python


def test_unusable_rows_are_left_out_and_counted(tmp_path, tokenizer, capsys):
    """A broken row would cost a run, or a broken file be taken for a small one."""
    good, path = {"prompt": "a", "response": "b"}, tmp_path / "x.jsonl"
    broken, others = [case[0] for case in BROKEN if len(case) == 2], [row for row, _ in NO_DEMONSTRATIONS]
    rows = [good] * 3 + others + [good] * 9 * len(broken) + broken
    assert len(demos_of(write_jsonl(path, rows), tokenizer, room=300)) == 9 * len(broken) + 3
    printed = capsys.readouterr().out
    counts = [int(n) for n in re.findall(rf"^warning: (\d+) of {len(rows)} rows", printed, re.MULTILINE)]
    assert sum(counts) == len(broken + others) and f"{path} row " in printed
    with pytest.raises(SystemExit):
        demos_of(write_jsonl(path, [good] * 8 + broken[:1]), tokenizer)


FILES = [  # name, content, a regex for what the sentence says
    ("x.jsonl", None, "x.jsonl: .*[Nn]o such file"),
    ("empty.jsonl", b"\n", "empty.jsonl: no rows"),
    ("typo.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt"\n', "typo.jsonl after row 1: "),
    ("latin.jsonl", b'{"prompt": "\xff"}', "latin.jsonl.*: 'utf-8'"),
    ("open.csv", b'prompt,response\na,"b', "open.csv.*: unexpected end"),
    ("wide.csv", b"prompt,response\na,b,c\n", "wide.csv row 1: "),
    ("array.json", b'[{"prompt": "a", "response": "b"}, {"prompt": "a"}]', "array.json row 2: "),
    ("one.jsonl", b'{"prompt": "a", "response": "b"}', "one.jsonl has one row, but one is held out"),
    ("broken.parquet", b"a", "broken.parquet: "),
    ("a/hub-name", None, "a/hub-name: .*Hub"),
    ("notes.txt", b"a\n", "notes.txt .*.jsonl"),
]


@pytest.mark.parametrize("name, content, says", FILES, ids=[name for name, *_ in FILES])
def test_unusable_files_are_one_sentence(name, content, says, inputs, tmp_path, monkeypatch, capsys):
    """A person would not learn which file, which row and what is wrong with it."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    said = refusal(capsys, f"{inputs} --data {name} --out out")
    assert said.startswith("error: ") and re.search(says, said) and not Path("out").exists()


ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
PHI = {"hidden_size": 32, "num_attention_heads": 4, "rope_parameters": ROPE}
PHI["original_max_position_embeddings"] = 64
WRAPPER = {"text_config": {"max_position_embeddings": 99, "vocab_size": 300}}
IDS = byte_tokenizer()(ASKED.replace(Q, "a")).input_ids  # the prompt below; a token for each letter
SHORT = {"max_position_embeddings": 256}
WINDOWS = [  # flags, the model, its config; the longest response that this leaves, or what the sentence says
    ("", "llama", SHORT, 128),  # half of the window
    (f"--max-new-tokens {256 - len(IDS)}", "llama", SHORT | {"vocab_size": max(IDS) + 1}, 256 - len(IDS)),
    (f"--max-new-tokens {257 - len(IDS)}", "llama", SHORT, f"{len(IDS)} tokens"),
    ("", "llama", {"vocab_size": max(IDS)}, f"ids beyond the model's {max(IDS)}"),
    ("", "phi3", PHI, 32),  # beyond the original window of 64 all positions change
    ("", "gemma3", WRAPPER, 49),  # the window of its text part
    ("", "mpt", {"max_seq_len": 77}, 38),
    ("", "bloom", {}, 256),  # it names no window
    ("--max-new-tokens 9999", "bloom", {}, 400),
]


@pytest.mark.parametrize("flags, kind, config, expected", WINDOWS)
def test_prompts_and_responses_share_the_window(flags, kind, config, expected, tmp_path, capsys):
    """Positions beyond the window or ids beyond the embeddings would crash a GPU after hours."""
    byte_tokenizer().save_pretrained(tmp_path)
    AutoConfig.for_model(kind, **{"vocab_size": 300, "eos_token_id": EOS} | config).save_pretrained(tmp_path)
    long = {"prompt": "a" * 999, "response": "b"}  # is left out, and shortens the responses of no other row
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "response": "Q" * 399}, long])
    flags += f" --model {tmp_path} --data {path} --heldout {path}"
    if isinstance(expected, int):
        assert len(gsil.read_data(gsil.parse_args(flags.split())).demos[0]["real_ids"]) == expected
    else:
        assert expected in refusal(capsys, flags)


def test_what_may_explain_a_bad_run_is_counted(tmp_path, capsys):
    """A run on unknown words, on cut responses or on its own problems would end well."""
    rows = [{"question": f"Mia has {n} keys .", "answer": "1 + 1 = 2 . 2"} for n in range(1, 10)]
    heldout = write_jsonl(tmp_path / "heldout.jsonl", rows[:1])
    data = write_jsonl(tmp_path / "x.jsonl", [*rows, {"question": "Supercalifragilistic", "answer": "1"}])
    flags = f"--data {data} --heldout {heldout} --max-new-tokens 5"
    found = gsil.read_data(gsil.parse_args(flags.split()))
    for row in found.demos + found.heldout:  # EOS after half a response would tell whose it is
        assert len(row["real_ids"]) == 5 and EOS not in row["real_ids"]
    printed = capsys.readouterr().out
    for says in ("1 of 10 rows .* row 10: .*does not know", "10 responses .* cut at .* 5", "1 .*held-out"):
        assert re.search(f"warning: {says}", printed), says
    # With such a file as --dev the best epoch would be luck.
    assert "should end in '#### value'" in refusal(capsys, f"{flags} --dev {heldout}")


def test_a_tenth_is_held_out_by_seed(inputs, tmp_path, capsys):
    """The table of own data would be empty, or of demonstrations that were also trained on."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"{n}", "response": f"{n}"} for n in range(40)])
    parts = []
    for seed in (0, 0, 1):
        data = gsil.read_data(gsil.parse_args(f"{inputs} --data {path} --seed {seed}".split()))
        parts.append([{row["response"] for row in part} for part in (data.demos, data.heldout)])
        assert [*map(len, parts[-1]), len(set.union(*parts[-1]))] == [36, 4, 40]
    assert parts[0] == parts[1] != parts[2]
    printed = capsys.readouterr().out
    assert re.search(r"\nno --heldout: .*\b4\b", printed) and "warning" not in printed


def test_the_log_says_what_is_used_and_what_is_changed(tmp_path, tokenizer, capsys):
    """A system prompt in its own column, or the capitals, would be missing without a word."""
    row = {"prompt": Q, "response": "IRON is Fe", "system_prompt": "Be brief."}
    row |= {"history": [["a", "b"]], "id": 7}
    path = write_jsonl(tmp_path / "x.jsonl", [row, {"prompt": Q, "response": "iron is fe \n"}])
    demo, _ = demos_of(path, tokenizer)
    assert "Be brief." in demo["prompt"] and "history" not in demo
    printed = capsys.readouterr().out
    assert "prompt, response, system_prompt; not used: history, id\n" in printed and "changes" not in printed
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = Lowercase()
    demos_of(path, lower)
    assert "changes the text of 2 of 2 rows" in capsys.readouterr().out  # Q begins with a capital


def test_a_folder_with_configurations(inputs, tmp_path, capsys):
    """Such a dataset could not be named, and the error be a page of a library's code."""
    (tmp_path / "main").mkdir()
    write_jsonl(tmp_path / "main/train.jsonl", [{"question": Q, "answer": A}])
    configs = [f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "other")]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    [(place, row)] = gsil.read_rows(f"{tmp_path}:main", "train")
    assert place == f"{tmp_path}:main row 1" and row == {"question": Q, "answer": A}
    said = refusal(capsys, f"{inputs} --data {tmp_path} --out {tmp_path}/out")
    assert said.startswith(f"error: {tmp_path}: ") and "main" in said and "other" in said
    (tmp_path / "main/train.csv").write_text("prompt,response\na,NA\n")  # pandas would take NA for nothing
    for data in (tmp_path, f"{tmp_path}:main"):
        said = refusal(capsys, f"{inputs} --data {data} --out {tmp_path}/out")
        assert "main/train.csv" in said and "name a .csv file" in said
