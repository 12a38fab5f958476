"""Publish an adapter or a checkpoint on the hub, with a card that says how it was made.

    python push.py runs/tiny/iter_3 --push OWNER/NAME --private
"""
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PureWindowsPath

from checkpoint import TOKENIZER_FILES, read_adapter, read_config, read_object, shards
from files import Lines, Parser, UserError, cli, printable

CARD = """---
library_name: {library}
{front}tags: [nanoseal, seal]
---
Made by nanoSEAL, a reimplementation of SEAL (arXiv:2506.10943). Base model: {where}.

{made}To open it with nanoSEAL: `python model.py {flags}`; with {library}: `{call}`.
"""
BASE = {"model", "base_model_name_or_path", "_name_or_path"}     # keys that name a base


def push(folder, name, private=False):
    """Upload an adapter's or a checkpoint's folder as OWNER/NAME, and a card in place of any there.
    Returns its address. UserError: name, folder or token won't do, or the hub refused."""
    sound = re.fullmatch(r"[A-Za-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?", name, re.ASCII)
    if not sound or len(name) > 96 or re.search(r"--|\.\.|\.git$", name):
        raise UserError(f"--push {name}: must look like OWNER/NAME, of letters, digits, - _ and .")
    paths, records = contents(Path(os.path.expanduser(folder)).resolve())
    text, note = card(name, records)
    # The folder is only read. A draft holds what is sent: no rollouts, no logs, nothing else.
    with tempfile.TemporaryDirectory() as draft:
        Path(draft, "README.md").write_text(text, encoding="utf-8")
        for path in paths:
            place(path, Path(draft, path.name))
        url = upload(draft, name, private)
    print(printable(f"pushed {', '.join(path.name for path in paths)} to {url}{note}"))
    return url


def contents(folder):
    """(files to send, {title: a record for the card}). UserError: neither kind, or damaged."""
    config, settings = folder / "adapter_config.json", folder.parent / "config.json"
    if config.is_file():
        read_adapter(folder)
        return [config, folder / "adapter_model.safetensors"], {"Adapter": read_object(config)}
    if not (folder / "config.json").is_file() or (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: neither an adapter (adapter_config.json) nor a checkpoint "
                        "(config.json, model.safetensors; of a run: its iter_N)")
    records = {"Architecture": read_config(folder)["raw"]}
    names = ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
    paths = [folder / name for name in names if (folder / name).is_file()]
    paths += [path for path, _ in shards(folder)]
    # A run's folder says how its iter_N was made, and what it is worth.
    if re.fullmatch(r"iter_\d+", folder.name) and settings.is_file():
        records = {"Made by `python outer_loop.py`, with these settings": read_object(settings)}
        for line in Lines(folder.parent / "metrics.jsonl", repair=False).records:
            if isinstance(line, dict) and line.get("iteration") == int(folder.name[5:]):
                records["Evaluation (eval_reward is the held-out reward)"] = line
    return paths, records


def place(path, to):
    """Put a file into the draft. JSON that names a path of this machine is copied without it."""
    if path.suffix == ".json" and path.name != "tokenizer.json":
        value = read_object(path)
        clean = {key: shown(value[key]) if key.endswith(("name_or_path", "_file")) else value[key]
                 for key in value}
        if clean != value:
            return to.write_text(json.dumps(clean, indent=2))
    try:
        to.symlink_to(path)     # weights are large
    except OSError:     # Windows, without the right to
        shutil.copy(path, to)


def upload(draft, name, private):
    """Send a folder; its address. UserError, without the token, if it can't be sent."""
    import huggingface_hub as hub   # here, as it takes a second
    if not hub.get_token():
        raise UserError("--push: no token of the hub is here; run `hf auth login`, and repeat")
    try:
        url = hub.HfApi().create_repo(name, private=private or None, exist_ok=True)
        # One that exists stays as it is, be it public.
        exposed = private and not hub.HfApi().model_info(name).private
        if not exposed:
            hub.HfApi().upload_folder(repo_id=name, folder_path=draft,
                                      allow_patterns=os.listdir(draft))
    except Exception as e:      # every transport has exceptions of its own
        why = re.sub(r"\bhf_\w+", "***", str(e).replace(hub.get_token(), "***"))
        raise UserError(f"--push {name}: the hub refused, or can't be reached ({type(e).__name__}: "
                        f"{' '.join(why.split()):.200}); try again, or `hf auth login` with a "
                        "token that may write there") from None
    if exposed:
        raise UserError(f"--private: {name} exists and is public; choose another name")
    return str(url)


def hub_id(name):
    """owner/name, if the name is one or a folder of the hub's cache. None for other folders."""
    name = re.sub(r".*\bmodels--([\w.-]+?)--([\w.-]+)[/\\]snapshots\b.*", r"\1/\2", name)
    sound = re.fullmatch(r"(?!(runs|data)/)\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    return name if sound and not os.path.exists(name) else None


def shown(value):
    """A value of others. Of a text that may be a path, the last name."""
    if isinstance(value, str) and re.search(r"[/\\]", value):
        return hub_id(value) or PureWindowsPath(value).name
    return value


def card(name, records):
    """(README.md, a note for the terminal). Of what files hold the card has a hub id, a name of
    safe letters, and JSON: ASCII, and no line of it can end a block of code."""
    made, base = "", ""
    for title, record in records.items():
        text = "\n".join(f"{json.dumps(key)}: {json.dumps(record[key])}" for key in record)
        text = re.sub(r'"(\\.|[^"\\])*"', lambda m: json.dumps(shown(json.loads(m[0]))), text)
        made += f"{title}:\n```json\n{text[:8000]}\n```\n\n"
        base = next((str(record[key]) for key in record if key in BASE and record[key]), base)
    # The hub links to base_model, so a folder of this machine is none.
    known, front, note = hub_id(base), "", ""
    word = known or re.sub(r"[^\w.-]", "_", shown(base))[:80] or "unknown"
    where = f"`{word}`, a folder of its author's" if base else "not recorded"
    if known:
        front, where = f'base_model: "{known}"\n', known
    library, flags = "transformers", f"--model {name}"
    call = f'AutoModelForCausalLM.from_pretrained("{name}")'
    if "Adapter" in records:
        library, flags = "peft", f"--model {word} --adapter FOLDER"
        call = f'PeftModel.from_pretrained(model, "{name}")'
        note = "" if known else f"; its base {word} is not there: PEFT, like us, needs its --model"
    return CARD.format(**locals()), note


def main():
    ap = Parser(description="Publish an adapter or a checkpoint on the hub.")
    ap.add_argument("folder", help="an adapter, a checkpoint, or a run's iter_N")
    ap.add_argument("--push", required=True, metavar="OWNER/NAME", help="where to")
    ap.add_argument("--private", action="store_true", help="for you alone, if it is new")
    args = ap.parse_args()
    push(args.folder, args.push, args.private)


if __name__ == "__main__":
    cli(main)
