"""CLIPScore, FID and KID of an export or of any pictures: what is reported beside GenEval.

    t2i evaluate EXPORT --prompts prompts.txt --reference coco.npz
    t2i evaluate PICTURES --reference REAL_PICTURES

Pictures are decoded once, and each goes through CLIP where its prompt is known and through Inception where there is a
reference. The command fills a folder (EXPORT/evaluate by default; for pictures only where it is asked for):

    scores.json                         the scores, and all that it takes to get them again
    clip_scores.jsonl                   the cosine of each picture with its prompt
    pictures/MODEL-PROMPTS/00000/...    of an export, its pictures in GenEval's published layout

Under a launcher ranks share the drawing, as those of `t2i geneval generate` do, and the one that finishes last measures.

Run again, it draws the pictures that are missing. MODEL and PROMPTS are checksums of the export's files and of the prompts.
Pictures that cannot be read are named and counted, and scores are of the others.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_score import Clip, clip_scores
from eval.distances import FeatureSet, bias_warning, fid, kid
from eval.embedding import Embedded, Network, embed_pictures
from eval.exports import Export
from eval.files import json_sha256, write_jsonl, write_text
from eval.generate import SETTINGS_FILE, generate, sample_path
from eval.geneval.clip_colors import find_clip
from eval.inception import Inception, find_inception
from eval.pictures import PictureSet, list_pictures, read_prompt_file
from eval.ranks import Ranks
from eval.reference import ReferenceOptions, counted, crop_warning, read_reference
from eval.versions import installed
from t2i.devices import choose_device
from t2i.files import read_json

__all__ = ["ClipOptions", "ReferenceOptions", "evaluate", "measure"]

LIBRARIES = ("nar-t2i", "torch", "torchvision", "open-clip-torch", "torch-fidelity", "numpy", "pillow")


@dataclass(frozen=True)
class ClipOptions:
    """Which CLIP, and how prompts are put to it.

    Attributes:
        arch: open_clip's name of the architecture, or local-dir:FOLDER.
        pretrained: open_clip's tag of the weights, or a file.
        quick_gelu: Whether they were trained with QuickGELU; see `eval.geneval.clip_colors.find_clip`.
        prefix: What is put before each prompt.
    """

    arch: str = "ViT-L-14"
    pretrained: str = "openai"
    quick_gelu: bool | None = None
    prefix: str = ""


def evaluate(
    source: Path,
    *,
    prompts: Path | None = None,
    prompt_field: str | None = None,
    out: Path | None = None,
    clip: ClipOptions | None = None,
    reference: ReferenceOptions | None = None,
    images_per_prompt: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> dict[str, Any] | None:
    """Measure an export or pictures; writes what the module's description lists.

    Args:
        source: What `t2i export` wrote, or a folder of pictures of one of the kinds of `eval.pictures`.
        prompts: File of prompts; needed with an export.
        prompt_field: The field of it that holds them; see `eval.pictures.read_prompt_file`.
        out: Folder for the results; without one, those of pictures are returned only.
        clip: Which CLIP scores the pictures; None leaves CLIPScore out.
        reference: What they are compared with; None leaves FID and KID out.
        images_per_prompt: Of an export 1 when None; of pictures see `eval.pictures.list_pictures`.
        batch_size: Pictures drawn or measured at once.
        seed: Of an export, another one draws other pictures.
        device: Where to run; the first GPU or the processor when None.
        progress: Show progress bars.
        ranks: This process's share of the drawing of an export.

    Returns:
        What is in scores.json; None where other ranks have not drawn their pictures yet, which is said on stderr: the one
        that draws the last measures.

    Raises:
        ValueError: there is nothing to measure, or to share, an option or a file is wrong, or weights are not to be had.
    """
    ranks = ranks or Ranks()
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    if prompts is None and prompt_field is not None:
        raise ValueError(f"the prompt field is {prompt_field!r}, and there is no file of prompts; give one")
    written = None if prompts is None else read_prompt_file(prompts, prompt_field)
    export = _export(source, written, device)
    pictures = None
    if export is None:
        if ranks.ranks > 1:
            raise ValueError(
                f"{source} is no export, and {ranks.ranks} ranks have no drawing to share; measure pictures with one "
                "process, without RANK and WORLD_SIZE in its environment"
            )
        pictures = list_pictures(source, written, images_per_prompt, captions=clip is not None)
        if not pictures.prompts:
            clip = None
    if clip is None and reference is None:
        raise ValueError(
            f"there is nothing to measure {source} by; give prompts for CLIPScore, or a reference for FID and KID"
        )

    # Whatever may be missing is looked for before anything is drawn.
    where = choose_device(device)
    weights = None if clip is None else find_clip(clip.arch, clip.pretrained, clip.quick_gelu)
    if reference is not None:
        find_inception(reference.inception)
    draw = partial(_draw, export, written, out or source / "evaluate", images_per_prompt, batch_size, seed, progress)
    if ranks.ranks > 1 and (missing := draw(ranks)[1]):
        who = f"rank {ranks.rank} of {ranks.ranks} has drawn its share"
        print(f"{who}; {missing} pictures are missing: the rank that draws the last measures", file=sys.stderr)
        return None
    scorer = None if clip is None or weights is None else Clip(weights, where, clip.prefix)
    inception = compared = None
    document: dict[str, Any] = {"source": str(source), "model": None}
    if reference is not None:
        inception = Inception.open(reference.inception, reference.resize, where)
        compared, document["reference"] = read_reference(inception, reference, batch_size, progress)
    if export is not None:
        out = out or source / "evaluate"
        folder, _ = draw(Ranks())
        pictures = list_pictures(folder, images_per_prompt=images_per_prompt or 1)
        about = export.description
        document["model"] = {**asdict(about.provenance), "sha256": export.sha256, "sample": asdict(about.sample)}
    assert pictures is not None
    if (settings := pictures.root / SETTINGS_FILE).is_file():
        document["generation"] = read_json(settings)
    if pictures.prompts:
        number, digest = len(pictures.prompts), json_sha256(pictures.prompts)
        document["prompts"] = {"file": None if prompts is None else str(prompts), "number": number, "sha256": digest}

    scores, rows = measure(
        pictures,
        scorer,
        inception,
        compared,
        batch_size,
        with_kid=reference is not None and reference.kid,
        progress=progress,
    )
    document |= scores
    if reference is not None and compared is not None and (warning := crop_warning(compared, reference)):
        document["warnings"].append(warning)
    if clip is not None and scorer is not None:
        of_tag = None if scorer.weights.pretrained is None else clip.pretrained
        document["clip"] = {**asdict(clip), "pretrained": of_tag, **document["clip"]}
    document["device"] = str(where)
    document["versions"] = {name: installed(name) for name in LIBRARIES}
    document["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    document["out"] = None if out is None else str(out)
    if out is not None:
        if rows:
            write_jsonl(out / "clip_scores.jsonl", rows)
        write_text(out / "scores.json", json.dumps(document, indent=2) + "\n")
    return document


def _export(source: Path, prompts: Sequence[str] | None, device: str | None) -> Export | None:
    """The export at `source`; None where that is something else."""
    if not (source / "config.json").is_file():
        return None
    export = Export(source, device)
    export.check_draws_captions()
    if prompts is None:
        raise ValueError(f"{source} is an export, which draws prompts; give a file of them")
    return export


def _draw(
    export: Export | None,
    prompts: Sequence[str] | None,
    out: Path,
    images_per_prompt: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
    ranks: Ranks,
) -> tuple[Path, int]:
    """The folder of the export's pictures of the prompts, once those of this rank are drawn, and how many are missing."""
    assert export is not None, "only an export draws"
    assert prompts is not None, "an export has prompts"
    folder = out / "pictures" / f"{export.sha256[:12]}-{json_sha256(prompts)[:12]}"
    number = 1 if images_per_prompt is None else images_per_prompt
    entries = [{"prompt": prompt} for prompt in prompts]
    generate(
        export, entries, folder, number, batch_size, ranks.rank, ranks.ranks, seed=seed, model=export.sha256,
        progress=progress,
    )  # fmt: skip
    return folder, sum(not sample_path(folder, i, n).exists() for i in range(len(prompts)) for n in range(number))


def measure(
    pictures: PictureSet,
    clip: Clip | None = None,
    inception: Inception | None = None,
    reference: FeatureSet | None = None,
    batch_size: int = 64,
    *,
    with_kid: bool = True,
    progress: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of pictures, as scores.json has them, and the rows of clip_scores.jsonl.

    `clip` takes pictures with prompts; `inception` is what the features of `reference` are of. Either may be None.

    Raises ValueError where no picture can be read, for FID where only one can, and for a reference of another network.
    """
    assert (inception is None) == (reference is None)
    networks: list[Network] = [network for network in (clip, inception) if network is not None]
    found = embed_pictures(pictures, networks, batch_size, "measure pictures", progress)
    document: dict[str, Any] = {"warnings": [], **counted(pictures, found.unreadable)}
    rows: list[dict[str, Any]] = []
    if clip is not None:
        document["clip"], rows = _clip(pictures, found, clip, batch_size, progress)
        if cut := document["clip"]["prompts_cut"]:
            document["warnings"].append(
                f"{len(cut):,} of {len(pictures.prompts):,} prompts are longer than CLIP takes, and scored by their beginning"
            )
    if inception is not None and reference is not None:
        document["inception"] = {"file": str(inception.file), **inception.about}
        own = FeatureSet.from_features(found.features[-1], inception.about)
        document["fid"] = {"value": fid(own, reference), "features": len(own.mu)}
        if with_kid:
            document["kid"] = asdict(kid(own, reference))
        if warning := bias_warning(len(found.numbers), reference.pictures):
            document["warnings"].append(warning)
    return document, rows


def _clip(
    pictures: PictureSet, found: Embedded, clip: Clip, batch_size: int, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    texts_PD = clip.embed_texts(pictures.prompts, batch_size, progress)
    prompt_of_K = [pictures.prompt_of[number] for number in found.numbers]
    cosines_K = np.einsum("kd,kd->k", found.features[0], texts_PD[prompt_of_K])
    document = {
        "file": clip.weights.pretrained, "quick_gelu": clip.weights.quick_gelu, "sha256": clip.weights.sha256(),
        "prompts_cut": clip.cut(pictures.prompts), **asdict(clip_scores(cosines_K, prompt_of_K)),
    }  # fmt: skip
    rows = [
        {"filename": pictures.names[number], "prompt": pictures.prompts[index], "cosine": float(cosine)}
        for number, index, cosine in zip(found.numbers, prompt_of_K, cosines_K, strict=True)
    ]
    return document, rows
