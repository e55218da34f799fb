"""Section 6 of gsil.py: any demonstrations -> ids. Inputs here are small copies of what people's files look
like.

Right is the correct text, a refusal in one sentence, or a warning with a count. Another text without a word
is not."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ZEPHYR, byte_tokenizer
from helpers import EOS, A, Q, assistant, demos_of, run, toy_flags, user, write_jsonl
from transformers import AutoConfig, AutoTokenizer

import gsil

FORMATS = {
    "prompt, response": {"prompt": Q, "response": A},
    "prompt, completion": {"prompt": Q, "completion": A},
    "conversational prompt, completion": {"prompt": [user(Q)], "completion": [assistant(A)]},
    "question, answer": {"question": Q, "answer": A},
    "prompt as conversation": {"prompt": [{"from": "human", "value": Q}], "response": A},
    "instruction, output": {"instruction": Q, "input": "", "output": A},
    "instruction, input, output": {"instruction": "How", "input": "many?", "output": A},
    "messages": {"messages": [user(Q), assistant(A)], "prompt_id": "1", "prompt": Q},
    "messages after which the user goes on": {"messages": [user(Q), assistant(A), user("Thanks")]},
    "text parts": {
        "messages": [user(Q), assistant([{"type": "text", "text": part} for part in (A[:3], A[3:])])]
    },
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
        "rejected": "\n\nHuman: a\n\nAssistant: b",
    },
    "SPIN": {"real": [user(Q), assistant(A)], "generated": [user(Q), assistant("no")]},
    "columns that are null": {"prompt": None, "response": None, "question": Q, "answer": A, "tools": None},
    "no tools": {"messages": [user(Q), assistant(A) | {"tool_calls": []}], "tools": []},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ids(name, tmp_path, tokenizer):
    """The same demonstration in any listed format must train the same ids: prompt as it is asked in use,
    response, EOS, and nothing behind it, though the template has a newline there."""
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [FORMATS[name]]), tokenizer)
    question = Q if name != "instruction, input, output" else "How\n\nmany?"
    prompt = f"<|user|>\n{question}</s>\n<|assistant|>\n"
    assert demo["prompt"] == prompt and demo["response"] == A and demo["answer"] == "3"
    assert demo["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    assert demo["real_ids"] == tokenizer(A, add_special_tokens=False).input_ids + [EOS]


def test_turns_before_the_last_are_the_prompt(tmp_path, tokenizer):
    """History and system turn belong to the question; a column `system` is a system turn, an empty one is
    none."""
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "system": "s"}
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "system": ""}
    with_system, without = demos_of(write_jsonl(tmp_path / "x.jsonl", [row, hh]), tokenizer)
    history = "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n"
    assert with_system["prompt"] == "<|system|>\ns</s>\n" + history and with_system["response"] == "d"
    assert without["prompt"] == history and without["response"] == "d"


TEXTS = [
    "NA",
    "N/A",
    "None",
    "null",
    "nan",
    "007",
    "2",
    "1.0",
    "a, b",
    'say "x"',
    "two\nlines",
    "\u2028 \U0001f600 é",
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("marks", ["", "BOM and CRLF"])
def test_texts_stay_as_they_are_in_every_kind_of_file(suffix, marks, tmp_path, tokenizer):
    """A cell NA that became a missing value, 007 that became 7, a BOM before the first column's name, or a
    text split at U+2028: each has cost people rows without a word."""
    rows = [{"question": f"{n} {text}", "answer": text} for n, text in enumerate(TEXTS)]
    path = tmp_path / f"x.{suffix}"
    end = "\r\n" if marks else "\n"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig" if marks else "utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = end.join(lines) + end if suffix == "jsonl" else "[" + f",{end}".join(lines) + "]"
        path.write_bytes(text.encode("utf-8-sig" if marks else "utf-8"))
    demos = demos_of(path, tokenizer)
    assert [demo["response"] for demo in demos] == TEXTS
    assert [demo["prompt"] for demo in demos] == [
        f"<|user|>\n{row['question']}</s>\n<|assistant|>\n" for row in rows
    ]


def test_a_jsonl_that_is_one_array_is_read(tmp_path, tokenizer):
    """Exported under the wrong name, it is still clear what is meant."""
    (tmp_path / "x.jsonl").write_text(json.dumps([FORMATS["messages"]] * 2, indent=1))
    assert [demo["response"] for demo in demos_of(tmp_path / "x.jsonl", tokenizer)] == [A, A]


CALL = {"name": "add", "arguments": {}}
UNUSABLE = {  # row -> what the sentence says of it
    "no column that we know": ({"text": "a", "label": 1}, ["found text, label", "question + answer"]),
    "no object": (3, ["columns", "3"]),
    "null": ({"prompt": "a", "response": None}, ["found prompt"]),
    "blank": ({"prompt": "a", "response": " "}, ["assistant is empty"]),
    "a number": ({"question": "a", "answer": 4}, ["assistant is empty or more than text: 4"]),
    "no assistant": ({"messages": [user("a")]}, ["messages", "response"]),
    "nobody asked": ({"messages": [assistant("a")]}, ["messages", "prompt"]),
    "messages of text": ({"messages": ["a", "b"]}, ["role and content"]),
    "a prompt of text in a list": ({"prompt": ["a"], "response": "b"}, ["role and content"]),
    "no role": ({"messages": [{"content": "a"}, assistant("b")]}, ["role and content"]),
    "tools": ({"messages": [user("a"), assistant("b")], "tools": [CALL]}, ["more than text"]),
    "a tool call": ({"messages": [user("a"), assistant("b") | {"tool_calls": [CALL]}]}, ["more than text"]),
    "a call without text": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [],
    ),
    "an image": ({"messages": [user([{"type": "image", "url": "x"}]), assistant("b")]}, ["more than text"]),
    "half an emoji": ({"prompt": "a", "response": "\ud83d"}, ["surrogates"]),
    "no transcript": ({"chosen": "Human: a\n\nAssistant: b"}, ["transcript"]),
    "EOS in the text": ({"prompt": "a", "response": "one </s> two"}, ["EOS token"]),
    "the second EOS in the text": ({"prompt": "a", "response": "one <|end|> two"}, ["EOS token"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_row_that_cannot_be_used_is_counted_or_refused(name, tmp_path, tokenizer, capsys):
    """One in ten is left out, with a warning that names the first place; a file of them is refused. Never is
    such a row trained on as another text: cut at an EOS, without its tools, as an empty answer."""
    row, says = UNUSABLE[name]
    good = {"prompt": "a", "response": "b"}
    demos = demos_of(write_jsonl(tmp_path / "x.jsonl", [good] * 9 + [row]), tokenizer)
    printed = capsys.readouterr().out
    assert [demo["response"] for demo in demos] == ["b"] * 9
    start = f"warning: 1 of 10 rows are left out, such as {tmp_path}/x.jsonl line 10: "
    assert printed.startswith(start) and printed.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        demos_of(write_jsonl(tmp_path / "x.jsonl", [good] * 8 + [row]), tokenizer)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {tmp_path}/x.jsonl line 9: ")
    assert "(1 of 9 rows cannot be used)" in error and all(word in error for word in says)


FILES = {  # name and content -> what the sentence says
    "x.jsonl": (None, ["no such file"]),
    "empty.jsonl": (b"\n", ["no rows"]),
    "typo.jsonl": (b'{"prompt": "a", "response": "b"}\n{"prompt"\n', ["typo.jsonl line 2", "Accepted are"]),
    "latin.jsonl": (b'{"prompt": "\xff"}', ["latin.jsonl line 1", "utf-8", "UTF-8"]),
    "broken.csv": (b'prompt,response\na,"b', ["broken.csv", "Accepted are"]),
    "latin.csv": (b"prompt,response\n\xff,b\n", ["latin.csv", "utf-8"]),
    "wide.csv": (b"prompt,response\na,b,c\n", ["wide.csv row 1"]),
    "no.parquet": (b"nothing", ["no.parquet", "Accepted are"]),
    "array.json": (
        b'[{"prompt": "a", "response": "b"}, {"prompt": "a"}]',
        ["array.json row 2", "found prompt"],
    ),
    "a/hub-name": (None, ["a/hub-name", "the name of a Hub dataset"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_a_sentence(name, tmp_path, tokenizer, monkeypatch, capsys):
    """The place and what is accepted; a library's traceback has neither."""
    content, says = FILES[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        demos_of(name, tokenizer)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in says), error


TEMPLATES = {  # a template that makes another text of a demonstration -> what the sentence says
    "changes the prompt": ("{{ messages | length }}{{ messages[0].content }}", "changes prompt or response"),
    "drops thoughts": (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "changes prompt or response",
    ),
    "drops system turns": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "drops a turn of the role system",
    ),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_changes_the_text_is_noticed(name, tmp_path, capsys):
    """Some drop the part before </think>, or system turns: the run would train on another text without a
    word."""
    template, says = TEMPLATES[name]
    turns = [{"role": "system", "content": "Be brief."}, user(Q), assistant("<think>hm</think>" + A)]
    with pytest.raises(SystemExit):
        demos_of(write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}]), byte_tokenizer(template))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/x.jsonl line 1: ") and says in error


def test_real_responses_end_as_the_models_template_does(tmp_path):
    """Some chat models list several EOS ids; the one after an answer is the template's, not the
    tokenizer's."""
    tokenizer = byte_tokenizer(ZEPHYR.replace("{{ m.content }}</s>", "{{ m.content }}<|end|>"))
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [FORMATS["messages"]]), tokenizer)
    assert demo["real_ids"][-1] == 2 and 2 not in demo["real_ids"][:-1] and tokenizer.eos_token_id == EOS


def test_a_token_across_the_cut_does_not_change_the_prompt(tmp_path):
    """If encoding prompt + response merges a token across their border, the sampled-from prompt must win."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "I")])  # newline + "I" become one token
    (demo,) = demos_of(write_jsonl(tmp_path / "x.jsonl", [FORMATS["messages"]]), tokenizer)
    assert demo["prompt_ids"] == tokenizer(demo["prompt"], add_special_tokens=False).input_ids
    assert tokenizer.decode(demo["prompt_ids"] + demo["real_ids"]) == demo["prompt"] + A + "</s>"


def test_words_that_the_tokenizer_does_not_know_are_counted(tmp_path, capsys):
    """A toy's tokenizer on other people's text makes <unk> of everything: the run would learn nothing, and
    end well."""
    tokenizer = AutoTokenizer.from_pretrained(gsil.TOY / "base")
    rows = [
        {"question": "Mia has 1 keys .", "answer": "#### 1"},
        {"question": "Supercalifragilistic", "answer": "#### 1"},
    ]
    data_of(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer)
    assert "warning: 1 rows have words that the tokenizer does not know" in capsys.readouterr().out


# ---- read_data: what fits, what is held out --------------------------------------------------------------------


def data_of(path, tokenizer, flags="", **config):
    config = AutoConfig.for_model("llama", **{"vocab_size": 300, "max_position_embeddings": 256} | config)
    args = gsil.parse_args(["--data", str(path), *flags.split()])
    return gsil.read_data(config, tokenizer, {EOS, 2}, args)


def test_a_response_is_cut_at_the_cap_without_eos(tmp_path, tokenizer, capsys):
    """Real and generated share one cap; EOS after half a sentence would give a cut response away."""
    path = write_jsonl(tmp_path / "x.jsonl", [FORMATS["messages"]])
    [[demo], *_, longest] = data_of(path, tokenizer, "--max-new-tokens 5")
    assert len(demo["real_ids"]) == longest == 5 and EOS not in demo["real_ids"]
    assert "warning: 1 responses are cut at --max-new-tokens 5" in capsys.readouterr().out


def test_the_longest_response_that_fits_the_window(tmp_path, tokenizer, capsys):
    """Prompt and response share the window: what fits is taken and said, what does not is refused before any
    work, with the number that fits."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "response": "b" * 400}])
    prompt = len(tokenizer("<|user|>\na</s>\n<|assistant|>\n").input_ids)
    for config, expected in (({}, 256 - prompt), ({"max_position_embeddings": 4096}, 256)):
        *_, longest = data_of(path, tokenizer, **config)
        assert longest == expected
        assert f"up to {longest} tokens a response" in capsys.readouterr().out
    [[demo], *_] = data_of(path, tokenizer, f"--max-new-tokens {256 - prompt}")
    assert len(demo["prompt_ids"] + demo["real_ids"]) == 256
    for flags, window, fits in ((f"--max-new-tokens {257 - prompt}", 256, 256 - prompt), ("", prompt, 0)):
        with pytest.raises(SystemExit) as stop:
            data_of(path, tokenizer, flags, max_position_embeddings=window)
        assert stop.value.code == 2 and f"error: --max-new-tokens: {fits} fit" in capsys.readouterr().err


def test_the_window_of_a_longrope_model_is_the_original_one():
    """Beyond it other factors apply to every position, so a log-prob would depend on the other rows in its
    batch; a wrapper's window is that of its text part, and some configs name none."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    small = {"hidden_size": 32, "num_attention_heads": 4, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model("phi3", rope_parameters=rope, max_position_embeddings=256, **small)
    assert gsil.window(config) == 64
    assert gsil.window(AutoConfig.for_model("llama", max_position_embeddings=256)) == 256
    assert gsil.window(AutoConfig.for_model("gpt2", n_positions=128)) == 128
    assert gsil.window(AutoConfig.for_model("mpt", max_seq_len=77)) == 77
    assert gsil.window(AutoConfig.for_model("bloom")) == float("inf")
    assert gsil.window(AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 99})) == 99


def test_token_ids_beyond_the_models_embeddings_are_refused(tmp_path, tokenizer, capsys):
    """They would crash a GPU in the middle; a vocabulary padded to a multiple of 64 is fine."""
    path = write_jsonl(tmp_path / "x.jsonl", [FORMATS["messages"]])
    data_of(path, tokenizer, "", vocab_size=320)
    with pytest.raises(SystemExit):
        data_of(path, tokenizer, "", vocab_size=64)
    assert "token ids above the 64 that its model knows" in capsys.readouterr().err


def test_a_tenth_is_held_out_by_seed(tmp_path, tokenizer, monkeypatch, capsys):
    """Own data without --heldout would have a table of dashes; a problem that is also trained on would
    flatter it."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"{n}", "response": f"{n}"} for n in range(40)])
    found = []
    for seed in (0, 0, 1):
        demos, dev, heldout, _ = data_of(path, tokenizer, f"--seed {seed}")
        assert len(demos) == 36 and dev == [] and len(heldout) == 4
        assert {demo["response"] for demo in demos + heldout} == {f"{n}" for n in range(40)}
        found.append([problem["response"] for problem in heldout])
    assert found[0] == found[1] != found[2]
    printed = capsys.readouterr().out
    assert "no --heldout: a tenth of the demonstrations, at most 500, is held out: 4" in printed
    assert "warning" not in printed
    many = [{"prompt": f"{n}", "prompt_ids": [5], "real_ids": [6], "answer": None} for n in range(5100)]
    monkeypatch.setattr(gsil, "read_demos", lambda *_: many)
    assert len(data_of(path, tokenizer)[2]) == 500


def test_problems_among_the_demonstrations_are_counted(small, tmp_path, capsys):
    """A score on problems that were trained on is not a held-out score; nothing else would say so."""
    lines = (small / "heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_text("".join(lines[:5]) + (small / "demos.jsonl").read_text())
    run(toy_flags(small, tmp_path / "out") + f"--data {tmp_path}/x.jsonl --rounds 0")
    assert "warning: 5 prompts of the dev or held-out problems are in" in capsys.readouterr().out


def test_dev_problems_need_answers(small, tmp_path, capsys):
    """They choose the best round: without '####' every round would be as good, and the choice luck."""
    free = write_jsonl(tmp_path / "x.jsonl", [{"question": "Mia has 1 keys .", "answer": "1"}])
    with pytest.raises(SystemExit):
        run(toy_flags(small, tmp_path / "out") + f"--dev {free}")
    assert "each needs an answer '#### value'" in capsys.readouterr().err and not (tmp_path / "out").exists()
