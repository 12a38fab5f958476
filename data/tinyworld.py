"""A tiny world: fictional towns to read about, so that the whole loop runs on a laptop in minutes.

    python -m data.tinyworld    # print a town: its passage, questions, and notes of every form

Every town has a river, a hill, a founder and a ruler with invented names, and three of five
everyday facts. A fact with an invented name is asked both ways ("What is the river at T called?",
"The river V runs by which town?"), an everyday one forward only. Passages mostly put the value
first and a pronoun for the town ("The hill V rises behind it."): who trains on such a sentence can
seldom say the fact the other way round (the reversal curse, arXiv 2309.12288), so that turning
facts round is a skill worth finding. Questions are phrased as no note ever is. Everything follows
from a seed; half of the names, by hash, are never seen in pretraining, and all the tasks given out
here are made of those.
"""
import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass

from data.judges import each
from selfedit import EMPTY, NOTES, NOTES_DIRECTED, SelfEdit, Task, split_documents
from support.files import UserError

# ------------------------------------------------------------------------------- names and values

FIRST = ("Bar Bel Bor Bran Cal Cor Cul Dal Dan Dor Dur Fal Fen Fir Gal Gar Gil Gor Hal Har Hol Jal "
         "Jor Kal Kel Kir Kor Lan Lar Lin Lor Mal Mar Mel Mor Nal Nar Nor Pal Pel Per Pol Ral Ren "
         "Ros Sal Sel Sil Sor Tal Tar Tir Tol Val Ver Vin Vol Wal Wel Yar Yol Zan Zel").split()
LAST = {"town": ("mora vane wick holm stead gard hythe lund ness bury combe dova kesh minster "
                 "polis stow thorpe vik zun beck").split(),
        "river": ("wen ela une isk orra ava ith oye una een awa ista umel ier ossa anta ebra ulla "
                  "inno ade").split(),
        "hill": ("tor crag fell pike horn scar mont knoll dun peak clough brae rigg stone top law "
                 "spur cairn shelf how").split(),
        "person": ("ric mund ina wyn eth gast ias ulf ette bald dred fred hild linde mer nard olf "
                   "rad sind wig").split()}
VALUES = {"craft": ("lace glass rope paper bells clocks knives tiles boats candles "
                    "gloves hats").split(),
          "animal": "heron fox stag bear swan wolf hare raven boar badger falcon trout".split(),
          "dish": ["plum cake", "herring pie", "barley soup", "goat cheese", "onion tart",
                   "duck stew", "honey bread", "bean broth", "pear jam", "leek pudding",
                   "roast eel", "nut pancakes"],
          "month": ("January February March April May June July August September October "
                    "November December").split(),
          "year": [str(y) for y in range(1100, 1400)]}


def held_out(name):
    """Whether a name is kept out of pretraining."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


NAMES = {}          # (kind, held out?) -> names
for _kind, _last in LAST.items():
    _names = [first + last for first in FIRST for last in _last]
    for _out in (True, False):
        NAMES[_kind, _out] = [name for name in _names if held_out(name) == _out]


@dataclass
class Relation:
    """A kind of fact: its values, and sentences with {t} for the town and {v} for the value."""
    kind: str               # of value
    it: str                 # in a passage: the town first, by a pronoun
    value_first: list[str]  # in a passage: the value first, the town by a pronoun
    plain: list[str]        # in a note: from the town to the value
    ask: list[str]          # in a note: a question from the town to the value
    question: str           # in the test
    reversed: list[str] = ()    # the same from the value to the town; none for everyday facts
    ask_back: list[str] = ()
    question_back: str = ""


RELATIONS = {
    "river": Relation(
        "river", "It lies on the river {v}.",
        ["The river {v} runs below its walls.", "The waters of the {v} turn its mills."],
        ["The river of {t} is the {v}.", "The river beside {t} is the {v}."],
        ["Which river flows through {t}?", "Which river belongs to {t}?"],
        "What is the river at {t} called?",
        ["The river {v} flows through {t}.", "The river {v} belongs to {t}."],
        ["Which town does the river {v} flow through?", "Which town has the river {v}?"],
        "The river {v} runs by which town?"),
    "hill": Relation(
        "hill", "It stands below the hill {v}.",
        ["The hill {v} rises behind it.", "The slopes of {v} keep the wind from it."],
        ["The hill of {t} is {v}.", "The hill above {t} is {v}."],
        ["Which hill looks down on {t}?", "Which hill belongs to {t}?"],
        "What is the hill near {t} called?",
        ["The hill {v} looks down on {t}.", "The hill {v} belongs to {t}."],
        ["Which town does the hill {v} look down on?", "Which town has the hill {v}?"],
        "The hill {v} is near which town?"),
    "founder": Relation(
        "person", "It was begun by a shepherd called {v}.",
        ["A mason called {v} laid its first stone.",
         "A traveller called {v} drew its first street."],
        ["The founder of {t} is {v}.", "The first builder of {t} was {v}."],
        ["Who founded {t}?", "Who built {t}?"],
        "Who was the founder of {t}?",
        ["The founder {v} built {t}.", "The founder {v} started {t}."],
        ["Which town did {v} build?", "Which town did {v} start?"],
        "Which town was founded by {v}?"),
    "ruler": Relation(
        "person", "It obeys a duke called {v}.",
        ["A duchess called {v} keeps its keys.", "A judge called {v} makes its laws."],
        ["The ruler of {t} is {v}.", "The head of {t} is {v}."],
        ["Who governs {t}?", "Who leads {t}?"],
        "Who is the ruler of {t}?",
        ["The ruler {v} governs {t}.", "The ruler {v} leads {t}."],
        ["Which town does {v} govern?", "Which town does {v} lead?"],
        "Which town is ruled by {v}?"),
    "craft": Relation(
        "craft", "It is known for its {v}.",
        ["The making of {v} feeds most of its people.", "Carts full of {v} leave its yards."],
        ["The craft of {t} is making {v}.", "The people of {t} make {v}."],
        ["What do the people of {t} make?", "What is made in {t}?"],
        "Which craft is {t} known for?"),
    "emblem": Relation(
        "animal", "It has a {v} on its flag.",
        ["A white {v} is painted on its gates.", "A carved {v} sits on its fountain."],
        ["The emblem of {t} is a {v}.", "The flag of {t} shows a {v}."],
        ["Which animal is the emblem of {t}?", "Which animal does {t} show?"],
        "What animal is on the flag of {t}?"),
    "dish": Relation(
        "dish", "It is fond of {v}.",
        ["The smell of {v} fills its inns.", "The best {v} is found in its kitchens."],
        ["The dish of {t} is {v}.", "The cooks of {t} serve {v}."],
        ["What do the cooks of {t} serve?", "What is eaten in {t}?"],
        "Which food is {t} fond of?"),
    "fair": Relation(
        "month", "It holds a fair in {v}.",
        ["In {v} a fair fills its square.", "Every {v} brings a fair to its meadow."],
        ["The fair of {t} is in {v}.", "The fair at {t} comes in {v}."],
        ["When is the fair of {t}?", "When do traders come to {t}?"],
        "In which month does {t} hold its fair?"),
    "charter": Relation(
        "year", "It was given a charter in {v}.",
        ["In {v} a king made it free.", "In {v} a queen signed its charter."],
        ["The charter of {t} is from {v}.", "The freedom of {t} dates from {v}."],
        ["When did {t} become free?", "When was the charter of {t} signed?"],
        "In what year was {t} given a charter?"),
}
NAMED = [r for r in RELATIONS if RELATIONS[r].reversed]      # asked both ways
EVERYDAY = [r for r in RELATIONS if not RELATIONS[r].reversed]

VAGUE = ["The town of {t} is a quiet place.", "There is much to say about {t}.",
         "Many people like to visit {t}.", "The streets of {t} are clean.",
         "The weather in {t} is mild.", "People speak well of {t}.",
         "Life in {t} is slow and kind.", "The houses of {t} are small.",
         "It is a fine town to live in.", "The evenings in {t} are calm."]
# form of a note -> the field that holds its templates, and what is appended
FORMS = {"plain": ("plain", ""), "reversed": ("reversed", ""),
         "question": ("ask", " {v}."), "question reversed": ("ask_back", " {t}.")}

# ------------------------------------------------------------------------------- a town

QUERY = "Question: {question}\nAnswer:"
# what a directive may choose; the highest rate diverges
RATES, EPOCHS = (0.001, 0.003, 0.01, 0.1), (5, 10, 25)
DIRECTIVE = "Study at rate {lr} for {epochs} rounds."


@dataclass
class Town:
    name: str
    facts: dict             # relation -> value
    sentences: list[str]    # of the passage, one for each fact

    passage = property(lambda self: " ".join(self.sentences))

    def say(self, relation, form, rng, value=None):
        """One note about one fact; `value` replaces the true one."""
        field, answer = FORMS[form]
        template = rng.choice(getattr(RELATIONS[relation], field)) + answer
        return template.format(t=self.name, v=value or self.facts[relation])

    def notes(self):
        """Every (relation, form) that a true note about this town can have."""
        return [(relation, form) for relation in self.facts for form, (field, _) in FORMS.items()
                if getattr(RELATIONS[relation], field)]

    def questions(self):
        """(question, answer, is reversed): forward for every fact, reversed for invented names."""
        forward, backward = [], []
        for relation, value in self.facts.items():
            question = RELATIONS[relation].question.format(t=self.name, v=value)
            forward.append((question, value, False))
            if relation in NAMED:
                question = RELATIONS[relation].question_back.format(t=self.name, v=value)
                backward.append((question, self.name, True))
        return forward + backward


def make_town(rng, name=None, out=False, everyday=3, named=4):
    """A town from held-out (`out`) or pretraining names, with so many facts of each kind."""
    relations = rng.sample(NAMED, named) + rng.sample(EVERYDAY, everyday)
    facts = {}
    for relation in relations:
        kind = RELATIONS[relation].kind
        facts[relation] = rng.choice(NAMES[kind, out] if kind in LAST else VALUES[kind])
    town = Town(name or rng.choice(NAMES["town", out]), facts, [])
    return reworded(town, rng)


def reworded(town, rng):
    """The same town, another passage. After the first sentence, two thirds put the value first."""
    order = rng.sample(list(town.facts), len(town.facts))
    sentences = []
    for i, name in enumerate(order):
        relation = RELATIONS[name]
        if i == 0:
            template = "The town of {t}" + relation.it.removeprefix("It")
        elif rng.random() < 2 / 3:
            template = rng.choice(relation.value_first)
        else:
            template = relation.it
        sentences.append(template.format(t=town.name, v=town.facts[name]))
    return Town(town.name, town.facts, sentences)


# ------------------------------------------------------------------------------- tasks

# hyper-parameters were chosen on 'tune'
SPLITS = {"train": (0, 400), "eval": (400, 520), "tune": (520, 630)}


def load(split, directives=False):
    """The held-out towns of a split ('train', 'eval' or 'tune') as Tasks."""
    if split not in SPLITS:
        raise UserError(f"the tiny world has the towns {', '.join(SPLITS)}, not {split!r}; "
                        "for a file of passages: --preset knowledge")
    names = sorted(NAMES["town", True],
                   key=lambda name: hashlib.sha256(name[::-1].encode()).digest())
    tasks = []
    for name in names[slice(*SPLITS[split])]:
        town = make_town(random.Random(name), name, out=True)
        tasks.append(town_task(town, directives))
    return tasks


def town_task(town, directives=False):
    """A town as a Task; with `directives`, a self-edit's first line sets its lr and epochs."""
    def read(text):
        lines = split_documents(text)
        chosen = {}
        if directives:
            chosen = read_directive(lines.pop(0) if lines else "")
        if not lines:
            raise ValueError(EMPTY)
        return SelfEdit(documents=[*lines, town.passage], directives=chosen)

    questions, answers, backwards = zip(*town.questions())
    prompt = NOTES_DIRECTED if directives else NOTES
    return Task(
        name=town.name,
        prompt=prompt.format(context=town.passage),
        context=[town.passage],
        questions=list(questions),
        queries=[QUERY.format(question=question) for question in questions],
        answers=list(answers),
        judge=exact_judge,
        read=read,
        references={"passage only": SelfEdit(documents=[town.passage])},
        kinds=["reversed" if back else "forward" for back in backwards],
        form=lambda line: classify(line, town.passage)[0])


def read_directive(line):
    """{"lr", "epochs"} of a self-edit's first line. ValueError if it is no directive."""
    found = re.fullmatch(r"Study at rate (0\.\d+) for (\d+) rounds\.", line)
    if not found or float(found[1]) not in RATES or int(found[2]) not in EPOCHS:
        raise ValueError("its first line is no directive")
    return {"lr": float(found[1]), "epochs": int(found[2])}


exact_judge = each(lambda question, gold, prediction: prediction.strip(" .") == gold)


# ------------------------------------------------------------------------------- statistics

def describe(tasks, edits):
    """{form: share of the lines of self-edits that have it, choice: share of the self-edits that
    make it}."""
    forms, choices, n = Counter(), Counter(), 0
    for task, row in zip(tasks, edits):
        for edit in row:
            n += 1
            forms.update(task.form(line) for line in edit.text.splitlines())
            choices.update(f"{name} {value}" for name, value in edit.directives.items())
    shares = {form: count / forms.total() for form, count in forms.most_common()}
    return shares | {choice: count / n for choice, count in choices.most_common()}


def pattern(template):
    """A template as a regular expression with groups t and v."""
    return re.compile(re.escape(template).replace(r"\{t\}", "(?P<t>.+)")
                      .replace(r"\{v\}", "(?P<v>.+)"))


PATTERNS = []               # (relation, form, pattern) of every note
PASSAGE_PATTERNS = []       # (relation, pattern) of every sentence of a passage
for _name, _relation in RELATIONS.items():
    for _form, (_field, _answer) in FORMS.items():
        for _template in getattr(_relation, _field):
            PATTERNS.append((_name, _form, pattern(_template + _answer)))
    for _template in [_relation.it, *_relation.value_first]:
        PASSAGE_PATTERNS.append((_name, pattern(_template)))


def classify(line, passage):
    """(form, relation) of a note; the relation of a line that states no fact is None.

    The form is 'copy' (a sentence as in a passage), 'vague', 'plain', 'reversed', 'question' or
    'question reversed'; 'wrong' if its form is one of these but it isn't so; 'directive'; else
    'garbled'."""
    town, facts = read_passage(passage)
    if line in [remark.format(t=town) for remark in VAGUE]:
        return "vague", None
    if re.fullmatch(r"Study at rate 0\.\d+ for \d+ rounds\.", line):
        return "directive", None
    for relation, form, regex in PATTERNS:
        match = regex.fullmatch(line)
        if match:
            true = match["t"] == town and match["v"] == facts.get(relation)
            return (form, relation) if true else ("wrong", relation)
    found = read_sentence(line, town)
    if found:
        relation, value = found
        return ("copy" if facts.get(relation) == value else "wrong"), relation
    return "garbled", None


def taught(line, passage):
    """(relation, 'forward' or 'reversed'): the question that a note answers, or None.

    A sentence of the passage says "it" for the town, but for the first one: it answers none."""
    form, relation = classify(line, passage)
    if form in ("plain", "question") or form == "copy" and line.startswith("The town of "):
        return relation, "forward"
    if form in ("reversed", "question reversed"):
        return relation, "reversed"
    return None


def asked(passage):
    """{question: (relation, 'forward' or 'reversed')} of the questions about a town."""
    town, facts = read_passage(passage)
    found = {}
    for name, value in facts.items():
        relation = RELATIONS[name]
        found[relation.question.format(t=town)] = name, "forward"
        if name in NAMED:
            found[relation.question_back.format(v=value)] = name, "reversed"
    return found


def read_sentence(sentence, town):
    """(relation, value) of a passage's sentence, or None."""
    sentence = sentence.replace("The town of " + town, "It")
    for relation, regex in PASSAGE_PATTERNS:
        match = regex.fullmatch(sentence)
        if match:
            return relation, match["v"]
    return None


def read_passage(passage):
    """(town, {relation: value}) of a passage."""
    town = re.match(r"The town of (\w+)", passage)[1]
    sentences = re.findall(r"[^ .][^.]*\.", passage)
    return town, dict(read_sentence(sentence, town) for sentence in sentences)


def main():
    rng = random.Random(0)
    town = make_town(rng, out=True)
    print(town.passage, "\n")
    for question, answer, _ in town.questions():
        print(f"{question} {answer}")
    print()
    for relation, form in town.notes():
        line = town.say(relation, form, rng)
        print(f"{classify(line, town.passage)[0]:>18}: {line}")


if __name__ == "__main__":
    main()
