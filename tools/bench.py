"""How fast the engine is, beside what one would use instead, in one run.

    python -m tools.bench                           # the embedded checkpoint, minutes on a CPU
    python -m tools.bench --model DIR_OR_HUB_ID --dtype bfloat16
    python -m tools.bench --shape qwen2.5-7b --jobs 256       # random weights of a known shape
    python -m tools.bench --suite                             # the first hour on a GPU (suite.py)

Every arm does the same work in turn, A B C A B C; medians are shown. speed.py says what the work
is. An arm whose library is missing is named and left out.
"""
import random
import tempfile
from dataclasses import replace

import torch

from engine.memory import auto_slots, step_memory
from lora import Adapters
from model import load_pretrained
from support.checkpoint import EMBEDDED
from support.files import Parser, UserError, at_least, cli, positive
from tools.plan import SHAPES
from tools.speed import (LENGTHS, N_ADAPTERS, N_QUESTIONS, RECIPE, Floor, Peer, answer, compare,
                   make_jobs, make_questions, one_round, shaped, show, timed, train)
from tools.suite import suite


def bench_training(args, model, peer, floor, lengths):
    # One adapter after the other is as fast for few jobs as for many. Side by side takes many, as
    # slots are empty when few are left. So the slow arms train the first ones only.
    jobs = make_jobs(model, lengths(args.jobs), replace(RECIPE, epochs=args.epochs))
    few = jobs[:args.peer_jobs]
    steps, tokens = sum(job.steps for job in jobs), sum(job.tokens for job in jobs)
    slots = args.slots or auto_slots(model, jobs)
    need = step_memory(model, RECIPE.lora, slots, slots * tokens / steps)
    print(f"formula: a step of {slots} slots needs {need / 2 ** 30:.2f} GiB beside the weights")

    packed, fair = f"ours, packed, {slots} slots", "PEFT, bare loop, no padding (the fair peer)"
    work = {packed: jobs, "ours, one slot": few, fair: few}
    arms = {packed: lambda: train(jobs, model, slots),
            "ours, one slot": lambda: train(few, model, 1)}
    if peer:
        arms[fair] = lambda: peer.bare_loop(few)
    timings = compare(model.device, arms, args.repeats)

    print(f"\ntraining {len(jobs)} adapters, {steps} steps, {tokens} tokens (slow arms: the first "
          f"{len(few)}); median of {args.repeats}")
    rate = {}       # tokens per second
    for name, timing in timings.items():
        own_tokens = sum(job.tokens for job in work[name])
        rate[name] = own_tokens / timing.median
        per_hour = 3600 * len(work[name]) / timing.median
        share = rate[name] / floor.tokens_per_second
        show(name, timing, own_tokens, f"{per_hour:.0f} adapters/h, {share:.1%} of the floor")
    if not peer:
        return
    print(f"  ours over the fair peer, by tokens/s: {rate[packed] / rate[fair]:.2f} x")
    n_steps, pad_to = 4, min(2048, model.config.max_len)
    try:
        seconds, _ = timed(model.device, lambda: peer.trainer(jobs, pad_to, n_steps))
    except ImportError as e:
        print(f"  no Trainer: {e}")
        return
    estimate = seconds / n_steps * steps
    print(f"  Trainer + PEFT, rows padded to {pad_to}: {n_steps} steps in {seconds:.1f} s; "
          f"extrapolated to all: {estimate:.0f} s, {estimate / timings[packed].median:.0f} x ours")


def bench_answering(args, model, peer):
    questions = make_questions(model)
    adapters = Adapters(model, RECIPE.lora, N_ADAPTERS)
    for i in range(N_ADAPTERS):
        adapters.init(i, i)
    together, one_by_one = "ours, together", "transformers + PEFT, one by one"
    arms = {together: lambda: answer(model, adapters, questions, args.n_new)}
    if peer:
        arms[one_by_one] = lambda: peer.answer(N_ADAPTERS, questions, args.n_new)
    timings = compare(model.device, arms, args.repeats)
    print(f"\nanswering {N_QUESTIONS} questions under {N_ADAPTERS} adapters, {args.n_new} tokens "
          f"each; median of {args.repeats}")
    for name, timing in timings.items():
        show(name, timing, N_QUESTIONS * args.n_new)
    if peer:
        ratio = timings[one_by_one].median / timings[together].median
        print(f"  ours over the peer: {ratio:.2f} x")


def bench_rounds(args, model, lengths):
    print("\na round: 8 self-edits of 64 tokens a prompt; their SFT; 4 answers of 8 tokens each")
    questions, four = make_questions(model), lengths(4)
    recipe = replace(RECIPE, slots=args.slots)
    for n in args.scaling:      # the same four self-edits, again and again
        jobs = make_jobs(model, [four[i % 4] for i in range(n)], recipe)
        seconds, peak = timed(model.device, lambda: one_round(model, jobs, questions))
        print(f"  {n:4} self-edits {seconds:8.2f} s, {seconds / n * 1000:7.1f} ms each, "
              f"{peak / 2 ** 30:6.2f} GiB", flush=True)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", help="folder or hub id (default: the embedded checkpoint)")
    ap.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"),
                    help="of the weights (default: bfloat16 on cuda, else float32)")
    ap.add_argument("--jobs", type=positive, help="adapters to train (default: 24; cuda: 256)")
    ap.add_argument("--peer-jobs", type=positive, default=24, help="of the slow arms (default: 24)")
    ap.add_argument("--documents", type=positive, help="at most so many of a self-edit's")
    ap.add_argument("--epochs", type=positive, default=1, help="passes (the paper: 10)")
    ap.add_argument("--slots", type=at_least(0), default=0, help="side by side; 0: automatic")
    ap.add_argument("--repeats", type=positive, default=5)
    ap.add_argument("--n-new", type=positive, default=32, help="tokens of an answer (default: 32)")
    ap.add_argument("--scaling", type=positive, nargs="*", default=[4, 16, 64, 256],
                    help="numbers of self-edits of a growing round (default: 4 16 64 256)")
    ap.add_argument("--suite", action="store_true",
                    help="tests, training, decoding and a run on this GPU, into a Markdown file")
    ap.add_argument("--out", default="suite.md", help="the file of --suite (default: suite.md)")
    ap.add_argument("--train-data", help="passages for the run of --suite with --model")
    ap.add_argument("--eval-data", help="the same, held out")
    args = ap.parse_args()
    if args.suite:
        return suite(args)
    if args.model and args.shape:
        raise UserError("--model or --shape, not both")
    device = torch.device(args.device)
    args.jobs = args.jobs or (256 if device.type == "cuda" else 24)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            model = shaped(args.shape, folder, device, dtype)
        else:
            model = load_pretrained(args.model or EMBEDDED, device, dtype)
        bench(args, model)


def bench(args, model):
    rng = random.Random(1)
    edits = [rng.sample(documents, len(documents))[:args.documents]
             for documents in rng.sample(LENGTHS, len(LENGTHS))]

    def lengths(n):
        """Document lengths of n self-edits, cut to the model's window."""
        chosen = [edits[i % len(edits)] for i in range(n)]
        return [[min(length, model.config.max_len) for length in edit] for edit in chosen]

    floor = Floor.of(model)
    device = f"CPU, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    print(f"{args.shape or model.folder}, {model.dtype}, {device}, torch {torch.__version__}\n"
          f"N {floor.weights / 1e6:.2f} M weights in products, P {floor.parameters / 1e6:.2f} M an "
          f"adapter: 4 N + 6 P = {floor.flops / 1e6:.1f} MFLOP a token; a product runs at "
          f"{floor.rate / 1e9:.0f} GFLOP/s: floor {floor.tokens_per_second:.0f} tokens/s")
    try:
        peer = Peer(model, pretrained=not args.shape)
    except ImportError as e:
        peer = None
        print(f"no peers: {e} (requirements-dev.txt)")
    bench_training(args, model, peer, floor, lengths)
    bench_answering(args, model, peer)
    bench_rounds(args, model, lengths)


if __name__ == "__main__":
    cli(main)
