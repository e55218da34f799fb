"""eval.py: the tasks that are not lm_eval's: `answers`, `reward`, and `mt_bench` with its file for FastChat."""

import json
import math
from statistics import fmean, stdev

import pytest
import torch
import transformers
from conftest import ZEPHYR, byte_tokenizer, tiny_model
from helpers import GSM_ROW, assistant, evaluate, read_jsonl, refused, save, user, write_jsonl
from safetensors.torch import save_file
from tokenizers import processors

import eval as ev
import gsil


def test_answers_asks_as_training_does(inputs, tmp_path):
    """A policy that is trained on one prompt and asked with another would look worse."""
    system = {"role": "system", "content": "Short."}
    rows = [GSM_ROW, {"messages": [system, user("1+1?"), assistant("#### 1,002")]}]
    transcript = "\n\nHuman: Hi \n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So. #### 2"
    rows += [{"instruction": "1+1?", "output": "####\t$2."}, {"chosen": transcript, "rejected": "x"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    outcome = evaluate(f"{inputs} --data {file} --temperature 1 --seed 3")
    tokenizer, model = byte_tokenizer(), tiny_model()
    demos = [gsil.encode(row, tokenizer, {1}) for row in rows]
    ids = gsil.sample(model, [demo["prompt_ids"] for demo in demos], {1}, 5, 1, 16, "3 answers")
    for sample, demo, response in zip(outcome["samples"]["answers"], demos, ids, strict=True):
        assert sample["prompt"] == demo["prompt"] and sample["gold"] == demo["answer"]
        assert sample["responses"] == [tokenizer.decode(response).removesuffix("</s>")]


def reward_model(folder, pad=1, labels=1, tokenizer=None, eos=1):
    config = tiny_model().config
    config.num_labels, config.pad_token_id, config.eos_token_id = labels, pad, eos
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    save(folder, model, tokenizer)
    return model


@pytest.mark.parametrize("pad", [1, 0, None])
def test_a_reward_is_read_at_the_end_of_the_training_text(pad, tmp_path):
    """A reward read at another token than it was fitted at would be noise."""
    tokenizer = byte_tokenizer(ZEPHYR.replace("</s>", "<|end|>"))
    model = reward_model(tmp_path, pad, tokenizer=tokenizer, eos=[1, 2])  # as irft.py saves it
    demo = gsil.encode(GSM_ROW, tokenizer, {1, 2})
    problems = [{"turns": [user(GSM_ROW["question"])], "demo": demo}] * 4
    loaded = ev.load_reward_model(ev.parse_args(["--reward-model", str(tmp_path)]))
    ends = [demo["real_ids"], *[[*tokenizer(text).input_ids, 2] for text in ("3", "3", "")]]
    values = ev.rewards(loaded, problems, [GSM_ROW["answer"], " 3", "3 <|end|> 4", ""])
    assert values[0] == pytest.approx(ev.rewards(loaded, problems[:1])[0], rel=1e-4)  # of the demonstration
    for ids, value in zip(ends, values, strict=True):
        hidden = model.model(torch.tensor([demo["prompt_ids"] + ids])).last_hidden_state
        expected = (model.score.weight @ hidden[0, -1]).item()
        assert value == pytest.approx(expected, rel=1e-4)  # float32 sums in another order
    assert ev.rewards(loaded, problems, ["<image>", "3" * 300, "", ""]) == [values[3]] * 4  # as an empty one


def test_models_that_cannot_be_a_reward(tmp_path, inputs, capsys):
    """A missing head would be random, or a trained one be thrown away."""
    flags = f"{inputs} --tasks reward --reward-model {tmp_path}"
    reward_model(tmp_path, labels=2)
    refused(capsys, flags, "num_labels=1")
    tiny_model().save_pretrained(tmp_path)
    refused(capsys, flags, "score.weight")
    weights = {"v_head.weight": torch.ones(1, 32)} | reward_model(tmp_path).state_dict()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, flags, "v_head.weight")


def beaver_model(folder):
    """A random model in the layout of PKU-Alignment/beaver-7b-v3.0-reward, and a function that scores by hand."""
    body = transformers.LlamaModel(tiny_model().config).eval()
    head = torch.nn.Linear(body.config.hidden_size, 1)
    weights = {f"model.{name}": weight for name, weight in body.state_dict().items()}
    weights |= {f"score_head.{name}": weight for name, weight in head.state_dict().items()}
    weights |= {"normalizer.mean": torch.zeros(1), "normalizer.var": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = body.config.to_dict() | {"architectures": ["LlamaForScore"], "score_dim": 1, "bias": True}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tokenizer = byte_tokenizer(chat_template=None)
    put_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = put_bos  # as Llama's tokenizer does
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def score(text):
        ids = tokenizer(text + tokenizer.eos_token).input_ids
        assert ids[0] == 0 and ids[-1] == 1  # BOS and EOS
        return head(body(torch.tensor([ids])).last_hidden_state[0, -1]).item()

    return score, head.bias.item()


def test_a_reward_model_of_the_papers(tmp_path):
    """The papers' reward model, with other names and another format, would be random."""
    score, bias = beaver_model(tmp_path)
    rm = ev.load_reward_model(ev.parse_args(["--reward-model", str(tmp_path), "--reward-template", "beaver"]))
    turns = [user("Hi"), assistant("Yes?"), user("1+1?")]
    problem = {"turns": turns, "demo": gsil.encode({"messages": [*turns, assistant("2")]}, rm.tokenizer, {1})}
    found = ev.rewards(rm, [problem]) + ev.rewards(rm, [problem], [" 3 "])
    text = "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Yes?</s>USER: 1+1? ASSISTANT:"
    # The bias shifts every reward by the same number; float32 sums.
    assert [value + bias for value in found] == pytest.approx(
        [score(text + "2"), score(text + "3")], rel=1e-4
    )
    assert abs(found[0] - found[1]) > 1e-2


def test_win_rate(inputs, tmp_path):
    """A tie would count as a win, or the responses be compared with the wrong side's."""
    reward_model(tmp_path)
    flags = f"{inputs} --tasks reward --reward-model {tmp_path}"
    outcome = evaluate(flags)
    ours, theirs = outcome["duel"].pop("rewards"), outcome["duel"].pop("other_rewards")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins = sum(difference > 0 for difference in differences)
    lengths = [len(sample["responses"][0].strip()) for sample in outcome["samples"]["reward"]]
    answers = [row["answer"] for row in read_jsonl(inputs.split()[3])]
    expected = {"n": 6, "against": "the data", "wins": wins, "ties": 0, "win_rate": wins / 6}
    expected |= {"reward": fmean(ours), "other_reward": fmean(theirs), "difference": fmean(differences)}
    expected |= {"half_width": 1.96 * stdev(differences) / math.sqrt(6), "mcnemar_p": None}
    expected |= {"characters": fmean(lengths), "other_characters": fmean(map(len, answers))}
    assert outcome["duel"] == {key: pytest.approx(value) for key, value in expected.items()}
    same = evaluate(f"{flags} --compare {inputs.split()[1]}")["duel"]
    assert (same["ties"], same["wins"], same["win_rate"]) == (6, 0, 0)
    assert same["other_rewards"] == ours and same["against"] == inputs.split()[1]


BENCH = {83: ("writing", 0.7), 81: ("new", 0.7), 82: ("math", 0), 84: ("stem", 0.1)}  # and its temperature


def test_mt_bench_writes_what_fastchat_reads(inputs, tmp_path, capsys):
    """FastChat's judge would miss a field, or judge responses at another temperature."""
    rows = [{"question_id": n, "category": BENCH[n][0], "turns": ["1+1?", "And?"]} for n in BENCH]
    questions, file = write_jsonl(tmp_path / "question.jsonl", rows), tmp_path / "toy.jsonl"
    flags = f"{inputs} --tasks mt_bench --data {questions} --answers {file} --seed 5"
    result = evaluate(flags)["results"]["mt_bench"]
    assert result["n"] == 4 and result["unfinished"] == 8
    model, tokenizer = tiny_model(), byte_tokenizer()
    for answer, (n, (_, temperature)) in zip(read_jsonl(file), BENCH.items(), strict=True):
        assert {*answer} == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (answer["question_id"], answer["model_id"]) == (n, "toy")
        turns, expected = [], []
        for question in ("1+1?", "And?"):
            turns.append(user(question))
            prompt = gsil.encode({"messages": [*turns, assistant("x")]}, tokenizer, {1})["prompt_ids"]
            (ids,) = gsil.sample(model, [prompt], {1}, 5, temperature, 16, "0 mt_bench")
            expected.append(tokenizer.decode(ids).removesuffix("</s>").strip())
            turns.append(assistant(expected[-1]))  # the second question sees the first answer
        assert answer["choices"] == [{"index": 0, "turns": expected}]
    save(tmp_path, tiny_model(), byte_tokenizer("{{ messages[0].content }}"))  # has no place for more turns
    flags += f" --model {tmp_path} --answers {file}2"
    refused(capsys, flags, "row 1: the chat template changes or drops a turn")
