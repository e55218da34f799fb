"""What lm_eval 0.4.13 says about the rows in tests/parity/rows: the numbers that eval.py has to equal.

    python tests/parity/oracle.py --code-eval DIR      # writes golden.json; needs lm_eval==0.4.13, accelerate

DIR is metrics/code_eval of the repository github.com/huggingface/evaluate, which lm_eval would fetch from the
Hub; without it the tasks that run programs are left out. Two random models, made here from a seed, stand for
all: A has no BOS and no chat template, B has both, its template ends in a newline, and one of its stop
strings is a special token that is not EOS. Rows and canned answers are our own.
"""
import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
ROWS = HERE / "rows"
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")

# Label: model, task, options. A variant is a copy of the model: with so few positions, or with its own
# generation config.
WINDOWS = {"A150": 150, "B150": 150}
GENERATION = {"Apenalty": {
    "repetition_penalty": 1.3, "eos_token_id": [1, 285, 296], "do_sample": True, "top_k": 5}}
CASES = {
    "A gsm8k 5 shots": {"model": "A", "task": "gsm8k"},
    "A gsm8k 0 shots": {"model": "A", "task": "gsm8k", "shots": 0},
    "A gsm8k 3 shots, limit 3": {"model": "A", "task": "gsm8k", "shots": 3, "limit": 3},
    "A gsm8k, every prompt cut": {"model": "A150", "task": "gsm8k"},
    "A gsm8k_cot_zeroshot": {"model": "A", "task": "gsm8k_cot_zeroshot", "shots": 5},
    "A gsm8k, generation config": {"model": "Apenalty", "task": "gsm8k", "shots": 1},
    "B gsm8k 5 shots": {"model": "B", "task": "gsm8k"},
    "B gsm8k, every prompt cut": {"model": "B150", "task": "gsm8k"},
    "B gsm8k 2 shots, chat": {"model": "B", "task": "gsm8k", "shots": 2, "chat": True},
    "B gsm8k_cot_zeroshot, chat": {"model": "B", "task": "gsm8k_cot_zeroshot", "chat": True},
    "A humaneval": {"model": "A", "task": "humaneval"},
    "B humaneval": {"model": "B", "task": "humaneval"},
    "A humaneval_instruct": {"model": "A", "task": "humaneval_instruct"},
    "B humaneval_instruct, chat": {"model": "B", "task": "humaneval_instruct", "chat": True},
    "A arc_easy": {"model": "A", "task": "arc_easy"},
    "A arc_challenge 25 shots": {"model": "A", "task": "arc_challenge", "shots": 25},
    "A arc_challenge, every prompt cut": {"model": "A150", "task": "arc_challenge", "shots": 5},
    "B arc_challenge 3 shots": {"model": "B", "task": "arc_challenge", "shots": 3},
    "B arc_challenge 2 shots, chat": {"model": "B", "task": "arc_challenge", "shots": 2, "chat": True},
    "A hellaswag 10 shots": {"model": "A", "task": "hellaswag", "shots": 10},
    "B hellaswag": {"model": "B", "task": "hellaswag"},
    "B hellaswag 2 shots, chat": {"model": "B", "task": "hellaswag", "shots": 2, "chat": True},
    "B hellaswag, every prompt cut": {"model": "B150", "task": "hellaswag", "shots": 5},
    "A winogrande 5 shots": {"model": "A", "task": "winogrande", "shots": 5},
    "A winogrande, every prompt cut": {"model": "A150", "task": "winogrande", "shots": 8},
    "B winogrande 3 shots, limit 5": {"model": "B", "task": "winogrande", "shots": 3, "limit": 5},
    "B winogrande 2 shots, chat": {"model": "B", "task": "winogrande", "shots": 2, "chat": True},
    "A truthfulqa_mc1": {"model": "A", "task": "truthfulqa_mc1", "shots": 5},
    "A truthfulqa_mc2": {"model": "A", "task": "truthfulqa_mc2"},
    "B truthfulqa_mc2, chat": {"model": "B", "task": "truthfulqa_mc2", "chat": True},
    "A mmlu 5 shots": {"model": "A", "task": "mmlu", "shots": 5},
    "A mmlu, every prompt cut": {"model": "A150", "task": "mmlu", "shots": 3},
    "B mmlu, limit 3": {"model": "B", "task": "mmlu", "limit": 3},
    "B mmlu 2 shots, chat": {"model": "B", "task": "mmlu", "shots": 2, "chat": True},
}
NEW_TOKENS = 40
# What random models would rarely say: one token each, with its row of lm_head enlarged.
OFTEN = ["Question:", "Q:", "#### 1", "is 3. ", "\ndef", "\n#", "\nif", "```", "$1", "...", "<|im_end|>",
         "</s>"]


def build_models(folder):
    """Write models A and B and their variants."""
    texts = [text for task in ("gsm8k", "humaneval") for file in sorted((ROWS / task).glob("*.jsonl"))
             for line in file.read_text("utf-8").splitlines() for text in map(str, json.loads(line).values())]
    texts += OFTEN * 300
    for name in "AB":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=600, show_progress=False, special_tokens=["<s>", "</s>", "<|im_end|>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=10))
        if name == "B":
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="</s>", **({"bos_token": "<s>", "chat_template": TEMPLATE,
            "extra_special_tokens": ["<|im_end|>"], "unk_token": "<unk>"} if name == "B" else {}))
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=2048, bos_token_id=0,
            eos_token_id=1, pad_token_id=None)).eval()
        rng = random.Random(3)              # Python's numbers are the same everywhere, torch's need not be
        for weight in (weight.data for weight in model.parameters() if weight.dim() == 2):
            numbers = [rng.uniform(-0.35, 0.35) for _ in range(weight.numel())]
            weight.copy_(torch.tensor(numbers).view_as(weight))
        often = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(text)[0] for text in OFTEN])
        model.lm_head.weight.data[often] *= 1.3
        for variant in (name, *(key for key in (*WINDOWS, *GENERATION) if key[0] == name)):
            model.config.max_position_embeddings = WINDOWS.get(variant, 2048)
            model.generation_config.update(**GENERATION.get(variant, {}))
            for part in (model, tokenizer):
                part.save_pretrained(Path(folder) / variant)


def fingerprint(folder):
    """Of weights and tokenizers: other library versions might make other models of the same recipe."""
    digest = hashlib.sha256()
    for name in "AB":
        model = LlamaForCausalLM.from_pretrained(Path(folder) / name)
        for key, value in sorted(model.state_dict().items()):
            digest.update(key.encode() + value.numpy().tobytes())
        digest.update((Path(folder) / name / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:16]


def local(task, **splits):
    """lm_eval's own task file, reading tests/parity/rows, or these files."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    family = task.split("_")[0]
    file = {"gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot", "winogrande": "default"}.get(task, task)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / family / f"{file}.yaml")
    splits = splits or {file.stem: str(file) for file in (ROWS / family).glob("*.jsonl")}
    config.update(dataset_path="json", dataset_name=None, dataset_kwargs={"data_files": splits})
    return config


def use_code_eval(folder):
    """Let lm_eval find the code_eval metric in a folder."""
    import evaluate
    load = evaluate.load
    evaluate.load = lambda name, *a, **k: load(str(folder) if name == "code_eval" else name, *a, **k)


def local_mmlu(folder):
    """Write task files for the subjects in rows/mmlu, in lm_eval's groups; returns a TaskManager."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    stock = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    groups = {}
    for subject in sorted(path.name for path in (ROWS / "mmlu").iterdir()):
        file = stock / f"mmlu_{subject}.yaml"
        kind = next(line.split('"')[3] for line in file.read_text().splitlines() if line.startswith('"tag"'))
        groups.setdefault(kind.removesuffix("_tasks"), []).append(f"local_mmlu_{subject}")
        files = {split: str(ROWS / "mmlu" / subject / f"{split}.jsonl") for split in ("test", "dev")}
        (folder / f"{subject}.yaml").write_text(json.dumps({
            "include": str(file), "task": f"local_mmlu_{subject}", "tag": None, "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": files}}))
    for group, tasks in (groups | {"mmlu": [f"local_{group}" for group in groups]}).items():
        (folder / f"{group}.yaml").write_text(json.dumps({
            "group": f"local_{group}", "task": tasks,
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}))
    return TaskManager(include_path=str(folder))


def records(result, task):
    """lm_eval's result -> {what was asked, said and scored, per document; aggregates}, in document order."""
    documents = {}
    for sample in result["samples"][task]:
        document = documents.setdefault(sample["doc_id"], {"extracted": {}, "metrics": {}})
        if sample["filter"] == "none":                      # the model chooses
            pairs = [tuple(pair) for pair in sample["arguments"]]
            del document["extracted"]
            document["prompts"] = list(dict.fromkeys(context for context, _ in pairs))
            document["continuations"] = [continuation for _, continuation in pairs]
            document["loglikelihoods"] = [found[0] for found in sample["filtered_resps"]]
        else:
            document["prompt"], document["response"] = sample["arguments"][0][0], sample["resps"][0][0]
            found = sample["filtered_resps"][0]
            document["extracted"][sample["filter"]] = found[0] if isinstance(found, list) else found
        for metric in sample["metrics"]:
            shown = "pass@1" if metric == "pass_at_k" else metric
            document["metrics"][f"{shown},{sample['filter']}"] = float(sample[metric])
    aggregates = {key: value for key, value in result["results"][task].items() if "," in key}
    return {"documents": [documents[key] for key in sorted(documents)], "aggregates": aggregates}


def ask(case, folder):
    """Run one of CASES through lm_eval. MMLU: the subjects' documents one after the other, all aggregates."""
    import lm_eval
    model = {"pretrained": str(Path(folder) / case["model"]), "dtype": "float32"}
    run = functools.partial(
        lm_eval.simple_evaluate, model="hf", model_args=model, num_fewshot=case.get("shots"), batch_size=1,
        device="cpu", limit=case.get("limit"), bootstrap_iters=1, log_samples=True,
        apply_chat_template=case.get("chat", False), confirm_run_unsafe_code=True)
    if case["task"] == "mmlu":
        with tempfile.TemporaryDirectory() as tasks:
            result = run(tasks=["local_mmlu"], task_manager=local_mmlu(Path(tasks)))
        parts = [records(result, name)["documents"] for name in sorted(result["samples"])]
        return {"documents": sum(parts, []), "aggregates": {
            f"{name.removeprefix('local_')} {key}": value for name, values in
            (result["results"] | result["groups"]).items() for key, value in values.items() if "," in key}}
    writes = case["task"].startswith(("gsm8k", "humaneval"))
    result = run(tasks=[local(case["task"])], gen_kwargs={"max_gen_toks": NEW_TOKENS} if writes else None)
    return records(result, case["task"])


def canned():
    """canned.jsonl by task: {task: ([row, ...], [response, ...])}; a number stands for that humaneval row."""
    programs = [json.loads(line) for line in (ROWS / "humaneval/test.jsonl").read_text("utf-8").splitlines()]
    tasks = {}
    for line in (HERE / "canned.jsonl").read_text("utf-8").split("\n")[:-1]:
        item = json.loads(line)
        rows, responses = tasks.setdefault(item["task"], ([], []))
        rows.append(programs[item["row"]] if isinstance(item["row"], int) else item["row"])
        responses.append(item["response"])
    return tasks


def ask_canned(task, rows, responses, folder):
    """Let lm_eval score given responses: its filters and metrics, without any model."""
    import lm_eval
    from lm_eval.api.model import LM

    class Canned(LM):
        def generate_until(self, requests):
            return [responses[request.doc_id] for request in requests]

        loglikelihood = loglikelihood_rolling = None

    file = Path(folder) / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Canned.__abstractmethods__ = frozenset()
    result = lm_eval.simple_evaluate(
        model=Canned(), tasks=[local(task, train=str(file), test=str(file))], num_fewshot=0,
        bootstrap_iters=1, log_samples=True, confirm_run_unsafe_code=True)
    return records(result, task)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--code-eval", help="metrics/code_eval of the evaluate repository")
    parser.add_argument("--out", default=str(HERE / "golden.json"))
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    if args.code_eval:
        use_code_eval(Path(args.code_eval).resolve())
    with tempfile.TemporaryDirectory() as folder:
        build_models(folder)
        golden = {"versions": {name: importlib.metadata.version(name) for name in (
            "lm_eval", "torch", "transformers", "tokenizers")}, "models": fingerprint(folder), "cases": {}}
        for name, case in CASES.items():
            if args.code_eval or "humaneval" not in case["task"]:
                golden["cases"][name] = ask(case, folder)
        golden["canned"] = {task: ask_canned(task, rows, responses, folder)
                            for task, (rows, responses) in canned().items()
                            if args.code_eval or "humaneval" not in task}
    Path(args.out).write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
