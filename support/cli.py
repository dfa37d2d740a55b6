"""Command line: dataclass fields become flags, plug-in specs become functions."""

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
from dataclasses import field, fields
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


# -- dataclass fields ------------------------------------------------------------------------------


def option(default, help, least=None, **argparse_options):
    """Declare a dataclass field that is also a flag.

    least: smallest value allowed. By default 0 where the default is 0, else 1 for an int and
    anything above 0 for a float.
    """
    metadata = {"help": help, "least": least, "argparse": argparse_options}
    return field(default=default, metadata=metadata)


def adjustable(default, help, **more):
    """Like `option`, for a field that --resume may change: it touches reports or rounding only."""
    f = option(default, help, **more)
    f.metadata = {**f.metadata, "adjustable": True}
    return f


def flag_name(name):
    return "--" + name.replace("_", "-")


def check_fields(config):
    """Raise ValueError if a field has the wrong type or is out of range."""
    for f in fields(config):
        value = getattr(config, f.name)
        if type(value) is not f.type:
            raise ValueError(f"{flag_name(f.name)} is {value!r}, not of type {f.type.__name__}")
        if f.type is int:
            least = f.metadata["least"]
            if least is None:
                least = min(1, f.default)
            if not least <= value <= 2**32:
                raise ValueError(f"{flag_name(f.name)} is {value}; it must be at least {least}")
        if f.type is float:
            least = f.metadata["least"]
            if least is None and not 0 < value < 2**32:
                raise ValueError(f"{flag_name(f.name)} is {value}; it must be above 0")
            if least is not None and not least <= value < 2**32:
                raise ValueError(f"{flag_name(f.name)} is {value}; it must be at least {least}")


# -- plug-ins --------------------------------------------------------------------------------------


def parse_spec(spec):
    """Split NAME:option=value:option=value into NAME and {option: text}."""
    name, *parts = spec.split(":")
    options = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: an option is written option=value, not {part!r}")
        options[key] = text
    return name, options


def own_modules():
    """Return the names of the modules at the top of this repository."""
    return [path.stem for path in REPOSITORY.glob("*.py")]


def check_own(specs, builtin):
    """Raise ValueError if a comma-separated list of specs, read from a checkpoint, names a module
    that is neither built in nor a file of this repository."""
    for spec in filter(None, specs.split(",")):
        name = parse_spec(spec)[0]
        if name not in builtin and name not in own_modules():
            raise ValueError(
                f"the checkpoint asks for the module {name!r}, which is not part of this "
                f"repository; name it with a flag to allow it"
            )


def find_plugin(name, function_name, builtin):
    """Return the function called `name`: a built-in, or NAME.function_name from a module."""
    if name in builtin:
        return builtin[name]
    error = f"there is no {function_name} {name!r}: give {', '.join(builtin) or 'a module'}"
    error += f", or a module {name}.py with a function {function_name}"
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(error)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:  # an import inside the reader's own module failed
            raise
        raise ValueError(error) from None
    if not hasattr(module, function_name):
        raise ValueError(error)
    return getattr(module, function_name)


def resolve(spec, function_name, builtin=None):
    """Return the function that a plug-in spec names, and all its options, defaults included."""
    name, given = parse_spec(spec)
    function = find_plugin(name, function_name, builtin or {})
    options = signature(function)[1]
    for key, text in given.items():
        if key not in options:
            known = ", ".join(f"{k}={v}" for k, v in options.items()) or "none"
            raise ValueError(f"{name} has no option {key!r}; its options are: {known}")
        options[key] = parse_value(text, type(options[key]), f"{name}:{key}")
    return function, options


def parse_value(text, value_type, what):
    """Convert the text of an option to the type of its default."""
    if value_type is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ValueError(f"{what} is {text!r}; give true or false")
        return values[text.lower()]
    try:
        return value_type(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}, not of type {value_type.__name__}") from None


def signature(function):
    """Return (positional parameters, {keyword option: default}) of a plug-in."""
    inputs = []
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            inputs.append(parameter.name)
        elif isinstance(parameter.default, (bool, int, float, str)):
            options[parameter.name] = parameter.default
    return inputs, options


# -- flags -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are ValueErrors and whose help keeps its line breaks."""

    def __init__(self, **options):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message):
        raise ValueError(f"{message} (--help lists every flag)")


def add_flag(group, name, value_type, default, help="", argparse_options=None):
    """Add a flag. A flag that is not given stays out of the parsed namespace."""
    settings = {"type": value_type, "metavar": value_type.__name__.upper()}
    if value_type is bool:
        settings = {"action": argparse.BooleanOptionalAction}
    elif value_type is tuple:
        settings = {"type": type(default[0]), "nargs": len(default), "metavar": "X"}
    settings.update(argparse_options or {})
    if default or value_type in (int, float):
        help = f"{help} (default: {default})".replace("%", "%%")
    group.add_argument(flag_name(name), dest=name, default=argparse.SUPPRESS, help=help, **settings)


def parse_flags(argv, description, configs):
    """Return {name: value} of the flags that were given. configs: dataclasses, each field a flag."""
    parser = Parser(description=description)
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or config.__name__).splitlines()[0])
        for f in fields(config):
            add_flag(group, f.name, f.type, f.default, f.metadata["help"], f.metadata["argparse"])
    return vars(parser.parse_args(argv))


def print_options(specs, plugins):
    """For --attn NAME:help and the like: print the options of the module, and exit."""
    for flag, spec in specs.items():
        function_name, builtin = plugins[flag]
        name, _, rest = spec.partition(":")
        if rest == "help":
            function = find_plugin(name, function_name, builtin)
            print(f"--{flag} {name} has these options and defaults:")
            for key, value in signature(function)[1].items():
                print(f"  {key}={value}")
            print(f"\n{inspect.getdoc(function) or ''}".rstrip())
            sys.exit(0)


def parse_configs(argv, description, configs, plugins, starting_values):
    """Return one instance per dataclass in `configs`.

    A flag beats starting_values(flags given) -> {field: value}, of a preset or a saved run, which
    beats the default. plugins: {flag: (function name, built-ins)} of the flags that name modules.
    """
    given = parse_flags(argv, description, configs)
    print_options({flag: given[flag] for flag in plugins if flag in given}, plugins)
    base = starting_values(given)
    for flag, (_, builtin) in plugins.items():
        if flag in base and flag not in given:
            check_own(base[flag], builtin)
    values = {**base, **given}
    return [
        config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
        for config in configs
    ]


# -- running a script ------------------------------------------------------------------------------


def run_main(main):
    """Run a script's main(). Exit status: 0, 1 numbers not finite, 2 bad input, 128 + signal."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, interrupt)
    status = 0
    message = None
    try:
        result = main() or {}
        if result.get("signal"):
            status = 128 + result["signal"]
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        message = "stopped before its end"
    except FloatingPointError as error:
        status = 1
        message = str(error)
    except torch.OutOfMemoryError:
        status = 2
        message = (
            "the GPU is out of memory; give a smaller --micro-batch, or --fsdp on several GPUs"
        )
    except ValueError as error:
        if os.environ.get("FIVEFOLD_TRACEBACK"):
            raise
        status = 2
        message = str(error)

    if message and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(status)  # gloo's threads have been seen to abort while Python shuts down
    sys.exit(status)
