"""Compares `eval choices` and `eval lambada` with EleutherAI's lm-evaluation-harness on the exported model.

    build/eval export --run NAME --out exported
    python scripts/harness.py --run NAME --model exported --piqa piqa.jsonl.xz --arc-easy arc_easy.jsonl.xz \
        --lambada lambada.jsonl.xz --limit 400                       needs lm_eval 0.4.13, torch, transformers

The files are JSON lines (query, choices, gold; context, continuation). They become the data of the harness's own tasks,
so prompts, tokens, log-likelihoods and metrics are the harness's. Its acc_norm divides by characters, our accuracy per
byte by bytes, as its acc_bytes.
"""

import argparse
import json
import lzma
import pathlib
import subprocess
import sys
import tempfile

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = pathlib.Path(lm_eval.__file__).parent / "tasks"
CLOSE = 1e-3  # nats, of a whole answer: fp32 sums over some hundred terms in another order, for each of its tokens


def piqa(row):
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return dict(goal=goal, sol1=row["choices"][0], sol2=row["choices"][1], label=row["gold"])


def arc_easy(row):
    labels = "ABCDE"[:len(row["choices"])]
    return dict(question=row["query"].removeprefix("Question: "), choices=dict(text=row["choices"], label=list(labels)),
                answerKey=labels[row["gold"]])


def lambada(row):
    return dict(text=row["context"] + " " + row["continuation"])


# Name: the harness's file, what a row becomes, our command, and (our result, its metric) pairs.
CHOICES = [("accuracy", "acc"), ("accuracy_per_byte", "acc_bytes"), ("", "acc_norm")]
COMPARED = {"piqa": ("piqa/piqa.yaml", piqa, ["choices", "--delimiter", r"\nAnswer: "], CHOICES),
            "arc_easy": ("arc/arc_easy.yaml", arc_easy, ["choices", "--delimiter", r"\nAnswer: "], CHOICES),
            "lambada": ("lambada/lambada_openai.yaml", lambada, ["lambada"],
                        [("accuracy", "acc"), ("perplexity", "perplexity")])}


def harness(name, rows, model, work):
    """The harness's metrics and, for each question, its log-likelihoods."""
    file, convert, _, _ = COMPARED[name]
    config = yaml.safe_load((TASKS / file).read_text())
    data = work / f"{name}.jsonl"
    data.write_text("".join(json.dumps(convert(row)) + "\n" for row in rows))
    split = config.get("test_split") or config["validation_split"]
    config.update(dataset_path="json", dataset_name=None, dataset_kwargs=dict(data_files={split: str(data)}),
                  training_split=None, validation_split=None, test_split=split)
    if config["output_type"] == "multiple_choice":
        config["metric_list"].append(dict(metric="acc_bytes", aggregation="mean", higher_is_better=True))
    settings = dict(pretrained=model, trust_remote_code=True, dtype="float32")
    result = lm_eval.simple_evaluate(model="hf", model_args=settings, tasks=[ConfigurableTask(config=config)],
                                     batch_size=16, device="cpu", bootstrap_iters=1000)
    samples = sorted(next(iter(result["samples"].values())), key=lambda sample: sample["doc_id"])
    return next(iter(result["results"].values())), [[float(answer[0][0]) for answer in sample["resps"]]
                                                    for sample in samples]


def compare(name, path, options, work):
    opened = lzma.open(path, "rt") if path.endswith(".xz") else open(path)
    with opened as file:
        rows = [json.loads(line) for line in file if line.strip()]
    rows = rows[:options.limit] if options.limit else rows
    _, _, command, metrics = COMPARED[name]
    if subprocess.run([options.program, *command, "--run", options.run, "--data", path, "--limit", str(len(rows)),
                       "--out", str(work / "ours.json")]).returncode:
        sys.exit(2)  # it has said why
    ours = json.loads((work / "ours.json").read_text())
    results, theirs = harness(name, rows, options.model, work)
    pairs = [(a, b) for mine, other in zip(ours["log_likelihoods"], theirs) for a, b in zip(mine, other)]
    worst = max(abs(a - b) for a, b in pairs)
    same = worst < CLOSE and [len(x) for x in ours["log_likelihoods"]] == [len(x) for x in theirs]
    print(f"\n{name}: {len(rows)} questions, {len(pairs)} log-likelihoods, largest difference {worst:.1e} nats")
    for key, metric in metrics:
        value, error = results[f"{metric},none"], results[f"{metric}_stderr,none"]
        text = f"  {metric:<12} {value:.6f} +- {error:.6f}"
        if key:
            text += f"   here {ours[key]:.6f} +- {ours[key + '_stderr']:.6f}"
            same = same and abs(value - ours[key]) <= CLOSE * abs(value) * (key == "perplexity") + 1e-12
        print(text)
    print("  ok" if same else "  FAILED", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "build" / "eval"))
    parser.add_argument("--run", required=True)
    parser.add_argument("--model", required=True, help="the directory that eval export made of the run")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many questions of each; 0: all")
    for name in COMPARED:
        parser.add_argument("--" + name.replace("_", "-"), help="file of questions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = [compare(name, path, options, pathlib.Path(work)) for name in COMPARED
                   if (path := getattr(options, name))]
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
