"""Command line: dataclass fields become flags, errors become one line and an exit status.

This module imports nothing slow. So a script can import it first, and call exit_on_signals() before
its own imports, which may take seconds.
"""

import argparse
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path

from support import plugins

LARGEST = 2**32  # upper limit of every numeric flag
SWITCH = "store_true"  # argparse action of a flag that has no --no-NAME


# -- dataclass fields ------------------------------------------------------------------------------


def option(default, help, least=None, is_adjustable=False, **argparse_options):
    """Declare a dataclass field that is also a flag.

    least: the smallest allowed value. Without it, an int must be at least 1, or at least 0 if its
    default is 0; a float must be above 0.
    """
    metadata = {"help": help, "least": least, "adjustable": is_adjustable}
    return field(default=default, metadata={**metadata, "argparse": argparse_options})


def adjustable(default, help, **more):
    """Declare an option that may change on --resume: it affects only reports or rounding."""
    return option(default, help, is_adjustable=True, **more)


def flag_name(name):
    return "--" + name.replace("_", "-")


def check_fields(config):
    """Raise ValueError if a field of a dataclass has the wrong type or is out of range."""
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

        # a field without `least` gets a limit by its type: a float must be above 0, an int at least
        # 1; but a default is always allowed, so if it is 0, an int must be at least 0
        least = f.metadata["least"]
        must_exceed = f.type is float and least is None
        if least is None:
            least = 0 if must_exceed else min(1, f.default)
        is_large_enough = value > least if must_exceed else value >= least
        if not (is_large_enough and value <= LARGEST):  # NaN fails both comparisons
            bound = "above" if must_exceed else "at least"
            raise ValueError(f"{name} is {value}; it must be {bound} {least} and at most 2**32")


# -- flags -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises ValueError, and whose help keeps its line breaks."""

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
    """Raise ValueError if a value is empty, as from an unset shell variable, or is not text.

    A value can come as `--flag value` or as `--flag=value`.
    """
    previous = "an argument"  # the flag in front of an empty value
    for argument in argv:
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            raise ValueError(
                f"the value of {argument.rstrip('=') or previous} is empty, as that of an unset "
                f"shell variable; give one or leave the flag out"
            )
        if "\0" in argument or re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"the argument {argument!a} is not UTF-8 text")
        previous = argument


def add_flag(group, f, default):
    """Add the flag of a dataclass field f to a group of argparse.

    If the flag is not given, the parsed namespace lacks the field. default: only shown in the help.
    """
    settings = {"type": f.type}
    if f.type is bool:
        settings = {"action": argparse.BooleanOptionalAction}
    if f.type in (int, float):
        settings["metavar"] = "N" if f.type is int else "X"
    settings.update(f.metadata["argparse"])
    help = f.metadata["help"]  # ends with the default, if that is a number or not empty
    if default or type(default) in (int, float):
        help = f"{help} (default: {default})"
    settings["help"] = help.replace("%", "%%")
    group.add_argument(flag_name(f.name), dest=f.name, default=argparse.SUPPRESS, **settings)


def parse_configs(argv, description, configs, plugin_flags, starting_values):
    """Return one instance per dataclass in `configs`, from the command line.

    plugin_flags: {flag: (function name, built-ins)} for the flags that name modules.
    starting_values: a function that gets the given flags, {field: value}, and returns the values of
    a preset or a saved run, {field: value}. Flags override these, and these override the defaults.
    """
    # read the flags
    parser = Parser(description=description, usage="%(prog)s [--flag value ...]")
    base = starting_values({})  # --help shows these as defaults
    for config in configs:
        group = parser.add_argument_group((config.__doc__ or config.__name__).splitlines()[0])
        for f in fields(config):
            add_flag(group, f, base.get(f.name, f.default))
    given = vars(parser.parse_args(argv))

    # --attn NAME:help prints the options of a module and ends; the flag may list several modules
    for flag, plugin in plugin_flags.items():
        for spec in filter(None, given.get(flag, "").split(",")):
            if spec.endswith(":help"):
                plugins.print_options(spec, *plugin)
                sys.exit(0)
            plugins.resolve(spec, *plugin)  # raises ValueError before any data is read

    # a module that a saved run names, and not the user, must be one of our own
    base = starting_values(given)
    for flag, (_, builtin) in plugin_flags.items():
        if flag in base and flag not in given:
            plugins.check_own(base[flag], builtin)
    return [make_config(config, {**base, **given}) for config in configs]


def make_config(config, values):
    """Return an instance of the dataclass `config`, from those `values` that are its fields."""
    return config(**{f.name: values[f.name] for f in fields(config) if f.name in values})


# -- processes, output and signals -----------------------------------------------------------------


def launched_by_torchrun():
    """Return whether torchrun started this process: it sets all four of these variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def local_rank():
    """Return the number of this process among those on this machine."""
    text = os.environ.get("LOCAL_RANK", "0")
    return int(text) if launched_by_torchrun() and text.isdecimal() else 0


@contextmanager
def ignore_lost_output():
    """Go on if stdout or stderr cannot be written (`| head`, a closed terminal, a full disk).

    Lost output must not end a run. All later output then goes to /dev/null.
    """
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


def stop_signals():
    """Return the signals that ask a program to stop. Under nohup, SIGHUP is not one of them."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def exit_at_once(signum, frame):
    if local_rank() == 0:
        with suppress(OSError):
            os.write(2, f"\n{Path(sys.argv[0]).name}: stopped before its end\n".encode())
    os._exit(128 + signum)


def exit_on_signals():
    """From now on, exit with one line on Ctrl-C. For phases that have nothing to save."""
    for signum in stop_signals():
        signal.signal(signum, exit_at_once)


def raise_interrupt(signum, frame):
    exit_on_signals()  # a second signal must not interrupt what the first one has begun
    raise KeyboardInterrupt(signum)


# -- running a script ------------------------------------------------------------------------------


def describe_error(error):
    """Return (exit status, message), or None for an error that needs a traceback."""
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
            "out of memory; a shorter context needs less, and so do fewer or shorter spans, a "
            "smaller --micro-batch, which does not change the result, and --fsdp on several GPUs"
        )
    return None


def run_main(main):
    """Run a script's main() and exit. With FIVEFOLD_TRACEBACK=1, errors keep their traceback.

    Exit status: 0 done, 1 a loss was not finite, 2 bad input, 128 + signal when stopped.
    """
    # signals raise KeyboardInterrupt; stdout and stderr accept every text
    for signum in stop_signals():
        signal.signal(signum, raise_interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what the terminal cannot show

    # run it, and turn errors into a status and a message
    status = 0
    message = None
    try:
        result = main()
        if isinstance(result, dict) and result.get("signal"):
            status = 128 + result["signal"]
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)  # see raise_interrupt
        if local_rank() == 0:
            message = "stopped before its end"
    except BrokenPipeError:
        pass  # a program such as `head` has closed our output
    except Exception as error:
        described = describe_error(error)
        if described is None or os.environ.get("FIVEFOLD_TRACEBACK"):
            raise
        status, message = described

    # print the message and exit
    exit_on_signals()
    with ignore_lost_output():
        if message and local_rank() > 0:
            time.sleep(3)  # if rank 0 fails too, torchrun ends this process before it prints
            message = f"process {local_rank()}: {message}"
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if launched_by_torchrun():
        os._exit(status)  # a normal exit can abort in a thread of gloo
    sys.exit(status)
