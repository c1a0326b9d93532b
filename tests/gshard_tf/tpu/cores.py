"""Values on each core of each replica, compared with the right ones."""

import numpy as np
import tensorflow as tf


def core_variables(variable):
    """(replica, core, its variable) of a Keras variable of a TPUStrategy."""
    for replica, variables in enumerate(variable.value.values):
        for core, core_variable in enumerate(variables._vars):
            yield replica, core, core_variable


class Cores:
    """The cores of a strategy on the synthetic slice of 2 x 4 chips.

    Args:
        strategy: The strategy.
        variables: Keras variables of the strategy.
    """

    def __init__(self, strategy, variables):
        self.strategy = strategy
        self.variables = variables

    def wrong(self, expected):
        """Each core whose shard has other values, or is on another device.

        Args:
            expected: The whole values, an array for each variable.
        """
        errors = []
        for variable, whole in zip(self.variables, expected, strict=True):
            whole = np.asarray(whole)
            if not np.array_equal(np.array(variable.value), whole):
                errors.append(f"{variable.path} as it is read")
            seen = set()
            for replica, core, shard in core_variables(variable):
                where = f"{variable.path}: replica {replica}, core {core}"
                if not np.array_equal(shard.numpy(), whole[self.index(variable, core)]):
                    errors.append(f"{where}: other values")
                if device_of(shard) != self.device(replica, core):
                    errors.append(f"{where}: on {shard.device}")
                seen.add(device_of(shard))
            if len(seen) != 8:
                errors.append(f"{variable.path} is on the cores {sorted(seen)}")
        return errors

    def index(self, variable, core):
        """The slices of a core's shard in the whole, by the layout."""
        mesh = self.strategy.mesh
        place = np.unravel_index(core, mesh.shape())
        at = dict(zip(mesh.dim_names, map(int, place), strict=True))
        specs = self.strategy.layout(variable).sharding_specs
        slices = []
        for n, axis in zip(variable.shape, specs, strict=True):
            size = n // mesh.dim_size(axis) if axis in at else n
            start = size * at.get(axis, 0)
            slices.append(slice(start, start + size))
        return tuple(slices)

    def device(self, replica, core):
        """The number of the core in the slice: along x, then y."""
        x, y, _, _ = self.strategy.device_assignment.core_assignment[replica][core]
        return x + 2 * y

    def spoil(self):
        """Assigns other values on every core, past the variables themselves."""
        for variable in self.variables:
            for _, _, shard in core_variables(variable):
                shard.assign(tf.cast(tf.fill(shard.shape, 77), shard.dtype))


def device_of(core_variable):
    """The number of the virtual CPU device that stands for a core."""
    return tf.DeviceSpec.from_string(core_variable.device).device_index
