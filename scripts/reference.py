"""The model of model.h once more in PyTorch, as the tests' second opinion and as the benchmarks' opponent.

Parameter names and shapes are those of the checkpoints (embedding.weight, layers.0.qkv.weight, ...). Whatever PyTorch
has a library function for is that function; only RoPE is written out, as x cos + rotate_half(x) sin. Runs on any device
and in any dtype, under torch.compile and under autocast.
"""

import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class Config:
    """The keys of a run's config.json."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_hidden: int
    context: int
    vocab: int
    rotary_dim: int
    rope_base: float = 10000.0
    rope_pairs: str = "half"  # or "interleaved"
    rope_frequencies: str = "rotary"  # or "head", or wavelengths in positions
    rope_scaling: str = "none"  # see rope_scale in rope.cuh
    rotary_layers: str = "all"  # or "nope:N", or R of each layer
    qk_norm: bool = False
    attention_softcap: float = 0.0
    block: str = "sequential"  # or "parallel"
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    shared_norm: bool = False
    mlp: str = "swiglu"  # or "gelu", "gelu-tanh"
    bias: bool = False
    qkv_bias: bool = False
    head_bias: bool = False
    tied: bool = False


def make_norm(config, size):
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(size, eps=config.norm_eps)


def rotary_dims(config):
    """R of each layer."""
    rule, layers = config.rotary_layers, range(config.layers)
    if rule == "all":
        return [config.rotary_dim for _ in layers]
    if rule.startswith("nope:"):
        return [config.rotary_dim if (layer + 1) % int(rule[5:]) else 0 for layer in layers]
    return [int(R) for R in rule.split(",")]


def scaled(frequency, scaling, base, size, positions):
    """The frequencies that rope_scale of rope.cuh makes of these, for so many positions, and what cos and sin are
    multiplied by."""
    kind, _, numbers = scaling.partition(":")
    numbers, _, longer = numbers.partition(";")
    x = [float(number) for number in numbers.split(",") if number]
    if kind == "none":
        return frequency, 1.0
    if kind == "longrope":
        limit, *factors = [float(number) for number in longer.split(",")] if longer else [math.inf]
        return frequency / torch.tensor(factors if positions > limit else x[1:], dtype=torch.float64), x[0]
    if kind == "linear":
        return frequency / x[0], 1.0
    attention = 1.0
    if kind == "llama3":
        keep = (x[3] * frequency / (2 * math.pi) - x[1]) / (x[2] - x[1])
    else:  # YaRN
        pairs = [size * math.log(x[1] / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in x[3:] or (32, 1)]
        fast, slow = max(math.floor(pairs[0]), 0), min(math.ceil(pairs[1]), size - 1)
        keep = 1 - (torch.arange(len(frequency), dtype=torch.float64) - fast) / (slow - fast or 0.001)
        attention = x[2] if len(x) > 2 else 0.1 * math.log(x[0]) + 1
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequency / x[0] + keep * frequency, attention


def rope_table(config, positions, R):
    """cos and sin, (positions, R) each, a column per rotated channel; computed in fp64, kept in fp32 as in rope.cuh."""
    size = config.head_size if config.rope_frequencies == "head" else max(R, 1)
    frequency = config.rope_base ** (-torch.arange(0, R, 2, dtype=torch.float64) / size)
    if R and config.rope_frequencies not in ("rotary", "head"):
        frequency = 2 * math.pi / torch.tensor([float(w) for w in config.rope_frequencies.split(",")]).double()
    rule = config.rope_scaling if R else "none"
    frequency, attention = scaled(frequency, rule, config.rope_base, size, max(positions, config.context))
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat((angle, angle), -1) if config.rope_pairs == "half" else angle.repeat_interleave(2, -1)
    return (angle.cos() * attention).float(), (angle.sin() * attention).float()


def rotate_half(x, pairs):
    """(a, b) -> (-b, a) for every pair of channels."""
    if pairs == "half":
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


def rope(x, cos, sin, pairs):
    """x (B, heads, T, HS); cos, sin (T, R). Channels R and up pass through."""
    R = cos.shape[-1]
    if R == 0:
        return x
    turned = x[..., :R] * cos + rotate_half(x[..., :R], pairs) * sin
    return torch.cat((turned.to(x.dtype), x[..., R:]), -1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        qkv_width = (c.heads + 2 * c.kv_heads) * c.head_size
        self.norm1 = make_norm(c, c.width)
        self.qkv = nn.Linear(c.width, qkv_width, bias=c.bias or c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_size, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_size, eps=c.norm_eps)
        self.proj = nn.Linear(c.heads * c.head_size, c.width, bias=c.bias)
        self.norm2 = None if c.shared_norm else make_norm(c, c.width)
        self.up = nn.Linear(c.width, c.mlp_hidden * (2 if c.mlp == "swiglu" else 1), bias=c.bias)
        self.down = nn.Linear(c.mlp_hidden, c.width, bias=c.bias)

    def attention(self, x, cos, sin):
        c = self.config
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, c.heads + 2 * c.kv_heads, c.head_size).transpose(1, 2)
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), 1)
        if c.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = rope(q, cos, sin, c.rope_pairs), rope(k, cos, sin, c.rope_pairs)
        if c.attention_softcap:  # which that function has not
            k, v = (x.repeat_interleave(c.heads // c.kv_heads, 1) for x in (k, v))
            score = c.attention_softcap * torch.tanh(q @ k.mT / math.sqrt(c.head_size) / c.attention_softcap)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = score.masked_fill(future, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.kv_heads)
        return self.proj(y.transpose(1, 2).reshape(B, T, c.heads * c.head_size))

    def feed_forward(self, x):
        up = self.up(x)
        if self.config.mlp == "swiglu":
            gate, up = up.chunk(2, -1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(up, approximate="none" if self.config.mlp == "gelu" else "tanh"))

    def forward(self, x, cos, sin):
        h1 = self.norm1(x)
        x2 = x + self.attention(h1, cos, sin)
        if self.norm2 is None:
            return x2 + self.feed_forward(h1)
        return x2 + self.feed_forward(self.norm2(x if self.config.block == "parallel" else x2))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final_norm = make_norm(c, c.width)
        self.head = nn.Linear(c.width, c.vocab, bias=c.head_bias)
        if c.tied:
            self.head.weight = self.embedding.weight
        for R in {*rotary_dims(c)}:
            for name, table in zip(("cos", "sin"), rope_table(c, c.context, R)):
                self.register_buffer(f"{name}{R}", table, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V)"""
        T = tokens.shape[1]
        x = self.embedding(tokens)
        for layer, R in zip(self.layers, rotary_dims(self.config)):
            x = layer(x, getattr(self, f"cos{R}")[:T], getattr(self, f"sin{R}")[:T])
        return self.head(self.final_norm(x))

    def loss(self, tokens, targets, z_loss=0.0):
        """Mean over all B*T positions of the cross-entropy in nats + z_loss (log Z)^2; where the target is -1, 0."""
        logits = self(tokens).flatten(0, 1)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        targets = targets.flatten()
        total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        if z_loss:
            total = total + z_loss * (logits.logsumexp(-1).square() * (targets >= 0)).sum()
        return total / targets.numel()


def make_optimizer(model, lr, betas, eps, weight_decay, **options):
    """AdamW with weight decay on matrices only. `options` go to torch.optim.AdamW (fused, foreach, capturable)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, **options)


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())
