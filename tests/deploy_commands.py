"""Shell commands, as in a README, read by the parsers of the programs that they name; nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
ENDS = {"|", "||", "&&", ";", "&", "(", ")", ">", ">>", "<"}
KEYWORDS = ("until", "do", "done")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")
FILE = re.compile(r"(deploy|tests|serve_app|cluster|jobs)/[\w./-]+\.\w+|Makefile|constraints\.txt")
# What `kubectl` and `helm` are asked here: words, and options with a value (or none, False).
OPTIONS = {
    "-f": True, "-o": True, "--namespace": True, "--version": True, "--from-file": True, "--cert": True, "--key": True,
    "--watch": False, "--follow": False, "--current": False, "--create-namespace": False,
}  # fmt: skip
KUBECTL = {
    "apply": "", "create": "|namespace|secret generic|secret tls|configmap", "delete": "",
    "get": "rayservice|rayjob|pods", "describe": "rayservice|rayjob", "logs": r"job/[\w-]+",
    "rollout": r"restart deployment/[\w-]+",
    "port-forward": r"service/[\w-]+ \d+", "config": "set-context",
}  # fmt: skip


def lines(text: str) -> Iterator[str]:
    """Indented lines of Markdown, and what stands in `…`, where they begin with a program that is known here. Of one
    that only names a subcommand, as `serve deploy` does, its --help is asked for."""
    inline = [found for found in re.findall(r"`([^`\n]+)`", text) if " " in found and not re.search(r"[…|]", found)]
    named = [f"{one} --help" for one in inline if re.fullmatch(r"(cellray|ray|serve) [a-z-]+", one)]
    for line in [*blocks(text), *named, *(one for one in inline if f"{one} --help" not in named)]:
        words = [word for word in line.split() if not ASSIGNMENT.match(word)]
        if words and (words[0] in PROGRAMS or words[:2] == ["python", "-m"]):
            yield line


def blocks(text: str) -> list[str]:
    """Indented lines of Markdown."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def wrong(line: str, known: set[str] | None = None, others: set[str] | None = None) -> list[tuple[str, str]]:
    """(command, what is wrong with it) for each of a line's commands. `known` are files of another place, `others`
    the programs that there may be besides those that are read here (default: any)."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError as error:
        return [(line, str(error))]
    found, command = list[tuple[str, str]](), list[str]()
    for word in [*words, ";"]:
        if word not in ENDS:
            command.append(word)
            continue
        while command and (ASSIGNMENT.match(command[0]) or command[0] in KEYWORDS):
            command.pop(0)
        program = command[0] if command else ""
        if command and (why := _command(command, known or set())):
            found.append((shlex.join(command), why))
        elif command and others is not None and program not in {*PROGRAMS, *others}:
            found.append((shlex.join(command), f"{program} is not known here"))
        command = []
    return found


def _command(words: list[str], known: set[str]) -> str:
    missing = [
        word for word in words if FILE.fullmatch(word.split("=")[-1]) and not (ROOT / word.split("=")[-1]).exists()
    ]
    if missing:
        return f"there is no {missing}"
    if absent := [word for word in words if word.startswith("/etc/") and word not in known]:
        return f"there is no {absent}"
    if words[:2] == ["python", "-m"]:
        return _module(words[2], words[3:])
    if words[0] == "timeout":
        return _command(words[2:], known)
    if words[:2] == ["bash", "-c"]:
        return "; ".join(why for _, why in wrong(words[2], known))
    if words[0] in PROGRAMS:
        return PROGRAMS[words[0]](words[1:])
    return ""


def _argparse(parse: Callable[[list[str]], object], words: list[str]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parse(words)
    except SystemExit as end:
        return said.getvalue().strip().splitlines()[-1] if end.code else ""
    return ""


def _module(name: str, words: list[str]) -> str:
    """`python -m NAME …`: a job's parser, and of other modules that they exist."""
    if importlib.util.find_spec(name) is None:
        return f"no module {name}"
    if name.split(".")[0] != "jobs":
        return ""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", _parsed_only)
        return _argparse(module.main, words)


_parse_args = argparse.ArgumentParser.parse_args


def _parsed_only(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
    _parse_args(self, args, namespace)
    raise SystemExit(0)


def _cellray(words: list[str]) -> str:
    from jobs import cli

    return _argparse(cli._parser().parse_args, words)


def _click(root: click.Command, words: list[str]) -> str:
    """The arguments behind `--` are a command of their own."""
    at = words.index("--") if "--" in words else len(words)
    inner = words[at + 1 :]
    try:
        command, name, rest = root, str(root.name), words[:at]
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(click.Context(command), rest)
            assert found is not None
            command = found
        command.make_context(name, [*rest, *(["x"] if inner else [])])
    except click.exceptions.Exit:  # --help
        return ""
    except (click.ClickException, IndexError) as error:
        return str(error) or "which command?"
    return _command(inner, set()) if inner else ""


def _ray(words: list[str]) -> str:
    from ray.scripts.scripts import cli

    return _click(cli, words)


def _serve(words: list[str]) -> str:
    from ray.serve.scripts import cli

    return _click(cli, words)


def _make(words: list[str]) -> str:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    return "" if set(words) <= set(targets) else f"no target {words}, there are {targets}"


def _kubernetes(words: list[str]) -> str:
    plain, rest = list[str](), iter(words)
    for word in rest:
        option, _, value = word.partition("=")
        if not word.startswith("-"):
            plain.append(word)
        elif option not in OPTIONS or (value and not OPTIONS[option]):
            return f"{word} is no option that is used here"
        elif OPTIONS[option] and not value and next(rest, None) is None:
            return f"{word} needs a value"
    if plain[0] in ("repo", "install"):
        return ""
    asked = " ".join(plain[1:])
    if plain[0] not in KUBECTL or not re.match(f"(?:{KUBECTL[plain[0]]})(?: |$)", asked):
        return f"{plain} is unknown"
    return ""


def _docker(words: list[str]) -> str:
    return "" if words[0] in ("build", "push") else f"docker {words[0]}"


def _prometheus(words: list[str]) -> str:
    return "" if [word.split("=")[0] for word in words] == ["--config.file"] else f"{words}"


PROGRAMS: dict[str, Callable[[list[str]], str]] = {
    "cellray": _cellray, "ray": _ray, "serve": _serve, "make": _make, "kubectl": _kubernetes, "helm": _kubernetes,
    "docker": _docker, "prometheus": _prometheus,
}  # fmt: skip
