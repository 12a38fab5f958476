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
from dataclasses import dataclass

from checkpoint import UserError
from selfedit import EMPTY, SelfEdit, Task, split_documents

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


NAMES = {(kind, out): [n for a in FIRST for b in last if held_out(n := a + b) == out]
         for kind, last in LAST.items() for out in (True, False)}


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

NOTES = "{passage}\n\nNotes:\n"  # what the model reads before it writes a self-edit
NOTES_DIRECTED = "{passage}\n\nHow to study, and notes:\n"
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
        return [(r, form) for r in self.facts for form, (field, _) in FORMS.items()
                if getattr(RELATIONS[r], field)]

    def questions(self):
        """(question, answer, is reversed): forward for every fact, reversed for invented names."""
        fill = lambda template, r: template.format(t=self.name, v=self.facts[r])
        return [(fill(RELATIONS[r].question, r), v, False) for r, v in self.facts.items()] + \
               [(fill(RELATIONS[r].question_back, r), self.name, True)
                for r in self.facts if r in NAMED]


def make_town(rng, name=None, out=False, everyday=3, named=4):
    """A town from held-out (`out`) or pretraining names, with so many facts of each kind."""
    relations = rng.sample(NAMED, named) + rng.sample(EVERYDAY, everyday)
    kinds = {r: RELATIONS[r].kind for r in relations}
    facts = {r: rng.choice(NAMES[kind, out] if kind in LAST else VALUES[kind])
             for r, kind in kinds.items()}
    town = Town(name or rng.choice(NAMES["town", out]), facts, [])
    return reworded(town, rng)


def reworded(town, rng):
    """The same town, another passage. After the first sentence, two thirds put the value first."""
    order = rng.sample(list(town.facts), len(town.facts))
    sentences = []
    for i, r in enumerate(order):
        template = (rng.choice(RELATIONS[r].value_first) if i and rng.random() < 2 / 3
                    else RELATIONS[r].it)
        if not i:
            template = "The town of {t}" + template.removeprefix("It")
        sentences.append(template.format(t=town.name, v=town.facts[r]))
    return Town(town.name, town.facts, sentences)


# ------------------------------------------------------------------------------- tasks

# hyper-parameters were chosen on 'tune'
SPLITS = {"train": (0, 400), "eval": (400, 520), "tune": (520, 640)}


def load(split, directives=False):
    """The held-out towns of a split ('train', 'eval' or 'tune') as Tasks."""
    if split not in SPLITS:
        raise UserError(f"the tiny world has the towns {', '.join(SPLITS)}, not {split!r}")
    names = sorted(NAMES["town", True],
                   key=lambda name: hashlib.sha256(name[::-1].encode()).digest())
    towns = [make_town(random.Random(name), name, out=True)
             for name in names[slice(*SPLITS[split])]]
    return [town_task(town, directives) for town in towns]


def town_task(town, directives=False):
    """A town as a Task; with `directives`, a self-edit's first line sets its lr and epochs."""
    def read(text):
        lines, chosen = split_documents(text), {}
        if directives:
            first = re.fullmatch(r"Study at rate (0\.\d+) for (\d+) rounds\.",
                                 lines.pop(0) if lines else "")
            if not first or float(first[1]) not in RATES or int(first[2]) not in EPOCHS:
                raise ValueError("its first line is no directive")
            chosen = {"lr": float(first[1]), "epochs": int(first[2])}
        if not lines:
            raise ValueError(EMPTY)
        return [*lines, town.passage], chosen

    questions, answers, backwards = zip(*town.questions())
    prompt = (NOTES_DIRECTED if directives else NOTES).format(passage=town.passage)
    return Task(name=town.name, prompt=prompt, questions=list(questions), answers=list(answers),
                queries=[QUERY.format(question=q) for q in questions],
                context=[town.passage], read=read,
                references={"passage only": SelfEdit("", [], [town.passage])},
                grade=lambda question, answer, prediction: prediction.strip(" .") == answer,
                kinds=["reversed" if back else "forward" for back in backwards],
                form=lambda line: classify(line, town.passage))


def pattern(template):
    """A template as a regular expression with groups t and v."""
    return re.compile(re.escape(template).replace(r"\{t\}", "(?P<t>.+)")
                      .replace(r"\{v\}", "(?P<v>.+)"))


PATTERNS = [(relation, form, pattern(template + answer)) for relation, r in RELATIONS.items()
            for form, (field, answer) in FORMS.items() for template in getattr(r, field)]


PASSAGE_PATTERNS = [(relation, pattern(template)) for relation, r in RELATIONS.items()
                    for template in (r.it, *r.value_first)]


def classify(line, passage):
    """The form of a note.

    It is 'copy' (a sentence as in a passage), 'vague', 'plain', 'reversed', 'question' or 'question
    reversed'; 'wrong' if its form is one of these but it isn't so; 'directive'; else 'garbled'."""
    town, facts = read_passage(passage)
    if line in [remark.format(t=town) for remark in VAGUE]:
        return "vague"
    if re.fullmatch(r"Study at rate 0\.\d+ for \d+ rounds\.", line):
        return "directive"
    for relation, form, regex in PATTERNS:
        if m := regex.fullmatch(line):
            return form if m["t"] == town and m["v"] == facts.get(relation) else "wrong"
    if found := read_sentence(line, town):
        return "copy" if facts.get(found[0]) == found[1] else "wrong"
    return "garbled"


def read_sentence(sentence, town):
    """(relation, value) of a passage's sentence, or None."""
    sentence = sentence.replace("The town of " + town, "It")
    return next(((r, m["v"]) for r, regex in PASSAGE_PATTERNS if (m := regex.fullmatch(sentence))),
                None)


def read_passage(passage):
    """(town, {relation: value}) of a passage."""
    town = re.match(r"The town of (\w+)", passage)[1]
    return town, dict(read_sentence(sentence, town)
                      for sentence in re.findall(r"[^ .][^.]*\.", passage))


def main():
    rng = random.Random(0)
    town = make_town(rng, out=True)
    print(town.passage, "\n")
    for question, answer, _ in town.questions():
        print(f"{question} {answer}")
    print()
    for relation, form in town.notes():
        line = town.say(relation, form, rng)
        print(f"{classify(line, town.passage):>18}: {line}")


if __name__ == "__main__":
    main()
