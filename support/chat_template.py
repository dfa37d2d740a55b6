"""Chat templates of Hugging Face folders: untrusted Jinja, rendered in a process with limits.

Jinja's sandbox protects files and Python's internals from a template, but does not prevent endless
loops or texts of many GB. So a process of its own, `python -m support.chat_template`, renders it.
It reads JSON on stdin, writes JSON to stdout, and is limited to SECONDS and MEMORY.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SECONDS = 20
MEMORY = 2**30  # bytes, where the system can limit them


def render(template, variables):
    """Render a Jinja template as transformers' apply_chat_template does, and return the text.

    variables: plain data. Raises ValueError with the reason if the template fails.
    """
    # ask a new process
    request = json.dumps({"template": template, "variables": variables})
    command = [sys.executable, "-m", "support.chat_template"]
    repository = Path(__file__).resolve().parent.parent
    try:
        process = subprocess.run(
            command, input=request.encode(), capture_output=True, cwd=repository, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it runs for more than {SECONDS} seconds") from None

    # read its answer, or why there is none
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else f"its process ended with {process.returncode}")
    reply = json.loads(process.stdout)
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["text"]


def render_here(template, variables):
    """Render in this process, in the same Jinja environment as transformers."""
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: prints what is inside, the model's own text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("print_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def print_body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    # unlike Jinja's own tojson: no HTML escapes, no sorted keys
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template).render(variables)


def main():
    """Answer one request of `render`: JSON on stdin, JSON on stdout."""
    # limit the memory, and write no core files
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.load(sys.stdin)
    try:
        reply = {"text": render_here(request["template"], request["variables"])}
    except MemoryError:
        reply = {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # TemplateError, RecursionError, whatever the template raises
        reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
