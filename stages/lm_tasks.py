"""lm-eval tasks: which names are valid, what identifies a task, and the loading of its data. Runs no model.

A local task is a YAML in lm-eval's own format in the user's task folder; the paths in its `dataset_kwargs.data_files`
are relative to the YAML's folder, and it is identified by the content of every file it is made of. A registered task
comes with lm-eval and is identified by its name and lm-eval's version; with its data from local files (`task_data`),
by their content as well. Importing lm-eval takes seconds and listing all its tasks ten more, so both wait until they
are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from yaml import YAMLError

from blockpruner.checkpoint import file_digest
from blockpruner.errors import ConfigurationError, nearest, one_line
from stages.contract import StageConfig, canonical_digest
from stages.task_data import DATA_TASKS, data_config, data_digest

_NAME_IN_YAML = re.compile(rb"^(?:task|group|tag):[ \t]*['\"]?([\w.:-]+)", re.MULTILINE)


class TaskSpec(StageConfig):
    """One task and what identifies it."""

    name: str
    origin: Literal["local", "data", "registered"]
    """In the user's task folder, or one of lm-eval's own, with its data from the user's files or from the hub."""
    digest: str | None = None
    """sha256 over the user's files; None for a registered task, which lm-eval's version identifies."""


def lm_eval_version() -> str:
    """The installed lm-eval's version."""
    return version("lm-eval")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, as `simple_evaluate` takes them."""

    items: list[Any]
    """lm-eval's own Task and Group objects."""
    manager: Any
    """The TaskManager that made them."""


def resolve_tasks(
    names: Sequence[str],
    task_dir: Path | None = None,
    *,
    task_data: Path | None = None,
    num_fewshot: int | None = None,
) -> tuple[TaskSpec, ...]:
    """Check task names and local data, and identify the tasks; a name that is given twice counts once.

    A task of `task_dir` goes before one of `DATA_TASKS` with data in `task_data`, and that before a registered one of
    the same name. Groups ('mmlu') and tags are names too; those of lm-eval take their data from the hub.

    Args:
        names: what was asked for.
        task_dir: folder with the user's own tasks.
        task_data: folder with data for `DATA_TASKS`.
        num_fewshot: examples in the prompt; says whether data to draw them from must be there.

    Raises:
        ConfigurationError: if a name is unknown, a folder is not there, or a local task's files are missing or wrong.
    """
    if not names:
        return ()
    if task_data is not None and not task_data.is_dir():
        raise ConfigurationError(
            f"there is no folder {task_data} with task data; give one that holds files such as {DATA_TASKS[0]}.jsonl"
        )
    local = _local_index(task_dir)

    def resolve(name: str) -> TaskSpec:
        if name in DATA_TASKS and name not in local and task_data is not None:
            return TaskSpec(name=name, origin="data", digest=data_digest(name, task_data, num_fewshot))
        return _resolve(name, local, task_dir)

    return tuple(map(resolve, dict.fromkeys(names)))


@contextmanager
def loaded_tasks(
    specs: Sequence[TaskSpec],
    task_dir: Path | None = None,
    num_fewshot: int | None = None,
    *,
    task_data: Path | None = None,
    scratch_in: Path | None = None,
) -> Iterator[LoadedTasks]:
    """Read the tasks' data: local files into a scratch folder that lasts as long as the block, others from the hub.

    `scratch_in`: the folder for that one, so that it goes with it where this process is killed; None: the system's.

    Raises:
        ConfigurationError: if a task cannot be loaded, has changed since it was resolved, needs what we do not run, or
            has fewer examples than `num_fewshot` (None: than its own number).
    """
    given = [spec for spec in specs if spec.origin != "registered"]
    for spec in given:
        if (spec,) != resolve_tasks([spec.name], task_dir, task_data=task_data, num_fewshot=num_fewshot):
            raise ConfigurationError(f"the task {spec.name!r} has changed since this run began; run it again")
    with TemporaryDirectory(prefix=".tasks-", dir=scratch_in) as scratch:
        manager = _manager(specs, task_dir, scratch, _data_configs(specs, task_data, num_fewshot, Path(scratch)))
        loaded = _load(manager, [spec.name for spec in specs])
        items = _top_level(loaded)
        for name, task in loaded["tasks"].items():
            _check_fewshot(name, task, num_fewshot)
        yield LoadedTasks(items, manager)


def _data_configs(
    specs: Sequence[TaskSpec], task_data: Path | None, num_fewshot: int | None, scratch: Path
) -> dict[str, dict[str, Any]]:
    """The configurations of the tasks with data from the user's files, by name."""
    return {
        spec.name: data_config(spec.name, task_data, num_fewshot, scratch)
        for spec in specs
        if spec.origin == "data" and task_data is not None
    }


def _resolve(name: str, local: Mapping[str, Any], task_dir: Path | None) -> TaskSpec:
    if name in local:
        return TaskSpec(name=name, origin="local", digest=_digest(name, local))
    if task_dir is not None and (task_dir / f"{name}.yaml").is_file():
        raise _not_a_task(task_dir / f"{name}.yaml", name)
    # The index takes ten seconds; whether its files hold the name at all takes one, and a misspelt name is in none.
    if name.encode() not in _registered_yaml() or name not in _registered_index():
        harness = f"lm-eval {lm_eval_version()}"
        where = f"neither {task_dir} nor {harness} has such a task" if task_dir else f"{harness} has no such task"
        hint = nearest(name, [*local, *_registered_names()]) or "; `lm-eval ls tasks` lists its own"
        raise ConfigurationError(f"unknown task {name!r}: {where}{hint}")
    return TaskSpec(name=name, origin="registered")


@cache
def _registered_yaml() -> bytes:
    """The text of all YAML files that come with lm-eval."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    return b"\n".join(path.read_bytes() for path in folder.glob("**/*.yaml"))


def _registered_names() -> set[str]:
    """Most names of lm-eval's tasks, groups and tags: enough for a hint."""
    return {name.decode() for name in _NAME_IN_YAML.findall(_registered_yaml())}


def _not_a_task(yaml_path: Path, name: str) -> ConfigurationError:
    """The error for a YAML of the right name that lm-eval's index passed over in silence."""
    try:
        reason = f"it holds no 'task: {name}'" if _read_yaml(yaml_path) else "it is empty"
    except (OSError, ValueError, YAMLError) as error:
        reason = one_line(error)
    return ConfigurationError(f"{yaml_path} is not an lm-eval task called {name!r}: {reason}")


@cache
def _registered_index() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _local_index(task_dir: Path | None) -> Mapping[str, Any]:
    """The tasks, groups and tags of the user's folder; their YAML paths are absolute."""
    return dict(_local_manager(task_dir).task_index) if task_dir is not None else {}


def _local_manager(task_dir: Path) -> Any:
    from lm_eval.tasks import TaskManager

    if not task_dir.is_dir():
        raise ConfigurationError(
            f"there is no task folder {task_dir}; give the folder that holds the tasks' YAML files"
        )
    return TaskManager(include_path=str(task_dir.resolve()), include_defaults=False)


def _manager(
    specs: Sequence[TaskSpec], task_dir: Path | None, cache_dir: str, finished: Mapping[str, dict[str, Any]]
) -> Any:
    """A TaskManager that knows what the tasks need; of some the configuration is finished already.

    lm-eval takes a local task's data paths relative to the working folder, so it is given the finished configurations
    in place of the YAML files; its own tasks are added only where they are needed, for listing them takes long.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    manager = TaskManager(include_defaults=False) if task_dir is None else _local_manager(task_dir)
    index: dict[str, Any] = manager.task_index
    index.update({name: Entry(name, Kind.TASK, None, config) for name, config in finished.items()})
    needed = _members({spec.name for spec in specs}, index)
    for name in set(index) - needed:
        del index[name]  # a registered group gets registered members, whatever else lies in the user's folder
    for name in index:
        if (path := index[name].yaml_path) is not None:
            index[name].cfg, index[name].yaml_path = _finished_config(path, cache_dir), None
    if not needed <= set(index):
        for name, entry in _registered_index().items():
            index.setdefault(name, entry)
    return manager


def _members(names: set[str], index: Mapping[str, Any]) -> set[str]:
    """The names and all that they lead to: the members of groups and tags, and theirs."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        found.add(name := waiting.pop())
        if name in index:
            is_tag = index[name].yaml_path is None
            waiting |= (set(index[name].tags) if is_tag else _group_members(index[name].cfg)) - found
    return found


def _group_members(config: Mapping[str, Any]) -> set[str]:
    """The names of a group's members; those of groups that it defines in place as well."""
    named: set[str] = set()
    for member in _listed(config):
        if isinstance(member, dict) and isinstance(member.get("task"), list):
            named |= _group_members(member)
        else:
            named.add(member if isinstance(member, str) else str(member.get("task") or member.get("group")))
    return named


def _listed(config: Mapping[str, Any]) -> list[Any]:
    members = config.get("task")
    return members if isinstance(members, list) else []


def _digest(name: str, local: Mapping[str, Any]) -> str:
    """sha256 over all that a local task is made of; other local tasks that it leads to included."""
    identity: dict[str, Any] = {}
    for member in _members({name}, local):
        if member not in local:
            identity[member] = "registered"
        elif (path := local[member].yaml_path) is not None:
            identity[member] = {place: file_digest(file) for place, file in _files_of(path).items()}
    return canonical_digest(identity)


def _files_of(yaml_path: Path) -> Mapping[str, Path]:
    """The files that a task's YAML is made of, by a name that does not depend on where the folder lies."""
    folder = yaml_path.parent
    files = [yaml_path, *_included(yaml_path), *folder.glob("*.py"), *_data_files(_read_yaml(yaml_path), folder)]
    return {os.path.relpath(file, folder): file for file in files}


def _included(yaml_path: Path) -> list[Path]:
    """The YAML files that a YAML includes, and those that they include."""
    named = _read_yaml(yaml_path, recursive=False).get("include", [])
    direct = [yaml_path.parent / name for name in ([named] if isinstance(named, str) else named)]
    return [file for path in direct for file in (path, *_included(path))]


def _read_yaml(yaml_path: Path, *, recursive: bool = True, functions: bool = False) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(yaml_path, resolve_func=functions, recursive=recursive))


def _data_files(config: Mapping[str, Any], folder: Path) -> list[Path]:
    """The local files that a task's configuration, or a group's own changes to its members, name as data.

    Raises:
        ConfigurationError: if a name leads to no file.
    """
    files: list[Path] = []
    for name in _leaves(_local_data(_finish(config, folder, ""))):
        found = [] if "://" in name else _expand(Path(name))
        if not found and "://" not in name:
            raise ConfigurationError(
                f"the task {config.get('task')!r} names the data {name}, which is not there; "
                "give paths relative to the folder of the task's YAML"
            )
        files += found
    for member in _listed(config):
        files += _data_files(member, folder) if isinstance(member, dict) else []
    return files


def _expand(path: Path) -> list[Path]:
    """The file, the files of the folder, or what the wildcards match."""
    if path.is_file():
        return [path]
    folder, pattern = (path, "**/*") if path.is_dir() else (Path(path.anchor), str(path.relative_to(path.anchor)))
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def _finished_config(yaml_path: Path, cache_dir: str) -> dict[str, Any]:
    """A local task's configuration with absolute data paths, its functions imported, its cache in `cache_dir`."""
    try:
        config = _read_yaml(yaml_path, functions=True)
    except Exception as error:  # it imports the task's own code, which may raise anything
        raise ConfigurationError(f"{yaml_path} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    return _finish(config, yaml_path.parent, cache_dir)


def _finish(config: Mapping[str, Any], folder: Path, cache_dir: str) -> dict[str, Any]:
    """A configuration whose data paths are absolute; a group's changes to its members as well."""
    finished = dict(config)
    path = config.get("dataset_path")
    if isinstance(path, str) and "/" in path and (folder / path).is_dir():
        finished["dataset_path"] = str(folder / path)
    arguments = dict(config.get("dataset_kwargs") or {})
    base = folder / arguments.get("data_dir", "")
    if "data_dir" in arguments:
        arguments["data_dir"] = str(base)
    if "data_files" in arguments:
        arguments["data_files"] = _map_leaves(arguments["data_files"], base)
    if _local_data({**finished, "dataset_kwargs": arguments}):
        finished["dataset_kwargs"] = {**arguments, "cache_dir": cache_dir}
    if members := _listed(config):
        finished["task"] = [_finish(item, folder, cache_dir) if isinstance(item, dict) else item for item in members]
    return finished


def _local_data(config: Mapping[str, Any]) -> list[Any]:
    """Where a finished configuration has its data from, if that is not the hub."""
    arguments = config.get("dataset_kwargs") or {}
    path = config.get("dataset_path")
    folder = [path] if isinstance(path, str) and Path(path).is_absolute() else []
    named = arguments.get("data_files") or arguments.get("data_dir")
    return folder + ([named] if named else [])


def _leaves(value: Any) -> list[str]:
    """The strings in nested lists and mappings."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [str(value)]


def _map_leaves(value: Any, folder: Path) -> Any:
    """Nested lists and mappings with every path made absolute."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_leaves(item, folder) for item in value]
    return value if "://" in str(value) else str(folder / str(value))


def _load(manager: Any, names: list[str]) -> Mapping[str, Any]:
    """`TaskManager.load`, with what can go wrong there told in one line."""
    what = ", ".join(names)
    try:
        with _without_progress_bars():
            return dict(manager.load(names))
    except ConnectionError as error:
        raise ConfigurationError(
            f"the data of the tasks {what} is not on this machine and the hub cannot be reached ({one_line(error)}); "
            "run once with a network (and HF_HUB_OFFLINE unset), or use a task with local data"
        ) from error
    except Exception as error:  # a task's own code and templates may raise anything
        raise ConfigurationError(
            f"the tasks {what} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing bars over the caller's own."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def _check_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    """Make sure that a task has as many examples to show as it will be asked for; lm-eval finds out at the question."""
    own = task.get_config("num_fewshot")
    wanted = own if num_fewshot is None or own == 0 else num_fewshot  # as lm-eval decides it
    if not wanted or (sampler := getattr(task, "sampler", None)) is None:
        return
    drawn_from_questions = task.fewshot_cfg.split == task.config.test_split  # where the question itself is left out
    available = len(sampler.fewshot_docs()) - int(drawn_from_questions)
    if wanted > available:
        raise ConfigurationError(
            f"the task {name!r} has {available} examples to show before a question, and num_fewshot is {wanted}; "
            f"give --num-fewshot {available} or less"
        )


def _top_level(loaded: Mapping[str, Any]) -> list[Any]:
    """The groups that are in no other, and the tasks that are in none.

    Raises:
        ConfigurationError: if a task needs what is not done here.
    """
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigurationError(
                f"the task {name!r} runs code that a model wrote, which is not done here; leave it out"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"the task {name!r} needs images or sound, and the model reads text; leave it out")
    members = {name for names in loaded["group_map"].values() for name in names}
    return [item for name, item in {**loaded["groups"], **loaded["tasks"]}.items() if name not in members]
