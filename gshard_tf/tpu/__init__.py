"""`tf.distribute.TPUStrategy` for a mesh: weights are sharded over its cores."""
