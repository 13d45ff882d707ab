"""What a command prints for people: fitted to a terminal, and in whole lines for whoever else reads it."""

from rich.console import Console, RenderableType

UNBOUNDED = 10_000  # columns


def show(part: RenderableType) -> None:
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(part)
        return
    console = Console(highlight=False, force_terminal=False, width=UNBOUNDED)
    with console.capture() as text:
        console.print(part)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))
