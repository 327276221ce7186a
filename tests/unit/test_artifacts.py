"""The artifact store: what it keeps, and what it does about damage and failures."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.errors import ArtifactError
from stages.artifacts import ArtifactStore
from stages.contract import Runtime, Stage, canonical_digest
from tests.unit.echo_stage import ECHO, Bench, EchoConfig, EchoInputs, EchoManifest, run_echo, variant


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_computed_once_then_taken(bench: Bench) -> None:
    first, second = bench.get(), bench.get()
    assert (first.cached, second.cached, bench.inputs.calls()) == (False, True, 1)
    assert repr(second.manifest) == repr(first.manifest) == "EchoManifest(length=15, scores=(0.1, nan, inf, -inf))"
    assert second.path == first.path == second.ref.path
    assert second.seconds == first.seconds
    assert bench.said == []


def test_layout_and_manifest_are_the_documented_ones(bench: Bench) -> None:
    artifact = bench.get()
    source = hashlib.sha256(b"a source").hexdigest()
    identity = {
        "stage": "echo",
        "version": 1,
        "config": {"word": "hello", "num_times": 3},
        "inputs": {"source": source},
    }
    assert artifact.fingerprint == canonical_digest(identity)
    assert artifact.path == bench.workspace / "artifacts" / "echo" / artifact.fingerprint
    files = {"words.txt": b"hellohellohello", "deep/er/bytes": bytes(range(256))}
    content = json.loads((artifact.path / "manifest.json").read_text())
    assert content["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    }
    assert {name: (artifact.path / name).read_bytes() for name in files} == files
    assert content["manifest"] == {"length": 15, "scores": [0.1, "NaN", "Infinity", "-Infinity"]}
    assert {key: content[key] for key in identity} == identity
    assert content["fingerprint"] == artifact.fingerprint
    assert {"created_at", "seconds", "package_version"} <= content.keys()
    assert bench.unfinished() == []


def test_another_config_is_another_artifact(bench: Bench) -> None:
    assert bench.get(word="a").path != bench.get(word="b").path
    assert bench.inputs.calls() == 2


def test_has_and_lookup(bench: Bench) -> None:
    fingerprint = ECHO.fingerprint(EchoConfig(), bench.inputs)
    assert not bench.store.has("echo", fingerprint)
    assert bench.store.lookup(ECHO, fingerprint) is None
    bench.get()
    assert bench.store.has("echo", fingerprint)
    found = bench.store.lookup(ECHO, fingerprint)
    assert found is not None
    assert found.manifest.length == 15


# --- damage -----------------------------------------------------------------------------------------------------------


def change_byte(path: Path) -> None:
    (path / "words.txt").write_text("hellohellohellO")


def truncate(path: Path) -> None:
    os.truncate(path / "deep" / "er" / "bytes", 255)


def lose_file(path: Path) -> None:
    (path / "words.txt").unlink()


def lose_folder(path: Path) -> None:
    shutil.rmtree(path / "deep")


def add_file(path: Path) -> None:
    (path / "deep" / "stranger").touch()


def link_same_content(path: Path) -> None:
    shutil.copy(path / "words.txt", path.parents[2] / "words.txt")
    (path / "words.txt").unlink()
    (path / "words.txt").symlink_to(path.parents[2] / "words.txt")


def link_whole(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def break_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"stage": "echo"')


def foreign_json(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def change_result(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"length": 15', '"length": 16'))


def reformat_manifest(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content))


def put_a_file_in_its_place(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def add_pickle_and_list_it(path: Path) -> None:
    """A manifest made by someone who knows how: every digest is right."""
    (path / "model.pkl").write_bytes(data := pickle.dumps("code"))
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["model.pkl"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    del content["sha256"]
    content["sha256"] = canonical_digest(content)
    (path / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change_byte, "has a changed file words.txt"),
        (truncate, "has a changed file deep/er/bytes"),
        (lose_file, "lacks the file words.txt"),
        (lose_folder, "lacks the file deep/er/bytes"),
        (add_file, "has a file deep/stranger that does not belong to it"),
        (link_same_content, "holds words.txt, which is neither"),
        (link_whole, "is not a folder"),
        (lose_manifest, "has no manifest.json"),
        (break_manifest, "has a changed file manifest.json"),
        (foreign_json, "has a changed file manifest.json"),
        (change_result, "has a changed file manifest.json"),
        (reformat_manifest, "has a changed file manifest.json"),
        (put_a_file_in_its_place, "is not a folder"),
        (add_pickle_and_list_it, "holds model.pkl, a kind of file that can run code"),
    ],
)
def test_damage_is_noticed_said_and_redone(bench: Bench, damage: Callable[[Path], None], reason: str) -> None:
    artifact = bench.get()
    damage(artifact.path)
    again = bench.get()
    assert not again.cached
    assert bench.inputs.calls() == 2
    (said,) = bench.said
    assert said.startswith(f"artifact echo/{artifact.fingerprint[:12]} {reason}")
    assert "computed again" in said
    assert "\n" not in said
    assert bench.get().cached
    assert os.path.lexists(bench.workspace / "damaged" / f"echo-{artifact.fingerprint}")
    assert bench.unfinished() == []


def test_an_artifact_under_a_wrong_fingerprint_is_not_taken(bench: Bench) -> None:
    one, other = bench.get(word="one"), bench.get(word="other")
    shutil.rmtree(other.path)
    shutil.copytree(one.path, other.path)
    assert not bench.get(word="other").cached
    assert "holds the manifest of echo/" in bench.said[0]


def test_a_manifest_of_another_shape_is_computed_again(bench: Bench) -> None:
    class Wider(EchoManifest):
        extra: str

    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> Wider:
        return Wider(extra="!", **dict(run_echo(config, inputs, out_dir, runtime)))

    bench.get()
    wider: Stage[EchoConfig, EchoInputs, Wider] = Stage("echo", 1, Wider, run)
    artifact = bench.store.get_or_run(wider, EchoConfig(), bench.inputs, Runtime())
    assert (artifact.cached, artifact.manifest.extra) == (False, "!")
    assert "does not fit its stage" in bench.said[0]


@settings(max_examples=40)
@given(st.sampled_from(["words.txt", "deep/er/bytes", "manifest.json"]), st.integers(0, 10_000), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, name: str, position: int, bit: int
) -> None:
    bench = Bench(tmp_path_factory.mktemp("flip"))
    artifact = bench.get()
    content = bytearray((artifact.path / name).read_bytes())
    content[position % len(content)] ^= 1 << bit
    (artifact.path / name).write_bytes(content)
    assert bench.store.lookup(ECHO, artifact.fingerprint) is None
    assert f"has a changed file {name}" in bench.said[0]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failed_stage_leaves_nothing(bench: Bench, error: BaseException) -> None:
    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        run_echo(config, inputs, out_dir, runtime)
        raise error

    with pytest.raises(type(error)):
        bench.get(variant(run))
    assert list(bench.workspace.glob("artifacts/echo/*")) == bench.unfinished() == []
    assert not bench.get().cached


def test_a_full_disk_is_one_line_and_earlier_artifacts_stay(bench: Bench) -> None:
    earlier = bench.get(word="earlier")

    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        with Path("/dev/full").open("wb", buffering=0) as file:  # a disk that is always full
            file.write(b"x")
        raise AssertionError

    with pytest.raises(ArtifactError, match=r"^stage echo: .* \(No space left on device\); free some .* is kept$"):
        bench.get(variant(run))
    assert bench.unfinished() == []
    assert bench.get(word="earlier").path == earlier.path
    assert bench.get(word="earlier").cached


def test_a_full_disk_told_by_another_library_is_the_same(bench: Bench) -> None:
    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ArtifactError, match=r"cannot be written \(Error while serializing: .*; free some space"):
        bench.get(variant(run))


@pytest.mark.parametrize("kind", ["link", "pickle", "pipe"])
def test_a_stage_must_not_write_links_pickles_or_pipes(bench: Bench, kind: str) -> None:
    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        match kind:
            case "link":
                (out_dir / "x").symlink_to("/etc/passwd")
            case "pickle":
                (out_dir / "x.PT").touch()
            case "pipe":
                os.mkfifo(out_dir / "x")
        return run_echo(config, inputs, out_dir, runtime)

    with pytest.raises(ArtifactError, match="what stage echo wrote cannot be kept: it holds x"):
        bench.get(variant(run))
    assert bench.unfinished() == []


def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ArtifactError, match=r"cannot be written .* --workspace DIR") as caught:
            ArtifactStore(path)
        assert "\n" not in str(caught.value)


def test_a_workspace_behind_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    bench = Bench(tmp_path)
    store = ArtifactStore(tmp_path / "link", bench.said.append)
    assert store.get_or_run(ECHO, EchoConfig(), bench.inputs, Runtime()).path.is_relative_to(tmp_path / "real")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "a b", "a\n", "/etc", "ä"])
def test_names_cannot_escape(bench: Bench, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot name a folder"):
        bench.store.has(name, "ab")
    with pytest.raises(ArtifactError, match="cannot name a folder"):
        bench.store.has("echo", name)
    with pytest.raises(ArtifactError, match="cannot name a folder"):
        bench.store.lookup(ECHO, name)


def test_a_linked_stage_folder_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (bench.workspace / "artifacts").mkdir()
    (bench.workspace / "artifacts" / "echo").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="symbolic link"):
        bench.get()
    assert list((tmp_path / "outside").iterdir()) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_resumable_stage_goes_on_from_its_state(bench: Bench) -> None:
    seen: list[tuple[Path, int]] = []

    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        assert runtime.state_dir is not None
        counter = runtime.state_dir / "counter"
        done = int(counter.read_text()) if counter.exists() else 0
        seen.append((runtime.state_dir, done))
        for step in range(done + 1, config.num_times + 1):
            counter.write_text(str(step))
            if step == 2 and done == 0:
                raise RuntimeError("died")
        return run_echo(config, inputs, out_dir, runtime)

    stage = variant(run, resumable=True, not_resume_fields=frozenset({"num_times"}))
    with pytest.raises(RuntimeError, match="died"):
        bench.get(stage, num_times=3)
    bench.get(stage, num_times=3)
    bench.get(stage, num_times=5)
    assert [done for _, done in seen] == [0, 2, 3]
    (state_dir,) = {folder for folder, _ in seen}
    expected = stage.resume_fingerprint(EchoConfig(), bench.inputs)
    assert state_dir == bench.workspace / "state" / "echo" / expected


def test_one_state_is_used_by_one_at_a_time(bench: Bench) -> None:
    inside: list[int] = []
    most: list[int] = []

    def run(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return run_echo(config, inputs, out_dir, runtime)

    stage = variant(run, resumable=True, not_resume_fields=frozenset({"num_times"}))
    threads = [threading.Thread(target=bench.get, args=(stage,), kwargs={"num_times": n}) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
