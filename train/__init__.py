"""Loss, Lightning module, TorchRec strategy, checkpoints and evaluation."""
