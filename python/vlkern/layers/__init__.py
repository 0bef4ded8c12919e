"""The parts that models share: attention, MLP, pooling head, initialisation."""
