from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
from torch import nn

from semples_plugin import cli
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clip_backends import load_clip
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.clusters.text_features import clusters_from_text_features
from tests.clusters.test_language_model import CLASSES, KEY, SOON, A, B, C, ChatServer, Reply, text

NAMES = "car\ncat\ndog\nperson\nsofa\n"


class Command:
    """`semples clusters` in a folder of its own."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]):
        self.root, self.capsys, self.out, self.partial = root, capsys, root / "c.json", root / "c.partial.json"
        (root / "classes.txt").write_text(NAMES)

    def arguments(self, *extra: Any) -> List[str]:
        found = ["clusters", *map(str, extra)]
        for option, value in (("--classes", self.root / "classes.txt"), ("--out", self.out)):
            found += [] if option in extra else [option, str(value)]
        return found

    def __call__(self, *extra: Any) -> Tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        self.capsys.readouterr()
        try:
            status = cli.main(self.arguments(*extra))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        captured = self.capsys.readouterr()
        assert KEY not in captured.out + captured.err
        return status, captured.out, captured.err


@pytest.fixture
def semples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ChatServer()
    yield server
    server.close()


def model(chat: ChatServer, *script: Any) -> List[str]:
    chat.script = script
    return ["--model", "toy", "--base-url", chat.url]


# ---------------------------------------------------------------------------------------------------- --model


def test_rounds_and_clusters_are_shown(semples: Command, chat: ChatServer) -> None:
    status, out, err = semples(*model(chat, "?", text(A), text(C), text(C)))
    assert (status, err) == (0, "") and out.splitlines() == [
        "round 1: no valid clusters",
        '  The answer could not be read: it holds no JSON object of clusters. Expected only {"clusters": [{"name": "...", '
        "\"classes\": [\"...\", \"...\"]}]}; got '?'.",
        "round 2: 3 clusters",
        "round 3: 4 clusters",
        "  'furniture' is new",
        "  'sofa' moved from 'things' to 'furniture'",
        "round 4: 4 clusters, as before",
        "animals    cat, dog",
        "people     person",
        "vehicles   car",
        "furniture  sofa",
        f"4 clusters of 5 classes; fixed point after 4 rounds: {semples.out}",
    ]  # fmt: skip
    clusters = CategoryClusters.load(semples.out)
    assert clusters == CategoryClusters(C, CLASSES) and clusters.provenance["converged"] is True
    assert KEY not in semples.out.read_text() and not semples.partial.exists()
    assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_json_prints_the_file_in_ascii(semples: Command, chat: ChatServer) -> None:
    status, out, err = semples(*model(chat, f"\u009b31m {text(A)}"), "--json")
    assert (status, err) == (0, "") and out.isascii() and json.loads(out) == json.loads(semples.out.read_text("utf-8"))


def test_control_characters_in_answers_are_escaped(semples: Command, chat: ChatServer) -> None:
    (semples.root / "classes.txt").write_text("cat\x1b[2J\ndog\n")
    status, out, _ = semples(*model(chat, "\x1b[2J", text({"\x1b[31mred": ["cat\x1b[2J"], "\u202eb": ["dog"]})))
    assert status == 0 and out.isascii() and "\x1b" not in out and "[31mred  cat\\x1b[2J" in out.splitlines()


def test_options_reach_the_model(semples: Command, chat: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (semples.root / "first.txt").write_text("FIRST {classes} {limit}")
    (semples.root / "later.txt").write_text("LATER {classes} {clusters} {findings}")
    monkeypatch.setenv("MY_KEY", "another-key-99")
    arguments = [
        *model(chat, Reply("wait", 429, headers=SOON), text(A), text(B)), "--initial-prompt", semples.root / "first.txt",
        "--refine-prompt", semples.root / "later.txt", "--max-rounds", 2, "--max-clusters", 3, "--timeout", 9, "--retries", 1,
        "--api-key-env", "MY_KEY", "--accept-unconverged",
    ]  # fmt: skip
    status, out, err = semples(*arguments)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"2 clusters of 5 classes; no fixed point in 2 rounds, accepted: {semples.out}"
    assert chat.headers[0]["Authorization"] == "Bearer another-key-99" and len(chat.bodies) == 3
    assert chat.questions()[0].startswith("FIRST [") and "Make at most 3 clusters." in chat.questions()[0]
    assert chat.questions()[2].startswith("LATER [") and "another-key" not in semples.out.read_text()
    assert CategoryClusters.load(semples.out).provenance["converged"] is False


def test_a_failure_leaves_the_old_clusters_and_a_record(semples: Command, chat: ChatServer) -> None:
    semples.out.write_text("mine")
    status, out, err = semples(*model(chat, text(A), Reply(f"bad key\n{KEY}", 401)))
    assert (status, out) == (2, "round 1: 3 clusters\n") and err.startswith("error: The language model 'toy' at ")
    assert err.count("\n") == 1 and f"The record of all answers so far is in {semples.partial}." in err
    assert semples.out.read_text() == "mine" and KEY not in semples.partial.read_text()
    assert json.loads(semples.partial.read_text())["provenance"]["rounds"][0]["clusters"] == A
    assert sorted(path.name for path in semples.root.iterdir()) == ["c.json", "c.partial.json", "classes.txt"]


def test_no_fixed_point_is_an_error(semples: Command, chat: ChatServer) -> None:
    status, _, err = semples(*model(chat, text(A), text(B), text(A)), "--max-rounds", 3)
    assert status == 2 and "rounds 1 and 3 gave the same clusters" in err and "--accept-unconverged" in err
    assert err.count("\n") == 1 and not semples.out.exists() and semples.partial.exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_keeps_the_record_and_the_old_file(semples: Command, chat: ChatServer) -> None:
    command = semples.arguments(*model(chat, text(A), Reply(text(A), delay=30)))
    process = subprocess.Popen(
        [sys.executable, "-m", "semples_plugin", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit that it is ignored
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "round 1: 3 clusters\n"  # the second one is asked
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    record = f"The record of all answers so far is in {semples.partial}."
    assert process.returncode == 130 and err == f"interrupted; {semples.out} is as it was. {record}\n"
    assert json.loads(semples.partial.read_text())["provenance"]["rounds"][0]["clusters"] == A and not semples.out.exists()


def test_ctrl_c_before_the_first_answer(semples: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.clusters, "read_class_names", stopped)
    assert semples("--file", "x.json") == (130, "", "interrupted; `semples clusters` starts anew with the same command.\n")
    assert semples("--model", "x") == (130, "", f"interrupted; {semples.out} is as it was.\n")


def test_missing_packages_are_named(semples: Command, monkeypatch: pytest.MonkeyPatch, aligned_clip: nn.Module) -> None:
    torch.save(aligned_clip.state_dict(), semples.root / "clip.pt")
    for module, arguments in (
        ("openai", ["--model", "toy", "--base-url", "http://127.0.0.1:9/v1"]),
        ("sklearn.metrics", ["--clip", semples.root / "clip.pt"]),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            status, out, err = semples(*arguments)
        assert (status, out) == (2, "") and "pip install 'semples-plugin[clusters]'" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- --clip and --file


def test_clip_groups_text_features(semples: Command, aligned_clip: nn.Module) -> None:
    pytest.importorskip("sklearn")
    path = semples.root / "clip.pt"
    torch.save(aligned_clip.state_dict(), path)
    (semples.root / "names.json").write_text(json.dumps({"car": "racing car", "cat": "cat", "dog": "dog", "sofa": "couch"}))
    encoder = load_clip(path)
    texts = [f"a photo of a {name}." for name in ("racing car", "cat", "dog", "couch")]
    expected = clusters_from_text_features(["car", "cat", "dog", "sofa"], encoder.encode_text(texts), 2, encoder.id)
    status, out, err = semples("--clip", path, "--num-clusters", 2, "--classes", semples.root / "names.json")
    clusters = CategoryClusters.load(semples.out)
    assert (status, err) == (0, "") and clusters == expected and clusters.provenance == expected.provenance
    score = json.loads(semples.out.read_text(encoding="utf-8"))["provenance"]["silhouettes"]["2"]
    assert out.splitlines()[-1] == f"2 clusters of 4 classes; number of clusters: given, silhouette {score:.2f}: {semples.out}"
    status, out, _ = semples("--clip", path, "--classes", "voc")
    assert status == 0 and "number of clusters: best silhouette" in out
    assert CategoryClusters.load(semples.out).classes == tuple(VOC_CLASSES)


def test_a_file_is_checked_and_written(semples: Command) -> None:
    (semples.root / "mine.json").write_text(json.dumps(A))
    status, out, err = semples("--file", semples.root / "mine.json")
    assert (status, err) == (0, "") and out.splitlines() == [
        "animals  cat, dog",
        "people   person",
        "things   car, sofa",
        f"3 clusters of 5 classes: {semples.out}",
    ]
    clusters = CategoryClusters.load(semples.out)
    assert clusters == CategoryClusters(A, CLASSES) and clusters.provenance == {"source": "file", "file": "mine.json"}


# ---------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "one of the arguments --model --clip --file is required"),
        (["--model", "a", "--clip", "b"], "not allowed with argument"),
        (["--file", "a", "--clip", "b"], "not allowed with argument"),
        (["--model", "a", "--max-rounds", "few"], "invalid int value"),
    ],
)
def test_usage_errors(arguments: List[str], reason: str, semples: Command) -> None:
    status, out, err = semples(*arguments)
    assert (status, out) == (2, "") and err.startswith("usage: semples") and reason in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--file", "ROOT/none.json"], "No cluster file at"),
        (["--file", "ROOT/classes.txt"], "must end in .json"),
        (["--file", "ROOT/part.json"], "In no cluster: 'car', 'sofa'."),
        (["--file", "ROOT/broken.json"], "is not readable"),
        (["--file", "ROOT/part.json", "--max-rounds", "3"], "--max-rounds matters only with --model"),
        (["--file", "ROOT/part.json", "--accept-unconverged"], "--accept-unconverged matters only with --model"),
        (["--clip", "ViT-B/32", "--base-url", "http://x"], "--base-url matters only with --model"),
        (["--model", "toy", "--num-clusters", "3"], "--num-clusters matters only with --clip"),
        (["--clip", "none"], "`clip` must be one of"),
        (["--model", "toy", "--out", "ROOT/c.txt"], "--out must be a .json file in a folder that exists"),
        (["--model", "toy", "--out", "ROOT/none/c.json"], "--out must be a .json file in a folder that exists"),
        (["--model", "toy", "--out", "ROOT/folder.json"], "--out must be a .json file in a folder that exists"),
        (["--model", "toy", "--api-key-env", "NO_SUCH_NAME"], "must name a variable that holds the API key; the one that is"),
        (["--model", "toy", "--api-key", KEY], "never give the key itself"),  # and it is not repeated
        (["--model", "toy"], "Expected an API key for OpenAI's server, or the address of another one"),
        (["--model", "toy", "--base-url", "localhost"], "`base_url` must be an address"),
        (["--model", "toy", "--base-url", "http://x", "--max-rounds", "1"], "`max_rounds` must be at least 2"),
        (["--model", "toy", "--base-url", "http://x", "--initial-prompt", "ROOT/classes.txt"], "must contain {classes}"),
        (["--model", "toy", "--base-url", "http://x", "--refine-prompt", "ROOT/none.txt"], "none.txt"),
        (["--model", "toy", "--classes", "pascal"], "class names must be voc, coco or a readable file"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: List[str], reason: str, semples: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (semples.root / "folder.json").mkdir()
    files: Dict[str, str] = {"part.json": '{"a": ["cat", "dog", "person"]}', "broken.json": "{"}
    for name, content in files.items():
        (semples.root / name).write_text(content)
    if "--model" in arguments:
        pytest.importorskip("openai")
    status, out, err = semples(*[item.replace("ROOT", str(semples.root)) for item in arguments])
    assert (status, out) == (2, "") and err.startswith("error: ") and reason in err and err.count("\n") == 1
    assert not semples.out.exists() and not semples.partial.exists()
