"""eval.py against lm_eval 0.4.13: prompts, responses, log-likelihoods, what counts of them, means.

tests/parity/golden.json was written by tests/parity/oracle.py from lm_eval. Everything is offline.
"""

import pytest
from conftest import byte_tokenizer
from helpers import GOLDEN, evaluate, flags_of, oracle, write_jsonl

import eval as ev


@pytest.fixture(scope="session", name="models")
def models_of_parity(tmp_path_factory):
    """The folder with models A and B that lm_eval was asked about: see tests/parity/oracle.py."""
    folder = tmp_path_factory.mktemp("models")
    oracle.build_models(folder)
    if oracle.fingerprint(folder) != GOLDEN["models"]:
        pytest.skip("this version of tokenizers makes other models than golden.json is about")
    return folder


def check_equal(task, outcome, expected):
    """For each document the first failure names the cause: prompt, response, what counted."""
    for sample, document in zip(outcome["samples"][task], expected["documents"], strict=True):
        for key in ("prompts", "continuations", "prompt"):
            assert sample.get(key) == document.get(key)
        if "response" in document:
            assert sample["responses"] == [document["response"]]
            check_score(sample, document)
        else:
            # Sums of float32 logits, where a CPU may add in another order; mc2 is a probability, off by less.
            assert sample["loglikelihoods"] == pytest.approx(document["loglikelihoods"], abs=1e-4)
            assert sample["metrics"] == pytest.approx(document["metrics"], abs=1e-5)
    near = 1e-5 if "mc2" in task else 1e-9
    for key, value in expected["aggregates"].items():
        name, _, key = key.rpartition(" ")  # "mmlu_stem acc,none"
        found = outcome["results"][name or task][key]
        assert found == (None if value == "N/A" else pytest.approx(value, abs=near)), key


def check_score(sample, document):
    assert {name: found[0] for name, found in sample["extracted"].items()} == document["extracted"]
    assert sample["metrics"] == document["metrics"]


BATCHES = [(name, 1) for name in oracle.CASES]
# Rows of a batch end at different times and on different strings. Where the special token <|im_end|> ends
# one, lm_eval itself depends on the batch: these are its responses one by one.
BATCHES += [("A gsm8k 5 shots", 2), ("B gsm8k 2 shots, chat", 3), ("B gsm8k, every prompt cut", 8)]


@pytest.mark.parametrize("name, batch", BATCHES)
def test_equal_to_lm_eval(name, batch, models):
    """A prompt that differs in one blank, or one stop sequence less, changes the score."""
    task = oracle.CASES[name]["task"]
    outcome = evaluate(flags_of(oracle.CASES[name], models, batch))
    check_equal(task, outcome, GOLDEN["cases"][name])
    result = outcome["results"][task]
    assert result["truncated"] == (result["n"] if "every prompt cut" in name else 0)


@pytest.mark.parametrize("task", GOLDEN["canned"])
def test_canned_responses_score_as_in_lm_eval(task):
    """Tricky answers would count otherwise: '#### 18.', 'The answer is 18', '...', sys.exit(0)."""
    rows, responses = oracle.canned()[task]
    problems = [ev.TASKS[task].read(row) for row in rows]
    samples = [ev.TASKS[task].score(problem, [text]) for problem, text in zip(problems, responses)]
    for sample, document in zip(samples, GOLDEN["canned"][task]["documents"], strict=True):
        check_score(sample, document)
    summary = ev.summarize(samples)
    for key, value in GOLDEN["canned"][task]["aggregates"].items():
        assert summary[key] == pytest.approx(value, abs=1e-9)


def test_mmlu_in_one_file(models, tmp_path):
    """The Hub's configuration `all`, one table for all subjects, would not be read."""
    for split in ("test", "dev"):
        rows = []
        for folder in sorted((oracle.ROWS / "mmlu").iterdir()):
            rows += [row | {"subject": folder.name} for _, row in ev.read_rows(f"{folder}/{split}.jsonl", "")]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    outcome = evaluate(f"--model {models}/A --tasks mmlu --shots 5 --data {tmp_path} --device cpu")
    check_equal("mmlu", outcome, GOLDEN["cases"]["A mmlu 5 shots"])


def test_a_template_without_system_turn():
    """Gemma's template, which refuses MMLU's description as a system turn, would end the run."""
    tokenizer = byte_tokenizer()
    problem = {"question": "Which?", "examples": []}
    asked = ev.build_prompt(problem, tokenizer)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    assert ev.build_prompt(problem | {"description": "About anatomy."}, tokenizer) == asked
    tokenizer.chat_template = "{{ messages[-1].content }}"  # drops the examples
    with pytest.raises(SystemExit):
        ev.build_prompt(problem | {"examples": [{"question": "1+1?", "target": "2"}]}, tokenizer)
