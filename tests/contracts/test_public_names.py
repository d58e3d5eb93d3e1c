"""A public name, parameter or field changes only on purpose."""

from __future__ import annotations

import difflib

from tests.contracts.public_names import LISTING, listing


def test_public_names_are_as_written_down() -> None:
    written = LISTING.read_text(encoding="utf-8").splitlines()
    now = listing().splitlines()
    difference = "\n".join(difflib.unified_diff(written, now, "written", "now", lineterm="", n=0))
    assert not difference, (
        f"{difference}\nIf this is meant, renew the file: make public-names "
        "(python -m tests.contracts.public_names)"
    )
