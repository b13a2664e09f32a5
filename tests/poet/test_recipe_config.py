"""Recipes: what a YAML file may hold, and what is said of a key or value that it may not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from poet.errors import ConfigError
from poet.training.audio_tokenizer import AudioTokenizerRecipe
from poet.training.config import apply_overrides, build, read_recipe, to_plain, write_recipe
from poet.training.language import LanguageRecipe
from poet.training.lora import LoraRecipe
from poet.training.recipes import LoopOptions, TokenizerBundleRecipe
from poet.training.text_tokenizer import TextTokenizerRecipe
from poet.training.upsampler import UpsamplerRecipe
from poet.training.video_tokenizer import VideoTokenizerRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    channels: int = 8
    patch_size: tuple[int, int, int] = (1, 2, 2)
    multipliers: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"channels must be at least 1, got {self.channels}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    shards: Path
    num_steps: int
    learning_rate: float = 1e-3
    codec: Codec = dataclasses.field(default_factory=Codec)
    precision: Literal["bf16", "fp32"] = "bf16"
    start_from: Path | None = None
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    compile: bool = False
    name: str = "nano"


NEEDED: dict[str, Any] = {"shards": "some/folder", "num_steps": 7}


def test_values_come_in_with_their_types() -> None:
    values = NEEDED | {
        "learning_rate": 1,
        "codec": {"patch_size": [2, 4, 4], "multipliers": [1, 2, 3, 5]},
        "precision": "fp32",
        "start_from": "bundle",
        "tasks": {"captioning": 2},
        "sizes": [[24, 40], [56, 88]],
        "compile": True,
    }
    recipe = build(Recipe, values)
    assert recipe == Recipe(
        shards=Path("some/folder"),
        num_steps=7,
        learning_rate=1.0,
        codec=Codec(patch_size=(2, 4, 4), multipliers=(1, 2, 3, 5)),
        precision="fp32",
        start_from=Path("bundle"),
        tasks={"captioning": 2.0},
        sizes=((24, 40), (56, 88)),
        compile=True,
    )
    assert type(recipe.learning_rate) is type(recipe.tasks["captioning"]) is float


def test_what_is_left_out_keeps_its_default() -> None:
    assert build(Recipe, NEEDED) == Recipe(shards=Path("some/folder"), num_steps=7)
    assert build(Recipe, NEEDED | {"start_from": None, "codec": {}}) == build(Recipe, NEEDED)


@pytest.mark.parametrize("text", ["1e-3", "5E-4", "2.5e-3", "3"])
def test_floats_that_yaml_reads_as_text_are_floats(text: str) -> None:
    assert build(Recipe, NEEDED | {"learning_rate": text}).learning_rate == float(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, r"unknown recipe key 'learning_rat'\. Did you mean 'learning_rate'\?"),
        ({"num_step": 1}, r"'num_step'\. Did you mean 'num_steps'\?"),
        ({"codec": {"channel": 1}}, r"'codec\.channel'\. Did you mean 'channels'\?"),
        ({"zzzz": 1}, r"'zzzz'\. Valid keys: shards, num_steps, learning_rate, codec"),
        ({1: 2}, r"unknown recipe key '1'"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Recipe, NEEDED | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 7.5}, "num_steps must be of type int, got 7.5"),
        ({"num_steps": "7"}, "num_steps must be of type int, got '7'"),
        ({"num_steps": True}, "num_steps must be of type int, got True"),
        ({"num_steps": None}, "num_steps must be of type int, got None"),
        ({"learning_rate": True}, "learning_rate must be of type float, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float, got 'fast'"),
        ({"learning_rate": [1]}, "learning_rate must be of type float"),
        ({"compile": 1}, "compile must be of type bool, got 1"),
        ({"name": 3}, "name must be of type str, got 3"),
        ({"shards": 3}, "shards must be of type Path, got 3"),
        ({"start_from": 3}, "start_from must be of type Path, got 3"),
        ({"precision": "fp16"}, "precision must be one of bf16, fp32; got 'fp16'"),
        ({"codec": 3}, "codec must be a group of keys, got 3"),
        ({"codec": None}, "codec must be a group of keys, got None"),
        ({"codec": {"channels": 0}}, "channels must be at least 1"),
        ({"codec": {"channels": "8"}}, r"codec\.channels must be of type int"),
        ({"codec": {"patch_size": [1, 2]}}, r"codec\.patch_size must be a list of 3 values, got \[1, 2\]"),
        ({"codec": {"patch_size": 4}}, r"codec\.patch_size must be a list, got 4"),
        ({"codec": {"multipliers": [1, "2"]}}, r"codec\.multipliers\[1\] must be of type int, got '2'"),
        ({"sizes": [[1, 2], [3]]}, r"sizes\[1\] must be a list of 2 values"),
        ({"tasks": ["captioning"]}, "tasks must be a group of keys"),
        ({"tasks": {"captioning": "often"}}, r"tasks\.captioning must be of type float, got 'often'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Recipe, NEEDED | values)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"the recipe lacks the keys shards, num_steps\."):
        build(Recipe, {"name": "x"})
    with pytest.raises(ConfigError, match=r"the recipe lacks the key num_steps\."):
        build(Recipe, {"shards": "x"})


@pytest.mark.parametrize("values", [[1, 2], "text", None])
def test_a_recipe_is_a_group_of_keys(values: Any) -> None:
    with pytest.raises(ConfigError, match="the recipe must be a group of keys"):
        build(Recipe, values)


def test_overrides_take_the_place_of_values_and_are_read_as_yaml() -> None:
    values: Mapping[str, Any] = {"num_steps": 7, "codec": {"channels": 8, "patch_size": [1, 2, 2]}}
    result = apply_overrides(
        values,
        ["num_steps=11", "codec.patch_size=[2, 4, 4]", "tasks.captioning=0.5", "compile=true", "name=a=b", "x="],
    )
    assert result == {
        "num_steps": 11,
        "codec": {"channels": 8, "patch_size": [2, 4, 4]},
        "tasks": {"captioning": 0.5},
        "compile": True,
        "name": "a=b",
        "x": None,
    }
    assert values == {"num_steps": 7, "codec": {"channels": 8, "patch_size": [1, 2, 2]}}  # the argument is left alone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps", "must be key=value, got 'num_steps'"),
        ("=3", "must be key=value"),
        ("num_steps.x=3", "'num_steps' is a plain value"),
        ("sizes=[1", r"'sizes=\[1' cannot be read as YAML"),
        ("sizes={a: b: c}", "cannot be read as YAML"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"num_steps": 7}, [override])


def test_a_recipe_file_is_read_with_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("shards: some/folder\nnum_steps: 7\nlearning_rate: 1e-4\ncodec:\n  patch_size: [2, 4, 4]\n")
    recipe = build(Recipe, read_recipe(file, ["codec.channels=3", "learning_rate=2e-4"]))
    assert recipe.codec == Codec(channels=3, patch_size=(2, 4, 4))
    assert recipe.learning_rate == 2e-4


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path)
    for content, kind in (("- 1\n- 2\n", "list"), ("", "NoneType"), ("text", "str")):
        (tmp_path / "recipe.yaml").write_text(content)
        with pytest.raises(ConfigError, match=f"must be a mapping of keys to values, it is {kind}"):
            read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(shards=Path("a/b"), num_steps=7, learning_rate=1e-5, sizes=((24, 40),), tasks={"captioning": 0.1}),
        VideoTokenizerRecipe(),
        LanguageRecipe(bundle=Path("b"), shards=Path("s"), validation_shards=Path("v")),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_a_written_recipe_builds_the_same_again(recipe: Any, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", to_plain(recipe))
    assert build(type(recipe), read_recipe(tmp_path / "recipe.yaml")) == recipe


RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS = {
    "video_tokenizer": VideoTokenizerRecipe,
    "audio_tokenizer": AudioTokenizerRecipe,
    "text_tokenizer": TextTokenizerRecipe,
    "tokenizer_bundle": TokenizerBundleRecipe,
    "language": LanguageRecipe,
    "upsampler": UpsamplerRecipe,
    "lora": LoraRecipe,
}


def test_there_are_recipes_of_every_kind() -> None:
    assert {read_recipe(file)["train"] for file in RECIPES.rglob("*.yaml")} == SETTINGS.keys()


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(RECIPES)))
def test_the_shipped_recipes_can_be_built(file: Path) -> None:
    values = read_recipe(file)
    build(SETTINGS[values.pop("train")], {name: value for name, value in values.items() if name != "loop"})
    build(LoopOptions, values.get("loop", {}), "loop")
