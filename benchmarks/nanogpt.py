"""nanoGPT's model and optimizer in torch, written anew from its description, as what lm-flax is measured against.

Source: github.com/karpathy/nanoGPT, README and config/train_shakespeare_char.py. Attention is torch's own fused kernel,
as there. Imported by lm_step.py and char_quality.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a GPT."""

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    length: int
    dropout: float = 0.0
    bias: bool = True


class Attention(nn.Module):
    """Causal self-attention: one projection to queries, keys and values."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads, self.dropout = sizes.num_heads, sizes.dropout
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=sizes.bias)
        self.out = nn.Linear(sizes.width, sizes.width, bias=sizes.bias)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, L, D] to the same."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)
        )
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    """Norm before each sublayer; the feed-forward network is 4 x as wide."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(sizes.width, bias=sizes.bias) for _ in range(2))
        self.attention = Attention(sizes)
        self.up = nn.Linear(sizes.width, 4 * sizes.width, bias=sizes.bias)
        self.down = nn.Linear(4 * sizes.width, sizes.width, bias=sizes.bias)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, L, D] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """The model; the embedding is the output layer as well."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.token = nn.Embedding(sizes.vocab_size, sizes.width)
        self.position = nn.Embedding(sizes.length, sizes.width)
        self.drop = nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.norm = nn.LayerNorm(sizes.width, bias=sizes.bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_added = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.num_layers) if is_added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy, in nats."""
        x = self.drop(self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.token.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_adamw(model: nn.Module, learning_rate: float, beta2: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; matrices and tables decay. Fused where torch has it."""
    parameters = list(model.parameters())
    groups = [
        {"params": [x for x in parameters if x.ndim > 1], "weight_decay": decay},
        {"params": [x for x in parameters if x.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, beta2), fused=True)


def cosine(step: int, warmup: int, total: int, peak: float, least: float) -> float:
    """nanoGPT's learning rate."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / (total - warmup)
    return least + 0.5 * (1 + math.cos(math.pi * share)) * (peak - least)
