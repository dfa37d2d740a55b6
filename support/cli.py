"""Command line: dataclass fields become flags, plug-in specs become functions, errors a sentence.

Imports nothing heavy, so that a script can import it first and call exit_on_signals().
"""

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LARGEST = 2**32  # of any number given as a flag


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
        name = flag_name(f.name)
        value = getattr(config, f.name)
        if value is None and f.default is None:
            continue
        if type(value) is not f.type:
            raise ValueError(f"{name} is {value!r}, not of type {f.type.__name__}")
        if f.type is str and f.default and not value:
            raise ValueError(f"{name} is empty; the default is {f.default}")
        if f.type not in (int, float):
            continue
        least = f.metadata["least"]
        above = f.type is float and least is None
        if least is None:
            least = 0 if above else min(1, f.default)
        is_large_enough = value > least if above else value >= least
        if not (is_large_enough and value <= LARGEST):  # written so that NaN is refused
            bound = "above" if above else "at least"
            raise ValueError(f"{name} is {value}; it must be {bound} {least} and at most 2**32")


# -- plug-ins --------------------------------------------------------------------------------------


def parse_spec(spec):
    """Split NAME:option=value:option=value into NAME and {option: text}."""
    name, *parts = spec.split(":")
    options = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not (key and equals and text):
            raise ValueError(f"{spec!r}: an option is written option=value, not {part!r}")
        if key in options:
            raise ValueError(f"{spec!r} gives the option {key} twice")
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
    known = "".join(f"{known}, or " for known in builtin)
    error = (
        f"there is no {function_name} {name!r}; give {known}the name of a module, beside "
        f"train.py or on PYTHONPATH, that has a function {function_name}"
    )
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(error)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:  # an import inside the reader's own module failed
            raise
        raise ValueError(error) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(error)
    return function


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

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        check_arguments(args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise ValueError(f"{message} (--help lists every flag)")


def check_arguments(argv):
    """Raise ValueError for an empty value, as an unset shell variable gives, and for what is no
    text."""
    for i, argument in enumerate(argv):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            flag = argument.rstrip("=") or (argv[i - 1] if i else "an argument")
            raise ValueError(
                f"the value of {flag} is empty, as that of an unset shell variable; "
                f"give one or leave the flag out"
            )
        if "\0" in argument or re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"the argument {argument!a} is not UTF-8 text")


def add_flag(group, name, value_type, default, help="", argparse_options=None):
    """Add a flag. A flag that is not given stays out of the parsed namespace."""
    settings = {"type": value_type, "metavar": value_type.__name__.upper()}
    if value_type is bool:
        settings = {"action": argparse.BooleanOptionalAction}
    settings.update(argparse_options or {})
    if default or value_type in (int, float):
        help = f"{help} (default: {default})"
    help = help.replace("%", "%%")
    group.add_argument(flag_name(name), dest=name, default=argparse.SUPPRESS, help=help, **settings)


def parse_flags(argv, description, configs):
    """Return {name: value} of the flags that were given. configs: dataclasses, each field a flag."""
    parser = Parser(description=description)
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or config.__name__).splitlines()[0])
        for f in fields(config):
            add_flag(group, f.name, f.type, f.default, f.metadata["help"], f.metadata["argparse"])
    return vars(parser.parse_args(argv))


def print_options(given, plugins):
    """For --attn NAME:help and the like: print the options of the module, and exit."""
    for flag, (function_name, builtin) in plugins.items():
        for spec in given.get(flag, "").split(","):
            name, _, rest = spec.partition(":")
            if rest != "help":
                continue
            function = find_plugin(name, function_name, builtin)
            options = signature(function)[1]
            print(f"--{flag} {name}: {'these options and defaults' if options else 'no options'}")
            for key, value in options.items():
                print(f"  {key}={value}")
            print(f"\n{inspect.getdoc(function) or ''}".rstrip())
            sys.exit(0)


def parse_configs(argv, description, configs, plugins, starting_values):
    """Return one instance per dataclass in `configs`.

    A flag beats starting_values(flags given) -> {field: value}, of a preset or a saved run, which
    beats the default. plugins: {flag: (function name, built-ins)} of the flags that name modules.
    """
    given = parse_flags(argv, description, configs)
    print_options(given, plugins)
    base = starting_values(given)
    for flag, (_, builtin) in plugins.items():
        if flag in base and flag not in given:
            check_own(base[flag], builtin)
    return [make_config(config, {**base, **given}) for config in configs]


def make_config(config, values):
    """Return an instance of a dataclass, with its fields from `values`, which may have more."""
    return config(**{f.name: values[f.name] for f in fields(config) if f.name in values})


# -- processes and output --------------------------------------------------------------------------


def launched_by_torchrun():
    """Whether torchrun started this process; one variable left in the environment does not count."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def local_rank():
    """Return the number of this process among those on this machine."""
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if launched_by_torchrun() and text.isdecimal() else 0


@contextmanager
def losing_output():
    """Print in this block. A reader that goes away (`| head`, a closed terminal, a full disk) does
    not end the program: what it does not take is dropped, now and later."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# -- running a script ------------------------------------------------------------------------------


def stop_signals():
    """Return the signals that ask a program to stop; SIGHUP, unless nohup has it ignored."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def exit_at_once(signum, frame):
    if local_rank() == 0:
        with suppress(OSError):
            os.write(2, f"\n{Path(sys.argv[0]).name}: stopped before its end\n".encode())
    os._exit(128 + signum)


def raise_interrupt(signum, frame):
    raise KeyboardInterrupt(signum)


def exit_on_signals():
    """While there is nothing to lose, as during the imports, a signal ends the script in a line."""
    for signum in stop_signals():
        signal.signal(signum, exit_at_once)


def describe_error(error):
    """Return the exit status and the sentence for an error that a script may end with, or None."""
    import torch

    message = " ".join(str(error).split())
    if isinstance(error, FloatingPointError):
        return 1, message
    if isinstance(error, ValueError):
        return 2, message or "a value is wrong"
    if isinstance(error, OSError):
        return 2, f"cannot use {error.filename} ({error.strerror})" if error.filename else message
    if isinstance(error, RecursionError):
        return 2, "the input is nested too deeply to be read"
    is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_out_of_memory or "can't allocate memory" in message:
        return 2, (
            "out of memory; a smaller --micro-batch, which does not change the result, or a "
            "shorter context needs less, and so does --fsdp on several GPUs"
        )
    return None


def run_main(main):
    """Run a script's main() and exit: status 0, 1 numbers not finite, 2 bad input, 128 + signal.

    FIVEFOLD_TRACEBACK=1 in the environment shows where an error comes from.
    """
    for signum in stop_signals():
        signal.signal(signum, raise_interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal shows every character

    status = 0
    message = None
    try:
        result = main()
        if isinstance(result, dict) and result.get("signal"):
            status = 128 + result["signal"]
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        if local_rank() == 0:
            message = "stopped before its end"
    except BrokenPipeError:
        pass  # the reader, head for one, has had enough
    except Exception as error:
        described = describe_error(error)
        if described is None or os.environ.get("FIVEFOLD_TRACEBACK"):
            raise
        status, message = described

    exit_on_signals()
    with losing_output():
        if message and local_rank() > 0:
            time.sleep(3)  # if all processes fail alike, torchrun ends this one meanwhile
            message = f"process {local_rank()}: {message}"
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if launched_by_torchrun():
        os._exit(status)  # gloo's threads have been seen to abort while Python shuts down
    sys.exit(status)
