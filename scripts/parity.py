"""Checks models against Hugging Face's Transformers, both ways, for every class and a spread of rotary fractions; and
the tokenizers that go with them.

    make && python scripts/parity.py                needs torch, transformers, safetensors; a few minutes
    python scripts/parity.py --only phi3            one class

Random weights, larger than at the start of a training so that position matters. For each model:
  import   Transformers writes it in several files, `eval import` reads it
  export   `eval export` writes that once more, Transformers reads it: the same weights, bit for bit
  logits   of 60 tokens; loss and all gradients; greedy generation of 200 tokens
  fraction the same weights with another fraction must give other logits: the comparison would notice

A number in fp32 passes some 30 operations per layer; each is a sum of up to some hundred terms with an error of about
its square root in units of 2^-24, relative to the size of the tensor: about 10 of them, so sqrt(30 x 3 layers) x 10 x
2^-24 = 6e-6; the bound is four times that for logits, and four times more for gradients, which come back the same way
through quotients (norms, softmax). Both sides err.
"""

import argparse
import copy
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, GPTNeoXConfig, LlamaConfig,
                          Phi3Config, SmolLM3Config)
from transformers.utils import logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGITS, GRADIENTS = 4 * 6e-6, 16 * 6e-6
SHAPE = dict(vocab_size=264, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=320, bos_token_id=256, eos_token_id=256, pad_token_id=256,
             tie_word_embeddings=False)


def rope(fraction, base=10000.0):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=base, partial_rotary_factor=fraction))


GQA = dict(num_key_value_heads=2, rms_norm_eps=1e-5)


def models(own):
    """(name, config); head sizes 12 and 16. own: a config of our own class."""
    for R in (2, 4, 8, 16):
        yield f"phi3 {R}/16", Phi3Config(**SHAPE, **GQA, **rope(R / 16), head_dim=16, attention_bias=False)
        yield f"glm4_moe {R}/16", Glm4MoeConfig(**SHAPE, **GQA, **rope(R / 16), head_dim=16, use_qk_norm=True,
                                                first_k_dense_replace=3, n_routed_experts=2, num_experts_per_tok=1)
    yield "phi3 12/12, tied", Phi3Config(**dict(SHAPE, tie_word_embeddings=True), **GQA, **rope(1.0, 500.0))
    yield "smollm3 NoPE", SmolLM3Config(**SHAPE, **GQA, no_rope_layers=[0, 0, 0], use_sliding_window=False)
    for R in (2, 4, 6, 12):
        for parallel in (True, False):
            yield f"gpt_neox {R}/12{' parallel' if parallel else ''}", GPTNeoXConfig(
                **SHAPE, **rope(min(R / 12 + 1e-9, 1.0)), use_parallel_residual=parallel, layer_norm_eps=1e-5,
                hidden_act="gelu", attention_bias=True, hidden_dropout=0.0, attention_dropout=0.0)
    yield "llama 16/16", LlamaConfig(**SHAPE, **GQA, head_dim=16)
    paper = dict(block="parallel", kv_heads=4)
    other = dict(rope_pairs="interleaved", qk_norm=True, norm="layer", mlp="gelu", bias=True, tied=True)
    for name, changes in (*((f"{R}/16 parallel", dict(paper, rotary_dim=R)) for R in (0, 2, 8, 16)),
                          ("4/16 all others", dict(other, rotary_dim=4))):
        config = copy.deepcopy(own)
        config.update(changes)
        yield f"own {name}", config


def run(*command, cwd):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def distance(a, b):
    """Root mean square of the difference, relative to that of b."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30))


def own_config(eval_program, work):
    """A config of the class that `eval export --with-code` writes, with its code in work/own."""
    AutoModelForCausalLM.from_config(Phi3Config(**SHAPE, **GQA, **rope(0.5), head_dim=16)).save_pretrained(work / "any")
    run(eval_program, "import", "--from", "any", "--run", "any", cwd=work)
    run(eval_program, "export", "--run", "any", "--out", "own", "--with-code", cwd=work)
    return AutoConfig.from_pretrained(work / "own", trust_remote_code=True)


def gradients_by_our_names(directory, eval_program, work, gradients):
    """Transformers' gradients under our names: written as a model, read by eval import."""
    shutil.rmtree(directory, ignore_errors=True)
    gradients.save_pretrained(directory)
    shutil.rmtree(work / "runs" / "gradients", ignore_errors=True)
    run(eval_program, "import", "--from", directory, "--run", "gradients", cwd=work)
    return load_file(str(work / "runs" / "gradients" / "checkpoint" / "model.safetensors"))


def check(name, config, eval_program, work):
    torch.manual_seed(sum(map(ord, name)))
    own = config.model_type == "partial_rope"
    eager = dict(trust_remote_code=True) if own else dict(attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, **eager).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        else:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    source, out = work / "source", work / "out"
    for path in (source, out, work / "runs"):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(source, max_shard_size="40KB")
    run(eval_program, "import", "--from", source, "--run", "model", cwd=work)
    problems = []

    # Back again: the same weights, and the same R.
    run(eval_program, "export", "--run", "model", "--out", out, *(["--with-code"] if own else []), cwd=work)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **eager).eval()
    if again.config.model_type == config.model_type:
        for (a_name, a), (b_name, b) in zip(model.state_dict().items(), again.state_dict().items()):
            if a_name != b_name or not torch.equal(a, b):
                problems.append(f"{a_name} changed")

    tokens = torch.randint(0, 256, (1, 60))
    text = ",".join(map(str, tokens[0].tolist()))
    logits = model(tokens).logits
    run(eval_program, "logits", "--run", "model", "--tokens", text, "--out", "ours.npy", cwd=work)
    ours = np.load(work / "ours.npy")
    errors = {"logits": distance(ours, logits[0].detach()), "export": distance(again(tokens).logits[0].detach(), ours)}

    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    loss.backward()
    printed = run(eval_program, "gradients", "--run", "model", "--tokens", text, "--out", "ours.safetensors", cwd=work)
    our_loss = float(printed.split("mean loss, ")[1].split()[0])
    errors["loss"] = abs(our_loss - loss.item()) / loss.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    theirs = gradients_by_our_names(work / "theirs", eval_program, work, model)
    mine = load_file(str(work / "ours.safetensors"))
    if mine.keys() != theirs.keys():
        problems.append("other tensors")
    errors["gradients"] = max(distance(mine[key], theirs[key]) for key in mine)

    # Greedy generation there with a key/value cache; here every token must be the likeliest behind those before it.
    start = [256, *b"The "]
    generated = again.generate(torch.tensor([start]), attention_mask=torch.ones(1, len(start), dtype=torch.long),
                               max_new_tokens=200, do_sample=False, eos_token_id=None)[0, len(start):].tolist()
    run(eval_program, "logits", "--run", "model", "--tokens", ",".join(map(str, start + generated)), "--out",
                  "long.npy", cwd=work)
    greedy = np.load(work / "long.npy")[len(start) - 1:-1].argmax(1).tolist()
    if greedy != generated:
        first = next(i for i in range(200) if greedy[i] != generated[i])
        problems.append(f"greedy generation differs at token {first}")

    # Another fraction, the same weights.
    changed = json.loads((out / "config.json").read_text())
    if changed.get("rotary_dim", 0) > 0:
        changed["rotary_dim"] = 16 if changed["rotary_dim"] < 16 else 8
    elif "partial_rotary_factor" in changed:
        fraction = changed["partial_rotary_factor"]
        other = 1.0 if fraction < 0.9 else 0.5
        changed["partial_rotary_factor"] = changed["rope_parameters"]["partial_rotary_factor"] = other
        if "rotary_pct" in changed:
            changed["rotary_pct"] = other
    if changed != json.loads((out / "config.json").read_text()):
        (out / "config.json").write_text(json.dumps(changed))
        run(eval_program, "import", "--from", out, "--run", "other", cwd=work)
        run(eval_program, "logits", "--run", "other", "--tokens", text, "--out", "other.npy", cwd=work)
        errors["another fraction"] = distance(np.load(work / "other.npy"), ours)
        if errors["another fraction"] < 1e-2:
            problems.append("another fraction changes nothing")
    for key, bound in (("logits", LOGITS), ("export", LOGITS), ("loss", LOGITS), ("gradients", GRADIENTS)):
        if not errors[key] < bound:
            problems.append(f"{key}: {errors[key]:.1e} is not below {bound:.1e}")
    print(f"{name:<22} " + "  ".join(f"{key} {error:.1e}" for key, error in errors.items())
          + ("  FAILED: " + "; ".join(problems) if problems else "  ok"), flush=True)
    return not problems


def check_tokenizers(eval_program, work):
    """Exported tokenizers give the ids that `data encode` writes: bytes, and the BPE of the tests."""
    text = (ROOT / "README.md").read_text().replace("<|endoftext|>", "")  # for Hugging Face that is always the token
    text += "na\u00efve \u4e2d\u6587 \U0001f600 e\u0301\t \r\n \x7f  don't  12345\n"
    (work / "text.txt").write_text(text, newline="")
    data, train = (eval_program.parent / name for name in ("data", "train"))
    fine = True
    for name, flags in (("bytes", []), ("BPE", ["--tokenizer", ROOT / "tests" / "fixtures" / "tokenizer.json"])):
        shards = f"{name}/train_*.bin"
        run(data, "encode", "--input", "text.txt", "--separator", "", "--val-fraction", 0, "--out", name, *flags,
            cwd=work)
        run(train, "--data", shards, "--val", shards, "--layers", 1, "--width", 8, "--heads", 1, "--context", 16,
            "--steps", 1, "--run", name, cwd=work)
        run(eval_program, "export", "--run", name, "--out", f"out-{name}", cwd=work)
        ids = np.fromfile(work / name / "train_000.bin", dtype=np.uint16)[512:].tolist()  # the end of text stands first
        tokenizer = AutoTokenizer.from_pretrained(work / f"out-{name}")
        tokenizer.model_max_length = len(text.encode())  # no warning that the model could not take it all
        same = tokenizer(text).input_ids == ids[1:] and tokenizer.decode(ids[1:]) == text
        special = tokenizer.eos_token_id == ids[0] and tokenizer("<|endoftext|>").input_ids == ids[:1]
        fine = fine and same and special
        print(f"tokenizer {name:<12} {len(ids) - 1} ids{'  ok' if same and special else '  FAILED'}")
    return fine


def main():
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "build" / "eval"))
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args()
    program = pathlib.Path(options.program).resolve()
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        results = [check(name, config, program, work) for name, config in models(own_config(program, work))
                   if options.only in name]
        if options.only in "tokenizer":
            results.append(check_tokenizers(program, work))
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
