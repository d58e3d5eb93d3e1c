"""Start from earlier runs: find their chain, compare it, and load it in order.

A run's checkpoint holds what it trained. What it started from is put together again whenever it is
opened: base weights, then what each earlier run of the chain trained, adapters merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.data.io.access import exists, is_file
from lapilli.model.config import ModelConfig
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.interop.foreign import has_language, load_foreign
from lapilli.model.interop.weights import low_rank
from lapilli.model.parts.added_rows import ADDED, source_rows, table_names
from lapilli.model.parts.pretrained import Loading, whole
from lapilli.model.parts.quantized import Quantization, quantized_layers, round_trip
from lapilli.model.parts.qwen1 import first_of_fused
from lapilli.model.parts.trainable import base_name, is_adapter, trainable_parameters
from lapilli.model.vlm import AUX_PARTS, DTYPES, VisionLanguageModel, build_model
from lapilli.train.checkpoint.at_hand import local_model, local_run
from lapilli.train.checkpoint.find import Checkpoint, find_checkpoints, newest_weights
from lapilli.train.checkpoint.frozen import check_frozen, source_digests
from lapilli.train.checkpoint.layout import steps_in
from lapilli.train.checkpoint.parts import Saved, open_saved
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.names import FOLDER, MILESTONES, STATE

__all__ = ["Built", "Chain", "build_on", "find_chain", "keeps_language", "recorded"]

MOST_STAGES = 100  # runs on top of each other; more are a circle
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Chain:
    """The runs and foreign weights that are loaded over a model's base weights.

    Attributes:
        foreign: Weights of another project that the first run started from, or this one does.
        stages: A checkpoint of each earlier run, the first one first.
        is_new: Whether the run that is built has no checkpoint yet: what it starts from must then
            have learnt beside the weights there are.
    """

    foreign: Path | None = None
    stages: tuple[Checkpoint, ...] = ()
    is_new: bool = True

    @property
    def start(self) -> Checkpoint | None:
        """The run that this one is initialized from directly."""
        return self.stages[-1] if self.stages else None


@dataclass(frozen=True)
class Built:
    """A model at step 0 of its run.

    Attributes:
        model: The model.
        start: The checkpoint of the run it starts from, if there is one.
        frozen: Digests of the base weights that are below it and that no run of the chain nor this
            one trains (`lapilli.train.checkpoint.frozen`).
    """

    model: VisionLanguageModel
    start: Checkpoint | None
    frozen: dict[str, str]


def recorded(run: Path) -> CheckpointState | None:
    """The state of a run's newest checkpoint; all name the same start. None without any."""
    found = find_checkpoints(run, hashed=False)
    return found[-1].state if found else None


def find_chain(init_from: str, wanted: str = "", *, by: object = "") -> Chain:
    """Follow `init_from` from run to run.

    Args:
        init_from: Folder or address of the run that comes before, or of another project's weights.
        wanted: The weights that were started from (`start` of what is `recorded`); empty takes the
            newest checkpoint's.
        by: The run that starts from it, for a message.

    Raises:
        TrainError: A run of the chain is gone, or no longer has what was started from.
    """
    foreign, stages, is_new, place = None, list[Checkpoint](), not wanted, init_from
    while place:
        run = local_run(place, "init_from", wanted)
        found = _find_stage(run, wanted, by)
        if found is None:
            foreign = run
            break
        stages.insert(0, found)
        before = found.state.settings(found.path / STATE)
        by, place, wanted = place, before.init_from, found.state.start
        if len(stages) > MOST_STAGES:
            raise TrainError(f"init_from: {init_from} starts from more than {MOST_STAGES} runs")
    return Chain(foreign, tuple(stages), is_new=is_new)


def _find_stage(run: Path, wanted: str, by: object) -> Checkpoint | None:
    """The checkpoint of a run that was started from; None for what may be another project's."""
    if not wanted:
        return newest_weights(run)
    paths = [run, *(p for folder in (FOLDER, MILESTONES) for p in steps_in(run / folder))]
    for path in reversed(paths):
        found = newest_weights(path) if is_file(path / STATE) else None
        if found and found.state.weights_id == wanted:
            return found
    newest = newest_weights(run)
    has = f"has others now (step {newest.step})" if newest else "has no whole checkpoint any more"
    raise TrainError(
        f"init_from: {by or 'the run'} started from weights of {run} (SHA-256 {wanted[:12]}), "
        f"which {has}; put them back, or start another run"
    )


def keeps_language(run: Path) -> bool:
    """Whether the language model below a run's own training is the one its config names.

    It is not after an earlier run that trained it, nor after a start from others' whole weights.

    Raises:
        TrainError: A run of the chain is gone.
    """
    state = recorded(run)
    if state is None:
        raise TrainError(f"{run}: no whole checkpoint; run train again to resume")
    chain = find_chain(state.settings(run).init_from, state.start, by=run)
    if chain.foreign is not None and has_language(chain.foreign):
        return False
    with ExitStack() as files:
        stages = [_Stage.open(found, files) for found in chain.stages]
        names = [name for stage in stages for name in (*stage.whole, *stage.layers)]
        rows = [stage.rows("embedding") for stage in stages]
    return not any(name.startswith("language.") for name in names) and not any(
        found is not None for found in rows
    )


def build_on(
    config: ModelConfig,
    chain: Chain,
    loading: Callable[[], Any] | Loading = whole,
) -> Built:
    """Build a model and load what its run is initialized from.

    Args:
        config: What the model is made of.
        chain: What comes before it.
        loading: Stands around the reading of pretrained weights; a worker gives
            `engine.loading_of`.

    Raises:
        ModelError, TrainError: A part that cannot be built, or a start that does not fit.
    """
    config = local_model(config)
    digests: dict[str, str] = {}
    replaced: set[str] = set()

    def prepare(model: VisionLanguageModel) -> None:
        if chain.foreign is not None:
            _load_foreign(chain.foreign, model)
        with ExitStack() as files:
            stages = [_Stage.open(found, files) for found in chain.stages]
            for stage in reversed(stages):  # the last has the largest vocabulary
                stage.check(model)
                replaced.update(stage.whole)
            compares = chain.is_new and chain.start is not None
            learns_whole = () if config.lora or compares else config.trainable
            digests.update(source_digests(model, learns_whole))
            if compares:
                _check_start(chain, digests, replaced, model)
            _put(stages, model)

    # weights of another project replace all that is read, and are not put in part by part
    model = build_model(config, loading if chain.foreign is None else whole, prepare)
    learns = {base_name(name) for name in trainable_parameters(model)}
    frozen = {name: d for name, d in digests.items() if name not in learns | replaced}
    return Built(model, chain.start, frozen)


def _load_foreign(path: Path, model: VisionLanguageModel) -> None:
    if not load_foreign(path, model):
        what = "has no whole checkpoint" if exists(path) else "is no folder or file on this machine"
        raise TrainError(
            f"init_from: {path} {what}; expected the output of a training run, or a checkpoint of "
            "LLaVA's or of transformers' LlavaForConditionalGeneration, whole or as adapters"
        )


def _check_start(
    chain: Chain, digests: Mapping[str, str], trained: set[str], model: VisionLanguageModel
) -> None:
    """Require the frozen weights that the initial run was trained beside, and no others."""
    assert chain.start is not None
    state, path = chain.start.state, chain.start.path
    check_frozen(state, digests, run=path, what="init_from")
    new = [part for part in AUX_PARTS if part in model.config.trainable]  # and learns from here on
    unknown = sorted(
        name
        for name in digests.keys() - {*state.frozen["weights"]} - trained
        if name.partition(".")[0] not in new
    )
    if unknown:
        shape = shape_of(dict(model.named_parameters())[unknown[0]])
        raise TrainError(
            f"init_from: {path} has no {unknown[0]}, which this model has with shape {shape}; "
            "expected the same model config"
        )


@dataclass(frozen=True)
class _Stage:
    """The changes of one earlier run to the weights it started from.

    Attributes:
        path: Its checkpoint.
        saved: Its open weights, of which one tensor is read at a time.
        model: The `model` of its config.
        whole: Names of tensors that it trained whole, as the file has them, by plain name.
        layers: Layers that it has adapters for.
    """

    path: Path
    saved: Saved
    model: ModelConfig
    whole: Mapping[str, str] = field(default_factory=dict[str, str])
    layers: frozenset[str] = frozenset()

    @staticmethod
    def open(found: Checkpoint, files: ExitStack) -> _Stage:
        """Open its weights for as long as `files`."""
        saved = files.enter_context(open_saved(found))
        names = saved.shapes
        return _Stage(
            path=found.path,
            saved=saved,
            model=found.state.settings(found.path / STATE).model,
            whole={base_name(name): name for name in names if not is_adapter(name)},
            layers=frozenset(name.removesuffix(B) for name in names if name.endswith(B)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it held frozen weights in."""
        return DTYPES[self.model.dtype]

    @property
    def is_quantized(self) -> bool:
        """Whether it held linear layers in 4 bits."""
        return self.model.language.quantize != "none"

    @property
    def scale(self) -> float:
        """What its adapters' products are multiplied by."""
        if self.model.lora is None:
            raise TrainError(f"init_from: {self.path} has adapters, and no lora in its settings")
        return self.model.lora.alpha / self.model.lora.rank

    def _input(self, layer: str) -> str:
        """The name of a layer's A: a shared one is saved once, under the first layer's name."""
        own = layer + A
        return own if own in self.saved.shapes else first_of_fused(layer) + A

    def rows(self, kind: str) -> Tensor | None:
        """The added rows that it trained beside a frozen table."""
        name = f"language.{ADDED}.{kind}"  # a tied head is no table, one that stayed has no rows
        return self.saved.whole(name) if name in self.saved.shapes else None

    def check(self, model: VisionLanguageModel) -> None:
        """Require that the model has every weight of this stage.

        Raises:
            TrainError: Names the first that has none.
        """
        parameters = {name: shape_of(value) for name, value in model.named_parameters()}
        tables = _tables(model)
        for plain, name in self.whole.items():
            if plain.startswith("predictors.") and not model.config.aux.heads:
                continue  # a stage that predicts nothing leaves its predecessor's behind
            self._check(plain, self.saved.shapes[name], parameters.get(plain), plain in tables)
        for layer in sorted(self.layers):
            shapes = self.saved.shapes
            made = shapes[layer + B][0], shapes[self._input(layer)][1]
            there = parameters.get(f"{layer}.weight")
            if there is not None and _is_transposed(model, f"{layer}.weight"):
                made = made[::-1]
            self._check(f"{layer}.weight", made, there)
        rows = self.rows("embedding")
        if rows is not None:
            count = source_rows(model.language) + len(rows), rows.shape[1]
            name = next(name for name, kind in tables.items() if kind == "embedding")
            self._check(name, count, parameters[name], True)

    def _check(
        self,
        name: str,
        shape: tuple[int, ...],
        there: tuple[int, ...] | None,
        is_table: bool = False,
    ) -> None:
        if shape == there:
            return
        if is_table and there is not None and shape[1:] == there[1:]:
            if shape[0] < there[0]:
                return  # a vocabulary that has grown since
            raise TrainError(
                f"init_from: {self.path} was trained with a vocabulary of {shape[0]} rows, this "
                f"model has {there[0]}; set model.language.vocab_size: {shape[0]} or more"
            )
        raise TrainError(
            f"init_from: {self.path} holds {name} of shape {shape}, this model "
            f"{there or 'no such parameter'}; expected the same model config"
        )

    def apply(self, name: str, value: Tensor, place: _Place) -> Tensor:
        """A weight after this run, fp32."""
        if name in self.whole:
            found = self.saved.whole(self.whole[name])
            missing = len(value) - len(found) if place.table else 0
            return torch.cat([found, found.mean(0).expand(missing, *found.shape[1:])])
        layer = name.removesuffix(".weight")
        if place.is_linear and self.is_quantized and (layer in self.layers or place.is_whole):
            turned = value.T if place.is_transposed else value
            held = round_trip(turned, self.dtype, Quantization.of(self.model.language))
            value = (held.T if place.is_transposed else held).float()
        if layer in self.layers:
            pair = self.saved.whole(self._input(layer)), self.saved.whole(layer + B)
            scale = self.scale
            made = low_rank(*pair, scale, is_transposed=place.is_transposed)
            value = value.to(self.dtype).float() + made
        rows = self.rows(place.table) if place.table else None
        if rows is not None:
            first = place.source_rows
            value = torch.cat([value[:first], rows, value[first + len(rows) :]])
        return value

    def touches(self, name: str, place: _Place) -> bool:
        """Whether this run changed a weight."""
        is_layer = name.removesuffix(".weight") in self.layers
        is_requantized = place.is_linear and self.is_quantized and place.is_whole
        has_rows = bool(place.table) and self.rows("embedding") is not None
        return name in self.whole or is_layer or is_requantized or has_rows


@dataclass(frozen=True)
class _Place:
    """Where in the model a weight is.

    Attributes:
        table: `embedding` or `head` for a table of the vocabulary, else empty.
        source_rows: Rows of the vocabulary that came with the weights.
        is_transposed: Whether the layer holds it as [in, out].
        is_linear: Whether it is one of the layers that `language.quantize` puts in 4 bits.
        is_whole: Whether this model holds such layers in whole numbers.
    """

    table: str
    source_rows: int
    is_transposed: bool
    is_linear: bool
    is_whole: bool


@torch.no_grad()
def _put(stages: Sequence[_Stage], model: VisionLanguageModel) -> None:
    """Load the stages' trained weights into a model, one at a time.

    A weight passes through all of them in fp32 and is rounded once, to the type it is held in.
    Collective where ZeRO-3 has shared it out.
    """
    if not stages:
        return
    tables, linear = (
        _tables(model),
        {f"language.{n}.weight" for n in quantized_layers(model.language)},
    )
    is_whole = model.config.language.quantize == "none"
    for name, parameter in model.named_parameters():
        place = _Place(
            table=tables.get(name, ""),
            source_rows=source_rows(model.language),
            is_transposed=_is_transposed(model, name),
            is_linear=name in linear,
            is_whole=is_whole,
        )
        if not any(stage.touches(name, place) for stage in stages):
            continue
        with engine.gathered([parameter], changes=True):
            value = parameter.detach().cpu().float()
            for stage in stages:
                value = stage.apply(name, value, place)
            parameter.copy_(value)


def _tables(model: VisionLanguageModel) -> dict[str, str]:
    return {f"language.{name}": kind for name, kind in table_names(model.language).items()}


def _is_transposed(model: nn.Module, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D  # every command imports this module

    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
