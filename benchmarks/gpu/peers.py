"""MoE blocks of others for `benchmarks.gpu.measure`: jax and torch, no TensorFlow.

Each maker takes the shape and the type of the tokens, and returns a function that
computes output and all gradients and returns when they are there.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

Side = Callable[[], object]
Make = Callable[[Mapping[str, Any], str], Side]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One block to compare with.

    Attributes:
        make: Makes a side.
        packages: Distributions that it needs.
        work: What it does otherwise than ours.
    """

    make: Make
    packages: tuple[str, ...]
    work: str

    def missing(self) -> list[str]:
        """Returns the packages that are not installed."""
        absent = []
        for name in self.packages:
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                absent.append(name)
        return absent


def jax_ragged(shape: Mapping[str, Any], dtype: str) -> Side:
    """Top-2 without capacity: tokens sorted by expert, `jax.lax.ragged_dot`."""
    import jax
    import jax.numpy as jnp

    model_dim, hidden_dim = shape["model_dim"], shape["hidden_dim"]
    experts, kind = shape["experts"], jnp.dtype(dtype)
    key = jax.random.key(0)

    def normal(*dims: int, scale: float = 1.0) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, dims, kind) * jnp.asarray(scale, kind)

    x = normal(shape["tokens"], model_dim)
    dy = normal(shape["tokens"], model_dim)
    weights = (
        normal(model_dim, experts, scale=model_dim**-0.5),
        normal(experts, model_dim, hidden_dim, scale=model_dim**-0.5),
        normal(experts, hidden_dim, model_dim, scale=hidden_dim**-0.5),
    )

    def layer(x: jax.Array, weights: Any) -> jax.Array:
        router, wi, wo = weights
        gates = jax.nn.softmax((x @ router).astype(jnp.float32))
        best, chosen = jax.lax.top_k(gates, 2)  # [T, 2]
        best = (best / best.sum(-1, keepdims=True)).reshape(-1)
        order = jnp.argsort(chosen.reshape(-1))
        counts = jnp.bincount(chosen.reshape(-1), length=experts)
        rows = x[order // 2]  # [2 T, M], by expert
        hidden = jax.nn.relu(jax.lax.ragged_dot(rows, wi, counts))
        out = jax.lax.ragged_dot(hidden, wo, counts)
        out = out * best[order].astype(kind)[:, None]
        return jnp.zeros_like(x).at[order // 2].add(out)

    @jax.jit
    def step(x: jax.Array, weights: Any, dy: jax.Array) -> Any:
        y, back = jax.vjp(layer, x, weights)
        return y, back(dy)

    return lambda: jax.block_until_ready(step(x, weights, dy))


def torch_mixtral(shape: Mapping[str, Any], dtype: str) -> Side:
    """transformers' Mixtral block: top-2, gated, grouped matmul, no capacity."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape["model_dim"],
        # Gated: three matrices with as many weights as our two.
        intermediate_size=shape["hidden_dim"] * 2 // 3 // 16 * 16,
        num_local_experts=shape["experts"],
        num_experts_per_tok=2,
    )
    config._experts_implementation = "grouped_mm"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": getattr(torch, dtype)}
    block = MixtralSparseMoeBlock(config).to(**options)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=shape["model_dim"] ** -0.5)
    size = (shape["groups"], shape["group_size"], shape["model_dim"])
    x, dy = (torch.randn(size, **options) for _ in range(2))
    x.requires_grad_(True)

    def run() -> object:
        y = block(x)
        y.backward(dy)
        gradients = [tensor.grad for tensor in (x, *block.parameters())]
        x.grad = None
        block.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return [y, gradients]

    return run


PEERS: dict[str, Peer] = {
    "jax ragged_dot": Peer(
        jax_ragged, ("jax",), "top-2 without capacity, aux loss or metrics"
    ),
    "transformers Mixtral": Peer(
        torch_mixtral,
        ("torch", "transformers"),
        "top-2 without capacity or aux loss; gated, as many weights",
    ),
}
