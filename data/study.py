"""How to study a passage: self-edits that choose, as those of puzzles do (--directives).

    python -m data.study    # what a model reads, and the documents that each tool makes of it

Paper, abstract and section 2: a self-edit may set hyper-parameters and invoke tools that make the
data. The paper has such self-edits of puzzles only. Here a self-edit of a passage names the tools
that make documents of it, the learning rate, the epochs, and the documents of a step. The model
writes none of the documents, so a self-edit is as true as its passage. With --own-text PROMPT it
may write some: then one more tool is the model itself, asked by that prompt.
"""
import random
from dataclasses import replace
from pathlib import Path

from data import knowledge
from data.choices import Choice, Form, read_choices, write_choices
from data.text import sentences
from selfedit import EMPTY, STUDY_PROMPT, SelfEdit, Task, fill, seed_for
from support.files import Parser, cli

# tool -> the texts that it makes
TOOLS = {"passage": "the passage", "sentences": "each sentence",
         "titled_sentences": "each sentence after the title",
         "windows": "each two neighbouring sentences after the title"}
OWN_TEXT = {"own_text": "what you write of it"}
FORM = Form(
    tools={f"use_{tool}": tool for tool in TOOLS},
    training={"learning_rate": Choice("lr", float, (0.0003, 0.001, 0.002, 0.005)),
              "num_train_epochs": Choice("epochs", int, (2, 5, 10)),
              "batch_size": Choice("batch", int, (1, 4, 16))})
WITH_OWN_TEXT = replace(FORM, tools=FORM.tools | {f"use_{tool}": tool for tool in OWN_TEXT})


def documents(title: str, passage: str, tools) -> list[str]:
    """What the chosen tools make of a passage, each text once.

    A passage of n sentences has at most 3 n documents, so what can be asked for is bounded."""
    pieces = sentences(passage)
    titled = [f"{title}\n{piece}" for piece in pieces]
    # Two neighbours see what one sentence lacks: whom its pronoun means.
    windows = [f"{title}\n{first} {second}" for first, second in zip(pieces, pieces[1:])]
    made = {"passage": [f"{title}\n{passage}"], "sentences": pieces, "titled_sentences": titled,
            "windows": windows or titled}
    return list(dict.fromkeys(text for tool in tools if tool in made for text in made[tool]))


def random_edit(rng: random.Random, form=FORM) -> str:
    """Valid choices: one or two tools, and each value, drawn uniformly."""
    tools = rng.sample(list(form.tools.values()), rng.randint(1, 2))
    directives = {}
    for choice in form.training.values():
        directives[choice.directive] = rng.choice(choice.among)
    return write_choices(form, tools, directives)


VALUES = "; ".join(f"{key} {', '.join(map(str, choice.among))}"
                   for key, choice in FORM.training.items())


def directed(task: Task, own="") -> Task:
    """The same passage, of which a self-edit chooses how it is studied. own: a prompt, by which the
    model may write of the passage, too."""
    passage = task.context[0].removeprefix(f"{task.name}\n")
    form, tools = (WITH_OWN_TEXT, TOOLS | OWN_TEXT) if own else (FORM, TOOLS)
    # The example differs from passage to passage, so that no choice is favoured.
    example = random_edit(random.Random(seed_for("example", task.context[0])), form)

    def read(text):
        chosen, directives = read_choices(text, form)
        if not chosen:
            raise ValueError(EMPTY)
        return SelfEdit(documents=documents(task.name, passage, chosen), directives=directives,
                        tools=chosen, asks="own_text" in chosen)

    listed = "\n".join(f"use_{tool}: {what}" for tool, what in tools.items())
    prompt = STUDY_PROMPT.format(context=task.context[0], tools=listed, values=VALUES,
                                 example=example)
    own_prompt = fill(own, task.name, passage) if own else ""
    return replace(task, prompt=prompt, read=read, own_prompt=own_prompt)


def main():
    Parser(description="Print what a model reads, and documents by each tool.").parse_args()
    task = directed(knowledge.load(Path(__file__).with_name("example_eval.json"))[0])
    print(task.prompt)
    for key, tool in FORM.tools.items():
        directives = {choice.directive: choice.among[0] for choice in FORM.training.values()}
        print(f"--- {key}")
        for document in task.read(write_choices(FORM, [tool], directives)).documents:
            print(repr(document))


if __name__ == "__main__":
    cli(main)
