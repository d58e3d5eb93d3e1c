"""Compute what a forward pass keeps for backward under a policy, and choose the cheapest policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lapilli.model.config import ActivationPolicy

__all__ = ["ActivationBytes", "LayerBytes", "leanest", "policies"]


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What a layer keeps for backward, in bytes.

    Attributes:
        part: `vision` or `language`.
        kept: What it makes inside.
        input: What goes in, which recomputation keeps in place of all else.
        keeps_input: Whether it keeps that without recomputation too.
        flops: Operations that running it again takes.
    """

    part: str
    kept: int
    input: int
    keeps_input: bool
    flops: int


@dataclass(frozen=True)
class ActivationBytes:
    """What a micro-batch's forward keeps for backward, in bytes, each storage once.

    Attributes:
        outside: Outside of the layers that can run again: projector, merge, norm, head.
        layers: Those layers, in the order of forward.
    """

    outside: int
    layers: tuple[LayerBytes, ...]

    def held(self, policy: ActivationPolicy) -> int:
        """What the device holds when forward ends."""
        return self.outside + sum(
            _held(layer, again, policy) for layer, again in self._marked(policy)
        )

    def peak(self, policy: ActivationPolicy) -> int:
        """Most that the device holds: when forward ends, or while a layer runs again.

        Backward comes to the layers from the last to the first, and frees what they kept.
        """
        held = most = self.outside
        for layer, again in self._marked(policy):
            held += _held(layer, again, policy)
            running = layer.kept + layer.input * policy.offload if again else 0
            most = max(most, held + running)
        return most

    def on_host(self, policy: ActivationPolicy) -> int:
        """What lies in the host's memory when forward ends."""
        return sum(layer.input for layer, again in self._marked(policy) if again * policy.offload)

    def extra_flops(self, policy: ActivationPolicy) -> int:
        """Operations that a policy costs."""
        return sum(layer.flops for layer, again in self._marked(policy) if again)

    def grown(self, second: ActivationBytes, rows: int) -> ActivationBytes:
        """The bytes of `rows` rows, from those of one (self) and of two: rows add up."""

        def line(one: int, two: int) -> int:
            return one + (rows - 1) * (two - one)

        layers = [
            replace(
                first,
                kept=line(first.kept, other.kept),
                input=line(first.input, other.input),
                flops=line(first.flops, other.flops),
            )
            for first, other in zip(self.layers, second.layers, strict=True)
        ]
        return ActivationBytes(line(self.outside, second.outside), tuple(layers))

    def counts(self) -> dict[str, int]:
        """Layers by part."""
        parts = [layer.part for layer in self.layers]
        return {part: parts.count(part) for part in dict.fromkeys(parts)}

    def _marked(self, policy: ActivationPolicy) -> Iterator[tuple[LayerBytes, bool]]:
        """Each layer, and whether it runs again."""
        left = dict(policy.recompute)
        for layer in self.layers:
            left[layer.part] = left.get(layer.part, 0) - 1
            yield layer, left[layer.part] >= 0


def _held(layer: LayerBytes, again: bool, policy: ActivationPolicy) -> int:
    if again:
        return 0 if policy.offload else layer.input
    return layer.kept + layer.input * layer.keeps_input


def policies(activations: ActivationBytes, *, offload: bool) -> Sequence[ActivationPolicy]:
    """Every number of layers of each part, those that cost least operations first.

    Layers of a part are alike, so that the first that fits is the cheapest there is.
    """
    counts = activations.counts()
    found = [
        ActivationPolicy(dict(zip(counts, numbers, strict=True)), offload)
        for numbers in product(*(range(count + 1) for count in counts.values()))
    ]
    return sorted(found, key=activations.extra_flops)


def leanest(activations: ActivationBytes, *, offload: bool) -> ActivationPolicy:
    """The policy of most recomputation: every layer runs again."""
    return ActivationPolicy(activations.counts(), offload)
