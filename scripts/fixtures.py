"""Writes tests/fixtures/*.safetensors: losses, gradients and runs of scripts/reference.py, for the C++ to equal.

    python scripts/fixtures.py            needs torch, numpy and transformers; takes seconds; the same bytes each time

Inputs are exact fp32 numbers; everything is computed in fp64; losses are stored in fp64, gradients rounded to fp32.
A file holds its configuration (`config` in the metadata, JSON) and the tensors
    weight.NAME, gradient.NAME   of every parameter
    tokens, targets (B, T)       int32; a target of -1 is not counted
    losses (B, T)                nats, without z-loss
and, if it has a training run of S steps:
    run.tokens (S, B, T+1), run.losses (S), run.norms (S) before clipping, run.rates (S),
    run.weight.NAME after the last step
"""

import dataclasses
import json
import math
import pathlib
import struct

import numpy as np
import torch
import torch.nn.functional as F

from reference import Config, GPT, make_optimizer

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
B, T, STEPS = 2, 11, 10

# Sizes are small, odd where they may be, and different from each other, so that no mix-up of two of them can pass.
CONFIGS = {
    # Llama-like: grouped queries, a head size that is not width / heads, 4 of 10 channels rotated
    "llama": dict(width=20, heads=4, kv_heads=2, head_size=10, mlp_hidden=13, rotary_dim=4),
    "nope": dict(width=18, heads=3, kv_heads=3, head_size=6, mlp_hidden=14, rotary_dim=0),
    "parallel_qknorm": dict(width=20, heads=2, kv_heads=1, head_size=10, mlp_hidden=13, rotary_dim=2, block="parallel",
                            qk_norm=True),
    "pythia": dict(width=24, heads=3, kv_heads=3, head_size=8, mlp_hidden=30, rotary_dim=2, block="parallel",
                   norm="layer", mlp="gelu", bias=True),
    # every channel rotated, neighbours paired, one matrix for embedding and head, QK-Norm with a full rotation
    "interleaved_tied": dict(width=20, heads=4, kv_heads=2, head_size=6, mlp_hidden=13, rotary_dim=6, rope_base=500.0,
                             rope_pairs="interleaved", tied=True, qk_norm=True),
    # a kind of block that nobody presets: LayerNorm without biases in the linears, SwiGLU, one key/value head
    "mixed": dict(width=19, heads=3, kv_heads=1, head_size=5, mlp_hidden=11, rotary_dim=4, norm="layer"),
    # the frequencies of a whole head, scaled as Llama 3's, and a layer that is not rotated
    "rules": dict(width=20, heads=4, kv_heads=2, head_size=10, mlp_hidden=13, rotary_dim=6, rope_base=30.0,
                  rope_frequencies="head", rope_scaling="llama3:4,1,3,20", rotary_layers="nope:2"),
    # another R in every layer, QK-Norm, YaRN with its factor on cos and sin
    "yarn": dict(width=20, heads=2, kv_heads=1, head_size=10, mlp_hidden=13, rotary_dim=10, rope_base=30.0,
                 rope_pairs="interleaved", qk_norm=True, rope_scaling="yarn:4,20", rotary_layers="10,4"),
    # a shared norm with an eps that counts, GELU's tanh form, biases of qkv and of the head
    "gptj": dict(width=20, heads=4, kv_heads=4, head_size=10, mlp_hidden=31, rotary_dim=6, rope_pairs="interleaved",
                 block="parallel", norm="layer", norm_eps=0.03, shared_norm=True, mlp="gelu-tanh", qkv_bias=True,
                 head_bias=True),
    # a soft cap in the midst of the scores, grouped queries
    "softcap": dict(width=20, heads=4, kv_heads=2, head_size=10, mlp_hidden=13, rotary_dim=2, attention_softcap=1.5),
}
Z_LOSS = {"llama": 1e-2, "interleaved_tied": 1e-3}
IGNORED = {"nope"}  # fixtures with some targets of -1
RUNS = {  # name: optimiser of the training run
    "llama": dict(lr=3e-3, min_lr=3e-4, warmup=3, weight_decay=0.1, betas=(0.9, 0.95), clip=0.5),
    "pythia": dict(lr=1e-3, min_lr=0.0, warmup=0, weight_decay=0.3, betas=(0.8, 0.99), clip=1.0),
    "interleaved_tied": dict(lr=5e-3, min_lr=5e-4, warmup=2, weight_decay=0.1, betas=(0.9, 0.95), clip=0.0),
}


def cosine_rate(step, steps, warmup, lr, min_lr, **_):
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / (steps - 1 - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def save(path, tensors, metadata):
    """The safetensors format: length of the header (u64), header (JSON), the tensors' bytes."""
    names = {np.dtype("float32"): "F32", np.dtype("float64"): "F64", np.dtype("int32"): "I32"}
    header, data, at = {"__metadata__": metadata}, [], 0
    # 8-byte types first, so that every tensor is aligned
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data.append(tensor.tobytes())
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def fp32(t):
    return t.detach().float().numpy()


def make(name, options, seed):
    random = torch.Generator().manual_seed(seed)
    config = Config(layers=2, context=T + 2, vocab=29, **options)
    model = GPT(config).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Far from the initial values, so that no term of a gradient is small by accident.
            noise = torch.randn(p.shape, generator=random)
            p.copy_((0.3 * noise if p.dim() > 1 else 0.2 * noise + (1 if key.endswith("weight") else 0)).float())
    tokens = torch.randint(config.vocab, (B, T + 1), generator=random)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if name in IGNORED:
        targets[0, 3] = targets[1, 0] = targets[1, T - 1] = -1
    z_loss = Z_LOSS.get(name, 0.0)
    model.loss(inputs, targets, z_loss).backward()
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    tensors = {
        "tokens": inputs.int().contiguous().numpy(),
        "targets": targets.int().contiguous().numpy(),
        "losses": losses.detach().view(B, T).numpy(),
    }
    for key, p in model.named_parameters():
        tensors["weight." + key] = fp32(p)
        tensors["gradient." + key] = fp32(p.grad)
    metadata = {"config": json.dumps(dataclasses.asdict(config)), "z_loss": repr(z_loss)}

    if name in RUNS:
        run = RUNS[name]
        optimizer = make_optimizer(model, lr=1.0, betas=run["betas"], eps=1e-8, weight_decay=run["weight_decay"])
        # Something that can be learnt: every sequence counts on in fives from a random start.
        start = torch.randint(config.vocab, (STEPS, B, 1), generator=random)
        batches = (start + 5 * torch.arange(T + 1)) % config.vocab
        run_losses, norms, rates = [], [], []
        for step in range(STEPS):
            rate = cosine_rate(step, STEPS, **run)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = model.loss(batches[step, :, :-1], batches[step, :, 1:])
            loss.backward()
            # clip_grad_norm_ with an infinite limit returns the norm and changes nothing
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip"] or math.inf)
            optimizer.step()
            run_losses.append(loss.item())
            norms.append(norm.item())
            rates.append(rate)
        tensors["run.tokens"] = batches.int().numpy()
        tensors["run.losses"] = np.array(run_losses)
        tensors["run.norms"] = np.array(norms)
        tensors["run.rates"] = np.array(rates)
        for key, p in model.named_parameters():
            tensors["run.weight." + key] = fp32(p)
        metadata["run"] = json.dumps(run)
        print(f"{name}: losses {run_losses[0]:.4f} ... {run_losses[-1]:.4f}, norms {min(norms):.2f}-{max(norms):.2f}")
    path = FOLDER / f"{name}.safetensors"
    save(path, tensors, metadata)
    return path.stat().st_size


# --rope-scaling, R, base, and what Transformers calls it.
SCALINGS = [
    ("linear:4", 16, 10000.0, dict(rope_type="linear", factor=4.0)),
    ("llama3:8,1,4,8192", 128, 500000.0, dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                              high_freq_factor=4.0, original_max_position_embeddings=8192)),
    ("yarn:16,512", 64, 10000.0, dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=512)),
    ("yarn:40,4096,1.3,24,2", 26, 1e6, dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096,
                                            attention_factor=1.3, beta_fast=24.0, beta_slow=2.0)),
    ("longrope:1.1902380714238083,1,1.5,2,4,8,16", 12, 10000.0,
     dict(rope_type="longrope", factor=32.0, original_max_position_embeddings=4096,
          short_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 16.0], long_factor=[64.0] * 6)),
]


def scalings():
    """tests/fixtures/rope_scaling.json: frequencies and attention factor of each, by Transformers (needs it)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rows = []
    for rule, R, base, parameters in SCALINGS:
        positions = int(parameters.get("factor", 1) * parameters.get("original_max_position_embeddings", 512))
        config = LlamaConfig(hidden_size=4 * R, num_attention_heads=4, head_dim=R, max_position_embeddings=positions,
                             rope_parameters=dict(parameters, rope_theta=base))
        theta, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=1)
        rows.append(dict(scaling=rule, R=R, base=base, theta=theta.tolist(), attention=attention))
    (FOLDER / "rope_scaling.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    scalings()
    FOLDER.mkdir(exist_ok=True)
    total = sum(make(name, options, seed) for seed, (name, options) in enumerate(CONFIGS.items(), 1))
    print(f"{len(CONFIGS)} files, {total} bytes")
