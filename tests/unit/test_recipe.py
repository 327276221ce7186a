"""Recipes: what is accepted, what is refused and in which words, what a path in a file means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.errors import ConfigurationError
from flows.cli_options import DEFAULT_WORKSPACE
from flows.recipe import Recipe, load_recipe, make_recipe, recipe_names
from flows.settings_text import SETTINGS

ROOT = Path(__file__).parents[2]


def test_defaults_are_the_papers() -> None:
    recipe = make_recipe({"model": "m"})
    assert (recipe.calibration, recipe.num_samples, recipe.sequence_length, recipe.seed) == ("alpaca", 256, 2048, 42)
    assert (recipe.block_kinds, recipe.num_blocks, recipe.ratio) == ("both", None, None)


def test_every_setting_has_its_line_of_help() -> None:
    assert list(Recipe.model_fields) == list(SETTINGS)
    for name, description in Recipe.model_json_schema()["properties"].items():
        assert description["description"] == SETTINGS[name]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "no model is given; give --model"),
        ({"model": " "}, "model is ' '"),
        ({"modle": "m"}, "unknown recipe field 'modle'; did you mean 'model'?"),
        ({"num_block": 3}, "unknown recipe field 'num_block'; did you mean 'num_blocks'?"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": -2}, "num_blocks is -2"),
        ({"num_blocks": "many"}, "num_blocks is 'many'"),
        ({"num_blocks": 1.5}, "num_blocks is 1.5"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1}, "ratio is 1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"num_blocks": 3, "ratio": 0.2}, "both num_blocks and ratio are given"),
        ({"dtype": "float23"}, "unknown dtype 'float23'; valid are auto, float32, bfloat16; did you mean 'float32'?"),
        ({"block_kinds": "mpl"}, "unknown block_kinds 'mpl'; valid are mha, mlp, both; did you mean 'mlp'?"),
        ({"device": "cudda"}, "unknown device 'cudda'; valid are auto, cpu, cuda and cuda:N; did you mean 'cuda'?"),
        ({"export_format": "ggml"}, "unknown export_format 'ggml'"),
        ({"export_format": "gguf,stock", "export_dtype": "Q8_0"}, "format stock has no dtype q8_0"),
        ({"export_dtype": "float16"}, "format auto has no dtype float16 (it has float32, bfloat16, and none: as they"),
        ({"export_dtype": "int4"}, "unknown export_dtype 'int4'"),
        ({"num_samples": 0}, "num_samples is 0: it should be greater than or equal to 1, or all"),
        ({"num_samples": "none"}, "num_samples is 'none': it should be a valid integer"),
        ({"num_samples": "none"}, ", or all"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"tasks": [1]}, "tasks is 1"),
        ({"num_blocks": True}, "num_blocks is True: it should be a number"),
        ({"seed": False}, "seed is False: it should be a number"),
        ({"memory_budget": 8}, "memory_budget is 8: '8' is no amount of memory; write it with a unit"),
        ({"memory_budget": "2000000TB"}, "more memory than any device has"),
        ({"compile": "yes"}, "unknown compile 'yes'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_recipe(fields if not fields or "modle" in fields else {"model": "m", **fields})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.dictionaries(st.sampled_from([*SETTINGS, "modle"]), st.none() | st.integers() | st.text() | st.floats()))
def test_any_recipe_is_valid_or_refused_in_one_line(fields: dict[str, Any]) -> None:
    refusal = ""
    try:
        make_recipe(fields)
    except ConfigurationError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_lists_may_be_written_as_one_text() -> None:
    recipe = make_recipe({"model": "m", "tasks": "piqa, arc_easy", "eval_text": "a, b.txt"})
    assert recipe.tasks == ("piqa", "arc_easy")
    assert recipe.eval_text == ("a, b.txt",)  # a comma is a part of a file's name


@pytest.mark.parametrize(
    ("written", "meant"), [("on", "on"), ("off", "off"), ("true", "on"), ("'on'", "on"), ("auto", "auto")]
)
def test_on_and_off_are_no_truth_values(written: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: m\ncompile: {written}\n")
    assert load_recipe(str(tmp_path / "r.yaml"), {}).compile == meant


def test_all_rows_are_no_number_of_rows() -> None:
    assert make_recipe({"model": "m", "num_samples": "all"}).num_samples is None


def test_a_batch_size_of_auto_is_left_to_the_device() -> None:
    assert make_recipe({"model": "m", "batch_size": "auto"}).batch_size is None
    given = make_recipe({"model": "m", "batch_size": "4"})
    assert given.batch_size == 4
    assert given.changed({"batch_size": "auto"}).batch_size is None
    with pytest.raises(ConfigurationError, match=r"batch_size is .all.: it should be a valid integer.*, or auto"):
        make_recipe({"model": "m", "batch_size": "all"})


def test_a_search_needs_a_target() -> None:
    make_recipe({"model": "m", "ratio": 0.2}).require_target()
    with pytest.raises(ConfigurationError, match="--num-blocks K or --ratio R"):
        make_recipe({"model": "m"}).require_target()


def test_a_new_target_replaces_the_old_one() -> None:
    recipe = make_recipe({"model": "m", "num_blocks": 3}).changed({"ratio": 0.2})
    assert (recipe.num_blocks, recipe.ratio) == (None, 0.2)


def test_options_override_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nnum_blocks: 3\nseed: 1\n")
    recipe = load_recipe(str(path), {"ratio": 0.5, "seed": 7})
    assert (recipe.model, recipe.num_blocks, recipe.ratio, recipe.seed) == ("m", None, 0.5, 7)


def test_a_path_beside_the_recipe_means_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for folder in (here, recipes):
        folder.mkdir()
        (folder / "both.txt").write_text("x")
    (recipes / "r.yaml").write_text("model: org/model\ncalibration: both.txt\neval_text: [both.txt, here.txt]\n")
    monkeypatch.chdir(here)
    recipe = load_recipe(str(recipes / "r.yaml"), {})
    assert recipe.model == "org/model"
    assert recipe.calibration == str(recipes / "both.txt")
    assert recipe.eval_text == (str(recipes / "both.txt"), "here.txt")
    assert load_recipe(str(recipes / "r.yaml"), {"calibration": "both.txt"}).calibration == "both.txt"


def test_anchored_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe({"model": "m", "calibration": "alpaca", "eval_text": ["gone.txt"]}).anchored()
    assert recipe.model == str(tmp_path / "m")
    assert (recipe.calibration, recipe.eval_text) == ("alpaca", ("gone.txt",))


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"a: [", b"\xff\xfe\x00", b"just words", b"a: &a [*a]\n"])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(str(path), {})
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'demo'"):
        load_recipe("demmo", {})


@pytest.mark.parametrize("name", recipe_names())
def test_the_projects_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name, {})
    recipe.require_target()
    assert (recipe.num_blocks is None) != (recipe.ratio is None)


@pytest.mark.parametrize("name", ["local", "nightly"])
def test_a_deployment_without_parameters_is_the_demo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every field, for what `blockpruner demo` has computed is to be `Cached` there."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (parameters,) = [each["parameters"] for each in deployments if each["name"] == name]
    monkeypatch.chdir(ROOT)
    assert make_recipe(parameters["recipe"]).anchored() == load_recipe("demo", {}).anchored()
    assert Path(parameters["workspace"]) == DEFAULT_WORKSPACE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (4, None, 2)),
        ({"export_format": "stock"}, (4, None, 2)),
        ({"num_blocks": 3}, (4, None, 3)),
        ({"num_blocks": 4}, (4, None, 4)),
        ({"num_blocks": 6}, (6, None, None)),
        ({"ratio": 0.5}, (None, 0.5, None)),
        ({"num_blocks": 3, "seed": 7}, (3, None, None)),  # of another search nothing is there yet
        ({"num_blocks": 3, "seed": 42}, (4, None, 3)),
    ],
)
def test_who_goes_on_from_a_run_counts_from_the_whole_model(
    changes: dict[str, Any], expected: tuple[int | None, float | None, int | None]
) -> None:
    recipe = make_recipe({"model": "m", "num_blocks": 4, "export_blocks": 2}).going_on(changes, 4)
    assert (recipe.num_blocks, recipe.ratio, recipe.export_blocks) == expected


def test_an_option_takes_the_place_of_what_a_recipe_file_exports(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\nnum_blocks: 4\nexport_blocks: 2\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), {"num_blocks": 6})
    assert (recipe.num_blocks, recipe.export_blocks) == (6, None)


def test_another_format_begins_with_the_dtype_of_the_weights() -> None:
    ran = make_recipe({"model": "m", "num_blocks": 4, "export_format": "gguf", "export_dtype": "Q8_0"})
    assert ran.going_on({}, 4).export_dtype == "q8_0"
    assert ran.going_on({"export_format": "decilm"}, 4).export_dtype is None
    assert ran.going_on({"export_format": "decilm", "export_dtype": "bfloat16"}, 4).export_dtype == "bfloat16"
    assert ran.going_on({"export_dtype": "none"}, 4).export_dtype is None
