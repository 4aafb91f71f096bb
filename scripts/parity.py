"""Checks models against Hugging Face's Transformers, both ways, for every family of eval/huggingface_families.h; and
the tokenizers that go with them.

    make && python scripts/parity.py                needs torch, transformers, safetensors; about five minutes
    python scripts/parity.py --only phi3            models whose name holds this
    python scripts/parity.py --table                the table of docs/interop.md

Small models of the real classes, with random weights that are larger than at the start of a training so that position
matters. For each:
  import   Transformers writes it in several files, `eval import` reads it
  logits   of 60 tokens of the whole vocabulary, end-of-text among them; loss and all gradients
  export   `eval export` writes it, Transformers reads it: where the class is the same, the same weights, bit for bit;
           the same logits, the same gradient of end-of-text, the same special tokens
  greedy   200 tokens generated there, with a key/value cache, are the likeliest ones here
  train    three steps from it with a learning rate that moves every weight, a trace of the result, another export: the
           same logits there
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
import transformers as T
from safetensors.torch import load_file
from transformers.utils import logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGITS, GRADIENTS = 4 * 6e-6, 16 * 6e-6
CONTEXT = 320
SHAPE = dict(vocab_size=264, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=CONTEXT, bos_token_id=256, eos_token_id=256, pad_token_id=None,
             tie_word_embeddings=False)
GQA = dict(num_key_value_heads=2)
RMS, LAYER = dict(rms_norm_eps=1e-5), dict(layer_norm_eps=1e-5)
GPTJ = dict(vocab_size=264, n_embd=48, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=256, eos_token_id=256,
            pad_token_id=None)
GLM_MOE = dict(head_dim=16, use_qk_norm=True, first_k_dense_replace=3, n_routed_experts=2, num_experts_per_tok=1)


def rope(fraction=None, base=10000.0, kind="default", **more):
    parameters = dict(rope_type=kind, rope_theta=base, **more)
    if fraction is not None:
        parameters["partial_rotary_factor"] = fraction
    return dict(rope_parameters=parameters)


def models(own):
    """(name, config); head sizes 12 and 16. own: a config of our own class."""
    llama = dict(SHAPE, **GQA, head_dim=16)
    yield "llama 16/16", T.LlamaConfig(**llama, **RMS, **rope())
    yield "llama tied, eps 1e-6 (Llama 1)", T.LlamaConfig(**dict(llama, tie_word_embeddings=True), rms_norm_eps=1e-6)
    yield "llama eps 1e-5 in fp32", T.LlamaConfig(**llama, rms_norm_eps=9.999999747378752e-06)
    yield "llama attention_bias", T.LlamaConfig(**llama, **RMS, attention_bias=True)
    yield "llama attention_bias, mlp_bias", T.LlamaConfig(**llama, **RMS, attention_bias=True, mlp_bias=True)
    yield "llama llama3 (Llama 3.1)", T.LlamaConfig(**llama, **RMS, **rope(
        None, 500000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))
    yield "llama linear", T.LlamaConfig(**llama, **RMS, **rope(kind="linear", factor=4.0))
    yield "llama yarn", T.LlamaConfig(**llama, **RMS, **rope(kind="yarn", factor=4.0,
                                                            original_max_position_embeddings=64))
    yield "llama yarn, mscale", T.LlamaConfig(**llama, **RMS, **rope(
        kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0, mscale=1.0,
        mscale_all_dim=0.5))
    yield "mistral without window", T.MistralConfig(**llama, **RMS, sliding_window=None)
    yield "mistral window = context", T.MistralConfig(**llama, **RMS, sliding_window=CONTEXT)
    yield "smollm3 NoPE", T.SmolLM3Config(**SHAPE, **GQA, **RMS, no_rope_layers=[0, 0, 0])
    yield "smollm3 1, 0, 1", T.SmolLM3Config(**SHAPE, **GQA, **RMS, no_rope_layers=[1, 0, 1])
    yield "smollm3 0, 1, 1", T.SmolLM3Config(**SHAPE, **GQA, **RMS, no_rope_layers=[0, 1, 1])
    yield "smollm3 every 2nd (SmolLM3)", T.SmolLM3Config(**dict(SHAPE, tie_word_embeddings=True), **GQA,
                                                         rms_norm_eps=1e-6, no_rope_layer_interval=2)
    for R in (0, 2, 4, 8, 12, 16):
        yield f"phi3 {R}/16", T.Phi3Config(**SHAPE, **GQA, **RMS, **rope(R / 16), head_dim=16, attention_bias=False)
    yield "phi3 12/12, tied", T.Phi3Config(**dict(SHAPE, tie_word_embeddings=True), **GQA, **RMS, **rope(1.0, 500.0))
    yield "phi3 4/16, pad = end-of-text", T.Phi3Config(**dict(SHAPE, pad_token_id=256), **GQA, **RMS, **rope(0.25),
                                                       head_dim=16)
    yield "phi3 longrope (Phi-4-mini)", T.Phi3Config(
        **dict(SHAPE, max_position_embeddings=4 * CONTEXT, hidden_size=64), **GQA, **RMS,
        original_max_position_embeddings=CONTEXT,
        **rope(0.75, kind="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[1.0, 2, 3, 4, 5, 6.0],
               original_max_position_embeddings=CONTEXT))
    for R in (2, 4, 8, 16):
        yield f"glm4_moe {R}/16", T.Glm4MoeConfig(**SHAPE, **GQA, **RMS, **rope(R / 16), **GLM_MOE)
    yield "glm4_moe attention_bias", T.Glm4MoeConfig(**SHAPE, **GQA, **RMS, **rope(0.5), **GLM_MOE, attention_bias=True)
    yield "qwen2", T.Qwen2Config(**SHAPE, **GQA, rms_norm_eps=1e-6, **rope(None, 1e6))
    yield "qwen3", T.Qwen3Config(**SHAPE, **GQA, rms_norm_eps=1e-6, head_dim=16, **rope(None, 1e6))
    yield "qwen3 yarn", T.Qwen3Config(**SHAPE, **GQA, rms_norm_eps=1e-6, head_dim=16, **rope(
        None, 1e6, "yarn", factor=4.0, original_max_position_embeddings=64))
    yield "glm 8/16 (GLM-4-9B)", T.GlmConfig(**SHAPE, **GQA, rms_norm_eps=1.5625e-7, head_dim=16, attention_bias=True,
                                             **rope(0.5))
    yield "glm 8/16 without biases", T.GlmConfig(**SHAPE, **GQA, **RMS, head_dim=16, attention_bias=False, **rope(0.5))
    neox = dict(SHAPE, **LAYER, hidden_dropout=0.0, attention_dropout=0.0)
    for R in (2, 4, 6, 12):
        for parallel in (True, False):
            yield f"gpt_neox {R}/12{' parallel' if parallel else ''}", T.GPTNeoXConfig(
                **neox, **rope(min(R / 12 + 1e-9, 1.0)), use_parallel_residual=parallel)
    yield "gpt_neox gelu_fast (NeoX-20B)", T.GPTNeoXConfig(**neox, **rope(0.5), hidden_act="gelu_fast")
    yield "gpt_neox attention_bias false", T.GPTNeoXConfig(**neox, **rope(0.5), attention_bias=False)
    yield "gpt_neox linear", T.GPTNeoXConfig(**neox, **rope(0.5, kind="linear", factor=2.0))
    stablelm = dict(SHAPE, **LAYER, num_key_value_heads=2, hidden_size=64)
    yield "stablelm 4/16 (3B)", T.StableLmConfig(**stablelm, **rope(0.25))
    yield "stablelm 4/16, qkv biases (1.6B)", T.StableLmConfig(**stablelm, **rope(0.25), use_qkv_bias=True)
    yield "phi 6/12 (Phi-1.5)", T.PhiConfig(**SHAPE, **rope(0.5))
    yield "phi 8/20 (Phi-2)", T.PhiConfig(**dict(SHAPE, hidden_size=80), **rope(0.4))
    yield "gptj 4/12 (GPT-J)", T.GPTJConfig(**GPTJ, rotary_dim=4)
    yield "codegen 8/12 (CodeGen)", T.CodeGenConfig(**GPTJ, rotary_dim=8)
    paper = dict(block="parallel", kv_heads=4)
    other = dict(rope_pairs="interleaved", qk_norm=True, norm="layer", mlp="gelu", bias=True, tied=True,
                 attention_softcap=1.5)
    for name, changes in (*((f"{R}/16 parallel", dict(paper, rotary_dim=R)) for R in (0, 2, 8, 16)),
                          ("4/16 all others", dict(other, rotary_dim=4)),
                          ("by layer, yarn", dict(rotary_layers="8,0,16", rotary_dim=16, rope_frequencies="head",
                                                  frequency_scaling="yarn:4,64")),
                          ("one norm, two biases", dict(paper, rotary_dim=4, norm="layer", norm_eps=0.1,
                                                        mlp="gelu-tanh", shared_norm=True, qkv_bias=True,
                                                        head_bias=True))):
        config = copy.deepcopy(own)
        config.update(changes)
        yield f"own {name}", config


def run(*command, cwd):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def distance(a, b):
    """Root mean square of the difference, relative to that of b."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30))


def numbers(tokens):
    return ",".join(map(str, tokens))


class Checks:
    """The programs, and a directory to work in."""

    def __init__(self, program, work):
        self.eval, self.work = program, work
        self.train, self.data = program.parent / "train", program.parent / "data"
        run(self.data, "stories", "--out", "stories", "--bytes", "60k", cwd=work)

    def clean(self, *names):
        for name in names:
            shutil.rmtree(self.work / name, ignore_errors=True)

    def logits(self, name, tokens):
        """(tokens, V) of run `name`."""
        run(self.eval, "logits", "--run", name, "--tokens", numbers(tokens), "--out", "logits.npy", cwd=self.work)
        return np.load(self.work / "logits.npy")

    def load(self, directory, **options):
        return T.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()

    def own_config(self):
        """A config of the class that `eval export --with-code` writes, with its code in work/own."""
        any_model = T.AutoModelForCausalLM.from_config(T.Phi3Config(**SHAPE, **GQA, **RMS, **rope(0.5), head_dim=16))
        any_model.save_pretrained(self.work / "any")
        run(self.eval, "import", "--from", "any", "--run", "any", cwd=self.work)
        run(self.eval, "export", "--run", "any", "--out", "own", "--with-code", cwd=self.work)
        return T.AutoConfig.from_pretrained(self.work / "own", trust_remote_code=True)

    def export(self, name, out, own=False):
        """Writes a run as the class that holds it, else as our own. Returns the model, read again."""
        self.clean(out)
        command = [self.eval, "export", "--run", name, "--out", out]
        try:
            run(*command, *(["--with-code"] if own else []), cwd=self.work)
        except RuntimeError as error:
            if own or "--with-code" not in str(error):
                raise
            run(*command, "--with-code", cwd=self.work)
        return self.load(self.work / out, trust_remote_code=True)

    def gradients_by_our_names(self, model):
        """Transformers' gradients under our names: written as a model, read by eval import."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        self.clean("theirs", "runs/gradients")
        model.save_pretrained(self.work / "theirs")
        run(self.eval, "import", "--from", "theirs", "--run", "gradients", cwd=self.work)
        return load_file(str(self.work / "runs" / "gradients" / "checkpoint" / "model.safetensors"))

    def model(self, config):
        """One model: the errors that were measured, what is wrong, and its class after an export."""
        own = config.model_type == "partial_rope"
        model = T.AutoModelForCausalLM.from_config(config, trust_remote_code=True).float().eval()
        for name, parameter in model.named_parameters():
            mean, deviation = (0, 0.15) if parameter.dim() > 1 else (0, 0.1) if name.endswith("bias") else (1, 0.2)
            torch.nn.init.normal_(parameter, mean, deviation)
        self.clean("source", "runs")
        model.save_pretrained(self.work / "source", max_shard_size="40KB")
        run(self.eval, "import", "--from", "source", "--run", "model", cwd=self.work)
        problems, errors = [], {}

        tokens = torch.randint(0, 264, (1, 60))
        tokens[0, 7] = tokens[0, 30] = 256
        logits = model(tokens).logits
        ours = self.logits("model", tokens[0].tolist())
        errors["logits"] = distance(ours, logits[0].detach())
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        loss.backward()
        printed = run(self.eval, "gradients", "--run", "model", "--tokens", numbers(tokens[0].tolist()), "--out",
                      "ours.safetensors", cwd=self.work)
        errors["loss"] = abs(float(printed.split("mean loss, ")[1].split()[0]) - loss.item()) / loss.item()

        # Back again.
        again = self.export("model", "out", own)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(again.config, key, None) != getattr(config, key, None):
                problems.append(f"{key} is {getattr(again.config, key, None)}")
        if again.config.model_type == config.model_type:
            before, after = model.state_dict(), again.state_dict()
            problems += [f"{name} changed" for name in before if not torch.equal(before[name], after[name])]
            problems += [f"{name} is new" for name in after if name not in before and after[name].any()]
        their_logits = again(tokens).logits
        errors["export"] = distance(their_logits[0].detach(), ours)
        torch.nn.functional.cross_entropy(their_logits[0, :-1], tokens[0, 1:]).backward()
        mine = load_file(str(self.work / "ours.safetensors"))
        end_of_text = distance(again.get_input_embeddings().weight.grad[256], mine["embedding.weight"][256])

        # In longer texts LongRoPE has other factors, for all of their tokens; of those here and in the export.
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            text = torch.randint(0, 264, (1, CONTEXT + 40))
            right = model(text).logits[0].detach()
            errors["long"] = max(distance(again(text).logits[0].detach(), right),
                                 distance(self.logits("model", text[0].tolist()), right))

        # Gradients. There the token that pads has none; biases that the class has not are zero here, and only we have
        # gradients of them.
        theirs = self.gradients_by_our_names(model)
        weights = load_file(str(self.work / "runs" / "model" / "checkpoint" / "model.safetensors"))
        if mine.keys() != theirs.keys():
            problems.append("other tensors")
        if config.pad_token_id is not None and not config.tie_word_embeddings:
            end_of_text = float(mine["embedding.weight"][256].norm() == 0)
            mine["embedding.weight"][config.pad_token_id] = 0
        errors["gradients"] = max(distance(mine[key], theirs[key]) for key in mine if weights[key].any())
        errors["end of text"] = end_of_text

        # Greedy generation there with a key/value cache; here every token must be the likeliest behind those before it.
        start = [256, *b"The "]
        generated = again.generate(torch.tensor([start]), attention_mask=torch.ones(1, len(start), dtype=torch.long),
                                   max_new_tokens=200, do_sample=False, eos_token_id=-1, pad_token_id=0)
        generated = generated[0, len(start):].tolist()
        greedy = self.logits("model", start + generated)[len(start) - 1:-1].argmax(1).tolist()
        if greedy != generated:
            first = next(i for i in range(200) if greedy[i] != generated[i])
            problems.append(f"greedy generation differs at token {first}")

        # Trained on, looked into, exported again.
        run(self.train, "--init", "model", "--run", "more", "--data", "stories/train_*.bin", "--steps", 3, "--batch", 2,
            "--context", 64, "--lr", 1e-2, "--warmup", 0, "--val-tokens", 128, cwd=self.work)
        run(self.eval, "trace", "--run", "more", "--prompt", "Ann gave", "--layer", 1, cwd=self.work)
        more = self.export("more", "out2", own)
        errors["trained"] = distance(self.logits("more", tokens[0].tolist()), more(tokens).logits[0].detach())
        if distance(more(tokens).logits[0].detach(), ours) < 1e-2:
            problems.append("training changes nothing")

        # Another fraction, the same weights.
        changed = json.loads((self.work / "out" / "config.json").read_text())
        before = copy.deepcopy(changed)
        if changed.get("rotary_dim", 0) > 0 and changed.get("rotary_layers", "all") == "all":
            changed["rotary_dim"] = 8 if changed["rotary_dim"] != 8 else 4
        elif "partial_rotary_factor" in changed and changed["rope_parameters"]["rope_type"] == "default":
            other = 1.0 if changed["partial_rotary_factor"] < 0.9 else 0.5
            for place in (changed, changed["rope_parameters"]):
                for key in {"partial_rotary_factor", "rotary_pct"} & place.keys():
                    place[key] = other
        if changed != before:
            (self.work / "out" / "config.json").write_text(json.dumps(changed))
            run(self.eval, "import", "--from", "out", "--run", "other", cwd=self.work)
            errors["another fraction"] = distance(self.logits("other", tokens[0].tolist()), ours)
            if errors["another fraction"] < 1e-2:
                problems.append("another fraction changes nothing")
        for key, bound in (("logits", LOGITS), ("export", LOGITS), ("loss", LOGITS), ("gradients", GRADIENTS),
                           ("end of text", GRADIENTS), ("trained", LOGITS), ("long", LOGITS)):
            if not errors.get(key, 0) < bound:
                problems.append(f"{key}: {errors[key]:.1e} is not below {bound:.1e}")
        return errors, problems, type(again).__name__

    def tokenizers(self):
        """Exported tokenizers give the ids that `data encode` writes: bytes, and the BPE of the tests; and a model says
        no id that only pads its vocabulary."""
        text = (ROOT / "README.md").read_text().replace("<|endoftext|>", "")  # there that is always the token
        text += "na\u00efve \u4e2d\u6587 \U0001f600 e\u0301\t \r\n \x7f  don't  12345\n"
        (self.work / "text.txt").write_text(text, newline="")
        fine = True
        for name, flags in (("bytes", []), ("BPE", ["--tokenizer", ROOT / "tests" / "fixtures" / "tokenizer.json"])):
            shards = f"{name}/train_*.bin"
            self.clean(name, f"runs/{name}", f"out-{name}")
            run(self.data, "encode", "--input", "text.txt", "--separator", "", "--val-fraction", 0, "--out", name,
                *flags, cwd=self.work)
            run(self.train, "--data", shards, "--val", shards, "--layers", 1, "--width", 8, "--heads", 1,
                "--context", 16, "--steps", 1, "--run", name, cwd=self.work)
            run(self.eval, "export", "--run", name, "--out", f"out-{name}", cwd=self.work)
            ids = np.fromfile(self.work / name / "train_000.bin", dtype=np.uint16)[512:].tolist()  # first: end-of-text
            tokenizer = T.AutoTokenizer.from_pretrained(self.work / f"out-{name}")
            tokenizer.model_max_length = len(text.encode())  # no warning that the model could not take it all
            same = tokenizer(text).input_ids == ids[1:] and tokenizer.decode(ids[1:]) == text
            special = tokenizer.eos_token_id == ids[0] and tokenizer("<|endoftext|>").input_ids == ids[:1]
            model = self.load(self.work / f"out-{name}")
            said = model.generate(torch.full((64, 1), ids[0]), attention_mask=torch.ones(64, 1, dtype=torch.long),
                                  do_sample=True, top_k=0, max_new_tokens=30, eos_token_id=-1, pad_token_id=0)
            tokens_only = int(said.max()) < len(tokenizer) < model.config.vocab_size
            good = same and special and tokens_only
            fine = fine and good
            print(f"tokenizer {name:<12} {len(ids) - 1} ids{'  ok' if good else '  FAILED'}")
        return fine


def main():
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "build" / "eval"))
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--table", action="store_true", help="print a table in Markdown, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checks = Checks(pathlib.Path(options.program).resolve(), pathlib.Path(directory))
        good, rows = [], {}
        for name, config in models(checks.own_config()):
            if options.only not in name:
                continue
            torch.manual_seed(sum(map(ord, name)))
            try:
                errors, problems, written = checks.model(config)
            except RuntimeError as error:  # a program's message
                errors, problems, written = {}, [str(error)], ""
            good.append(not problems)
            rows.setdefault(name.split()[0], []).append((written.removesuffix("ForCausalLM"), errors))
            shown = [f"{key} {error:.1e}" for key, error in errors.items()]
            print(f"{name:<32} {'  '.join(shown)}" + ("  FAILED: " + "; ".join(problems) if problems else "  ok"),
                  flush=True)
        for family, drawn in rows.items() if options.table else ():
            print(f"| {family} | {len(drawn)} | {', '.join(sorted({written for written, _ in drawn}))} | "
                  + " | ".join(f"{max(errors.get(key, np.inf) for _, errors in drawn):.1e}"
                               for key in ("logits", "loss", "gradients", "export", "trained")) + " |")
        if options.only in "tokenizer":
            good.append(checks.tokenizers())
    sys.exit(0 if good and all(good) else 1)


if __name__ == "__main__":
    main()
