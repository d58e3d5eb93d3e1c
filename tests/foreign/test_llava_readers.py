"""LLaVA's own `load_pretrained_model` on exports of tiny runs: ids, logits and greedy text.

llava-torch 1.2.2.post1, whose builder.py and llava_arch.py are what is run. One process loads all
forms; it asks alone and in a batch, and what it says is compared with the run itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.foreign.environments import HERE, ROOT, run_in
from tests.foreign.trained_runs import LORA, TOKENS, Forms, ask

pytestmark = [pytest.mark.readers, pytest.mark.timeout(400)]

TABLE = ROOT / "outputs" / "llava_readers.md"
LOGITS = 2e-5  # of logits around 5, both in fp32
STRETCHED = 2e-2  # Pillow takes the two passes of a tall picture in the other order
ALL = "--model.trainable=[vision,projector,language]"
GROWN = "--model.language.vocab_size=330"  # 323 tokens, and rows to spare
LONG = ("--epochs=6", "--max_steps=0")
FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "LoRA merged": {"flags": (*LORA, *LONG)},
    "LoRA": {"flags": (*LORA, *LONG), "to": "peft"},
    "LoRA after an earlier run": {"flags": (*LORA, *LONG), "to": "peft", "after": "whole"},
    "grown vocabulary": {"flags": (GROWN,), "kind": "grown", "template": "mpt"},
    "trained tower": {"flags": (ALL,)},
    "trained tower, LoRA": {"flags": (ALL, *LORA, *LONG), "to": "peft"},
    "no SentencePiece model, bin": {"kind": "bytes", "export": ("--files=bin",)},
    "cropped pictures": {"aspect": "crop"},
    "stretched pictures": {"aspect": "stretch"},
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("readers"))


def run_of(forms: Forms, name: str) -> Path:
    """The run of a form; two forms may be of one run."""
    how = FORMS[name]
    kind, template = how.get("kind", "pieces"), how.get("template", "v1")
    flags: tuple[str, ...] = how.get("flags", ())
    aspect = how.get("aspect", "pad")
    if "after" in how:
        flags = (*flags, f"--init_from={run_of(forms, how['after'])}")
    digest = hashlib.sha256(json.dumps([flags, kind, template, aspect]).encode()).hexdigest()
    return forms.run(digest[:8], *flags, kind=kind, template=template, aspect=aspect)


@pytest.fixture(scope="module")
def answers(forms: Forms) -> dict[str, Any]:
    """What LLaVA says of every form, by one process."""
    jobs: list[dict[str, Any]] = []
    for number, (name, how) in enumerate(FORMS.items()):
        to = how.get("to", "llava")
        folder = f"llava-{number}" + ("-lora" if to == "peft" else "")
        output = forms.export(run_of(forms, name), to, folder, *how.get("export", ()))
        base = json.loads((output / "adapter_config.json").read_text()) if to == "peft" else {}
        jobs.append(
            {
                "path": str(output),
                "base": base.get("base_model_name_or_path"),
                "conversation": how.get("template", "v1"),
                "questions": forms.questions,
                "tokens": TOKENS,
                "output": f"{output}.json",
            }
        )
    (forms.folder / "jobs.json").write_text(json.dumps(jobs))
    run_in("llava-loader", HERE / "scripts" / "llava_answer.py", forms.folder / "jobs.json")
    return {n: json.loads(Path(j["output"]).read_text()) for n, j in zip(FORMS, jobs, strict=True)}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows of what was compared."""
    rows: list[str] = []
    yield rows
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    head = "| form | ids | logits | text alone | text in a batch |\n|---|---|---|---|---|\n"
    TABLE.write_text(head + "".join(rows), encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_llava_answers_as_the_run_does(
    forms: Forms, answers: dict[str, Any], table: list[str], form: str
) -> None:
    ours, theirs = ask(run_of(forms, form), forms.questions), answers[form]
    ids = [found["ids"] == said.ids for found, said in zip(theirs["answers"], ours, strict=True)]
    apart = [  # LLaVA cuts the rows that no token has
        (torch.tensor(found["logits"]) - said.logits[: len(found["logits"])]).abs().max().item()
        for found, said in zip(theirs["answers"], ours, strict=True)
    ]
    texts = [said.text for said in ours]
    alone = [found["text"] for found in theirs["answers"]]
    equal = [sum(map(str.__eq__, texts, some)) for some in (alone, theirs["batch"])]
    table.append(
        f"| {form} | {sum(ids)} of {len(ids)} | {max(apart):.1e} | {equal[0]} of {len(texts)} "
        f"| {equal[1]} of {len(texts)} |\n"
    )
    assert all(ids)
    assert max(apart) < (STRETCHED if form.startswith("stretched") else LOGITS)
    assert alone == texts
    assert theirs["batch"] == texts


def test_forms_differ(answers: dict[str, Any]) -> None:
    """What is compared depends on what was trained."""
    said = {json.dumps(found["answers"][0]["logits"][:5]) for found in answers.values()}
    assert len(said) >= len(FORMS) - 1  # merged adapters and adapters are one run
