"""The steps of the chain: what each one reads, runs and makes. Flow: `__main__` -> **commands** -> `chain`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from semples_plugin.adapters.runner.job import ONLINE, STAGES
from semples_plugin.adapters.runner.record import commit

from . import crf, data_check, ledger
from .chain import ChainError, Command, Step, read_json
from .datasets import Lists, read_ids
from .estimates import Estimates
from .settings import ALONE, AREA, SCALES, START, Settings
from .weights import DEIT, get_weights, hub_file

SEEDS = (("single", "cams-single"), ("multi", "cams"))
Figure = Tuple[str, Path]  # its name, and the folder of label PNGs or CAM files that it is of


def make_steps(settings: Settings) -> List[Step]:
    """All steps in order."""
    lists = settings.data.lists(settings.limit)
    estimates = Estimates(settings, lists)
    steps = [_check(settings, lists, estimates), *_draw(settings, estimates), _weights(settings)]
    for seed in range(settings.seeds):
        if settings.host_first:
            steps += OneRun(settings, seed, estimates, START).stages()
        for control in settings.runs:
            steps += OneRun(settings, seed, estimates, control).steps()
    return [*steps, _ledger(settings, steps)]


def _check(s: Settings, lists: Lists, estimates: Estimates) -> Step:
    def before() -> None:
        needed = 0 if s.rehearsal else estimates.disk()
        found = data_check.check(s.data, lists, s.clip, s.python, not s.cpu, s.out, needed)
        if found:
            raise ChainError(data_check.report(found))
        data_check.write_lists(s.out / "lists", s.data, lists)

    return Step(
        name="check",
        what="look for everything that is needed, and write the lists",
        makes=[s.out / "lists"],
        facts={
            s.data.option: str(s.data.root),
            "repo": str(s.data.repo),
            "labels": [str(path) for path in s.data.label_files],
            "limit": s.limit,
        },
        before=before,
        always=True,
        estimate="seconds",
    )


def _draw(s: Settings, estimates: Estimates) -> List[Step]:
    """Masks from annotation files, where the data set has no other."""
    files = dict(zip(("train", "val"), s.data.annotations()))
    if not files:
        return []
    group = []
    for split, file in files.items():
        words = [sys.executable, "-m", "examples.voc.coco_masks", "--annotations", str(file)]
        words += ["--list", str(s.out / "lists" / f"{split}.txt"), "--out", str(s.data.masks(split, s.out))]
        group.append(Command(words))
    return [
        Step(
            name="data-masks",
            what="draw the masks of the annotation files; they serve evaluation only",
            makes=[s.data.masks(split, s.out) for split in files],
            needs=[s.out / "lists", *files.values()],
            groups=[group],
            resumes=True,
            clears=[s.data.masks(split, s.out) for split in files],
            estimate=estimates.draw(),
        )
    ]


def _weights(s: Settings) -> Step:
    folder = s.out / "weights"
    needs = [Path(path) for path in (s.clip, s.checkpoint, s.finetune) if path is not None and Path(path).is_file()]
    if not s.rehearsal and Path(s.segmenter).is_dir():
        needs.append(Path(s.segmenter))
    return Step(
        name="weights",
        what="get the weights: CLIP, the host's start, the segmentation network",
        makes=[folder / "weights.json", folder / "segmenter", hub_file(folder), *([folder / "clip.pt"] if s.rehearsal else [])],
        needs=needs,
        facts={"clip": s.clip, "segmenter": s.segmenter, "classes": len(s.data.classes), "rehearsal": s.rehearsal},
        before=lambda: get_weights(s, folder),
        clears=[folder],
        estimate="as long as its downloads take",
    )


def _ledger(s: Settings, steps: Sequence[Step]) -> Step:
    records = [s.out / "steps" / f"{step.name}.json" for step in steps]

    def before() -> None:
        ledger.write(s.out, s.facts(), [record for record in map(read_json, records) if record is not None])

    return Step(
        name="ledger",
        what="one page with all figures",
        makes=[s.out / "ledger.json", s.out / "ledger.html"],
        needs=[path for step in steps for path in step.makes if path.parent.name == "figures"],
        facts=s.facts(),
        before=before,
        always=True,
        estimate="seconds",
    )


class OneRun:
    """The steps of one seed, in a folder of its own, with the method or a control of it.

    Args:
        settings, estimates: of the whole.
        seed: of host and segmentation network.
        control: "" for the method, a name of `Settings.runs`, or `START`.
    """

    def __init__(self, settings: Settings, seed: int, estimates: Estimates, control: str = ""):
        self.s, self.seed, self.estimates, self.control = settings, seed, estimates, control
        self.to_the_end = control == "" or settings.controls
        self.part = "all" if self.to_the_end else "train"  # the images whose masks are made
        self.folder = settings.out / f"seed{seed}" / control
        self.lists, self.given = settings.out / "lists", settings.out / "weights"
        self.photos, self.classes = settings.data.photos("train"), ["--classes", settings.data.option]
        self.host, self.runner = self.folder / "host", self.folder / "runner"
        alone = self.host / "saved" / "checkpoint.pth"  # its own script writes it
        first = settings.out / f"seed{seed}" / START / "host" / "saved" / alone.name if settings.host_first else None
        self.first = first if control != START else None
        last = "refine" if settings.online is None else ONLINE
        self.weights = {ALONE: alone, START: alone, AREA: self.runner / "match.pt"}.get(control, self.runner / f"{last}.pt")
        self.host_facts = {"host": commit(settings.data.repo)} if settings.data.repo.is_dir() else {}

    def steps(self) -> List[Step]:
        """All of them, in order."""
        which = "all training images" if self.part == "all" else "train"
        return [
            *self.stages(),
            self._cams("cams-single", "CAM files of train by the host's script, scale 1.0", "train", ["1.0"]),
            self._cams("cams", f"CAM files of {which} by the host's script, its own scales", self.part, SCALES),
            self._figures("seeds", "mIoU of the CAM files", [(kind, self.folder / cams) for kind, cams in SEEDS]),
            *self._masks(),
            *([*self._labels(), *self._segmentation()] if self.to_the_end else []),
        ]

    def _name(self, step: str) -> str:
        return "/".join([f"seed{self.seed}", *([self.control] if self.control else []), step])

    def _begin(self, processes: int) -> List[str]:
        """The beginning of a command that shares its work among processes; the name of a module follows."""
        if processes < 2:
            return [sys.executable, "-m"]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]

    def _shared(self, words: Sequence[str], processes: int) -> Dict[str, Any]:
        """Fields of a step whose processes share the images; how many they are decides nothing."""
        return {"groups": [[Command([*self._begin(processes), *words])]], "decides": [shlex.join(words)]}

    # ------------------------------------------------------------------------------------------------ the host

    def _host(
        self, stage: str, ours: Sequence[str], script: Sequence[str], gpu: int = 0, module: str = "semples_plugin.adapters"
    ) -> Command:
        """The host's script in the runner, on one GPU."""
        words = [self.s.python, "-m", module, "mctformer", "--repo", str(self.s.data.repo), "--cwd", str(self.host)]
        words += ["--out", str(self.runner), *self.classes, "--stage", stage, *(["--cpu"] if self.s.cpu else [])]
        words += [*ours, "--", *script]
        environment = {"TORCH_HOME": str(self.given / "torch")}
        if self.s.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        return Command(words, environment)

    def _sizes(self, training: bool) -> List[str]:
        """Sizes of the host, where they are not its own."""
        words = [] if self.s.input_size is None else ["--input-size", str(self.s.input_size)]
        if training and self.s.epochs is not None:
            words += ["--epochs", str(self.s.epochs)]
        if training and self.s.batch_size is not None:
            words += ["--batch-size", str(self.s.batch_size)]
        return [*words, *(["--device", "cpu", "--num_workers", "0", "--no-pin-mem"] if self.s.cpu else [])]

    def _data(self, training: bool) -> List[str]:
        """The data set, for the host."""
        data = self.s.data
        words = ["--data-set", data.host[0 if training else 1], "--data-path", str(data.root)]
        return [*words, *data.label_words(self.lists / "cls_labels.npy")]

    def _prepare_host(self) -> None:
        """The folder that the host's script runs in."""
        for part in ("voc12", "saved"):
            (self.host / part).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.lists / "cls_labels.npy", self.host / "voc12" / "cls_labels.npy")

    def stages(self) -> List[Step]:
        """The trainings."""
        s, match, prompts = self.s, self.runner / "match.pt", self.runner / "prompts.safetensors"
        train = ["main.py", *self._data(training=True), "--img-list", str(self.lists / "all"), "--output_dir", "saved"]
        train += [*(["--finetune", DEIT] if s.pretrained else []), "--seed", str(self.seed), *self._sizes(training=True)]
        if self.control != START:
            train += s.host_arguments
        checkpoint = s.checkpoint or self.first
        start = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
        ours = ["--restart", "--seed", str(self.seed), "--clip", s.clip or str(self.given / "clip.pt")]
        ours += [word for assignment in s.refiner for word in ("--set", assignment)]
        if self.control != AREA:  # which would empty the CAM without the label loss
            ours += ["--mode", s.mode]
        ours += start
        ours += ["--prompt-epochs", "2", "--log-every", "1"] if s.rehearsal else []
        saved = self.host / "saved"  # the host's script appends to its log there

        def stage(
            name: str, what: str, makes: Sequence[Path], needs: Sequence[Path], clears: Sequence[Path], command: Command
        ) -> Step:
            return Step(
                name=self._name(name),
                what=what,
                makes=makes,
                needs=[self.lists, self.given / "weights.json", *([] if self.first is None else [self.first]), *needs],
                facts=self.host_facts,
                groups=[[command]],
                before=self._prepare_host,
                clears=clears,
                estimate=self.estimates.stage(name if self.control == "" else self.control),
            )

        if self.control in (ALONE, START):
            command = self._host("plain", ["--seed", str(self.seed), *start], train)
            what = "train the host with nothing attached" + (", for all others to start from" if self.control == START else "")
            return [stage("train", what, [self.weights], [], [saved], command)]
        log = self.runner / "match.jsonl"
        if self.control == AREA:
            command = self._host("match", ours, train, module="examples.voc.area")
            what = "train the host with the area term alone"
            return [stage("train", what, [self.weights, log], [], [self.runner, saved], command)]
        if s.online is not None:
            command = self._host(ONLINE, [*ours, "--set", f"online_steps={s.online}"], train)
            what = "train the host with match and refine, prompts learned along the way"
            made = [self.weights, prompts, self.runner / f"{ONLINE}.jsonl"]
            return [stage(ONLINE, what, made, [], [self.runner, saved], command)]
        made, log_of_refine = [match, log], self.runner / "refine.jsonl"
        commands = {name: self._host(name, ours, train) for name in STAGES}
        what = "train the host again, with match and refine"
        return [
            stage("match", "train the host with match", made, [], [self.runner, saved], commands["match"]),
            stage("prompt", "learn the background prompts", [prompts], [match], [saved], commands["prompt"]),
            stage("refine", what, [self.weights, log_of_refine], [match, prompts], [saved], commands["refine"]),
        ]

    def _cams(self, name: str, what: str, part: str, scales: Sequence[str]) -> Step:
        """CAM files with the host's script, which has no resume: the images are shared out among the GPUs."""
        target, parts, pictures = self.folder / name, self.folder / f"{name}-lists", self.folder / f"{name}-pictures"
        shards = max(1, self.s.gpus)

        def before() -> None:
            self._prepare_host()
            target.mkdir(parents=True, exist_ok=True)
            data = self.s.data
            ids, val = (read_ids(self.lists / part / name) for name in (data.train_lists[0], "val_id.txt"))
            for i in range(shards):
                data_check.write_host_lists(parts / str(i), data, ids[i::shards], val)

        def after() -> None:
            for path in (parts, pictures):
                shutil.rmtree(path, ignore_errors=True)

        script = ["main.py", *self._data(training=False), "--gen_attention_maps"]
        script += ["--resume", str(self.weights), "--scales", *scales, *self._sizes(training=False)]
        script += ["--cam-npy-dir", str(target), "--attention-dir", str(pictures)]
        return Step(
            name=self._name(name),
            what=what,
            makes=[target],
            needs=[self.lists, self.weights],
            facts=self.host_facts,
            groups=[[self._host("plain", [], [*script, "--img-list", str(parts / str(i))], gpu=i) for i in range(shards)]],
            decides=[shlex.join(script)],
            before=before,
            after=after,
            clears=[parts, pictures],
            estimate=self.estimates.cams(part, len(scales)),
        )

    # ------------------------------------------------------------------------------------------------ figures

    def _figures(self, name: str, what: str, figures: Sequence[Figure], split: str = "train") -> Step:
        target, truth = self.folder / "figures" / name, self.s.data.masks(split, self.s.out)
        groups = []
        for figure, predictions in figures:
            words = [sys.executable, "-m", "semples_plugin", "evaluate", "--pred", str(predictions), "--gt", str(truth)]
            words += ["--list", str(self.lists / f"{split}.txt"), "--split", split, *self.classes, "--json"]
            groups.append([Command(words, stdout=target / f"{figure}.json")])
        return Step(
            name=self._name(name),
            what=f"{what} on {split}",
            makes=[target],
            needs=[self.lists, *(path for _, path in figures), *([truth] if self.s.data.annotations() else [])],
            groups=groups,
            estimate=self.estimates.evaluate(len(figures), split),
        )

    # ------------------------------------------------------------------------------------------------ masks, pseudo labels

    def _refine(self, cams: Path, out: Path, *more: str) -> List[str]:
        words = ["semples_plugin", "refine", "--images", str(self.photos), "--cams", str(cams), "--out", str(out)]
        return [*words, *self.classes, *more, "--quiet"]

    def _masks(self) -> List[Step]:
        out, cams, with_crf = self.folder / "masks", self.folder / "cams", self.folder / "masks-crf"
        threshold = f"{self.s.threshold:g}"
        refine = self._refine(cams, out, "--threshold", threshold)
        align = Step(
            name=self._name("masks"),
            what="align the CAMs to the edges of the photos",
            makes=[out / "cams", out / "labels"],
            needs=[self.lists, cams],
            **self._shared(refine, self.s.processes),
            resumes=True,
            clears=[out],
            estimate=self.estimates.refine(self.part),
        )
        words = ["examples.voc.crf", "--photos", str(self.photos), "--cams", str(out / "cams")]
        words += ["--list", str(self.lists / "train.txt"), "--threshold", threshold, "--out", str(with_crf)]
        words += ["--num-classes", str(len(self.s.data.classes))]
        used = self.s.use_crf
        field = Step(
            name=self._name("masks-crf"),
            what="dense CRF on the aligned CAMs of train",
            makes=[with_crf] if used else [],
            needs=[self.lists, out / "cams"] if used else [],
            **(self._shared(words, self.s.processes) if used else {}),
            resumes=True,
            clears=[with_crf],
            estimate=self.estimates.crf("train"),
            note=None if used else crf.NOTE,
        )
        figures = [("best", out / "cams"), ("fixed", out / "labels"), *([("crf", with_crf)] if used else [])]
        return [align, field, self._figures("mask-figures", "mIoU of the masks", figures)]

    def _labels(self) -> List[Step]:
        out, cams, low, high = self.folder / "labels", self.folder / "masks" / "cams", self.s.low, self.s.high
        refine = self._refine(cams, out, "--align", "none", "--threshold", f"{low:g}:{high:g}")
        step = Step(
            name=self._name("labels"),
            what=f"pseudo labels: background up to {low:g}, 255 up to {high:g}",
            makes=[out / "labels"],
            needs=[self.lists, cams],
            **self._shared(refine, self.s.processes),
            after=lambda: shutil.rmtree(out / "cams", ignore_errors=True),  # a copy of those of the masks
            resumes=True,
            clears=[out],
            estimate=self.estimates.labels(),
        )
        return [step, self._figures("label-figures", "mIoU of the pseudo labels", [("labels", out / "labels")])]

    # ------------------------------------------------------------------------------------------------ segmentation

    def _segmentation(self) -> List[Step]:
        labels, out, predicted = self.folder / "labels" / "labels", self.folder / "segmentation", self.folder / "predictions"
        common = ["--cpu"] if self.s.cpu else []
        how = self.s.training._replace(seed=self.seed)
        train = ["examples.voc.segmentation", "train", *common, "--photos", str(self.photos), "--labels", str(labels)]
        train += ["--list", str(self.lists / "train_aug.txt")]
        train += ["--segmenter", str(self.given / "segmenter"), "--out", str(out)]
        train += [word for field, value in how._asdict().items() for word in (f"--{field.replace('_', '-')}", f"{value}")]
        predict = ["examples.voc.segmentation", "predict", *common, "--photos", str(self.s.data.photos("val"))]
        predict += ["--list", str(self.lists / "val.txt"), "--segmenter", str(out / "model")]
        predict += ["--out", str(predicted / "plain"), *(["--crf-out", str(predicted / "crf")] if self.s.use_crf else [])]
        made = [predicted / "plain", *([predicted / "crf"] if self.s.use_crf else [])]
        return [
            Step(
                name=self._name("segmentation"),
                what=f"train the segmentation network, {how.steps} steps",
                makes=[out / "model", out / "log.jsonl"],
                needs=[self.lists, labels, self.given / "segmenter"],
                groups=[[Command([*self._begin(self.s.gpus), *train])]],
                resumes=True,
                clears=[out],
                estimate=self.estimates.segmentation(),
            ),
            Step(
                name=self._name("predictions"),
                what="predict the labels of val",
                makes=made,
                needs=[self.lists, out / "model"],
                **self._shared(predict, self.s.gpus),
                resumes=True,
                clears=[predicted],
                estimate=self.estimates.predict(),
            ),
            self._figures("evaluation", "mIoU of the segmentation network", [(path.name, path) for path in made], "val"),
        ]
