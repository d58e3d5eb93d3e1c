"""Run a saved step again to find which sample, module and weight went wrong.

lapilli replay RUN/replay/step-N
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser

from lapilli.data.trust import NOTHING, Trust
from lapilli.train.checkpoint.at_hand import local_kept_step
from lapilli.train.driver.replay import Finding, rerun
from lapilli.train.health.step_dump import read_kept
from lapilli.train.run_folder.names import CONFIG
from lapilli.train.run_folder.settings import read_run_config, require_trust
from pipelines.cli.command import first_as, read_arguments, run, say, with_switches
from pipelines.cli.trust_flags import TrustFlags

__all__ = ["main", "replay"]

MOST_SAMPLES = 20  # that are named


def replay(path: Path, trust: Trust = NOTHING) -> Finding:
    """Run a saved step again in this process and print what is not finite in it.

    Args:
        path: The step's folder.
        trust: What the command allows of what the run's own settings ask for.
    """
    kept = read_kept(path)
    config = read_run_config(kept.run)
    require_trust(config.model, trust, kept.run / CONFIG)
    say(f"step {kept.step + 1}: loss {kept.loss}, gradient norm {kept.grad_norm} in the run")
    found = rerun(config, kept, lambda step: say(f"  step {step + 1} taken again"))
    say(f"loss {found.loss} here, from the weights of step {found.start} on")
    if found.leaves_predictors_out:
        say("the loss here is the text's alone: the dataset's plan has other micro-batches now")
    for sample_id, loss in found.samples[:MOST_SAMPLES]:
        say(f"  {loss:>10.4f}  {sample_id}")
    if len(found.samples) > MOST_SAMPLES:
        say(f"  and {len(found.samples) - MOST_SAMPLES} samples of lower loss")
    for what, name in (
        ("weight", found.weight),
        ("module whose output", found.output),
        ("module at whose output the gradient", found.gradient),
    ):
        say(f"first {what} is not finite: {name or 'none'}")
    if found.operation:
        say(f"autograd: {found.operation}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = ArgumentParser(
        prog="lapilli replay",
        description="Run a saved step again: losses by sample, and the first module and weight "
        "that are not finite.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--step", type=str, required=True, help="a run's folder replay/step-N; an address too"
    )
    parser.add_class_arguments(TrustFlags)
    found = read_arguments(
        parser, with_switches(TrustFlags, first_as("step", argv)), copied={"step": local_kept_step}
    )
    flags = TrustFlags(**{one.name: found[one.name] for one in fields(TrustFlags)})
    replay(Path(found.step), flags.trust)
    return 0


if __name__ == "__main__":
    run(main)
