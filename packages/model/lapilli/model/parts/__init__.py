"""The parts of a model: vision tower, projector, language model, adapters."""
