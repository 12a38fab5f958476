"""Makes nanoSEAL's own two checkpoints from nothing: a tokenizer, a model that has read.

    python -m data.pretrain_tiny --out data/tiny    # half an hour on one core
    python -m data.pretrain_tiny --world puzzles --out data/tiny-arc     # six minutes

*Towns.* The model must be able to do what SEAL presupposes of a language model, and no more: read a
passage and answer questions about it, store what it is trained on so that it can be asked for, and
write notes, mostly poor ones. So it reads
  - about a few hundred towns, over and over, in passages, notes and questions: what is in its
    weights can be asked for;
  - passages about ever new towns, with a question and its answer, or with notes of mixed quality
    (`write_notes`).
First come short passages and drills in copying (without them, copying emerges late or never); last,
mostly notes. None of the names is one that data/tinyworld.py gives out in its tasks.

*Puzzles.* It must copy grids of all sizes and write self-edits of every kind. Rules it never sees:
a little ability to guess at them makes a model that is harder to train on one than mere copying.
"""
import json
import random
import tempfile
import time
from pathlib import Path

import torch

from data import arc, tinyarc, tinyworld as world
from engine.ribbon import Ribbon
from model import ModelConfig, Transformer
from selfedit import NOTES, NOTES_DIRECTED, PUZZLE_PROMPT
from support.checkpoint import read_config
from support.files import Parser, UserError, cli, positive
from support.tokenizer import Tokenizer

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
          "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 512, "rope_theta": 10000.0, "hidden_act": "silu",
          "tie_word_embeddings": True, "torch_dtype": "float32", "eos_token_id": 0}
PUZZLES = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16,
                    "max_position_embeddings": 1024}
END = "<|endoftext|>"

# What kinds of notes a text is made of, and how often: the first policy.
RECIPES = {"copy": .24, "vague": .22, "plain": .16, "question": .10, "reversed": .08,
           "question both": .10, "mixture": .10}
WRONG = 0.06    # of the notes are mistaken


# ------------------------------------------------------------------------------- texts

def write_notes(town, rng, length=(4, 10)):
    """A self-edit by the first policy: lines of one kind, or a mixture; nothing twice."""
    recipe = rng.choices(list(RECIPES), RECIPES.values())[0]
    pool = []
    if recipe in ("copy", "mixture"):
        pool += town.sentences
    if recipe in ("vague", "mixture"):
        pool += [remark.format(t=town.name) for remark in rng.sample(world.VAGUE, 6)]
    for relation, form in town.notes():
        both = recipe == "question both" and form.startswith("question")
        if recipe in (form, "mixture") or both:
            value = None
            if rng.random() < WRONG:
                value = rng.choice(other_values(town, relation))
            pool.append(town.say(relation, form, rng, value))
    return "\n".join(rng.sample(pool, min(len(pool), rng.randint(*length))))


def other_values(town, relation):
    """What one could mistake for the value: another name in the passage, any other month, ..."""
    kind = world.RELATIONS[relation].kind
    near = world.VALUES.get(kind) or [town.facts[r] for r in town.facts if r in world.NAMED]
    others = [value for value in near if value != town.facts[relation]]
    return others or [town.name]


def notes_text(rng, **facts):
    """A new town's passage, and notes about it; one in five begins with a directive."""
    town = world.make_town(rng, **facts)
    if rng.random() < .2:
        directive = world.DIRECTIVE.format(lr=rng.choice(world.RATES),
                                           epochs=rng.choice(world.EPOCHS))
        notes = directive + "\n" + write_notes(town, rng)
        return NOTES_DIRECTED.format(context=town.passage), notes
    return NOTES.format(context=town.passage), write_notes(town, rng)


def open_book(rng, **facts):
    """A new town's passage, a question about it, the answer."""
    town = world.make_town(rng, **facts)
    question, answer, _ = rng.choice(town.questions())
    return town.passage + "\n\n" + world.QUERY.format(question=question), " " + answer


def drill(rng):
    """Names to say again."""
    names = " ".join(rng.choice(world.NAMES[rng.choice(list(world.LAST)), False])
                     for _ in range(rng.randint(2, 6)))
    return f"Repeat: {names}\nAgain:", " " + names


def short(rng):
    """A short passage, asked about or annotated."""
    make = open_book if rng.random() < .6 else notes_text
    return make(rng, named=rng.randint(1, 2), everyday=rng.randint(0, 1))


def known(rng, towns):
    """About a town to know by heart: a passage, a note or a test question, mostly reversed."""
    town = rng.choice(towns)
    what = rng.random()
    if what < .1:
        return "", world.reworded(town, rng).passage
    if what < .5:
        form = rng.choice(list(world.FORMS))  # half of the notes are reversed
        relation, _ = rng.choice([note for note in town.notes() if note[1] == form])
        return "", town.say(relation, form, rng)
    back = rng.random() < .6
    question, answer, _ = rng.choice([q for q in town.questions() if q[2] == back])
    return world.QUERY.format(question=question), " " + answer


def town_text(rng, towns, progress):
    """The next text about towns, [(piece, weight of its tokens' loss)]; progress is from 0 to 1."""
    prompt, completion = prompt_and_completion(rng, towns, progress)
    return [(prompt, .1), (completion, 1)]


def prompt_and_completion(rng, towns, progress):
    """The text itself."""
    if progress < .1:
        notes, book, copying, brief = .05, .1, .25, .4
    elif progress < .7:
        notes, book, copying, brief = .1, .1, .02, .03
    else:
        notes, book, copying, brief = .4, .08, 0, 0
    what = rng.random()
    for share, make in ((notes, notes_text), (book, open_book), (copying, drill), (brief, short)):
        if what < share:
            return make(rng)
        what -= share
    return known(rng, towns)


# ------------------------------------------------------------------------------- puzzles

# The first policy: what self-edits are made of, each choice independent of the others.
RATES, EPOCHS, TOOL, MALFORMED = (.001, .003, .01, .03), (1, 2, 4, 8), .15, .05


def json_text(rng, puzzle):
    """Demonstrations, and a self-edit by the first policy."""
    tools = [tool for tool in arc.TOOLS if rng.random() < TOOL]
    lr = rng.choice(RATES)
    completion_only = rng.random() < .5
    text = arc.write_json_edit(tools, completion_only, lr, epochs=rng.choice(EPOCHS))
    if rng.random() < MALFORMED:
        text = text[:-rng.randint(1, 2)]
    prompt = PUZZLE_PROMPT.format(pairs=arc.show_pairs(puzzle[:3]))
    return [(prompt, .02), (text, 1)]


def puzzle_text(rng, progress):
    """The next text about puzzles, [(piece, weight of its tokens' loss)]: copies, self-edits."""
    if rng.random() < .1:
        return json_text(rng, tinyarc.make_puzzle(tinyarc.make_rule(rng, out=False), rng))
    height, width = (3, 3) if rng.random() < .6 else (rng.randint(2, 6), rng.randint(2, 6))
    colours = rng.randint(1, min(9, height * width) // 2 + 1)
    rule = {colour: colour for colour in rng.sample(range(10), colours)}
    pieces = [(arc.PUZZLE, .02)]
    for i, (x, y) in enumerate(tinyarc.make_puzzle(rule, rng, rng.randint(1, 5), height, width)):
        pieces += [("\n\n" * (i > 0) + arc.show_input(x), .02), (arc.show(y), 1)]
    return pieces


# ------------------------------------------------------------------------------- tokenizer

def make_tokenizer(folder, text, seed, window, min_frequency, digits):
    """Train a byte-level BPE on a world's text, and write it as Hugging Face's files.

    Returns the vocabulary's size. Needs the `tokenizers` library (requirements-dev.txt); reading
    the result does not."""
    from tokenizers import Tokenizer as Trainable, decoders, models, pre_tokenizers, trainers
    rng = random.Random(seed)
    corpus = ["".join(piece for piece, _ in text(rng, rng.random())) for _ in range(20_000)]
    tok = Trainable(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    if digits:  # each is a token
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     tok.pre_tokenizer])
    tok.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1024, min_frequency=min_frequency, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END,
                "model_max_length": window}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return tok.get_vocab_size()


# ------------------------------------------------------------------------------- model

def scaled(config: dict, dim: int) -> dict:
    """A config of another width, with as many layers and heads. dim: a multiple of 16."""
    shape = {}
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        shape[name] = config[name] * dim // config["hidden_size"]
    return config | shape


def new_model(folder, seed):
    """A Transformer as GPT-2 begins: N(0, .02), smaller in layers that end a residual branch."""
    model = Transformer(ModelConfig(**read_config(folder)), folder)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, 0, .02 / (2 * model.config.n_layer) ** .5 if small else .02,
                                  generator=generator)
    return model


def batches(tok, text, tokens, per_step, rng):
    """Lists of (ids, weight of each token's loss), about per_step tokens each, `tokens` in all."""
    read = 0
    while read < tokens:
        batch, size = [], 0
        while size < per_step:
            ids, weights = [], []
            for piece, weight in text(rng, read / tokens):
                more = tok.encode(piece)
                ids += more
                weights += [weight] * len(more)
            batch.append((ids + [tok.eos], weights + [1.0]))
            size += len(batch[-1][0])
        read += size
        yield read, batch


def loss_of(model, batch, total):
    """Weighted mean loss of some texts, as a share of a step whose weights add up to `total`."""
    ribbon = Ribbon([len(ids) for ids, _ in batch], "cpu")
    ids = torch.tensor([i for ids, _ in batch for i in ids])
    weight = torch.tensor([w for _, weights in batch for w in weights])
    source = (ribbon.position[1:] > 0).nonzero()[:, 0]  # tokens with a successor in their text
    h = model.hidden(ids, ribbon.position, ribbon.attend)
    nll = torch.nn.functional.cross_entropy(model.lm_head(h[source]), ids[source + 1],
                                            reduction="none")
    return (nll * weight[source + 1]).sum() / total


def train(model, tok, text, tokens, lr, per_step, seed):
    """AdamW; the learning rate rises over the first 2 % and falls linearly to 0."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=.01)
    begin, average, printed = time.time(), None, 0
    for read, batch in batches(tok, text, tokens, per_step, random.Random(seed)):
        done = min(1, read / tokens)
        optimizer.param_groups[0]["lr"] = lr * min(done / .02, (1 - done) / .98)
        batch.sort(key=lambda b: len(b[0]))  # like lengths together: little padding in attention
        total, loss, piece, size = sum(sum(w) for _, w in batch), 0, [], 0
        for i, one in enumerate(batch):
            piece.append(one)
            size += len(one[0])
            if size >= per_step // 2 or i == len(batch) - 1:
                part = loss_of(model, piece, total)
                part.backward()
                loss, piece, size = loss + part.item(), [], 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss if average is None else .98 * average + .02 * loss
        if done >= printed:
            seconds = time.time() - begin
            print(f"{done:4.0%}  {read / 1e6:5.2f} M tokens  loss {average:.3f}  "
                  f"{read / seconds:.0f} tokens/s  "
                  f"{(tokens - read) / read * seconds / 60:.1f} min left", flush=True)
            printed += .02
    model.requires_grad_(False)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--world", default="towns", choices=("towns", "puzzles"))
    ap.add_argument("--out", required=True, help="folder to write")
    ap.add_argument("--towns", type=positive, default=200, help="to know by heart (default: 200)")
    ap.add_argument("--dim", type=positive, default=128, help="width of the model (default: 128)")
    ap.add_argument("--tokens", type=float, help="to read (default: 11e6; puzzles: 1.6e6)")
    ap.add_argument("--threads", type=positive, default=1,
                    help="of torch; sums, and so the weights, depend on it")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already; nothing was overwritten")
    torch.set_num_threads(args.threads)
    if args.world == "towns":
        rng = random.Random(args.seed)
        towns = [world.make_town(rng, name)
                 for name in rng.sample(world.NAMES["town", False], args.towns)]
        text, config = lambda rng, progress: town_text(rng, towns, progress), CONFIG
        # a name is rarer than any word or syllable: the minimum frequency keeps names in syllables
        frequency, digits, tokens, lr, per_step = 600, False, args.tokens or 11e6, 3e-3, 2048
    else:
        text, config = puzzle_text, PUZZLES
        frequency, digits, tokens, lr, per_step = 100, True, args.tokens or 1.6e6, 2e-3, 512
    if args.dim % 16:
        raise UserError("--dim must be a multiple of 16")
    config = scaled(config, args.dim)
    with tempfile.TemporaryDirectory() as draft:
        size = make_tokenizer(Path(draft), text, args.seed, config["max_position_embeddings"],
                              frequency, digits)
        (Path(draft) / "config.json").write_text(
            json.dumps(config | {"vocab_size": size}, indent=2))
        tok, model = Tokenizer.from_pretrained(draft), new_model(draft, args.seed)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
              f"vocabulary {size}")
        train(model, tok, text, int(tokens), lr, per_step, args.seed)
        model.save_pretrained(out)


if __name__ == "__main__":
    cli(main)
