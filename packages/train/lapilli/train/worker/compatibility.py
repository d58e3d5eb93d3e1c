"""Check that dataset, model and initial checkpoint fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.errors import DataError
from lapilli.data.text.encode import load_tokenizer, tokenizer_facts
from lapilli.data.text.tokenizer_files import has_vocabulary, tokenizer_folder
from lapilli.model.parts.pretrained import Loading, whole
from lapilli.model.vlm import Outline, VisionLanguageModel
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.checkpoint.frozen import check_frozen
from lapilli.train.checkpoint.init_from import Built, Chain, build_on, find_chain, recorded
from lapilli.train.checkpoint.token_ids import extends, keeps_ids
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.dataset_files import other_teachers, training_data

__all__ = [
    "build_run",
    "build_start",
    "check_model",
    "check_start",
    "find_start",
    "open_for",
]


def build_start(
    config: RunConfig, loading: Loading = whole
) -> tuple[VisionLanguageModel, Checkpoint | None]:
    """The model as its run begins, and the checkpoint of the earlier run it starts from.

    `loading` as for `build_run`, which also tells what lies frozen below.

    Raises:
        ModelError, TrainError: A part that cannot be built, or a start that does not fit.
    """
    built = build_run(config, loading)
    return built.model, built.start


def build_run(config: RunConfig, loading: Loading = whole) -> Built:
    """The model as its run begins: on the weights that the run has started from, if it has.

    `loading` stands around the reading of pretrained weights; a worker gives `engine.loading_of`.

    Raises:
        ModelError, TrainError: A part that cannot be built, a start that does not fit, or other
            frozen weights than the run was begun beside.
    """
    run = Path(config.output)
    before = recorded(run)
    chain = _find_chain(config, before)
    built = build_on(config.model, chain, loading)
    if before:
        check_frozen(before, built.frozen, run=run)
    return built


def find_start(config: RunConfig) -> Checkpoint | None:
    """The checkpoint of the earlier run that a run starts from, without reading a weight.

    Raises:
        TrainError: A run of the chain is gone.
    """
    return _find_chain(config, recorded(Path(config.output))).start


def _find_chain(config: RunConfig, before: CheckpointState | None) -> Chain:
    return find_chain(config.init_from, before.start if before else "", by=Path(config.output))


def open_for(
    model: VisionLanguageModel | Outline,
    config: RunConfig,
    on_note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Open a run's dataset as its model sees it, and check that they fit.

    `on_note` is called with a line where there is no tokenizer to compare with.

    Raises:
        DataError: The dataset cannot be opened.
        TrainError: Another image size, token ids the model does not know, another tokenizer than
            the language model's own, or one of its own that cannot be loaded.
    """
    cache, limit = config.cache.folder, config.cache.limit
    dataset_folder(config.dataset, cache, limit)  # of an address: the tokenizer is here, too
    dataset = open_dataset(
        config.dataset,
        view=config.view,
        image_tokens=model.image_tokens,
        max_length=config.max_length,
        truncate=config.truncates,
        cache=cache,
        cache_limit=limit,
    )
    check_model(model, dataset)
    _check_tokenizer(config.model.language.pretrained, dataset, on_note)
    return dataset


def _check_tokenizer(pretrained: str, dataset: Dataset, on_note: Callable[[str], None]) -> None:
    """The shards' ids are the language model's own, if that comes with a tokenizer."""
    if not pretrained:
        return
    try:
        folder = tokenizer_folder(pretrained)
        if not has_vocabulary(folder):
            on_note(
                f"tokenizer: {pretrained} holds weights alone, so that {dataset.path} is compared "
                "in the number of ids and not in the tokenizer"
            )
            return
        loaded = load_tokenizer(pretrained)
        own = tokenizer_facts(loaded)
    except DataError as error:
        raise TrainError(
            f"tokenizer: that of model.language.pretrained cannot be compared with the one "
            f"{dataset.path} was made with: {error}"
        ) from None
    there = dataset.manifest.tokenizer
    if own.fingerprint == there["fingerprint"]:
        return
    if not extends(dataset.tokenizer, loaded):  # tokens may be added
        raise TrainError(
            f"tokenizer: {dataset.path} was made with {there['name']} (fingerprint "
            f"{there['fingerprint'][:12]}), {pretrained} has another ({own.fingerprint[:12]}); "
            f"preprocess with --tokenizer {pretrained}"
        )


def check_model(model: VisionLanguageModel | Outline, dataset: Dataset) -> None:
    """Compare the manifest's facts with the model's.

    Raises:
        TrainError: Names both values and the remedy.
    """
    if dataset.image_size != model.vision.image_size:
        raise TrainError(
            f"view: {dataset.view} has images of {dataset.image_size} px, the tower takes "
            f"{model.vision.image_size}; choose another view or preprocess one with that size"
        )
    tokenizer = dataset.manifest.tokenizer
    if tokenizer["vocab_size"] > model.vocab_size:
        raise TrainError(
            f"tokenizer: {dataset.path} was made with {tokenizer['name']} "
            f"({tokenizer['vocab_size']} ids), the language model knows {model.vocab_size}; "
            "preprocess with the language model's own tokenizer, or set "
            f"model.language.vocab_size: {tokenizer['vocab_size']} if it has tokens added"
        )


def check_start(
    start: Checkpoint | None,
    dataset: Dataset,
    on_note: Callable[[str], None] = lambda line: None,
) -> None:
    """Reject an initial checkpoint trained with another tokenizer; added tokens are allowed.

    Another template is one, as LLaVA's second stage has it; `on_note` is called with a line where
    it has the same name, and for a teacher that is not the one whose features it has learnt.

    Raises:
        TrainError: Names both tokenizers' fingerprints.
    """
    if start is None:
        return
    before = start.state.data
    for name in ("template", "tokenizer"):
        if not getattr(before, name):
            raise TrainError(
                f"init_from: {start.path} does not say what {name} it was trained with; name "
                "another run"
            )
    here, there = dataset.manifest.tokenizer["fingerprint"], before.tokenizer
    if here != there and not keeps_ids(start, dataset.tokenizer):
        raise TrainError(
            f"init_from: {start.path} was trained with another tokenizer (fingerprint "
            f"{there[:12]}) than {dataset.path} was made with ({here[:12]}); preprocess with the "
            "same tokenizer, or with that one and tokens added"
        )
    mine = training_data(dataset)
    learnt = start.state.settings(start.path).model.aux.heads
    for line in other_teachers(mine, before, dict.fromkeys(task for task, _ in learnt)):
        on_note(f"init_from: {dataset.path} has {line}, which {start.path} has learnt to predict")
    if mine.template_name == before.template_name and mine.template != before.template:
        on_note(
            f"init_from: {start.path} was trained with another template named "
            f"{mine.template_name} (fingerprint {before.template[:12]}, of {dataset.path} "
            f"{mine.template[:12]}); this run takes the dataset's"
        )
