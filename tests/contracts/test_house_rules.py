"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_MODULES = 14
NAMES_OF_NOW = {"gzip.compress", "time.time", "time.monotonic", "datetime.now", "uuid4"}

PACKAGED = sorted((ROOT / "packages").rglob("*.py"))
ALL = [
    *PACKAGED,
    *sorted((ROOT / "pipelines").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folders_to_explain() -> list[Path]:
    """The packages, their rooms, the pipelines and every folder below that holds recipes."""
    packages = [folder for folder in (ROOT / "packages").iterdir() if folder.is_dir()]
    rooms = {path.parent for path in PACKAGED} - {*ROOT.glob("packages/*/lapilli/*")}
    packages += [room for room in rooms if len([*room.glob("*.py")]) > 4]
    pipelines = ROOT / "pipelines"
    held = {path.parent for kind in ("*.py", "*.yaml", "*.sh") for path in pipelines.rglob(kind)}
    return sorted({*packages, pipelines, *held})


@pytest.mark.parametrize("path", PACKAGED, ids=name_of)
def test_module_says_what_it_is_and_what_is_public(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module), "the module needs a docstring"
    assigned = {
        target.id
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    is_empty = path.name == "__init__.py" and len(module.body) == 1
    assert is_empty or "__all__" in assigned, "the module needs __all__"


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long: dict[str, int] = {}
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_rooms_are_small() -> None:
    """A folder of modules is read at a glance; `pipelines/` has one module a verb."""
    rooms = {path.parent for path in ALL if "tests" not in path.relative_to(ROOT).parts}
    rooms -= {ROOT / "pipelines"}
    sizes = {name_of(room): len({*room.glob("*.py")} - {room / "__init__.py"}) for room in rooms}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULES} == {}


@pytest.mark.parametrize("package", ["data", "model", "train"])
def test_no_module_has_the_name_of_something_public(package: str) -> None:
    """Importing such a module would replace the function of the package by it."""
    public = importlib.import_module(f"lapilli.{package}")
    modules = {module.name for module in pkgutil.iter_modules(public.__path__)}
    assert modules & {*public.__all__} == set()


def test_nothing_is_called_utils() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [name_of(path) for path in ALL if path.name in vague] == []


def test_no_tests_id_holds_the_time() -> None:
    """Processes that share a file of tests must collect the same: gzip's header has the second."""
    found = [
        f"{name_of(path)}:{call.lineno}"
        for path in ALL
        for mark in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("mark.parametrize")
        for call in ast.walk(mark)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in NAMES_OF_NOW
        if "mtime" not in {keyword.arg for keyword in call.keywords}
    ]
    assert found == []


@pytest.mark.parametrize("folder", folders_to_explain(), ids=name_of)
def test_folder_has_a_readme(folder: Path) -> None:
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize(
    "readme",
    [path for path in ROOT.glob("p*/**/README.md") if "| module |" in path.read_text()],
    ids=name_of,
)
def test_a_readmes_modules_are_those_of_its_folder(readme: Path) -> None:
    named = set(re.findall(r"^\| `(\w+\.py)` \|", readme.read_text(), re.MULTILINE))
    assert named == {path.name for path in readme.parent.glob("*.py")} - {"__init__.py"}


MODULE_NAME = re.compile(r"(?<![\w/.])[a-z_]\w*(?:/\w+)*\.py\b")
PAGES = sorted(
    path
    for folder in ("packages", "pipelines", "tests")
    for path in (ROOT / folder).rglob("*.md")
    if path.name != "LOG.md" and not {"vendor", "recipes"} & {*path.parts}
)


def test_a_module_that_a_page_names_exists() -> None:
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in str(path)}
    gone = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in MODULE_NAME.findall(page.read_text(encoding="utf-8"))
        if Path(name).name not in names
    ]
    assert gone == []


CONSTRAINTS = [f"constraints{which}.txt" for which in ("", "-cpu", "-cuda", "-real-weights")]


def extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {**project["optional-dependencies"], "": project["dependencies"]}


def test_every_requirement_has_a_pin() -> None:
    wanted = {canonicalize_name(Requirement(text).name) for of in extras().values() for text in of}
    texts = [(ROOT / name).read_text() for name in CONSTRAINTS]
    pins = {canonicalize_name(pin.name) for text in texts for pin, _ in pinned(text)}
    assert wanted - {"lapilli"} <= pins


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_pin_is_exact_and_has_hashes(name: str) -> None:
    text = (ROOT / name).read_text()
    found = pinned(text)
    assert found
    for pin, hashes in found:
        assert re.fullmatch(r"==[\w.!+]+", str(pin.specifier)), pin
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin
    others = {line for line in text.splitlines() if line and not line.startswith((" ", "#"))}
    assert len(others) == len(found)  # nothing without a hash


def test_torch_is_apart_from_what_every_build_needs() -> None:
    """A CPU build of torch comes without two gigabytes of CUDA."""
    base, cpu, cuda, _ = ([p for p, _ in pinned((ROOT / n).read_text())] for n in CONSTRAINTS)
    kinds = ("torch", "nvidia-", "cuda-")
    assert [pin.name for pin in base if pin.name == "torch" or pin.name.startswith(kinds[1:])] == []
    assert [pin.name for pin in cuda if not pin.name.startswith(kinds)] == []
    (build,), (whole,) = cpu, [pin for pin in cuda if pin.name == "torch"]
    assert str(build.specifier) == f"{whole.specifier}+cpu"


def pinned(text: str) -> list[tuple[Requirement, list[str]]]:
    """The pins of a requirements file with their hashes."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [line.partition(" --hash") for line in lines if re.match(r"[\w.-]+==", line)]
    return [(Requirement(pin), (mark + rest).split()) for pin, mark, rest in words]


def test_make_constraints_resolves_every_extra_and_no_target_is_taken_for_a_file() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "constraints.py").read_text(encoding="utf-8")
    named = re.findall(r'"--extra", "([\w-]+)"', script)
    named += re.findall(r'"([\w-]+)"', re.findall(r"^EXTRAS = (.+)$", script, re.MULTILINE)[0])
    resolved: set[str] = set()
    while named:
        extra = named.pop()
        resolved.add(extra)
        below = [Requirement(text) for text in extras()[extra]]
        named += [one for it in below if it.name == "lapilli" for one in it.extras]
    assert {*resolved, ""} == set(extras())
    targets = re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    assert sorted(phony) == sorted(targets)


# Files that a module may read whole without a bound: the machine's, or of this process.
UNBOUNDED = {
    "data/cluster/probe.py": "path",  # the sources of the package itself
    "data/building/crash_guard.py": "attempt",  # a count in the folder that is built
    "data/images/buffers.py": "status",  # /proc
    "data/images/codecs.py": "Path(sys.prefix) / SIMD_NOTE",
    "data/images/decode_worker.py": "Path('/proc/self/statm')",
    "data/io/remote_path.py": "other self",  # callers ask for the size
    "data/mounts/folders.py": "self",  # a listing
    "data/planning/originals.py": "path",  # a shard, of the size that its facts have
    "model/interop/lora_run.py": "folder / CONFIG",  # written the line before
    "model/parts/weight_files.py": "path",  # behind `require_plain`, as the next two
    "train/inference/published.py": "path",
    "train/run_folder/metrics_file.py": "file",
    "train/checkpoint/save_load.py": "path / STATE",  # of the run that is trained, as the next
    "train/checkpoint/store.py": "found[name][STATE] path",
    "train/checkpoint/upload.py": "path / STATE",
    "train/run_folder/relay.py": "file path",  # what this run's own workers write
    "train/driver/workers.py": "path",
    "train/health/watchdog.py": "p path",
    "train/metrics/loggers.py": "kept path",
}


def test_a_file_is_read_whole_only_within_a_bound() -> None:
    found = dict[str, set[str]]()
    for path in PACKAGED:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name = node.func.attr
            if name in ("read_bytes", "read_text") or (name == "read" and not node.args):
                module = path.as_posix().partition("/lapilli/")[2]
                found.setdefault(module, set()).add(ast.unparse(node.func.value))
    assert {module: " ".join(sorted(names)) for module, names in found.items()} == UNBOUNDED


def test_versions_are_read_where_a_package_without_metadata_has_one() -> None:
    """A node that runs from a checkout has no metadata of lapilli."""
    rooms = [ROOT / "packages", ROOT / "pipelines"]
    users = [
        name_of(path)
        for path in ALL
        if any(map(path.is_relative_to, rooms)) and "importlib.metadata" in path.read_text("utf-8")
    ]
    assert users == ["packages/data/lapilli/data/versions.py", "pipelines/doctor.py"]


def test_no_class_name_stands_for_two_things() -> None:
    found: dict[str, list[str]] = {}
    for path in ALL:
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name_of(path))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_file_names_of_a_run_are_written_in_one_module() -> None:
    """`config.json` is excepted, which is also a file of published models."""
    names = ROOT / "packages/train/lapilli/train/run_folder/names.py"

    def literals(path: Path) -> set[str]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}

    files = {name for name in literals(names) if re.fullmatch(r"\w+\.\w+", name)} - {"config.json"}
    assert "metrics.jsonl" in files
    rooms = [ROOT / "packages/train", ROOT / "pipelines"]
    users = [path for path in ALL if any(map(path.is_relative_to, rooms)) and path != names]
    found = {name_of(path): literals(path) & files for path in users}
    allowed = {"pipelines/reports/dataset_report.py"}  # of a dataset's folder
    assert {path: used for path, used in found.items() if used and path not in allowed} == {}
