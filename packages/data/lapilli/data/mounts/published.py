"""The archives LLaVA's data is published in, and the images known to be missing.

Addresses are those of LLaVA's README (section Visual Instruction Tuning), of the dataset cards
`liuhaotian/LLaVA-Pretrain` and `liuhaotian/LLaVA-Instruct-150K`, of ICM-Instruct's training notes
and of LLaVA's pull request 1458 (OCR-VQA). Sizes are rounded, as their readers have noted them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lapilli.data.record import Reason, Verdict

__all__ = [
    "ANNOTATIONS",
    "ARCHIVES_BY_FOLDER",
    "HOLES",
    "HUB",
    "OCR_VQA",
    "Hole",
    "PublishedArchive",
    "published",
]

HUB = "https://huggingface.co/datasets"
OCR_VQA = "ocr_vqa/images"
VG = "https://cs.stanford.edu/people/rak248/VG_100K_2"


@dataclass(frozen=True)
class PublishedArchive:
    """An archive that replaces a folder.

    Attributes:
        name: Its path, from the folder above the one that it replaces.
        address: Where it is published.
        gigabytes: Its size, 10**9 bytes.
    """

    name: str
    address: str
    gigabytes: float

    def command(self, folder: str) -> str:
        """The command that gets it to where it is found; `folder` is the data's."""
        place = f"{folder}/{self.name}" if folder else self.name
        folders = f"mkdir -p {folder} && " if folder else ""
        return f"{folders}wget -c -O {place} {self.address}"


# By the last two parts of the folder's path in LLaVA's layout, or by the last alone.
ARCHIVES_BY_FOLDER = {
    "coco/train2017": PublishedArchive(
        "train2017.zip", "http://images.cocodataset.org/zips/train2017.zip", 19.3
    ),
    "gqa/images": PublishedArchive(
        "images.zip", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", 21.8
    ),
    "textvqa/train_images": PublishedArchive(
        "train_val_images.zip",
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
        7.1,
    ),
    "vg/VG_100K": PublishedArchive("images.zip", f"{VG}/images.zip", 9.7),
    "vg/VG_100K_2": PublishedArchive("images2.zip", f"{VG}/images2.zip", 5.5),
    OCR_VQA: PublishedArchive(
        "ocr_vqa_images_llava_v15.zip",
        f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip",
        9.0,
    ),
    "LLaVA-Pretrain/images": PublishedArchive(
        "images.zip", f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip", 27.4
    ),
    "sexy_check_all": PublishedArchive(
        "icm-instruct-train.zip",
        f"{HUB}/wumengyangok/ICM-Instruct/resolve/main/icm-instruct-train.zip",
        0.0,
    ),
}

# Annotation file to its address.
ANNOTATIONS = {
    "blip_laion_cc_sbu_558k.json": (
        f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json"
    ),
    "llava_v1_5_mix665k.json": (
        f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json"
    ),
    "detail_23k.json": f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/detail_23k.json",
    "complex_reasoning_77k.json": (
        f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/complex_reasoning_77k.json"
    ),
}


def published(folder: str) -> PublishedArchive | None:
    """The archive that a folder of the published layout comes in, by the end of its path."""
    parts = folder.split("/")
    return ARCHIVES_BY_FOLDER.get("/".join(parts[-2:])) or ARCHIVES_BY_FOLDER.get(parts[-1])


@dataclass(frozen=True)
class Hole:
    """Images that are missing for everybody, by folder, reason and part of the detail.

    Attributes:
        name: What they are.
        folder: Where their keys lie.
        reason: What is wrong with them.
        published: How many there are in the data as published.
        remedy: Who has counted them, and what to do.
        detail: A part of the verdict's detail, where the reason alone does not tell.
    """

    name: str
    folder: str
    reason: Reason
    published: int
    remedy: str
    detail: str = ""

    def holds(self, key: str, verdict: Verdict) -> bool:
        """Whether a record with this image and verdict is one of them.

        Where the whole folder is missing, none is: it has not been got.
        """
        mine = verdict.reason == self.reason and self.detail in verdict.detail
        mine = mine and not verdict.detail.startswith("no folder ")
        return mine and f"/{self.folder}" in f"/{key}"


# A hole is recognised by folder and reason, not by a list of names.
HOLES = (
    Hole(
        name="OCR-VQA images whose addresses are dead",
        folder="ocr_vqa/images/",
        reason=Reason.IMAGE_MISSING,
        published=355,
        remedy="355 of its 80,000 records, LLaVA issue 1618; a full set is published: "
        + ARCHIVES_BY_FOLDER[OCR_VQA].address,
    ),
    Hole(
        name="Visual Genome images that are empty files",
        folder="vg/VG_100K_2/",
        reason=Reason.IMAGE_UNDECODABLE,
        published=170,
        remedy="170 files of images2.zip, LLaVA issue 601; those looked up there are not in the "
        "665K file",
        detail="an empty file",
    ),
)
