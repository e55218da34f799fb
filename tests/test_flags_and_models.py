"""The edges of gsil.py: flags and models. A person's mistake is one sentence, before any work."""

import io
import json
import math
import os
import runpy
import sys

import pytest
import torch
import transformers
from conftest import ZEPHYR, byte_tokenizer, tiny_model
from helpers import EOS, assistant, random_model, read_jsonl, refusal, run, save, user, write_jsonl
from tokenizers.processors import TemplateProcessing

import gsil
import irft


def test_defaults(capsys):
    """A default that --help hides would have to be looked up in the code."""
    with pytest.raises(SystemExit):
        gsil.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "(default: 0)" in text and "(default: 0.3)" in text and "default: None" not in text
    own, toy = gsil.parse_args(["--data", "x.jsonl", "--shift=-1e-3"]), gsil.parse_args([])
    assert own.dev is own.heldout is own.habit is toy.shift is None and own.shift == -0.001
    assert toy.dev == f"{gsil.TOY}/dev.jsonl" and toy.heldout == f"{gsil.TOY}/heldout.jsonl"


OUT_OF_RANGE = """--scale 0, --scale nan, --scale inf, --batch 0, --rounds -1, --epochs 1.5, --lr x, --loss dpo,
    --shift x, --shift 1.2.3, --shift nan, --shift inf, --device tpu, --temperature -1, --temperature 1e-39, --micro-batch 0,
    --max-new-tokens 0, --seed -1, --learning-rate 1, --sca 1, --baseline x, --habit (, --prompt-template Q:,
    --prompt-template {prompt}{prompt}, --device cuda, --data=, --resume="""


def test_flags_out_of_range_are_refused_by_name(capsys):
    """A typing error would train another model, or end hours later in a traceback."""
    for flags in OUT_OF_RANGE.split(","):
        with pytest.raises(SystemExit) as stop:
            gsil.parse_args(flags.split())
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and all(word in said for word in flags.split()), flags


def unusable_models(folder):
    """Makes of the folder one unusable model after the other; yields what must be said of it."""
    byte_tokenizer().save_pretrained(folder)
    # These load without an error, but not as what they are:
    changes = {"quantized": {"quantization_config": {"quant_method": "fp8"}}, "lm_head.": {"vocab_size": 310}}
    changes |= {"model.layers.1.": {"num_hidden_layers": 1}, "model.layers.2.": {"num_hidden_layers": 3}}
    for says, values in changes.items():
        tiny_model().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        yield says
    (folder / "adapter_config.json").write_text("{}")
    yield "adapter"
    (folder / "adapter_config.json").unlink()
    random_model("roberta", is_decoder=True).save_pretrained(folder)
    yield "padding or cache"  # it counts positions from the padding
    random_model("mamba", state_size=8).save_pretrained(folder)
    yield "mamba"
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(folder)
    yield "nan"
    # These do not load:
    os.truncate(folder / "model.safetensors", 1000)
    yield "no causal language model can be loaded"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": folder}, folder / "pytorch_model.bin")
    yield "no causal language model can be loaded"  # a pickle with more than tensors can run code
    tiny_model().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    yield "its tokenizer needs EOS, and a chat template or --prompt-template"
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    yield "its tokenizer needs EOS"
    (folder / "tokenizer.json").unlink()
    yield "no tokenizer can be loaded"
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.C"}}')
    (folder / "code.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    yield "no config can be loaded"
    (folder / "round_1").mkdir()
    (folder / "config.json").rename(folder / "round_1/config.json")
    yield f"it has {folder}/round_1"  # a folder of runs


def test_a_model_that_cannot_be_used_is_one_sentence_before_any_work(inputs, tmp_path, capsys):
    """Random weights would train, samples come from another model, or a model's code run."""
    for says in unusable_models(tmp_path / "model"):
        said = refusal(capsys, f"{inputs} --model {tmp_path}/model --out {tmp_path}/out")
        assert said.startswith("error: ") and says in said.replace("NaN", "nan"), said
        assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no folder, and no code has run
    said = refusal(capsys, f"{inputs} --model nobody/nothing --out {tmp_path}/out")
    assert said.startswith("error: nobody/nothing: ") and "Hub" in said


ENDS = [
    ([EOS, 2], "</s>", {EOS, 2}),
    (2, "</s>", {EOS, 2}),
    (None, "</s>", {EOS}),
    (None, "<|end|>", {EOS, 2}),
]


@pytest.mark.parametrize("listed, end, expected", ENDS)
def test_every_eos_the_model_lists_ends_a_response(listed, end, expected, inputs, tmp_path, capsys):
    """A chat model's samples would run on to the cap, as its turns may end by another id."""
    model = tiny_model()
    model.generation_config.eos_token_id = listed
    save(tmp_path / "model", model, byte_tokenizer(ZEPHYR.replace("</s>", end)))
    flags = ["--model", f"{tmp_path}/model", "--rounds=1", "--baseline=none", f"--out={tmp_path}/out"]
    assert gsil.read_data(gsil.parse_args([*inputs.split(), *flags])).eos_ids == expected
    run([*inputs.split(), *flags])
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "out/round_1")
    assert saved.eos_token_id == sorted(expected)  # or transformers' generate would run on
    assert "no --data" not in capsys.readouterr().out
    gsil.read_data(gsil.parse_args(flags[:2]))
    assert f"\nno --data: {tmp_path}/model learns the sums" in "\n" + capsys.readouterr().out


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_a_prompt_template_is_used_and_saved(bos, tmp_path, capsys):
    """A base model would be trained on one format and used with another, or without its BOS."""
    tokenizer = byte_tokenizer(chat_template=None)
    if bos:
        first = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = first
    data = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a {b}", "response": "c"}] * 4)
    flags = f"--model {save(tmp_path / 'model', tiny_model(), tokenizer)} --data {data} --baseline none"
    template = ["--max-new-tokens", "9", "--prompt-template", r"Q:\t{prompt}\n A: "]
    run([*flags.split(), "--out", f"{tmp_path}/run", *template])
    pair = read_jsonl(tmp_path / "run/round_1.jsonl")[0]
    assert pair["prompt"] == bos + "Q:\ta {b}\n A: "
    assert pair["prompt_ids"] == tokenizer(pair["prompt"], add_special_tokens=False).input_ids
    assert pair["real_ids"] == tokenizer("c", add_special_tokens=False).input_ids + [EOS]
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/round_1")
    asked = saved.apply_chat_template([user("a {b}")], tokenize=False, add_generation_prompt=True)
    assert asked == pair["prompt"]
    write_jsonl(data, [{"messages": [user("a"), assistant("b")] * 2}] * 4)
    assert "--prompt-template" in refusal(capsys, [*flags.split(), *template])


def test_a_warmup_without_an_end_is_refused(inputs, tmp_path, capsys):
    """A run whose rate never comes to --lr would end as if it had worked."""
    rft = ("--reward-steps 1 --policy-steps 9", "--reward-steps 9 --policy-steps 9 --batch 6")  # or of SFT
    for flags, script in (("--batch 6", gsil), *((flags, irft) for flags in rft)):
        said = refusal(capsys, f"{inputs} {flags} --epochs 1 --warmup 1 --out {tmp_path}/out", script)
        assert said.startswith("error: --warmup 1: ") and not (tmp_path / "out").exists()


def test_a_terminal_without_the_letter(inputs, tmp_path, monkeypatch):
    """A UnicodeEncodeError would end the run at the first é of a sample."""
    data = write_jsonl(tmp_path / "é.jsonl", [{"question": "café ?", "answer": "#### 1"}] * 3)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = f"{inputs} --data {data} --heldout {data} --rounds 0 --out {tmp_path}/é"
    monkeypatch.setattr(sys, "argv", ["gsil.py", *flags.split()])
    runpy.run_path(gsil.__file__, run_name="__main__")
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")
    assert "caf\\xe9 ?" in printed and f"results in {tmp_path}/\\xe9" in printed
