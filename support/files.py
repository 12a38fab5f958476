"""What everything else stands on: an error is one line, a file is whole or not there.

One way in: JSON is read by `read_json`. One way out: `cli` turns what can go wrong into a line, and
`printable` makes text of others fit for a terminal. What is kept is synced to the disk before it
counts.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. Programs print its one line and no traceback."""


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
        return
    except BrokenPipeError:     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as e:
        # Names, as this file imports neither torch nor safetensors.
        kinds = {kind.__name__ for kind in type(e).__mro__}
        line = str(e)
        advice = "repeat the command to go on"
        if "KeyboardInterrupt" in kinds:
            line = "interrupted"
        elif kinds & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in line:
            line = "out of memory"
            advice = "repeat the command with --slots 1, --rows 8 or --recompute"
        elif "OSError" in kinds and e.filename:
            line = f"{e.filename}: {e.strerror}"
        elif not kinds & {"UserError", "OSError", "SafetensorError"}:
            raise
        # A UserError says itself what to do. (A run is held as long as the error is.)
        if HELD and "UserError" not in kinds:
            line += f"; what a run has finished is kept: {advice}"
        sys.exit("error: " + " ".join(printable(line).split("\n")))


def printable(text, most=2000) -> str:
    """What others wrote may hold anything; a terminal gets only what can be printed, and not all of
    a novel."""
    text = str(text)
    shown = text[:most] + (f"... ({len(text)} characters)" if len(text) > most else "")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in shown)


class Parser(argparse.ArgumentParser):
    """An argument that is wrong is one line, without the usage of all others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, *args, **kwargs):
        """What is to be written when the work is done is tried before it."""
        found = super().parse_args(*args, **kwargs)
        for name in ("out", "save", "svg"):
            path = getattr(found, name, None)
            try:
                if path:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    tempfile.TemporaryFile(dir=Path(path).parent).close()
            except OSError as e:
                raise UserError(f"--{name} {path}: can't be written ({e.strerror})") from None
        return found

    def error(self, message):
        print(f"error: {printable(message)} (-h explains)", file=sys.stderr)
        sys.exit(2)


def at_least(low, most=10 ** 6):
    """A type for add_argument: a whole number from `low` to `most`, as work must have bounds."""
    def number(text):
        value = int(text)
        if not low <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {low} or more, at most {most}")
        return value
    return number


positive = at_least(1)


# ------------------------------------------------------------------------------- files

def read_text(path) -> str:
    """The content of a text file. UserError if it is missing or no text."""
    try:
        # A pipe that nobody writes to, or a device, would never end.
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: not a file (a folder, a pipe or a device); save it to a file")
        # A byte-order mark is no text.
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as text ({e})") from None


def read_json(path, kind=None):
    """The content of a JSON file. UserError if it is missing, no JSON, no valid Unicode, or not of
    a kind (see FIELDS)."""
    text = read_text(path)
    try:
        value = json.loads(text)
        # "\ud800" is legal JSON and no character: it could never be written again.
        json.dumps(value, ensure_ascii=False).encode()
        if kind is not None:
            check(value, kind)
        return value
    except (ValueError, RecursionError) as e:
        hint = "; are these JSON lines? make them one list" if "Extra data" in str(e) else ""
        raise UserError(f"{path}: not readable as JSON of its kind ({e}{hint})") from None


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
    handle = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):      # some network file systems can't
        os.fsync(handle)
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
    if name in HELD:
        return HELD[name]
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


# ------------------------------------------------------------------------------- what is read back

PLACE = {"iteration": int, "split": str, "arm?": str, "task": int, "edit": int}
# A file's records by its name: the types of their fields. [kind] is a list, (kind,) may be null,
# {str: kind} has any names, a field with a "?" may be missing. Other fields are not looked at.
FIELDS = {
    "config": {"command?": [str], "own?": {}, "content?": {str: str}, "code?": {str: str},
               "program?": str},
    "edits": PLACE | {"text": str, "token_ids": [int], "made?": str},
    "rollouts": PLACE | {
        "title": str, "reward": float, "unadapted": float, "text": str, "token_ids": [int],
        "documents": int, "questions": [str], "gold": [str], "answers": [[str]], "right": [[bool]],
        "losses": [[(float,)]], "cut": int, "replies": int, "seconds": float, "note": str,
        "context?": str, "kinds?": [str], "forms?": [(str,)], "weight?": float, "made?": str},
    "metrics": {
        "iteration": int, "eval_reward": float, "eval_ci": [float], "eval_by_kind": {str: float},
        "eval_unadapted": float, "eval_tasks": int, "train_reward": (float,),
        "baselines": [{"name": str, "reward": float, "by_kind": {str: float}}],
        "made_of": {str: float}, "seconds": float},
    "cpt": {"row": str, "right": [[[bool]]], "documents": int, "tokens": int, "seconds": float},
    "continual": {"edit": int, "accuracy": [[float]]},
    "credit": {"title": str, "iteration": int, "documents": [str], "questions": [str],
               "gold": [str], "credit": [[float]]}}
COUNTED = {"metrics": "iteration", "continual": "edit"}     # a field that counts lines from 0
WORDS = {int: "a whole number, 0 or more", float: "a number", str: "a text",
         bool: "true or false", list: "a list", dict: "an object"}


def check(value, kind, name="it"):
    """ValueError if a value of a JSON file is not what `kind` says (see FIELDS)."""
    if isinstance(kind, tuple):
        return value is None or check(value, *kind, name)
    base = kind if isinstance(kind, type) else type(kind)
    # `type`, not isinstance: in Python true is an int. NaN and what is huge are no numbers here.
    fits = type(value) is base or base is float and type(value) is int
    if fits and base in (int, float):
        low = 0 if base is int else -2 ** 53
        fits = low <= value < 2 ** 53
    if not fits:
        raise ValueError(f"{name} must be {WORDS[base]}")
    if base is list:
        name = f"each item of {name}"
        for item in value:
            check(item, *kind, name)
    elif base is dict and str in kind:
        check(list(value.values()), [kind[str]], name)
    elif base is dict:
        for field, own in kind.items():
            key = field.strip("?")
            if key in value:
                check(value[key], own, repr(key))
            elif key == field:
                raise ValueError(f"{key!r} is missing")


def as_json(value, **form) -> str:
    """JSON without NaN and infinity, which it does not know: they are null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, ensure_ascii=False, **form)


def as_lines(records) -> str:
    """A line of JSON for each record."""
    return "".join(as_json(record) + "\n" for record in records)


class Lines:
    """A JSON-lines file that survives a kill: a torn last line is dropped. A reader (repair False)
    drops it in memory only, as another process may be writing it."""

    def __init__(self, path, repair=True):
        self.path = Path(path)
        self.records = []
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]
        if whole != data and repair:
            print(f"{printable(self.path)}: its last line was cut short, and is dropped")
            replace_file(self.path, whole.decode(errors="replace"))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.check(record)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{self.path}, line {number}: not a record of a run ({e}); restore "
                                "it, or delete all lines from there on") from None
            self.records.append(record)

    def check(self, record):
        """ValueError if this is no record of this file, or not the next one."""
        name = self.path.name.split(".")[0]
        if name in FIELDS:
            check(record, FIELDS[name])
        number = COUNTED.get(name)
        if number and record[number] != len(self.records):
            raise ValueError(f"{number} {record[number]} after {len(self.records)} lines")

    def add(self, *records):
        if not records:
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(as_lines(records))
            f.flush()
            os.fsync(f.fileno())
        self.records += records
