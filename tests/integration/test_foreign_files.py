"""Artifacts, checkpoints and names of others: none of them runs code, leads out of the workspace or steers a terminal.

What `sql` may do is in tests/unit/test_store.py, what a page shows in test_report.py, what an export trusts in
test_export_trust.py.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.contract import canonical_digest
from tests.integration.bad_input_lab import Lab, refused
from tests.tiny_models import save_tiny_model, tiny_rows

TinyFolder = Callable[[str], Path]
ESCAPES = "\x1b[2J\x07\u202e"


class Trap:
    """What touches a file as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


def code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"


def small(folder: Path, model: Path) -> Lab:
    shutil.copytree(model, folder / "model")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (folder / "new.txt").write_text("\n".join(tiny_rows(40, seed=1)))
    return Lab(folder, folder / "ws")


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: TinyFolder) -> Lab:
    return small(tmp_path, tiny_folder("llama"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Lab:
    """A run whose export comes with code."""
    made = small(tmp_path_factory.mktemp("exported"), tiny_folder("llama"))
    assert made.call("export", *made.good, "--num-blocks", 1, "--export-format", "transformers").status == 0
    return made


@pytest.fixture
def foreign(exported: Lab, tmp_path: Path) -> Lab:
    """The same, handed on by somebody."""
    shutil.copytree(exported.path, tmp_path / "foreign")
    return Lab(tmp_path / "foreign", tmp_path / "foreign/ws")


def signed(artifact: Path) -> None:
    """Write the manifest anew, so that every digest is right: it is no secret how."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["sha256"]
    contents = {
        path.relative_to(artifact).as_posix(): path.read_bytes()
        for path in sorted(artifact.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    manifest["sha256"] = canonical_digest(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def with_more_code(model: Path, mark: Path) -> None:
    path = model / "modeling_blockpruned.py"
    path.write_text(path.read_text() + code(mark))


def with_another_file(model: Path, mark: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(mark))


def with_a_pointer(model: Path, mark: Path) -> None:
    elsewhere = mark.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "modeling.py").write_text(code(mark))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = f"{elsewhere}--modeling.Model"
    (model / "config.json").write_text(json.dumps(config))


def with_another_type(model: Path, mark: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    with_more_code(model, mark)


@pytest.mark.parametrize("change", [with_more_code, with_another_file, with_a_pointer, with_another_type])
def test_code_in_an_artifact_of_others_is_not_run(
    change: Callable[[Path, Path], None], foreign: Lab, tmp_path: Path
) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/export/*")
    change(artifact / "model", tmp_path / "mark")
    signed(artifact)
    for command in (("evaluate", "latest", "--eval-text", foreign.path / "new.txt"), ("speed", "latest")):
        line = refused(foreign.call(*command))
        assert "format transformers writes" in line or "model code that this version's exporter does not write" in line
    assert not (tmp_path / "mark").exists()


def test_our_own_code_is_run(foreign: Lab) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/export/*")
    signed(artifact)
    assert foreign.call("evaluate", "latest", "--eval-text", foreign.path / "new.txt").status == 0


@pytest.mark.parametrize("name", ["model/pytorch_model.bin", "results.PKL", "model/deep/x.pt"])
def test_an_artifact_with_a_pickle_is_refused(name: str, foreign: Lab, tmp_path: Path) -> None:
    (artifact,) = foreign.workspace.glob("artifacts/search/*")
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    signed(artifact)
    outcome = foreign.search("--json")
    assert f"holds {name}, a kind of file that can run code when it is loaded: computed again" in outcome.stderr
    assert [stage["cached"] for stage in outcome.json["stages"]] == [True, False]
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_never_loaded(lab: Lab, tmp_path: Path) -> None:
    """Whatever the folder offers beside, or in place of, what is checked."""
    content = pickle.dumps(Trap(tmp_path / "mark"))
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "scheduler.pt"):
        (lab.model / name).write_bytes(content)
    assert lab.search().status == 0
    (lab.model / "model.safetensors").unlink()
    assert "only pickled weights" in refused(lab.search())
    (lab.model / "model.safetensors").write_bytes(content)
    assert "hold no header" in refused(lab.search())
    assert not (tmp_path / "mark").exists()


def test_code_of_a_model_is_run_for_who_trusts_it_alone_and_the_run_says_so(lab: Lab, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = lab.model / "config.json"
    settings = json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    config.write_text(json.dumps(settings))
    class_ = "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n"
    (lab.model / "modeling.py").write_text(code(mark) + class_)
    assert lab.search().status == 0
    assert not mark.exists()
    assert lab.call("baseline", *lab.good, "--trust-remote-code").status == 0
    assert mark.exists()
    trusted = "SELECT config->>'trust_remote_code' AS trusted FROM runs ORDER BY created_at"
    assert [row["trusted"] for row in lab.call("sql", trusted, "--json").json] == ["false", "true"]


def test_an_adapter_does_not_bring_another_model(lab: Lab) -> None:
    """Which would be loaded in place of the one that was checked and identified."""
    other = save_tiny_model(lab.path / "other", "llama")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(other)}
    (lab.model / "adapter_config.json").write_text(json.dumps(settings))
    assert "holds an adapter" in refused(lab.search())


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", f"a/{ESCAPES}\n../b"])
def test_names_lead_nowhere_and_steer_nothing(name: str, lab: Lab) -> None:
    text = lab.file("new\x1b[2J\n.txt", b"\n".join(row.encode() for row in tiny_rows(40, seed=1)))
    before = {path for path in lab.path.rglob("*") if lab.workspace not in (path, *path.parents)}
    run = ("baseline", *lab.good, "--name", name, "--eval-text", text)
    said = [lab.call(*run), lab.call("runs"), lab.call("show", name), lab.call("show", "latest", "--markdown")]
    assert [outcome.status for outcome in said] == [0, 0, 0, 0], said
    shown = "".join(outcome.stdout + outcome.stderr for outcome in said)
    assert all(character.isprintable() or character == "\n" for character in shown), shown
    after = {path for path in lab.path.rglob("*") if lab.workspace not in (path, *path.parents)}
    assert after == before
    assert all(path.name.isascii() and path.name.isprintable() for path in lab.workspace.rglob("*"))
