from __future__ import annotations

import builtins
import functools
import importlib
import io
import multiprocessing
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semples_plugin._files import write_atomically
from semples_plugin.errors import CamFileError
from semples_plugin.files.cams import CamFile, read_cam_file, write_cam_file
from semples_plugin.files.labels import read_labels
from semples_plugin.files.pickles import read_npy

CORE: Any = np._core if int(np.__version__.split(".")[0]) >= 2 else np.core  # type: ignore[attr-defined]
CLASSES = 6


def maps(count: int, height: int = 4, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, height, width)).astype(np.float32)


def npy(path: Path, body: bytes, descr: str = "|O", shape: Any = (), fortran: bool = False) -> Path:
    """A .npy file with this header and these bytes behind it."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
        file.write(body)
    return path


def saved(path: Path, content: Any) -> Path:
    np.save(path, content, allow_pickle=True)
    return path


def layouts() -> Dict[str, Tuple[str, Dict[int, np.ndarray], Callable[[Path], None]]]:
    """Name -> (layout, CAMs to be read, writer), each as some baseline writes it."""
    cam, low, every = maps(2), maps(2, 2, 3, seed=1), maps(CLASSES, seed=2)
    two, all_of = {1: cam[0], 4: cam[1]}, dict(enumerate(every))

    def irn(keys: Any, low_res: Any, high_res: Any) -> Callable[[Path], None]:
        return lambda path: np.save(path, {"keys": keys, "cam": low_res, "high_res": high_res})  # type: ignore[arg-type]

    keys, tensor = np.array([1, 4]), torch.from_numpy(low)
    strided = torch.stack([tensor, tensor + 1], dim=3)[..., 0]  # a view with an offset and strides of its own
    return {
        "dict": ("dict", two, lambda path: np.save(path, two)),  # type: ignore[arg-type]
        "dict, int64 keys": ("dict", two, lambda path: np.save(path, {np.int64(k): v for k, v in two.items()})),  # type: ignore
        "dict, text keys": ("dict", two, lambda path: np.save(path, {str(k): v for k, v in two.items()})),  # type: ignore
        "dict, unordered": ("dict", two, lambda path: np.save(path, {4: cam[1], 1: cam[0]})),  # type: ignore[arg-type]
        "ordered dict": ("dict", two, lambda path: np.save(path, OrderedDict(two))),  # type: ignore[arg-type]
        "dict of nobody": ("dict", {}, lambda path: np.save(path, {})),  # type: ignore[arg-type]
        "dict of lists": ("dict", {0: np.eye(2)}, lambda path: np.save(path, {0: [[1, 0], [0, 1]]})),  # type: ignore
        "dict of tensors": ("dict", {3: low[0]}, lambda path: np.save(path, {3: tensor[0]})),  # type: ignore[arg-type]
        "irn": ("irn", two, irn(torch.from_numpy(keys), tensor, cam)),
        "irn, arrays": ("irn", two, irn(keys, low, cam)),
        "irn, strided": ("irn", two, irn(torch.from_numpy(keys)[:, None], strided, torch.from_numpy(cam).double())),
        "irn, low only": ("irn", {1: low[0], 4: low[1]}, lambda path: np.save(path, {"keys": keys, "cam": low})),  # type: ignore
        "array": ("array", all_of, lambda path: np.save(path, every)),
        "array, fortran": ("array", all_of, lambda path: np.save(path, np.asfortranarray(every))),
        "npz": ("npz", two, lambda path: np.savez(path, keys=keys, cam=cam)),
        "npz, compressed": ("npz", two, lambda path: np.savez_compressed(path, keys=keys, cam=cam)),
        "npz, numbered": ("npz", two, lambda path: np.savez(path, **{"1": cam[0], "4": cam[1]})),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("kind", list(layouts()))
def test_every_layout_is_read_and_written_again(kind: str, tmp_path: Path) -> None:
    layout, expected, write = layouts()[kind]
    path, again = (tmp_path / f"{name}.{'npz' if layout == 'npz' else 'npy'}" for name in "ab")
    write(path)
    content = read_cam_file(path, CLASSES)
    assert content.layout == layout and list(content.cams) == sorted(expected)
    for k, value in expected.items():
        assert content.cams[k].dtype == np.float32 and np.array_equal(content.cams[k], value.astype(np.float32))
    write_cam_file(again, content)
    second = read_cam_file(again, CLASSES)
    assert second.layout == layout and list(second.cams) == list(content.cams)
    assert kind == "irn, low only" or second.low == content.low
    assert all(np.array_equal(second.cams[k], content.cams[k]) for k in content.cams)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, again.name])  # nothing half written


def test_what_is_written_is_what_the_baselines_load(tmp_path: Path) -> None:
    cam = maps(2)
    write_cam_file(tmp_path / "a.npy", CamFile({1: cam[0], 4: cam[1]}, "dict"))
    loaded = np.load(tmp_path / "a.npy", allow_pickle=True).item()  # MCTformer, WeakTr, TransCAM, SEAM
    assert type(loaded) is dict and [type(k) for k in loaded] == [int, int] and np.array_equal(loaded[4], cam[1])
    write_cam_file(tmp_path / "b.npy", CamFile({1: cam[0], 4: cam[1]}, "irn", (2, 3)))
    loaded = np.load(tmp_path / "b.npy", allow_pickle=True).item()  # IRN
    assert loaded["keys"].tolist() == [1, 4] and np.array_equal(loaded["high_res"], cam) and loaded["cam"].shape == (2, 2, 3)
    assert np.pad(loaded["keys"] + 1, (1, 0)).tolist() == [0, 2, 5]  # what its eval_cam.py does with them
    write_cam_file(tmp_path / "c.npy", CamFile(dict(enumerate(maps(CLASSES))), "array"))
    assert np.load(tmp_path / "c.npy").shape == (CLASSES, 4, 5)
    write_cam_file(tmp_path / "d.npz", CamFile({2: cam[0]}, "npz"))
    with np.load(tmp_path / "d.npz") as archive:
        assert archive["keys"].tolist() == [2] and np.array_equal(archive["cam"], cam[:1])


def renamed(data: bytes, package: str) -> bytes:
    """A pickle as a numpy writes it whose inner package has this name."""
    if data[2:3] == b"\x95":
        data = data[:2] + data[11:]  # without the frame, whose length would be another
    for old in ("numpy.core", "numpy._core"):
        for module in ("multiarray", "numeric"):
            before, after = f"{old}.{module}".encode(), f"{package}.{module}".encode()
            data = data.replace(b"c" + before + b"\n", b"c" + after + b"\n")
            data = data.replace(b"\x8c" + bytes([len(before)]) + before, b"\x8c" + bytes([len(after)]) + after)
    return data


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_all_protocols_and_both_numpys(protocol: int, package: str, tmp_path: Path) -> None:
    cam = maps(2)
    content = {np.int64(1): cam[0], 4: np.asfortranarray(cam[1])}
    data = renamed(pickle.dumps(np.array(content, dtype=object), protocol), package)
    assert package.encode() in data
    for body in (data, renamed(pickle.dumps(content, protocol), package)):
        read = read_cam_file(npy(tmp_path / "a.npy", body), CLASSES).cams
        assert list(read) == [1, 4] and np.array_equal(read[1], cam[0]) and np.array_equal(read[4], cam[1])


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "u1", "<i2", ">i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["array", "dict", "npz"])
def test_number_types(dtype: str, order: str, kind: str, tmp_path: Path) -> None:
    cam = np.asarray((maps(CLASSES) * 100).astype(dtype), order=order)  # type: ignore[call-overload]
    path = tmp_path / ("a.npz" if kind == "npz" else "a.npy")
    if kind == "npz":
        np.savez(path, keys=np.arange(CLASSES), cam=cam)
    else:
        saved(path, cam if kind == "array" else dict(enumerate(cam)))
    read = read_cam_file(path, CLASSES).cams
    assert all(read[k].dtype == np.float32 and np.array_equal(read[k], cam[k].astype(np.float32)) for k in range(CLASSES))


@pytest.mark.parametrize("tensor", [torch.rand(1, 4, 5, requires_grad=True), torch.rand(1, 4, 5).half()])
def test_tensors_that_a_host_forgot_to_detach_or_saved_at_half_precision(tensor: torch.Tensor, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", {"keys": torch.tensor([2]), "cam": tensor})
    read = read_cam_file(path, CLASSES).cams
    assert np.array_equal(read[2], tensor.detach().float().numpy()[0])


def test_bfloat16_is_read_or_refused(tmp_path: Path) -> None:
    tensor = torch.rand(4, 5).bfloat16()
    path = saved(tmp_path / "a.npy", {0: tensor})
    try:
        read = read_cam_file(path, CLASSES).cams[0]
    except CamFileError:
        return
    assert np.array_equal(read, tensor.float().numpy())


def test_read_npy_gives_plain_arrays_and_objects(tmp_path: Path) -> None:
    assert read_npy(saved(tmp_path / "a.npy", np.arange(6).reshape(2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_npy(saved(tmp_path / "a.npy", np.array(["ä", "b"]))).tolist() == ["ä", "b"]
    assert read_npy(saved(tmp_path / "a.npy", {"2007_000032": [1, 2.5, None, "ä"]})) == {"2007_000032": [1, 2.5, None, "ä"]}
    assert read_npy(saved(tmp_path / "a.npy", np.float32(2.5))) == 2.5
    with pytest.raises(FileNotFoundError):
        read_npy(tmp_path / "none.npy")
    for name in ("none.npy", "none.npz"):
        with pytest.raises(FileNotFoundError):
            read_cam_file(tmp_path / name, CLASSES)


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def half(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------- files that run code


class Reduced:
    """Pickles as a call (and a state to set on its result)."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None):
        self.parts = (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts if self.parts[2] is not None else self.parts[:2]


def calls(marker: Path) -> Dict[str, Tuple[Reduced, str]]:
    """Name -> (what leaves a marker when it is unpickled carelessly, what the refusal must name)."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Reduced(os.system, f"touch '{marker}'"), f"{os.system.__module__}.system"),
        "eval": (Reduced(builtins.eval, code), "builtins.eval"),
        "exec": (Reduced(builtins.exec, code), "builtins.exec"),
        "subprocess": (Reduced(subprocess.check_call, ["touch", str(marker)]), "subprocess.check_call"),
        "open": (Reduced(builtins.open, str(marker), "w"), "open"),
        "getattr": (Reduced(builtins.getattr, Reduced(importlib.import_module, "os"), "mkdir"), "builtins.getattr"),
        "partial": (Reduced(functools.partial, os.mkdir, str(marker)), "functools.partial"),
        "numpy's own": (Reduced(np.savetxt, str(marker), [1.0]), "savetxt"),
        "torch.load": (Reduced(torch.load, str(marker)), "torch"),
    }


def carriers(evil: Any) -> Dict[str, Any]:
    objects = np.empty((1, 1), object)
    objects[0, 0] = evil
    return {
        "alone": evil,
        "as a map": {0: evil},
        "in an object array": {0: objects},
        "in lists": {0: [[evil]]},
        "in a tuple key": {(1, evil): 0},
        "as IRN's keys": {"keys": evil, "cam": maps(1)},
        "in an ordered dict": OrderedDict([(0, evil)]),
        "as a state": {0: Reduced(OrderedDict, state={"a": evil})},
        "as storage": {0: Reduced(torch._utils._rebuild_tensor_v2, evil, 0, (1, 1), (1, 1), False, OrderedDict())},
    }


@pytest.mark.parametrize("call", list(calls(Path())))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_runs_code_is_refused_by_name(call: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil, name = calls(marker)[call]
    for content in carriers(evil).values():
        path = npy(tmp_path / "a.npy", pickle.dumps(content, protocol, fix_imports=False))
        for read in (lambda p: read_cam_file(p, CLASSES), read_npy, lambda p: read_labels(p, ["boat", "train"])):
            with pytest.raises(CamFileError) as caught:
                read(path)
            assert name in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
            assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_inside_a_tensor_is_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", io.BytesIO()
    torch.save({"a": Reduced(os.system, f"touch '{marker}'")}, file, _use_new_zipfile_serialization=zipped)
    path = saved(tmp_path / "a.npy", {0: Reduced(torch.storage._load_from_bytes, file.getvalue())})
    with pytest.raises(CamFileError) as caught:
        read_cam_file(path, CLASSES)
    assert not marker.exists() and "system" in str(caught.value)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)  # no advice to read it all the same


def test_a_plain_pickle_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    inner = pickle.dumps(Reduced(os.system, f"touch '{marker}'"))
    path = saved(tmp_path / "a.npy", {0: Reduced(torch.storage._load_from_bytes, inner)})
    with pytest.raises(CamFileError) as caught:
        read_cam_file(path, CLASSES)
    assert not marker.exists() and "\n" not in str(caught.value)


def test_opcodes_that_call_without_reduce_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    touch = f"touch '{marker}'".encode()
    bodies = [
        b"(S'" + touch.replace(b"'", b'"') + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + touch.replace(b"'", b'"') + b"'\no.",  # OBJ
        b"cos\nsystem\n(S'" + touch.replace(b"'", b'"') + b"'\ntR.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",  # STACK_GLOBAL with a dotted name
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02U\x01aQ.",  # a persistent id
    ]
    for body in bodies:
        with pytest.raises(CamFileError):
            read_npy(npy(tmp_path / "a.npy", body))
        assert not marker.exists()


def test_a_file_cannot_change_what_it_names(tmp_path: Path) -> None:
    names = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n"]
    for name in names:
        path = npy(tmp_path / "a.npy", b"\x80\x02" + name + b"N}X\x06\x00\x00\x00markerK\x01s\x86b.")
        with pytest.raises(CamFileError):
            read_npy(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marker") and not hasattr(OrderedDict, "marker")


# ------------------------------------------------------------------------------------------- files that crash or exhaust


def read_apart(path: Path, seconds: float = 20.0) -> Tuple[str, float]:
    """What reading a file says, in a process of its own that may die or be stopped, and the MiB that it took."""
    resource = pytest.importorskip("resource")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)

    def work() -> None:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**30,) * 2)  # for the machine's sake
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read_cam_file(path, CLASSES)
            said = "read"
        except CamFileError as error:
            said = f"refused: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        sender.send((said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return f"still reading after {seconds:g} s", 0.0
    return receiver.recv() if process.exitcode == 0 else (f"died with status {process.exitcode}", 0.0)


def forged_array(typ: str, state: Any, shape: Any, raw: Any) -> Reduced:
    """An array whose dtype says of itself what `state` says."""
    dtype = Reduced(np.dtype, typ, False, True, state=state)
    return Reduced(CORE.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, raw))


def hostile() -> Dict[str, Any]:
    pointer, one = struct.pack("<Q", 0x4141414141414141), maps(1)
    plain = (3, "|", None, None, None, -1, -1, 0)  # flags 0: "holds no objects"
    record = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
    outside = (3, "|", None, ("a",), {"a": (np.dtype("f8"), 10**9)}, 8, 1, 0)
    objects = (3, "|", None, None, None, -1, -1, 63)
    counted = (3, "<", None, None, None, -1, -1, 63)  # flags 63: "numbers are objects"
    return {
        "raw pointers as objects": forged_array("O", plain, (), pointer),
        "raw pointers as keys": {"keys": forged_array("O", plain, (1,), pointer), "cam": one},
        "raw pointers as a map": {0: forged_array("O", plain, (1, 1), pointer)},
        "raw pointers in records": {"keys": forged_array("V8", record, (1,), pointer), "cam": one},
        "fields outside the record": {"keys": forged_array("V8", outside, (1,), pointer), "cam": one},
        "numbers marked as objects": {0: forged_array("f8", counted, (1, 1), pointer)},
        "numbers marked as objects, with a list": {0: forged_array("f8", counted, (1, 1), [1.0])},
        "few objects for many values": {0: forged_array("O", objects, (2, 10**8), [1.0])},
        "an array of no bytes and many values": {0: Reduced(np.ndarray, (20000, 15000), "f4")},
        "the same, shape given to the maker": {0: Reduced(CORE.multiarray._reconstruct, np.ndarray, (20000, 15000), "f4")},
        "one value repeated": {0: torch.zeros(1, 1).expand(20000, 15000)},
        "a tensor beyond its storage": {
            0: Reduced(
                torch._utils._rebuild_tensor_v2,
                torch.zeros(1).__reduce_ex__(2)[1][0],
                0,
                (20000, 15000),
                (15000, 1),
                False,
                OrderedDict(),
            )
        },
    }


@pytest.mark.parametrize("kind", list(hostile()))
def test_forged_arrays_are_refused_without_crash_or_memory(kind: str, tmp_path: Path) -> None:
    said, mib = read_apart(npy(tmp_path / "a.npy", pickle.dumps(hostile()[kind], 3)))
    harmless = said == "read" and kind.startswith("numbers marked")  # numbers they are, whatever the file says of them
    assert (harmless or said.startswith("refused: ")) and "MemoryError" not in said and mib < 300, (said, mib)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x80\x02}r" + struct.pack("<I", 2**27) + b".", id="a huge memo index"),
        pytest.param(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.", id="a key of 500000 levels"),
        pytest.param(b"\x80\x02})" + b"q\x01h\x01\x86" * 45 + b"K\x01s.", id="a key of 2**45 parts"),
        pytest.param(b"\x80\x02}K\x00" + b"]" * 100_000 + b"a" * 99_999 + b"s.", id="lists of 100000 levels"),
        pytest.param(
            b"\x80\x02}K\x00](K\x00K\x00e" + b"q\x01]q\x02(" + b"h\x01" * 9 + b"e" + b"s.", id="lists that do not end well"
        ),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".", id="bytes of 2**60"),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", id="a frame of 2**60"),
        pytest.param(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", id="a number of 2**31 bytes"),
    ],
)
def test_pickles_that_exhaust_are_refused(body: bytes, tmp_path: Path) -> None:
    said, mib = read_apart(npy(tmp_path / "a.npy", body))
    assert (said == "read" or said.startswith("refused: ")) and mib < 300, (said[:300], mib)


# ---------------------------------------------------------------------------------------------------- broken files


def broken(folder: Path) -> Dict[str, Tuple[Path, str]]:
    """Name -> (file, what the refusal says)."""
    cam = maps(1)[0]
    folder.mkdir(exist_ok=True)
    count = [0]

    def new(content: Any, suffix: str = ".npy") -> Path:
        count[0] += 1
        path = folder / f"{count[0]}{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif suffix == ".npz":
            np.savez(path, **content)
        else:
            np.save(path, content, allow_pickle=True)
        return path

    whole = new({0: cam}).read_bytes()
    header = whole[: whole.index(b"\n") + 1]
    archive = new({"keys": np.array([0]), "cam": maps(1)}, ".npz").read_bytes()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        inner = io.BytesIO()
        np.lib.format.write_array_header_1_0(inner, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
        file.writestr("cam.npy", inner.getvalue() + bytes(10**6))
        file.writestr("keys.npy", inner.getvalue())
    liar = bytearray(archive)
    at = archive.rindex(b"PK\x01\x02")  # the central directory's entry of the last file
    liar[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)  # its size when unpacked
    nan, inf = cam.copy(), cam.copy()
    nan[1, 2], inf[0, 0] = np.nan, -np.inf

    def lying(name: str, shape: Any, descr: str = "<f4") -> Path:
        return npy(folder / f"{name}.npy", bytes(64), descr, shape)

    return {
        "zero bytes": (new(b""), "no readable .npy file"),
        "zero bytes, npz": (new(b"", ".npz"), "no readable .npz archive"),
        "text": (new(b"<html>404 Not Found</html>"), "no readable .npy file"),
        "magic only": (new(whole[:6]), "no readable .npy file"),
        "header only": (new(header), "no readable .npy file"),
        "truncated": (new(whole[:-9]), "no readable .npy file"),
        "truncated array": (new(new(maps(CLASSES)).read_bytes()[:-3]), "bytes follow"),
        "truncated npz": (new(archive[:-9], ".npz"), "no readable .npz archive"),
        "an array named npz": (new(whole, ".npz"), "no readable .npz archive"),
        "texts": (new({0: np.array([["a", "b"]])}), "maps of numbers"),
        "texts, array": (new(np.full((CLASSES, 2, 2), "a")), "maps of numbers"),
        "objects": (new({0: np.array([[1.0, None]], object)}), "maps of numbers"),
        "complex": (new({0: cam.astype(complex)}), "maps of numbers"),
        "booleans": (new({0: cam > 0.5}), "maps of numbers"),
        "None": (new({0: None}), "maps of numbers"),
        "dates": (new({0: np.zeros((2, 2), "M8[s]")}), "maps of numbers"),
        "records": (new({0: np.zeros((2, 2), "f4,i4")}), ""),
        "ragged": (new({0: [[1.0, 2.0], [3.0]]}), ""),
        "sparse": (new({0: {"a": 1}}), "maps of numbers"),
        "NaN": (new({0: nan}), "finite maps; class 0"),
        "inf": (new({0: cam, 2: inf}), "finite maps; class 2"),
        "too large for float32": (new({0: cam.astype(float) * 1e300}), "finite maps"),
        "one dimension": (new({0: cam[0]}), r"\(H, W\) maps"),
        "three dimensions": (new({0: cam[None]}), r"\(H, W\) maps"),
        "no pixels": (new({0: cam[:0]}), r"\(H, W\) maps"),
        "shapes differ": (new({0: cam, 1: cam.T}), r"one shape; got \(4, 5\), \(5, 4\)"),
        "other number of classes": (new(maps(CLASSES + 1)), r"C = 6; it has shape \(7, 4, 5\)"),
        "flat array": (new(cam), "must hold an array"),
        "several dicts": (new(np.array([{0: cam}, {0: cam}])), "must hold an array"),
        "a list": (new(pickle.dumps([cam])), "no readable .npy file"),
        "a pickled list": (npy(folder / "list.npy", pickle.dumps([1])), "it holds a list"),
        "a pickled number": (npy(folder / "number.npy", pickle.dumps(7)), "it holds a int"),
        "class out of range": (new({CLASSES: cam}), "class index 6; with 6 classes they run from 0 to 5"),
        "negative class": (new({-1: cam}), "class index -1"),
        "boolean class": (new({True: cam}), "class indices as keys; got True"),
        "float class": (new({1.0: cam}), "class indices as keys; got 1.0"),
        "text class": (new({"cat": cam}), "class indices as keys; got 'cat'"),
        "text with a superscript": (new({"²": cam}), "class indices as keys"),
        "text with two signs": (new({"--5": cam}), "class indices as keys"),
        "tuple class": (new({(0, 1): cam}), ""),
        "a class twice, once as text": (new({0: cam, "0": cam + 1}), "twice"),
        "IRN, a class twice": (new({"keys": np.array([1, 1]), "cam": maps(2)}), "twice"),
        "IRN, float keys": (new({"keys": np.array([1.0]), "cam": maps(1)}), "class indices as keys"),
        "IRN, keys out of range": (new({"keys": np.array([9]), "cam": maps(1)}), "class index 9"),
        "IRN, keys and maps differ": (new({"keys": np.array([1, 2]), "cam": maps(1)}), "one map"),
        "IRN, keys without maps": (new({"keys": np.array([1])}), ""),
        "IRN, low maps without pixels": (
            new({"keys": np.array([1]), "cam": np.zeros((1, 0, 0)), "high_res": maps(1)}), ""
        ),
        "IRN, low maps of one dimension": (new({"keys": np.array([1]), "cam": np.zeros(1), "high_res": maps(1)}), ""),
        "IRN, low maps of four dimensions": (
            new({"keys": np.array([1]), "cam": np.zeros((1, 2, 2, 2)), "high_res": maps(1)}), ""
        ),
        "IRN, low maps of texts": (new({"keys": np.array([1]), "cam": "none", "high_res": maps(1)}), ""),
        "huge shape": (lying("huge", (CLASSES, 10**6, 10**6)), "header promises"),
        "shape beyond 64 bits": (lying("beyond", (CLASSES, 10**15, 10**15)), "header promises"),
        "negative shape": (lying("negative", (-1, -4, 4)), ""),
        "lies about its size": (lying("lies", (1, 4, 5)), "header promises 20 values of float32, but 64 bytes follow"),
        "empty type": (lying("empty", (CLASSES, 4, 5), "|S0"), ""),
        "unknown type": (new(whole[:10] + b"{'descr': '<q9', 'fortran_order': False, 'shape': (1,), }\n"), ""),
        "header of another kind": (new(whole[:10] + b"[1, 2, 3]" + b" " * 100 + b"\n"), ""),
        "header with code": (new(whole[:8] + struct.pack("<H", 30) + b"__import__('os').getcwd()     \n"), ""),
        "header without end": (new(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 99), "longer than any header"),
        "npz without keys": (new({"cam": maps(1)}, ".npz"), "class indices as keys"),
        "npz with a pickle": (new({"keys": np.array([0]), "cam": np.array([{}])}, ".npz"), "no readable .npz archive"),
        "npz of texts": (new({"keys": np.array([0]), "cam": np.full((1, 2, 2), "a")}, ".npz"), "maps of numbers"),
        "npz with a huge shape": (new(bomb.getvalue(), ".npz"), ""),
        "npz that unpacks to too much": (new(bytes(liar), ".npz"), "unpacks to more than"),
        "zip without arrays": (new(b"PK\x05\x06" + bytes(18), ".npz"), ""),
    }  # fmt: skip


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Tuple[Path, str]]:
    return broken(tmp_path_factory.mktemp("broken"))


def _broken_names() -> List[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return list(broken(Path(folder)))


@pytest.mark.parametrize("kind", _broken_names())
def test_broken_files_are_refused_in_one_line(kind: str, broken_files: Dict[str, Tuple[Path, str]]) -> None:
    path, reason = broken_files[kind]
    if kind == "zip without arrays":
        assert read_cam_file(path, CLASSES).cams == {}
        return
    with pytest.raises(CamFileError, match=reason or None) as caught:
        read_cam_file(path, CLASSES)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_files_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no room
    with pytest.raises(CamFileError, match="holds 2.0 GiB; at most 2 are read"):
        read_cam_file(path, CLASSES)


@pytest.fixture
def limited() -> Iterator[None]:
    """Damaged lengths must not take the machine's memory."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory: pytest.TempPathFactory) -> List[Tuple[Path, bytes]]:
    folder = tmp_path_factory.mktemp("valid")
    files = []
    for kind in ("dict", "dict, int64 keys", "irn", "irn, arrays", "array", "npz", "npz, compressed"):
        layout, _, write = layouts()[kind]
        path = folder / f"{kind}.{'npz' if layout == 'npz' else 'npy'}"
        write(path)
        files.append((path, path.read_bytes()))
    return files


def sound_or_refused(path: Path, data: bytes) -> None:
    damaged = path.with_name(f"damaged{path.suffix}")
    damaged.write_bytes(data)
    try:
        content = read_cam_file(damaged, CLASSES)
    except CamFileError as error:
        assert "\n" not in str(error)
        return
    assert content.layout in ("dict", "irn", "array", "npz")
    assert len({value.shape for value in content.cams.values()}) <= 1
    for k, value in content.cams.items():
        assert type(k) is int and 0 <= k < CLASSES and value.dtype == np.float32 and value.ndim == 2 and value.size
        assert np.isfinite(value).all()
    write_cam_file(damaged, content)  # what was read can be written


fuzz = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("limited")
@pytest.mark.filterwarnings("ignore")
@fuzz
@given(which=st.integers(0, 6), keep=st.floats(0, 1))
def test_truncated_files(valid_files: List[Tuple[Path, bytes]], which: int, keep: float) -> None:
    path, data = valid_files[which]
    sound_or_refused(path, data[: int(keep * len(data))])


@pytest.mark.usefixtures("limited")
@pytest.mark.filterwarnings("ignore")
@fuzz
@given(which=st.integers(0, 6), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(valid_files: List[Tuple[Path, bytes]], which: int, flips: List[Tuple[float, int]]) -> None:
    path, data = valid_files[which]
    changed = bytearray(data)
    for where, bits in flips:
        changed[int(where * (len(data) - 1))] ^= bits
    sound_or_refused(path, bytes(changed))


@fuzz
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for path in (folder / "any.npy", folder / "any.npz"):
        path.write_bytes(data)
        with pytest.raises(CamFileError):
            read_cam_file(path, CLASSES)
