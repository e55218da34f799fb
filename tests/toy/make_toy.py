"""Makes the toy that gsil.py runs on by default: GSM8K in small, by writers who are careful or hasty.

    question   Ava has 7 apples . Ava buys 4 more . the number grows 2 times . how many apples does Ava have ?
    careful    7 + 4 = 11 . 11 * 2 = 22 . #### 22         shows every step and is right
    hasty      #### 17                                    skips the working and guesses, almost always wrong

Writers get hasty as problems get longer. The base model learned from a hasty crowd; the demonstrations come
from a more careful, still imperfect one (HASTY below). Nothing else differs between the two, so what a method
does to the habit can be predicted from HASTY.

preferences.jsonl has 256 more questions with two answers each by demonstrators, of which just one is right;
that one is chosen, as somebody would who can check answers.

    python tests/toy/make_toy.py                # all of tests/toy; the base model takes 6 to 10 minutes
    python tests/toy/make_toy.py --data-only    # the .jsonl files alone: seconds, identical on every machine
    python tests/toy/make_toy.py --perfect      # into runs/toy-perfect: the demonstrators are never hasty
"""
import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

HERE = Path(__file__).resolve().parent
HASTY = {  # P(hasty | number of steps), for each crowd of writers
    "base": {2: 0.5, 3: 0.7, 4: 0.9},
    "demo": {2: 0.1, 3: 0.35, 4: 0.6},
    "never": {2: 0, 3: 0, 4: 0},
}
LARGEST = 30  # all values are 0..30
NAMES = "Ava Ben Cleo Dan Eve Finn Gus Hana Ivy Jon Kim Leo Mia Ned Ola Pia".split()
ITEMS = "apples books coins cards eggs hats keys nuts pens shells stamps toys".split()
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
        options = [("+", n) for n in range(1, 10) if value + n <= LARGEST]
        options += [("-", n) for n in range(1, 10) if value - n >= 0]
        options += [("*", n) for n in (2, 3) if value * n <= LARGEST] * 3  # else growth would be rare
        sign, n = rng.choice(options)
        result = {"+": value + n, "-": value - n, "*": value * n}[sign]
        gains, loses = f"{name} buys {n} more", f"{name} gives away {n}"
        event = {"+": gains, "-": loses, "*": f"the number grows {n} times"}
        sentences.append(event[sign] + " .")
        steps.append(f"{value} {sign} {n} = {result}")
        value = result
    return " ".join(sentences + [f"how many {item} does {name} have ?"]), steps, value


def write(rng, steps, value, hasty):
    """One writer's answer: a bare guess with probability hasty[number of steps], else worked and right."""
    if rng.random() < hasty[len(steps)]:
        return f"#### {rng.randint(0, LARGEST)}"
    return " . ".join(steps) + f" . #### {value}"


def make_rows(seed, perfect=False):
    """{"demos", "dev", "heldout", "base"} -> lists of {"question", "answer"}; no question occurs twice.

    "preferences" -> a list of {"prompt", "chosen", "rejected"}, about yet other questions.
    """
    rng, seen = random.Random(seed), set()
    sizes = {
        "demos": (2048, "never" if perfect else "demo"),
        "dev": (500, "never"),
        "heldout": (500, "never"),
        "base": (20000, "base"),
    }
    rows = {part: [] for part in sizes}
    for part, (size, habit) in sizes.items():
        while len(rows[part]) < size:
            question, steps, value = problem(rng)
            writer = random.Random(rng.random())  # its own stream: --perfect changes no question
            if question not in seen:
                seen.add(question)
                rows[part].append({"question": question, "answer": write(writer, steps, value, HASTY[habit])})
    rows["preferences"] = []
    while len(rows["preferences"]) < 256:
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
    words = "has buys more gives away the number grows times how many does have ? . + - * = ####".split()
    vocabulary = SPECIAL + [str(n) for n in range(LARGEST + 1)] + sorted([*NAMES, *ITEMS, *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def train_base(rows, tokenizer, seed, steps, batch=64, lr=4e-3):
    """Next-token training on the base rows, answers only: questions are noise to a model this small."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = []
    for row in rows:
        question, answer = row["question"], row["answer"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        both = tokenizer.apply_chat_template(turns, tokenize=False)
        texts.append((tokenizer(both).input_ids, len(tokenizer(prompt).input_ids)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=200, num_training_steps=steps)
    rng = random.Random(seed)
    for step in range(steps):
        chosen = rng.sample(texts, batch)
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.full((batch, width), tokenizer.pad_token_id)  # (B, T), padded on the right
        labels = torch.full((batch, width), -100)  # -100: not scored
        for i, (text, prompt_length) in enumerate(chosen):
            ids[i, : len(text)] = torch.tensor(text)
            labels[i, prompt_length : len(text)] = torch.tensor(text[prompt_length:])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"base model: step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def statistics(model, tokenizer, rows, temperature, seed=0):
    """Shares of one sample each: those that show working, right ones, right ones given working."""
    torch.manual_seed(seed)
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=48, **sampling
    )
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    worked = [" = " in text for text in texts]
    right = [text.split("####")[-1] == row["answer"].split("####")[-1] for text, row in zip(texts, rows)]
    both = sum(w and r for w, r in zip(worked, right))
    return {
        "shows working": sum(worked) / len(rows),
        "right": sum(right) / len(rows),
        "right given working": both / max(1, sum(worked)),
    }


def main(args):
    rows = make_rows(args.seed, args.perfect)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = ("demos", "dev", "heldout", "preferences")
    for part in parts:
        (args.out / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part]))
    print(f"{args.out}: " + ", ".join(f"{len(rows[part])} {part}" for part in parts))
    if args.perfect or args.data_only:
        return
    tokenizer = make_tokenizer()
    model = train_base(rows["base"], tokenizer, args.seed, args.steps)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    print(f"base model: {sum(p.numel() for p in model.parameters())} parameters")
    for temperature in (0, 1):
        stats = statistics(model, tokenizer, rows["dev"] + rows["heldout"], temperature)
        print(
            f"temperature {temperature}, 1000 problems: "
            + ", ".join(f"{k} {v:.3f}" for k, v in stats.items())
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="the committed files were made with 0")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the base model")
    parser.add_argument("--data-only", action="store_true", help="write the .jsonl files, train no model")
    parser.add_argument(
        "--perfect", action="store_true", help="demonstrators are never hasty; implies --data-only"
    )
    parser.add_argument("--out", type=Path, help="default tests/toy, with --perfect runs/toy-perfect")
    args = parser.parse_args()
    args.out = args.out or (HERE.parents[1] / "runs" / "toy-perfect" if args.perfect else HERE)
    main(args)
