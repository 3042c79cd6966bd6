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
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy as np
import pytest
import torch

from semples_plugin.errors import CamFileError
from semples_plugin.files.cams import read_cam_file
from semples_plugin.files.labels import read_labels
from semples_plugin.files.pickles import read_npy
from tests.files.cam_files import CLASSES, maps, npy, saved

CORE: Any = np._core if int(np.__version__.split(".")[0]) >= 2 else np.core  # type: ignore[attr-defined]


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
def test_pickles_of_all_protocols_and_of_numpy_1_and_2_are_read(protocol: int, package: str, tmp_path: Path) -> None:
    cam = maps(2)
    content = {np.int64(1): cam[0], 4: np.asfortranarray(cam[1])}
    data = renamed(pickle.dumps(np.array(content, dtype=object), protocol), package)
    assert package.encode() in data
    for body in (data, renamed(pickle.dumps(content, protocol), package)):
        read = read_cam_file(npy(tmp_path / "a.npy", body), CLASSES).cams
        assert list(read) == [1, 4] and np.array_equal(read[1], cam[0]) and np.array_equal(read[4], cam[1])


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


def test_a_file_cannot_set_attributes_of_what_it_names(tmp_path: Path) -> None:
    names = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"c_codecs\nencode\n", b"ccollections\nOrderedDict\n"]
    for name in names:
        path = npy(tmp_path / "a.npy", b"\x80\x02" + name + b"N}X\x06\x00\x00\x00markerK\x01s\x86b.")
        with pytest.raises(CamFileError):
            read_npy(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marker") and not hasattr(OrderedDict, "marker")


# ------------------------------------------------------------------------------------------- files that crash or exhaust


def read_in_a_process(path: Path, seconds: float = 20.0) -> Tuple[str, float]:
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
    said, mib = read_in_a_process(npy(tmp_path / "a.npy", pickle.dumps(hostile()[kind], 3)))
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
def test_pickles_that_exhaust_memory_or_stack_are_refused(body: bytes, tmp_path: Path) -> None:
    said, mib = read_in_a_process(npy(tmp_path / "a.npy", body))
    assert (said == "read" or said.startswith("refused: ")) and mib < 300, (said[:300], mib)
