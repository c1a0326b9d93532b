"""`tf.distribute.TPUStrategy` for a mesh: weights really split over its cores."""
