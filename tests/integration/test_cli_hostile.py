"""Hostile input: what a stranger's recipe or a pasted command line may try. Each is refused with exit 2, nothing is written,
nothing runs: a canary beside the recipe stays as it is, and none of the files that an attack would make is there.

The attacks are those that were seen to succeed against plain Hydra.
"""

from __future__ import annotations

import os

import pytest

CANARY = "untouched\n"
TOUCH = "{_target_: pathlib.Path.touch, _args_: [PWNED]}"
SHELL = "{_target_: os.system, command: touch PWNED}"

# name -> (text of recipe bad.yaml, number of mistakes). PWNED is replaced by a path in the temporary folder.
RECIPES: dict[str, tuple[str | bytes, int]] = {
    # Hydra's own settings: callbacks run before a task does, logging and run.dir write anywhere.
    "callback": (f"hydra: {{callbacks: {{x: {TOUCH}}}}}\n", 3),
    "job logging handler": ("hydra: {job_logging: {handlers: {f: {class: logging.FileHandler, filename: PWNED}}}}\n", 1),
    "job logging factory": ('hydra: {job_logging: {handlers: {f: {"()": os.system, command: touch PWNED}}}}\n', 1),
    "run.dir": ("hydra: {run: {dir: PWNED}}\n", 1),
    "sweep.dir": ("hydra: {sweep: {dir: PWNED}}\n", 1),
    "env_set": ("hydra: {job: {env_set: {LD_PRELOAD: PWNED}}}\n", 1),
    "env_copy": ("hydra: {job: {env_copy: [HOME]}}\n", 1),
    "searchpath": ("hydra: {searchpath: ['file:///etc']}\n", 1),
    "help template": ("hydra: {help: {template: x}}\n", 1),
    "launcher": (f"hydra: {{launcher: {SHELL}}}\n", 2),
    "sweeper": ("hydra: {sweeper: {params: {seed: 1}}}\n", 1),
    "hydra as a dotted key": ("hydra.run.dir: PWNED\n", 1),
    "override of a hydra group": ("defaults: [override /hydra/launcher: joblib]\n", 1),
    "hydra group without override": ("defaults: [{/hydra/callbacks: x}]\n", 1),
    "package in defaults": ("defaults: [{/precision@hydra.callbacks: bf16}]\n", 1),
    "override into a package": ("defaults: [override /precision@hydra: bf16]\n", 1),
    "package header": ("# @package hydra\nrun: {dir: PWNED}\n", 1),
    "package header of a group": ("# @package hydra.callbacks\nx: 1\n", 1),
    # Names of code.
    "target of a group": ("precision: {_target_: os.system}\n", 1),
    "registered target": ("precision: {_target_: kernel_pytorch.precision.cast.Cast}\n", 1),
    "target at the top": ("_target_: os.system\n", 1),
    "target deep in a key": (f"precision: {{weight: {{format: {SHELL}}}}}\n", 2),
    "target in a list": (f"precision: {{include: [{TOUCH}]}}\n", 3),
    "target in info": (f"info: {{proven_on: [{TOUCH}]}}\n", 3),
    "target in sweep": ("sweep: {precision._target_: [os.system]}\n", 1),
    "partial": ("precision: {_partial_: true}\n", 1),
    "args": ("precision: {_args_: [1]}\n", 1),
    "recursive": ("precision: {_recursive_: false}\n", 1),
    "convert": ("precision: {_convert_: all}\n", 1),
    "alias of an allowed module": ("precision: {_target_: kernel_pytorch.errors.os.system}\n", 1),
    "functools.partial": ("precision: {_target_: functools.partial}\n", 1),
    "get_method": ("precision: {_target_: hydra.utils.get_method, path: os.system}\n", 2),
    # Interpolations.
    "environment": ("info: {description: '${oc.env:HOME}'}\n", 1),
    "decode": ("info: {description: '${oc.decode:${oc.env:HOME}}'}\n", 1),
    "create": ("precision: {include: ['${oc.create:[1]}']}\n", 1),
    "hydra resolver": ("info: {description: '${hydra:runtime.cwd}'}\n", 1),
    "interpolation in defaults": ("defaults: [override /precision: '${oc.env:P}']\n", 1),
    "interpolation as a key": ("'${oc.env:HOME}': 1\n", 1),
    "hidden interpolation": ('info: {description: "$\\x7boc.env:HOME}"}\n', 1),
    # YAML that is more than data.
    "anchor": ("precision: &a {min_features: 8}\n", 1),
    "alias": ("info: &a {name: x}\nprecision: *a\n", 1),
    "merge key": ("precision: {<<: {min_features: 8}}\n", 1),
    "alias bomb": ("a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)), 1),
    "python tag": ("info: !!python/object/apply:os.system ['touch PWNED']\n", 1),
    "tag": ("info: !secret x\n", 1),
    "directive": ("%YAML 1.2\n---\ninfo: {name: x}\n", 1),
    "two documents": ("info: {name: x}\n---\nhydra: {}\n", 1),
    "deep flow": ("info: " + "[" * 3000 + "]" * 3000 + "\n", 1),
    "deep block": ("".join(" " * n + f"k{n}:\n" for n in range(200)), 1),
    "duplicate keys": ("info: {name: a}\ninfo: {name: b}\n", 1),
    "a number of 5000 digits": ("verify: {num_rows: " + "9" * 5000 + "}\n", 1),
    "sexagesimal": ("verify: {num_rows: 1:30:00}\n", 1),
    "infinity": ("verify: {sqnr_db: .inf}\n", 1),
    "not a number": ("verify: {sqnr_db: .nan}\n", 1),
    "a key that is a number": ("1: 2\n", 1),
    "a key that is a list": ("? [a, b]\n: 1\n", 1),
    # Bytes.
    "NUL": (b"info: {name: 'a\x00b'}\n", 1),
    "escape code": (b"info: {description: 'a\x1b[2Jb'}\n", 1),
    "escape code written as an escape": ('info: {description: "a\\e[2Jb"}\n', 1),
    "text that runs backwards": ("info: {description: 'a\u202eb'}\n", 1),
    "not UTF-8": (b"info: {description: '\xff\xfe'}\n", 1),
    "UTF-16": ("info: {name: x}\n".encode("utf-16"), 1),
    "byte order mark": (b"\xef\xbb\xbfinfo: {name: x}\n", 1),
    "larger than 64 KiB": ("# " + "x" * 70_000 + "\n", 1),
    # Beyond a recipe's reach.
    "model": ("model: {factory: 'os:system'}\n", 1),
    "model option": ("defaults: [override /model: factory]\n", 1),
    "data": ("data: {path: /etc/passwd}\n", 1),
    "seed": ("seed: 7\n", 1),
    "lower quality floor": ("defaults: [override /precision: int8_dynamic]\nprecision: {quality: {cosine_min: -1}}\n", 1),
    "fewer rows": ("verify: {num_rows: 1}\n", 1),
    "wider budget": ("verify: {budget: 1e9}\n", 1),
    "verification disabled": ("verify: {enabled: false}\n", 1),
    "gain not required": ("measure: {require_gain: false}\n", 1),
    "parent by traversal": ("defaults: [../../etc/passwd]\n", 1),
    "parent by absolute path": ("defaults: [/etc/passwd]\n", 1),
    "parent by traversal of a team": ("defaults: [/recipe/../secret]\n", 1),
    "list of parents": ("defaults: [{/recipe: [eager, cpu_int8]}]\n", 1),
    "optional parent": ("defaults: [optional eager]\n", 1),
    "cycle": ("defaults: [bad]\n", 1),
}

# name -> (words, number of mistakes)
COMMAND_LINES: dict[str, tuple[list[str], int]] = {
    "--config-dir": (["--config-dir", "conf"], 1),
    "--config-dir=": (["--config-dir=conf"], 1),
    "--config-di": (["--config-di", "conf"], 1),
    "--config-di=": (["--config-di=conf"], 1),
    "--config-p": (["--config-p=conf"], 1),
    "--config-n": (["--config-n=conf"], 1),
    "--conf": (["--conf=conf"], 1),
    "-cd": (["-cd", "conf"], 1),
    "-cd glued": (["-cdconf"], 1),
    "-cp": (["-cp", "conf"], 1),
    "-cn glued": (["-cnevil"], 1),
    "--config-path": (["--config-path", "conf"], 1),
    "--config-name": (["--config-name", "evil"], 1),
    "--experimental-rerun": (["--experimental-rerun", "config.pickle"], 1),
    "--exp": (["--exp=config.pickle"], 1),
    "rerun under -m": (["-m", "--experimental-rerun=config.pickle"], 1),
    "config dir with --cfg": (["--cfg", "job", "--config-dir", "conf"], 1),
    "end of flags": (["--", "--config-dir=conf"], 2),
    "searchpath": (["hydra.searchpath=['file:///etc']"], 1),
    "searchpath added": (["+hydra.searchpath=['file:///etc']"], 1),
    "searchpath forced": (["++hydra.searchpath=['file:///etc']"], 1),
    "callback": ([f"+hydra.callbacks.x={TOUCH}"], 1),
    "callback under -m": (["-m", "+hydra.callbacks.x._target_=pathlib.Path.touch"], 1),
    "callback group": (["+hydra/callbacks=x"], 1),
    "job logging": (["hydra.job_logging.handlers.file.filename=PWNED"], 1),
    "job logging group": (["hydra/job_logging=default"], 1),
    "env_set": (["+hydra.job.env_set.LD_PRELOAD=PWNED"], 1),
    "launcher target": (["hydra.launcher._target_=os.system"], 1),
    "sweeper target": (["hydra.sweeper._target_=os.system"], 1),
    "mode": (["hydra.mode=MULTIRUN"], 1),
    "output_subdir": (["hydra.output_subdir=PWNED"], 1),
    "target": (["precision._target_=os.system"], 1),
    "target behind +": (["+precision._target_=os.system"], 1),
    "target behind ++": (["++precision._target_=os.system"], 1),
    "target in a mapping": ([f"precision.weight={SHELL}"], 1),
    "target in a list": ([f"precision.include=[{TOUCH}]"], 1),
    "target in a quoted text": (["precision.include=['_target_']"], 1),
    "partial": (["+precision._partial_=true"], 1),
    "environment": (["data.path=${oc.env:HOME}"], 1),
    "decode": (["seed=${oc.decode:1}"], 1),
    "environment in the output folder": (["hydra.run.dir=${oc.env:HOME}/PWNED"], 1),
    "interpolation in a list": (["precision.include=['${oc.env:HOME}']"], 1),
    "package": (["precision@hydra.callbacks=bf16"], 1),
    "recipe into a package": (["+recipe@hydra=eager"], 1),
    "recipe by traversal": (["+recipe=../../etc/passwd"], 1),
    "recipe by absolute path": (["+recipe=/etc/passwd"], 1),
    "recipe that is a grammar word": (["+recipe=inf"], 1),
    "recipe that is a number": (["+recipe=123"], 1),
    "recipe that is a mapping": (["+recipe={a: b}"], 1),
    "escape code": (["precision=\x1b[2Jbf16"], 1),
    "escape code in a flag": (["--\x1b[2J"], 1),
    "new line": (["data.path=a\nb"], 1),
    "text that runs backwards": (["data.path=a\u202eb"], 1),
    "deep brackets": (["precision.include=" + "[" * 1500 + "]" * 1500], 1),
    "a number of 4000 digits": (["seed=" + "9" * 4000], 1),
    "a long word": (["data.path=" + "x" * 100_000], 1),
    "info on the command line": (["info.name=PWNED"], 1),
    "sweep on the command line": (["sweep.precision=[bf16]"], 1),
}


@pytest.fixture
def canary(place):
    """A file that must stay, and a check that no attack made its file."""
    file = place.work / "canary.txt"
    file.write_text(CANARY)
    yield file
    assert file.read_text() == CANARY
    assert not list(place.root.rglob("PWNED*"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, place, canary, refused) -> None:
    text, mistakes = RECIPES[name]
    place.recipe("bad", text)
    ended = refused("+recipe=./bad.yaml", mistakes=mistakes)
    assert all("bad.yaml" in line for line in ended.lines)


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_command_line(name: str, place, canary, refused) -> None:
    words, mistakes = COMMAND_LINES[name]
    # What the flags above would read, if they were obeyed.
    place.recipe("evil", f"hydra: {{callbacks: {{x: {TOUCH}}}}}\n")
    refused(*words, mistakes=mistakes)


@pytest.mark.parametrize("command", ["validate", "describe"])
def test_commands_refuse_what_a_run_refuses(command: str, place, canary, refused) -> None:
    place.recipe("bad", f"precision: {SHELL}\n")
    refused(command, "./bad.yaml", mistakes=2)


def test_a_link_out_of_the_folder(place, refused) -> None:
    (place.root / "secret.yaml").write_text("info: {description: secret}\n")
    (place.work / "bad.yaml").symlink_to(place.root / "secret.yaml")
    ended = refused("+recipe=./bad.yaml")
    assert "link" in ended.err


def test_a_pipe_instead_of_a_file(place, refused) -> None:
    os.mkfifo(place.work / "bad.yaml")
    ended = refused("+recipe=./bad.yaml")
    assert "regular file" in ended.err


def test_a_device_instead_of_a_file(place, refused) -> None:
    (place.work / "bad.yaml").symlink_to("/dev/zero")
    refused("+recipe=./bad.yaml")


def test_a_cycle_of_two(place, refused) -> None:
    place.recipe("bad", "defaults: [worse]\n")
    place.recipe("worse", "defaults: [bad]\n")
    ended = refused("+recipe=./bad.yaml")
    assert "bad" in ended.err
    assert "worse" in ended.err


def test_a_hostile_parent(place, canary, refused) -> None:
    place.recipe("child", "defaults: [bad]\n")
    place.recipe("bad", f"hydra: {{callbacks: {{x: {TOUCH}}}}}\n")
    ended = refused("+recipe=./child.yaml", mistakes=3)
    assert all("bad.yaml" in line for line in ended.lines)


def test_a_team_cannot_shadow_a_shipped_recipe(place) -> None:
    (place.work / "team").mkdir()
    (place.work / "team" / "eager.yaml").write_text("info: {description: not the shipped one}\n")
    ended = place.run("describe", "eager", "--recipes", "team=team")
    assert (ended.code, ended.err) == (0, "")
    assert "the model as its source made it" in ended.out


def test_a_namespace_cannot_be_a_shipped_recipe(place, refused) -> None:
    (place.work / "team").mkdir()
    refused("list", "--recipes", "eager=team")


def test_words_that_are_not_utf8(place, refused) -> None:
    refused(os.fsdecode(b"data.path=\xff\xfe"))


def test_an_installed_package_of_recipes_is_not_imported(place) -> None:
    """Its code would run on `list`; its recipes are found without it."""
    site = place.root / "site"
    package, info = site / "acme_recipes", site / "acme_recipes-1.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(f"open({str(place.root / 'PWNED')!r}, 'w').close()\n")
    (package / "nightly.yaml").write_text("info: {description: from a package}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-recipes\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kernel_pytorch.recipes]\nacme = acme_recipes\n")
    ended = place.run("list", PYTHONPATH=str(site))
    assert (ended.code, ended.err, ended.changed) == (0, "", [])
    assert "acme/nightly" in ended.out
    assert "from a package" in ended.out


def test_a_trusted_folder_is_read(place) -> None:
    """The variable opens what the table above finds closed."""
    (place.work / "conf" / "precision").mkdir(parents=True)
    ended = place.run("--cfg", "job", "--config-dir", "conf", KERNEL_PYTORCH_TRUST_CONFIG="1")
    assert (ended.code, ended.err) == (0, "")
    assert "precision:" in ended.out
