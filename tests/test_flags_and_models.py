"""The edges of gsil.py: flags, and section 9's models. A person's mistake is one sentence, before any work."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer, tiny_model
from helpers import EOS, read_jsonl, run, user, write_jsonl
from tokenizers.processors import TemplateProcessing

import gsil


def test_defaults(capsys):
    """One that --help hides, 0 among them, must be looked up in the code. The toy's problems belong to its
    demonstrations; a shift cancels in spin and in SFT, else it is learned."""
    with pytest.raises(SystemExit):
        gsil.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "(default: 0)" in text and "(default: 0.3)" in text and "default: None" not in text
    own = gsil.parse_args(["--data", "x.jsonl"])
    assert own.dev is None and own.heldout is None and own.shift == "learn"
    assert gsil.parse_args([]).dev == f"{gsil.TOY}/dev.jsonl"
    assert gsil.parse_args(["--loss", "spin"]).shift == gsil.parse_args(["--loss", "sft"]).shift == "0"
    for shift in ("2", "-1.5", ".5", "1e-3", "1E-3", "learn"):
        assert gsil.parse_args([f"--shift={shift}"]).shift == shift


OUT_OF_RANGE = """--scale 0, --scale nan, --scale inf, --batch 0, --rounds -1, --epochs 1.5, --lr x, --loss dpo, --shift x,
    --shift 1.2.3, --shift nan, --shift inf, --device tpu, --temperature -1, --micro-batch 0, --max-new-tokens 0,
    --seed -1, --learning-rate 1, --sca 1"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in OUT_OF_RANGE.split(",")])
def test_flags_out_of_range_are_refused_by_name(flags, capsys):
    """Before a model is loaded, with the flag and its value; abbreviations and typing errors are no flags."""
    with pytest.raises(SystemExit) as stop:
        gsil.parse_args(flags.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in error for word in flags.split())


MISTAKES = [  # flags, what the sentence says
    ("--model nobody/nothing", "nobody/nothing: no such folder, and no such model on the Hub"),
    ("--data nowhere/x.jsonl", "nowhere/x.jsonl: no such file"),
    ("--prompt-template Q:", "--prompt-template 'Q:': no {prompt}"),
    ("--max-new-tokens 300", "fit the model's window of 256 behind the prompt that begins"),
    ("--device cuda", "--device cuda: there is none here"),
]


def broken_models(folder):
    """Makes the folder not quite a model, in one way after the other: yields flags, what must be said."""
    flags = f"--model {folder}"
    byte_tokenizer().save_pretrained(folder)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Config(vocab_size=300, **shape)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder)
    yield flags, "no causal language model can be loaded"
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)
    transformers.MambaForCausalLM(mamba).save_pretrained(folder)
    yield flags, "mamba keeps no cache"
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(folder)
    yield flags, "missing or not finite numbers: model.layers.1.mlp.up_proj"
    tiny_model().save_pretrained(folder)
    transformers.LlamaConfig.from_pretrained(folder, num_hidden_layers=3).save_pretrained(folder)
    yield flags, "missing or not finite numbers: model.layers.2."
    os.truncate(folder / "model.safetensors", 1000)
    yield flags, "no causal language model can be loaded"
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    yield flags, "no file named model.safetensors"
    tiny_model().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    yield flags, "its tokenizer has no chat template; give a --prompt-template"
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    yield flags, "its tokenizer has no EOS token"
    (folder / "tokenizer.json").unlink()
    yield flags, "no tokenizer can be loaded"
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}')
    (folder / "code.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    yield flags, "no config can be loaded"


def test_a_mistake_is_one_sentence_before_any_work(inputs, tmp_path, capsys):
    """Random weights in place of missing ones, NaN, a model that cannot be sampled: found here in a sentence,
    not after hours in a traceback. No folder is in the way of the next try; a model's own code does not run."""
    for flags, says in itertools.chain(MISTAKES, broken_models(tmp_path / "model")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(f"{inputs} {flags} --out {tmp_path}/out")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and says in error, error
        assert not {"out", "ran"} & {path.name for path in tmp_path.iterdir()}


def test_every_eos_the_model_lists_ends_a_response(tmp_path, tokenizer):
    """A chat model may end a turn by another id than its tokenizer's EOS; samples would run on to the cap."""
    model = tiny_model()
    tokenizer.save_pretrained(tmp_path)
    for listed, expected in (([EOS, 2], {EOS, 2}), (2, {EOS, 2}), (EOS, {EOS}), (None, {EOS})):
        model.generation_config.eos_token_id = listed
        model.save_pretrained(tmp_path)
        assert gsil.load_tokenizer(gsil.parse_args(["--model", str(tmp_path)]))[2] == expected


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_a_prompt_template_is_used_and_saved(bos, tmp_path):
    """A base model without chat template trains on --prompt-template, typed with \\n and \\t; BOS comes first
    where the tokenizer would put it; braces in a prompt are its own. The saved model must know the format."""
    tokenizer = byte_tokenizer(chat_template=None)
    if bos:
        first = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = first
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a {b}", "response": "c"}] * 4)
    flags = f"--model {tmp_path}/model --data {data} --baseline none --max-new-tokens 9 --out {tmp_path}/run"
    run([*flags.split(), "--prompt-template", r"Q:\t{prompt}\n A: "])
    pair = read_jsonl(tmp_path / "run/round_1/generated.jsonl")[0]
    assert pair["prompt"] == bos + "Q:\ta {b}\n A: "
    assert pair["prompt_ids"] == tokenizer(pair["prompt"], add_special_tokens=False).input_ids
    assert pair["real_ids"] == tokenizer("c", add_special_tokens=False).input_ids + [EOS]
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/round_1")
    asked = saved.apply_chat_template([user("a {b}")], tokenize=False, add_generation_prompt=True)
    assert asked == pair["prompt"]


def test_a_terminal_without_the_letter_and_a_folder_that_cannot_be_made(inputs, tmp_path):
    """A UnicodeEncodeError would end the run at the first é of a sample; an error of the disk is one sentence
    that says how to go on."""
    data = write_jsonl(tmp_path / "é.jsonl", [{"question": "café ?", "answer": "#### 1"}] * 3)
    flags = f"{inputs} --data {data} --dev {data} --out {data}/out"
    command = [sys.executable, str(ROOT / "gsil.py"), *flags.split()]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, encoding="ascii", check=False)
    said = done.stderr.splitlines()[-1]
    assert "\\xe9.jsonl, too" in done.stdout and done.returncode == 2
    assert said.startswith("error: ") and "go on with --resume" in said
