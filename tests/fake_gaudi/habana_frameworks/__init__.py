"""Gaudi's bridge on a CPU (`tests/fake_gaudi/README.md`)."""

CALLS: list[str] = []  # in their order
