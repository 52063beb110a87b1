"""The method of the papers, in torch alone: it knows no model, no Hydra, no Lightning and no wandb."""
