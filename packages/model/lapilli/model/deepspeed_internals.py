"""What DeepSpeed's ZeRO stage 3 leaves on a parameter that it has shared out among the ranks.

Nothing of DeepSpeed is imported. `tests/contracts/test_private_internals.py` looks whether the
installed version sets these attributes. No public function tells whether a parameter is whole.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_shared_out", "shape_of"]


def is_shared_out(value: Tensor) -> bool:
    """Whether ZeRO-3 has shared a tensor out.

    Used: `ds_id`. If it were renamed, parameters would be taken for whole and found empty; the
        contract test fails first.
    """
    return hasattr(value, "ds_id")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has shared it out and it is empty here.

    Used: `ds_shape`. If it were renamed, shapes would be `(0,)`; the contract test tells before.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
