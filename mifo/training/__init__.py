"""Learning the instances: the LightningModule of both stages, its data and its optimisers."""
