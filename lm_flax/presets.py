"""Sizes of published models, by name."""

from collections.abc import Callable

from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config


def _gpt2(num_layers: int, width: int) -> GPT2Config:
    """GPT-2 of this depth and width; heads are 64 wide, the feed-forward layer 4 x width."""
    return GPT2Config(num_layers=num_layers, width=width, num_heads=width // 64, mlp_width=4 * width)


def gpt2() -> GPT2Config:
    """12 layers, 768 wide, 124,439,808 parameters (Radford et al. 2019, table 2, as released)."""
    return _gpt2(12, 768)


def gpt2_medium() -> GPT2Config:
    """24 layers, 1024 wide, 354,823,168 parameters."""
    return _gpt2(24, 1024)


def gpt2_large() -> GPT2Config:
    """36 layers, 1280 wide, 774,030,080 parameters."""
    return _gpt2(36, 1280)


def gpt2_xl() -> GPT2Config:
    """48 layers, 1600 wide, 1,557,611,200 parameters."""
    return _gpt2(48, 1600)


def llama_150m() -> LlamaConfig:
    """16 layers, 768 wide, 149,840,640 parameters: Llama's architecture at about the size of GPT-2."""
    return LlamaConfig(num_layers=16, width=768, num_heads=12, num_kv_heads=4, mlp_width=2048, max_length=2048)


def llama_1b() -> LlamaConfig:
    """22 layers, 2048 wide, 1,100,048,384 parameters: TinyLlama's sizes (Zhang et al. 2024, arXiv 2401.02385)."""
    return LlamaConfig(num_layers=22, width=2048, num_heads=32, num_kv_heads=4, mlp_width=5632, max_length=2048)


def llama_7b() -> LlamaConfig:
    """32 layers, 4096 wide, 6,738,415,616 parameters: Llama 2's (Touvron et al. 2023, arXiv 2307.09288)."""
    return LlamaConfig()


SIZES: dict[str, Callable[[], GPT2Config | LlamaConfig]] = {
    size.__name__: size for size in (gpt2, gpt2_medium, gpt2_large, gpt2_xl, llama_150m, llama_1b, llama_7b)
}
