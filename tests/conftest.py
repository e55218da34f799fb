"""Tests share: no network, the CPU, the repository on the path, a tiny model and tokenizers in memory."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # threads that wait for a busy core sleep instead of spinning
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy"), str(ROOT / "tests" / "studies")]

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Tests compare digits and bytes, which a GPU changes from run to run. One test has it in a process of its own.
GPU = torch.cuda.is_available()
torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes that tests start
# Tiny models gain nothing by more threads, and a process that a test forks would wait for them.
torch.set_num_threads(1)

# Note the newline after EOS.
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
ZEPHYR += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def byte_tokenizer(chat_template=ZEPHYR, merges=()):
    """One token per byte (and per merge), EOS '</s>', which also pads, and a second EOS '<|end|>'."""
    vocabulary = {"<s>": 0, "</s>": 1, "<|end|>": 2}
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    special["extra_special_tokens"] = ["<|end|>"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **special)


def tiny_model(vocabulary=300, seed=0):
    """A random Llama, whose next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": vocabulary, "max_position_embeddings": 256, "initializer_range": 0.2}
    config = LlamaConfig(bos_token_id=0, eos_token_id=1, pad_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """40 demonstrations and 20 problems of the toy: a run takes a second or two."""
    folder = tmp_path_factory.mktemp("small")
    for name, n in {"demos": 40, "dev": 20, "heldout": 20}.items():
        lines = (ROOT / f"tests/toy/{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:n]))
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Flags of a run on a tiny model and six demonstrations: a fraction of a second."""
    from helpers import save, write_jsonl

    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"What is {n} ?", "answer": f"it is {n} . #### {n}"} for n in range(6)]
    data = write_jsonl(folder / "demos.jsonl", rows)
    return f"--model {save(folder / 'model', tiny_model())} --data {data} --max-new-tokens 5 "
