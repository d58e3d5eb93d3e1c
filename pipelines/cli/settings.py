"""Settings of the verbs that use a model, in a module that loads none, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from lapilli.data.errors import DataError
from lapilli.model.config import Decoding
from lapilli.train.config import DeviceChoice
from pipelines.cli.trust_flags import TrustFlags

__all__ = [
    "EvaluateConfig",
    "GenerateConfig",
    "ProbeConfig",
    "QuickstartConfig",
    "ScoreConfig",
    "ScoringFlags",
    "ServeConfig",
    "ServeLimits",
]


@dataclass(frozen=True)
class QuickstartConfig:
    """Length, output and success criteria of the quickstart.

    Attributes:
        output: Folder for everything the quickstart makes; one process at a time.
        epochs: Passes over the data in each stage; 0 takes the recipes'.
        questions: What the model is asked: the `test` questions, or, for choosing settings, those
            of training images that are then held out (`validation`).
        min_accuracy: Exit with 1 if the model answers fewer of the questions right.
        min_gain: Exit with 1 if it gains less by seeing the right images.
        device: `auto` takes GPUs when there are any.
    """

    output: str = "outputs/quickstart"
    epochs: int = 0
    questions: Literal["test", "validation"] = "test"
    min_accuracy: float = 0.9
    min_gain: float = 0.15
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ScoringFlags:
    """How answers are scored and shown.

    Attributes:
        scorers: Names, separated by commas: exact, first_letter, yes_no, vqa, anls, choice, logits.
            Left out, `logits` for answers that have them, else `exact`.
        threshold: Share of the first choice from which it is concluded.
        truth_patterns: A regular expression by choice, `{No: not-sexy|normal}`: an image's file
            name that it matches makes the choice true, one that none matches the only choice
            without a pattern. Left out, the expected answer says it.
        category_pattern: Regular expression; its first group, or what it matches of an image's
            file name, is the category that accuracy is counted by. Left out, the source or the
            category of the truth.
        html: File for a report: scores, confusion, wrong answers with their images.
    """

    scorers: str = ""
    threshold: float = 0.5
    truth_patterns: dict[str, str] = field(default_factory=dict[str, str])
    category_pattern: str = ""
    html: str = ""


@dataclass(frozen=True)
class EvaluateConfig(TrustFlags, ScoringFlags):
    """The model, the dataset of questions and the output of `evaluate`.

    Attributes:
        run: Folder or address of a run, an export or a published model. A published model's
            template and view are taken to be the dataset's.
        dataset: Folder or address of a dataset of questions; each record's own answers are
            expected. Left out, what the run holds out of its own data, or its validation dataset.
        view: The dataset's view; empty for its only one.
        split: Of a dataset with a part held out by its mixture, that part or the rest; `auto` takes
            what is held out, where there is any.
        device: `auto` takes a GPU when there is one, else an HPU, else the CPU.
        shuffle_images: Show each question the images of another record, which measures what the
            model answers without looking.
        output: File for the answers, one JSON object a line, written by one process at a time;
            empty for none.
        template: Conversation template of a published model, by name or file; a dataset of another
            template is then refused.
        num_workers: Ray workers, each with the model on a device of its own. 1 answers in this
            process. The answers are the same on any number.
        batch: Questions at once; workers share whole batches.
        turns: The questions of a record that are asked, each behind the record's own conversation.
        choices: Two or more words of one token each, separated by commas (`Yes,No`): their logits
            are taken where the answer begins, and nothing is decoded.
        lmms_eval: Tasks of lmms-eval, separated by commas, in the place of a dataset; `output` is
            then a folder of results and samples.
        through: How lmms-eval asks: its class for transformers' LLaVA (`hf`, an export `--to hf`),
            or its OpenAI client and a server on this machine (`serve`); `auto` takes `hf` where
            the folder is such an export.
        include_path: Folder of tasks beside lmms-eval's own, as YAML.
        limit: Questions of each task, for a trial; 0 for all.
    """

    run: str
    dataset: str = ""
    view: str = ""
    split: Literal["auto", "train", "held_out"] = "auto"
    device: DeviceChoice = "auto"
    shuffle_images: bool = False
    output: str = ""
    template: str = ""
    num_workers: int = 1
    batch: int = 256
    turns: Literal["first", "last", "all"] = "first"
    choices: str = ""
    lmms_eval: str = ""
    through: Literal["auto", "hf", "serve"] = "auto"
    include_path: str = ""
    limit: int = 0


@dataclass(frozen=True)
class ProbeConfig(TrustFlags):
    """The model, the target and the training of `probe`.

    Attributes:
        run: Folder of a run, an export or a published model. A published model's template and view
            are taken to be the dataset's.
        dataset: Folder of a dataset with `targets`, written with the model's tokenizer, template
            and view. Probes are trained on its images and measured on those that it holds out
            (`mixture.held_out`).
        target: Name of the targets.
        output: Folder for `probe.json`, `probe.csv` and `report.html`, written by one process at a
            time; what an earlier command wrote there is replaced.
        layers: Decoder layers, counted from 1 and separated by commas, or `all`.
        steps: Optimizer steps.
        batch: Images of a step.
        lr: Highest learning rate, after a warm-up of 3 % of the steps and before a cosine to 0.
        samples: Most held-out images that are measured on.
        seed: Decides first weights and order; the same seed gives the same figures.
        view: The dataset's view; empty for its only one.
        template: Conversation template of a published model, by name or file; a dataset of another
            template is then refused.
        device: `auto` takes a GPU when there is one, else an HPU, else the CPU.
    """

    run: str
    dataset: str
    target: str
    output: str
    layers: str = "all"
    steps: int = 1000
    batch: int = 32
    lr: float = 0.001
    samples: int = 1000
    seed: int = 0
    view: str = ""
    template: str = ""
    device: DeviceChoice = "auto"


@dataclass(frozen=True)
class ScoreConfig(ScoringFlags):
    """An answers file, the truth, and what is made of both.

    Attributes:
        answers: JSON lines, a file or an address, as `evaluate`, `generate` or lmms-eval writes
            them.
        truth: What is expected, where the answers file does not say: JSON lines, a JSON list, or
            an object with a list under `annotations`, `data` or `questions`; rows have
            `question_id` and `answer`, `label` or `answers`.
        output: JSON file for the scores; empty for none.
        upload: Form of a benchmark's server: vqav2, gqa, mmbench, seed, vizwiz, mmvet. Needs no
            truth.
        upload_file: File for it.
        questions: All questions of the split, as the benchmark publishes them (JSON, JSON lines,
            or MMBench's .tsv), for the forms that have a row for each.
        dataset: Dataset whose images the report shows, for `evaluate`'s answers.
        view: Its view; empty for its first one.
        split: The part of it that was asked, as `evaluate` takes it.
        images: Folder of the images that the report shows, for `generate`'s answers.
        lmms_eval: Tasks of lmms-eval, separated by commas, that score the answers by their own
            metrics; the file answers each of their questions, by its id.
        include_path: Folder of tasks beside lmms-eval's own, as YAML.
    """

    answers: str
    truth: str = ""
    output: str = ""
    upload: str = ""
    upload_file: str = ""
    questions: str = ""
    dataset: str = ""
    view: str = ""
    split: Literal["auto", "train", "held_out"] = "auto"
    images: str = ""
    lmms_eval: str = ""
    include_path: str = ""


@dataclass(frozen=True)
class GenerateConfig(TrustFlags):
    """The model, the questions and the output of `generate`.

    Attributes:
        model: Folder or address of a run, of an export, or of a published model: LLaVA's layout,
            transformers' LLaVA, or PEFT adapters for either with their base model on this machine.
        template: Conversation template of a published model, by name or file, if its folder does
            not say.
        view: How its images are made square, if its folder does not say: `pad`, `crop`, `stretch`,
            or fields such as `{aspect: pad, fill: [122, 116, 104]}`.
        prefix: Text before each question, such as `用中文回答：`, which Basic-VLM asks with.
        image: An image, or a folder of images of which each is shown with the question.
        question: The question; empty with a caption template. `<image>` in it is the image's place.
        questions: JSONL with `question_id`, `text` and, where there are images, `image` or
            `images`, a file or a list of files each. `<image>` in a text is an image's place;
            without it images come first. Or a list (`.txt`): a line with an image's path, then one
            with its questions, tabs between; each is asked behind the answers before it.
        images: Folder that the images of `questions` are in.
        output: JSONL with `question_id`, `prompt`, `text`, `model_id` to write; empty prints
            answers. Questions that it answers already are not asked again. One process at a time
            writes it.
        batch: Questions at once.
        device: `auto` takes a GPU when there is one, else an HPU, else the CPU.
        decoding: How answers are decoded. With a temperature above 0 the same question, images and
            seed give the same answer, whatever the batch.
    """

    model: str
    template: str = ""
    view: str = ""
    prefix: str = ""
    image: str = ""
    question: str = ""
    questions: str = ""
    images: str = "."
    output: str = ""
    batch: int = 16
    device: DeviceChoice = "auto"
    decoding: Decoding = field(default_factory=Decoding)


@dataclass(frozen=True)
class ServeLimits:
    """Bounds of the server.

    Attributes:
        body_mib: A conversation with its images as base64, in MiB.
        buffered_mib: Of all requests whose images are not prepared yet, in MiB.
        images: Of a conversation.
        turns: Of a conversation.
        pixels: Of an image.
        decode_seconds: Processor time for an image.
        decode_mib: Memory for decoding an image, in MiB.
        waiting: Conversations that are read, wait or are answered; more get 503.
        connections: Open connections; more get 503.
        header_seconds: From a connection's start, or its next request's, to the header's end.
        body_seconds: From there to the body's end.
    """

    body_mib: int = 32
    buffered_mib: int = 128
    images: int = 16
    turns: int = 200
    pixels: int = 50_000_000
    decode_seconds: int = 10
    decode_mib: int = 700
    waiting: int = 64
    connections: int = 256
    header_seconds: float = 10.0
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise DataError(f"limits.{item.name}: {getattr(self, item.name)}; expected above 0")


@dataclass(frozen=True)
class ServeConfig(TrustFlags):
    """The model, address and limits of the server.

    Attributes:
        model: Folder or address of a run, of an export, or of a published model: LLaVA's layout,
            transformers' LLaVA, or PEFT adapters for either with their base model on this machine.
        template: Conversation template of a published model, by name or file, if its folder does
            not say.
        view: How its images are made square, if its folder does not say: `pad`, `crop`, `stretch`,
            or fields such as `{aspect: pad, fill: [122, 116, 104]}`.
        prefix: Text before each question, such as `用中文回答：`, which Basic-VLM asks with.
        host: Address to listen on; another than this machine's own lets the network in.
        port: 0 takes a free one.
        name: What requests call the model; empty for the run's folder and step, or the folder's
            name.
        batch: Answers that are written at once; a question joins between two tokens.
        device: `auto` takes a GPU when there is one, else an HPU, else the CPU.
        decoding: How answers are decoded where a request does not say.
        limits: Bounds on requests.
    """

    model: str
    template: str = ""
    view: str = ""
    prefix: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    name: str = ""
    batch: int = 8
    device: DeviceChoice = "auto"
    decoding: Decoding = field(default_factory=Decoding)
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.batch < 1:
            raise DataError(f"batch: {self.batch}; expected at least 1")
