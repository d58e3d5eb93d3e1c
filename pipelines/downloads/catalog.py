"""What a recipe's sources need, where it is published, and under which terms. Pure but for looking.

Addresses are those of `lapilli.data.mounts.published` and of ALLaVA's download scripts. A licence
is what the publisher's page says; read it there before the data is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lapilli.data.config import SourceConfig
from lapilli.data.io.file_kinds import Expected
from lapilli.data.io.filesystems import is_remote
from lapilli.data.mounts.published import (
    ANNOTATIONS,
    ARCHIVES_BY_FOLDER,
    HUB,
    OCR_VQA,
    PublishedArchive,
)

__all__ = ["Needed", "needed"]

HUGGING_FACE = "https://huggingface.co"
ALLAVA = f"{HUB}/FreedomIntelligence/ALLaVA-4V"
LLAVA_FOLDERS = (
    "coco/train2017", "gqa/images", OCR_VQA, "textvqa/train_images", "vg/VG_100K",
    "vg/VG_100K_2",
)  # fmt: skip
# The folders that an annotation file's images are in, from the source's `images`.
FOLDERS: dict[str, tuple[str, ...]] = {
    "blip_laion_cc_sbu_558k.json": ("LLaVA-Pretrain/images",),
    "llava_v1_5_mix665k.json": LLAVA_FOLDERS,
    "detail_23k.json": ("coco/train2017",),
    "complex_reasoning_77k.json": ("coco/train2017",),
    "icm_llava_train.json": ("sexy_check_all",),
    "icm_llava_train_mix.json": ("sexy_check_all", *LLAVA_FOLDERS),
}
# Where an annotation file comes inside an archive of images.
INSIDE = {"icm_llava_train.json": "sexy_check_all"}
LICENCES = {
    "blip_laion_cc_sbu_558k.json": "terms of LAION, CC-3M and SBU, and of BLIP",
    "llava_v1_5_mix665k.json": "CC BY 4.0, and OpenAI's terms of use",
    "detail_23k.json": "CC BY 4.0, and OpenAI's terms of use",
    "complex_reasoning_77k.json": "CC BY 4.0, and OpenAI's terms of use",
    "coco/train2017": "Flickr's terms of use",
    "gqa/images": "CC BY 4.0",
    "textvqa/train_images": "CC BY 2.0 (Open Images)",
    "vg/VG_100K": "CC BY 4.0",
    "vg/VG_100K_2": "CC BY 4.0",
}
BY_HAND = {
    "caption_train_annotations_20170902.json": (
        "https://tianchi.aliyun.com/dataset/145781, where one signs in; unpack it into the root"
    ),
    "image_map_b.json": "written by Basic-VLM's process_image.py from its own files",
    "captions_b.json": "written by Basic-VLM's process_image.py from its own files",
    "instruction_train_all.json": "written by vlm_training's prepare_instruction_data.py",
    "icm_llava_train_mix.json": "`jq -s add` of icm_llava_train.json and llava_v1_5_mix665k.json; "
    "or take the recipe icm_instruct/msft_data, which needs no such file",
}


@dataclass(frozen=True)
class Needed:
    """A file that a recipe needs.

    Attributes:
        place: Where it goes, from the root.
        address: Where it is published; empty for what is got by hand.
        kind: What it is.
        gigabytes: About its size, 10**9 bytes; 0 where nobody has noted it.
        licence: The publisher's terms, or where to read them.
        stands_for: Folders or files, from the root, any of which is as good.
        how: What is to be done by hand: instead of getting it, or behind.
        members: Files in the archive that are wanted beside it, each in the root.
    """

    place: str
    address: str
    kind: Expected
    gigabytes: float = 0.0
    licence: str = ""
    stands_for: tuple[str, ...] = ()
    how: str = ""
    members: tuple[str, ...] = ()

    def is_there(self, root: Path) -> bool:
        """Whether it, or what is as good, is in the root; an empty folder is not."""
        if not all((root / name).is_file() for name in self.members):
            return False
        if (root / self.place).is_file():
            return True
        for name in self.stands_for:
            path = root / name
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                return True
        return False


def needed(
    sources: list[SourceConfig], hub: str = HUGGING_FACE, *, with_ocr_vqa: bool = True
) -> list[Needed]:
    """What the sources need, each once, annotations first.

    Args:
        sources: A recipe's.
        hub: Address in place of Hugging Face's, a mirror with the same paths.
        with_ocr_vqa: Whether OCR-VQA's images are taken from the archive that is published.
    """
    found: dict[str, Needed] = {}
    for source in sources:
        for pattern in source.patterns:
            if not is_remote(pattern):
                for one in _of_annotations(source, pattern):
                    found.setdefault(one.place, one)
    for source in sources:
        for pattern in source.patterns:
            name = PurePosixPath(pattern).name
            for folder in FOLDERS.get(name, ()):
                if (folder != OCR_VQA or with_ocr_vqa) and not is_remote(source.images):
                    one = _archive(source, folder)
                    found.setdefault(one.place, one)
    in_order = sorted(found.values(), key=lambda one: one.kind != "annotations")
    return [replace(one, address=one.address.replace(HUGGING_FACE, hub)) for one in in_order]


def _of_annotations(source: SourceConfig, pattern: str) -> list[Needed]:
    name = PurePosixPath(pattern).name
    if name.startswith("ALLaVA-Caption-") and name.endswith("-4V.json"):
        return _allava(pattern, name)
    if name in INSIDE:
        return []  # in the archive of its images
    if name in ANNOTATIONS:
        return [
            Needed(
                place=pattern,
                address=ANNOTATIONS[name],
                kind="annotations",
                licence=LICENCES.get(name, ""),
            )
        ]
    how = BY_HAND.get(name, f"not among the files that are known; put it to {pattern}")
    del source
    return [Needed(place=pattern, address="", kind="annotations", how=how)]


def _archive(source: SourceConfig, folder: str) -> Needed:
    """The archive that is read in the place of a folder."""
    published = ARCHIVES_BY_FOLDER[folder]
    own = _images_folder(source, folder)
    above = str(PurePosixPath(own).parent)
    members = tuple(name for name, inside in INSIDE.items() if inside == folder)
    return Needed(
        place=_joined(above, published.name),
        address=published.address,
        kind="archive",
        gigabytes=published.gigabytes,
        licence=LICENCES.get(folder, _page(published)),
        stands_for=(own, *_aliased(source, own)),
        members=members,
    )


def _images_folder(source: SourceConfig, folder: str) -> str:
    """Where the recipe has the folder, from the root."""
    if folder == "LLaVA-Pretrain/images" or (
        folder == "coco/train2017" and PurePosixPath(source.images).name == "train2017"
    ):
        return source.images  # the recipe names it itself
    return _joined(source.images, folder)


def _aliased(source: SourceConfig, folder: str) -> list[str]:
    return [
        folder.replace(f"{name}/", f"{other}/", 1)
        for name, other in source.aliases.items()
        if folder.startswith(f"{name}/") or f"/{name}/" in folder
    ]


def _allava(pattern: str, name: str) -> list[Needed]:
    """ALLaVA's captions and images of one part."""
    folder = str(PurePosixPath(pattern).parent)
    part = "allava_laion" if "LAION" in name else "allava_vflan"
    licence = f"see {ALLAVA}"
    images = _joined(folder, "images")
    captions = Needed(
        place=pattern,
        address=f"{ALLAVA}/resolve/main/{part}/{name}",
        kind="annotations",
        licence=licence,
    )
    if part == "allava_vflan":
        return [
            captions,
            Needed(
                place=_joined(folder, "images.zip"),
                address=f"{HUB}/Vision-Flan/vision-flan_191-task_1k/resolve/main/"
                "image_191-task_1k.zip",
                kind="archive",
                licence=licence,
                stands_for=(images,),
            ),
        ]
    chunks = [
        Needed(
            place=_joined(folder, f"image_chunks/images_{number}.zip"),
            address=f"{ALLAVA}/resolve/main/{part}/image_chunks/images_{number}.zip",
            kind="archive",
            licence=licence,
            stands_for=(images,),
            how=f"unzip -j {_joined(folder, f'image_chunks/images_{number}.zip')} -d {images}",
        )
        for number in range(10)
    ]
    return [captions, *chunks]


def _page(published: PublishedArchive) -> str:
    return f"see {published.address.partition('/resolve/')[0]}"


def _joined(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)
