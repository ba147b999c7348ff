"""The text of `--help`, for the program and for each command. Plain strings: printing them imports nothing."""

from __future__ import annotations

PROGRAM = """\
KernelPyTorch: one YAML recipe makes a model faster or smaller, proves that it still computes the
same, and measures the gain.

usage:
  kernel-pytorch [FLAGS] [GROUP=OPTION ...] [KEY=VALUE ...]   run: apply, verify, measure, report
  kernel-pytorch COMMAND ...                                  `COMMAND --help` tells more

  `python -m kernel_pytorch` is the same program.

examples:
  kernel-pytorch +recipe=cpu_int8
  kernel-pytorch +recipe=cpu_int8 model=bert data.batch=16    the command line wins over the recipe
  kernel-pytorch +recipe=./mine.yaml                          a recipe file of your own
  kernel-pytorch +recipe=cpu_int8 -m precision=bf16,int8_dynamic compile=none,default     a sweep
  kernel-pytorch explain +recipe=h100_fp8 --device a100       where values come from, and the plan

commands:
  list                      recipes that can be named
  describe NAME             a recipe, a group, or GROUP=OPTION
  explain [WORDS] [KEY]     where every value came from, and the plan for this or a named device
  diff A B                  the values in which two recipes differ
  validate NAME|FILE ...    check recipes, all errors at once
  copy RECIPE DEST          a recipe as a file to edit
  doctor                    what this machine can do
  tune                      measure the kernels for few rows on this GPU
  precompile                compile the Triton kernels for GPUs that need not be here

groups (`describe GROUP` lists the options):
  of a recipe               backend attention fusion precision memory compile graph
  of a run                  model data verify measure

flags:
  -m, --multirun            sweep: every combination of values given as a list, a,b,c, and of the
                            recipe's `sweep:` block
  --recipes TEAM=DIR        a folder of recipes, used as +recipe=TEAM/NAME; may be repeated;
                            KERNEL_PYTORCH_RECIPES=TEAM=DIR:TEAM=DIR says the same
  --cfg job                 print the composed configuration and stop
  --info [WHAT]             Hydra's view: all, config, defaults, defaults-tree, plugins, searchpath
  --hydra-help              Hydra's own help
  -sc install=SHELL         shell completion of recipes, options and keys, for the installed script
                            (not for python -m):  eval "$(kernel-pytorch -sc install=bash)"
  --version, --help

output folder: outputs/DATE/TIME, of a sweep multirun/DATE/TIME; hydra.run.dir=DIR and
  hydra.sweep.dir=DIR choose another.

exit codes:
    0  pass, emulated, unverified              4  no effect
    1  our failure                             5  numerics
    2  a mistake in what was written; nothing  6  performance
       is run and nothing is written         130  interrupted
    3  unsupported hardware

KERNEL_PYTORCH_TRUST_CONFIG=1 opens --config-dir and Hydra's own settings, which can run code.
HYDRA_FULL_ERROR=1 shows tracebacks.
"""

COMMANDS = {
    "list": """\
usage: kernel-pytorch list [--recipes TEAM=DIR]

Recipes that +recipe=NAME can name: name, what it does, hardware, first 12 digits of the digest.
A file that cannot be read is listed with its error; the others are not affected. Exit 0.
""",
    "describe": """\
usage: kernel-pytorch describe RECIPE | GROUP | GROUP=OPTION

RECIPE         description, hardware, digest, parents, sweep, and the values that are not defaults
GROUP          every setting with its range, unit, default and meaning, and the group's options
GROUP=OPTION   the settings that the option reads, and what it sets
""",
    "explain": """\
usage: kernel-pytorch explain [RECIPE] [GROUP=OPTION ...] [KEY=VALUE ...] [--device NAME] [KEY ...]

Where every value that is not a default came from, layer by layer, and the plan: whether this
machine, or the device of --device, does each step natively, by emulation or not at all, and why.
The device need not be here. KEY, such as precision.weight.format, shows the layers of one value.
Exit 0 also when a step is unsupported.
""",
    "diff": """\
usage: kernel-pytorch diff A B

The values in which two recipes differ, as KEY  A -> B. A and B are names or files. Exit 0.
""",
    "validate": """\
usage: kernel-pytorch validate NAME|FILE ...

Checks recipes and prints every mistake, one a line. Exit 2 if there is one.
""",
    "copy": """\
usage: kernel-pytorch copy RECIPE DEST

Writes the recipe to the file DEST, or under its own name to the folder DEST, to be edited; never
overwrites a file. Run it with +recipe=./DEST.
""",
    "doctor": """\
usage: kernel-pytorch doctor [--measure]

What this machine has and can do: hardware, software, and for every option native, emulated or
unsupported, with the reason.

--measure   also times memory and matmuls, which takes seconds
""",
    "tune": """\
usage: kernel-pytorch tune [--kernel NAME] [--layer NxK ...] [--seconds S] [--out FILE]

Searches the fastest configuration of the kernels that multiply few rows by 8-bit or 4-bit weights,
for 1 to 64 rows (4 bits: to 128) on this GPU, and how many rows they are used for. Runs of this
machine read the table from then on, before the one that is shipped for this GPU. Exit 3 without a
GPU.

--kernel NAME   skinny_w8a16, skinny_w4a16 or all, the default
--layer NxK     out features x in features of a linear layer; may be repeated; without it the four
                of Llama-3-8B
--seconds S     time for one kernel's search, 150; crossovers take about 5 s a layer more
--out FILE      write there and not to kernel_pytorch/tuned in the user's cache folder
""",
    "precompile": """\
usage: kernel-pytorch precompile [--target NAME ...] [--kernel NAME ...] [--out DIR]

Compiles every Triton kernel of the package, as a Llama-3-8B layer at decode launches it, into code
objects: cubin for NVIDIA, hsaco for AMD, each with its assembly and a JSON file that says how it is
launched. Needs Triton and no GPU. What was compiled before is read from disk; a damaged file is
compiled again. Exit 1 when a compiler refuses a kernel, the others are compiled all the same.

--target NAME   sm_80, sm_90, sm_100, gfx942 or gfx950; may be repeated; all without it
--kernel NAME   such as skinny_w8a16.matrix; may be repeated; all without it
--out DIR       write there and not to kernel_pytorch/code_objects in the user's cache folder
""",
}
