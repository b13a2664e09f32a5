"""Commands of other packages, found as installed packages are: by an entry point in a folder of the path."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from poet.cli.main import main

DATA = Path(__file__).parents[1] / "data"
MODULES = {
    "plugin_working": """
from poet.errors import ConfigError

def greet(name: str, loud: bool = False) -> None:
    "Greet somebody."
    if name == "nobody":
        raise ConfigError("name must be somebody's.")
    print(name.upper() if loud else name)
""",
    "plugin_without_its_package": "import no_such_package",
    "plugin_with_a_defect": "1 / 0",
    "plugin_that_is_slow": "import time; time.sleep(3600)",
}
ENTRY_POINTS = """
[poet.commands]
greet = plugin_working:greet
renamed = plugin_working:no_such_function
incomplete = plugin_without_its_package:main
defect = plugin_with_a_defect:main
slow = plugin_that_is_slow:main
info = plugin_that_is_slow:main
"""


@pytest.fixture(autouse=True)
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    description = tmp_path / "poet_plugins-1.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: poet-plugins\nVersion: 1.0\n")
    (description / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_lists_plugins_and_loads_none(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for name in ("greet", "renamed", "incomplete", "defect", "slow"):
        assert f"\n  {name} " in out
    assert sys.modules.keys().isdisjoint(MODULES)


def test_poets_own_commands_load_no_plugin_not_even_one_of_their_name(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = call("info", str(next(DATA.glob("*.mp4"))))
    assert code == 0
    assert "picture:" in out
    assert sys.modules.keys().isdisjoint(MODULES)


def test_a_plugin_takes_its_own_arguments_and_loads_no_other(call: Callable[..., tuple[int, str, str]]) -> None:
    assert call("greet", "Ada", "--loud") == (0, "ADA\n", "")
    assert call("greet", "--", "--loud") == (0, "--loud\n", "")
    assert sys.modules.keys() & MODULES.keys() == {"plugin_working"}


def test_a_plugin_shows_its_own_help_and_usage(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("greet", "--help")
    assert code == 0
    assert "Usage: poet greet [OPTIONS] " in out
    assert "Greet somebody." in out
    assert "--loud" in out
    code, _, err = call("greet", "Ada", "--quiet")
    assert code == 2
    assert "--quiet" in err


def test_an_error_of_poet_in_a_plugin_is_one_line_and_exit_code_one(call: Callable[..., tuple[int, str, str]]) -> None:
    assert call("greet", "nobody") == (1, "", "poet: name must be somebody's.\n")


@pytest.mark.parametrize(
    ("name", "reason"), [("incomplete", "No module named 'no_such_package'"), ("renamed", "'no_such_function'")]
)
@pytest.mark.parametrize("option", [[], ["--help"]])
def test_a_plugin_that_cannot_be_loaded_is_named_with_the_reason(
    call: Callable[..., tuple[int, str, str]], name: str, reason: str, option: list[str]
) -> None:
    code, out, err = call(name, *option)
    assert (code, out) == (1, "")
    assert f"'{name}'" in err
    assert reason in err
    assert err.count("\n") == 1


def test_a_defect_of_a_plugin_is_not_hidden(call: Callable[..., tuple[int, str, str]]) -> None:
    with pytest.raises(ZeroDivisionError):
        call("defect")


def test_an_ignored_plugin_is_named_once_by_the_help_and_by_its_namesake_and_by_nothing_else(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    for arguments in (["--help"], [], ["info", str(next(DATA.glob("*.mp4")))], ["info", "--help"]):
        _, out, err = call(*arguments)
        told = [line for line in err.splitlines() if "is ignored" in line]
        assert len(told) == 1, (arguments, err)
        assert "plugin_that_is_slow:main" in told[0]
        assert "'info'" in told[0]
        assert "ignored" not in out
    for arguments in (["encode", "--help"], ["greet", "Ada"], ["--version"]):
        assert call(*arguments)[2] == ""
