"""Checkpoint folders and files: found, read, written; errors that the user can mend."""
import json
import os
import re
import sys
from pathlib import Path


class UserError(Exception):
    """Something the user can mend; programs print its one line and no traceback."""


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None


def fetch(name_or_path):
    """A local folder as it is, or a hub id (owner/name): its config, tokenizer and safetensors."""
    if (path := Path(name_or_path).expanduser()).is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise UserError(f"{name_or_path}: no such folder (a hub id looks like owner/name)")
    import huggingface_hub as hub
    wanted = ["config.json", "model*.safetensors*", *TOKENIZER_FILES]
    try:
        return Path(hub.snapshot_download(name_or_path, allow_patterns=wanted))
    except hub.errors.GatedRepoError:
        problem = "it is gated: accept its licence on its hub page, then run `hf auth login`"
    except hub.errors.RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub"
    except Exception as e:  # every transport has its own exceptions
        why = (str(e).strip().splitlines() or [""])[0][:150]
        problem = f"no such folder, and the hub can't be reached ({type(e).__name__}: {why})"
    raise UserError(f"{name_or_path}: {problem}")


def replace_file(path, text):
    """Write beside and rename: the file is there whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def cli(main):
    """Run a program's main; what the user can mend is one line on stderr, with no traceback."""
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
