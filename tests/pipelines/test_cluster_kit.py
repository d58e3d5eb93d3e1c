"""The files of `pipelines/cluster`: against the schemas of their readers, and run with stand-ins.

KubeRay's definitions lie in `tests/vendor`; Ray's schema of `ray up` is in its package.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import ray
import yaml
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_cli

from tests.contracts.pages import blocks
from tests.contracts.test_page_commands import checked, commands

ROOT = Path(__file__).parents[2]
KIT = ROOT / "pipelines" / "cluster"
MANIFESTS = sorted(path for path in (KIT / "kuberay").glob("*.yaml"))
CLUSTERS = [path for path in MANIFESTS if path.name.startswith("cluster_")]


def document(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """A schema that allows no field it does not name, as the API server's strict check does."""
    if isinstance(schema, list):
        return [closed(one) for one in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(one) for name, one in cast("dict[str, Any]", schema).items()}
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def definition(kind: str) -> dict[str, Any]:
    """The schema of a resource of KubeRay's."""
    path = ROOT / "tests" / "vendor" / "kuberay" / f"ray.io_{kind.lower()}s.yaml.gz"
    with gzip.open(path) as file:
        loaded = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (one for one in loaded["spec"]["versions"] if one["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


@pytest.fixture(scope="module")
def definitions() -> dict[str, dict[str, Any]]:
    return {kind: definition(kind) for kind in ("RayCluster", "RayJob")}


def check(manifest: dict[str, Any], definitions: dict[str, dict[str, Any]]) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    follow(manifest, definitions[manifest["kind"]])


def follow(value: dict[str, Any], schema: dict[str, Any]) -> None:
    """Raise where a value is not as its schema says; the schema, a megabyte, is not checked."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):  # type: ignore[reportUnknownMemberType]
        raise error


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_operator_takes_a_manifest(path: Path, definitions: dict[str, dict[str, Any]]) -> None:
    check(document(path), definitions)


@pytest.mark.parametrize(
    "change",
    [
        ("enableInTreeAutoscaling", "yes"),
        ("autoscalerOptions", {"version": "v3"}),
        ("workerGroups", []),
        ("headGroupSpec", {"template": {"spec": {"containers": [{"image": "a"}]}}}),
    ],
)
def test_a_wrong_manifest_is_refused(
    change: tuple[str, Any], definitions: dict[str, dict[str, Any]]
) -> None:
    manifest = document(CLUSTERS[0])
    manifest["spec"][change[0]] = change[1]
    with pytest.raises(jsonschema.ValidationError):
        check(manifest, definitions)


def pods(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The specification of each group's pod."""
    yield "head", cluster["spec"]["headGroupSpec"]["template"]["spec"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_pods_have_what_the_operator_and_lapilli_need(path: Path) -> None:
    cluster = document(path)
    spec = cluster["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["autoscalerOptions"]["version"] == "v2"
    pools = {group["labels"]["pool"] for group in spec["workerGroupSpecs"]}
    assert pools == {"cpu", "accel"}
    assert {group["minReplicas"] for group in spec["workerGroupSpecs"]} == {0}
    for name, pod in pods(cluster):
        (container,) = pod["containers"]
        environment = {one["name"] for one in container["env"]}
        assert pod["restartPolicy"] == "Never", name  # what autoscaler v2 asks for
        assert {"LAPILLI_CACHE", "LAPILLI_SCRATCH", "HF_HOME"} <= environment, name
        assert {"secretRef": {"name": "lapilli-store"}} in container["envFrom"], name
        # mounts are of volumes that the pod has
        volumes = {one["name"] for one in pod["volumes"]}
        assert {one["name"] for one in container["volumeMounts"]} == volumes, name
        memory = container["resources"]["limits"]["memory"]
        assert memory.endswith("Gi"), name


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_jobs_command_is_one_that_its_verb_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = document(path)
    if manifest["kind"] == "RayJob":
        (name,) = {document(cluster)["metadata"]["name"] for cluster in CLUSTERS}
        assert manifest["spec"]["clusterSelector"] == {"ray.io/cluster": name}
        checked(shlex.split(manifest["spec"]["entrypoint"]), monkeypatch)


def test_ray_takes_the_file_of_ray_up() -> None:
    """Its own schema; it closes no object, so names of the top level and of types are compared."""
    text = (importlib.resources.files("ray") / "autoscaler" / "ray-schema.json").read_text()
    schema = closed(json.loads(text))
    found = document(KIT / "ray_up.yaml")
    follow(found, schema)
    assert found["head_node_type"] in found["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        follow(found | {"idle_timeout": 5}, schema)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        takes_start(shlex.split(found[key][-1].replace("$RAY_HEAD_IP", "10.0.0.1")))


def takes_start(words: list[str]) -> None:
    """Parse the options of a `ray start` with Ray's own parser."""
    words = [word for word in words if not re.fullmatch(r"RAY_\w+=\w+", word)]
    assert words[:2] == ["ray", "start"]
    ray_cli.commands["start"].make_context("ray start", words[2:])


@pytest.mark.parametrize("path", sorted(KIT.glob("runtime_env*.yaml")), ids=lambda path: path.name)
def test_ray_takes_a_runtime_environment(path: Path) -> None:
    found = document(path)
    RuntimeEnv(**found)
    assert [folder for folder in found.get("py_modules", []) if not (ROOT / folder).is_dir()] == []
    text = " ".join(found.get("uv", {}).get("packages", []))
    for file in re.findall(r"\$\{RAY_RUNTIME_ENV_CREATE_WORKING_DIR\}/(\S+)", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gaudi"])
def test_an_image_copies_what_there_is_and_what_its_ignore_file_lets_through(name: str) -> None:
    text = (KIT / name).read_text(encoding="utf-8")
    allowed = [
        line[1:]
        for line in (KIT / f"{name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert all([*ROOT.glob(pattern)] for pattern in allowed), allowed
    taken = {path.name for pattern in allowed for path in ROOT.glob(pattern)}
    # what hatchling reads, and pip
    assert {"packages", "pipelines", "pyproject.toml", "README.md", "LICENSE"} <= taken
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert {*line.split()[:-1]} - {"."} <= taken, line
    for file in re.findall(r"-r (\S+)", text):
        for torch in ("cpu", "cuda"):
            assert file.replace("${TORCH}", torch) in taken
    (made,) = re.findall(r"python:\$\{PYTHON\}-(\w+)-", text) or ["slim"]
    assert made == "slim"


def program(folder: Path, name: str, body: str) -> None:
    """A stand-in for a program of the cluster."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{body}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# `srun` runs what it is given once a node; options and nodes are those of the allocation.
SRUN = """
import subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
sys.exit(subprocess.run(words).returncode)
"""
SCONTROL = """
import sys
assert sys.argv[1:3] == ["show", "hostnames"], sys.argv
print("node1\\nnode2")
"""
# Ray's own check of its words, its own parser for those of `ray start`; nothing is started or
# stopped, for `ray stop` ends every Ray of the machine.
RAY = """
import subprocess, sys
from ray.scripts.scripts import cli
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run
assert sys.argv[1] == "symmetric-run"
words = sys.argv[2:]
cut = words.index("--")
context = symmetric_run.make_context("_", words[:cut], resilient_parsing=True)
assert context.params["address"] == "node1:21234", context.params
assert context.params["min_nodes"] == 2, context.params
start = curate_and_validate_ray_start_args(words[:cut])
cli.commands["start"].make_context("ray start", [*start, "--head"])
sys.exit({starts} and subprocess.run(words[cut + 1:]).returncode)
"""


def allocation(folder: Path, *, starts: bool = True) -> dict[str, str]:
    """The environment of a job of two nodes."""
    program(folder, "srun", SRUN)
    program(folder, "scontrol", SCONTROL)
    program(folder, "ray", RAY.replace("{starts}", str(int(starts))))
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "8",
    }  # fmt: skip


def test_scripts_are_bash() -> None:
    for path in KIT.rglob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_slurm_job_ends_as_its_command(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c",
        "import sys; print('did', *sys.argv[1:]); sys.exit(3)", "two words",
    ]  # fmt: skip
    done = subprocess.run(
        ["bash", str(KIT / "slurm.sh"), *command],
        env=allocation(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "did two words\n"), done.stderr


def test_a_slurm_job_whose_ray_does_not_start_fails(tmp_path: Path) -> None:
    """`ray symmetric-run` itself ends with 0 there."""
    done = subprocess.run(
        ["bash", str(KIT / "slurm.sh"), "true"],
        env=allocation(tmp_path, starts=False), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: Ray did not start on 2 nodes")


def test_a_slurm_job_asks_its_command_to_save(tmp_path: Path) -> None:
    """Slurm signals the script alone; the command's own exit code is the job's."""
    command = [
        sys.executable, "-c",
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved', flush=True) or 5))\n"
        "print('running', flush=True)\ntime.sleep(60)",
    ]  # fmt: skip
    with subprocess.Popen(
        ["bash", str(KIT / "slurm.sh"), *command],
        env=allocation(tmp_path), stdout=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        assert job.stdout is not None
        assert job.stdout.readline() == "running\n"
        began = time.monotonic()
        job.send_signal(signal.SIGUSR1)
        rest = job.stdout.read()
        assert (job.wait(30), rest) == (5, "saved\n")
        assert time.monotonic() - began < 30


PAGES = [KIT / "README.md", KIT / "kuberay" / "README.md"]


def test_files_that_the_pages_commands_name_are_there(tmp_path: Path) -> None:
    """The commands are run, with stand-ins that look for the files they are given."""
    for name in ("docker", "kubectl", "sbatch", "ray"):
        program(
            tmp_path,
            name,
            "import pathlib, sys\n"
            "named = [w for w in sys.argv[1:] if w.startswith('pipelines/cluster/')]\n"
            "assert all(pathlib.Path(w).is_file() for w in named), named\n"
            "print(pathlib.Path(sys.argv[0]).name, *sys.argv[1:])",
        )
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    ran = list[str]()
    for page in PAGES:
        for block in blocks(page, "bash"):
            done = subprocess.run(
                ["bash", "-eu", "-c", block],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            ran += done.stdout.splitlines()
    wanted = [
        words for page in PAGES for block in blocks(page, "bash") for words in commands(block)
    ]
    assert len(ran) == len([words for words in wanted if words[0] not in ("export", "cp")])
