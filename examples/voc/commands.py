"""The steps of the chain: what each one reads, runs and makes. Flow: `__main__` -> **commands** -> `chain`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from semples_plugin.adapters.runner.record import commit
from semples_plugin.clip_backends import load_clip, openai_clip_module

from . import crf, data_check, ledger
from .chain import ChainError, Command, Step, read_json, sha256, write_json
from .segmentation import Training, load_network, random_network, save_network

DEIT = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"  # what the host's run_mct_plus.sh starts from
DEIT_HASH = "cd65a155"  # beginning of its SHA-256, part of its name
SCALES = ("1.0", "0.75", "1.25")  # the host's own
CLIP_SIZES = (
    32,
    64,
    2,
    64,
    16,
    77,
    49408,
    64,
    1,
    2,
)  # of a random CLIP: features; image, layers, width, patch; context, words, ...
# Assumptions of the estimates, see `Estimates`.
PIXELS = 500 * 375  # of a VOC photo
EPOCHS = 45  # the host's own


class Settings(NamedTuple):
    """What one run is asked for; paths are absolute."""

    voc: Path
    repo: Path
    out: Path
    labels: Optional[Path]
    clip: Optional[str]  # None: random weights
    finetune: Optional[Path]
    checkpoint: Optional[Path]
    python: str
    seeds: int
    gpus: int
    cpu: bool
    rehearsal: bool
    limit: Optional[int]
    epochs: Optional[int]
    input_size: Optional[int]
    batch_size: Optional[int]
    refiner: Tuple[str, ...]  # NAME=VALUE
    threshold: float
    low: float
    high: float
    segmenter: str
    training: Training
    use_crf: bool
    tflops: float


# ---------------------------------------------------------------------------------------------------- the chain


def make_steps(settings: Settings) -> List[Step]:
    """All steps in order."""
    lists = data_check.find_lists(settings.voc, settings.repo, settings.limit)
    estimates = Estimates(settings, lists)
    steps = [_check(settings, lists, estimates), _weights(settings)]
    for seed in range(settings.seeds):
        steps += _one_seed(settings, seed, estimates)
    return [*steps, _ledger(settings, steps)]


def _one_seed(s: Settings, seed: int, estimates: "Estimates") -> List[Step]:
    folder = s.out / f"seed{seed}"
    host, ours = folder / "host", folder / "runner"
    name = f"seed{seed}/{{}}".format
    lists, weights = s.out / "lists", s.out / "weights"
    photos, masks = s.voc / "JPEGImages", s.voc / "SegmentationClass"
    facts = {"host": commit(s.repo)} if s.repo.is_dir() else {}
    environment = {"TORCH_HOME": str(weights / "torch"), **({} if s.gpus else {"CUDA_VISIBLE_DEVICES": ""})}

    def runner(stage: str, script: Sequence[str], more: Sequence[str] = (), gpu: int = 0) -> Command:
        words = [s.python, "-m", "semples_plugin.adapters", "mctformer", "--repo", str(s.repo), "--cwd", str(host)]
        words += ["--out", str(ours), "--stage", stage, *(["--cpu"] if s.cpu else []), *more, "--", *script]
        visible = {"CUDA_VISIBLE_DEVICES": str(gpu)} if s.gpus > 1 else {}
        return Command(words, {**environment, **visible})

    # --- the three stages
    train = ["main.py", "--data-path", str(s.voc), "--img-list", str(lists / "all"), "--output_dir", "saved"]
    train += [*(["--finetune", DEIT] if _pretrained(s) else []), "--seed", str(seed), *_host_sizes(s)]
    options = ["--seed", str(seed), "--clip", s.clip or str(weights / "clip.pt")]
    options += [word for assignment in s.refiner for word in ("--set", assignment)]
    if s.checkpoint is not None:
        options += ["--checkpoint", str(s.checkpoint)]
    if s.rehearsal:
        options += ["--prompt-epochs", "2", "--log-every", "1"]
    begin = [lists, weights / "weights.json"]

    def stage(which: str, what: str, makes: Sequence[str], needs: Sequence[Path], clears: Sequence[Path]) -> Step:
        def before() -> None:
            (host / "voc12").mkdir(parents=True, exist_ok=True)
            (host / "saved").mkdir(exist_ok=True)
            shutil.copyfile(lists / "cls_labels.npy", host / "voc12" / "cls_labels.npy")

        return Step(
            name(which), what, [ours / part for part in makes], [*begin, *needs], facts,
            [[runner(which, train, [*options, "--restart"])]], before=before, clears=clears, estimate=estimates.stage(which),
        )  # fmt: skip

    saved = host / "saved"
    steps = [
        stage("match", "train the host with match", ["match.pt", "match.jsonl"], [], [ours, saved]),
        stage("prompt", "learn the background prompts", ["prompts.safetensors"], [ours / "match.pt"], []),
        stage("refine", "train the host again with match and refine", ["refine.pt", "refine.jsonl"],
              [ours / "match.pt", ours / "prompts.safetensors"], [saved]),
    ]  # fmt: skip

    # --- CAM files and their figures
    def cams(which: str, what: str, part: str, scales: Sequence[str]) -> Step:
        target, shards = folder / which, max(1, s.gpus)
        parts = folder / f"{which}-lists"

        def before() -> None:
            target.mkdir(parents=True, exist_ok=True)
            ids = (lists / part / "train_aug_id.txt").read_text(encoding="utf-8").split()
            for i in range(shards):
                data_check.write_ids(parts / str(i) / "train_aug_id.txt", ids[i::shards])
                shutil.copyfile(lists / part / "val_id.txt", parts / str(i) / "val_id.txt")

        def after() -> None:
            for path in (parts, folder / f"{which}-overlays"):  # the host's pictures are several GB
                shutil.rmtree(path, ignore_errors=True)

        script = ["main.py", "--data-set", "VOC12MS", "--data-path", str(s.voc), "--gen_attention_maps", "--resume"]
        script += [str(ours / "refine.pt"), "--scales", *scales, "--cam-npy-dir", str(target), "--attention-dir"]
        script += [str(folder / f"{which}-overlays"), *_host_sizes(s, training=False)]
        group = [runner("plain", [*script, "--img-list", str(parts / str(i))], gpu=i) for i in range(shards)]
        return Step(
            name(which), what, [target], [lists, ours / "refine.pt"], facts, [group], before=before, after=after,
            clears=[parts, folder / f"{which}-overlays"], estimate=estimates.cams(part, len(scales)),
        )  # fmt: skip

    def figures(
        which: str, pairs: Sequence[Tuple[str, Path, Sequence[str]]], split: str = "train"
    ) -> Sequence[Sequence[Command]]:
        found = []
        for figure, predictions, more in pairs:
            words = [sys.executable, "-m", "semples_plugin", "evaluate", "--pred", str(predictions), "--gt", str(masks)]
            words += ["--list", str(lists / f"{split}.txt"), "--split", split, *more, "--json"]
            found.append([Command(words, stdout=folder / "figures" / which / f"{figure}.json")])
        return found

    def figure_step(
        which: str, what: str, pairs: Sequence[Tuple[str, Path, Sequence[str]]], note: Optional[str] = None
    ) -> Step:
        return Step(
            name(which), what, [] if note else [folder / "figures" / which], [] if note else [lists, *(path for _, path, _ in pairs)],
            groups=[] if note else figures(which, pairs), estimate=estimates.evaluate(len(pairs)), note=note,
        )  # fmt: skip

    steps += [
        cams("cams-single", "the host's CAM files of train, scale 1.0", "train", ["1.0"]),
        cams("cams", "the host's CAM files of all images it was trained on, its own scales", "all", SCALES),
        figure_step(
            "seeds", "mIoU of the CAM files on train", [("single", folder / "cams-single", []), ("multi", folder / "cams", [])]
        ),
    ]

    # --- masks and pseudo labels
    refined, labels = folder / "masks", folder / "labels"

    def refine(source: Path, target: Path, more: Sequence[str]) -> Command:
        words = [sys.executable, "-m", "semples_plugin", "refine", "--images", str(photos), "--cams", str(source)]
        return Command([*words, "--out", str(target), *more, "--quiet"])

    steps.append(
        Step(
            name("masks"), "align the CAMs to the edges of the photos", [refined / "cams", refined / "labels"],
            [lists, folder / "cams"], groups=[[refine(folder / "cams", refined, ["--threshold", f"{s.threshold:g}"])]],
            resumes=True, clears=[refined], estimate=estimates.refine(),
        )
    )  # fmt: skip
    note = None if s.use_crf else crf.NOTE
    words = [sys.executable, "-m", "examples.voc.crf", "--photos", str(photos), "--cams", str(refined / "cams"), "--list"]
    words += [str(lists / "train.txt"), "--threshold", f"{s.threshold:g}", "--out", str(folder / "masks-crf")]
    steps.append(
        Step(
            name("masks-crf"), "dense CRF on the aligned CAMs of train", [] if note else [folder / "masks-crf"],
            [] if note else [lists, refined / "cams"], groups=[] if note else [[Command(words)]], resumes=True,
            estimate=estimates.crf(len(estimates.lists.train)), note=note,
        )
    )  # fmt: skip
    pairs = [("best", refined / "cams", []), ("fixed", refined / "labels", [])]
    steps.append(
        figure_step(
            "mask-figures",
            "mIoU of the masks on train",
            pairs if note else [*pairs, ("crf", folder / "masks-crf", [])],
        )
    )

    def drop_cams() -> None:
        shutil.rmtree(labels / "cams", ignore_errors=True)  # a copy of the masks'

    steps.append(
        Step(
            name("labels"), f"pseudo labels: background below {s.low:g}, 255 up to {s.high:g}", [labels / "labels"],
            [lists, refined / "cams"],
            groups=[[refine(refined / "cams", labels, ["--align", "none", "--threshold", f"{s.low:g}:{s.high:g}"])]],
            after=drop_cams, resumes=True, clears=[labels], estimate=estimates.labels(),
        )
    )  # fmt: skip
    steps.append(figure_step("label-figures", "mIoU of the pseudo labels on train", [("labels", labels / "labels", [])]))

    # --- segmentation
    network, predicted = folder / "segmentation", folder / "predictions"
    launch = [sys.executable]
    if s.gpus > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(s.gpus)]
    launch += ["-m", "examples.voc.segmentation"]
    common = ["--photos", str(photos), *(["--cpu"] if s.cpu else [])]
    how = s.training._replace(seed=seed)
    words = [
        *launch,
        "train",
        *common,
        "--labels",
        str(labels / "labels"),
        "--list",
        str(lists / "train_aug.txt"),
        "--segmenter",
    ]
    words += [str(weights / "segmenter"), "--out", str(network)]
    words += [word for field, value in how._asdict().items() for word in (f"--{field.replace('_', '-')}", f"{value}")]
    steps.append(
        Step(
            name("segmentation"), f"train the segmentation network, {how.steps} steps", [network / "model", network / "log.jsonl"],
            [lists, labels / "labels", weights / "segmenter"], groups=[[Command(words)]], resumes=True, clears=[network],
            estimate=estimates.segmentation(),
        )
    )  # fmt: skip
    predict = [*launch, "predict", *common, "--list", str(lists / "val.txt"), "--segmenter", str(network / "model")]
    predict += ["--out", str(predicted / "plain"), *(["--crf-out", str(predicted / "crf")] if s.use_crf else [])]
    made = [predicted / "plain", *([predicted / "crf"] if s.use_crf else [])]
    steps.append(
        Step(
            name("predictions"), "predict the labels of val", made, [lists, network / "model"], groups=[[Command(predict)]],
            resumes=True, estimate=estimates.predict(),
        )
    )  # fmt: skip
    pairs = [(path.name, path, []) for path in made]
    steps.append(
        Step(
            name("evaluation"), "mIoU of the segmentation network on val", [folder / "figures" / "evaluation"],
            [lists, *made], groups=figures("evaluation", pairs, "val"), estimate=estimates.evaluate(len(pairs), "val"),
        )
    )  # fmt: skip
    return steps


def _pretrained(s: Settings) -> bool:
    """Whether the host starts from DeiT-S, whose grid of positions it can double only: 448 pixels."""
    return s.input_size in (None, 448)


def _host_sizes(s: Settings, training: bool = True) -> List[str]:
    """Sizes of the host, where they are not its own."""
    words = [] if s.input_size is None else ["--input-size", str(s.input_size)]
    if training and s.epochs is not None:
        words += ["--epochs", str(s.epochs)]
    if training and s.batch_size is not None:
        words += ["--batch-size", str(s.batch_size)]
    return [*words, *(["--device", "cpu", "--num_workers", "0", "--no-pin-mem"] if s.cpu else [])]


# ---------------------------------------------------------------------------------------------------- check and weights


def _check(s: Settings, lists: data_check.Lists, estimates: "Estimates") -> Step:
    labels = data_check.find_labels(s.repo, s.labels)

    def before() -> None:
        found = data_check.check(
            s.voc, s.repo, lists, labels, s.clip, s.python, not s.cpu, s.out, estimates.disk() if not s.rehearsal else 0
        )
        if found:
            raise ChainError(data_check.report(found))
        data_check.write_lists(s.out / "lists", s.voc, lists, labels)

    facts = {"voc": str(s.voc), "repo": str(s.repo), "labels": str(labels), "limit": s.limit}
    return Step("check", "look for everything that is needed, and write the lists", [s.out / "lists"], facts=facts, before=before,
                always=True, estimate="seconds; lists and labels")  # fmt: skip


def _weights(s: Settings) -> Step:
    folder = s.out / "weights"
    hub = folder / "torch" / "hub" / "checkpoints" / DEIT.rpartition("/")[2]

    def before() -> None:
        hub.parent.mkdir(parents=True, exist_ok=True)
        if s.rehearsal:
            torch.manual_seed(0)
            torch.save(random_clip().state_dict(), folder / "clip.pt")
            torch.save({"model": random_deit()}, hub)
            network = random_network()
        else:
            _fetch_deit(s, hub)
            if s.clip is not None and not Path(s.clip).is_file():
                load_clip(s.clip, "cpu")  # downloads it once and checks it
            network = load_network(s.segmenter)
        save_network(network, folder / "segmenter")
        given = {"clip": s.clip, "checkpoint": s.checkpoint, "finetune": s.finetune}
        files = {name: sha256(Path(path)) for name, path in given.items() if path is not None and Path(path).is_file()}
        made = {"finetune": sha256(hub), **({"clip": sha256(folder / "clip.pt")} if s.rehearsal else {})}
        names = {"clip": s.clip or "random weights", "segmenter": s.segmenter, "finetune": DEIT}
        write_json(folder / "weights.json", {"random": s.rehearsal, "names": names, "sha256": {**files, **made}})

    needs = [Path(path) for path in (s.clip, s.checkpoint, s.finetune) if path is not None and Path(path).is_file()]
    if not s.rehearsal and Path(s.segmenter).is_dir():
        needs.append(Path(s.segmenter).resolve())
    facts = {"clip": s.clip, "segmenter": s.segmenter, "rehearsal": s.rehearsal}
    sizes = "0.4 GB" if not s.rehearsal else "a few MB"
    return Step(
        "weights", "get the weights: CLIP, the host's start, the segmentation network",
        [folder / "weights.json", folder / "segmenter", hub, *([folder / "clip.pt"] if s.rehearsal else [])], needs, facts,
        before=before, clears=[folder], estimate=f"as long as the downloads take; {sizes} (sizes of the files on their servers)",
    )  # fmt: skip


def _fetch_deit(s: Settings, target: Path) -> None:
    """The host's start, from the file that was given or from its address; the host finds it where torch.hub keeps downloads."""
    if s.finetune is not None:
        shutil.copyfile(s.finetune, target)
        return
    try:
        torch.hub.download_url_to_file(DEIT, str(target), hash_prefix=DEIT_HASH, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise ChainError(
            f"{DEIT} could not be downloaded ({error}). Get it in another way and give it: --finetune FILE."
        ) from error


def random_clip() -> torch.nn.Module:
    """A tiny CLIP in OpenAI's layout with random weights, for rehearsals."""
    return openai_clip_module("model").CLIP(*CLIP_SIZES).eval()


def random_deit() -> Dict[str, torch.Tensor]:
    """Those tensors of DeiT-S that the host reshapes before it loads the rest, with random values."""
    return {"pos_embed": 0.02 * torch.randn(1, 197, 384), "cls_token": 0.02 * torch.randn(1, 1, 384)}


# ---------------------------------------------------------------------------------------------------- ledger


def _ledger(s: Settings, steps: Sequence[Step]) -> Step:
    records = [s.out / "steps" / f"{step.name}.json" for step in steps if step.name != "check"]

    def before() -> None:
        ledger.write(s.out, facts_of(s), [record for path in records if (record := read_json(path)) is not None])

    figures = [path for step in steps for path in step.makes if path.parent.name == "figures"]
    return Step("ledger", "one page with all figures", [s.out / "ledger.json", s.out / "ledger.html"], [*figures, s.out / "lists"],
                facts_of(s), before=before, always=True, estimate="seconds; one page")  # fmt: skip


def facts_of(s: Settings) -> Dict[str, Any]:
    """What the ledger says about a run."""
    return {
        "rehearsal": s.rehearsal,
        "seeds": s.seeds,
        "gpus": s.gpus,
        "voc": str(s.voc),
        "host": "MCTformer+",
        "host_commit": commit(s.repo) if s.repo.is_dir() else None,
        "clip": s.clip or "random weights",
        "checkpoint": s.checkpoint and str(s.checkpoint),
        "host_epochs": s.epochs or EPOCHS,
        "input_size": s.input_size or 448,
        "scales": [float(scale) for scale in SCALES],
        "threshold": s.threshold,
        "label_thresholds": [s.low, s.high],
        "segmenter": "random weights" if s.rehearsal else s.segmenter,
        "steps": s.training.steps,
        "batch_size": s.training.batch_size,
        "crf": s.use_crf,
    }


# ---------------------------------------------------------------------------------------------------- estimates


class Estimates:
    """Rough times and sizes of a dry run, each with what it was reckoned from.

    Work of a GPU: operations per image, counted on the networks, over `--tflops`, which is assumed. Work of a CPU: seconds per
    image, measured on two cores in a rehearsal (see docs/voc.md), by pixels. Sizes: bytes per pixel of the format.
    """

    # GFLOP of one forward pass, counted by torch.utils.flop_counter; a training step takes three times that.
    HOST_GFLOP = 0.0  # MCTformer+ at 448 x 448
    CLIP_GFLOP = 0.0  # image encoder of ViT-B/32, one view
    SEGMENTER_GFLOP = 0.0  # SegFormer MiT-B2 at 512 x 512
    # Seconds per image of 500 x 375 pixels on two cores.
    REFINE, LABELS, EVALUATE, CRF = 0.0, 0.0, 0.0, 0.0

    def __init__(self, s: Settings, lists: data_check.Lists):
        self.s, self.lists = s, lists
        labels = data_check.find_labels(s.repo, s.labels)
        self.pairs = data_check.count_pairs(labels, lists.train_aug) or round(1.5 * len(lists.train_aug))
        self.train_pairs = data_check.count_pairs(labels, lists.train) or round(1.5 * len(lists.train))

    def _gpu(self, gigaflop: float, basis: str, gpus: int = 1) -> str:
        seconds = gigaflop / (1000 * self.s.tflops * max(1, gpus))
        return f"{duration(seconds)} on {max(1, gpus)} GPU(s): {basis} at {self.s.tflops:g} TFLOP/s, which is assumed"

    def _cpu(self, images: int, seconds: float) -> str:
        return f"{duration(images * seconds)} on a CPU: {images} images x {seconds:g} s, measured on two cores"

    def stage(self, which: str) -> str:
        images, epochs = len(self.lists.train_aug), 1 if which == "prompt" else self.s.epochs or EPOCHS
        size = ((self.s.input_size or 448) / 448) ** 2
        host = self.HOST_GFLOP * size * (1 if which == "prompt" else 3) * images * epochs
        views = 2 * self.pairs * epochs * self.CLIP_GFLOP * (1 if which == "prompt" else 3)
        return self._gpu(host + views, f"{images} images x {epochs} epochs") + "; 0.3 GB"

    def cams(self, part: str, scales: int) -> str:
        ids, pairs = (self.lists.train, self.train_pairs) if part == "train" else (self.lists.train_aug, self.pairs)
        area = sum(float(scale) ** 2 for scale in SCALES[:scales]) * PIXELS / 448**2
        return self._gpu(len(ids) * 2 * area * self.HOST_GFLOP, f"{len(ids)} images x {scales} scales x 2", self.s.gpus) + (
            f"; {data_check.gigabytes(pairs * PIXELS * 4)}, and the host's pictures until the step ends"
        )

    def evaluate(self, folders: int, split: str = "train") -> str:
        return self._cpu(folders * len(getattr(self.lists, split)), self.EVALUATE)

    def refine(self) -> str:
        return self._cpu(len(self.lists.train_aug), self.REFINE) + f"; {data_check.gigabytes(self.pairs * PIXELS * 4)}"

    def labels(self) -> str:
        size = data_check.gigabytes(self.pairs * PIXELS * 4)
        return self._cpu(len(self.lists.train_aug), self.LABELS) + f"; {size} until the step ends"

    def crf(self, images: int) -> str:
        return self._cpu(images, self.CRF)

    def segmentation(self) -> str:
        how = self.s.training
        images = how.steps * how.batch_size
        work = 3 * images * self.SEGMENTER_GFLOP * (how.crop / 512) ** 2
        return self._gpu(work, f"{images} crops", self.s.gpus) + "; 0.5 GB"

    def predict(self) -> str:
        images = len(self.lists.val)
        work = self._gpu(images * self.SEGMENTER_GFLOP * PIXELS / 512**2, f"{images} images", self.s.gpus)
        return f"{work}; with a CRF {self.crf(images)}" if self.s.use_crf else work

    def disk(self) -> int:
        """Bytes that the run writes at most, without data and downloads: CAM files three times and those of train, weights, pictures."""
        cams = (3 * self.pairs + self.train_pairs) * PIXELS * 4
        pictures = self.pairs * PIXELS * 2
        return int(self.s.seeds * (cams + 2e9) + pictures)


def duration(seconds: float) -> str:
    """A time in words, rounded up to what one can plan with."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
