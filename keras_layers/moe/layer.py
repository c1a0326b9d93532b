"""The mixture-of-experts layer: routes, dispatches, transforms and combines."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import keras
import tensorflow as tf

from gshard_tf import active_mesh, annotate, name_axes
from keras_layers._arguments import check_choice, check_coefficient, check_int
from keras_layers._padding import zero_padding
from keras_layers._seeds import child_initializer, child_seed
from keras_layers._shapes import at_each_position
from keras_layers.feed_forward import FeedForward
from keras_layers.moe.conventions import arguments_as_in
from keras_layers.moe.decoding_experts import apply_without_drops
from keras_layers.moe.dispatch import Dispatcher, EinsumDispatcher, IndexDispatcher
from keras_layers.moe.dropless_dispatch import apply_dropless, check_router
from keras_layers.moe.experts import Experts
from keras_layers.moe.grouping import Packing, from_groups, ids_to_groups, to_groups
from keras_layers.moe.metrics import DEFAULT_METRICS, RouterMetrics
from keras_layers.routing import ROUTERS
from keras_layers.routing.capacity import DROPLESS
from keras_layers.routing.custom_router import register_user, serialize_router, stats_of
from keras_layers.routing.recording import next_recorded, record
from keras_layers.routing.routing import Routing, TokenChoiceRouting

_DISPATCHERS: dict[str, type[Dispatcher]] = {
    "index": IndexDispatcher,
    "einsum": EinsumDispatcher,
}


@keras.saving.register_keras_serializable(package="gshard_tf")
class MoELayer(keras.layers.Layer):
    """Position-wise mixture of experts (the paper, section 2.1), in place of an FFN.

    Inputs `[..., L, M]` are routed in groups, each by itself, to experts that exist
    once for all groups. A token that no expert had room for comes out as 0, so put
    the layer in a residual branch: `x + moe(x)`.

    Args:
        num_experts: E, at least 2. A multiple of the number of devices, so that
            each holds as many; the paper uses one expert per device.
        hidden_dim: H of each expert.
        router: None for `Top2Router(num_experts)` with its defaults; a dict of
            arguments for it (`{"capacity_factor": 1.25}`), or for another one
            (`{"kind": "top_k", "k": 4}`; kinds are "top2", "top_k", "expert_choice"
            and "hash"); the name of a kind, for its defaults; or a router layer.
        dispatcher: "index" moves tokens by gathers; "einsum" by products with one-hot
            tensors as in the paper, which costs more time and memory for the same
            values. "dropless" (MegaBlocks, arXiv 2211.15841) sorts tokens by expert,
            and an expert computes those that it gets: none is dropped and no slot is
            empty. The router's capacity factor is "dropless" then, which is the default
            of a router that is made here. On a mesh, a device has room for all tokens
            of all devices that share the experts: memory that "index" does not need.
        group_size: S. None: each row of the batch, `[L, M]`, is a group, so nothing is
            reshaped and groups are split as the batch is. An int: all tokens
            form one row, cut into groups of this many, the last one filled up with
            padding. Capacity is shared within a group: larger groups drop fewer tokens
            at the same capacity factor, but choose it so that there are at least as
            many groups as devices. With "einsum" cost grows with it (S / H of the
            experts' FLOPs).
        pack_groups: Whether, with a `group_size` and a mask, the real tokens of the
            batch are packed before they are cut into groups. Padding then changes
            nothing at all. Without, padding is part of the groups, and the tokens that
            share capacity depend on it. With it, on a mesh, each device gathers the
            tokens of the whole batch, there and back.
        aux_loss_coef: Coefficient of the router's balancing loss, which is added to
            the model's losses during training only. The paper does not give
            its value; 0.01 with the router's default scale, which is 1 at perfect
            balance whatever E, is what lingvo and Mesh TensorFlow train with. 0 to
            turn it off.
        z_loss_coef: The same for the mean square of the log of the logits' summed
            exponentials (ST-MoE, arXiv 2202.08906: 0.001), which keeps logits small
            where mixed precision makes training unstable.
        activation: Of the experts' hidden layer.
        dropout: Rate on the experts' hidden layer, during training.
        kernel_initializer: Of the experts' weights; fans are counted within one expert.
        gated: Whether experts are gated (`Experts`): "silu" and this are Mixtral's.
        num_shared_experts: Experts that every token passes through besides those it is
            routed to (DeepSeekMoE, arXiv 2401.06066), as one feed-forward layer
            that many times as wide. They stay on every device.
        shared_expert_gate: Whether a token's output of the shared experts is scaled by
            the sigmoid of its product with a learned vector (Qwen2-MoE).
        router_metrics: Names of the router's metrics to report: "all" or some of
            `RouterMetrics.NAMES`.
        metrics_per_expert: Whether to report the load of each expert too.
        decoding_group_size: Tokens of batch and beam that are routed together while
            decoding (see `call`). 1: nothing can be dropped, and every expert has a
            slot for every token, E / 2 times what is needed. More: as many slots as
            the router's evaluation capacity says, and what does not fit is dropped.
        seed: Source of the seeds of experts and shared experts, and of the router
            unless it is a layer or has its own. None: the global seed.

    Metrics of the router appear in `fit`'s logs under the layer's name: see
    `RouterMetrics`. `record_routing` and `replay_routing` read and set the routing.

    Raises:
        ValueError: for an argument out of its range, a router made for another number
            of experts, or inputs that do not fit `group_size`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        router: keras.layers.Layer | Mapping[str, Any] | str | None = None,
        dispatcher: str = "index",
        group_size: int | None = None,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        activation: Any = "relu",
        dropout: float = 0.0,
        kernel_initializer: Any = "lecun_uniform",
        gated: bool = False,
        num_shared_experts: int = 0,
        router_metrics: str | Sequence[str] = DEFAULT_METRICS,
        metrics_per_expert: bool = False,
        decoding_group_size: int = 1,
        seed: int | None = None,
        pack_groups: bool = False,
        shared_expert_gate: bool = False,
        **kwargs: Any,
    ):
        num_experts = check_int("num_experts", num_experts, 2)
        hidden_dim = check_int("hidden_dim", hidden_dim, 1)
        check_choice("dispatcher", dispatcher, (*_DISPATCHERS, DROPLESS))
        if group_size is not None:
            group_size = check_int("group_size", group_size, 1)
        elif pack_groups:
            raise ValueError(
                "pack_groups needs a group_size: without, each row of the batch is a "
                "group, and padding changes nothing. Received: "
                f"pack_groups={pack_groups}, group_size=None"
            )
        decoding_group_size = check_int("decoding_group_size", decoding_group_size, 1)
        aux_loss_coef = check_coefficient("aux_loss_coef", aux_loss_coef)
        z_loss_coef = check_coefficient("z_loss_coef", z_loss_coef)
        num_shared_experts = check_int("num_shared_experts", num_shared_experts, 0)
        if shared_expert_gate and not num_shared_experts:
            raise ValueError(
                "shared_expert_gate needs shared experts. Received: "
                f"shared_expert_gate={shared_expert_gate}, num_shared_experts=0"
            )
        super().__init__(**kwargs)
        if router is None:
            router = {}
        if isinstance(router, str):
            router = {"kind": router}
        if isinstance(router, Mapping):
            arguments = dict(router)
            kind = arguments.pop("kind", "top2")
            check_choice("router kind", kind, tuple(ROUTERS))
            if dispatcher == DROPLESS:
                arguments.setdefault("capacity_factor", DROPLESS)
            chosen = ROUTERS[kind].seed_is_a_choice
            own_seed = seed if chosen else child_seed(seed, "router")
            router = ROUTERS[kind](num_experts, **{"seed": own_seed, **arguments})
        if getattr(router, "num_experts", None) != num_experts:
            raise ValueError(
                f"The router must be for num_experts={num_experts}. Received: "
                f"router={router!r} for {getattr(router, 'num_experts', None)}"
            )
        if dispatcher == DROPLESS:
            check_router(router)
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.router = router
        self.dispatcher = dispatcher
        self.group_size = group_size
        self.pack_groups = bool(pack_groups)
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.num_shared_experts = num_shared_experts
        self.shared_expert_gate = bool(shared_expert_gate)
        self.router_metrics = router_metrics
        self.metrics_per_expert = metrics_per_expert
        self.decoding_group_size = decoding_group_size
        self.seed = seed
        shared_arguments = {
            "activation": activation,
            "dropout": dropout,
            "kernel_initializer": kernel_initializer,
            "gated": gated,
            "dtype": self.dtype_policy,
        }
        self.experts = Experts(
            num_experts,
            hidden_dim,
            seed=child_seed(seed, "experts"),
            name="experts",
            **shared_arguments,
        )
        self.shared_experts = None
        if num_shared_experts:
            self.shared_experts = FeedForward(
                num_shared_experts * hidden_dim,
                seed=child_seed(seed, "shared_experts"),
                name="shared_experts",
                **shared_arguments,
            )
        self.health = RouterMetrics(
            num_experts,
            metrics_per_expert,
            router_metrics,
            name=self.name,
            # A custom router need not have it.
            masked_experts=getattr(router, "masked_experts", ()),
        )
        # Fields of the router's stats that are in use.
        self._needed_stats = [*self.health.sums, *(["z_loss"] if z_loss_coef else [])]
        register_user(router, self)
        self.supports_masking = True
        self._warned = False

    @classmethod
    def as_in(
        cls, convention: str, num_experts: int, hidden_dim: int, **kwargs: Any
    ) -> "MoELayer":
        """A dropless layer like those of a published model.

        Its outputs and gradients are those of the model's block in Hugging Face
        transformers, whose weights `assign_transformers_weights` brings in.

        Args:
            convention: "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2" or
                "deepseek_v3".
            num_experts: E.
            hidden_dim: H of each expert (`moe_intermediate_size`).
            **kwargs: Arguments that go before the convention's; those of a `router`
                dict, one by one: `router={"k": 6}`.
        """
        return cls(num_experts, hidden_dim, **arguments_as_in(convention, kwargs))

    def build(self, input_shape: Any) -> None:
        model_dim = input_shape[-1]
        if model_dim is None:
            raise ValueError(
                f"The last dimension of the inputs must be known. "
                f"Received: input_shape={input_shape}"
            )
        least = 2 if self.group_size else 3
        if len(input_shape) < least:
            raise ValueError(
                f"Inputs must have {least} dimensions or more with "
                f"group_size={self.group_size}: [batch, length, width], or "
                "[tokens, width] with a group size. "
                f"Received: input_shape={input_shape}"
            )
        known = None not in input_shape
        if self.group_size and known and math.prod(input_shape[:-1]) < self.group_size:
            raise ValueError(
                "Inputs must have at least group_size tokens. Received: "
                f"group_size={self.group_size}, input_shape={input_shape}"
            )
        # A router that was given, or loaded, may have been built before.
        if not self.router.built:
            self.router.build((None, None, model_dim))
        self.experts.build((self.num_experts, None, None, model_dim))
        if self.shared_experts is not None:
            self.shared_experts.build((None, None, model_dim))
        if self.shared_expert_gate:
            self.shared_gate = self.add_weight(
                name="shared_gate",
                shape=(model_dim, 1),
                initializer=child_initializer(
                    self.experts.kernel_initializer, "shared_gate"
                ),
            )
            name_axes(self.shared_gate, ("embed", None))

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
        decoding: bool = False,
        token_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Routes, transforms and combines `inputs` `[..., L, M]`.

        Args:
            inputs: The tokens, of any dtype, which is cast to the layer's.
            mask: `[..., L]` bool, False for padding: it takes no slot and makes no
                room, counts in no loss and no metric, and comes out as 0. Its values,
                NaN too, affect nothing.
            training: Whether to route at random, drop out and add the balancing loss.
            decoding: True while generating, for source and target: groups are of
                `decoding_group_size` tokens, by default each by itself, so that none
                can be dropped and none affects another; neither metrics nor losses
                are touched.
            token_ids: `[..., L]` ints, for a router that needs them (`HashRouter`).
        """
        if decoding:
            training = False
        inputs = tf.cast(inputs, self.compute_dtype)
        packing = None
        if self.group_size and not self.pack_groups and mask is not None:
            self._warn_of_padding()
        if self.pack_groups and mask is not None and not decoding:
            packing = Packing(mask)
            inputs, mask = packing.pack(inputs), packing.pack(mask)
            if token_ids is not None:
                token_ids = packing.pack(token_ids)
        size = self.decoding_group_size if decoding else self.group_size
        tokens, token_mask = to_groups(inputs, mask, size)
        tokens = annotate(tokens, ("group", None, "embed"))  # [G, S, M]
        tokens = zero_padding(tokens, token_mask)
        routing, stats = next_recorded(self.name), None
        if routing is None:
            extra = {}
            if getattr(self.router, "uses_token_ids", False):
                extra["token_ids"] = ids_to_groups(token_ids, tokens)
            returned = self.router(tokens, mask=token_mask, training=training, **extra)
            routing, stats = stats_of(self.router, returned, self._needed_stats)
        record(self.name, routing)
        outputs = self._outputs_of_experts(tokens, routing, training, decoding)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens, training=training)
            if self.shared_expert_gate:
                gate = at_each_position(tokens, self.shared_gate)  # [G, S, 1]
                shared = shared * tf.sigmoid(gate)
            outputs = outputs + zero_padding(shared, token_mask)
        if not decoding:
            self.health.count(self.path, training, routing, token_mask, stats)
        if training and stats is not None:
            if self.aux_loss_coef:
                self.add_loss(self.aux_loss_coef * stats.aux_loss)
            if self.z_loss_coef:
                self.add_loss(self.z_loss_coef * stats.z_loss)
        outputs = from_groups(outputs, inputs, size)
        return outputs if packing is None else packing.unpack(outputs)

    def _outputs_of_experts(
        self, tokens: tf.Tensor, routing: Routing, training: bool | None, decoding: bool
    ) -> tf.Tensor:
        """Dispatches tokens `[G, S, M]`, transforms and combines: `[G, S, M]`."""
        if self.dispatcher == DROPLESS:
            return apply_dropless(tokens, routing, self.experts, training)
        dispatcher = _DISPATCHERS[self.dispatcher]()
        if decoding and self._may_regroup(routing):
            return apply_without_drops(tokens, routing, self.experts, dispatcher)
        buffers = dispatcher.dispatch(tokens, routing)  # [E, G, C, M]
        buffers = self.experts(buffers, training=training)
        return dispatcher.combine(buffers, routing)  # [G, S, M]

    def _may_regroup(self, routing: Routing) -> TypeGuard[TokenChoiceRouting]:
        """Returns whether tokens routed one by one may share the slots of one group.

        Not on a mesh, where groups of one are split as the batch is: a single group
        would be on one device.
        """
        return (
            self.decoding_group_size == 1
            and isinstance(routing, TokenChoiceRouting)
            and active_mesh() is None
        )

    def _warn_of_padding(self) -> None:
        """Warns once that padding affects the groups."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path}: with group_size={self.group_size}, padding decides "
                "where a group ends, and so which tokens share its capacity. Leave out "
                "group_size, or pass pack_groups=True, for results that do not depend "
                "on padding.",
                stacklevel=2,
            )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        experts = self.experts.get_config()
        config.update(
            num_experts=self.num_experts,
            hidden_dim=self.hidden_dim,
            router=serialize_router(self.router),
            dispatcher=self.dispatcher,
            group_size=self.group_size,
            pack_groups=self.pack_groups,
            aux_loss_coef=self.aux_loss_coef,
            z_loss_coef=self.z_loss_coef,
            activation=experts["activation"],
            dropout=experts["dropout"],
            kernel_initializer=experts["kernel_initializer"],
            gated=experts["gated"],
            num_shared_experts=self.num_shared_experts,
            shared_expert_gate=self.shared_expert_gate,
            router_metrics=self.router_metrics,
            metrics_per_expert=self.metrics_per_expert,
            decoding_group_size=self.decoding_group_size,
            seed=self.seed,
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MoELayer":
        config = dict(config)
        router = config.get("router")
        if isinstance(router, Mapping) and "class_name" in router:
            config["router"] = keras.saving.deserialize_keras_object(router)
        return cls(**config)
