"""Options that take several values in a row: `--data one.txt two.txt` is `--data one.txt --data two.txt`."""

from collections.abc import Callable, Iterable

from typer.core import TyperCommand

from hf_moe.errors import UsageError

SPREAD = ("--data", "--domains", "--texts")


class SpreadCommand(TyperCommand):
    """A command whose `SPREAD` options take every value up to the next option."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, spread(args))


def spread(args: Iterable[str]) -> list[str]:
    """The option's name before each of its values."""
    made: list[str] = []
    name, fresh = "", False
    for argument in args:
        if argument.startswith("-"):
            name, fresh = argument if argument in SPREAD else "", True
        elif name and not fresh:
            made.append(name)
        else:
            fresh = False
        made.append(argument)
    return made


def named_files(
    pairs: Iterable[str], option: str = "--domains", split: Callable[[str, str], tuple[str, str, str]] = str.partition
) -> dict[str, str]:
    """NAME=FILE, each, as a mapping; with `split` str.rpartition, names may hold "=".

    Raises:
        UsageError: where one is not of this form, or a name stands twice.
    """
    made: dict[str, str] = {}
    for pair in pairs:
        name, equals, file = split(pair, "=")
        if not (name.strip() and equals and file):
            raise UsageError(f"{option} {pair}: should be NAME=FILE, such as law=law.txt.")
        if name in made:
            raise UsageError(f"{option} {pair}: {name!r} stands twice; put its texts in one file.")
        made[name] = file
    return made
