"""Loss and answers on held-out samples during training."""
