"""Objects of COCO's classes by Mask2Former, as GenEval's published evaluation finds them.

    detector = Mask2FormerDetector(find_detector("facebook/mask2former-swin-small-coco-instance"), ScoringOptions())
    detections_per_picture = detector.detect(images)

The published evaluation runs mmdet's Mask2Former (Swin-S, COCO instances). What is done here is what mmdet does around the
network, since transformers does other things there:

- Pictures are scaled to a shorter side of 800 pixels, the longer one at most 1333, and padded to multiples of 32. The
  preprocessor_config.json of the published transformers model squashes them to 384x384; only its mean and standard
  deviation are taken.
- `instances` is mmdet's instance head. `post_process_instance_segmentation` of transformers judges and cuts masks at 384x384
  and takes as many (query, class) pairs as there are queries; its default output also gives each pixel to one instance.
- Boxes are mmdet's: see `mask_box`.

Legend of name suffixes: B pictures, Q queries, K classes, N instances, U queries that instances use, h w the network's masks,
H W picture.

Source: Cheng et al. 2022, arXiv 2112.01527; mmdet 2.28, MaskFormerFusionHead.instance_postprocess and mask2bbox; GenEval,
evaluation/evaluate_images.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.geneval.detections import Box, Detection, Image
from eval.geneval.options import DETECTOR
from eval.geneval.prompts import COCO_CLASSES
from eval.geneval.scoring import ScoringOptions
from eval.geneval.weights import hub_folder
from t2i.files import read_json

__all__ = [
    "Instances",
    "Mask2FormerDetector",
    "detector_files",
    "find_detector",
    "geneval_classes",
    "instances",
    "mask_box",
]

MAX_INSTANCES = 100  # mmdet's max_per_image
SIZE_DIVISOR = 32  # of the padded picture
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("*.safetensors*", "pytorch_model*")  # the first of them that there is anything of, as transformers chooses

# What other label lists call GenEval's classes; the first four are those of the published transformers models.
_ALIASES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "television": "tv",
    "mouse": "computer mouse", "remote": "tv remote", "remotecontrol": "tv remote", "keyboard": "computer keyboard",
    "hairdryer": "hair drier", "doughnut": "donut", "cellularphone": "cell phone", "mobilephone": "cell phone",
}  # fmt: skip


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


_BY_LETTERS = {_letters(name): name for name in COCO_CLASSES} | _ALIASES


def geneval_classes(id2label: Mapping[int, str], source: str) -> list[str | None]:
    """GenEval's name for each of a detector's labels, in order of their numbers; None for what GenEval does not ask about.

    Spaces, underscores and capitals do not matter. Raises ValueError that lists the classes which no label names.
    """
    names = [_BY_LETTERS.get(_letters(id2label.get(number, ""))) for number in range(len(id2label))]
    if missing := [name for name in COCO_CLASSES if name not in names]:
        raise ValueError(
            f"detector {source} has no label for {', '.join(missing)}; GenEval asks about COCO's 80 classes: give a "
            f"detector of all of them, such as {DETECTOR}"
        )
    return names


def mask_box(mask_HW: NDArray[np.bool_]) -> Box:
    """The box (x0, y0, x1, y1) of a mask that is not empty: its first column and row, and one past its last ones.

    That is mmdet's mask2bbox, whose boxes the published evaluation crops and compares. Its overlap then adds one pixel
    more to each side (`eval.geneval.scoring.box_iou`), as for boxes that end on their last pixel; both are kept.
    """
    columns, rows = np.flatnonzero(mask_HW.any(axis=0)), np.flatnonzero(mask_HW.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


Instances = list[tuple[int, float, NDArray[np.bool_]]]
"""Label, score 0 to 1, and mask bool [H, W] of each object."""


def instances(
    class_logits_QK1: Tensor,
    mask_logits_Qhw: Tensor,
    padded: tuple[int, int],
    scaled: tuple[int, int],
    original: tuple[int, int],
    floor: float = 0.0,
    limit: int = MAX_INSTANCES,
) -> Instances:
    """The objects of one picture, as mmdet's instance head gives them; masks may overlap.

    The `limit` likeliest pairs of a query and a class are instances, so that one query may be several. The score of one is
    its class's probability times the mean probability of its mask over the mask. Masks are the logits above 0, once they
    have been brought (bilinearly) to the size of the padded input, cut to the picture, and brought to its own size.

    Args:
        class_logits_QK1: The last of the K + 1 classes is "nothing".
        mask_logits_Qhw: At the network's resolution.
        padded: Height and width of the network's input.
        scaled: Those of the picture in its upper left corner.
        original: Those of the picture as it is; of the masks that are returned.
        floor: Leave out instances with a score up to this. A probability is never less than the score, so that masks of
            those that cannot reach it are not made at all.
        limit: mmdet's max_per_image.

    Returns them with the likeliest classes first, empty masks left out (mmdet gives them score 0).
    """
    probability_QK = class_logits_QK1.softmax(dim=-1)[:, :-1]
    classes = probability_QK.shape[1]
    likely_N, order_N = probability_QK.flatten().topk(min(limit, probability_QK.numel()))
    order_N, likely_N = order_N[likely_N > floor], likely_N[likely_N > floor]
    if not len(order_N):
        return []
    used_U, mask_of_N = torch.unique(order_N // classes, return_inverse=True)
    logits_UHW = F.interpolate(mask_logits_Qhw[used_U][None].float(), padded, mode="bilinear", align_corners=False)
    logits_UHW = logits_UHW[..., : scaled[0], : scaled[1]]
    logits_UHW = F.interpolate(logits_UHW, original, mode="bilinear", align_corners=False)[0]
    mask_UHW = logits_UHW > 0
    area_U = mask_UHW.flatten(1).sum(1)
    quality_U = (logits_UHW.sigmoid() * mask_UHW).flatten(1).sum(1) / (area_U + 1e-6)
    score_N = likely_N * quality_U[mask_of_N]
    kept_N = (score_N > floor) & (area_U[mask_of_N] > 0)
    found = zip((order_N % classes)[kept_N].tolist(), score_N[kept_N].tolist(), mask_of_N[kept_N].tolist(), strict=True)
    masks_UHW = mask_UHW.cpu().numpy()
    return [(label, score, masks_UHW[mask]) for label, score, mask in found]


def find_detector(source: str) -> Path:
    """The folder of a detector: `source` itself, or the hub's files of that name. Raises ValueError where there is none."""
    folder = hub_folder(source, "detector", "--detector", [CONFIG, PREPROCESSOR], [[pattern] for pattern in WEIGHTS])
    for name in (CONFIG, PREPROCESSOR):
        if not (folder / name).is_file():
            raise ValueError(f"detector {folder} has no {name}; fetch all of {DETECTOR}, or give another folder")
    kind = read_json(folder / CONFIG).get("model_type")
    if kind != "mask2former":
        raise ValueError(f"detector {folder} is of type {kind!r}, not 'mask2former'; give one such as {DETECTOR}")
    return folder


def detector_files(folder: Path) -> list[Path]:
    """The files of a detector's folder that decide what it says; a folder may hold more, and on another host other ones."""
    weights: list[Path] = []
    for pattern in WEIGHTS:
        weights = weights or sorted(folder.glob(pattern))
    return [folder / CONFIG, folder / PREPROCESSOR, *weights]


class Mask2FormerDetector:
    """GenEval's detector: COCO's instances under GenEval's names."""

    def __init__(
        self,
        folder: Path,
        scoring: ScoringOptions,
        size: tuple[int, int] = (800, 1333),
        device: torch.device | str = "cpu",
    ) -> None:
        """Load a folder in the layout of transformers, from disk alone.

        Args:
            folder: With config.json, preprocessor_config.json and weights.
            scoring: Thresholds; detections that count under neither are not made.
            size: What pictures are scaled to: the shorter side, and what the longer one is at most, in pixels.
            device: Where to run.

        Raises ValueError where the folder is damaged or lacks weights or classes, or for sizes below 32.
        """
        if not SIZE_DIVISOR <= size[0] <= size[1]:
            raise ValueError(
                f"detector size is {size[0]} {size[1]}; give the shorter side first, of at least {SIZE_DIVISOR} pixels"
            )
        self.scoring, self.size, self.device = scoring, size, torch.device(device)
        self._model = _load(folder).to(self.device).eval()
        self._names = geneval_classes(self._model.config.id2label, str(folder))
        described = read_json(folder / PREPROCESSOR)
        try:
            mean, std = (torch.tensor(described[f"image_{name}"]).view(1, 3, 1, 1) for name in ("mean", "std"))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / PREPROCESSOR} has no image_mean and image_std of three channels; fetch it again"
            ) from error
        self._mean_1311, self._std_1311 = mean.to(self.device), std.to(self.device)
        self._floor = min(scoring.threshold, scoring.counting_threshold)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """All objects of each picture, uint8 [H, W, 3], that could count; pictures of one size go through together."""
        found: list[list[Detection]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            by_size.setdefault((image.shape[0], image.shape[1]), []).append(place)
        for original, places in by_size.items():
            scaled, padded = self._sizes(original)
            output = self._model(pixel_values=self._prepare([images[place] for place in places], scaled, padded))
            for place, classes_QK1, masks_Qhw in zip(
                places, output.class_queries_logits, output.masks_queries_logits, strict=True
            ):
                objects = instances(classes_QK1, masks_Qhw, padded, scaled, original, self._floor)
                found[place] = [
                    Detection(name, mask_box(mask_HW), score, mask_HW)
                    for label, score, mask_HW in objects
                    if (name := self._names[label]) is not None
                ]
        return found

    def _sizes(self, original: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """What pictures of a size are scaled to, and then padded to; height and width each."""
        scale = min(self.size[0] / min(original), self.size[1] / max(original))
        height, width = (max(1, int(side * scale + 0.5)) for side in original)
        padded = (math.ceil(height / SIZE_DIVISOR) * SIZE_DIVISOR, math.ceil(width / SIZE_DIVISOR) * SIZE_DIVISOR)
        return (height, width), padded

    def _prepare(self, images: Sequence[Image], scaled: tuple[int, int], padded: tuple[int, int]) -> Tensor:
        """The network's input, float32 [B, 3, padded height, padded width]; padding is 0, as in mmdet."""
        pixels_BHW3 = torch.from_numpy(np.stack(images)).to(self.device)
        pixels_B3HW = pixels_BHW3.permute(0, 3, 1, 2).float() / 255
        # Without antialiasing, as OpenCV scales for mmdet.
        pixels_B3HW = F.interpolate(pixels_B3HW, scaled, mode="bilinear", align_corners=False)
        normal_B3HW = (pixels_B3HW - self._mean_1311) / self._std_1311
        return F.pad(normal_B3HW, (0, padded[1] - scaled[1], 0, padded[0] - scaled[0]))


def _load(folder: Path) -> Any:
    """The network, a Mask2FormerForUniversalSegmentation, with all of its weights from the folder."""
    from transformers import Mask2FormerForUniversalSegmentation

    try:
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"detector {folder} cannot be loaded ({reason}); fetch it again") from error
    # The criterion is of training alone; transformers would draw anything else that is missing at random.
    model, report = loaded  # transformers' types know of no report
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("criterion."))
    misfits = [*missing, *(str(misfit) for misfit in report["mismatched_keys"])]
    if misfits:
        raise ValueError(
            f"the weights in {folder} lack or misfit {len(misfits)} parameters of its config.json, "
            f"such as {misfits[0]}; fetch it again"
        )
    return model
