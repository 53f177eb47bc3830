"""The interactive shell, as virsh has: `kvik # `, history, completion, `;` between commands."""

from __future__ import annotations

import os

from kvik.cli.context import Quit
from kvik.cli.options import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvik.cli.context import Context

HISTORY_LINES = 500


def split(line: str) -> list[list[str]]:
    """Commands of one line, each a list of words. Quotes and backslashes as in virsh, `;` and newline part commands."""
    commands: list[list[str]] = []
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    index = 0
    while index < len(line):
        char = line[index]
        index += 1
        if quote:
            if char == quote:
                quote = ""
            elif char == "\\" and quote == '"' and index < len(line):
                word = [*(word or []), line[index]]
                index += 1
            else:
                word = [*(word or []), char]
        elif char in "'\"":
            quote = char
            word = word if word is not None else []
        elif char == "\\" and index < len(line):
            word = [*(word or []), line[index]]
            index += 1
        elif char == "#" and word is None:
            while index < len(line) and line[index] != "\n":
                index += 1
        elif char in " \t;\n":
            if word is not None:
                words.append("".join(word))
                word = None
            if char in ";\n" and words:
                commands.append(words)
                words = []
        else:
            word = [*(word or []), char]
    if quote:
        raise UsageError("missing closing quote")
    if word is not None:
        words.append("".join(word))
    return [*commands, words] if words else commands


class Shell:
    def __init__(self, context: Context) -> None:
        self.context = context

    def run_line(self, line: str) -> int:
        """Run the commands of one line until one fails; the exit code of the last that ran."""
        from kvik.cli.main import run_verb

        try:
            commands = split(line)
        except UsageError as error:
            self.context.doing = ""
            self.context.error(error)
            return 1
        code = 0
        for words in commands:
            code = run_verb(self.context, words)
            if code:
                break
        return code

    def loop(self) -> int:
        """Read and run lines until `quit` or end of file."""
        from kvik.cli import term

        context = self.context
        context.interactive = term.is_terminal(context.stdin)
        if context.interactive:
            self._readline()
            if not context.quiet:
                context.write(
                    "Welcome to kvik, the virtualization interactive terminal.\n\n"
                    "Type:  'help' for help with commands\n       'quit' to quit\n\n"
                )
        code = 0
        try:
            while True:
                try:
                    line = self._read()
                except EOFError:
                    if context.interactive:
                        context.write("\n")
                    return code if not context.interactive else 0
                except KeyboardInterrupt:
                    context.write("\n")
                    continue
                if not line.strip():
                    continue
                try:
                    code = self.run_line(line)
                except KeyboardInterrupt:
                    context.write("\n")
        except Quit:
            return 0
        finally:
            if context.interactive:
                self._save_history()

    def _read(self) -> str:
        context = self.context
        if context.interactive:
            # libvirt's sign: '#' may change things, '>' may not
            return input("kvik > " if context.readonly else "kvik # ")
        line = context.stdin.readline()
        if not line:
            raise EOFError
        return line

    # readline

    def _history_path(self) -> str:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not base.startswith("/"):
            base = os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118 - start-up time
        return os.path.join(base, "kvik", "history")  # noqa: PTH118

    def _readline(self) -> None:
        import readline

        path = self._history_path()
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
            readline.read_history_file(path)
        except OSError:
            pass
        readline.set_history_length(HISTORY_LINES)
        readline.set_completer_delims(" \t\n;")
        readline.set_completer(self._complete)
        readline.parse_and_bind("tab: complete")

    def _save_history(self) -> None:
        import readline

        try:
            readline.write_history_file(self._history_path())
        except OSError:
            pass

    def _complete(self, text: str, state: int) -> str | None:
        if state == 0:
            import readline

            self._found = self.candidates(readline.get_line_buffer()[: readline.get_endidx()])
        return self._found[state] if state < len(self._found) else None

    def candidates(self, line: str) -> list[str]:
        """What could stand at the end of `line`."""
        from kvik.cli import completion

        line = line.rsplit(";", 1)[-1]
        words = line.split()
        if not words or line[-1:].isspace():
            words.append("")
        try:
            found = completion.complete(words, self.context)
        except Exception:  # an exception in a readline callback would only be printed amid the line
            return []
        if found and found[0][0] == completion.FILES:
            from glob import glob

            return sorted(path + ("/" if os.path.isdir(path) else "") for path in glob(words[-1] + "*"))  # noqa: PTH112, PTH207
        return [name for name, _ in found]
