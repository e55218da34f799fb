"""Makes the toy that gsil.py runs on by default: GSM8K in small, by writers who are careful or hasty.

    question   Ava has 7 apples . Ava buys 4 more . the number grows 2 times . how many apples does Ava have ?
    careful    7 + 4 = 11 . 11 * 2 = 22 . #### 22         shows every step and is right
    hasty      #### 17                                    skips the working and guesses, almost always wrong

Writers get hasty as problems get longer. The base model learned from a hasty crowd; the demonstrations come
from a more careful, still imperfect one (HASTY below). Nothing else differs between the two, so what a method
does to the habit can be predicted from HASTY.

    python tests/toy/make_toy.py                # all of tests/toy; the base model takes 6 to 10 minutes
    python tests/toy/make_toy.py --data-only    # the .jsonl files alone: seconds, identical on every machine
    python tests/toy/make_toy.py --perfect      # into runs/toy-perfect: the demonstrators are never hasty
    python tests/toy/make_toy.py --seed 1       # into runs/toy-1: everything anew, other questions and another base
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

HERE = Path(__file__).resolve().parent
# P(hasty | number of steps), for each crowd of writers
HASTY = {"base": {2: 0.5, 3: 0.7, 4: 0.9}, "demo": {2: 0.1, 3: 0.35, 4: 0.6}, "never": {2: 0, 3: 0, 4: 0}}
SIZES = {"demos": 2048, "dev": 500, "heldout": 500, "base": 20000, "preferences": 256}
LARGEST = 30  # all values are 0..30
NAMES = ["Ava", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivy", "Jon", "Kim", "Leo", "Mia", "Ned", "Ola", "Pia"]
ITEMS = ["apples", "books", "coins", "cards", "eggs", "hats", "keys", "nuts", "pens", "shells", "stamps", "toys"]
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<assistant> {{ m.content }} <eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def problem(rng):
    """One problem: (question, worked steps such as ["7 + 4 = 11", "11 * 2 = 22"], final value)."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    value = rng.randint(1, 12)
    sentences, steps = [f"{name} has {value} {item} ."], []
    for _ in range(rng.randint(2, 4)):
        options = [("+", n, value + n) for n in range(1, 10)] + [("-", n, value - n) for n in range(1, 10)]
        options += [("*", n, value * n) for n in (2, 3)] * 3  # else growth would be rare
        sign, n, result = rng.choice([option for option in options if 0 <= option[-1] <= LARGEST])
        events = {"+": f"{name} buys {n} more .", "-": f"{name} gives away {n} ."}
        events["*"] = f"the number grows {n} times ."
        sentences.append(events[sign])
        steps.append(f"{value} {sign} {n} = {result}")
        value = result
    return " ".join(sentences + [f"how many {item} does {name} have ?"]), steps, value


def write(rng, steps, value, hasty):
    """One writer's answer: a bare guess with probability hasty[number of steps], else worked and right."""
    if rng.random() < hasty[len(steps)]:
        return f"#### {rng.randint(0, LARGEST)}"
    return " . ".join(steps) + f" . #### {value}"


def make_rows(seed, perfect=False):
    """{part: its rows}; no question occurs twice. Preferences are two answers by demonstrators, of which just
    one is right; that one is chosen, as somebody would who can check answers."""
    rng, seen = random.Random(seed), set()
    rows = {part: [] for part in SIZES}
    habits = {"demos": "never" if perfect else "demo", "dev": "never", "heldout": "never", "base": "base"}
    for part, habit in habits.items():
        while len(rows[part]) < SIZES[part]:
            question, steps, value = problem(rng)
            writer = random.Random(rng.random())  # its own stream: --perfect changes no question
            if question not in seen:
                seen.add(question)
                rows[part].append({"question": question, "answer": write(writer, steps, value, HASTY[habit])})
    while len(rows["preferences"]) < SIZES["preferences"]:
        question, steps, value = problem(rng)
        answers = [write(rng, steps, value, HASTY["demo"]) for _ in range(2)]
        right = [answer.endswith(f"#### {value}") for answer in answers]
        if question not in seen and sum(right) == 1:
            seen.add(question)
            chosen, rejected = answers if right[0] else answers[::-1]
            rows["preferences"].append({"prompt": question, "chosen": chosen, "rejected": rejected})
    return rows


def make_tokenizer():
    """Word-level: one token per word, number or sign; spaces are nothing. Carries a chat template."""
    words = ["has", "buys", "more", "gives", "away", "the", "number", "grows", "times", "how", "many", "does", "have", "?", ".", "+", "-", "*", "=", "####"]
    vocabulary = SPECIAL + [str(n) for n in range(LARGEST + 1)] + sorted([*NAMES, *ITEMS, *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    special["extra_special_tokens"] = ["<user>", "<assistant>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


def train_base(rows, tokenizer, seed=0, steps=6000, batch=64, lr=4e-3):
    """Next-token training on the base rows, answers only: questions are noise to a model this small."""
    torch.manual_seed(seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes, **special))
    texts = []
    for row in rows:
        prompt = tokenizer(f"<user> {row['question']} <assistant>").input_ids  # as CHAT_TEMPLATE has it
        answer = tokenizer(f"{row['answer']} <eos>").input_ids
        texts.append((torch.tensor(prompt + answer), torch.tensor([-100] * len(prompt) + answer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=steps)
    rng = random.Random(seed)
    for step in range(steps):
        chosen = rng.sample(texts, batch)
        ids = pad_sequence([ids for ids, _ in chosen], True, pad)  # (B, T), padded on the right
        labels = pad_sequence([labels for _, labels in chosen], True, -100)  # -100: not scored
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"base model: step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    return model.eval()


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("--data-only", action="store_true", help="write the .jsonl files, train no model")
    flag("--perfect", action="store_true", help="demonstrators are never hasty; implies --data-only")
    flag("--seed", type=int, default=0, help="of the questions, the answers and the base model (default: 0)")
    flag(
        "--out",
        type=Path,
        help="default tests/toy, with --perfect runs/toy-perfect, with a --seed runs/toy-SEED",
    )
    args = parser.parse_args(argv)
    name = "toy" + ("-perfect" if args.perfect else "") + (f"-{args.seed}" if args.seed else "")
    args.out = args.out or (HERE if name == "toy" else HERE.parents[1] / "runs" / name)
    return args


def main(args):
    rows = make_rows(args.seed, args.perfect)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("demos", "dev", "heldout", "preferences"):
        (args.out / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part]))
        print(f"{args.out}/{part}.jsonl: {len(rows[part])} rows")
    if args.perfect or args.data_only:
        return
    tokenizer = make_tokenizer()
    model = train_base(rows["base"], tokenizer, args.seed)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    print(f"base model: {model.num_parameters()} parameters; python gsil.py --rounds 0 measures it")


if __name__ == "__main__":
    main(parse_args())
