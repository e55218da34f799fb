"""What several test files use: plain functions, tiny data and an oracle."""

import hashlib
import json
import math
import shlex
from functools import partial
from pathlib import Path

import torch

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


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def demos_of(path, tokenizer, eos_ids=(EOS, 2)):
    make = partial(gsil.encode, tokenizer=tokenizer, eos_ids=set(eos_ids))
    return gsil.read_demos(str(path), "train", make)


def run(flags):
    """What `python gsil.py FLAGS` does; flags may be a list or text as in a shell."""
    return gsil.main(gsil.parse_args(flags if isinstance(flags, list) else shlex.split(flags)))


def toy_flags(folder, out):
    """Flags of a run on the small slices of the toy; see the fixture `small`."""
    data, dev, heldout = (f"{folder}/{name}.jsonl" for name in ("demos", "dev", "heldout"))
    return f"--data {data} --dev {dev} --heldout {heldout} --out {out} "


def weights(folder):
    """The digest of a model's weights: equal if and only if the bytes are."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder):
    """metrics.jsonl without what the clock says."""
    records = read_jsonl(Path(folder) / "metrics.jsonl")
    for record in records:
        record.pop("seconds", None)
        record.get("row", {}).pop("seconds", None)
    return records


def finite(values):
    return all(math.isfinite(value) for value in values)
