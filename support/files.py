"""What everything else stands on: an error is one line, a file is whole or not there.

One way in: JSON is read by `read_json`. One way out: `cli` turns what can go wrong into a line, and
`printable` makes text of others fit for a terminal. What is kept is synced to the disk before it
counts.
"""
import argparse
import hashlib
import json
import os
import sys
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None


class UserError(Exception):
    """Something that the user can mend. Programs print its one line and no traceback."""


# ------------------------------------------------------------------------------- the way out

def cli(main):
    """Run a program's main function. What goes wrong outside the program is one line on stderr and
    exit status 1: a UserError, the system's errors, lack of memory, Ctrl-C."""
    # A terminal that lacks a character gets its number instead.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        stop(str(e))
    except KeyboardInterrupt:
        stop("interrupted; what a run has finished is in its folder, and the same command goes on")
    except BrokenPipeError:     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        stop(f"{e.filename or 'a file'}: {e.strerror or e}; what a run has finished is kept: mend "
             "it and repeat the command")
    except MemoryError:
        stop(NO_MEMORY)
    except Exception as e:
        # Names, as this file imports neither torch nor safetensors.
        kinds = {kind.__name__ for kind in type(e).__mro__}
        if "SafetensorError" in kinds:
            stop(f"{e}; what a run has finished is kept: mend it and repeat the command")
        if "OutOfMemoryError" in kinds or "can't allocate memory" in str(e):
            stop(NO_MEMORY)
        raise


NO_MEMORY = ("out of memory; what a run has finished is kept: repeat the command with --slots 1, "
             "--rows 8 or --recompute")


def stop(line):
    """End the program with one line on stderr."""
    sys.exit("error: " + printable(line))


def printable(text, most=2000) -> str:
    """What others wrote may hold anything; a terminal gets only what can be printed, and not all of
    a novel."""
    text = str(text)
    shown = text[:most] + (f"... ({len(text)} characters)" if len(text) > most else "")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in shown)


def at_interrupt(kind, value, trace):
    """Ctrl-C while modules are imported, before `cli` runs."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


sys.excepthook = at_interrupt


# ------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """An argument that is wrong is one line, without the usage of all others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {printable(message)} (-h explains)", file=sys.stderr)
        sys.exit(2)


def at_least(low):
    """A type for add_argument: a whole number, `low` or more."""
    def number(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more")
        return value
    return number


positive = at_least(1)


# ------------------------------------------------------------------------------- files

def read_text(path) -> str:
    """The content of a text file. UserError if it is missing or no text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (UnicodeDecodeError, OSError) as e:
        raise UserError(f"{path}: not readable as text ({e})") from None


def read_json(path):
    """The content of a JSON file. UserError if it is missing, no JSON, or no valid Unicode."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        # "\ud800" is legal JSON and no character: it could never be written again.
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None


def replace_file(path, text):
    """Write a text file whole or not at all: beside it first, on the disk, then renamed."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as f:
        f.write(text)
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def sync(path):
    """Until a file, or a folder's list of names, is on the disk: a power cut then leaves it."""
    if Path(path).is_dir() and os.name == "nt":
        return      # Windows has no such thing
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:     # some network file systems can't
        pass
    finally:
        os.close(handle)


def fingerprint(*parts) -> str:
    """A short hash of texts, bytes and files (Path)."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:16]


HELD = weakref.WeakValueDictionary()    # {folder: its lock} that this process holds


def lock(folder):
    """This folder is this process's as long as the result lives. UserError if it is another's."""
    name = str(Path(folder).resolve())
    if fcntl is None or name in HELD:
        return HELD.get(name)
    handle = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}; wait for it, or name another "
                        "folder") from None
    except OSError:     # a file system without locks
        pass
    HELD[name] = handle
    return handle


# ------------------------------------------------------------------------------- JSON lines

def as_lines(records) -> str:
    """A line of JSON for each record."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
                   for record in records)


class Lines:
    """A JSON-lines file that survives a kill: a torn last line is dropped, whole ones are kept.

    A reader (repair False) drops it in memory only, as another process may be writing it."""

    def __init__(self, path, repair=True):
        self.path = Path(path)
        self.records = []
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        if whole != data and repair:
            torn = len(data) - len(whole)
            print(f"{printable(self.path)}: its last line was cut short ({torn} bytes); dropped")
            replace_file(self.path, whole.decode(errors="replace"))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.check(record)
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise UserError(f"{self.path}, line {number}: not a record of a run ({e}); restore "
                                "it, or delete the lines from there on and repeat the command"
                                ) from None
            self.records.append(record)

    def check(self, record):
        """ValueError, KeyError or TypeError if this is no record of this file. All are, here."""

    def add(self, *records):
        if not records:
            return
        text = as_lines(records)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        self.records += records
