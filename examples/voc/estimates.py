"""Rough times and sizes for a dry run, each with what it was reckoned from."""

from __future__ import annotations

from .data_check import count_pairs, gigabytes
from .datasets import Lists
from .settings import ALONE, AREA, EPOCHS, INPUT_SIZE, SCALES, START, Settings


class Estimates:
    """Rough times and sizes of a dry run, each with what it was reckoned from.

    Work of a GPU: operations per image, counted on the networks, over `--tflops`, which is assumed. Work of a CPU: seconds per
    image, measured once. Sizes: float32 CAMs of every pair.
    """

    # GFLOP of one forward pass, counted by torch.utils.flop_counter; a training step is reckoned as three of them.
    HOST_GFLOP = 46.6  # MCTformer+ at 448 x 448
    CLIP_GFLOP = 8.7  # image encoder of ViT-B/32, one view
    SEGMENTER_GFLOP = 113.6  # SegFormer with MiT-B2 at 512 x 512
    # Seconds per image of one process, for 48 photos of 500 x 375 pixels with 1.8 classes, on two cores with other work too;
    # to draw masks for 40 photos with 1.9 objects. Reckoned as proportional to the pixels.
    REFINE, LABELS, EVALUATE, CRF, DRAW = 1.6, 0.39, 0.05, 0.42, 0.003
    MEASURED = 500 * 375  # pixels
    CLASSES = 1.8  # per image; with background 2.8 labels

    def __init__(self, s: Settings, lists: Lists):
        self.s, self.lists = s, lists
        self.pixels, per_image = s.data.pixels, s.data.classes_per_image
        self.pairs, self.train_pairs = (
            count_pairs(s.data, ids) or round(per_image * len(ids)) for ids in (lists.train_aug, lists.train)
        )

    def _gpu(self, gigaflop: float, basis: str, gpus: int = 1) -> str:
        seconds = gigaflop / (1000 * self.s.tflops * max(1, gpus))
        speed = f"at an assumed {self.s.tflops:g} TFLOP/s (reading and writing not counted)"
        return f"{duration(seconds)} of arithmetic on {max(1, gpus)} GPU: {basis}, {gigaflop / 1e6:.3g} PFLOP, {speed}"

    def _cpu(self, images: int, seconds: float, processes: int = 1, per_class: float = 1.0) -> str:
        seconds *= self.pixels / self.MEASURED * per_class
        shared = f" / {processes} processes" if processes > 1 else ""
        took = duration(images * seconds / processes)
        return f"{took} on a CPU: {images} images x {seconds:.2g} s (from measurements on two busy cores){shared}"

    def stage(self, which: str) -> str:
        images, epochs = len(self.lists.train_aug), 1 if which == "prompt" else self.s.epochs or EPOCHS
        size = ((self.s.input_size or INPUT_SIZE) / INPUT_SIZE) ** 2
        host = self.HOST_GFLOP * size * (1 if which == "prompt" else 3) * images * epochs
        clip = which not in (ALONE, AREA, START)
        views = 2 * self.pairs * epochs * self.CLIP_GFLOP * (1 if which == "prompt" else 3) * clip
        return self._gpu(host + views, f"{images} images x {epochs} " + ("epoch" if epochs == 1 else "epochs")) + "; 0.3 GB"

    def cams(self, part: str, scales: int) -> str:
        ids, pairs = (self.lists.train, self.train_pairs) if part == "train" else (self.lists.train_aug, self.pairs)
        area = sum(float(scale) ** 2 for scale in SCALES[:scales]) * self.pixels / INPUT_SIZE**2
        return self._gpu(len(ids) * 2 * area * self.HOST_GFLOP, f"{len(ids)} images x {2 * scales} passes", self.s.gpus) + (
            f"; {gigabytes(pairs * self.pixels * 4)}, and the host's pictures until the step ends"
        )

    def draw(self) -> str:
        return self._cpu(len(self.lists.train) + len(self.lists.val), self.DRAW, 2)

    def evaluate(self, folders: int, split: str = "train") -> str:
        return self._cpu(folders * len(getattr(self.lists, split)), self.EVALUATE)

    def refine(self, part: str = "all") -> str:
        ids, pairs = (self.lists.train, self.train_pairs) if part == "train" else (self.lists.train_aug, self.pairs)
        return (
            self._cpu(len(ids), self.REFINE, self.s.processes, pairs / max(1, len(ids)) / self.CLASSES)
            + f"; {gigabytes(pairs * self.pixels * 4)}"
        )

    def labels(self) -> str:
        size = gigabytes(self.pairs * self.pixels * 4)
        return self._cpu(len(self.lists.train_aug), self.LABELS, self.s.processes) + f"; {size} until the step ends"

    def crf(self, split: str) -> str:
        labels = 1 + self.s.data.classes_per_image
        processes = self.s.processes if split == "train" else max(1, self.s.gpus)
        return self._cpu(len(getattr(self.lists, split)), self.CRF, processes, labels / (1 + self.CLASSES))

    def segmentation(self) -> str:
        how = self.s.training
        images = how.steps * how.batch_size
        work = 3 * images * self.SEGMENTER_GFLOP * (how.crop / 512) ** 2
        return self._gpu(work, f"{images} crops", self.s.gpus) + "; 0.5 GB"

    def predict(self) -> str:
        images = len(self.lists.val)
        work = self._gpu(images * self.SEGMENTER_GFLOP * self.pixels / 512**2, f"{images} images", self.s.gpus)
        return f"{work}; with a CRF {self.crf('val')}" if self.s.use_crf else work

    def disk(self) -> int:
        """Bytes that the run writes: CAM files three times and those of train, weights, the host's pictures."""
        total = 0.0
        for control in self.s.runs:  # a control that ends with its masks has CAM files of train only
            pairs = 3 * self.pairs if control == "" or self.s.controls else 2 * self.train_pairs
            total += (pairs + self.train_pairs) * self.pixels * 4 + 2e9
        pictures = self.pairs * self.pixels * 2  # of the host, until its step ends
        return int(self.s.seeds * total + pictures)


def duration(seconds: float) -> str:
    """A time in words, rounded up to what one can plan with."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
