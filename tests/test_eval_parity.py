"""eval.py against lm_eval 0.4.13: prompts, responses, log-likelihoods, what counts of them, means.

tests/parity/golden.json was written by tests/parity/oracle.py from lm_eval. Everything is offline.
"""

import importlib.util
import random

import pytest
from eval_tools import GOLDEN, flags_of, oracle, run, write_jsonl

import eval as ev


def check_equal(task, outcome, expected):
    """In this order the first failure names the cause: prompts, responses, answers, metrics, means."""
    samples, results = outcome["samples"][task], outcome["results"]
    theirs = expected["documents"]
    if "loglikelihoods" in samples[0]:
        for key in ("prompts", "continuations"):
            assert [sample[key] for sample in samples] == [document[key] for document in theirs]
        for sample, document in zip(samples, theirs):
            assert sample["loglikelihoods"] == pytest.approx(document["loglikelihoods"], abs=1e-4)
            # mc2 is a probability: as near as its log-likelihoods; all else is 0 or 1
            assert sample["metrics"] == pytest.approx(document["metrics"], abs=1e-5)
    else:
        assert [sample["prompt"] for sample in samples] == [document["prompt"] for document in theirs]
        assert [sample["responses"] for sample in samples] == [[document["response"]] for document in theirs]
        check_scores(samples, theirs)
    near = 1e-5 if "mc2" in task else 1e-9
    for key, value in expected["aggregates"].items():
        name, _, key = key.rpartition(" ")
        found = results[name or task][key]
        assert found == (None if value == "N/A" else pytest.approx(value, abs=near)), key


def check_scores(samples, theirs):
    for sample, document in zip(samples, theirs, strict=True):
        assert {name: found[0] for name, found in sample["extracted"].items()} == document["extracted"]
        assert sample["metrics"] == document["metrics"]


@pytest.mark.parametrize("name", oracle.CASES)
def test_equal_to_lm_eval(name, models):
    """A prompt that differs in one blank, a missing BOS, one stop string less: each changes the score."""
    outcome = run(flags_of(oracle.CASES[name], models))
    task = oracle.CASES[name]["task"]
    check_equal(task, outcome, GOLDEN["cases"][name])


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot_zeroshot", "humaneval", "humaneval_instruct"])
def test_canned_responses_score_as_in_lm_eval(task):
    """Right and wrong answers, tricky ones above all: '#### 18.', 'The answer is 18', '...', sys.exit(0)."""
    rows, responses = oracle.canned()[task]
    problems = [ev.TASKS[task].read(ev.Row(row)) for row in rows]
    samples = ev.TASKS[task].score(ev.TASKS[task], problems, [[text] for text in responses])
    check_scores(samples, GOLDEN["canned"][task]["documents"])
    summary = ev.summarize(
        [{"responses": [text], "truncated": False, **sample} for text, sample in zip(responses, samples)]
    )
    for key, value in GOLDEN["canned"][task]["aggregates"].items():
        assert summary[key] == pytest.approx(value, abs=1e-9)


LIVE = [
    "A arc_challenge, every prompt cut",
    "B hellaswag 2 shots, chat",
    "A winogrande 5 shots",
    "A truthfulqa_mc2",
]


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
@pytest.mark.parametrize(
    "name", [name for name, case in oracle.CASES.items() if "gsm8k" in case["task"] or name in LIVE]
)
def test_equal_to_lm_eval_live(name, models):
    """The golden file could be stale; where lm_eval is installed it is asked again."""
    outcome, task = run(flags_of(oracle.CASES[name], models)), oracle.CASES[name]["task"]
    expected = oracle.ask(oracle.CASES[name], models)
    check_equal(task, outcome, expected)


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("name", ["A gsm8k 5 shots", "B gsm8k 2 shots, chat", "B gsm8k, every prompt cut"])
def test_batch_size_changes_nothing(name, batch, models):
    """Rows of a batch end at different times and on different strings; padding must not leak into them. The
    special token <|im_end|> is a stop string that is not EOS: lm_eval itself depends on the batch there."""
    samples = run(flags_of(oracle.CASES[name], models, batch))["samples"][oracle.CASES[name]["task"]]
    assert [sample["responses"][0] for sample in samples] == [
        document["response"] for document in GOLDEN["cases"][name]["documents"]
    ]


@pytest.mark.parametrize(
    "name",
    [
        "A arc_challenge 25 shots",
        "B arc_challenge 2 shots, chat",
        "B hellaswag, every prompt cut",
        "A winogrande 5 shots",
        "A mmlu 5 shots",
    ],
)
def test_batch_size_changes_no_loglikelihood(name, models):
    """Contexts are padded on the left, rests on the right, problems have 3 to 5 choices: none may leak."""
    samples = run(flags_of(oracle.CASES[name], models, 7))["samples"][oracle.CASES[name]["task"]]
    for sample, document in zip(samples, GOLDEN["cases"][name]["documents"], strict=True):
        assert sample["loglikelihoods"] == pytest.approx(document["loglikelihoods"], abs=1e-4)


def test_mmlu_in_one_file(models, tmp_path):
    """The Hub's configuration `all` is one table with a column subject: the same as a folder per subject."""
    for split in ("test", "dev"):
        rows = []
        for folder in sorted((oracle.ROWS / "mmlu").iterdir()):
            rows += [row | {"subject": folder.name} for _, row in ev.read_rows(f"{folder}/{split}.jsonl", "")]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    outcome = run(f"--model {models}/A --tasks mmlu --shots 5 --data {tmp_path} --device cpu")
    check_equal("mmlu", outcome, GOLDEN["cases"]["A mmlu 5 shots"])


def test_the_fixtures_catch_the_traps():
    """Rows on which a wrong rule gives the same numbers would let it pass."""
    documents = {name: case["documents"] for name, case in GOLDEN["cases"].items()}
    differ = {"bytes": 0, "blank in front": 0, "sum": 0}
    for name, task in (("A arc_challenge 25 shots", "arc/test"), ("B hellaswag", "hellaswag/validation")):
        for document in documents[name]:
            choices = [text[1:].lstrip() for text in document["continuations"]]
            lls = document["loglikelihoods"]
            by = {
                "characters": [ll / len(text) for ll, text in zip(lls, choices)],
                "sum": lls,
                "bytes": [ll / len(text.encode()) for ll, text in zip(lls, choices)],
                "blank in front": [ll / (len(text) + 1) for ll, text in zip(lls, choices)],
            }
            for wrong in differ:
                differ[wrong] += by[wrong].index(max(by[wrong])) != by["characters"].index(
                    max(by["characters"])
                )
    assert all(differ.values()), differ
    for task, k in (("hellaswag", 10), ("winogrande", 5)):  # the problem itself is drawn at least once
        rows, pool = (
            [row for _, row in ev.read_rows(f"{oracle.ROWS / task}/{split}.jsonl", "")]
            for split in ("validation", "train")
        )
        stream = random.Random(1234)
        assert any(row in stream.sample(pool, k + 1) for row in rows)
        assert not any(row in some for row, some in zip(rows, ev.draw_shots(pool, k, rows, "others")))
    for task in ("hellaswag", "winogrande"):  # contexts that end in a blank
        assert any(
            prompt != prompt.rstrip()
            for name in documents
            if name.startswith(f"A {task}")
            for document in documents[name]
            for prompt in document["prompts"]
        )
    for _, row in [*ev.read_rows(f"{oracle.ROWS}/truthfulqa/validation.jsonl", "")][
        :1
    ]:  # true ones not in front
        assert row["mc2_targets"]["labels"] != sorted(row["mc2_targets"]["labels"], reverse=True)
    cut = documents["A arc_challenge, every prompt cut"]
    assert cut[0]["loglikelihoods"] != documents["A arc_challenge 25 shots"][0]["loglikelihoods"]


TABLE_K = [
    ("#### 18.", "18", "18", "18", None),
    ("#### 18.00", "18", "18.00", "18.00", None),
    ("#### $18", "18", None, "18", None),
    ("####18", "18", None, "18", None),
    ("####  18", "18", None, "18", None),
    ("#### -18", "-18", "-18", "-18", None),
    ("#### - 18", "-18", None, "18", None),
    ("#### 1,000", "1000", "1000", "1000", None),
    ("#### 1000", "1,000", "1000", "1000", None),
    ("#### 18 dollars", "18", "18", "18", None),
    ("#### 18%", "18", "18", "18", None),
    ("#### 1/2", "1", "1", "2", None),
    ("#### 3\n#### 18", "18", "3", "18", None),
    ("#### ,", "18", "", None, None),
    ("", "18", None, None, None),
    (" \n ", "18", None, None, None),
    ("eighteen", "18", None, None, None),
    ("١٨", "18", None, None, None),
    (".", "18", None, None, None),
    ("#### 18\n\nQuestion: next 5", "18", "18", "5", None),
    ("The answer is 18", "18", None, "18", "1"),
    ("The answer is 8", "8", None, "8", None),
    ("The answer is 18.", "18", None, "18", "18"),
    ("The answer is $18.", "18", None, "18", None),
    ("The answer is -18.", "-18", None, "-18", "-18"),
    ("The answer is 1,000.", "1000", None, "1000", "1000"),
    ("The answer is: 18.", "18", None, "18", None),
    ("the answer is 18.", "18", None, "18", None),
    ("It is 18...", "18", None, "18..", None),
    ("It is 18 and so on..", "18", None, ".", None),
    ("It is 18 (see step 3)", "18", None, "3", None),
    ("It is 5-3", "-3", None, "-3", None),
    ("It is **18**", "18", None, "18", None),
    ("\\boxed{18}", "18", None, "18", None),
    ("It is 18,", "18", None, "18", None),
    ("It is $$", "18", None, "", None),
    ("It is 1e3", "1000", None, "3", None),
]


@pytest.mark.parametrize("output, gold, strict, flexible, cot", TABLE_K)
def test_tricky_outputs(output, gold, strict, flexible, cot):
    """What counts as an answer is lm_eval's convention, odd as it is: none of these may be repaired."""
    row = {"question": "", "answer": f"Work.\n#### {gold}"}
    for name, expected in (("gsm8k", strict), ("gsm8k_cot_zeroshot", cot)):
        task = ev.TASKS[name]
        score = ev.score_answers(task, [task.read(ev.Row(row))], [[output]])[0]
        for filter_name, value in (("strict-match", expected), ("flexible-extract", flexible)):
            found = ev.normalize(score["extracted"][filter_name][0])
            assert found == ("[invalid]" if value is None else value)
            right = score["metrics"][f"exact_match,{filter_name}"]
            assert right == (value == gold.replace(",", "")), filter_name
