"""Ways to compute attention, the ablest first, and which one a program gets where it is compiled.

The plain way (``core_flax.attention``) honours everything and keeps the scores [B, H, L, M], which on accelerators cost
more time than the products do. The others never have them whole. Each says what it cannot do, and is then not taken.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp

from core_flax import hardware, sharding
from core_flax.types import Array

RESIDUALS = "attention_residuals"
"""Name of what a kernel keeps for its backward pass (jax.ad_checkpoint.checkpoint_name)."""

CHUNK = 512
"""Keys that the chunked way takes at a time."""

_LOWEST = jnp.finfo(jnp.float32).min


@flax.struct.dataclass
class Mask:
    """Where queries may look, as what it follows from: at keys of their own number, if causal no later than they are.

    Attributes:
      queries_BL: numbers of the queries; None: all 1.
      keys_BM: numbers of the keys; None: all 1.
      array_BHLM: all of it, True where a query may look, where that is wanted anyway; None: not computed yet.
      causal: whether a query looks at no key after its own place.
    """

    queries_BL: Array | None = None
    keys_BM: Array | None = None
    array_BHLM: Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def array(self, length: int, memory: int) -> Array | None:
        """Bool, broadcastable to [B, H, L, M]; None: everywhere."""
        if self.array_BHLM is not None:
            return self.array_BHLM
        mask = jnp.tril(jnp.ones((1, 1, length, memory), bool)) if self.causal else None
        queries = 1 if self.queries_BL is None else self.queries_BL[:, None, :, None]
        keys = 1 if self.keys_BM is None else self.keys_BM[:, None, None, :]
        if self.queries_BL is None and self.keys_BM is None:
            return mask
        return queries == keys if mask is None else mask & (queries == keys)

    def for_layers(self, length: int, memory: int) -> "Mask":
        """For use in a loop over layers: on a CPU, where the plain way is taken, the array, computed once for all."""
        if hardware.platform() != "cpu":
            return self
        return dataclasses.replace(self, array_BHLM=self.array(length, memory))

    @property
    def is_numbered(self) -> bool:
        """Whether it depends on numbers."""
        return self.queries_BL is not None or self.keys_BM is not None

    def numbers(self, batch_size: int, length: int, memory: int) -> tuple[Array, Array]:
        """The numbers of queries [B, L] and keys [B, M], int32."""
        queries = jnp.ones((batch_size, length)) if self.queries_BL is None else self.queries_BL
        keys = jnp.ones((batch_size, memory)) if self.keys_BM is None else self.keys_BM
        return queries.astype(jnp.int32), keys.astype(jnp.int32)


def padding(valid_BM: Array) -> Mask:
    """All queries look at the real tokens among the keys."""
    return Mask(keys_BM=valid_BM.astype(jnp.int32))


def packed(sequences_BL: Array) -> Mask:
    """Tokens look at those of their own sequence, in rows that hold several."""
    return Mask(sequences_BL, sequences_BL)


def causal(sequences_BL: Array | None = None) -> Mask:
    """Tokens look at themselves and at those before them; in packed rows, of their own sequence."""
    return Mask(sequences_BL, sequences_BL, causal=True)


@dataclass(frozen=True)
class Call:
    """What is asked of a kernel. Sizes are those of the whole program, not of one device."""

    platform: str
    batch_size: int
    length: int
    memory: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    dtype: str
    causal: bool
    numbered: bool
    dropout: bool
    capability: float = 0.0
    """hardware.compute_capability, of a GPU."""

    def __str__(self) -> str:
        kinds = {"causal": self.causal, "padded or packed": self.numbered, "with dropout": self.dropout}
        what = ", ".join([self.dtype, *(kind for kind, holds in kinds.items() if holds)])
        heads = f"{self.num_heads} heads of {self.head_width}"
        if self.num_kv_heads < self.num_heads:
            heads += f" ({self.num_kv_heads} of keys)"
        return f"attention of {self.length} to {self.memory} tokens, {heads}, {what}, on {self.platform}"


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    Attributes:
      name: as it is told.
      supports: why it cannot do what is asked, a few words; None: it can.
      run: (q_BLHK, k_BMGK, v_BMGK, mask) -> [B, L, H, K].
    """

    name: str
    supports: Callable[[Call], str | None]
    run: Callable[[Array, Array, Array, Mask], Array]


def choose(q_BLHK: Array, k_BMGK: Array, mask: Mask, dropout: bool) -> Kernel | None:
    """The ablest kernel that honours all that is asked; None: the plain way. Tells it where ``telling`` listens."""
    call = Call(
        platform=hardware.platform(),
        batch_size=q_BLHK.shape[0],
        length=q_BLHK.shape[1],
        memory=k_BMGK.shape[1],
        num_heads=q_BLHK.shape[2],
        num_kv_heads=k_BMGK.shape[2],
        head_width=q_BLHK.shape[3],
        dtype=str(q_BLHK.dtype),
        causal=mask.causal,
        numbered=mask.is_numbered,
        dropout=dropout,
        capability=hardware.compute_capability(),
    )
    reasons = []
    for kernel in KERNELS:
        why_not = kernel.supports(call)
        if why_not is None:
            _tell(call, kernel.name, reasons)
            return kernel
        reasons.append(f"no {kernel.name}: {why_not}")
    _tell(call, "plain XLA", reasons)
    return None


_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def telling(listener: Callable[[str], None] | None) -> Iterator[None]:
    """While inside, ``listener`` is told of every different choice once, in a line; None: nobody is."""
    told: set[str] = set()

    def once(line: str) -> None:
        if listener and line not in told:
            told.add(line)
            listener(line)

    token = _listener.set(once)
    try:
        yield
    finally:
        _listener.reset(token)


def explained(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """While inside, choices are printed by the first process, if that is wanted (``--explain-kernels``)."""
    return telling((lambda line: print(line, flush=True)) if wanted and jax.process_index() == 0 else None)


def _tell(call: Call, name: str, reasons: list[str]) -> None:
    if listener := _listener.get():
        listener(f"{call}: {name}" + (f" ({'; '.join(reasons)})" if reasons else ""))


def _does_not_divide(call: Call) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and not set(sharding.MESH_AXES) <= set(mesh.axis_names):
        return f"of a mesh with the axes {', '.join(mesh.axis_names)} it is not known what to divide by which"
    sizes = {"batch": call.batch_size, "heads": call.num_heads, "kv_heads": call.num_kv_heads}
    for name, size in sizes.items():
        if size % sharding.ways(name):
            return f"{size} of {name} do not divide over {sharding.ways(name)} devices"
    return None


NO_DROPOUT = "knows no dropout of probabilities"
"""Why a kernel for accelerators is not taken that could be, were it not for the dropout."""


def _splash_supports(call: Call) -> str | None:
    if call.platform != "tpu":
        return "needs a TPU"
    if call.dropout:
        return NO_DROPOUT
    if call.length % 128 or call.memory % 128:
        return f"lengths {call.length} and {call.memory} must be multiples of 128"
    if call.causal and call.length != call.memory:
        return "causal, but of different lengths"
    return _does_not_divide(call)


def splash(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, mask: Mask, *, interpret: bool = False) -> Array:
    """JAX's blockwise kernel for TPUs (Dao et al. 2022, arXiv 2205.14135); causality spares it half of the blocks.

    ``interpret`` runs it anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    def block(size: int) -> int:
        return next(width for width in (512, 256, 128) if size % width == 0)

    (batch_size, length, _, head_width), memory = q_BLHK.shape, k_BMGK.shape[1]
    queries, keys = block(length), block(memory)
    # One kernel computes the scores once backward rather than twice, and adds up one part of dq for each block of keys.
    fused = memory <= 4 * keys
    sizes = library.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=None if fused else queries,
        block_kv_dq=None if fused else keys,
        use_fused_bwd_kernel=fused,
    )

    def local(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, *numbers: Array) -> Array:
        one = (library.CausalMask if mask.causal else library.FullMask)((length, memory))
        kernel = library.make_splash_mha(
            library.MultiHeadMask([one] * q_BLHK.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=RESIDUALS,
            interpret=interpret,
        )
        heads = [x.swapaxes(1, 2) for x in (q_BLHK * head_width**-0.5, k_BMGK, v_BMGK)]

        def row(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return cast(Array, kernel(q, k, v, library.SegmentIds(*ids) if ids else None))

        return jax.vmap(row)(*heads, *numbers).swapaxes(1, 2)

    numbers = mask.numbers(batch_size, length, memory) if mask.is_numbered else ()
    return _on_each_device(local, len(numbers))(q_BLHK, k_BMGK, v_BMGK, *numbers)


def _on_each_device(local: Callable[..., Array], num_numbers: int) -> Callable[..., Array]:
    heads, kv_heads = (("batch", "length", name, "head_width") for name in ("heads", "kv_heads"))
    return sharding.on_each_device(local, (heads, kv_heads, kv_heads, *[("batch", "length")] * num_numbers), heads)


def _cudnn_supports(call: Call) -> str | None:
    if call.platform not in ("gpu", "cuda") or call.capability < 8:
        return "needs an NVIDIA GPU, Ampere or newer"
    if call.dropout:
        return "its dropout would depend on the mesh"
    if call.numbered:
        return "takes padded and packed rows only as scores that are added, whose gradients are wrong in some versions"
    if call.dtype not in ("bfloat16", "float16"):
        return f"{call.dtype} is not of 16 bits"
    if call.head_width % 8 or call.head_width > 128:
        return f"heads of {call.head_width} are not a multiple of 8 up to 128"
    if call.causal and call.length != call.memory:
        return "causal, but of different lengths"
    return _does_not_divide(call)


def _cudnn(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, mask: Mask) -> Array:
    def local(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array) -> Array:
        return jax.nn.dot_product_attention(q_BLHK, k_BMGK, v_BMGK, is_causal=mask.causal, implementation="cudnn")

    return _on_each_device(local, 0)(q_BLHK, k_BMGK, v_BMGK)


def _chunked_supports(call: Call) -> str | None:
    if call.platform == "cpu":
        return "saves memory, not time, and a CPU has memory"
    if call.dropout:
        return NO_DROPOUT
    if call.memory <= 2 * CHUNK:
        return f"{call.memory} keys are few enough to be taken at once"
    if call.memory % CHUNK:
        return f"{call.memory} keys are not a multiple of {CHUNK}"
    return None


def chunked(q_BLHK: Array, k_BMGK: Array, v_BMGK: Array, mask: Mask, *, size: int = CHUNK) -> Array:
    """XLA's products over ``size`` keys at a time, with a softmax that is corrected as it goes.

    Memory for scores is L x ``size`` forward and backward (Rabe and Staats 2021, arXiv 2112.05682).
    """
    (batch_size, length, num_heads, head_width), (memory, num_kv) = q_BLHK.shape, k_BMGK.shape[1:3]
    q = (q_BLHK * head_width**-0.5).reshape(batch_size, length, num_kv, num_heads // num_kv, head_width)
    queries_BL, keys_BM = mask.numbers(batch_size, length, memory)

    def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], None]:
        mixed, highest, total = carry
        k, v, keys_BC, place_C = chunk
        scores = jnp.einsum("BLGSK,BCGK->BGSLC", q, k, preferred_element_type=jnp.float32)
        seen = queries_BL[:, None, None, :, None] == keys_BC[:, None, None, None, :]
        if mask.causal:
            seen &= place_C <= jnp.arange(length)[:, None]
        scores = jnp.where(seen, scores, _LOWEST)
        new = jnp.maximum(highest, jnp.max(scores, axis=-1))
        probs, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        added = jnp.einsum("BGSLC,BCGK->BGSLK", probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed * kept[..., None] + added, new, total * kept + jnp.sum(probs, axis=-1)), None

    def cut(x: Array) -> Array:
        return x.reshape(batch_size, memory // size, size, *x.shape[2:]).swapaxes(0, 1)

    shape = (batch_size, num_kv, num_heads // num_kv, length)
    start = jnp.zeros((*shape, head_width)), jnp.full(shape, _LOWEST), jnp.zeros(shape)
    chunks = cut(k_BMGK), cut(v_BMGK), cut(keys_BM), jnp.arange(memory).reshape(-1, size)
    (mixed, _, total), _ = jax.lax.scan(jax.checkpoint(add), start, chunks)
    mixed = (mixed / total[..., None]).astype(q_BLHK.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


KERNELS = (
    Kernel("splash", _splash_supports, splash),
    Kernel("cuDNN", _cudnn_supports, _cudnn),
    Kernel("chunked XLA", _chunked_supports, chunked),
)
"""The ablest first; the plain way comes after them."""
