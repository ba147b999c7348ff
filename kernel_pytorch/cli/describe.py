"""`describe RECIPE | GROUP | GROUP=OPTION`."""

from __future__ import annotations

from rich.text import Text

from kernel_pytorch.cli.console import table, value_text
from kernel_pytorch.cli.fields import group_class, settings
from kernel_pytorch.cli.options import Option, find_option, group_options
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.canonical import to_dict
from kernel_pytorch.recipe.keys import flatten
from kernel_pytorch.recipe.load import Recipe, load_recipe
from kernel_pytorch.recipe.options import GROUPS, default_choices
from kernel_pytorch.recipe.sources import RecipeSources, is_path
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.terminal import make_console
from kernel_pytorch.schema import RootConfig, nearest

_EXTRA_GROUPS = ("info",)


def describe(words: list[str]) -> int:
    """Prints one thing that has a name. Raises ConfigError when nothing has it."""
    if len(words) != 1:
        raise ConfigError(f"describe takes one RECIPE, GROUP or GROUP=OPTION: found {len(words)} words")
    word = words[0]
    group, equals, option = word.partition("=")
    if equals and group.lstrip("+") != "recipe":
        if group not in GROUPS:
            raise ConfigError(f"describe: found {group!r}; allowed {', '.join(GROUPS)}{nearest(group, GROUPS)}")
        _option(find_option(group, option))
    elif word in (*GROUPS, *_EXTRA_GROUPS):
        _group(word)
    else:
        _recipe(option if equals else word)
    return 0


def _group(group: str) -> None:
    out = make_console()
    cls = group_class(group)
    out.print(Text(group, style="bold"), (cls.__doc__ or "").strip(), sep="  ")
    rows = table("setting", "values", "default", "meaning")
    for item in settings(cls):
        rows.add_row(f"{group}.{item.key}", item.values, value_text(item.default), item.meaning)
    out.print()
    out.print(rows)
    if group in GROUPS:
        out.print()
        names = table("option", "what it is")
        for option in group_options(group):
            sets = " ".join(f"{key}={value_text(value)}" for key, value in option.sets.items())
            names.add_row(f"{group}={option.name}", option.comment or sets)
        out.print(names)


def _option(option: Option) -> None:
    out = make_console()
    out.print(Text(f"{option.group}={option.name}", style="bold"), option.comment, sep="  ")
    if option.target is not None:
        out.print(f"class: {option.target}")
    out.print()
    rows = table("setting", "values", "this option", "meaning")
    for item in settings(group_class(option.group)):
        if option.target and item.key.partition(".")[0] not in option.reads:
            continue
        rows.add_row(f"{option.group}.{item.key}", item.values, value_text(option.sets.get(item.key, item.default)), item.meaning)
    if rows.row_count:
        out.print(rows)
    else:
        out.print("It reads no settings.")


def _recipe(name: str) -> None:
    sources = RecipeSources.from_environment()
    known = [file.name for file in sources.all()]
    if not is_path(name) and name not in known:
        raise ConfigError(f"describe: found {name!r}, which is no recipe, group or GROUP=OPTION{nearest(name, [*known, *GROUPS])}")
    _print_recipe(load_recipe(name, sources))


def _print_recipe(recipe: Recipe) -> None:
    out = make_console()
    info = recipe.config.info
    out.print(Text(recipe.name, style="bold"), plain(recipe.description), sep="  ")
    facts = table("", "")
    facts.show_header = False
    facts.add_row("file", str(recipe.path))
    facts.add_row("made of", " <- ".join(recipe.chain))
    facts.add_row("hardware", recipe.config.backend.hardware + (f"; author claims {', '.join(info.hardware)}" if info.hardware else ""))
    facts.add_row("digest", recipe.digest)
    for proof in info.proven_on:
        facts.add_row("proven on", plain(f"{proof.device}, {proof.model}, torch {proof.torch}, {proof.date}: {_figures(proof)}"))
    for key, values in recipe.sweep.items():
        facts.add_row("sweep", f"{key}={','.join(values)}")
    out.print(facts)
    out.print()
    rows = table("group", "option", "values that are not defaults", fixed=(0, 1))
    values = changed_values(recipe.config)
    for group in GROUPS:
        mine = [f"{key.partition('.')[2]}={value_text(value)}" for key, value in values.items() if key.startswith(f"{group}.")]
        mine = [item for item in mine if not item.startswith("_target_=")]
        if mine or recipe.choices.get(group) != default_choices()[group]:
            rows.add_row(group, recipe.choices.get(group, ""), " ".join(mine))
    out.print(rows)


def _figures(proof: object) -> str:
    ratio, cosine = getattr(proof, "ratio_to_eager", None), getattr(proof, "cosine_min", None)
    return ", ".join(filter(None, [f"{ratio:.2f}x eager" if ratio else "", f"cosine {cosine:.4f}" if cosine is not None else ""]))


def changed_values(config: RootConfig) -> dict[str, object]:
    """Dotted key -> value, where the config differs from the schema's defaults."""
    now, default = dict(flatten(to_dict(config))), dict(flatten(to_dict(RootConfig())))
    return {key: value for key, value in now.items() if key not in default or default[key] != value}
