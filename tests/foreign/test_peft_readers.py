"""PEFT on exports of tiny runs with adapters: logits and greedy ids, alone and in a batch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.inference.assistant import open_assistant
from lapilli.train.inference.evaluate import load_trained
from tests.foreign.environments import ROOT, SCRIPTS, run_in
from tests.foreign.trained_runs import LORA, TOKENS, Forms

pytestmark = [pytest.mark.readers, pytest.mark.timeout(300)]

TABLE = ROOT / "outputs" / "peft_readers.md"
LOGITS = 2e-5  # of logits around 5, both in fp32
LONG = ("--epochs=4", "--max_steps=0")
PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 99], [1, 260, 270, 280, 290]]
HAS_4_BITS = importlib.util.find_spec("bitsandbytes") is not None
EVERY: dict[str, dict[str, Any]] = {
    "LoRA": {"flags": LONG},
    "LoRA, biases": {"flags": ("--model.lora.bias=all",)},
    "LoRA after an earlier run": {"flags": LONG, "after": True},
    "grown vocabulary": {
        "flags": ("--model.language.vocab_size=330",),
        "kind": "grown",
        "template": "mpt",
    },
    "QLoRA": {"flags": ("--model.language.quantize=nf4",)},
    "QLoRA, grown vocabulary": {
        "flags": ("--model.language.quantize=nf4", "--model.language.vocab_size=323"),
        "kind": "grown",
        "template": "mpt",
    },
}
FORMS = {name: how for name, how in EVERY.items() if HAS_4_BITS or "QLoRA" not in name}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("peft"))


def run_of(forms: Forms, form: str) -> Path:
    """The run of a form."""
    how, flags = FORMS[form], [*LORA]
    if "after" in how:
        flags.append(f"--init_from={forms.run('whole')}")
    name = form.replace(" ", "-").replace(",", "")
    kind, template = how.get("kind", "pieces"), how.get("template", "v1")
    return forms.run(name, *flags, *how["flags"], kind=kind, template=template)


def prompts(form: str) -> list[list[int]]:
    """Ids of a form's tokenizer: those that were added too."""
    added = [[1, 320, 50, 321, 322, 51]] if "grown" in form else []
    return [*PROMPTS, *added]


@pytest.fixture(scope="module")
def answers(forms: Forms) -> dict[str, Any]:
    """What PEFT says of every form, by one process."""
    jobs: list[dict[str, Any]] = []
    for form in FORMS:
        run = run_of(forms, form)
        output = forms.export(run, "peft", f"{run.name}-peft")
        job = {"path": str(output), "ids": prompts(form), "tokens": TOKENS}
        jobs.append({**job, "quantized": "QLoRA" in form, "output": f"{output}.json"})
    (forms.folder / "jobs.json").write_text(json.dumps(jobs))
    run_in("peft", SCRIPTS / "peft_answer.py", forms.folder / "jobs.json")
    return {n: json.loads(Path(j["output"]).read_text()) for n, j in zip(FORMS, jobs, strict=True)}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows of what was compared."""
    rows: list[str] = []
    yield rows
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    head = "| form | logits | ids alone | ids in a batch |\n|---|---|---|---|\n"
    TABLE.write_text(head + "".join(rows), encoding="utf-8")


def greedy(model: VisionLanguageModel, ids: list[int], rows: int) -> tuple[torch.Tensor, list[int]]:
    """Logits behind a prompt, and the likeliest tokens of those that the reader has."""
    made: list[int] = []
    first = torch.empty(0)
    with torch.inference_mode():
        for _ in range(TOKENS):
            logits = model.language(torch.tensor([[*ids, *made]])).logits[0, -1, :rows].float()
            first = logits if not made else first
            made.append(int(logits.argmax()))
    return first, made


@pytest.mark.parametrize("form", FORMS)
def test_peft_answers_as_the_run_does(
    forms: Forms, answers: dict[str, Any], table: list[str], form: str
) -> None:
    theirs, run = answers[form], run_of(forms, form)
    rows = len(theirs["answers"][0]["logits"])
    model = load_trained(run).model
    ours = [greedy(model, ids, rows) for ids in prompts(form)]
    apart = [
        (torch.tensor(found["logits"]) - logits).abs().max().item()
        for found, (logits, _) in zip(theirs["answers"], ours, strict=True)
    ]
    made = [ids for _, ids in ours]
    alone = [found["made"] for found in theirs["answers"]]
    equal = [sum(map(list.__eq__, made, some)) for some in (alone, theirs["batch"])]
    table.append(
        f"| {form} | {max(apart):.1e} | {equal[0]} of {len(made)} | {equal[1]} of {len(made)} |\n"
    )
    assert max(apart) < LOGITS
    assert alone == made
    assert theirs["batch"] == made
    again = open_assistant(run.with_name(f"{run.name}-peft")).model  # as we read it ourselves
    found, _ = greedy(again, prompts(form)[-1], rows)
    torch.testing.assert_close(found, ours[-1][0], rtol=1e-5, atol=LOGITS)
