"""Addresses with passwords are refused without being repeated; others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.addresses import hide_secrets, refuse_secrets
from lapilli.data.io.remote_path import open_output

PLAIN = ["s3://bucket/a@b", "s3://bucket/key=1", "http://host:8080/a@b", "gs://b", "a:b@c", "x@y"]
# what may stand in a password; a space ends an address in a line of text
LETTERS = st.text(
    st.characters(codec="ascii", exclude_categories=["Z", "C"], exclude_characters="'\"")
)


@example("s3", "0/", "")
@given(st.sampled_from(["s3", "https", "GS", "ray"]), LETTERS, LETTERS)
def test_no_password_is_repeated(scheme: str, before: str, after: str) -> None:
    secret = f"{before}hunter2{after}"
    for address in (f"{scheme}://key:{secret}@host/x", f"{scheme}:/key:{secret}@host/x"):
        with pytest.raises(DataError) as raised:
            refuse_secrets("dataset", address)
        assert str(raised.value).startswith("dataset: an address with a user, password or key")
        assert "hunter2" not in str(raised.value)
        assert "hunter2" not in hide_secrets(f"cannot read {address} now")


@pytest.mark.parametrize(
    "address",
    ["s3://hunter2@bucket", "https://h/x?a=1&token=hunter2", "https://h/x?X-Amz-Signature=hunter2"],
)
def test_users_and_signatures_are_secrets_too(address: str) -> None:
    with pytest.raises(DataError):
        refuse_secrets("dataset", address)
    assert "hunter2" not in hide_secrets(address)


@pytest.mark.parametrize("address", PLAIN)
def test_other_addresses_are_left_alone(address: str) -> None:
    refuse_secrets("dataset", address)
    assert hide_secrets(f"see {address}") == f"see {address}"


def test_an_output_and_a_source_refuse_them_for_every_caller() -> None:
    with pytest.raises(DataError, match="an address with a user") as raised:
        open_output("s3://key:hunter2@bucket/x").exists()
    assert "hunter2" not in str(raised.value)
    for name in ("annotations", "images"):
        with pytest.raises(DataError, match=f"sources.{name} of source s: an address with"):
            _source(**{"name": "s", "annotations": "a", name: "s3://key:hunter2@bucket"})


@pytest.mark.parametrize("name", ["annotations", "images"])
def test_the_web_is_no_place_for_sources(name: str) -> None:
    said = f"sources.{name} of source s: 'http://h/x' is on the web; download it"
    with pytest.raises(DataError, match=said):
        _source(**{"name": "s", "annotations": "a", name: "http://h/x"})


def _source(**settings: Any) -> SourceConfig:
    return SourceConfig(**settings)
