"""Self-edits that choose: a JSON object of tools that make the data, and of hyper-parameters.

    {"data_generation": {tool: true or false, ...}, "training": {"learning_rate": 0.001, ...}}

Paper, section 3.2. One reader and one writer for all domains: a domain has its own Form. Puzzles
choose so (data/arc.py), and passages with --directives (data/study.py).
"""
import json
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A value that a self-edit chooses: a directive, and which values in JSON are accepted."""
    directive: str
    kind: type                      # str, int or float
    among: dict | tuple = ()        # these; of a dict the directive has the item
    low: float = 0                  # or, without them, from low to high
    high: float = 0

    def read(self, key: str, value):
        """The directive's value. ValueError: it is not accepted."""
        # `type`, not isinstance: in Python a bool is an int. JSON may write a float as 1.
        of_its_type = type(value) is self.kind or self.kind is float and type(value) is int
        if self.among:
            if not of_its_type or value not in self.among:
                raise ValueError(f"{key} must be {' or '.join(map(str, self.among))}")
            return self.among[value] if isinstance(self.among, dict) else self.kind(value)
        if not of_its_type or not self.low <= value <= self.high:
            what = "a number" if self.kind is float else "a whole number"
            raise ValueError(f"{key} must be {what} from {self.low:g} to {self.high:g}")
        return self.kind(value)


@dataclass(frozen=True)
class Form:
    """What a self-edit chooses, as a JSON object: tools to turn on, and values of its training."""
    tools: dict[str, str]           # key in JSON -> tool
    training: dict[str, Choice]     # key in JSON -> what is chosen


def read_choices(text: str, form: Form) -> tuple[list[str], dict]:
    """A self-edit of this form -> (tools, directives).

    ValueError: why it isn't one. The text must be exactly this object: no text around it, no key
    missing, unknown or repeated, and each value of its type and among those that are accepted."""
    try:
        whole = json.loads(text, object_pairs_hook=dict_without_duplicates)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at character {e.pos}") from None
    except RecursionError:
        raise ValueError("not JSON, or too deep") from None
    data, training = values_of(whole, ["data_generation", "training"], "the self-edit")
    chosen = values_of(data, form.tools, "data_generation")
    values = values_of(training, form.training, "training")
    if any(type(on) is not bool for on in chosen):
        raise ValueError("a tool must be true or false")
    tools = [tool for tool, on in zip(form.tools.values(), chosen) if on]
    directives = {}
    for (key, choice), value in zip(form.training.items(), values):
        directives[choice.directive] = choice.read(key, value)
    return tools, directives


def write_choices(form: Form, tools, directives: dict) -> str:
    """The JSON text of these choices: the inverse of read_choices."""
    training = {}
    for key, choice in form.training.items():
        value = directives[choice.directive]
        if isinstance(choice.among, dict):
            value = next(word for word, item in choice.among.items() if item == value)
        training[key] = value
    switches = {key: tool in tools for key, tool in form.tools.items()}
    return json.dumps({"data_generation": switches, "training": training})


def dict_without_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def values_of(thing, keys, where):
    """The values of an object that has exactly these keys."""
    if not isinstance(thing, dict) or thing.keys() != set(keys):
        raise ValueError(f"{where} must be an object with the keys {', '.join(keys)}")
    return [thing[key] for key in keys]


def describe(tasks, edits) -> dict[str, float]:
    """{choice: share of the self-edits that make it}, for the statistics."""
    chosen, n = Counter(), 0
    for row in edits:
        for edit in row:
            n += 1
            chosen.update(edit.tools)
            for name, value in edit.directives.items():
                if value is True:
                    chosen[name] += 1
                elif value is not False:
                    chosen[f"{name} {value}"] += 1
    return {choice: count / n for choice, count in chosen.most_common()}
