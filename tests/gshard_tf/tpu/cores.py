"""What each core of each replica holds of variables, beside what it should."""

import numpy as np
import tensorflow as tf


def parts(variable):
    """(replica, core, what it holds) of a Keras variable of a TPUStrategy."""
    for replica, shards in enumerate(variable.value.values):
        for core, part in enumerate(shards._vars):
            yield replica, core, part


class Cores:
    """The cores of a strategy on the synthetic slice of 2 x 4 chips.

    Args:
        strategy: The strategy.
        variables: Keras variables of its.
    """

    def __init__(self, strategy, variables):
        self.strategy = strategy
        self.variables = variables

    def wrong(self, wanted):
        """Each core that does not hold its part of an array, or lies elsewhere.

        Args:
            wanted: The whole values, an array for each variable.
        """
        found = []
        for variable, whole in zip(self.variables, wanted, strict=True):
            whole = np.asarray(whole)
            if not np.array_equal(np.array(variable.value), whole):
                found.append(f"{variable.path} as it is read")
            seen = set()
            for replica, core, part in parts(variable):
                where = f"{variable.path}: replica {replica}, core {core}"
                if not np.array_equal(part.numpy(), whole[self.place(variable, core)]):
                    found.append(f"{where}: other values")
                if device_of(part) != self.device(replica, core):
                    found.append(f"{where}: on {part.device}")
                seen.add(device_of(part))
            if len(seen) != 8:
                found.append(f"{variable.path} lies on the cores {sorted(seen)}")
        return found

    def place(self, variable, core):
        """Where in the whole the part of a core lies: as its layout says."""
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
        """Puts other values on every core, past the variables themselves."""
        for variable in self.variables:
            for _, _, part in parts(variable):
                part.assign(tf.cast(tf.fill(part.shape, 77), part.dtype))


def device_of(part):
    """The number of the virtual CPU device that stands for a core."""
    return tf.DeviceSpec.from_string(part.device).device_index
