"""Layouts that TensorFlow's TPU bridge can store: split over all axes, or whole."""

from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import LayoutDecision, VariableLayouts


class CoreLayouts(VariableLayouts):
    """`VariableLayouts` in which no shard of a weight is on two cores of a replica.

    The bridge (`TPURewritePass`, TensorFlow 2.20) gives the new value of a variable
    that is split over one mesh axis and copied along another to the first of the
    copies only, and crashes on the rest. So the other axes split such a weight
    too, where a dimension divides, and it is gathered over them where a step uses it;
    where none does, it is stored whole, and cut.
    """

    def layout_for(self, variable: MeshVariableBase) -> LayoutDecision:
        if variable.decision is None:
            variable.decision = self._without_copies(
                variable, super().layout_for(variable)
            )
        return variable.decision

    def _without_copies(
        self, variable: MeshVariableBase, decision: LayoutDecision
    ) -> LayoutDecision:
        used = decision.storage.axes
        unused = [a for a in self.mesh.dim_names if a not in used]
        unused = [axis for axis in unused if self.mesh.dim_size(axis) > 1]
        if not unused or not used:
            return decision
        layout, reason = decision.storage, "; the axes left over split it too"
        for axis in unused:
            split = self._split(layout, tuple(variable.shape), axis)
            if split is not None:
                layout = split
            else:
                layout = MeshLayout.replicated(self.mesh, len(variable.shape))
                reason = "; the axes left over do not divide it: whole"
                break
        compute = decision.compute or decision.storage
        return LayoutDecision(
            layout,
            decision.reason + reason,
            compute=None if self._computes_as_stored(variable) else compute,
        )
