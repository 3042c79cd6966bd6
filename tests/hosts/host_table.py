"""Every baseline through its own, unedited script, attached by the runner: one table.

    python tests/hosts/host_table.py --repos FOLDER --photos VOCdevkit/VOC2012 --out table [NAME ...]

FOLDER holds clones under the names of their repositories (`git clone https://github.com/Wu0409/DuPL`, ...). For each baseline a
working folder is made below --out with short image lists and random weights; the three stages run on the CPU on a few photos,
and before them a dry run, whose page says what was attached to what. The clones stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image

from semples_plugin.clip_backends import openai_clip_module

HERE = Path(__file__).parent
Prepare = Callable[[Path, Path, Path], None]  # repository, photos, working folder


class Recipe(NamedTuple):
    """How one baseline is run.

    Attributes:
        repo: folder of the clone, and where in it the script's folder is.
        ours: arguments of the runner: the adapter and its options.
        script: the host's script and its arguments; WORK is the working folder, PHOTOS the photos.
        prepare: makes lists and weights.
        network: that should be found.
        attach: further networks, as `--attach` takes them.
    """

    repo: str
    ours: Sequence[str]
    script: Sequence[str]
    prepare: Prepare
    network: str
    note: str = ""


def photo_ids(photos: Path, count: int = 4) -> List[str]:
    return [path.stem for path in sorted((photos / "JPEGImages").glob("*.jpg"))][:count]


def labelled_ids(photos: Path, labels: Path) -> List[str]:
    """Four photos that a host's file of labels has, whose keys are ids as texts or as numbers, or names of files."""
    known = {str(key).replace(".jpg", "").replace("_", "") for key in np.load(labels, allow_pickle=True).item()}
    return [name for name in photo_ids(photos, 30) if name.replace("_", "") in known][:4]


def write_pairs(path: Path, ids: Sequence[str]) -> None:
    """A list of photos and their masks, by paths below the folder of photos."""
    pairs = "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ids)
    path.write_text(pairs, encoding="utf-8")


def write_chainercv(work: Path) -> None:
    """A stand-in for the library that scores masks, which is not run."""
    for part in ("datasets", "evaluations"):
        (work / "chainercv" / part).mkdir(parents=True, exist_ok=True)
        (work / "chainercv" / "__init__.py").touch()
        (work / "chainercv" / part / "__init__.py").write_text(CHAINERCV, encoding="utf-8")


def save_clip_archive(path: Path, *sizes: int) -> None:
    """OpenAI's CLIP with random weights, as an archive, which is what these hosts can read."""
    torch.manual_seed(0)
    model = openai_clip_module("model").CLIP(*sizes).eval()
    texts = torch.ones(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, (torch.zeros(1, 3, 224, 224), texts), check_trace=False), str(path))


def onehot_lists(repo: Path, photos: Path, work: Path) -> None:
    """Lists of ids and one-hot labels, as ToCo and its successors read them."""
    folder = work / "lists"
    folder.mkdir(parents=True, exist_ok=True)
    source = repo / "datasets/voc/cls_labels_onehot.npy"
    ids = labelled_ids(photos, source)
    for split in ("train_aug", "train", "val", "trainval"):
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    link(folder / "cls_labels_onehot.npy", source)
    for name, code in STAND_INS.items():
        path = work / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")


# For libraries that are compiled, or were for an older torch; of each the one function that the hosts use.
STAND_INS = {
    "bilateralfilter": "def bilateralfilter(*_):\n    pass\n\n\nbilateralfilter_batch = bilateralfilter\n",  # dense energy: 0
    "mmcv/__init__": "import cv2\n\n\ndef bgr2hsv(x):\n    return cv2.cvtColor(x, cv2.COLOR_BGR2HSV)\n\n\n"
    "def hsv2bgr(x):\n    return cv2.cvtColor(x, cv2.COLOR_HSV2BGR)\n",
    "mmcv/cnn": "from torch import nn\n\n\nclass ConvModule(nn.Sequential):\n"
    "    def __init__(self, in_channels, out_channels, kernel_size, norm_cfg=None, **_):\n"
    "        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size), nn.BatchNorm2d(out_channels), nn.ReLU())\n",
    "cmapy": "",
}


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def voc_folder(photos: Path, work: Path) -> Path:
    """The photos with their masks under the names that the hosts read."""
    folder = work / "voc"
    folder.mkdir(exist_ok=True)
    for name in ("JPEGImages", "SegmentationClass"):
        link(folder / name, photos / name)
    grey = folder / "SegmentationClassAug"  # as the list of augmented masks has them: without a palette
    if grey.is_symlink():
        grey.unlink()
    grey.mkdir(exist_ok=True)
    for name in photo_ids(photos, 30):
        if (photos / "SegmentationClass" / f"{name}.png").exists():
            with Image.open(photos / "SegmentationClass" / f"{name}.png") as mask:
                Image.fromarray(np.array(mask)).save(grey / f"{name}.png")
    return folder


def toco_like(repo: str, script: str, *more: str, adapter: str = "toco") -> Recipe:
    arguments = ["--data_folder", "PHOTOS", "--list_folder", "WORK/lists", "--max_iters", "4", "--num_workers", "1"]
    arguments += ["--crop_size", "96", "--pretrained", "", "--work_dir", "WORK/work", "--log_iters", "1"]
    network = "siamese_network" if repo == "DuPL" else "network"
    return Recipe(repo, [adapter], [script, *arguments, *more], onehot_lists, network)


def numbers_lists(repo: Path, photos: Path, work: Path) -> None:
    """Lists and labels as IRN and its successors read them, and random ImageNet weights of their ResNet-50."""
    folder = work / "voc12"
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / "cls_labels.npy", repo / "voc12/cls_labels.npy")
    ids = labelled_ids(photos, folder / "cls_labels.npy")
    for split in ("train_aug", "train", "val"):  # NumPy >= 1.23 reads no underscores
        (folder / f"{split}.txt").write_text("".join(name.replace("_", "") + "\n" for name in ids), encoding="utf-8")
    (work / "ids.txt").write_text("\n".join(ids), encoding="utf-8")
    write_chainercv(work)
    (work / "cmapy.py").write_text(STAND_INS["cmapy"], encoding="utf-8")
    (work / "pykeops").mkdir(exist_ok=True)
    (work / "pykeops" / "__init__.py").touch()
    (work / "pykeops" / "torch.py").write_text("def LazyTensor(x):\n    return x\n", encoding="utf-8")  # as a plain tensor
    python(repo, work, WEIGHTS.format(module="net.resnet50", arguments="strides=(2, 2, 2, 1)"))


CHAINERCV = """import numpy as np


class VOCSemanticSegmentationDataset:
    def __init__(self, **_):
        self.ids = []


def calc_semantic_segmentation_confusion(preds, labels):
    return np.zeros((21, 21))
"""
WEIGHTS = """
import importlib, pathlib, torch
torch.manual_seed(0)
network = importlib.import_module("{module}")
weights = network.resnet50(pretrained=False, {arguments}).state_dict()
for key in weights:
    if key.endswith("bn3.weight"):
        weights[key].fill_(0.2)  # the batch statistics are fixed at 0 and 1: keeps the sum of the branches small
weights.update({{"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}})
path = pathlib.Path("torch/hub/checkpoints") / pathlib.Path(network.model_urls["resnet50"]).name
path.parent.mkdir(parents=True, exist_ok=True)
torch.save(weights, path)
"""


def python(repo: Path, work: Path, code: str) -> None:
    """Run code with the host's modules, which never enter this process."""
    paths = os.pathsep.join([str(HERE / "site"), str(work), str(repo)])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_HOME": str(work / "torch")}
    subprocess.run([sys.executable, "-B", "-W", "ignore", "-c", code], cwd=work, env=environment, check=True)


def amn_lists(repo: Path, photos: Path, work: Path) -> None:
    """Pseudo labels besides: background, the first class and void."""
    numbers_lists(repo, photos, work)
    (work / "ir_label").mkdir(exist_ok=True)
    for name in (work / "ids.txt").read_text().split():
        size = Image.open(photos / "JPEGImages" / f"{name}.jpg").size
        mask = np.zeros(size[::-1], np.uint8)
        mask[: size[1] // 2], mask[:, : size[0] // 4] = 1, 255
        Image.fromarray(mask).save(work / "ir_label" / f"{name}.png")


def wood_lists(repo: Path, photos: Path, work: Path) -> None:
    """Out-of-distribution images besides, here the same photos, and a trained classifier."""
    numbers_lists(repo, photos, work)
    ids = (work / "ids.txt").read_text().split()
    labels = np.load(repo / "voc12/cls_labels.npy", allow_pickle=True).item()
    spread = {}
    for k, name in enumerate(ids):  # its distances need an image of every class, or batches of 16
        spread[int(name.replace("_", ""))] = np.float32(np.arange(20) // 5 == k)
    (work / "voc12/cls_labels.npy").unlink()
    np.save(work / "voc12/cls_labels.npy", {**labels, **spread})
    (work / "ood.txt").write_text("".join(f"{name}.jpg\n" for name in ids), encoding="utf-8")
    (work / "sess").mkdir(exist_ok=True)
    python(
        repo,
        work,
        """
import importlib, torch
torch.manual_seed(0)
torch.save(importlib.import_module("net.resnet50_cam").Net().state_dict(), "sess/res50_cam_orig.pth.pth")
""",
    )


def clims_lists(repo: Path, photos: Path, work: Path) -> None:
    numbers_lists(repo, photos, work)
    save_clip_archive(work / "its_clip.pt", 32, 224, 2, 64, 32, 77, 49408, 64, 1, 2)
    python(
        repo,
        work,
        """
import importlib, pathlib, torch
torch.manual_seed(0)
folder = pathlib.Path("cam-baseline-voc12")
folder.mkdir(exist_ok=True)
torch.save(importlib.import_module("net.resnet50_clims").CLIMS().state_dict(), folder / "res50_cam.pth")
""",
    )


def pair_lists(repo: Path, photos: Path, work: Path) -> None:
    """Lists of pairs of paths, as SEAM's successors read them."""
    folder = work / "voc12"
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / "cls_labels.npy", repo / "voc12/cls_labels.npy")
    ids = labelled_ids(photos, folder / "cls_labels.npy")
    for split in ("train_aug", "val"):
        write_pairs(folder / f"{split}.txt", ids)
    torch.save({}, work / "none.pth")


def sipe_lists(repo: Path, photos: Path, work: Path) -> None:
    """It looks for photos and lists at fixed places beside its folder of work."""
    folder = work / "inside" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / "cls_labels_voc.npy", repo / "data/cls_labels_voc.npy")
    ids = labelled_ids(photos, folder / "cls_labels_voc.npy")
    for split in ("trainaug", "train"):
        write_pairs(folder / f"{split}_voc.txt", ids)
    (work / "PascalVOC2012" / "VOCdevkit").mkdir(parents=True, exist_ok=True)
    link(work / "PascalVOC2012" / "VOCdevkit" / "VOC2012", photos)
    write_chainercv(work)
    python(repo, work, WEIGHTS.format(module="network.resnet50", arguments="strides=(2, 2, 2, 1), dilations=(1, 1, 1, 1)"))


def vit_b16(work: Path) -> Path:
    path = work / "ViT-B-16.pt"
    if not path.exists():
        save_clip_archive(path, 512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    return path


def weclip_lists(repo: Path, photos: Path, work: Path) -> None:
    onehot_lists(repo, photos, work)
    clip, config = vit_b16(work), (repo / "configs/voc_attn_reg.yaml").read_text(encoding="utf-8")
    values = {"root_dir": photos, "name_list_dir": work / "lists", "clip_pretrain_path": clip, "samples_per_gpu": 2}
    values.update(max_iters=2, log_iters=1)
    for key, value in values.items():
        config = re.sub(rf"(?m)^(\s+{key}:).*$", rf"\1 {value}", config)
    (work / "config.yaml").write_text(config, encoding="utf-8")


def excel_lists(repo: Path, photos: Path, work: Path) -> None:
    onehot_lists(repo, photos, work)
    vit_b16(work)
    link(work / "attributes_text", repo / "attributes_text")


IRN = ("--voc12_root", "PHOTOS", "--num_workers", "0", "--cam_batch_size", "2")
CNN = ("--host-option", "features=stage4", "--host-option", "classifier=classifier", "--host-option", "image_stats=imagenet")


def voc_lists(repo: Path, photos: Path, work: Path) -> None:
    """Lists, labels and a data folder as MCTformer, WeakTr and TransCAM read them."""
    folder = work / "voc12"
    folder.mkdir(parents=True, exist_ok=True)
    link(folder / "cls_labels.npy", repo / "voc12/cls_labels.npy")
    ids = labelled_ids(photos, folder / "cls_labels.npy")
    for split in ("train_aug", "train", "val"):
        (folder / f"{split}_id.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        write_pairs(folder / f"{split}.txt", ids)
    (work / "voc12data" / "VOCdevkit").mkdir(parents=True, exist_ok=True)
    link(work / "voc12data" / "VOCdevkit" / "VOC2012", photos)
    (work / "saved").mkdir(exist_ok=True)
    heads = [f"{head}_cls_head.{kind}" for head in ("trans", "conv") for kind in ("weight", "bias")]
    torch.save({key: torch.zeros(1) for key in heads}, work / "init.pth")  # TransCAM's script drops these
    torch.save({}, work / "none.pth")


def timm_labels(repo: Path, photos: Path, work: Path) -> None:
    labels = {name: np.float32(np.arange(20) == k) for k, name in enumerate(photo_ids(photos))}
    np.save(work / "labels.npy", labels)  # type: ignore[arg-type]


SMALL = ("--input-size", "64", "--batch-size", "2", "--epochs", "1", "--num_workers", "0", "--output_dir", "saved")
OTHER_STEPS = "make_cam eval_cam cam_to_ir_label train_irn make_ins_seg eval_ins_seg make_sem_seg eval_sem_seg".split()
RECIPES: Dict[str, Recipe] = {
    "MCTformer": Recipe(
        "MCTformer", ["mctformer"],
        ["main.py", "--data-path", "PHOTOS", "--img-list", "voc12", "--device", "cpu", *SMALL], voc_lists, "MCTformerPlus",
    ),
    "WeakTr": Recipe(
        "WeakTr", ["weaktr"],
        ["main.py", "--data-path", "WORK/voc12data", "--img-ms-list", "voc12/train_aug_id.txt", "--label-file-path",
         "voc12/cls_labels.npy", "--model", "deit_small_WeakTr_patch16_224", "--data-set", "VOC12", "--finetune", "",
         "--no-if_eval_miou", *SMALL], voc_lists, "WeakTr",
    ),
    "TransCAM": Recipe(
        "TransCAM", ["transcam"],
        ["train_TransCAM.py", "--arch", "ti", "--voc12_root", "PHOTOS", "--batch_size", "2", "--max_epoches", "1",
         "--crop_size", "64", "--weights", "init.pth", "--num_workers", "0", "--session_name", "saved/s"],
        voc_lists, "Net",
    ),
    "IRN": Recipe(
        "irn", ["generic", *CNN],
        ["run_sample.py", *IRN, "--cam_num_epoches", "1", "--cam_learning_rate", "0.001",
         *(part for step in OTHER_STEPS for part in (f"--{step}_pass", "no"))], numbers_lists, "Net",
    ),
    "SEAM": Recipe(
        "SEAM", ["generic", "--host-option", "cam=fc8", "--host-option", "background_channel=True", "--host-option",
                 "activation=relu", "--host-option", "image_stats=imagenet"],
        ["train_SEAM.py", "--voc12_root", "PHOTOS", "--num_workers", "0", "--batch_size", "2", "--max_epoches", "1",
         "--crop_size", "64", "--lr", "0.001", "--weights", "none.pth"], pair_lists, "Net",
    ),
    "ToCo": toco_like(
        "ToCo", "scripts/dist_train_voc_seg_neg.py", "--backbone", "deit_tiny_patch16_224", "--local_rank", "0", "--spg", "2",
        "--local_crop_size", "32",
    ),
    "DuPL": toco_like(
        "DuPL", "train_final_voc.py", "--backbone", "deit_tiny_patch16_224", "--cam_iters", "1", "--gmm_iters", "2",
        adapter="dupl",
    ),
    "SeCo": toco_like("SeCo", "scripts/train_voc.py", "--local_rank", "0", "--spg", "2", "--ncrops", "4"),
    "ReCAM": Recipe(
        "ReCAM", ["recam", "--network", "Net", "--attach", "recam network=Net_CAM_Feature"],
        ["run_sample.py", *IRN, "--cam_num_epoches", "1", "--recam_num_epoches", "1", "--cam_learning_rate", "0.001",
         "--work_space", "result", "--train_cam_pass", "True", "--train_recam_pass", "True"], numbers_lists, "Net",
    ),
    "PPC": Recipe(
        "wseg", ["generic", "--host-option", "cam=fc8", "--host-option", "background_channel=True", "--host-option",
                 "activation=relu", "--host-option", "image_stats=imagenet"],
        ["contrast_train.py", "--voc12_root", "PHOTOS", "--num_workers", "0", "--batch_size", "2", "--max_epoches", "1",
         "--crop_size", "64", "--weights", "none.pth", "--lr", "0.001"], pair_lists, "Net",
    ),
    "SIPE": Recipe(
        "SIPE", ["generic", "--host-option", "cam=classifier", "--host-option", "image_stats=imagenet", "--cwd", "WORK/inside"],
        ["train_resnet50_SIPE.py", "--num_workers", "0", "--batch_size", "2", "--max_epoches", "1", "--lr", "0.001",
         "--val_freq", "1000", "--tf_freq", "1000"], sipe_lists, "Net",
    ),
    "W-OoD": Recipe(
        "w-ood", ["generic", *CNN, "--host-option", "calls=['feature_list']"],
        ["run_sample.py", *IRN, "--cam_num_epoches", "2", "--ood_root", "PHOTOS/JPEGImages", "--ood_list", "WORK/ood.txt",
         "--ood_batch_size", "2", "--cluster_K", "2", "--cam_learning_rate", "0.001",
         *(part for name in ("make_cam", "eval_cam", "cam_to_ir_label", "train_irn", "make_ins_seg", "eval_ins_seg",
                             "make_sem_seg", "eval_sem_seg") for part in (f"--{name}_pass", ""))], wood_lists, "Net",
    ),
    "CLIMS": Recipe(
        "CLIMS", ["generic", *CNN, "--labels", "loader:label"],
        ["run_sample.py", *IRN, "--clims_num_epoches", "1", "--clip", "WORK/its_clip.pt", "--work_space", "result",
         "--train_clims_pass", "True"], clims_lists, "CLIMS",
    ),
    "AMN": Recipe(
        "AMN", ["generic", "--host-option", "cam=classifier", "--host-option", "background_channel=True", "--host-option",
                "activation=softmax", "--host-option", "image_stats=imagenet", "--labels", "forward:label_cls"],
        ["run_sample.py", "--voc12_root", "PHOTOS", "--num_workers", "0", "--amn_batch_size", "2", "--amn_num_epoches", "1",
         "--amn_crop_size", "128", "--train_amn_pass", "True", "--ir_label_out_dir", "WORK/ir_label"], amn_lists, "Net",
    ),
    "WeCLIP": Recipe(
        "WeCLIP/WeCLIP", ["weclip"],
        ["scripts/dist_clip_voc.py", "--config", "WORK/config.yaml", "--crop_size", "96", "--work_dir", "WORK/work"],
        weclip_lists, "WeCLIP",
    ),
    "ExCEL": Recipe(
        "ExCEL", ["excel"],
        ["scripts/train_voc.py", "--model", "WORK/ViT-B-16.pt", "--data_folder", "PHOTOS", "--list_folder", "WORK/lists",
         "--max_iters", "2", "--crop_size", "320", "--spg", "4", "--num_workers", "1", "--local_rank", "0", "--work_dir",
         "WORK/work", "--log_iters", "1"], excel_lists, "ExCEL_model",
    ),
    "timm ResNet-18": Recipe(
        "timm_host", ["generic", "--host-option", "features=layer4", "--host-option", "classifier=fc", "--host-option",
                      "image_stats=imagenet"],
        ["train.py", "resnet18", "PHOTOS", "WORK/labels.npy"], timm_labels, "ResNet",
    ),
    "timm ViT-tiny": Recipe(
        "timm_host", ["generic", "--host-option", "features=norm", "--host-option", "classifier=head", "--host-option",
                      "image_stats=imagenet"],
        ["train.py", "vit_tiny_patch16_224", "PHOTOS", "WORK/labels.npy"], timm_labels, "VisionTransformer",
    ),
    "MoRe": toco_like(
        "MoRe", "scripts/train_voc.py", "--local_rank", "0", "--spg", "2", "--finetune", "", "--crop_size", "224",
    ),
}  # fmt: skip


def tiny_clip(path: Path) -> None:
    torch.manual_seed(0)
    torch.save(openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2).state_dict(), path)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(name: str, recipe: Recipe, repos: Path, photos: Path, out: Path) -> Dict[str, Any]:
    """The dry run and the three stages of one baseline."""
    work = (out / name).resolve()
    work.mkdir(parents=True, exist_ok=True)
    repo = (HERE if recipe.repo == "timm_host" else repos).joinpath(recipe.repo).resolve()
    photos = voc_folder(photos, work)
    recipe.prepare(repo, photos, work)
    tiny_clip(work / "clip.pt")
    paths = [str(HERE / "site"), str(work), str(repo), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

    def start(*ours: str) -> "subprocess.CompletedProcess[str]":
        script = [part.replace("WORK", str(work)).replace("PHOTOS", str(photos)) for part in recipe.script]
        own = [part.replace("WORK", str(work)) for part in recipe.ours]
        command = [sys.executable, "-W", "ignore", "-m", "semples_plugin.adapters", own[0], "--repo", str(repo)]
        command += [
            "--cwd",
            str(work),
            *own[1:],
            "--out",
            str(work / "run"),
            "--clip",
            str(work / "clip.pt"),
            "--cpu",
            "--log-every",
            "1",
        ]
        command += ["--set", "prompt_length=4", "--prompt-epochs", "2", *ours, "--", *script]
        environment = {**os.environ, **process, "MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(paths)}
        environment["TORCH_HOME"] = str(work / "torch")
        return subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, errors="replace", timeout=1800
        )

    begun = time.monotonic()
    before = git_state(repo)
    dry = start("--dry-run", "2")
    (work / "dry_run.txt").write_text(dry.stdout + "\n" + dry.stderr, encoding="utf-8")
    found: Dict[str, Any] = {
        "dry run": dry.returncode,
        "page": dry.stdout,
        "error": dry.stderr[-1500:] if dry.returncode else "",
    }
    for stage in ("match", "prompt", "refine"):
        if found.get("failed") is None:
            done = start("--stage", stage, *(["--restart"] if stage == "match" else []))
            (work / f"{stage}.txt").write_text(done.stdout + "\n" + done.stderr, encoding="utf-8")
            if done.returncode:
                found["failed"], found["error"] = stage, done.stderr[-1500:]
    record = work / "run" / "record.json"
    if record.exists():
        found["stages"] = {key: value.get("state") for key, value in json.loads(record.read_text())["stages"].items()}
        found["networks"] = json.loads(record.read_text())["stages"].get("match", {}).get("networks")
    found["clone unchanged"] = git_state(repo) == before
    found["seconds"] = round(time.monotonic() - begun)
    return found


def git_state(repo: Path) -> str:
    command = ["git", "-C", str(repo), "status", "--porcelain", "--ignored"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def lines_of(page: str) -> Dict[str, str]:
    return dict(line.split(": ", 1) for line in page.splitlines() if ": " in line)


def table(results: Dict[str, Dict[str, Any]]) -> str:
    rows = ["| host | three stages | network | CAM | labels | loss added | the loss reaches |", "|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        page = lines_of(found.get("page", ""))
        stages = "yes" if list(found.get("stages", {}).values()) == ["done"] * 3 else f"no: {found.get('failed', 'dry run')}"
        cells = [stages, *(page.get(key, "").replace("|", "/") for key in ("network", "CAM", "labels", "loss", "reached"))]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="default: all")
    parser.add_argument("--repos", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/hosts"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.names or RECIPES:
        results[name] = run(name, RECIPES[name], options.repos, options.photos.resolve(), options.out)
        path.write_text(json.dumps(results, indent=2))
        print(name, {key: value for key, value in results[name].items() if key != "page"}, flush=True)
    (options.out / "table.md").write_text(table(results))


if __name__ == "__main__":
    main()
