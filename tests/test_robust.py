"""Nothing lost, nobody misled: killed runs go on, and a person's mistake gets one sentence.

Runs here are of a random two-layer model on six rows, so that each takes a fraction of a second. Those that
are killed are processes of their own, forked by a server that has imported the scripts before.
"""

import copy
import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import gsil
import irft
from conftest import byte_tokenizer, tiny_model
from test_gsil import assistant, metrics, user, weights, write_jsonl

SCRIPTS = {"gsil": gsil, "irft": irft}
ROWS = [{"question": f"What is {n} ?", "answer": f"it is {n} . #### {n}"} for n in range(6)]
FAST = {
    "gsil": "--rounds 2 --epochs 1 --batch 4 --lr 1e-3",
    "irft": "--rounds 2 --reward-steps 1 --policy-steps 1 --policy-batch 2 --group-size 2 --batch 4",
}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Flags for a model and data, both tiny."""
    folder = tmp_path_factory.mktemp("inputs")
    save(folder / "model", tiny_model(), byte_tokenizer())
    write_jsonl(folder / "demos.jsonl", ROWS)
    return f"--model {folder}/model --data {folder}/demos.jsonl --max-new-tokens 5"


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def run(script, flags):
    return script.run_safely(script.main, script.parse_args(flags.split()))


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """script -> the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, script in SCRIPTS.items():
        run(script, f"{inputs} {FAST[name]} --out {folder / name}")
    return folder


def check_equal(ours, theirs):
    """The same files with the same weights, and the same metrics but for the clock."""
    saved = sorted(path.relative_to(theirs).parent for path in Path(theirs).rglob("model.safetensors"))
    assert len(saved) >= 3
    assert saved == sorted(path.relative_to(ours).parent for path in Path(ours).rglob("model.safetensors"))
    for part in saved:
        assert weights(ours / part) == weights(theirs / part), part
    assert metrics(ours) == metrics(theirs)
    assert not list(Path(ours).rglob("*.partial"))


# ---- killed anywhere ---------------------------------------------------------------------------------------


HOLD = {  # moment -> a function that is called then, and at which of its calls the process is killed
    "sampling": ("no_nan", lambda calls: len(calls) == 7),  # after base: the second token of round 1
    "training": ("check_finite", lambda calls: len(calls) == 3),  # in round 2
    "saving": ("settle", lambda calls: calls[-1][1].name == "round_1"),  # all written, not yet renamed
}


def script_process(name, flags, folder, moment, limit, threads):
    """What `python NAME.py FLAGS` does; at the moment it makes a file and waits to be killed."""
    script, calls = SCRIPTS[name], []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
    sys.argv = [f"{name}.py"]
    sys.stdout = sys.stderr = open(folder / "said", "w", buffering=1)
    torch.set_num_threads(threads)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if moment:
        function, is_now = HOLD[moment]
        whole = getattr(script, function)

        def waits(*args):
            calls.append(args)
            if is_now(calls):
                (folder / "now").touch()
                signal.pause()
            return whole(*args)

        setattr(script, function, waits)
    run(script, flags)


def script_stopped(name, flags, folder, moment=None, by=None, limit=None):
    """Exit code and last line of a script that is sent a signal at a moment, or is left little disk."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["gsil", "irft"])
    process = server.Process(
        target=script_process, args=(name, flags, folder, moment, limit, torch.get_num_threads())
    )
    process.start()
    while by and process.is_alive() and not (folder / "now").exists():
        process.join(0.01)
    if by:
        os.kill(process.pid, by)
    process.join()
    said = (folder / "said").read_text()
    assert "Traceback" not in said
    return process.exitcode, said.splitlines()[-1]


@pytest.mark.parametrize("moment", HOLD)
@pytest.mark.parametrize("name", SCRIPTS)
def test_kill_9_and_resume(name, moment, inputs, undisturbed, tmp_path):
    """A machine that is taken away must cost no more than the phase it was in, and change no digit."""
    out = tmp_path / "out"
    flags = f"{inputs} {FAST[name]} --out {out}"
    code, _ = script_stopped(name, flags, tmp_path, moment, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (out / "summary.json").exists()
    run(SCRIPTS[name], f"--resume {out}")
    check_equal(out, undisturbed / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fault_at_every_write_and_resume(name, inputs, undisturbed, tmp_path, monkeypatch):
    """Each rename of a run in turn fails, and leaves half of what was to be renamed: no file may be taken for
    whole, and none be missed, afterwards."""
    replace, calls = os.replace, []

    def fails(source, target):
        calls.append(str(target))
        if len(calls) in at:
            for file in filter(Path.is_file, (Path(source), *Path(source).rglob("*"))):
                os.truncate(file, file.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    at, whole = [], tmp_path / "whole"
    run(SCRIPTS[name], f"{inputs} {FAST[name]} --out {whole}")
    writes = {path.replace(str(whole), ""): n for n, path in enumerate(calls, 1)}  # of each file the last
    assert {"/args.json", "/metrics.jsonl", "/round_1", "/round_2", "/sft", "/summary.json"} <= {*writes}
    assert ("/round_2.partial/reward" in writes) == (name == "irft")
    rounds = "/round_1" if name == "irft" else "nothing"  # the first round of irft.py would show no more
    for n in sorted({2, *(n for path, n in writes.items() if rounds not in path)} - {1}):
        calls.clear()
        at, out = [n], tmp_path / str(n)
        with pytest.raises(SystemExit) as stop:
            run(SCRIPTS[name], f"{inputs} {FAST[name]} --out {out}")
        assert stop.value.code == 2
        calls.clear()
        at = []
        run(SCRIPTS[name], f"--resume {out}")
        check_equal(out, undisturbed / name)
        shutil.rmtree(out)


@pytest.mark.parametrize("file", ["metrics.jsonl", "round_2.partial/generated.jsonl"])
def test_a_last_line_that_was_cut_off_is_dropped_and_said(
    file, inputs, undisturbed, tmp_path, monkeypatch, capsys
):
    """Files that were copied while a run wrote them end in half a line. Half a round's samples would train
    another model than the whole round's."""
    monkeypatch.setattr(gsil, "train_round", stops_in_round_2(gsil.train_round))
    with pytest.raises(SystemExit):
        run(gsil, f"{inputs} {FAST['gsil']} --out {tmp_path}")
    monkeypatch.undo()
    text = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(text[:-20])
    run(gsil, f"--resume {tmp_path}")
    assert f"{tmp_path / file}: dropped its last line" in capsys.readouterr().out
    check_equal(tmp_path, undisturbed / "gsil")


def stops_in_round_2(train_round):
    def wrapped(*args):
        for record in train_round(*args):
            yield record
            if record["phase"] == "round 2":
                raise KeyboardInterrupt

    return wrapped


def test_a_run_of_the_other_script_is_not_resumed(undisturbed, capsys):
    """Their flags differ: gsil.py would go on with a run of RFT by another method, and call it the same."""
    for name, other in (("gsil", "irft"), ("irft", "gsil")):
        with pytest.raises(SystemExit) as stop:
            run(SCRIPTS[name], f"--resume {undisturbed / other}")
        assert stop.value.code == 2 and "another script" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_prints_the_command_that_goes_on(name, inputs, undisturbed, tmp_path):
    """A traceback does not tell how to go on. The command it prints is run as it stands."""
    out = tmp_path / "out"
    flags = f"{inputs} {FAST[name]} --out {out}"
    code, last = script_stopped(name, flags, tmp_path, "training", signal.SIGINT)
    assert code == 130
    message, _, command = last.partition("; go on with: python ")
    assert message == "error: stopped" and command.split()[0] == f"{name}.py"
    run(SCRIPTS[name], command.split(maxsplit=1)[1])
    check_equal(out, undisturbed / name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_leaves_the_last_round_as_it_was(name, inputs, undisturbed, tmp_path):
    """Files may not grow beyond 60 kB, which the weights exceed: saving round 2 fails, round 1 is safe."""
    out = tmp_path / "out"
    one = FAST[name].replace("--rounds 2", "--rounds 1")
    run(SCRIPTS[name], f"{inputs} {one} --out {out} --baseline none")
    before = weights(out / "round_1")
    code, last = script_stopped(name, f"--resume {out} --rounds 2", tmp_path, limit=60_000)
    assert code == 2 and "File too large" in last and f"{name}.py --resume {out}" in last
    assert weights(out / "round_1") == before and not (out / "round_2").exists()
    run(SCRIPTS[name], f"--resume {out}")
    for part in ("round_1", "round_2"):
        assert weights(out / part) == weights(undisturbed / name / part)


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    """After a power cut a rename may have happened and the bytes not: the file would be there, and empty."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    gsil.write(tmp_path / "x.jsonl", [{"a": 1}])
    assert done == [(tmp_path / "x.jsonl").stat().st_ino, "renamed"]
    done.clear()
    gsil.save_model(tiny_model(), byte_tokenizer(), tmp_path / "round_1")
    files = {path.stat().st_ino for path in (tmp_path / "round_1").iterdir()}
    assert len(files) >= 4 and {*done[:-1]} == files and done[-1] == "renamed"


# ---- a person's mistakes -----------------------------------------------------------------------------------


def broken_model(tmp_path, kind):
    """A folder that is not quite a model, and its flag."""
    folder, model, tokenizer = tmp_path / kind, tiny_model(), byte_tokenizer()
    if kind == "encoder-decoder":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=300, **shape))
    if kind == "NaN-weights":
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    if kind == "no-EOS":
        tokenizer.eos_token = None
    if kind == "changes-the-prompt":
        tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    if kind == "refuses":
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    if kind != "empty-folder":
        save(folder, model, tokenizer)
    folder.mkdir(exist_ok=True)
    if kind == "missing-weights":
        save(folder, model, tokenizer)
        kept = {name: w for name, w in model.state_dict().items() if "layers.1.mlp.up" not in name}
        model.save_pretrained(folder, state_dict=kept)
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if kind == "half-a-file":
        os.truncate(folder / "model.safetensors", 1000)
    if kind == "no-tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    if kind == "own-code":
        config = json.loads((folder / "config.json").read_text())
        code = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
        config |= {"model_type": "own", "auto_map": code}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return f"--model {folder}"


def rows(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"--data {tmp_path}/x.jsonl"


OK_ROW = json.dumps(ROWS[0]) + "\n"
MISTAKES = {  # what -> (its flags, what the sentence says: place, value, remedy)
    "missing file": (lambda p: f"--data {p}/x.jsonl", ["x.jsonl: no such file"]),
    "another kind of file": (lambda p: f"--data {p}/x.txt", ["x.txt", "take a local .jsonl"]),
    "empty file": (lambda p: rows(p, "\n"), ["x.jsonl: no rows"]),
    "bad JSON": (lambda p: rows(p, OK_ROW * 2 + "{oops\n"), ["x.jsonl line 3: not JSON"]),
    "not UTF-8": (lambda p: rows(p, b'{"prompt": "\xff"}'), ["x.jsonl line 1", "UTF-8"]),
    "unknown columns": (lambda p: rows(p, '{"a": 1}'), ["x.jsonl line 1: found 'a';", "question + answer"]),
    "null": (lambda p: rows(p, '{"prompt": null, "response": "a"}'), ["x.jsonl line 1: prompt and", "text"]),
    "number": (lambda p: rows(p, '{"question": "a", "answer": 4}'), ["line 1: question and answer", "text"]),
    "blank": (lambda p: rows(p, OK_ROW + '{"question": "a", "answer": " "}'), ["line 2", "not empty"]),
    "no assistant": (lambda p: rows(p, json.dumps({"messages": [user("a")]})), ["messages", "assistant"]),
    "messages of text": (lambda p: rows(p, '{"messages": ["a", "b"]}'), ["x.jsonl line 1: messages"]),
    "prompt of text in a list": (lambda p: rows(p, '{"prompt": ["a"], "response": "b"}'), ["line 1: prompt"]),
    "a prompt without a role": (
        lambda p: rows(p, json.dumps({"prompt": [{"content": "a"}], "response": "b"})),
        ["line 1: prompt and response"],
    ),
    "no role": (lambda p: rows(p, json.dumps({"messages": [{"content": "a"}, assistant("b")]})), ["line 1"]),
    "long prompt": (
        lambda p: rows(p, OK_ROW + json.dumps({"prompt": "a" * 400, "response": "b"})),
        ["x.jsonl line 2", "exceed the window of 256"],
    ),
    "no such folder": (lambda p: f"--model {p}/none", ["none: not a causal language model", "take a folder"]),
    "a Hub name without a network": (lambda p: "--model nobody/nothing", ["nobody/nothing", "take a folder"]),
    "a Hub dataset without a network": (lambda p: "--data nobody/nothing", ["nobody", "local .jsonl"]),
    "a model's EOS": (lambda p: broken_model(p, "no-EOS"), ["lacks an EOS token"]),
    **{
        kind: (lambda p, kind=kind: broken_model(p, kind), [kind, *says])
        for kind, says in {
            "encoder-decoder": ["not a causal language model"],
            "empty-folder": ["config.json"],
            "NaN-weights": ["not finite", "layers.1.mlp.up_proj"],
            "missing-weights": ["missing", "layers.1.mlp.up_proj"],
            "half-a-file": ["not a causal language model"],
            "no-tokenizer": ["not a tokenizer"],
            "pickle": [".safetensors"],
            "own-code": ["custom code", "--trust-remote-code"],
        }.items()
    },
    "changes the prompt": (lambda p: broken_model(p, "changes-the-prompt"), ["line 1", "changes the prompt"]),
    "refuses": (lambda p: broken_model(p, "refuses"), ["line 1", "must alternate", "--prompt-template"]),
    "template without a place": (
        lambda p: ["--prompt-template", "Q: "],
        ["--prompt-template 'Q: '", "{prompt}"],
    ),
    "template with a mistake": (lambda p: ["--prompt-template", "{% if {prompt}"], ["demos.jsonl line 1"]),
    "out of range": (lambda p: "--lr 0", ["--lr", "float > 0"]),
    "typo": (lambda p: "--learning-rate 1", ["unrecognized arguments: --learning-rate"]),
    "out below a file": (lambda p: rows(p, OK_ROW) + f" --out {p}/x.jsonl/out", ["Not a directory"]),
    "out is a file": (lambda p: rows(p, OK_ROW) + f" --out {p}/x.jsonl", ["Not a directory", "x.jsonl"]),
    "out is not empty": (lambda p: rows(p, OK_ROW) + f" --out {p}", ["is not empty", "another folder"]),
    "out cannot be made": (lambda p: "--out /proc/none/out", ["/proc/none"]),
}
if not torch.cuda.is_available():
    MISTAKES["no CUDA"] = (lambda p: "--device cuda", ["--device cuda: PyTorch finds none", "cpu"])


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_sentence(script, name, inputs, tmp_path, capsys):
    """A traceback, or a half-written folder, is no answer to a typo."""
    flags, says = MISTAKES[name]
    flags = flags(tmp_path)
    flags = flags.split() if isinstance(flags, str) else flags
    before = sorted(tmp_path.rglob("*"))
    whole = ["--out", str(tmp_path / "out"), *inputs.split(), *flags]
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].run_safely(SCRIPTS[script].main, SCRIPTS[script].parse_args(whole))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error
    assert all(word in error for word in says), error
    assert sorted(tmp_path.rglob("*")) == before


def test_code_of_a_model_runs_only_when_asked(tmp_path, inputs):
    """A model from the Hub may bring any program; but who asks for it must be able to train such a model,
    and to load what the run has saved."""
    model = broken_model(tmp_path, "own-code")
    (tmp_path / "own-code" / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    flags = [*inputs.split(), *model.split(" ", 1), "--out", str(tmp_path / "out"), *"--epochs 1".split()]
    gsil.main(gsil.parse_args([*flags, "--trust-remote-code"]))
    assert (tmp_path / "out" / "round_1" / "code.py").exists()
    with pytest.raises(SystemExit):
        gsil.load_model(tmp_path / "out" / "round_1", "cpu")


def test_fewer_rows_than_a_batch_make_one_small_batch(tmp_path, inputs):
    """Dropping the rest of a batch would train on nothing, silently."""
    run(gsil, f"{inputs} --batch 32 --epochs 3 --baseline none --out {tmp_path}")
    steps = [record["step"] for record in metrics(tmp_path) if "step" in record]
    assert steps == [1, 2, 3]


def test_a_response_that_fills_the_window_is_cut_and_counted(tmp_path, inputs, capsys):
    """The longest that --max-new-tokens lets in beside the prompt is trained on; what is cut is said."""
    row = {"prompt": "a", "response": "b" * 400}
    prompt = len(byte_tokenizer().apply_chat_template([user("a")], add_generation_prompt=True)["input_ids"])
    flags = f"{inputs} {rows(tmp_path, json.dumps(row))} --rounds 1 --epochs 1 --baseline none"
    for room, code in ((256 - prompt, None), (257 - prompt, 2)):
        try:
            run(gsil, f"{flags} --max-new-tokens {room} --out {tmp_path}/out")
            assert code is None and "1 rows, 1 cut at --max-new-tokens" in capsys.readouterr().out
        except SystemExit as stop:
            assert stop.code == code and "exceed the window of 256" in capsys.readouterr().err


def test_pad_that_is_eos_and_learns_to_stop(tmp_path, inputs):
    """A mask made by comparing ids with pad would hide EOS, and the model would never end a response."""
    assert byte_tokenizer().pad_token_id == byte_tokenizer().eos_token_id
    short = rows(tmp_path, "".join(json.dumps({"prompt": f"{n}", "response": "b"}) + "\n" for n in range(8)))
    flags = f"{inputs} {short} --heldout {tmp_path}/x.jsonl --epochs 16 --batch 4 --lr 1e-2 --baseline none"
    summary = gsil.main(gsil.parse_args(f"{flags} --out {tmp_path}/out".split()))
    before, after = (row["eos_share"] for row in summary["rows"])
    assert before < 0.2 and after > 0.8


def test_heldout_problems_among_the_demonstrations_are_counted(tmp_path, inputs, capsys):
    """A score on problems that were trained on is not a held-out score; nothing else would say so."""
    mixed = write_jsonl(tmp_path / "x.jsonl", [*ROWS[:2], {"question": "new", "answer": "4"}])
    args = gsil.parse_args(f"{inputs} --heldout {mixed} --dev {mixed} --out {tmp_path}/out".split())
    gsil.start(args, "gsil")
    said = capsys.readouterr().out
    assert said.count("warning: 2 of the 3 prompts") == 2
    clean = write_jsonl(tmp_path / "y.jsonl", [{"question": "new", "answer": "4"}])
    gsil.start(gsil.parse_args(f"{inputs} --heldout {clean} --out {tmp_path}/out2".split()), "gsil")
    assert "warning" not in capsys.readouterr().out


def test_a_reward_with_another_tokenizer_costs_no_samples(tmp_path, inputs, capsys):
    """Needed once a round has been sampled; a mistake must be found before, and must not block --out."""
    save(tmp_path / "reward", tiny_model(), byte_tokenizer(merges=[("a", "b")]))
    vocabulary = json.loads((tmp_path / "reward" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["z"], vocabulary["model"]["vocab"]["y"] = (
        vocabulary["model"]["vocab"][letter] for letter in "yz"
    )
    (tmp_path / "reward" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(SystemExit) as stop:
        run(irft, f"{inputs} --reward-model {tmp_path}/reward --out {tmp_path}/out")
    assert stop.value.code == 2 and "its tokenizer differs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()      # so that the corrected command can take the same --out


# ---- divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, flags, says",
    [
        ("gsil", "--lr 1e30 --epochs 8", ["round 1, step 2", "worst pair: '<|user|>", "lower --lr"]),
        ("gsil", "--loss sft --lr 1e30 --epochs 8", ["round 1, step 2", "worst pair: '<|user|>"]),
        ("gsil", "--scale 1e38 --loss brier", ["round 1, step 1: loss 0.5, gradient nan", "--scale"]),
        ("irft", "--method irft --lr 1e30 --epochs 8", ["irft 1, step 2", "worst pair", "lengths ["]),
        ("irft", "--reward-lr 1e30 --reward-steps 4", ["rft 1, reward step", "lower --reward-lr"]),
        ("irft", "--policy-lr 1e30 --policy-steps 4 --reward-steps 2", ["logits are NaN", "lower learning"]),
    ],
)
def test_an_overflow_stops_the_run_and_names_the_pair(name, flags, says, inputs, tmp_path, capsys):
    """Whoever sees 'loss nan' hours later cannot know which pair did it, or which flag would help."""
    with pytest.raises(SystemExit) as stop:
        run(SCRIPTS[name], f"{inputs} {flags} --batch 4 --out {tmp_path}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in error for word in says), error
    assert not (tmp_path / "round_1").exists() and (tmp_path / "args.json").exists()


def test_a_model_whose_logits_are_nan_does_not_answer(model, capsys):
    """The argmax of NaNs is token 0: it would be taken for a response."""
    sick = copy.deepcopy(model)
    sick.lm_head.weight.data[7] = math.nan
    with pytest.raises(SystemExit) as stop:
        gsil.sample(sick, [[5]], {1}, 3, 0, 1, "")
    assert stop.value.code == 2 and "logits are NaN" in capsys.readouterr().err


def test_control_sequences_do_not_reach_the_terminal(tmp_path, inputs, capsys, monkeypatch):
    """A model that has learned them could clear the screen, or write over the numbers."""
    evil = "\x1b[2J\x1b]0;title\x07\r\x08\u202e"
    monkeypatch.setattr(gsil.sys, "argv", ["gsil.py"])
    args = gsil.parse_args(f"{inputs} --rounds 0 --out {tmp_path}".split())
    settings, policy = gsil.start(args, "gsil")
    monkeypatch.setattr(type(settings.tokenizer), "decode", lambda *a, **k: evil)
    gsil.evaluate(settings, "base", policy)
    said = capsys.readouterr().out
    assert "\\x1b[2J" in said and all(char.isprintable() or char == "\n" for char in said)
