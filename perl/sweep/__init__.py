"""Training of a stage with many settings of its adapters, each at its best learning rate, over seeds."""
