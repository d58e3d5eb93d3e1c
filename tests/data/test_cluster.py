"""Ray that does not come up in time: tried once more, then one line; nothing is left running."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from lapilli.data.errors import DataError
from lapilli.data.ray_session import ray_session

# Words of Ray's own sources (_private/node.py, worker.py, services.py).
LATE = [
    Exception("The current node timed out during startup. This could happen because some of the "),
    RuntimeError("Timed out waiting for file /tmp/ray/session/gcs_server_port_1"),
    ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"),
    TimeoutError("Timed out after 30 seconds while waiting for node to startup."),
    RaySystemError("System error: Failed to get the system config from raylet"),
]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let `ray.init` raise these, one a call; what it was called with so far."""

    def prepare(*errors: Exception) -> list[Any]:
        calls: list[Any] = []
        left = list(errors)

        def init(*given: Any, **more: Any) -> None:
            calls.append(given)
            if left:
                raise left.pop(0)

        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        return calls

    return prepare


@pytest.mark.parametrize("late", LATE, ids=lambda error: type(error).__name__)
def test_a_late_ray_is_tried_once_more_and_a_second_time_is_one_line(
    starts: Callable[..., list[Any]], late: Exception
) -> None:
    calls = starts(late)
    said = "^Ray did not come up in time; trying once more"
    with pytest.warns(UserWarning, match=said), ray_session():
        assert calls == [("local",), ("local",)]
    calls = starts(late, late)
    said = r"^Ray did not come up in time on this machine \(.+\); it may be busy: run the same"
    with (
        pytest.warns(UserWarning, match="trying once more"),
        pytest.raises(DataError, match=said),
        ray_session(),
    ):
        pytest.fail("there is no Ray")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/ray"), "/tmp/ray: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"), "/tmp/ray: Permission d"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), "AF_UNIX path length"),
    ],
)
def test_what_time_does_not_mend_is_told_at_once(
    starts: Callable[..., list[Any]], error: Exception, said: str
) -> None:
    calls = starts(error)
    with pytest.raises(DataError, match=f"^Ray cannot start: {said}"), ray_session():
        pytest.fail("there is no Ray")
    assert len(calls) == 1


def test_a_fault_of_a_program_keeps_its_traceback(starts: Callable[..., list[Any]]) -> None:
    calls = starts(TypeError("unexpected keyword"))
    with pytest.raises(TypeError, match="unexpected keyword"), ray_session():
        pytest.fail("there is no Ray")
    assert len(calls) == 1


def test_a_named_cluster_is_named_in_the_line(
    starts: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = LATE[2]
    starts(late, late)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    said = "^RAY_ADDRESS: no Ray came up at '10.0.0.1:6379' in time"
    with (
        pytest.warns(UserWarning, match="trying once more"),
        pytest.raises(DataError, match=said),
        ray_session(),
    ):
        pytest.fail("there is no Ray")
    starts(ValueError("Invalid address format: nonsense"))
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    said = "^RAY_ADDRESS: 'nonsense' is no address .*; expected HOST:PORT"
    with pytest.raises(DataError, match=said), ray_session():
        pytest.fail("there is no Ray")


def test_the_commands_handler_of_sigterm_stays(
    starts: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts()
    init, own = ray.init, signal.getsignal(signal.SIGTERM)

    def replacing(*given: Any, **more: Any) -> None:
        init(*given, **more)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does

    def mine(number: int, frame: object) -> None:
        pytest.fail(f"{number} {frame}")

    monkeypatch.setattr(ray, "init", replacing)
    signal.signal(signal.SIGTERM, mine)
    try:
        with ray_session():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, own)


def test_an_end_of_ray_does_not_hide_why_a_session_ended(
    starts: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts()

    def fail() -> None:
        raise RuntimeError("the raylet is gone")

    monkeypatch.setattr(ray, "shutdown", fail)
    with pytest.raises(DataError, match="the first error"), ray_session():
        raise DataError("the first error")


def test_a_real_ray_that_is_waited_for_no_time_leaves_no_process_behind() -> None:
    """Ray itself forgets the processes of a start that failed; both starts are real."""
    script = textwrap.dedent("""
        import os, warnings
        os.environ.pop("RAY_ADDRESS", None)
        os.environ["RAY_gcs_server_port_wait_time_s"] = "0"
        warnings.simplefilter("ignore")
        import psutil
        from lapilli.data.ray_session import ray_session
        from lapilli.data.errors import DataError
        try:
            with ray_session():
                print("it was faster than nothing")
        except DataError as error:
            print(error)
        print([child.name() for child in psutil.Process().children(recursive=True)])
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    said, left = done.stdout.splitlines()[-2:]
    assert said.startswith("Ray did not come up in time on this machine (Timed out waiting")
    assert left == "[]"
