"""The `lapilli` command: run a verb."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from pipelines.cli.help_text import SETTINGS, short_help

__all__ = ["VERBS", "main", "usage"]

BARE = ("doctor", "simd")  # verbs that run where packages are missing
# In the order they are used.
VERBS = {
    "doctor": "what this machine has, what is missing, and how to add it",
    "quickstart": "end to end on a CPU: data, shards, training, evaluation, report",
    "download": "the published files that a recipe needs, resumed and checked",
    "check": "read annotations and images, report every record that cannot be used",
    "tokenizer": "train a small tokenizer on a mixture's own texts",
    "preprocess": "annotations and images to a dataset of Arrow shards",
    "estimate": "a run's memory, disk and time, before it starts",
    "train": "a dataset to a trained model",
    "replay": "run a saved step again to find what went wrong in it",
    "evaluate": "a model's answers to a dataset of questions, scored",
    "probe": "what each layer of a model knows of a teacher's features",
    "score": "an answers file scored, shown, or made ready for a benchmark's server",
    "generate": "a model's answers to images and questions",
    "serve": "OpenAI's chat completions, and the page, for a model",
    "chat": "a web page to talk with a model about images",
    "export": "a model for transformers, LLaVA or PEFT; a dataset as WebDataset",
    "show": "datasets and runs as tables, samples with what is trained marked",
    "report": "write report.html of datasets and runs",
    "verify": "hash a dataset and compare it with its manifest",
    "repair": "make damaged shards of a dataset again",
    "reproduce": "a published system, from download to its table",
    "import-flags": "recipes of a script that starts LLaVA's trainer or one like it",
    "simd": "build pillow-simd for this processor",
}


def usage() -> str:
    """The verbs, a line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    more = "lapilli VERB --help says more; lapilli --version prints the version."
    return "\n".join(["usage: lapilli VERB [options]", "", *lines, "", more])


def main() -> None:
    """The console script: run a verb; without one, list them."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
    elif verb == "--version":
        from lapilli.data.versions import installed_versions

        print("lapilli", installed_versions("lapilli")["lapilli"])
    elif verb not in VERBS:
        print(f"error: {verb!r} is not a verb; expected one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    elif verb in SETTINGS and {"-h", "--help"} & {*rest}:
        print(short_help(verb, VERBS[verb]))
    else:
        rest = ["--help" if word == "--help_all" else word for word in rest]
        sys.argv = [f"lapilli {verb}", *rest]  # the first is the name in usage lines
        if verb in BARE:
            sys.exit(_module(verb).main(rest))
        from pipelines.cli.command import run

        run(lambda: _module(verb).main(rest))


def _module(verb: str) -> Any:
    return importlib.import_module(f"pipelines.{verb.replace('-', '_')}")


if __name__ == "__main__":
    main()
