"""How each public data set lays out its rows: which column is what, and which task its kinds of edit belong to.

A kind of edit that has no rule here and none in the import's own `tasks` table is listed, never guessed. Background and
composed edits are left out on purpose: whether they are local or global is the user's decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CAPTION = "caption"  # the kind of a picture with a caption and no source
LOCAL, GLOBAL, DRAW = "local_edit", "global_edit", "t2i"


@dataclass(frozen=True)
class Layout:
    """One data set's columns.

    Attributes:
        name: as the command line calls it.
        reads: what holds the rows: Parquet files, folders of pictures, or tar files.
        columns: for each of id, prompt, source, target and kind the columns it may have, the first that is there
            counts. Ids must be unique over all files; where there is none the content makes one. `kind` is the kind of
            edit; without one every row is of the kind "(none)".
        carried: columns kept in the provenance where they are there: scores, licences, safety.
        rules: kind of edit -> task.
        kind_from_file: the file's name tells the kind (`remove_part3.parquet`).
        pairs: whether rows without a source are refused.
        numbered: whether every row has an id; one without is damaged.
        about: where the layout is described.
    """

    name: str
    reads: Literal["parquet", "folder", "tar"]
    columns: dict[str, tuple[str, ...]]
    carried: tuple[str, ...] = ()
    rules: dict[str, str] = field(default_factory=dict)
    kind_from_file: bool = False
    pairs: bool = True
    numbered: bool = False
    about: str = ""


# Names that columns about licence and safety have across data sets.
COMMON = ("license", "licence", "nsfw", "punsafe", "safety", "safety_score", "aesthetic_score", "source_url", "url")

_LAYOUTS = (
    Layout(
        "omniedit",
        "parquet",
        {
            "id": ("omni_edit_id",),
            "kind": ("task",),
            "prompt": ("edited_prompt_list",),
            "source": ("src_img",),
            "target": ("edited_img",),
        },
        carried=("sc_score_1", "sc_score_2", "pq_score", "o_score"),
        rules={
            "swap": LOCAL,
            "removal": LOCAL,
            "addition": LOCAL,
            "attribute_modification": LOCAL,
            "style": GLOBAL,
            "env": GLOBAL,
        },
        numbered=True,
        about="TIGER-Lab/OmniEdit-Filtered-1.2M",
    ),
    Layout(
        "ultraedit",
        "parquet",
        {
            "id": (),
            "kind": ("edit_type", "edit_task", "task"),
            "prompt": ("edit_prompt",),
            "source": ("source_image",),
            "target": ("edited_image",),
        },
        carried=(
            "clip_sim_source",
            "clip_sim_target",
            "clip_sim_dir",
            "clip_sim_image",
            "dinov2_sim",
            "ssim",
            "source_caption",
            "target_caption",
        ),
        rules={"add": LOCAL, "change local": LOCAL, "change color": LOCAL, "replace": LOCAL, "change global": GLOBAL},
        about="BleachNick/UltraEdit",
    ),
    Layout(
        "magicbrush",
        "parquet",
        {"id": (), "kind": (), "prompt": ("instruction",), "source": ("source_img",), "target": ("target_img",)},
        carried=("img_id", "turn_index"),
        about="osunlp/MagicBrush",
    ),
    Layout(
        "instructpix2pix",
        "parquet",
        {
            "id": (),
            "kind": (),
            "prompt": ("edit_prompt",),
            "source": ("original_image", "input_image"),
            "target": ("edited_image",),
        },
        carried=("original_prompt", "edited_prompt"),
        about="timbrooks/instructpix2pix-clip-filtered",
    ),
    Layout(
        "imgedit",
        "parquet",
        {
            "id": (),
            "kind": ("edit_type",),
            "prompt": ("prompt",),
            "source": ("input_images",),
            "target": ("output_images",),
        },
        carried=("score",),
        rules={
            "add": LOCAL,
            "remove": LOCAL,
            "replace": LOCAL,
            "adjust": LOCAL,
            "style_transfer": GLOBAL,
            "style": GLOBAL,
        },
        kind_from_file=True,
        about="sysuyy/ImgEdit",
    ),
    Layout(
        "folder",
        "folder",
        {
            "id": ("id",),
            "kind": ("kind", "edit_type", "task"),
            "prompt": ("prompt", "caption", "text"),
            "source": ("source",),
            "target": ("target", "file_name"),
        },
        rules={CAPTION: DRAW},
        pairs=False,
        about="pictures with captions beside them, or a metadata.jsonl as in datasets' imagefolder",
    ),
    Layout(
        "webdataset",
        "tar",
        {
            "id": (),
            "kind": ("kind", "edit_type", "task"),
            "prompt": ("edited_prompt_list", "instruction", "edit_prompt", "prompt", "caption", "text", "txt"),
            "source": ("src_img", "source_image", "source_img", "source", "input", "original_image"),
            "target": (
                "edited_img",
                "edited_image",
                "target_image",
                "target_img",
                "target",
                "output",
                "jpg",
                "jpeg",
                "png",
                "webp",
            ),
        },
        carried=("__key__", "id", "sc_score_1", "sc_score_2", "pq_score", "o_score"),
        rules={CAPTION: DRAW},
        pairs=False,
        about="tar shards of files that share a stem, as WebDataset writes them",
    ),
)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
