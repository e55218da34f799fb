"""Writes the rows of the multiple-choice fixtures, made up by rule from a seed.

    python tests/parity/make_rows.py

Only their form is that of the benchmarks; each has what could be treated wrongly: choices with more bytes
than characters, 3 to 5 choices, digits as labels, blanks at either end, double blanks, marks in brackets,
problems that are also among the worked examples, subjects of unequal size.
"""

import json
import random
from pathlib import Path

ROWS = Path(__file__).parent / "rows"
NOUNS = ["candle", "bóveda", "river", "Äpfel", "shelf", "книга", "kettle", "naïve café", "lamp"]
NOUNS += ["東京", "rope", "ünal"]
VERBS = ["holds", "moves", "breaks", "warms", "hides", "lifts", "paints", "counts"]
CONTEXTS = ["[header] How to {} [title] Take a {}.", "A man {}.  He has a {}.", "[substeps] Now {}, {}"]
SENTENCES = [
    "_ {v} the {x} because it was old.",
    "{a} met {b} so that _ .",
    "{a} gave {b} the {x} , and _{v}  it.",
    "The {x} fell, as {a} knew, but {b} did not see it, said _  when _ left.",
]


def phrase(rng, n):
    return " ".join(rng.choice(NOUNS if k % 2 == 0 else VERBS) for k in range(n))


def arc(rng, n):
    labels = rng.choice(["ABCDE", "12345"])[: rng.choice([3, 4, 4, 5])]
    texts = [phrase(rng, rng.randint(1, 5)) for _ in labels]
    if n == 2:
        texts[1] += " "  # nothing is stripped
    row = {"id": f"made-{n}", "question": f"What does the {phrase(rng, 3)}?"}
    return row | {"choices": {"text": texts, "label": list(labels)}, "answerKey": rng.choice(labels)}


def ending(rng):
    begin = rng.choice(["", "[title] ", "then "])
    return begin + phrase(rng, rng.randint(1, 5)) + rng.choice([".", "  again.", " [substeps] Go on ."])


def hellaswag(rng, n):
    ctx_b = ["", "she " + phrase(rng, 2), "He and Mira " + phrase(rng, 2), "[step]", "[header] THE  end"]
    row = {"ind": n, "activity_label": rng.choice(["Making tea", "Home and  Garden", " Rowing"])}
    row |= {"ctx_a": CONTEXTS[n % 3].format(phrase(rng, 2), phrase(rng, 1)), "ctx_b": ctx_b[n % 5]}
    return row | {"endings": [ending(rng) for _ in range(4)], "label": str(rng.randrange(4))}


def winogrande(rng, n):
    one, two = rng.sample(["Oleg", "Mira", "the café", "Ines", "a lamp"], 2)
    sentence = SENTENCES[n % 4].format(v=rng.choice(VERBS), x=rng.choice(NOUNS), a=one, b=two)
    options = {"option1": one + " " * (n % 5 == 1), "option2": two}
    return {"sentence": sentence, **options, "answer": rng.choice("12")}


def truthfulqa(rng, n):
    choices = [phrase(rng, rng.randint(1, 6)) + "." for _ in range(rng.randint(2, 6))]
    labels = [1, 0] + [rng.randint(0, 1) for _ in choices[2:]]
    rng.shuffle(labels)
    row = {"question": f"Is it true that the {phrase(rng, 3)}?"}
    row["mc1_targets"] = {"choices": choices, "labels": [1] + [0] * (len(choices) - 1)}
    return row | {"mc2_targets": {"choices": choices, "labels": labels}}


def mmlu(rng, n):
    row = {
        "question": " " * (n % 2) + f"Which {phrase(rng, 2)}?" + "\n" * (n % 3),
        "answer": rng.randrange(4),
    }
    return row | {"choices": [phrase(rng, rng.randint(1, 3)) for _ in range(4)]}


def write(name, rows):
    file = ROWS / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main():
    for make, split in ((arc, "test"), (hellaswag, "validation"), (winogrande, "validation")):
        rng = random.Random(make.__name__)
        rows = [make(rng, n) for n in range(8)]
        write(f"{make.__name__}/{split}", rows)
        # 12 rows of it, some twice, are problems: one's own is not among its examples
        write(f"{make.__name__}/train", [make(rng, n) for n in range(8, 36)] + (rows + rows[:4])[::-1])
    rng = random.Random("truthfulqa")
    write("truthfulqa/validation", [truthfulqa(rng, n) for n in range(8)])
    for subject, n in (("abstract_algebra", 7), ("anatomy", 4), ("marketing", 5), ("us_foreign_policy", 3)):
        rng = random.Random(subject)
        for split, size in (("test", n), ("dev", 5)):
            write(f"mmlu/{subject}/{split}", [mmlu(rng, k) for k in range(size)])


if __name__ == "__main__":
    main()
