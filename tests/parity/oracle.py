"""What lm_eval 0.4.13 says about the rows in tests/parity/rows: the numbers that eval.py has to equal.

    python tests/parity/oracle.py --code-eval DIR      # writes golden.json; needs lm_eval==0.4.13, accelerate

DIR is metrics/code_eval of the repository github.com/huggingface/evaluate, which lm_eval would fetch from the
Hub. Two random models, made here from a seed, stand for all: A has no BOS and no chat template, B has both, its
template ends in a newline, and one of its stop strings is a special token that is not EOS. Rows and canned
answers are our own.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
ROWS = HERE / "rows"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Variants of A and B: with only 150 positions, or with this generation config.
VARIANTS = {"A": ["A", "A150", "Apenalty"], "B": ["B", "B150"]}
PENALTY = {"repetition_penalty": 1.3, "eos_token_id": [1, 285, 296], "do_sample": True, "top_k": 5}
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
OFTEN = ["Question:", "Q:", "#### 1", "is 3. ", "\ndef", "\n#", "\nif", "```", "$1", "..."]
OFTEN += ["<|im_end|>", "</s>"]


def read_lines(file):
    """The rows of a JSONL file; not by splitlines, as a text may hold U+2028."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]


def make_tokenizer(name, texts):
    """Byte-level BPE learned from texts; B's puts BOS in front."""
    special = ["<s>", "</s>", "<|im_end|>", "<unk>"]
    how = {"vocab_size": 600, "max_token_length": 10, "special_tokens": special, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **how)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainer)
    own = {"tokenizer_object": inner, "eos_token": "</s>"}
    if name == "B":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        own |= {"bos_token": "<s>", "unk_token": "<unk>", "extra_special_tokens": ["<|im_end|>"]}
        own |= {"chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(**own)


def build_models(folder):
    """Write models A and B and their variants."""
    files = [file for task in ("gsm8k", "humaneval") for file in sorted((ROWS / task).glob("*.jsonl"))]
    texts = [str(value) for file in files for row in read_lines(file) for value in row.values()]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    for name, variants in VARIANTS.items():
        tokenizer = make_tokenizer(name, texts + OFTEN * 300)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
        rng = random.Random(3)  # Python's numbers are the same everywhere, torch's need not be
        for weight in (weight.data for weight in model.parameters() if weight.dim() == 2):
            numbers = [rng.uniform(-0.35, 0.35) for _ in range(weight.numel())]
            weight.copy_(torch.tensor(numbers).view_as(weight))
        often = tokenizer.convert_tokens_to_ids([tokenizer.tokenize(text)[0] for text in OFTEN])
        model.lm_head.weight.data[often] *= 1.3
        for variant in variants:
            model.config.max_position_embeddings = 150 if variant.endswith("150") else 2048
            model.generation_config.update(**(PENALTY if variant.endswith("penalty") else {}))
            for part in (model, tokenizer):
                part.save_pretrained(Path(folder) / variant)


def fingerprint(folder):
    """Of weights and tokenizers: other library versions might make other models of the same recipe."""
    digest = hashlib.sha256()
    for name in VARIANTS:
        model = LlamaForCausalLM.from_pretrained(Path(folder) / name)
        for key, value in sorted(model.state_dict().items()):
            digest.update(key.encode() + value.numpy().tobytes())
        digest.update((Path(folder) / name / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:16]


def run_lm_eval(**how):
    """lm_eval's result with every sample in it."""
    import lm_eval

    how |= {"bootstrap_iters": 1, "log_samples": True, "confirm_run_unsafe_code": True}
    return lm_eval.simple_evaluate(**how)


def stock_task(file, **files):
    """lm_eval's own task file, reading these files instead of the Hub's."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    return task | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def local(task, **files):
    """A task that reads these files, or tests/parity/rows."""
    family = task.split("_")[0]
    name = {"gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot", "winogrande": "default"}.get(task, task)
    files = files or {file.stem: str(file) for file in (ROWS / family).glob("*.jsonl")}
    return stock_task(f"{family}/{name}.yaml", **files)


def local_mmlu(folder):
    """Write task files for the subjects in rows/mmlu, in lm_eval's groups; returns a TaskManager."""
    from lm_eval.tasks import TaskManager

    tasks, groups = {}, {}
    for subject in sorted((ROWS / "mmlu").iterdir()):
        files = {split: f"{subject}/{split}.jsonl" for split in ("test", "dev")}
        task = stock_task(f"mmlu/default/mmlu_{subject.name}.yaml", **files)
        name = f"local_{task['task']}"
        groups.setdefault("local_" + task["tag"].removesuffix("_tasks"), []).append(name)
        tasks[name] = task | {"task": name, "tag": None}
    groups["local_mmlu"] = [*groups]
    for name, parts in groups.items():
        mean = {"metric": "acc", "weight_by_size": True}
        tasks[name] = {"group": name, "task": parts, "aggregate_metric_list": [mean]}
    for name, task in tasks.items():
        Path(folder, f"{name}.yaml").write_text(json.dumps(task))
    return TaskManager(include_path=folder)


def records(result, task):
    """lm_eval's result -> {what was asked, said and scored, per document; aggregates}, in document order."""
    documents = {}
    for sample in result["samples"][task]:
        document = documents.setdefault(sample["doc_id"], {"extracted": {}, "metrics": {}})
        if sample["filter"] == "none":  # the model chooses
            document.pop("extracted")
            document["prompts"] = list(dict.fromkeys(context for context, _ in sample["arguments"]))
            document["continuations"] = [continuation for _, continuation in sample["arguments"]]
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
    task = case["task"]
    how = {"model": "hf", "model_args": {"pretrained": f"{folder}/{case['model']}", "dtype": "float32"}}
    how |= {"num_fewshot": case.get("shots"), "limit": case.get("limit"), "device": "cpu", "batch_size": 1}
    how |= {"apply_chat_template": case.get("chat", False)}
    if task.startswith(("gsm8k", "humaneval")):
        how |= {"gen_kwargs": {"max_gen_toks": NEW_TOKENS}}
    if task != "mmlu":
        return records(run_lm_eval(tasks=[local(task)], **how), task)
    with tempfile.TemporaryDirectory() as tasks:
        result = run_lm_eval(tasks=["local_mmlu"], task_manager=local_mmlu(tasks), **how)
    documents, aggregates = [], {}
    for name in sorted(result["samples"]):
        documents += records(result, name)["documents"]
    for name, values in (result["results"] | result["groups"]).items():
        for key in [key for key in values if "," in key]:
            aggregates[f"{name.removeprefix('local_')} {key}"] = values[key]
    return {"documents": documents, "aggregates": aggregates}


def canned():
    """canned.jsonl by task: {task: ([row, ...], [response, ...])}; a number stands for that humaneval row."""
    programs, tasks = read_lines(ROWS / "humaneval/test.jsonl"), {}
    for item in read_lines(HERE / "canned.jsonl"):
        rows, responses = tasks.setdefault(item["task"], ([], []))
        rows.append(programs[item["row"]] if isinstance(item["row"], int) else item["row"])
        responses.append(item["response"])
    return tasks


def ask_canned(task, rows, responses, folder):
    """Let lm_eval score given responses: its filters and metrics, without any model."""
    from lm_eval.api.model import LM

    class Canned(LM):
        def generate_until(self, requests):
            return [responses[request.doc_id] for request in requests]

        loglikelihood = loglikelihood_rolling = None

    file = Path(folder) / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = [local(task, train=str(file), test=str(file))]
    return records(run_lm_eval(model=Canned(), tasks=tasks, num_fewshot=0), task)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--code-eval", required=True, help="metrics/code_eval of the evaluate repository")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    import evaluate

    load, metric = evaluate.load, str(Path(args.code_eval).resolve())  # lm_eval asks for it by name
    evaluate.load = lambda name, *a, **k: load(metric if name == "code_eval" else name, *a, **k)
    packages = ("lm_eval", "torch", "transformers", "tokenizers")
    golden = {"versions": {name: version(name) for name in packages}}
    with tempfile.TemporaryDirectory() as folder:
        build_models(folder)
        golden["models"] = fingerprint(folder)
        golden["cases"] = {name: ask(case, folder) for name, case in CASES.items()}
        golden["canned"] = {task: ask_canned(task, *both, folder) for task, both in canned().items()}
    text = json.dumps(golden, indent=1, ensure_ascii=False) + "\n"
    (HERE / "golden.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
