# ruff: noqa: E501  (one row a case)
"""Tables of what a recipe may not say: mistakes, then attacks. Every row is refused before Hydra sees the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernel_pytorch.errors import ConfigError, RecipeError
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.recipe.load import catalogue, load_recipe
from kernel_pytorch.recipe.sources import RecipeSources

MISTAKES = {
    "unknown top key": ("precison: {dtype: bfloat16}", "precison: found an unknown key; allowed backend,", "did you mean 'precision'?"),
    "unknown key": ("precision: {min_feature: 3}", "precision.min_feature: found an unknown key", "did you mean 'min_features'?"),
    "unknown nested key": ("precision: {weight: {fromat: int8}}", "precision.weight.fromat: found an unknown key", "did you mean 'format'?"),
    "key below a value": ("precision: {dtype: {x: 1}}", "precision.dtype: found {'x': 1}", "allowed text or null"),
    "wrong type": ("graph: {num_warmup_calls: abc}", "graph.num_warmup_calls: found 'abc'; allowed a whole number from 1 to 1000"),
    "out of range": ("graph: {num_warmup_calls: 0}", "graph.num_warmup_calls: found 0; allowed a whole number from 1 to 1000"),
    "bad enum": ("compile: {mode: fastest}", "compile.mode: found 'fastest'; allowed default, max_autotune"),
    "bad format": ("precision: {weight: {format: int9}}", "precision.weight.format: found 'int9'", "did you mean 'int8'?"),
    "bad hardware": ("backend: {hardware: a1000}", "backend.hardware: found 'a1000'", "did you mean 'a100'?"),
    "group is not a mapping": ("precision: int8_dynamic", "precision: found 'int8_dynamic'; allowed a mapping with"),
    "group is null": ("precision:", "precision: found null; allowed a mapping with"),
    "missing value": ("precision: {dtype: '???'}", "precision.dtype: found '???'"),
    "not finite in quotes": ("verify: {max_abs: 'inf'}", "verify.max_abs: found 'inf'; allowed a number of at least 0 or null"),
    "not a mapping": ("- a\n- b", "found a sequence; allowed a mapping of keys"),
    "broken yaml": ("precision: {dtype: [", "line 1: found broken YAML"),
    "tab": ("precision:\n\tdtype: x", "line 2: found broken YAML"),
    "model": ("model: {dtype: float16}", "model: found this key", "write model=OPTION on the command line"),
    "data": ("data: {batch: 1}", "data: found this key"),
    "seed": ("seed: 3", "seed: found this key"),
    "duplicate key": ("backend: {hardware: any}\nbackend: {hardware: cpu}", "backend: found twice, again on line 2; allowed once"),
    "duplicate nested key": ("graph: {min_speedup: 2, min_speedup: 3}", "graph.min_speedup: found twice"),
    "number key": ("graph: {1: 2}", "line 1: found the key '1'; allowed keys that are text"),
    "boolean key": ("graph: {on: 2}", "line 1: found the key 'on'; allowed keys that are text"),
    "null key": ("graph: {null: 2}", "line 1: found the key 'null'; allowed keys that are text"),
    "complex key": ("? [a]\n: 1", "line 1: found the key"),
    "sexagesimal": ("graph: {num_warmup_calls: 1:30}", "graph.num_warmup_calls: found '1:30'; allowed a decimal number"),
    "octal": ("graph: {num_warmup_calls: 010}", "graph.num_warmup_calls: found '010'; allowed a decimal number"),
    "defaults not a list": ("defaults: eager", "defaults: found 'eager'; allowed a list"),
    "number in defaults": ("defaults: [3]", "defaults[0]: found 3; allowed a parent recipe, 'override /GROUP: OPTION' or _self_"),
    "list in defaults": ("defaults: [[eager]]", "defaults[0]: found ['eager']; allowed a parent recipe"),
    "group without override": ("defaults: [{precision: bf16}]", "defaults[0]: found 'precision'", "write 'override /precision: bf16'"),
    "override without slash": ("defaults: [override precision: bf16]", "defaults[0]: found 'override precision'"),
    "unknown group": ("defaults: [override /precison: bf16]", "defaults[0]: found the group 'precison'", "did you mean 'precision'?"),
    "unknown option": ("defaults: [override /precision: bf15]", "/precision: found 'bf15'; allowed bf16,", "did you mean 'bf16'?"),
    "boolean option": ("defaults: [override /graph: off]", "defaults[0]: found the boolean false (YAML reads on, off,", "allowed auto, bucketed, none"),
    "list of options": ("defaults: [override /graph: [auto, none]]", "/graph: found ['auto', 'none']; allowed auto, bucketed, none"),
    "group twice": (
        "defaults: [override /graph: auto, override /graph: none]",
        "defaults[1]: found a second 'override /graph'; allowed one a group",
    ),
    "self twice": ("defaults: [_self_, _self_]", "defaults[1]: found '_self_' twice; allowed once"),
    "two parents": ("defaults: [/recipe/eager, /recipe/cpu_int8]", "defaults[1]: found a second parent '/recipe/cpu_int8'"),
    "parent after self": ("defaults: [_self_, /recipe/eager]", "defaults[1]: found the parent '/recipe/eager' after other entries"),
    "model option": ("defaults: [override /model: bert]", "defaults[0]: found the group 'model'", "write model=OPTION on the command line"),
    "data option": ("defaults: [override /data: text]", "defaults[0]: found the group 'data'"),
    "missing parent": ("defaults: [nothing]", "defaults: parent recipe 'nothing': no such file in"),
    "missing shipped parent": ("defaults: [/recipe/cpu_int9]", "defaults: recipe: found 'cpu_int9'", "did you mean 'cpu_int8'?"),
    "shipped parent by its bare name": ("defaults: [cpu_int8]", "(the shipped one is written /recipe/cpu_int8)"),
    "own cycle": ("defaults: [bad]", "defaults: found a cycle, team/bad -> team/bad; allowed parents that end"),
    "sweep is a list": ("sweep: [a]", "sweep: found ['a']; allowed a mapping of GROUP or KEY to a list"),
    "sweep of a scalar": ("sweep: {precision: bf16}", "sweep.precision: found 'bf16'; allowed a list with at least one value"),
    "sweep of nothing": ("sweep: {precision: []}", "sweep.precision: found []; allowed a list with at least one value"),
    "sweep option": ("sweep: {precision: [bf16, fp9]}", "sweep.precision[1]: found 'fp9'; allowed bf16,"),
    "sweep boolean": ("sweep: {graph: [off]}", "sweep.graph[0]: found false; allowed auto, bucketed, none"),
    "sweep key": ("sweep: {precision.min_feature: [3]}", "sweep.precision.min_feature: found an unknown key", "'min_features'"),
    "sweep value": ("sweep: {precision.min_features: [3, x]}", "sweep.precision.min_features[1]: found 'x'; allowed a whole number"),
    "sweep nested": ("sweep: {precision.include: [[a]]}", "sweep.precision.include[0]: found ['a']; allowed one plain value"),
    "sweep model": ("sweep: {model: [bert]}", "sweep.model: found a key that a recipe does not sweep"),
    "sweep hydra": ("sweep: {hydra.run.dir: [x]}", "sweep.hydra.run.dir: found a key that a recipe does not sweep"),
    "sweep verify": ("sweep: {verify: ['off']}", "sweep.verify: found a key that a recipe does not sweep"),
    "sweep floor": ("sweep: {precision.quality.cosine_min: [0.1]}", "sweep.precision.quality.cosine_min: found a key that a recipe does not sweep"),
    "sweep target": ("sweep: {precision._target_: [os.system]}", "sweep.precision._target_: found a name of code"),
    "info": ("info: {nam: x}", "info.nam: found an unknown key", "did you mean 'name'?"),
    "info too long": (f"info: {{description: {'x' * 1001}}}", "info.description: found 'xxxx", "1000 characters"),
    "proven_on": ("info: {proven_on: [{devise: x}]}", "info.proven_on: found [{'devise': 'x'}]; allowed a list of mappings"),
}  # fmt: skip

HOSTILE = {
    "callback": ("hydra: {callbacks: {x: {_target_: pathlib.Path.touch}}}", "hydra: found this key", "hydra.callbacks.x._target_: found a name of code"),
    "launcher": ("hydra: {launcher: {_target_: x}}", "hydra: found this key"),
    "sweeper": ("hydra: {sweeper: {_target_: x}}", "hydra: found this key"),
    "logging handler": ("hydra: {job_logging: {handlers: {f: {(): os.system}}}}", "hydra: found this key"),
    "run.dir": ("hydra: {run: {dir: /tmp/x}}", "hydra: found this key"),
    "env_set": ("hydra: {job: {env_set: {LD_PRELOAD: x}}}", "hydra: found this key"),
    "env_copy": ("hydra: {job: {env_copy: [HOME]}}", "hydra: found this key"),
    "searchpath": ("hydra: {searchpath: ['file:///tmp']}", "hydra: found this key"),
    "help template": ("hydra: {help: {template: x}}", "hydra: found this key"),
    "dotted hydra": ("hydra.run.dir: /tmp", "hydra.run.dir: found an unknown key"),
    "override launcher": ("defaults: [override /hydra/launcher: joblib]", "defaults[0]: found 'override /hydra/launcher'; allowed 'override /GROUP: OPTION'"),
    "override hydra": ("defaults: [override /hydra: x]", "defaults[0]: found the group 'hydra'", "a recipe does not configure Hydra"),
    "package": ("defaults: [{/recipe/eager@hydra: x}]", "defaults[0]: found '/recipe/eager@hydra'"),
    "package of a parent": ("defaults: [/recipe/eager@hydra]", "defaults[0]: found '/recipe/eager@hydra'; allowed NAME for"),
    "package of a group": ("defaults: [override /precision@hydra: bf16]", "defaults[0]: found 'override /precision@hydra'"),
    "optional": ("defaults: [optional /precision: bf16]", "defaults[0]: found 'optional /precision'"),
    "path escape": ("defaults: [../../etc/passwd]", "defaults[0]: found '../../etc/passwd'; allowed NAME for"),
    "absolute path": ("defaults: [/etc/passwd]", "defaults[0]: found '/etc/passwd'"),
    "parent by suffix": ("defaults: [eager.yaml]", "defaults[0]: found 'eager.yaml'"),
    "interpolated parent": ("defaults: ['${oc.env:HOME}']", "defaults[0]: found '${oc.env:HOME}'; allowed plain values"),
    "interpolated option": ("defaults: [{override /precision: '${x}'}]", "defaults[0].override /precision: found '${x}'"),
    "package header": ("# @package hydra\nbackend: {hardware: cpu}", "line 1: found the header '# @package hydra'; allowed '# @package _global_'"),
    "late header": ("# @package _global_\n#@package hydra.run", "line 2: found the header '#@package hydra.run'"),
    "target": ("precision: {_target_: os.system}", "precision._target_: found a name of code; allowed no _target_"),
    "allowed target": ("precision: {_target_: kernel_pytorch.precision.cast.Cast}", "precision._target_: found a name of code"),
    "top target": ("_target_: os.system", "_target_: found a name of code"),
    "deep target": ("precision: {weight: {a: {_target_: x}}}", "precision.weight.a._target_: found a name of code"),
    "target in a list": ("info: {proven_on: [{_target_: x}]}", "info.proven_on[0]._target_: found a name of code"),
    "partial": ("precision: {_partial_: true}", "precision._partial_: found a name of code"),
    "args": ("precision: {_args_: [1]}", "precision._args_: found a name of code"),
    "recursive": ("precision: {_recursive_: true}", "precision._recursive_: found a name of code"),
    "convert": ("precision: {_convert_: all}", "precision._convert_: found a name of code"),
    "env": ("info: {name: '${oc.env:HOME}'}", "info.name: found '${oc.env:HOME}'; allowed plain values"),
    "decode": ("info: {name: '${oc.decode:1}'}", "info.name: found '${oc.decode:1}'"),
    "create": ("info: {name: '${oc.create:{a: 1}}'}", "info.name: found '${oc.create:{a: 1}}'"),
    "hydra resolver": ("info: {name: '${hydra:runtime.cwd}'}", "info.name: found '${hydra:runtime.cwd}'"),
    "custom resolver": ("precision: {dtype: '${mine:}'}", "precision.dtype: found '${mine:}'"),
    "escaped interpolation": ('info: {name: "\\x24{oc.env:HOME}"}', "info.name: found '${oc.env:HOME}'"),
    "interpolated key": ("info: {'${x}': 1}", "line 1: found the key '${x}'; allowed no interpolations"),
    "escape code in a key": ('info: {"\\e[31m": {x: "${x}"}}', "line 1: found the control character U+001B in a key"),
    "two lines in a key": ('info: {"a\\nb": 1}', "line 1: found the control character U+000A in a key"),
    "long key": (f"info: {{{'k' * 101}: 1}}", "line 1: found a key of 101 characters; allowed at most 100"),
    "interpolated sweep": ("sweep: {precision: ['${x}']}", "sweep.precision[0]: found '${x}'"),
    "anchor": ("info: {name: &a x}", "line 1: found an anchor (&)"),
    "alias": ("info: {name: *a}", "line 1: found an alias (*)"),
    "merge key": ("precision: {<<: {dtype: float16}}", "line 1: found a merge key (<<); allowed keys that are text"),
    "bomb": ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b]", "line 1: found an anchor (&)"),
    "python tag": ("info: !!python/object/apply:os.system ['id']", "line 1: found a tag (!)"),
    "plain tag": ("info: {name: !!str 3}", "line 1: found a tag (!)"),
    "binary": ("info: {name: !!binary aGk=}", "line 1: found a tag (!)"),
    "directive": ("%YAML 1.1\n---\ninfo: {}", "line 1: found a directive (%)"),
    "two documents": ("info: {}\n---\nhydra: {}", "line 2: found a second document; allowed one"),
    "deep flow": (f"info: {{name: {'[' * 400}{']' * 400}}}", "line 1: found more than 8 levels; allowed at most 8"),
    "deep mapping": (f"info: {'{a: ' * 300}1{'}' * 300}", "line 1: found more than 8 levels"),
    "very deep flow": (f"info: {'[' * 3000}", "found 3000 opening brackets; allowed at most 512"),
    "deep block": ("\n".join(f"{' ' * depth}a:" for depth in range(200)), "line 9: found more than 8 levels"),
    "deep dashes": (f"info:\n  {'- ' * 9000}x", "line 2: found more than 8 levels"),
    "deep questions": (f"{'? ' * 9000}x", "line 1: found more than 8 levels"),
    "5000 digits": (f"graph: {{num_warmup_calls: {'9' * 5000}}}", "graph.num_warmup_calls: found a number of more than 18 digits; allowed at most 18"),
    "5000 digits after the point": (f"verify: {{max_abs: 0.{'9' * 5000}}}", "verify.max_abs: found a number of more than 18 digits"),
    "hexadecimal": ("graph: {num_warmup_calls: 0xFF}", "graph.num_warmup_calls: found '0xFF'; allowed a decimal number"),
    "nan": ("verify: {max_abs: .nan}", "verify.max_abs: found '.nan'; allowed a decimal number"),
    "inf": ("verify: {max_abs: -.inf}", "verify.max_abs: found '-.inf'; allowed a decimal number"),
    "overflow": ("verify: {max_abs: 1.0e+999}", "verify.max_abs: found '1.0e+999'; allowed a decimal number"),
    "nul": ("info: {name: \0}", "line 1: found the control character U+0000"),
    "escape code": ("info: {name: '\x1b[31m'}", "line 1: found the control character U+001B; allowed printable text"),
    "escaped escape code": ('info: {name: "\\e[31m"}', "info.name: found the control character U+001B"),
    "escape code in a comment": ("# \x1b[2J\ninfo: {}", "line 1: found the control character U+001B"),
    "right to left": ("info: {name: '\u202ex'}", "line 1: found the control character U+202E"),
    "next line": ("info: {name: '\x85x'}", "line 1: found the control character U+0085"),
    "line separator": ("info: {name: '\u2028x'}", "line 1: found the control character U+2028"),
    "carriage return": ("info: {name: 'a\rb'}", "line 1: found the control character U+000D"),
    "not utf-8": (b"info: {name: \xff}", "found bytes that are not UTF-8 at offset 13; allowed UTF-8 text"),
    "utf-16": ("info: {}".encode("utf-16"), "found bytes that are not UTF-8 at offset 0"),
    "byte order mark": (b"\xef\xbb\xbfinfo: {}", "found a byte order mark; allowed UTF-8 without one"),
    "huge": (b"#" * (64 * 1024 + 1), "found 65,537 bytes; allowed at most 65,536"),
    "verify off": ("defaults: [override /verify: off]", "defaults[0]: found 'override /verify: off'; allowed default, strict"),
    "verify 'off'": ("defaults: [override /verify: 'off']", "defaults[0]: found 'override /verify: off'"),
    "measure off": ("defaults: [override /measure: off]", "defaults[0]: found 'override /measure: off'"),
}  # fmt: skip


def refusal(path: Path, sources: RecipeSources) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("team/bad", sources)
    assert all("\n" not in line and "\x1b" not in line for line in caught.value.lines)
    assert all(line.startswith(f"{path}: ") for line in caught.value.lines)
    return [line.removeprefix(f"{path}: ") for line in caught.value.lines]


@pytest.mark.parametrize("case", [*MISTAKES, *HOSTILE])
def test_refused(case: str, write, sources: RecipeSources) -> None:
    text, *expected = {**MISTAKES, **HOSTILE}[case]
    lines = refusal(write("bad", text), sources)
    assert all(any(part in line for line in lines) for part in expected), lines


@pytest.mark.parametrize("case", list(HOSTILE))
def test_refused_before_hydra_composes(case: str, write, sources: RecipeSources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("bad", HOSTILE[case][0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"bad\.yaml: "):
        compose(["+recipe=team/bad"], sources)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.yaml", "team"]


def test_all_mistakes_of_one_file_at_once(write, sources: RecipeSources) -> None:
    path = write(
        "bad",
        "defaults: [override /precision: bf15, override /graph: off]\nmodel: {}\nprecison: {}\ngraph: {num_warmup_calls: 0}\n"
        "precision: {_target_: x, weight: {fromat: int8}}\nsweep: {compile: [fast]}\n",
    )
    lines = refusal(path, sources)
    assert [line.split(": found")[0] for line in lines] == [
        "defaults[0]: /precision",
        "defaults[1]",
        "precision._target_",
        "model",
        "precison",
        "sweep.compile[0]",
        "graph.num_warmup_calls",
        "precision.weight.fromat",
    ]


def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path, sources: RecipeSources) -> None:
    (tmp_path / "secret.yaml").write_text("info: {}")
    (folder / "bad.yaml").symlink_to(tmp_path / "secret.yaml")
    assert refusal(folder / "bad.yaml", sources) == [
        f"found a link out of its folder, to {str(tmp_path / 'secret.yaml')!r}; allowed a file inside it"
    ]


def test_a_link_inside_the_folder_is_a_recipe(folder: Path, write, sources: RecipeSources) -> None:
    write("real", "info: {name: real}")
    (folder / "good.yaml").symlink_to(folder / "real.yaml")
    assert load_recipe("team/good", sources).config.info.name == "real"


def test_a_link_to_itself(folder: Path, sources: RecipeSources) -> None:
    (folder / "bad.yaml").symlink_to(folder / "bad.yaml")
    assert refusal(folder / "bad.yaml", sources)[0].startswith("cannot be read: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are POSIX")
def test_a_fifo_is_refused_without_waiting(folder: Path, sources: RecipeSources) -> None:
    os.mkfifo(folder / "bad.yaml")
    assert refusal(folder / "bad.yaml", sources) == ["found something that is not a regular file; allowed a YAML file"]


def test_one_bad_file_does_not_break_the_list(folder: Path, write, sources: RecipeSources) -> None:
    write("good", "info: {description: fine}")
    write("bad", "hydra: {}")
    write("true", "info: {}")
    write("ctrl\x1b", "info: {}")
    (folder / "folder.yaml").mkdir()
    entries = {entry.name: entry for entry in catalogue(sources) if entry.name.startswith("team/")}
    assert list(entries) == ["team/bad", "team/ctrl\x1b", "team/good", "team/true"]
    assert entries["team/good"].recipe.description == "fine"
    assert [name for name, entry in entries.items() if entry.errors] == ["team/bad", "team/ctrl\x1b", "team/true"]
    assert not [line for entry in entries.values() for line in entry.errors if "\x1b" in line]
    assert "file name: found 'true', which YAML and Hydra read as a value" in entries["team/true"].errors[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "---\ninfo: {name: x}\n",
        "info: {name: 'a: [b, {c}] # d'}\r\n",
        "info: {name: \"tab\\there\", description: 'Zürich 7 µs'}",
        "info: {proven_on: [{device: H100, date: 2026-11-22, ratio_to_eager: 2}]}",
        "defaults:\n  - /recipe/cpu_int8\n  - override /precision: bf16\n",
        "defaults: [_self_, override /precision: bf16]",
        "precision: {include: ['*.layer.*'], min_features: 1_000}\ndefaults: [override /precision: int8_dynamic]",
        "sweep: {precision: [bf16, none], compile.mode: [default], graph.min_speedup: [1, 1.5]}",
    ],
)
def test_accepted(text: str, write, sources: RecipeSources) -> None:
    write("good", text)
    recipe = load_recipe("team/good", sources)
    assert compose(["+recipe=team/good"], sources).config == recipe.config
