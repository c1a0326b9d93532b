"""One forward and backward of the MoE layer, of its matmuls alone, and of its parts.

Each side is a function without arguments that returns when its work is done, made for
one runtime: TensorFlow's jit, TensorFlow op by op, a program of `SpmdStrategy` with
one partition (jaxlib), and torch where it is installed.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from gshard_tf.spmd.program import SpmdProgram
from keras_layers import (
    FeedForward,
    IndexDispatcher,
    MoELayer,
    TokenChoiceRouting,
    expert_capacity,
    replay_routing,
)

Side = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an MoE step; letters as everywhere (E, M, H, G, S)."""

    experts: int = 32
    model_dim: int = 512
    hidden_dim: int = 2048
    groups: int = 4
    group_size: int = 1024
    capacity_factor: float = 2.0

    @property
    def tokens(self) -> int:
        return self.groups * self.group_size

    @property
    def capacity(self) -> int:
        return expert_capacity(self.group_size, self.experts, self.capacity_factor)

    @property
    def rows(self) -> int:
        """Rows that one expert computes: `G * C`."""
        return self.groups * self.capacity

    @property
    def matmul_flops(self) -> int:
        """FLOPs of the experts' six matmuls: two forward, four backward."""
        return 12 * self.experts * self.rows * self.model_dim * self.hidden_dim


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return values * np.float32(scale)


def tokens_and_gradients(shape: Shape) -> list[np.ndarray]:
    """The tokens, and the gradient that comes back: both `[G, S, M]`."""
    size = (shape.groups, shape.group_size, shape.model_dim)
    return [normal(0, *size), normal(1, *size)]


# ------------------------------------------------------------------- the functions


def layer_step(shape: Shape, **options: Any) -> tuple[MoELayer, Callable]:
    """The layer, built, and its forward and backward with all gradients."""
    options.setdefault("router", {"capacity_factor": shape.capacity_factor})
    layer = MoELayer(shape.experts, shape.hidden_dim, seed=0, **options)
    layer.build((shape.groups, shape.group_size, shape.model_dim))

    def step(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            aux = tf.add_n(layer.losses)
        weights = [weight.value for weight in layer.trainable_variables]
        gradients = tape.gradient([y, aux], [x, *weights], [dy, tf.ones([])])
        return [y, aux, *gradients]

    return layer, step


def forced_routing(shape: Shape, skewed: bool) -> TokenChoiceRouting:
    """Two experts for each token, without a router.

    Args:
        shape: The sizes.
        skewed: Whether a tenth of the experts (one at least) get half of the choices,
            all first ones; the others share the rest evenly. Else all have as many.
    """
    token = np.arange(shape.tokens)
    hot = max(1, shape.experts // 10) if skewed else shape.experts // 2
    expert = np.stack([token % hot, hot + token % (shape.experts - hot)], axis=-1)
    # As tokens come: in no order.
    expert = np.random.default_rng(7).permutation(expert)
    expert = expert.reshape(shape.groups, shape.group_size, 2).astype(np.int32)
    return TokenChoiceRouting(
        expert_index=tf.constant(expert),
        # Not read by dropless dispatch.
        slot=tf.zeros(expert.shape, tf.int32),
        weight=tf.fill(expert.shape, 0.5),
        dispatched=tf.ones(expert.shape, tf.bool),
        num_experts=shape.experts,
        capacity=shape.group_size,
    )


def dropless_side(shape: Shape, skewed: bool) -> Side:
    """Forward and backward of dropless dispatch and experts, under TensorFlow's jit."""
    layer = MoELayer(shape.experts, shape.hidden_dim, dispatcher="dropless", seed=0)
    layer.build((shape.groups, shape.group_size, shape.model_dim))
    routing = forced_routing(shape, skewed)

    def step(x: tf.Tensor, dy: tf.Tensor, *decision: tf.Tensor) -> list[tf.Tensor]:
        given = TokenChoiceRouting(*decision, *routing[4:])
        with tf.GradientTape() as tape, replay_routing({layer.name: [given]}):
            tape.watch(x)
            y = layer(x)
        weights = [layer.experts.wi.value, layer.experts.wo.value]
        return [y, *tape.gradient(y, [x, *weights], dy)]

    arguments = [*tokens_and_gradients(shape), *routing[:4]]
    return in_tensorflow(step, arguments, jit=True)


def decoding_side(shape: Shape, dispatcher: str, tokens: int = 32) -> Side:
    """Tokens one after the other, each a batch of its own, under TensorFlow's jit.

    Args:
        shape: The sizes; tokens choose two experts.
        dispatcher: Of `MoELayer`.
        tokens: Their number.
    """
    layer = MoELayer(
        shape.experts,
        shape.hidden_dim,
        router={"kind": "top_k", "k": 2},
        dispatcher=dispatcher,
        seed=0,
    )
    step = _one_token(layer, shape, decoding=True)
    return _token_by_token([step], shape, tokens)


def dense_decoding_side(shape: Shape, layers: int, tokens: int = 32) -> Side:
    """The same through dense layers of as many FLOPs, twice as wide.

    Args:
        shape: The sizes.
        layers: Their number. Tokens go through them in turn. The weights of one stay in
            a large cache, as they do not in a model of many layers.
        tokens: Their number.
    """
    steps = [
        _one_token(FeedForward(2 * shape.hidden_dim, seed=i), shape)
        for i in range(layers)
    ]
    return _token_by_token(steps, shape, tokens)


def _one_token(layer: Any, shape: Shape, **options: Any) -> Callable:
    layer.build((1, 1, shape.model_dim))
    return tf.function(lambda x: layer(x, **options), jit_compile=True, autograph=False)


def _token_by_token(steps: Sequence[Callable], shape: Shape, tokens: int) -> Side:
    inputs = [tf.constant(normal(i, 1, 1, shape.model_dim)) for i in range(tokens)]
    return lambda: [steps[i % len(steps)](x) for i, x in enumerate(inputs)]


def matmul_step(
    x: tf.Tensor, dy: tf.Tensor, wi: tf.Tensor, wo: tf.Tensor
) -> list[tf.Tensor]:
    """The experts alone: x and dy `[E, G*C, M]`, two products and their gradients."""
    with tf.GradientTape() as tape:
        tape.watch([x, wi, wo])
        y = tf.matmul(tf.nn.relu(tf.matmul(x, wi)), wo)
    return [y, *tape.gradient(y, [x, wi, wo], dy)]


def matmul_arguments(shape: Shape) -> list[np.ndarray]:
    rows = (shape.experts, shape.rows, shape.model_dim)
    wi = (shape.experts, shape.model_dim, shape.hidden_dim)
    wo = (shape.experts, shape.hidden_dim, shape.model_dim)
    return [
        normal(2, *rows),
        normal(3, *rows),
        normal(4, *wi, scale=shape.model_dim**-0.5),
        normal(5, *wo, scale=shape.hidden_dim**-0.5),
    ]


def part_steps(shape: Shape) -> dict[str, tuple[Callable, list[Any]]]:
    """Forward and backward of each part alone, and its arguments."""
    layer, _ = layer_step(shape)
    x, dy = map(tf.constant, tokens_and_gradients(shape))
    routing, report = layer.router(x, training=True)
    dispatcher = IndexDispatcher()
    buffers, d_buffers = map(
        tf.constant,
        [
            normal(6 + i, shape.experts, shape.groups, shape.capacity, shape.model_dim)
            for i in range(2)
        ],
    )
    decision = [routing.expert_index, routing.slot, routing.weight, routing.dispatched]

    def given(tensors: Sequence[tf.Tensor]) -> TokenChoiceRouting:
        return TokenChoiceRouting(*tensors, routing.num_experts, routing.capacity)

    def router(x: tf.Tensor) -> list[tf.Tensor]:
        kernel = layer.router.kernel.value
        with tf.GradientTape() as tape:
            tape.watch(x)
            routing, report = layer.router(x, training=True)
        # Something comes back through every weight.
        flow = [tf.ones_like(routing.weight), tf.ones([])]
        gradients = tape.gradient([routing.weight, report.aux_loss], [x, kernel], flow)
        return [*routing[:4], report.aux_loss, *gradients]

    def dispatch(x: tf.Tensor, flow: tf.Tensor, *decision: tf.Tensor) -> list:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = dispatcher.dispatch(x, given(decision))
        return [y, tape.gradient(y, x, flow)]

    def combine(x: tf.Tensor, flow: tf.Tensor, *decision: tf.Tensor) -> list:
        weight = decision[2]
        with tf.GradientTape() as tape:
            tape.watch([x, weight])
            y = dispatcher.combine(x, given(decision))
        return [y, *tape.gradient(y, [x, weight], flow)]

    def metrics(*decision: tf.Tensor) -> list[tf.Tensor]:
        layer.health.update_state(given(decision), None, report)
        return []

    return {
        "router": (router, [x]),
        "dispatch": (dispatch, [x, d_buffers, *decision]),
        "combine": (combine, [buffers, dy, *decision]),
        "metrics": (metrics, decision),
    }


# -------------------------------------------------------------------- the runtimes


def in_tensorflow(fn: Callable, arguments: Sequence[Any], jit: bool) -> Side:
    """`fn` under `tf.function`."""
    compiled = tf.function(fn, jit_compile=jit, autograph=False)
    tensors = [tf.constant(x) for x in arguments]

    def run() -> Any:
        outputs = compiled(*tensors)
        # On a CPU the call itself computes; other devices are waited for.
        if tf.config.list_physical_devices("GPU"):
            tf.test.experimental.sync_devices()
        return outputs

    return run


def program_of(
    strategy: gshard_tf.SpmdStrategy, fn: Callable, arguments: Sequence[Any]
) -> tuple[SpmdProgram, Callable]:
    """The program of `fn`, and what keeps it alive: the strategy holds it weakly."""
    traced = tf.function(fn, autograph=False)
    strategy.run(traced, tuple(arguments))
    return strategy.programs[-1], traced


def in_program(
    strategy: gshard_tf.SpmdStrategy, fn: Callable, arguments: Sequence[Any]
) -> Side:
    """`fn` as a program of `strategy`, with its state and arguments on the device.

    Timed is the program alone: what a step of `fit` adds is measured by
    `benchmarks.strategy`.
    """
    program, _ = program_of(strategy, fn, arguments)
    inputs = program.put_inputs([np.asarray(x) for x in arguments])
    captures = [
        strategy.extended.placement.put(np.asarray(value.numpy()), layout)
        for value, layout in zip(
            program.step.captures, program.layouts.captures, strict=True
        )
    ]

    def run() -> Any:
        outputs, updated = program(inputs, captures)
        for i, value in zip(program.step.updates, updated, strict=True):
            captures[i] = value
        program.wait([*outputs, *updated])
        return outputs

    return run


def matmuls_in_torch(shape: Shape) -> Side:
    """The same six products in torch."""
    import torch

    x, dy, wi, wo = (torch.from_numpy(a) for a in matmul_arguments(shape))

    def run() -> Any:
        hidden = torch.relu(torch.bmm(x, wi))
        y = torch.bmm(hidden, wo)
        d_hidden = torch.bmm(dy, wo.transpose(1, 2))
        d_hidden = torch.where(hidden > 0, d_hidden, 0.0)
        return [
            y,
            torch.bmm(d_hidden, wi.transpose(1, 2)),
            torch.bmm(x.transpose(1, 2), d_hidden),
            torch.bmm(hidden.transpose(1, 2), dy),
        ]

    return run


def torch_installed() -> bool:
    return importlib.util.find_spec("torch") is not None


def one_partition() -> gshard_tf.SpmdStrategy:
    return gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 1}))


def layer_side(shape: Shape, runtime: str, **options: Any) -> Side:
    """The layer in a runtime: "jit", "ops" or "program"."""
    keras.utils.set_random_seed(0)
    arguments = tokens_and_gradients(shape)
    if runtime == "program":
        strategy = one_partition()
        with strategy.scope():
            _, step = layer_step(shape, **options)
            return in_program(strategy, step, arguments)
    _, step = layer_step(shape, **options)
    return in_tensorflow(step, arguments, jit=runtime == "jit")


def matmul_side(shape: Shape, runtime: str) -> Side:
    """The matmuls in a runtime: "jit", "ops", "program" or "torch"."""
    if runtime == "torch":
        return matmuls_in_torch(shape)
    arguments = matmul_arguments(shape)
    if runtime == "program":
        strategy = one_partition()
        with strategy.scope():
            return in_program(strategy, matmul_step, arguments)
    return in_tensorflow(matmul_step, arguments, jit=runtime == "jit")
