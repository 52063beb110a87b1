"""Learning the instances: the objective of both stages and the LightningModules around it."""
