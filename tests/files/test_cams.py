from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semples_plugin.errors import CamFileError
from semples_plugin.files.cams import CamFile, read_cam_file, write_cam_file
from tests.files.cam_files import CLASSES, maps, npy, saved


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


@pytest.mark.parametrize("shape", [(80, 7, 5), (1, 1, 1)])
def test_arrays_are_written_as_numpy_writes_them(shape: Tuple[int, int, int], tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random(shape).astype(np.float32)
    write_cam_file(tmp_path / "a.npy", CamFile(dict(enumerate(maps.transpose(0, 2, 1).copy().transpose(0, 2, 1))), "array"))
    np.save(tmp_path / "b.npy", maps)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_baselines_can_load_what_is_written(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "u1", "<i2", ">i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["array", "dict", "npz"])
def test_every_number_type_is_read(dtype: str, order: str, kind: str, tmp_path: Path) -> None:
    cam = np.asarray((maps(CLASSES) * 100).astype(dtype), order=order)  # type: ignore[call-overload]
    path = tmp_path / ("a.npz" if kind == "npz" else "a.npy")
    if kind == "npz":
        np.savez(path, keys=np.arange(CLASSES), cam=cam)
    else:
        saved(path, cam if kind == "array" else dict(enumerate(cam)))
    read = read_cam_file(path, CLASSES).cams
    assert all(read[k].dtype == np.float32 and np.array_equal(read[k], cam[k].astype(np.float32)) for k in range(CLASSES))


@pytest.mark.parametrize("tensor", [torch.rand(1, 4, 5, requires_grad=True), torch.rand(1, 4, 5).half()])
def test_tensors_with_gradient_or_half_precision_are_read(tensor: torch.Tensor, tmp_path: Path) -> None:
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
        "zero bytes": (new(b""), "not a readable .npy file"),
        "zero bytes, npz": (new(b"", ".npz"), "not a readable .npz archive"),
        "text": (new(b"<html>404 Not Found</html>"), "not a readable .npy file"),
        "magic only": (new(whole[:6]), "not a readable .npy file"),
        "header only": (new(header), "not a readable .npy file"),
        "truncated": (new(whole[:-9]), "not a readable .npy file"),
        "truncated array": (new(new(maps(CLASSES)).read_bytes()[:-3]), "bytes follow"),
        "truncated npz": (new(archive[:-9], ".npz"), "not a readable .npz archive"),
        "an array named npz": (new(whole, ".npz"), "not a readable .npz archive"),
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
        "a list": (new(pickle.dumps([cam])), "not a readable .npy file"),
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
        "npz with a pickle": (new({"keys": np.array([0]), "cam": np.array([{}])}, ".npz"), "not a readable .npz archive"),
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


def assert_read_or_refused(path: Path, data: bytes) -> None:
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
def test_truncated_files_are_read_or_refused(valid_files: List[Tuple[Path, bytes]], which: int, keep: float) -> None:
    path, data = valid_files[which]
    assert_read_or_refused(path, data[: int(keep * len(data))])


@pytest.mark.usefixtures("limited")
@pytest.mark.filterwarnings("ignore")
@fuzz
@given(which=st.integers(0, 6), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_files_with_flipped_bytes_are_read_or_refused(
    valid_files: List[Tuple[Path, bytes]], which: int, flips: List[Tuple[float, int]]
) -> None:
    path, data = valid_files[which]
    changed = bytearray(data)
    for where, bits in flips:
        changed[int(where * (len(data) - 1))] ^= bits
    assert_read_or_refused(path, bytes(changed))


@fuzz
@given(st.binary(max_size=60))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    for path in (folder / "any.npy", folder / "any.npz"):
        path.write_bytes(data)
        with pytest.raises(CamFileError):
            read_cam_file(path, CLASSES)
