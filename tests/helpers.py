"""What several test files use: plain functions, tiny data and an oracle."""

import json
import math
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import eval as ev
import gsil

EOS = 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16]]
PAIRS = [([5, 6, 7], [8, 9, 10, EOS]), ([11], [12, EOS]), ([13, 14, 15, 16, 17], [18, 19, 20, 21, 22, 23])]
Q, A = "How many?", "It is 3.\n#### 3"


def naive_logp(model, prompt, response):
    """One forward pass per token, no batch, no padding, no cache: slow and obviously right."""
    total = 0.0
    for i, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response[:i]])).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


@torch.no_grad()
def greedy(model, prompt, n, ends):
    """The argmax of one unpadded sequence at a time, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] not in ends):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def random_model(kind, **settings):
    """A model of any type, far from uniform, so that a position or a state that is wrong shows."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": 300}
    sizes |= {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | settings)).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    return model


def made_pairs(model, n=7, seed=0):
    """n pairs of ragged lengths, their references scored by the model."""
    rng = torch.Generator().manual_seed(seed)

    def ids(end):
        length = int(torch.randint(1, end, (), generator=rng))
        return torch.randint(3, 300, (length,), generator=rng).tolist()

    pairs = [{"prompt_ids": ids(6), "real_ids": ids(8), "generated_ids": ids(8)} for _ in range(n)]
    for side in ("real", "generated"):
        texts = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        for pair, logp in zip(pairs, gsil.score(model, texts, 4096)):
            pair[f"{side}_reference"] = logp
    return pairs


class Outcomes(torch.nn.Module):
    """Rewards a response of one token with r[token], and a prompt by its first token."""

    device = "cpu"

    def __init__(self, r, per_prompt=0.0):
        super().__init__()
        self.r, self.per_prompt = torch.nn.Parameter(r.clone()), per_prompt

    def forward(self, ids, last):
        return (self.r[ids[torch.arange(len(ids)), last]] + self.per_prompt * ids[:, 0])[:, None]  # (B, 1)


def gradient(model):
    """All of a model's gradients as one vector."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def relative(found, expected):
    """The largest difference of two vectors, as a share of the largest number of the second."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def save(folder, model, tokenizer=None):
    """Save a model with a tokenizer, by default that of the tests; returns the folder."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def demos_of(path, tokenizer, eos_ids=(EOS, 2), room=math.inf):
    """The demonstrations of a file whose prompts have at most `room` tokens."""
    encode_row = partial(gsil.encode, tokenizer=tokenizer, eos_ids=set(eos_ids), room=room)
    return gsil.read_demos(str(path), "train", encode_row)


def run(flags, script=gsil):
    """What `python gsil.py FLAGS` does; flags may be a list or text as in a shell."""
    return script.main(script.parse_args(flags if isinstance(flags, list) else shlex.split(flags)))


def refusal(capsys, flags, script=gsil):
    """The sentence with which `python gsil.py FLAGS` ends; its exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(flags, script)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def as_script(flags, monkeypatch, capsys):
    """(exit code, last line on stderr) of `python gsil.py FLAGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["gsil.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(gsil.__file__, run_name="__main__")
    return stop.value.code, capsys.readouterr().err.strip().rpartition("\n")[2]


def metrics(folder):
    """metrics.jsonl as {(phase, step): metrics}; of two lines for a step the last one counts."""
    lines = read_jsonl(Path(folder) / "metrics.jsonl")
    return {(line.pop("phase"), line.pop("step")): line for line in lines}


def logged(folder, phase):
    """The metrics of all steps of a phase, in order."""
    return [values for (name, _), values in metrics(folder).items() if name == phase]


def table(folder):
    """summary.json without what the clock says: {row: {column: number or None}}"""
    rows = json.loads((Path(folder) / "summary.json").read_text())
    return {name: {key: row[key] for key in row if key != "seconds"} for name, row in rows.items()}


def check_equal(ours, theirs):
    """The same files, weights and pairs, and the same metrics and table but for the clock."""
    names, expected = ([path.relative_to(out) for path in sorted(out.rglob("*"))] for out in (ours, theirs))
    assert names == expected
    for file in [*theirs.rglob("*.safetensors"), *theirs.glob("round_*.jsonl")]:
        assert (ours / file.relative_to(theirs)).read_bytes() == file.read_bytes()
    assert metrics(ours) == metrics(theirs) and table(ours) == table(theirs)


# ---- eval.py ---------------------------------------------------------------------------------
sys.path.insert(0, str(ROOT / "tests" / "parity"))
import oracle

GOLDEN = json.loads((ROOT / "tests/parity/golden.json").read_text("utf-8"))
GSM_ROW = {"question": "1+1?", "answer": "2\n#### 2"}
ARC_ROW = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


def evaluate(flags):
    """What `python eval.py FLAGS` does: prints tables, returns what --out contains."""
    return run(flags, ev)


def refused(capsys, flags, *says):
    """eval.py must end with exit code 2 and one sentence that has all of `says`."""
    sentence = refusal(capsys, flags, ev)
    assert sentence.startswith("error: ")
    for part in says:
        assert part in sentence, sentence


def lm_of(model, tokenizer=None, window=256):
    """What ev.load_lm makes of a folder, made of a model in memory."""
    return ev.LM("", tokenizer, model.config, {EOS}, window, {}, model, ev.find_cache_size(model))


def flags_of(case, models, batch=1):
    """One of oracle.CASES as flags of eval.py."""
    task = case["task"]
    flags = f"--model {models}/{case['model']} --tasks {task} --batch-size {batch} --allow-code-execution "
    flags += f"--data {oracle.ROWS / task.split('_')[0]} --max-new-tokens {oracle.NEW_TOKENS} --device cpu "
    flags += "".join(f"--{name} {case[name]} " for name in ("shots", "limit") if name in case)
    return flags + "--chat" * case.get("chat", False)
