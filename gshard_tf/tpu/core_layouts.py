"""Layouts that TensorFlow's TPU bridge can store: split over all axes, or whole."""

from tensorflow.experimental import dtensor

from gshard_tf.sharding.sharded_variable import PlacedVariable
from gshard_tf.sharding.variable_layouts import Decision, Layouts


class CoreLayouts(Layouts):
    """`Layouts` in which no shard of a weight is on two cores of a replica.

    The bridge (`TPURewritePass`, TensorFlow 2.20) gives the new value of a variable
    that is split over one mesh axis and copied along another to the first of the
    copies only, and crashes on the rest. So the other axes split such a weight
    too, where a dimension divides, and it is gathered over them where a step uses it;
    where none does, it is stored whole, and cut.
    """

    def of(self, variable: PlacedVariable) -> Decision:
        if variable.decision is None:
            variable.decision = self._without_copies(variable, super().of(variable))
        return variable.decision

    def _without_copies(self, variable: PlacedVariable, decision: Decision) -> Decision:
        specs = list(decision.layout.sharding_specs)
        unused = [a for a in self.mesh.dim_names if a not in specs]
        unused = [axis for axis in unused if self.mesh.dim_size(axis) > 1]
        if not unused or decision.layout.is_fully_replicated():
            return decision
        layout, rule = decision.layout, "; the axes left over split it too"
        for axis in unused:
            layout = self._split(layout, tuple(variable.shape), axis)
            if layout is None:
                layout = dtensor.Layout.replicated(self.mesh, len(specs))
                rule = "; the axes left over do not divide it: whole"
                break
        use = decision.use or decision.layout
        return Decision(
            layout,
            decision.rule + rule,
            use=None if self._used_as_stored(variable) else use,
        )
