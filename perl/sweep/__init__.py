"""A stage trained under many settings of its adapters, each at its best learning rate, over seeds."""
