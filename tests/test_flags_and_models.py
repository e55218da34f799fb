"""The edges of gsil.py: flags, and section 9's models. A person's mistake is one sentence, before any
work."""

import json
import math
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, byte_tokenizer, tiny_model
from helpers import EOS, read_jsonl, run, user, write_jsonl
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import gsil

# ---- flags ---------------------------------------------------------------------------------------------------


def test_help_shows_every_flag_with_its_default(capsys):
    """A default that --help hides, 0 among them, must be looked up in the code."""
    with pytest.raises(SystemExit):
        gsil.parse_args(["--help"])
    usage, _, flags = capsys.readouterr().out.partition("model and data:")
    text = " ".join(flags.split())
    assert all(group in text for group in ("method:", "optimizer:", "run:"))
    args = vars(gsil.parse_args(["--data", "x.jsonl"]))
    for name, value in args.items():
        flag = text.partition(f"--{name.replace('_', '-')} ")[2].partition("--")[0]
        assert flag, name
        if name not in ("data", "shift", "micro_batch", "out") and value not in (None, False):
            assert f"(default: {value})" in flag, name
    assert "Z makes\nprobabilities of it" in usage


def test_defaults_that_depend_on_other_flags():
    """The toy's problems belong to its demonstrations; a shift cancels in spin and in SFT, and is learned
    elsewhere."""
    assert gsil.parse_args([]).dev == f"{gsil.TOY}/dev.jsonl"
    own = gsil.parse_args(["--data", "x.jsonl"])
    assert own.dev is None and own.heldout is None and own.shift == "learn"
    assert gsil.parse_args(["--loss", "spin"]).shift == gsil.parse_args(["--loss", "sft"]).shift == "0"
    for shift in ("2", "-1.5", ".5", "1e-3", "1E-3", "learn"):
        assert gsil.parse_args([f"--shift={shift}"]).shift == shift


OUT_OF_RANGE = """--scale 0, --scale nan, --scale inf, --batch 0, --rounds -1, --epochs 1.5, --lr x, --loss dpo, --shift x,
    --shift 1.2.3, --shift nan, --shift inf, --device tpu, --temperature -1, --micro-batch 0, --max-new-tokens 0,
    --seed -1, --learning-rate 1, --resum runs/x"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in OUT_OF_RANGE.split(",")])
def test_flags_out_of_range_are_refused_by_name(flags, capsys):
    """Before a model is loaded, with the flag and its value; abbreviations and typing errors are no flags."""
    with pytest.raises(SystemExit) as stop:
        gsil.parse_args(flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in error for word in flags.split())


# ---- models --------------------------------------------------------------------------------------------------


def broken_model(tmp_path, kind):
    """A folder that is not quite a model."""
    folder = tmp_path / kind
    model = tiny_model()
    tokenizer = byte_tokenizer()
    if kind == "encoder-decoder":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=300, **shape))
    if kind in ("mamba", "rwkv", "recurrent_gemma"):
        settings = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        settings |= {
            "state_size": 8,
            "time_step_rank": 4,
            "attention_hidden_size": 32,
            "num_attention_heads": 4,
        }
        settings |= {"lru_width": 32, "attention_window_size": 8, "max_position_embeddings": 256}
        settings |= {"num_key_value_heads": 2, "head_dim": 8, "block_types": ["recurrent", "attention"]}
        if kind != "recurrent_gemma":
            settings = {
                key: settings[key] for key in settings if key not in ("head_dim", "lru_width", "block_types")
            }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    if kind == "NaN-weights":
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    if kind == "no-EOS":
        tokenizer.eos_token = None
    if kind == "no-template":
        tokenizer.chat_template = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "missing-weights":
        kept = {name: w for name, w in model.state_dict().items() if "layers.1.mlp.up" not in name}
        model.save_pretrained(folder, state_dict=kept)
    if kind == "more-layers":
        LlamaConfig.from_pretrained(folder, num_hidden_layers=3).save_pretrained(folder)
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
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if kind == "empty-config":
        (folder / "config.json").write_text("{}")
    return folder


MODELS = {  # kind -> what the sentence says besides the folder
    "encoder-decoder": ["no causal language model can be loaded"],
    "mamba": ["mamba keeps no cache"],
    "rwkv": ["rwkv keeps no cache"],
    "recurrent_gemma": ["recurrent_gemma keeps no cache"],
    "NaN-weights": ["not finite", "layers.1.mlp.up_proj"],
    "missing-weights": ["missing", "layers.1.mlp.up_proj"],
    "more-layers": ["missing", "model.layers.2."],
    "half-a-file": ["no causal language model can be loaded"],
    "pickle": ["no causal language model can be loaded", "model.safetensors"],
    "no-tokenizer": ["no tokenizer can be loaded"],
    "no-EOS": ["its tokenizer has no EOS token"],
    "no-template": ["its tokenizer has no chat template; give a --prompt-template"],
    "own-code": ["no config can be loaded", "custom code"],
    "empty-config": ["no config can be loaded"],
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_used_is_refused_before_any_work(kind, inputs, tmp_path, capsys):
    """Random weights in place of missing ones, NaN, a model that cannot be sampled: found here in a sentence,
    not after hours in a traceback, and no folder is left in the way of the next try. Its own code does not
    run."""
    folder = broken_model(tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(inputs + f"--model {folder} --out {tmp_path}/out")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith(f"error: {folder}: ")
    assert all(word in error for word in MODELS[kind]), error
    assert sorted(tmp_path.rglob("*")) == before


OTHERS = {  # flags -> what the sentence says
    "--model {path}/none": ["{path}/none: no such folder, and no such model on the Hub"],
    "--model nobody/nothing": ["nobody/nothing: no such folder"],
    "--data {path}/x.jsonl": ["{path}/x.jsonl: no such file"],
    "--prompt-template Q:": ["--prompt-template 'Q:': no {{prompt}}"],
    "--max-new-tokens 300": ["--max-new-tokens: 2", "fit the model's window of 256", "that begins"],
    "--device cuda": ["--device cuda: there is none here"],
}


@pytest.mark.parametrize("flags", OTHERS)
def test_a_mistake_is_one_sentence(flags, inputs, tmp_path, capsys):
    """A traceback, or a half-written folder, is no answer to a typing error."""
    with pytest.raises(SystemExit) as stop:
        run(inputs + flags.format(path=tmp_path) + f" --out {tmp_path}/out")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    assert all(word.format(path=tmp_path) in error for word in OTHERS[flags]), error
    assert not (tmp_path / "out").exists()


def test_every_eos_the_model_lists_ends_a_response(tmp_path, tokenizer):
    """A chat model may end a turn by another id than its tokenizer's EOS; samples would run on to the cap."""
    model = tiny_model()
    tokenizer.save_pretrained(tmp_path)
    args = gsil.parse_args(["--model", str(tmp_path)])
    for listed, expected in (([EOS, 2], {EOS, 2}), (2, {EOS, 2}), (EOS, {EOS}), (None, {EOS})):
        model.generation_config.eos_token_id = listed
        model.save_pretrained(tmp_path)
        assert gsil.load_tokenizer(args)[2] == expected


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_prompt_template_is_used_and_saved(adds_bos, tmp_path):
    """A base model without chat template trains on --prompt-template, typed with \\n and \\t; BOS comes first
    where the tokenizer would put it; braces in a prompt are its own. The saved model must know the format."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(chat_template=None)
    if adds_bos:
        bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = bos
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a {b}", "response": "c"}] * 4)
    flags = f"--model {tmp_path}/model --data {data} --baseline none --max-new-tokens 9 --out {tmp_path}/run"
    run([*flags.split(), "--prompt-template", r"Q:\t{prompt}\n A: "])
    pair = read_jsonl(tmp_path / "run/round_1/generated.jsonl")[0]
    assert pair["prompt"] == "<s>" * adds_bos + "Q:\ta {b}\n A: "
    assert (
        pair["prompt_ids"]
        == [0] * adds_bos + tokenizer("Q:\ta {b}\n A: ", add_special_tokens=False).input_ids
    )
    assert pair["real_ids"] == tokenizer("c", add_special_tokens=False).input_ids + [EOS]
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/round_1")
    assert (
        saved.apply_chat_template([user("a {b}")], tokenize=False, add_generation_prompt=True)
        == pair["prompt"]
    )


# ---- what `python gsil.py` adds to main ----------------------------------------------------------------------


def test_a_terminal_without_the_letter_and_a_full_disk(inputs, tmp_path):
    """After an hour of training a UnicodeEncodeError would end the run at the first é of a sample; a full
    disk (files may not grow beyond 60 kB, which the weights exceed) gets one sentence that says how to go on,
    and exit code 2."""
    rows = [{"question": f"{n} café \U0001f600 ?", "answer": f"#### {n}"} for n in range(3)]
    write_jsonl(tmp_path / "é.jsonl", rows)
    out = tmp_path / "out"
    flags = f"{inputs} --data {tmp_path}/é.jsonl --dev {tmp_path}/é.jsonl --epochs 1 --out {out}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "gsil.py"), *flags.split()],
        capture_output=True,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    said = done.stderr.decode("ascii").splitlines()
    assert b"\\xe9.jsonl, too" in done.stdout
    assert done.returncode == 2 and said[-1].startswith("error: ") and "Traceback" not in done.stderr.decode()
    assert said[-1].endswith(f"go on with --resume {out}")
    assert (out / "round_1.partial/generated.jsonl").exists() and not (out / "round_1").exists()


def test_the_shape_of_the_script():
    """One sitting: no line over 110 columns, and main() ends on the fourth screen."""
    lines = (ROOT / "gsil.py").read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert next(n for n, line in enumerate(lines, 1) if re.match(r"def sft_baseline", line)) <= 380
