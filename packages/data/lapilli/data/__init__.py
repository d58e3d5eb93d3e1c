"""lapilli.data: LLaVA mixtures to shards, shards to batches. Imports neither torch nor ray."""

from lapilli.data.batches.collate import Batch, BatchShape, choose_buckets, collate, collate_rows
from lapilli.data.batches.sampler import EpochPlan, assign, plan_epoch
from lapilli.data.batches.torch_loader import torch_loader
from lapilli.data.batches.tree_plan import TreeLimits, TreePlan, assign_rows, plan_trees
from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, MixtureConfig, SourceConfig
from lapilli.data.dataset.dataset import Dataset, Sample, open_dataset
from lapilli.data.dataset.prefixes import SharedPrefixes, shared_prefixes
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import Entry, ImagePart, Part, Reason, Record, TextPart, Turn, Verdict
from lapilli.data.shards.manifest import Manifest, read_manifest
from lapilli.data.sources import Source
from lapilli.data.text.encode import encode, load_tokenizer
from lapilli.data.text.templates import TEMPLATES, Template, get_template
from lapilli.data.text.tokenizer_files import train_tokenizer

__all__ = [
    "TEMPLATES",
    "Batch",
    "BatchShape",
    "BuildConfig",
    "BuildPlan",
    "BuildReport",
    "DataError",
    "Dataset",
    "Entry",
    "EpochPlan",
    "ImagePart",
    "ImageSpec",
    "Manifest",
    "MixtureConfig",
    "Part",
    "Reason",
    "Record",
    "Sample",
    "SharedPrefixes",
    "Source",
    "SourceConfig",
    "Template",
    "TextPart",
    "TreeLimits",
    "TreePlan",
    "Turn",
    "Verdict",
    "assign",
    "assign_rows",
    "build",
    "choose_buckets",
    "collate",
    "collate_rows",
    "encode",
    "get_template",
    "load_tokenizer",
    "open_dataset",
    "plan_build",
    "plan_epoch",
    "plan_trees",
    "prepare",
    "read_manifest",
    "run_here",
    "shared_prefixes",
    "torch_loader",
    "train_tokenizer",
]
