"""Published folders and exports through generate, chat, evaluate and train's init_from."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import pipelines.chat
import pipelines.evaluate
import pipelines.export
import pipelines.generate
from lapilli.data.errors import DataError
from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import FACTS
from lapilli.model.parts.language import build_language
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import Question, open_assistant
from pipelines.cli.settings import EvaluateConfig
from pipelines.exports import output as export_output
from tests.pipelines.test_export_runs import DECODER, LORA, Runs
from tests.pipelines.test_generate import one_line

QUESTION = "What colour is the goat?"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def run(runs: Runs) -> Path:
    """Adapters over a random language model and a random tower: nothing of it lies elsewhere."""
    return runs.train("lora", lora=LORA)


@pytest.fixture(scope="module")
def exports(runs: Runs, run: Path) -> dict[str, Path]:
    return {form: runs.export(run, form) for form in ("hf", "llava", "peft")}


@pytest.fixture(scope="module")
def photo(runs: Runs) -> Path:
    return next(path for path in sorted((runs.folder / "raw-clip/images").rglob("*.png")))


def of_others(folder: Path, to: Path, *left_out: str) -> Path:
    """A folder without what only our exports have."""
    shutil.copytree(folder, to)
    for name in ("lapilli.json", *left_out):
        if (to / name).is_dir():
            shutil.rmtree(to / name)
        (to / name).unlink(missing_ok=True)
    return to


def said(model: Path, photo: Path, capsys: Capture, *flags: str) -> str:
    arguments = [str(model), f"--image={photo}", f"--question={QUESTION}", "--device=cpu", *flags]
    assert pipelines.generate.main([*arguments, "--decoding.max_new_tokens=8"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", ["hf", "llava", "peft"])
def test_an_export_answers_as_its_run(
    run: Path, exports: dict[str, Path], photo: Path, capsys: Capture, form: str
) -> None:
    assert said(exports[form], photo, capsys) == said(run, photo, capsys)


@pytest.mark.parametrize("form", ["hf", "llava", "peft"])
def test_an_export_is_evaluated_as_its_run(
    runs: Runs, run: Path, exports: dict[str, Path], form: str
) -> None:
    def answers(model: Path) -> list[str]:
        config = EvaluateConfig(str(model), str(runs.dataset("clip")), device="cpu")
        return [answer.given for answer in pipelines.evaluate.evaluate(config)[1]]

    assert answers(exports[form]) == answers(run)


def test_a_template_that_is_said_must_be_the_datasets(
    runs: Runs, run: Path, exports: dict[str, Path], capsys: Capture, tmp_path: Path
) -> None:
    """By evaluate, of a folder that does not say; a file with the same frames is the same."""
    folder, data = of_others(exports["llava"], tmp_path / "llava"), runs.dataset("clip")
    (tmp_path / "own.yaml").write_text("base: v1")

    def arguments(model: Path, template: str) -> list[str]:
        return [f"--run={model}", f"--dataset={data}", "--device=cpu", f"--template={template}"]

    told: list[str] = []
    for template in ("", "v1", str(tmp_path / "own.yaml")):
        assert pipelines.evaluate.main(arguments(folder, template)) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2]
    line = one_line(pipelines.evaluate.main, arguments(folder, "mpt"), capsys)
    assert f"template: {data} was made with v1, the training data with mpt" in line
    line = one_line(pipelines.evaluate.main, arguments(folder, "none"), capsys)
    assert "template 'none' is unknown: take one of" in line
    for model in (run, exports["llava"]):
        assert "leave --template out" in one_line(
            pipelines.evaluate.main, arguments(model, "v1"), capsys
        )


def test_transformers_llava_says_template_and_view_itself(
    run: Path, exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path
) -> None:
    folder = of_others(exports["hf"], tmp_path / "llava-hf")
    assert said(folder, photo, capsys) == said(run, photo, capsys)
    found = open_assistant(folder)
    assert (found.template.name, found.spec.aspect, found.spec.size) == ("v1", "pad", 32)
    other = said(folder, photo, capsys, "--template=llava_v1", "--view=crop")
    assert open_assistant(folder, template="llava_v1", view="crop").spec.aspect == "crop"
    assert other


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}Q: {% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
        "{% set n = range(90000) %}{% for a in n %}{% for b in n %}{% endfor %}{% endfor %}",
        "{{ 'a' * 9 ** 12 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.x.y }}",
        "{% if %}",
    ],
)
def test_a_chat_template_that_is_none_of_ours_is_asked_for(
    exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path, source: str
) -> None:
    folder = of_others(exports["hf"], tmp_path / "llava-hf")
    for path in folder.glob("*chat_template*"):
        path.write_text(source)
    for name in ("tokenizer_config.json", "processor_config.json"):
        fields = json.loads((folder / name).read_text())
        fields.pop("chat_template", None)
        (folder / name).write_text(json.dumps(fields))
    line = one_line(pipelines.generate.main, [str(folder), "--question=a"], capsys)
    assert f"template: {folder} does not say how conversations are written down" in line
    assert "pass --template, one of chatml, llama_3, llava_llama_2" in line
    if "content" in source:
        assert said(folder, photo, capsys, "--template=v1")


def test_llavas_layout_of_others_wants_a_template_alone(
    run: Path, exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path
) -> None:
    folder = of_others(exports["llava"], tmp_path / "llava-v1.5")
    line = one_line(pipelines.generate.main, [str(folder), "--question=a"], capsys)
    assert "pass --template, one of" in line
    assert said(folder, photo, capsys, "--template=v1") == said(run, photo, capsys)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for aspect, found in (("square", "crop"), (None, "crop"), ("pad", "pad")):
        path.write_text(json.dumps({**fields, "image_aspect_ratio": aspect}))
        assert open_assistant(folder, template="v1").spec.aspect == found
    spec = open_assistant(folder, template="v1", view="{aspect: stretch, fill: [1, 2, 3]}").spec
    assert (spec.aspect, spec.fill, spec.size) == ("stretch", (1, 2, 3), 32)


def test_llavas_adapters_are_asked_with_their_base(
    run: Path, exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path
) -> None:
    folder = of_others(exports["peft"], tmp_path / "llava-lora", "base")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["base_model_name_or_path"] == str(exports["peft"] / "base")
    assert said(folder, photo, capsys, "--template=v1") == said(run, photo, capsys)
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    arguments = [str(folder), "--question=a", "--template=v1"]
    line = one_line(pipelines.generate.main, arguments, capsys)
    assert "adapter for lmsys/vicuna-7b-v1.5, which is not on this machine" in line


def test_pefts_adapters_on_transformers_llava_are_asked(
    exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path
) -> None:
    library: Any = peft
    base = LlavaForConditionalGeneration.from_pretrained(exports["hf"])
    made = library.get_peft_model(
        base, library.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value += 0.3
    made.peft_config["default"].base_model_name_or_path = str(exports["hf"])
    made.save_pretrained(tmp_path / "trl")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in exports["hf"].iterdir():
        if path.name.startswith(("tokenizer", "processor", "chat_template", "preprocessor")):
            shutil.copyfile(path, tmp_path / "merged" / path.name)
    found = said(tmp_path / "trl", photo, capsys)
    assert found == said(tmp_path / "merged", photo, capsys)
    assert found != said(exports["hf"], photo, capsys)


def test_a_chat_opens_what_generate_does(exports: dict[str, Path], tmp_path: Path) -> None:
    """Up to the page: the same flags and the same lines."""
    folder = of_others(exports["llava"], tmp_path / "llava")
    with pytest.raises(DataError, match="pass --template, one of"):
        pipelines.chat.main([str(folder), "--device=cpu"])
    with pytest.raises(DataError, match="template 'none' is unknown"):
        pipelines.chat.main([str(folder), "--device=cpu", "--template=none"])


@pytest.mark.parametrize("form", ["hf", "llava", "peft"])
def test_a_server_answers_as_generate_does(
    exports: dict[str, Path], photo: Path, capsys: Capture, tmp_path: Path, form: str
) -> None:
    """`lapilli serve FOLDER --port 0` in a process of its own, until Ctrl-C."""
    command = [sys.executable, "-m", "pipelines.serve", str(exports[form]), "--port=0"]
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--device=cpu"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"API: (\S+), model (\S+)\n", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        url = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}
        ]  # fmt: skip
        asked = {"model": found[2], "messages": [{"role": "user", "content": content}]}
        request = urllib.request.Request(
            f"{found[1]}/chat/completions", json.dumps({**asked, "max_tokens": 8}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
        assert text == said(exports[form], photo, capsys).rstrip("\n")
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()


# ---- what is no model --------------------------------------------------------------------------

Make = Callable[[Path, Runs, dict[str, Path]], str]


def a_dataset(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    shutil.copytree(runs.dataset("clip"), folder)
    return "no run"


def an_export_without_weights(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    of_others(exports["llava"], folder, "model.safetensors")
    return "no weights; expected"


def transformers_llava_without_weights(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    of_others(exports["hf"], folder, "model.safetensors")
    return "cannot be loaded; expected a folder that transformers'"


def an_adapter_without_weights(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    of_others(exports["peft"], folder, "adapter_model.safetensors")
    return "no adapter can be read"


def adapters_without_the_projector(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    of_others(exports["peft"], folder, "non_lora_trainables.bin")
    return "no weights of the projector; expected non_lora_trainables.bin"


def weights_cut_short(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    shutil.copytree(exports["llava"], folder)
    (folder / "model.safetensors").write_bytes(b"\x08" * 99)
    return "model.safetensors: cannot be read"


def an_unknown_architecture(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "paligemma"}')
    return "a paligemma; expected a run"


def a_config_of_another_model(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    shutil.copytree(exports["llava"], folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 64}))
    return "expected the same model config"


def nothing(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    return "no such folder"


def an_empty_folder(folder: Path, runs: Runs, exports: dict[str, Path]) -> str:
    folder.mkdir()
    return "no run"


NO_MODELS: list[Make] = [
    a_dataset, an_export_without_weights, transformers_llava_without_weights,
    an_adapter_without_weights, adapters_without_the_projector, weights_cut_short,
    an_unknown_architecture,
    a_config_of_another_model, nothing, an_empty_folder,
]  # fmt: skip


@pytest.mark.parametrize("make", NO_MODELS, ids=lambda make: make.__name__)
def test_what_is_no_model_is_one_line_for_every_verb(
    make: Make, runs: Runs, exports: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    words = make(folder, runs, exports)
    is_of_others = make in (
        an_export_without_weights,
        transformers_llava_without_weights,
        an_adapter_without_weights,
        adapters_without_the_projector,
    )
    known = ("--template=v1", "--view=pad") if is_of_others else ()
    asks = [str(folder), "--device=cpu"]
    data = f"--dataset={runs.dataset('clip')}"
    verbs: list[tuple[Any, list[str]]] = [
        (pipelines.generate.main, [*asks, "--question=a", *known]),
        (pipelines.evaluate.main, [f"--run={folder}", data, "--device=cpu"]),
        (pipelines.chat.main, [*asks, *known]),
        (pipelines.export.main, [str(folder), "--to=hf", f"--output={tmp_path / 'out'}"]),
    ]
    for verb, arguments in verbs:
        line = one_line(verb, arguments, capsys)
        is_export = verb is pipelines.export.main  # which takes runs alone
        assert words in line or (is_export and "expected a training run's folder" in line)
    assert not (tmp_path / "out").exists()
    if make in (a_config_of_another_model, adapters_without_the_projector):
        return  # a start takes its weights alone, and those fit
    with pytest.raises((TrainError, ModelError)) as found:
        runs.train("start", flags=(f"--init_from={folder}",))
    assert "\n" not in str(found.value)
    assert str(folder) in str(found.value)


def test_flags_for_what_a_folder_says_itself_are_refused(
    run: Path, exports: dict[str, Path]
) -> None:
    for folder in (run, exports["llava"]):
        with pytest.raises(DataError, match="leave --template out"):
            open_assistant(folder, template="v1")
        with pytest.raises(DataError, match="leave --view out"):
            open_assistant(folder, view="pad")


def test_a_view_that_is_none_is_one_line(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = of_others(exports["llava"], tmp_path / "llava")
    for view, words in (
        ("zoom", "view: 'zoom'; expected pad, crop, stretch"),
        ("{zoom: 2}", "view: setting 'zoom' is unknown here"),
        ("{size: 7}", "view: size 7; the model takes images of 32 px"),
    ):
        with pytest.raises(DataError, match=words):
            open_assistant(folder, template="v1", view=view)


# ---- exports -----------------------------------------------------------------------------------


def test_adapters_name_the_base_that_they_lack(
    runs: Runs, run: Path, exports: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(2)
    build_language(LanguageConfig(settings=DECODER)).save_pretrained(tmp_path / "base")
    named = f"pretrained: {tmp_path / 'base'}"
    first = runs.train("projector", language=named, flags=("--model.trainable=[projector]",))
    second = runs.train("on-projector", lora=LORA, language=named, flags=(f"--init_from={first}",))
    capsys.readouterr()
    out = runs.export(second, "peft")
    assert f"the base model is {tmp_path / 'base'}, which is not in the" in flat(capsys)
    assert not (out / "base").exists()
    third = runs.train("whole", language=named)
    fourth = runs.train("on-whole", lora=LORA, language=named, flags=(f"--init_from={third}",))
    capsys.readouterr()
    out = runs.export(fourth, "peft")
    assert "which lies nowhere else: an earlier run trained it" in flat(capsys)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(out / "base")
    question = Question.of(QUESTION)
    decoding = pipelines.generate.Decoding(8)
    for model, export in ((second, runs.folder / "on-projector-peft"), (fourth, out)):
        ours = open_assistant(model).answer([question], decoding)
        theirs = open_assistant(export).answer([question], decoding)
        assert ours == theirs


def flat(capsys: Capture) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_what_an_export_needs_covers_what_it_writes(
    runs: Runs, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that is asked for before it starts, against the bytes of what was written."""
    asked: list[int] = []
    fill = export_output.filled

    @contextmanager
    def noted(output: Path, needed: int) -> Any:
        asked.append(needed + export_output.SETTINGS_BYTES)
        with fill(output, needed) as folder:
            yield folder

    monkeypatch.setattr("pipelines.export.filled", noted)
    monkeypatch.setattr("pipelines.exports.llava.filled", noted)
    for number, (to, *flags) in enumerate(
        [["hf"], ["llava"], ["llava", "--files=bin", "--dtype=bfloat16"], ["peft"]]
    ):
        output = tmp_path / str(number)
        assert pipelines.export.main([str(run), f"--to={to}", f"--output={output}", *flags]) == 0
        written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        assert 0.5 * asked[-1] < written <= asked[-1]


@pytest.mark.parametrize("name", ["template", "view", "tokenizer", "trained"])
@pytest.mark.parametrize("value", [None, [], 3, "text", {"name": 1}])
def test_facts_of_an_export_have_types(
    exports: dict[str, Path], tmp_path: Path, name: str, value: object
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(exports["hf"], folder)
    path = folder / FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    if name == "trained" and isinstance(value, dict):
        assert open_assistant(folder).name == "made"
    else:
        with pytest.raises(TrainError, match="damaged"):
            open_assistant(folder)
