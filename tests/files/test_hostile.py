"""Files of strangers: one bad file costs one line, and nothing runs, hangs, fills the memory or reaches the terminal raw."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch

from semples_plugin import PromptRefiner, cli
from semples_plugin._files import open_regular, read_tensors, remove_parts, write_atomically, write_tensors
from semples_plugin.clip_backends import load_clip, openai_clip_module
from semples_plugin.errors import CamFileError, ClipError, PromptFileError
from semples_plugin.files import cams, images, labels, pickles, refine_images
from semples_plugin.prompt_files import read_file
from tests.files.refine_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def npy(path: Path, content: bytes) -> Path:
    """A `.npy` file with a pickle after its header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(file.getvalue() + content)
    return path


def limited(seconds: int, function: Callable[[], Any]) -> Any:
    """The function's result; an error if it takes longer."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return function()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------ code


EVIL = """
import torch
from typing import Tuple
class Evil(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text_projection = torch.zeros(2, 2)
    @torch.jit.export
    def __getstate__(self):
        return (self.text_projection, self.training)
    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]):
        self.text_projection = state[0]
        self.training = state[1]
        print("the archive's code ran")
    def forward(self, x: torch.Tensor):
        return x
torch.jit.save(torch.jit.script(Evil()), "evil.pt")
"""


def test_an_archive_of_clip_weights_runs_no_code(tmp_path: Path, capfd: Any) -> None:
    import subprocess

    (tmp_path / "make.py").write_text(EVIL)  # the compiler wants the source in a file
    subprocess.run([sys.executable, "-W", "ignore", "make.py"], cwd=tmp_path, check=True, capture_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(tmp_path / "evil.pt"))
    assert "code ran" in capfd.readouterr().out  # torch's own loader runs it
    with pytest.raises(ClipError, match="sets the state of something other than a module"):
        load_clip(tmp_path / "evil.pt")
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [False, True])
def test_openais_archives_are_read_as_torch_reads_them(half: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    views = torch.rand(2, 3, 32, 32)
    texts = torch.randint(1, 400, (1, 77))
    traced = torch.jit.trace(model, (views, texts), check_trace=False)
    if half:
        openai_clip_module("model").convert_weights(traced)
        traced.half()
    torch.jit.save(traced, str(tmp_path / "clip.pt"))
    encoder = load_clip(tmp_path / "clip.pt")
    expected = torch.jit.load(str(tmp_path / "clip.pt")).state_dict()
    ours = encoder.model.state_dict()
    assert all(torch.equal(ours[name], value.float()) for name, value in expected.items())
    if not half:
        assert torch.allclose(encoder.encode_image(views), model.encode_image(views), atol=1e-5)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps(os.getcwd))
    with pytest.raises(ClipError, match=r"a.pt is no CLIP weights file: it names posix.getcwd, but only tensors"):
        load_clip(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for damaged in (whole[:-30], whole[:directory] + b"PK\x01\x09" + whole[directory + 4 :], b"PK\x03\x04"):
        (tmp_path / "a.pt").write_bytes(damaged)
        with pytest.raises(ClipError):
            load_clip(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["{}/clip.pt", "open_clip:ViT-B-32/laion2b"])
def test_a_prompt_file_opens_no_other_file(name: str, make_refiner: Any, tmp_path: Path) -> None:
    refiner = learned(make_refiner)
    refiner.save(tmp_path / "p.safetensors")
    content = read_file(tmp_path / "p.safetensors")
    from semples_plugin.prompt_files import write_file

    write_file(tmp_path / "p.safetensors", content._replace(clip=name.format(tmp_path)))
    with pytest.raises(PromptFileError, match="none of OpenAI's published models, so it is not opened because the file says"):
        PromptRefiner.load(tmp_path / "p.safetensors")
    assert PromptRefiner.load(tmp_path / "p.safetensors", clip=refiner.encoder).classes == ["boat", "train"]


# ------------------------------------------------------------------------------------------------ memory and time


def learned(make_refiner: Any) -> PromptRefiner:
    refiner: PromptRefiner = make_refiner(["boat", "train"], image_stats=None, prompt_length=2)
    batch = (torch.rand(2, 3, 32, 32), torch.eye(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refiner.fit_prompts([batch], lambda img: torch.rand(2, 2, 4, 4), epochs=1, progress=False)
    return refiner


def bomb(levels: int, width: int) -> bytes:
    value: Any = [1.0] * width
    for _ in range(levels - 1):
        value = [value] * width
    return pickle.dumps({0: value}, 2)


@pytest.mark.parametrize("levels, width", [(3, 1000), (40, 8), (200, 2)])
def test_lists_that_name_themselves_many_times(levels: int, width: int, tmp_path: Path) -> None:
    path = npy(tmp_path / "a.npy", bomb(levels, width))
    assert path.stat().st_size < 20_000
    with pytest.raises(CamFileError, match="holds lists of more than 1000000 values"):
        limited(5, lambda: cams.read_cam_file(path, 3))
    path = npy(tmp_path / "cls.npy", bomb(levels, width))
    with pytest.raises(CamFileError, match="holds lists of more than 1000000 values"):
        limited(5, lambda: labels.read_labels(path, ["a", "b", "c"]))


@pytest.mark.parametrize("opcode", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8])
def test_a_pickle_that_asks_for_more_than_the_file_holds(opcode: bytes, tmp_path: Path) -> None:
    path = npy(tmp_path / "a.npy", b"\x80\x05" + opcode + struct.pack("<Q", 6 * 2**30) + b"abc.")
    with pytest.raises(CamFileError, match="asks for 6442450944 bytes, but holds"):
        limited(5, lambda: pickles.read_npy(path))


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cams, "MOST_VALUES", 10_000)
    np.savez_compressed(tmp_path / "a.npz", keys=np.arange(3), cam=np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(CamFileError, match="holds more than 10000 values"):
        cams.read_cam_file(tmp_path / "a.npz", 3)
    monkeypatch.setattr(labels, "LARGEST", 1000)
    np.savez_compressed(tmp_path / "l.npz", ids=np.arange(9), labels=np.zeros((9, 1000), np.uint8))
    with pytest.raises(CamFileError, match="unpacks to more than"):
        labels.read_labels(tmp_path / "l.npz", ["a"])


def png(width: int, height: int) -> bytes:
    """A PNG of black pixels, which packs to next to nothing."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * ((width + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_small_file_of_a_large_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(13_000, 13_000))
    assert (tmp_path / "a.png").stat().st_size < 400_000
    for read in (images.read_image, images.read_label_png, images.image_size):
        with pytest.raises(CamFileError, match="13000 x 13000 pixels; at most 100 million are read. Cut it into tiles"):
            limited(5, lambda read=read: read(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "offset, size, stride", [(0, (4096,), (64,)), (4000, (4096,), (1,)), (-8, (4,), (1,)), (0, (4,), (-1,))]
)
def test_tensors_outside_of_their_storage(offset: int, size: Any, stride: Any) -> None:
    storage = torch.zeros(4096).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    with pytest.raises(CamFileError, match="larger than its storage, or lies outside of it"):
        pickles._tensor(typed, offset, size, stride)


def test_a_folder_of_npz_files_is_listed_in_linear_time(tmp_path: Path) -> None:
    for i in range(4000):
        (tmp_path / f"{i}.npz").touch()
    assert len(limited(2, lambda: cams.cam_paths(tmp_path))) == 4000


# ------------------------------------------------------------------------------------------------ pipes, links, devices


def test_pipes_links_and_devices_fail_their_own_image(world: World, capsys: Any) -> None:
    for name in ("good", "pipe", "link", "device"):
        world.add(name)
    for name in ("pipe", "link", "device"):
        next(world.cams.glob(f"{name}.*")).unlink()
    os.mkfifo(world.cams / "pipe.npy")
    (world.cams / "link.npy").symlink_to(world.cams / "nowhere.npy")
    (world.cams / "device.npy").symlink_to("/dev/zero")
    assert limited(60, world.refine) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["device", "link", "pipe"]
    assert (world.out / "labels" / "good.png").exists()


def test_pipes_in_the_ground_truth(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (images.read_label_png, open_regular):
        with pytest.raises(ValueError, match="a pipe or a device|not a readable"):
            limited(5, lambda read=read: read(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="pipe"):
        limited(5, lambda: read_tensors(tmp_path / "a.png"))


# ------------------------------------------------------------------------------------------------ names and terminals


def test_a_name_that_is_no_text_costs_one_line(world: World, capsys: Any) -> None:
    world.add("good")
    bad = os.fsdecode(b"bad\xff")
    (world.cams / f"{bad}.npy").write_bytes(b"x")
    assert world.refine() == 1
    assert "failed: bad\\udcff: " in capsys.readouterr().err
    summary = json.loads((world.out / "summary.json").read_text(encoding="utf-8"))
    assert summary["refined"] == 1 and list(summary["failed"]) == [bad]


def test_control_characters_never_reach_the_terminal(world: World, capsys: Any) -> None:
    world.add("good")
    world.add("a\x1b[2Jb")
    next(world.cams.glob("a*")).write_bytes(b"x")
    assert world.refine() == 1
    assert cli.main(["evaluate", "--pred", "/none\x1b[31m", "--gt", "/none"]) == 2
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out and "a\\x1b[2Jb" in printed.err and "/none\\x1b[31m" in printed.err


def test_a_long_key_is_cut(tmp_path: Path) -> None:
    path = npy(tmp_path / "a.npy", pickle.dumps({"k" * 5_000_000: np.zeros((2, 2))}, 2))
    with pytest.raises(CamFileError) as caught:
        cams.read_cam_file(path, 3)
    assert len(str(caught.value)) < 500


# ------------------------------------------------------------------------------------------------ prompt files


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": "ab"}, "`classes` must be a list of names; got 'ab'"),
        ({"prompt_names": [1, 2]}, "`prompt_names` must be a list of names"),
        ({"clip": None}, "its CLIP and templates must be texts"),
    ],
)
def test_prompt_files_with_other_facts(change: Dict[str, Any], message: str, make_refiner: Any, tmp_path: Path) -> None:
    refiner = learned(make_refiner)
    refiner.save(tmp_path / "p.safetensors")
    tensors, metadata = read_tensors(tmp_path / "p.safetensors")
    facts = {**json.loads(metadata["facts"]), **change}
    write_tensors(tmp_path / "p.safetensors", tensors, metadata["format"], int(metadata["version"]), facts)
    with pytest.raises(PromptFileError, match=message):
        read_file(tmp_path / "p.safetensors")
    write_tensors(tmp_path / "p.safetensors", {"context": tensors["context"].int()}, metadata["format"],
                  int(metadata["version"]), json.loads(metadata["facts"]))  # fmt: skip
    with pytest.raises(PromptFileError, match="its vectors must be floats of 16 to 64 bits; got torch.int32"):
        read_file(tmp_path / "p.safetensors")


# ------------------------------------------------------------------------------------------------ results


def test_no_value_that_is_not_finite_is_written(world: World, capsys: Any) -> None:
    world.add("good")
    world.add("wide")
    path = next(world.cams.glob("wide.*"))
    content = cams.read_cam_file(path, 3)
    for value in content.cams.values():
        value[0, 0], value[0, 1] = 3e38, -3e38
    cams.write_cam_file(path, content)
    status = world.refine()
    written = list((world.out / "cams").glob("wide.*"))
    assert all(np.isfinite(v).all() for p in written for v in cams.read_cam_file(p, 3).cams.values())
    assert bool(written) == (status == 0)


def test_a_batch_that_does_not_fit_is_split(world: World, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        world.add(name)
    inner, sizes = refine_images._masks_of, []

    def short(loaded: Any, *rest: Any) -> Any:
        sizes.append(len(loaded))
        if len(loaded) > 1 or loaded[0].item.name == "b":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return inner(loaded, *rest)

    monkeypatch.setattr(refine_images, "_masks_of", short)
    assert world.refine() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: b: not enough memory for its ") and "--max-pixels" in line
    assert sizes[0] == 3 and sorted(p.stem for p in (world.out / "labels").glob("*.png")) == ["a", "c"]


def test_a_folder_that_is_removed_on_the_way_is_an_error(world: World, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    for name in ("a", "b"):
        world.add(name)
    inner = refine_images._masks_of

    def removing(*arguments: Any) -> Any:
        shutil.rmtree(world.out)
        return inner(*arguments)

    monkeypatch.setattr(refine_images, "_masks_of", removing)
    assert world.refine() == 2
    assert "was removed or emptied while its images were refined" in capsys.readouterr().err


def test_empty_files_are_not_done_and_parts_of_dead_processes_go(world: World) -> None:
    world.add("a")
    assert world.refine() == 0
    label = world.out / "labels" / "a.png"
    label.write_bytes(b"")
    dead = world.out / "labels" / ".a.png.999999999.part"
    dead.touch()
    own = world.out / "labels" / f".b.png.{os.getpid()}.part"
    own.touch()
    assert world.refine() == 0 and label.stat().st_size > 0 and not dead.exists() and own.exists()
    remove_parts(world.out / "none")


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names))[1])
    write_atomically(tmp_path / "a", lambda file: file.write(b"abc"))
    assert order == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("kind", ["width", "expanded"])
def test_weights_that_contradict_one_another_take_no_memory(kind: str, tmp_path: Path) -> None:
    import resource

    state = openai_clip_module("model").CLIP(32, 32, 1, 64, 8, 77, 49408, 64, 1, 1).state_dict()
    if kind == "width":  # the text tower's blocks would be 30,000 wide
        state["ln_final.weight"] = torch.ones(30_000)
    else:
        state["token_embedding.weight"] = torch.ones(1, 64).expand(200_000_000, 64)
    torch.save(state, tmp_path / "clip.pt")
    assert (tmp_path / "clip.pt").stat().st_size < 20_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ClipError, match="does not hold a CLIP model in OpenAI's layout"):
        limited(20, lambda: load_clip(tmp_path / "clip.pt"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
