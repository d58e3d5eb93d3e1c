"""One optimizer step: batches to the device, forward, backward, update."""
