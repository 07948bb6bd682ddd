"""Targets and their arguments: where they are looked up, and what is told when they are wrong."""

from __future__ import annotations

import builtins
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.config import component
from runtime.config.component import ComponentError, add_code_folder, build, check, check_arguments, locate
from runtime.errors import DataError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules into a code folder that is on ``sys.path`` as a run would have it; forgotten after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "code"
    folder.mkdir()
    add_code_folder(folder)
    written: set[str] = set()

    def write(name: str, text: str, *, into: Path = folder) -> Path:
        path = into / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.add(name.partition(".")[0])
        importlib.invalidate_caches()
        return path

    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] in written - sys.stdlib_module_names:
            del sys.modules[name]


def refusal(target: str, **options: Any) -> str:
    with pytest.raises(ComponentError) as caught:
        locate(target, **options)
    return caught.value.what


# Looking up


def test_a_short_name_is_looked_up_in_the_namespaces_in_their_order(write: Write) -> None:
    write("spare_first", "Both = 'first'")
    write("spare_second", "Both = 'second'\nOne = 'second'")
    both = ("spare_first", "spare_second")
    assert locate("Both", namespaces=both) == "first"
    assert locate("Both", namespaces=both[::-1]) == "second"
    assert locate("One", namespaces=both) == "second"


def test_a_short_name_never_comes_from_the_code_folder_and_a_full_target_never_from_a_namespace(write: Write) -> None:
    write("spare_own", "Own = 1")
    write("spare_space", "Name = 1")
    assert "no 'Own' in spare_space" in refusal("Own", namespaces=("spare_space",), code=Path())
    assert "cannot import 'Name'" in refusal("Name:Name", namespaces=("spare_space",))


def test_a_misspelt_short_name_is_told_with_the_one_that_was_meant() -> None:
    what = refusal("AdanW", namespaces=("runtime.objective", "torch.optim"))
    assert what == "no 'AdanW' in runtime.objective or torch.optim; did you mean 'AdamW'?"


def test_a_full_target_reaches_into_packages_and_classes(write: Write) -> None:
    write("spare_package.inner", "class Outer:\n    class Inner:\n        pass\n")
    assert locate("spare_package.inner:Outer.Inner").__qualname__ == "Outer.Inner"
    assert locate("math:sqrt") is math.sqrt


def test_main_is_a_module_like_any_other(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = type("Made", (), {})
    monkeypatch.setattr(sys.modules["__main__"], "Made", made, raising=False)
    assert locate("__main__:Made", code=tmp_path / "code") is made
    assert "has no 'Mode'; did you mean 'Made'?" in refusal("__main__:Mode", code=tmp_path / "code")


def test_main_is_the_running_program_whatever_the_code_folder_holds(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = type("Made", (), {})
    monkeypatch.setattr(sys.modules["__main__"], "Made", made, raising=False)
    (tmp_path / "code" / "__main__.py").write_text("raise SystemExit('this is another program')")
    assert locate("__main__:Made", code=tmp_path / "code") is made


def test_the_code_folder_is_appended_once_and_shadows_nothing(write: Write, tmp_path: Path) -> None:
    path = write("colorsys", "raise AssertionError('this is not the standard library')")
    before = list(sys.path)
    assert before[-1] == str(path.parent)
    add_code_folder(path.parent)
    assert sys.path == before
    add_code_folder(tmp_path)
    assert sys.path == [*before, str(tmp_path)]
    sys.modules.pop("colorsys", None)
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0, 0, 0)


@pytest.mark.parametrize("name", ["colorsys", "wsgiref.util", "yaml"])
def test_a_module_that_is_both_installed_and_in_the_code_folder_is_refused_naming_both(write: Write, name: str) -> None:
    own = write(name, "Own = 1")
    if "." in name:
        own = write("wsgiref.__init__", "")
    package = name.partition(".")[0]
    what = refusal(f"{name}:Own", code=own.parents[name.count(".")])
    assert repr(package) in what
    assert str(own) in what
    assert str(importlib.import_module(package).__file__) in what


def test_a_module_that_is_both_built_in_and_in_the_code_folder_is_refused_naming_both(write: Write) -> None:
    own = write("time", "Own = 1")
    what = refusal("time:Own", code=own.parent)
    assert str(own) in what
    assert "built-in" in what


def test_a_module_of_the_code_folder_is_not_ambiguous_with_itself(write: Write, tmp_path: Path) -> None:
    folder = write("spare_alone", "Own = 1").parent
    link = tmp_path / "link"
    link.symlink_to(folder)
    for code in (folder, folder, link, folder / ".." / folder.name):
        assert locate("spare_alone:Own", code=code) == 1


def test_modules_of_one_name_in_two_code_folders_are_refused_rather_than_confused(write: Write, tmp_path: Path) -> None:
    first = write("spare_twin", "Own = 1")
    assert locate("spare_twin:Own", code=first.parent) == 1
    second = write("spare_twin", "Own = 2", into=tmp_path / "other")
    add_code_folder(second.parent)
    what = refusal("spare_twin:Own", code=second.parent)
    assert str(first) in what
    assert str(second) in what


# What cannot be imported


@pytest.mark.parametrize("target", ["nowhere:Name", "nowhere.inner:Name", "math.inner:Name"])
def test_a_module_that_is_not_there_is_named_with_where_it_was_looked_for(target: str) -> None:
    what = refusal(target)
    assert f"cannot import {target.partition(':')[0]!r}" in what
    assert "installed packages" in what
    assert "'code'" in what


def test_a_module_that_needs_a_missing_package_names_that_package(write: Write) -> None:
    write("spare_needy", "import spare_missing\nclass Name: pass\n")
    assert refusal("spare_needy:Name") == (
        "'spare_needy:Name' needs the package 'spare_missing', which is not installed"
    )


@pytest.mark.parametrize("target", [":Name", "math:", ":", "Name"])
def test_a_target_of_another_form_is_refused_with_the_form(target: str) -> None:
    assert refusal(target) == f"{target!r} is not of the form 'package.module:Name'"


def test_a_dotted_target_is_what_the_same_target_with_a_colon_is(write: Write) -> None:
    write("spare_package.inner", "class Outer:\n    class Inner:\n        pass\n")
    for dotted in ("math.sqrt", "spare_package.inner.Outer", "spare_package.inner.Outer.Inner", "torch.optim.Adam"):
        module = next(m for m in ("math", "spare_package.inner", "torch.optim") if dotted.startswith(m))
        assert locate(dotted) is locate(f"{module}:{dotted.removeprefix(module + '.')}")


def test_a_dotted_target_that_names_nothing_is_told_as_the_same_target_with_a_colon_is(write: Write) -> None:
    write("spare_package.broken", "raise ValueError('this module is broken')")
    assert refusal("math.sqr") == "module 'math' has no 'sqr'; did you mean 'sqrt'?"
    assert refusal("torch.optim.AdamV") == refusal("torch.optim:AdamV")
    assert "cannot import 'nowhere'" in refusal("nowhere.inner.Name")
    assert "this module is broken" in refusal("spare_package.broken.Name")


def test_a_dotted_target_that_two_places_have_is_refused(write: Write) -> None:
    own = write("colorsys", "Own = 1")
    assert "both an installed package" in refusal("colorsys.Own", code=own.parent)


@pytest.mark.parametrize("target", [".relative:Name", "..:Name", "a b:Name", "math:sqrt()", "os:system('x')", "math:."])
def test_a_target_is_never_evaluated(target: str) -> None:
    assert refusal(target)


def test_a_misspelt_attribute_is_told_with_the_one_that_was_meant_but_no_private_one(write: Write) -> None:
    write("spare_names", "class Encoder: pass\nclass _Decoder: pass\n")
    assert refusal("spare_names:Encoded") == "module 'spare_names' has no 'Encoded'; did you mean 'Encoder'?"
    assert "did you mean" not in refusal("spare_names:_Decode")


def test_an_error_on_import_is_told_with_its_line(write: Write) -> None:
    path = write("spare_raising", "x = 1\ndef f():\n    raise ValueError('no such thing')\nf()\n")
    what = refusal("spare_raising:Name")
    assert "ValueError: no such thing" in what
    assert f"{path}:3" in what


def test_an_error_that_a_library_raises_on_import_is_told_with_the_users_own_line(write: Write) -> None:
    path = write("spare_calling", "import json\n\nx = json.loads('[')\n")
    what = refusal("spare_calling:Name")
    assert "JSONDecodeError" in what
    assert f"{path}:3" in what


def test_a_syntax_error_is_told_with_its_line(write: Write) -> None:
    path = write("spare_syntax", "x = 1\ny = (\n")
    what = refusal("spare_syntax:Name")
    assert "SyntaxError" in what
    assert f"{path}:2" in what


def test_a_script_that_ends_its_process_on_import_does_not_end_ours(write: Write) -> None:
    path = write("spare_script", "import sys\n\nsys.exit(0)\n")
    what = refusal("spare_script:Name")
    assert "SystemExit" in what
    assert f"{path}:3" in what


def test_an_attribute_that_fails_when_it_is_looked_up_is_told(write: Write) -> None:
    write("spare_lazy", "def __getattr__(name):\n    raise ImportError(f'{name} needs a package')\n")
    assert "Name needs a package" in refusal("spare_lazy:Name")


# Arguments


class Optimizer:
    def __init__(self, params: Any, lr: float, *, betas: Any = None, weight_decay: float = 0.0) -> None:
        self.given = (params, lr, betas, weight_decay)


def wants_all(first: int, second: int, *, third: int) -> tuple[int, int, int]:
    return first, second, third


def takes_any(first: int, **others: int) -> dict[str, int]:
    return {"first": first, **others}


def positional_only(first: int, second: int = 0, /, third: int = 0) -> int:
    return first + second + third


def told(component: Any, args: Any, **options: Any) -> list[tuple[str, str]]:
    return [(".".join(m.path), m.what) for m in check_arguments(component, args, **options)]


def test_an_argument_that_a_class_lacks_is_told_with_the_one_that_was_meant() -> None:
    found = check("AdamW", {"lr": 0.1, "beta": [0.9, 0.99]}, namespaces=("torch.optim",), positional=1)
    assert [(m.path, m.what) for m in found] == [
        (
            ("args", "beta"),
            "AdamW has no argument 'beta'; did you mean 'betas'? (its arguments: lr, betas, eps, weight_decay, amsgrad, "
            "maximize, foreach, capturable, differentiable, fused)",
        )
    ]


def test_every_unknown_missing_and_reserved_argument_is_told() -> None:
    assert told(Optimizer, {"params": 1, "beta": 2, "zzz": 3}, positional=1) == [
        ("args.params", "Optimizer gets its 'params' from the runtime; leave it out"),
        (
            "args.beta",
            "Optimizer has no argument 'beta'; did you mean 'betas'? (its arguments: lr, betas, weight_decay)",
        ),
        ("args.zzz", "Optimizer has no argument 'zzz' (its arguments: lr, betas, weight_decay)"),
        ("args", "Optimizer needs the argument 'lr'"),
    ]
    assert told(wants_all, {"second": 1}) == [("args", "wants_all needs the arguments 'first', 'third'")]


def test_arguments_that_fit_are_taken() -> None:
    assert told(Optimizer, {"lr": 1, "weight_decay": 0.1}, positional=1) == []
    assert told(wants_all, {"first": 1, "second": 2, "third": 3}) == []
    assert told(takes_any, {"anything": 1}, positional=1) == []
    assert told(partial(wants_all, third=3), {"first": 1, "second": 2}) == []
    assert told(dict, {"anything": 1}) == []  # a builtin without a signature: its own error must do


def test_a_positional_only_argument_cannot_be_given_by_name() -> None:
    assert told(positional_only, {"third": 1}, positional=2) == []
    assert told(positional_only, {"second": 1}, positional=2) == [
        ("args.second", "positional_only gets its 'second' from the runtime; leave it out")
    ]


def test_an_argument_that_the_runtime_fills_in_is_not_missing_and_may_be_given() -> None:
    for args in ({}, {"T_max": 5}):
        assert (
            check(
                "CosineAnnealingLR",
                args,
                namespaces=("torch.optim.lr_scheduler",),
                positional=1,
                filled_in=("T_max",),
            )
            == []
        )
    (missing,) = check("CosineAnnealingLR", {}, namespaces=("torch.optim.lr_scheduler",), positional=1)
    assert "'T_max'" in missing.what


def typed(size: int, rate: float | None = None, *, on: bool = True, name: str = "", free=0) -> None:  # type: ignore[no-untyped-def]
    """Takes numbers, and some text."""


def test_text_where_an_annotation_allows_numbers_alone_is_refused() -> None:
    assert told(typed, {"size": "64 units", "rate": "1e-3x", "on": "yes", "name": "x", "free": "x"}) == [
        ("args.size", "typed takes int for 'size', not the text '64 units'"),
        ("args.rate", "typed takes float | None for 'rate', not the text '1e-3x'"),
        ("args.on", "typed takes bool for 'on', not the text 'yes'"),
    ]
    (found,) = check("AdamW", {"lr": "fast"}, namespaces=("torch.optim",), positional=1)
    assert "for 'lr', not the text 'fast'" in found.what


def test_an_argument_that_is_not_called_by_text_is_refused() -> None:
    assert told(takes_any, {"first": 1, 2: 3}) == [("args.2", "argument names of takes_any must be text, not 2")]


# Our own parameters' names, and Python's
OF_OURS = ["name", "component", "target", "args", "given", "arguments", "namespaces", "code", "positional", "filled_in",
           "extra", "key", "loaded", "section", "path", "params", "value", "error", "cls", "mcs", "kwargs"]  # fmt: skip


@pytest.mark.parametrize("name", OF_OURS)
def test_an_argument_may_be_called_as_any_parameter_of_ours_is(write: Write, name: str) -> None:
    write("spare_named", f"def load({name}, **others):\n    return {name}, others\n")
    assert check("spare_named:load", {name: "mrpc"}) == []
    assert build("spare_named:load", {name: "mrpc", "component": 2, "self": 3} | {name: "mrpc"})[0] == "mrpc"
    nested = {"inner": {"target": "spare_named:load", "args": {name: 1}}}
    assert check("spare_named:load", {name: 0, **nested}) == []
    assert build("spare_named:load", {name: 0, **nested})[1]["inner"][0] == 1


def test_an_argument_called_self_is_an_error_of_the_users_and_no_traceback(write: Write) -> None:
    write("spare_any", "class Any:\n    def __init__(self, **others):\n        self.others = others\n")
    assert "multiple values for argument 'self'" in failure("spare_any:Any", {"self": 1}).what


@pytest.mark.parametrize(
    "data",
    [
        {"target": "price"},
        {"target": "price.usd"},
        {"target": "time:0"},
        {"target": "12:30"},
        {"target": "http://somewhere/x"},
        {"target": ":"},
        {"target": "score", "args": [1, 2]},
        {"target": "score", "args": {"a": 1}},
        {"target": ["a", "b"]},
        {"args": {"a": 1}},
        {"target": "spare:x", "args": [1]},
        {1: "one", "target": "spare:x"},
    ],
    ids=str,
)
def test_a_mapping_of_the_users_own_that_has_a_key_target_stays_what_it_is(data: dict[Any, Any]) -> None:
    assert check("builtins:dict", {"columns": data}) == []
    assert build("builtins:dict", {"columns": data}) == {"columns": data}


def test_a_mapping_that_is_taken_for_a_component_and_names_nothing_says_so() -> None:
    (found,) = check("builtins:dict", {"columns": {"target": "price:usd"}})
    assert "cannot import 'price'" in found.what
    assert "a mapping of 'target' and 'args' is a component to be built" in found.what


def test_a_nested_component_may_be_written_with_dots(write: Write) -> None:
    write("spare_parts", PARTS)
    for nested in ({"target": "spare_parts.Inner", "args": {"size": 3}}, {"target": "spare_parts.Inner"}):
        assert check("spare_parts:Outer", {"one": nested}) == []
        assert build("spare_parts:Outer", {"one": nested}).parts["one"].size == nested.get("args", {}).get("size", 1)  # type: ignore[attr-defined]


def test_a_target_that_cannot_be_called_is_refused() -> None:
    (found,) = check("math:pi", {})
    assert (found.path, found.what) == (("target",), "'math:pi' is not callable")


# Nested components

PARTS = """\
made = []

class Inner:
    def __init__(self, size: int = 1):
        self.size = size
        made.append(size)

class Needy:
    def __init__(self, size):
        self.size = size

class Outer:
    def __init__(self, **parts):
        self.parts = parts

def double(value=0):
    return 2 * value
"""


def test_nested_components_are_built_and_functions_handed_on_as_they_are(write: Write) -> None:
    write("spare_parts", PARTS)
    built = build(
        "spare_parts:Outer",
        {
            "instance": {"target": "spare_parts:Inner", "args": {"size": 3}},
            "by_default": {"target": "spare_parts:Inner"},
            "function": {"target": "spare_parts:double"},
            "result": {"target": "spare_parts:double", "args": {"value": 4}},
            "called": {"target": "spare_parts:double", "args": {}},
            "empty": {"target": "spare_parts:double", "args": None},
            "deep": {"list": [1, [{"target": "spare_parts:Inner", "args": {"size": 5}}]]},
            "within": {"target": "spare_parts:Outer", "args": {"one": {"target": "math:sqrt"}}},
            "short": {"target": "AdamW"},
            "data": {"target": "spare_parts:Inner", "note": 1},
            "text": "spare_parts:Inner",
            "number": {"target": 3},
        },
    ).parts
    assert built["instance"].size == 3
    assert built["by_default"].size == 1
    assert built["function"] is locate("spare_parts:double")
    assert (built["result"], built["called"], built["empty"]) == (8, 0, 0)
    assert built["deep"]["list"][0] == 1
    assert built["deep"]["list"][1][0].size == 5
    assert built["within"].parts["one"] is math.sqrt
    # What is no component stays what it is
    assert built["short"] == {"target": "AdamW"}
    assert built["data"] == {"target": "spare_parts:Inner", "note": 1}
    assert built["text"] == "spare_parts:Inner"
    assert built["number"] == {"target": 3}


def test_checking_finds_every_mistake_of_nested_components_and_calls_nothing(write: Write) -> None:
    write("spare_parts", PARTS)
    args = {
        "right": {"target": "spare_parts:Inner", "args": {"size": 3}},
        "name": {"target": "spare_parts:Innr", "args": {}},
        "function": {"target": "spare_parts:doubl"},
        "list": [0, {"target": "spare_parts:Inner", "args": {"sise": 3}}],
        "within": {"target": "spare_parts:Outer", "args": {"one": {"target": "spare_parts:Needy", "args": {}}}},
        "class": {"target": "spare_parts:Needy"},
    }
    found = {".".join(m.path): m.what for m in check("spare_parts:Outer", args)}
    assert locate("spare_parts:made") == []
    assert found == {
        "args.name.target": "module 'spare_parts' has no 'Innr'; did you mean 'Inner'?",
        "args.function.target": "module 'spare_parts' has no 'doubl'; did you mean 'double'?",
        "args.list.1.args.sise": "Inner has no argument 'sise'; did you mean 'size'? (its arguments: size)",
        "args.within.args.one.args": "Needy needs the argument 'size'",
        "args.class.args": "Needy needs the argument 'size'",
    }


def test_building_leaves_the_configured_arguments_alone(write: Write) -> None:
    write("spare_parts", PARTS)
    args = {"one": {"target": "spare_parts:Inner", "args": {"size": 3}}, "list": [{"target": "spare_parts:double"}]}
    before = repr(args)
    build("spare_parts:Outer", args)
    assert repr(args) == before


# Constructors that raise


def failure(target: str, args: dict[str, Any], *given: Any) -> ComponentError:
    with pytest.raises(ComponentError) as caught:
        build(target, args, *given)
    return caught.value


def test_what_the_runtime_gives_comes_before_the_configured_arguments(write: Write) -> None:
    write("spare_given", "class Given:\n    def __init__(self, params, lr):\n        self.all = (params, lr)\n")
    assert build("spare_given:Given", {"lr": 0.5}, [1, 2]).all == ([1, 2], 0.5)


def test_a_constructor_that_raises_is_told_with_its_line(write: Write) -> None:
    path = write("spare_broken", "class Broken:\n    def __init__(self):\n        raise ValueError('no width')\n")
    error = failure("spare_broken:Broken", {})
    assert error.what == f"spare_broken:Broken raised ValueError: no width (at {path}:3)"
    assert isinstance(error.__cause__, ValueError)


def test_an_error_that_a_library_raises_is_told_with_the_users_own_line(write: Write) -> None:
    path = write(
        "spare_net",
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "        self.layer = nn.Linear(8, width)\n",
    )
    error = failure("spare_net:Net", {"width": "x"})
    assert "TypeError" in error.what
    assert f"{path}:6" in error.what


def test_a_nested_constructor_that_raises_is_told_by_its_own_name_and_line(write: Write) -> None:
    path = write("spare_broken", "class Broken:\n    def __init__(self):\n        raise ValueError('no width')\n")
    write("spare_parts", PARTS)
    for nested in ({"target": "spare_broken:Broken", "args": {}}, {"target": "spare_broken:Broken"}):
        error = failure("spare_parts:Outer", {"inner": [nested]})
        assert error.what == f"spare_broken:Broken raised ValueError: no width (at {path}:3)"
        assert error.path[:3] == ("args", "inner", "0")


def test_errors_of_our_own_pass_through_as_they_are() -> None:
    def refuse() -> None:
        raise DataError("no data")

    with pytest.raises(DataError, match="no data"):
        component.call(refuse, "refuse")


def test_no_component_is_found_among_the_builtins_by_a_short_name() -> None:
    assert hasattr(builtins, "dict")
    assert "no 'dict' in torch.optim" in refusal("dict", namespaces=("torch.optim",))
