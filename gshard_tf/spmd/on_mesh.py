"""What strategies whose variables lie on a mesh tell of themselves."""

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.sharding.layout_report import Description, describe
from gshard_tf.sharding.rules import AxisRules


class OnMesh:
    """A mixin for a `tf.distribute.Strategy`.

    Its `extended` has `mesh`, `layouts`, and `ours`, the variable itself for a
    variable of its own.
    """

    @property
    def mesh(self) -> dtensor.Mesh:
        """The devices of one replica."""
        return self.extended.mesh

    @property
    def rules(self) -> AxisRules:
        return self.extended.layouts.rules

    def layout(self, variable: tf.Variable | keras.Variable) -> dtensor.Layout:
        """The layout in which a variable of this strategy is stored."""
        return self.extended.layouts.of(self.extended.ours(variable)).layout

    def describe(self, model: keras.Model) -> Description:
        """How each weight and optimizer slot of a built model is stored, and why.

        Returns:
            A `Description`; `print` it for a table.
        """
        return describe(model, self.extended.layouts, self.extended.ours)
