"""Plug-ins: find the function and the options that a spec such as simplicial:w1=128:w2=16 names.

--attn, --optim and --adapter take specs. NAME is a module of this repository or of your own.
"""

import importlib
import inspect
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_spec(spec):
    """Split the spec NAME:option=value:option=value into NAME and {option: text}."""
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
    """Raise ValueError unless all specs name built-ins or modules of this repository.

    For comma-separated specs from a checkpoint: a stranger's file must not make us import others.
    """
    for spec in filter(None, specs.split(",")):
        name = parse_spec(spec)[0]
        if name not in builtin and name not in own_modules():
            raise ValueError(
                f"the checkpoint asks for the module {name!r}, which is not part of this "
                f"repository; name it with a flag to allow it"
            )


def modules_with(function_name):
    """Return the names of the modules of this repository that define a plug-in function."""
    # an adapter can also be merged; ttt_context.adapt is none
    needed = {"adapt", "merge"} if function_name == "adapt" else {function_name}
    names = []
    for name in sorted(own_modules()):
        path = REPOSITORY / f"{name}.py"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if needed <= set(re.findall(r"^def (\w+)", text, re.MULTILINE)):
            names.append(name)
    return names


def find_plugin(name, function_name, builtin):
    """Return the built-in called `name`, or else the function in the module called `name`."""
    if name in builtin:
        return builtin[name]
    known = "".join(f"{known}, " for known in (*builtin, *modules_with(function_name)))
    error = (
        f"there is no module {name!r} with a function {function_name}; give {known}or the name of "
        f"one of yours, in the folder of train.py or on PYTHONPATH"
    )
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(error)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if not f"{name}.".startswith(f"{missing.name}."):  # one of its own imports failed
            raise
        raise ValueError(error) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(error)
    return function


def resolve(spec, function_name, builtin=None):
    """Return the function that a spec names, and {option: value} with all its options."""
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
    try:
        if value_type is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return value_type(text)
    except KeyError:
        raise ValueError(f"{what} is {text!r}; give true or false") from None
    except ValueError:
        raise ValueError(f"{what} is {text!r}, not of type {value_type.__name__}") from None


def signature(function):
    """Return the names of the parameters without a default, and {name: default} of the options.

    Raises ValueError for a keyword-only parameter, thus an option, without a default.
    """
    inputs = []
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise ValueError(f"{function.__name__} has no default for {parameter.name}")
            inputs.append(parameter.name)
        elif isinstance(parameter.default, (bool, int, float, str)):
            options[parameter.name] = parameter.default
    return inputs, options


def print_options(spec, function_name, builtin):
    """Print the options of a plug-in and its docstring, for a spec NAME:help."""
    name = spec.removesuffix(":help")
    function, options = resolve(name, function_name, builtin)
    print(f"{name}: {'these options and defaults' if options else 'no options'}")
    for key, value in options.items():
        print(f"  {key}={value}")
    print(f"\n{inspect.getdoc(function) or ''}".rstrip())
