"""The environments of other readers: their own transformers, this one's torch, none of our code."""

from __future__ import annotations

import pytest
import torch

from tests.foreign.environments import run_in

pytestmark = [pytest.mark.readers, pytest.mark.timeout(600)]

WHAT = """
import importlib.util, torch, transformers
print(transformers.__version__, torch.__version__, importlib.util.find_spec("lapilli"))
"""


@pytest.mark.parametrize("version", ["4.49", "4.57", "5.0"])
def test_an_overlay_has_its_own_transformers_and_the_torch_of_the_tests(version: str) -> None:
    found, shared, ours = run_in(f"transformers-{version}", "-c", WHAT).split()
    assert found.startswith(version)
    assert shared == torch.__version__
    assert ours == "None"
